"""The ``teleport`` command."""

import json
import math
import shlex
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from tqdm import tqdm

import teleport
from teleport import bench as benchmarks
from teleport import data as datasets
from teleport.book.commands import app as book_app
from teleport.check.grading import grade
from teleport.checkpoint import locked
from teleport.cluster import check_cluster, run_on_cluster
from teleport.console import (
    console,
    count_of,
    draw_report,
    say,
    say_diverged,
    show,
    show_grades,
    step_progress,
)
from teleport.continual import (
    LR_GRID,
    TUNING_SEED,
    Course,
    default_strategies,
    run_strategies,
)
from teleport.errors import CheckError, RunError, TeleportError
from teleport.experiment import (
    Arm,
    Settings,
    default_arms,
    lent_tuning,
    objective_arms,
    rival_arms,
    teleport_settings,
)
from teleport.folders import new_folder, open_folder, resumed_folder, slug
from teleport.matrix import blocks, markdown
from teleport.models import INITS
from teleport.moment import check_moment
from teleport.optimizers import OPTIMIZERS
from teleport.pool import run_local
from teleport.product import product_at, write_product
from teleport.recipe import one_of
from teleport.records import read_run
from teleport.registry import EXPERIMENTS, find_experiment, names_in
from teleport.remembering import METHODS
from teleport.run import (
    CHECKPOINT_SECONDS,
    device_named,
    device_of,
    run_arms,
    steps_per_run,
)
from teleport.schedule import SCHEDULES
from teleport.spectrum import write_spectra
from teleport.sweep import Failure, Job, Plan, check_folders, check_jobs, total_steps
from teleport.tasks import SEQUENCES
from teleport.tensorboard import check_tensorboard
from teleport.threshold import write_trajectories
from teleport.training import check_fits, late_teleport

# What was typed, for the records.
COMMAND_LINE: ContextVar[str] = ContextVar("COMMAND_LINE", default="teleport")

app = typer.Typer(
    name="teleport",
    help="Teleportation with null-space gradient projection: experiments, figures, data.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Fetch, list and verify data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(book_app, name="book")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code (130 after Ctrl-C, 1 after an error)."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        COMMAND_LINE.set(shlex.join(["teleport", *given]))
        app(given)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except (TeleportError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        return 1
    return 0


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"teleport {teleport.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = None,
) -> None:
    pass


@app.command("list")
def list_experiments() -> None:
    """List the experiments, their presets and the default arms."""
    table = Table("name", "what", "data", "presets (epochs)")
    for e in EXPERIMENTS.values():
        presets = ", ".join(f"{name} ({p.epochs})" for name, p in e.presets.items())
        table.add_row(e.name, e.title, e.data, presets)
    console().print(table)
    arms = Table("experiment", "optimizer", "low lr", "tuned lr", "tuned initial gain", "tuned on")
    for e in EXPERIMENTS.values():
        for optimizer, t in e.tuning.items():
            gain = f"lr {t.gain_lr:g}, {t.init} init, head x {t.head_gain:g}"
            on = "" if t.on == e.name else t.on
            arms.add_row(e.name, optimizer, f"{t.low:g}", f"{t.tuned:g}", gain, on)
    console().print(arms)


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="Experiment; see `teleport list`.")] = "mnist-sample",
    preset: Annotated[str, typer.Option(help="Size: tiny, cpu or paper.")] = "cpu",
    optimizer: Annotated[
        str, typer.Option(help=f"{', '.join(OPTIMIZERS)}, or a class by its name.")
    ] = "sgd",
    lr: Annotated[
        list[float] | None,
        typer.Option(help="Learning rate; may be repeated. Replaces the default arms."),
    ] = None,
    init: Annotated[
        str, typer.Option(help=f"With --lr: initialisation, {' or '.join(INITS)}.")
    ] = "default",
    head_gain: Annotated[
        float, typer.Option(help="With --lr: factor on the initial weights of the last layer.")
    ] = 1.0,
    teleports: Annotated[
        bool, typer.Option("--teleport/--no-teleport", help="Run the arms that teleport.")
    ] = True,
    epochs: Annotated[int | None, typer.Option(help="Epochs; default from the preset.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted from 0.")] = 1,
    schedule: Annotated[
        str, typer.Option(help="default: once after 50 steps. paper: first 5 epochs, 32 x 8.")
    ] = "default",
    batches: Annotated[
        int | None, typer.Option(help="Teleport batches each time; default from the schedule.")
    ] = None,
    after: Annotated[
        int | None,
        typer.Option(help="Training steps before the first teleport; default from the schedule."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Directions per teleport batch; default 1, paper 8.")
    ] = None,
    teleport_lr: Annotated[
        float | None, typer.Option(help="Fixed teleport step size, the paper's eta.")
    ] = None,
    growth: Annotated[
        float | None, typer.Option(help="Wanted factor on the gradient norm; default 1.5.")
    ] = None,
    cap: Annotated[float | None, typer.Option(help="Upper bound on the gradient norm.")] = None,
    tau: Annotated[float, typer.Option(help="Share of input energy kept fixed, in (0, 1].")] = 1.0,
    rivals: Annotated[
        bool, typer.Option("--rivals", help="Add every rival and control as an arm.")
    ] = False,
    objectives: Annotated[
        bool, typer.Option("--objectives", help="Add moves in the null space to other objectives.")
    ] = False,
    activation: Annotated[
        str, typer.Option(help="relu (the paper's), leaky_relu (needed by --rivals) or tanh.")
    ] = "relu",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="New folder; default runs/<date>-<name>.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in the folder of --out after a kill.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start over in the folder of --out.")
    ] = False,
    checkpoint: Annotated[
        float, typer.Option(min=0.0, help="Seconds between checkpoints of a run.")
    ] = CHECKPOINT_SECONDS,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard (extra tensorboard).")
    ] = None,
) -> None:
    """Train with and without teleportation; print a table, write records and a figure."""
    optimizer = optimizer.lower()  # names are the same in any case of letters
    options = teleport_settings(
        name,
        schedule,
        batches=batches,
        steps=steps,
        lr=teleport_lr,
        growth=growth,
        cap=cap,
        tau=tau,
        after=after,
    )
    settings = Settings(
        name, preset, optimizer, epochs, device=device, activation=activation, teleport=options
    )
    settings.size()  # names are checked before any folder is made
    if objectives and (lr or rivals):
        given = "--rivals" if rivals else f"--lr {lr}"
        raise ValueError(
            f"--objectives compares fixed arms: leave --lr and --rivals out; got {given}"
        )
    if rivals and (lr or activation == "relu"):
        raise ValueError(
            "--rivals compares fixed arms, and not all of them act through relu: leave --lr out "
            f"and give --activation leaky_relu; got --lr {lr} and --activation {activation}"
        )
    device_of(device)
    fixed = rival_arms if rivals else objective_arms
    known = (
        fixed(name, optimizer)
        if rivals or objectives
        else _arms(name, optimizer, lr, init, head_gain)
    )
    arms = [a for a in known if teleports or not a.teleport]
    dataset = datasets.load(find_experiment(name).data)
    teleporting = any(arm.teleport for arm in arms)
    check_fits(settings, dataset, teleporting)
    notes = [late_teleport(settings, dataset)] if teleporting else []
    notes += [] if lr else [lent_tuning(name, optimizer)]
    for note in filter(None, notes):
        say(f"note: {note}")
    total = steps_per_run(settings, dataset) * len(arms) * seeds
    if tensorboard is not None:
        check_tensorboard(tensorboard)
    folder = open_folder(slug(name), out, resume, force)
    with step_progress(total, folder) as progress:
        run_arms(
            settings,
            arms,
            range(seeds),
            folder,
            resume=resume,
            checkpoint_seconds=checkpoint,
            command=COMMAND_LINE.get(),
            tensorboard=tensorboard,
            progress=progress,
        )
    show(folder)


@app.command()
def continual(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(SEQUENCES)}.")] = "digits",
    preset: Annotated[str, typer.Option(help="Size: tiny or cpu.")] = "cpu",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 8,
    first_seed: Annotated[
        int, typer.Option(min=0, help="The first one; with --tune it is added to that of tuning.")
    ] = 0,
    methods: Annotated[
        str | None, typer.Option(help=f"Some of {','.join(METHODS)}, with commas; default all.")
    ] = None,
    tau: Annotated[
        list[float] | None,
        typer.Option(help="Share of input energy kept, in (0, 1]; may be repeated."),
    ] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(help="Learning rate of every method; may be repeated. Default: tuned."),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="A grid of learning rates on validation images.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in the folder of --out; finished runs stay.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="New folder; default runs/<date>-<name>.")
    ] = None,
) -> None:
    """Learn tasks in turn, keeping the old ones; print a table, write records and a figure."""
    rates = list(LR_GRID) if tune and not lr else lr
    strategies = default_strategies(name, methods.split(",") if methods else None, tau, rates)
    course = Course(name, preset, "validation" if tune else "test")
    course.size()
    start = first_seed + TUNING_SEED if tune else first_seed
    numbers = range(start, start + seeds)
    total = course.steps(course.sets()) * len(strategies) * seeds
    folder = resumed_folder(name, out, resume)
    with step_progress(total, folder) as progress:
        command = COMMAND_LINE.get()
        run_strategies(
            course, strategies, numbers, folder, resume=resume, command=command, progress=progress
        )
    show(folder)


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help=f"One of {', '.join(benchmarks.BENCHMARKS)}, or all: "
            f"all but {', '.join(benchmarks.NOT_IN_ALL)}, which takes minutes more."
        ),
    ],
    preset: Annotated[
        str, typer.Option(help="Size: tiny (seconds), cpu (minutes) or paper (for a GPU).")
    ] = "cpu",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[
        int, typer.Option(help="PyTorch's threads; with more than one, a busy machine disturbs.")
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="New folder; default runs/<date>-bench-<what>.")
    ] = None,
) -> None:
    """Measure what teleporting costs, in gradients; print tables with the budgets beside."""
    names, _ = benchmarks.chosen(what, preset)
    benchmarks.check_threads(threads)
    where = device_of(device)
    folder = new_folder(f"bench-{what}", out)
    command = COMMAND_LINE.get()
    with tqdm(unit="job", dynamic_ncols=True) as bar:

        def start(total: int) -> None:
            bar.total = total

        def progress(what: str) -> None:
            bar.update(bar.n < bar.total and bool(bar.desc))
            bar.set_description(what)

        try:
            benchmarks.run(
                names,
                preset,
                where,
                folder,
                threads=threads,
                command=command,
                start=start,
                progress=progress,
            )
        except KeyboardInterrupt:
            bar.close()
            typer.echo(f"interrupted; the records so far are complete in {folder}", err=True)
            raise typer.Exit(130) from None
    show(folder)


@app.command()
def sweep(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Experiments; see `teleport list`. FILE.toml: all of your own table, "
            "FILE.toml:NAME: one of them."
        ),
    ],
    optimizers: Annotated[str, typer.Option(help="Optimizers, with commas.")] = "sgd",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted from 0.")] = 3,
    preset: Annotated[str, typer.Option(help="Size: tiny, cpu or paper.")] = "cpu",
    schedule: Annotated[
        str, typer.Option(help=f"When to teleport: {' or '.join(SCHEDULES)}.")
    ] = "default",
    epochs: Annotated[int | None, typer.Option(help="Epochs; default from the preset.")] = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="Add the controls that act on any network.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler, instead of --jobs.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    checkpoint: Annotated[
        float, typer.Option(min=0.0, help="Seconds between checkpoints of a run.")
    ] = CHECKPOINT_SECONDS,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder; what is finished there is left. Default runs/<date>-sweep."),
    ] = None,
) -> None:
    """Run every cell of a matrix (experiment, optimizer, arm, seed); list what failed."""
    plan = Plan(
        tuple(dict.fromkeys(one for name in names for one in names_in(name))),
        tuple(dict.fromkeys(name.strip().lower() for name in optimizers.split(","))),
        seeds,
        preset,
        schedule,
        epochs,
        controls,
        device,
    )
    (device_of if scheduler is None else device_named)(device)  # the workers have their own
    for note in check_jobs(plan.jobs(Path())):  # all is checked before any folder is made
        say(f"note: {note}")
    if scheduler is not None:
        check_cluster(scheduler)
    command = COMMAND_LINE.get()
    folder = open_folder("sweep", out, resume=out is not None).resolve()
    cells = plan.jobs(folder, checkpoint_seconds=checkpoint, command=command)
    with locked(folder / ".lock", str(folder)):
        check_folders(cells)
        failures = _sweep(cells, folder, jobs, scheduler)
    failed = [failure.job for failure in failures]
    say_diverged(read_run(job.folder / job.cell.record) for job in cells if job not in failed)
    for failure in failures:
        typer.echo(f"failed: {failure.job.cell}: {failure.reason}", err=True)
    typer.echo(f"{len(cells) - len(failures)} of {count_of(len(cells), 'cell')} are in {folder}")
    if failures:
        raise typer.Exit(1)


def _sweep(cells: list[Job], folder: Path, processes: int, scheduler: str | None) -> list[Failure]:
    with step_progress(total_steps(cells), folder) as progress:
        count = [0]

        def ended(job: Job) -> None:
            count[0] += 1
            progress(f"cell {count[0]} of {len(cells)}", 0)

        progress(f"cell 0 of {len(cells)}", 0)
        if scheduler is None:
            return run_local(
                cells,
                processes,
                stepped=lambda steps: progress(f"cell {count[0]} of {len(cells)}", steps),
                ended=ended,
            )

        def ended_there(job: Job) -> None:
            ended(job)
            progress(f"cell {count[0]} of {len(cells)}", total_steps([job]))

        return run_on_cluster(cells, scheduler, ended=ended_there)


@app.command()
def spectrum(
    names: Annotated[list[str], typer.Argument(help="Experiments; see `teleport list`.")],
    preset: Annotated[str, typer.Option(help="Size: tiny, cpu or paper.")] = "cpu",
    trained: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Training steps to look after; may be repeated. Default 0, 50."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initial values, data order, batch.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="New folder; default runs/<date>-spectrum.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in the folder of --out; complete records stay.")
    ] = False,
) -> None:
    """Show how few directions hold the input energy of every layer (the paper's Figure 6a)."""
    for name in names:
        check_moment(name, preset)  # before any folder is made
    folder = resumed_folder("spectrum", out, resume)
    write_spectra(
        names,
        folder,
        preset=preset,
        steps=list(dict.fromkeys(trained or (0, 50))),
        seed=seed,
        resume=resume,
        command=COMMAND_LINE.get(),
        progress=say,
    )
    show(folder)


@app.command("tau")
def compare_thresholds(
    name: Annotated[str, typer.Argument(help="Experiment; see `teleport list`.")],
    preset: Annotated[str, typer.Option(help="Size: tiny, cpu or paper.")] = "cpu",
    trained: Annotated[int, typer.Option(min=0, help="Training steps before.")] = 50,
    lr: Annotated[
        float | None, typer.Option(help="Teleport step size; default the paper schedule's.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Teleport steps.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of initial values, data order, batch.")] = 0,
    out: Annotated[Path | None, typer.Option(help="New folder; default runs/<date>-tau.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in the folder of --out; complete records stay.")
    ] = False,
) -> None:
    """Follow gradient norm and loss over teleport steps for every tau (the paper's Figure 6b)."""
    check_moment(name, preset)
    if lr is not None and not 0.0 < lr < math.inf:
        raise ValueError(f"lr must be > 0 and finite, got {lr}")
    folder = resumed_folder("tau", out, resume)
    write_trajectories(
        name,
        folder,
        preset=preset,
        trained=trained,
        lr=lr,
        teleport_steps=steps,
        seed=seed,
        resume=resume,
        command=COMMAND_LINE.get(),
        progress=say,
    )
    show(folder)


@app.command("product")
def show_product(
    name: Annotated[str, typer.Argument(help="Experiment; see `teleport list`.")],
    layer: Annotated[
        str | None, typer.Option(help="Name of a layer in the network; default the first.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the inputs to show.")] = 48,
    preset: Annotated[str, typer.Option(help="Size: tiny, cpu or paper.")] = "cpu",
    trained: Annotated[int, typer.Option(min=0, help="Training steps before.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of initial values, data order, batch.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="New folder; default runs/<date>-product.")
    ] = None,
) -> None:
    """Show a layer as products of matrices, forward and backward (the paper's Figure 7)."""
    config, found = product_at(
        name, layer=layer, rows=rows, preset=preset, trained=trained, seed=seed, progress=say
    )
    folder = new_folder("product", out)
    write_product(folder, {"command": COMMAND_LINE.get(), **config}, found)
    show(folder)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder with records of runs and sweeps.")],
    figures: Annotated[
        Path | None, typer.Option(help="Folder for a figure of every experiment.")
    ] = None,
) -> None:
    """Print the matrix of all runs below a folder as Markdown."""
    found = blocks(folder)
    typer.echo(markdown(found))
    if figures is None:
        return
    try:
        figures.mkdir(parents=True, exist_ok=True)
        draw_report(found, figures)
    except OSError as error:
        raise RunError(
            f"cannot write figures to {figures}: {error.strerror}; give another --figures"
        ) from error
    typer.echo(f"figures are in {figures}", err=True)


@app.command()
def figure(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders written by `teleport run`, bench, continual, spectrum, tau or product."
        ),
    ],
) -> None:
    """Redraw the figures and print the tables of finished runs from their records."""
    for folder in folders:
        show(folder)


@data_app.command("list")
def data_list() -> None:
    """List the data sets, where their files are, and how to get those that are missing."""
    table = Table("name", "kind", "what", "where", "to get it")
    for info in datasets.available():
        table.add_row(info.name, info.kind, info.what, info.where, info.how)
    console().print(table)


@data_app.command("fetch")
def data_fetch(names: Annotated[list[str], typer.Argument(help="Data sets.")]) -> None:
    """Download data sets to $TELEPORT_DATA or the user's cache folder and check them."""
    for name in names:
        typer.echo(f"{name}: {datasets.fetch(name)}")


@data_app.command("verify")
def data_verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Data sets; default: all that are there.")
    ] = None,
) -> None:
    """Check the files of data sets against their checksums; exit code 1 if one is not ok."""
    chosen = names or [info.name for info in datasets.available() if not info.how]
    # Several sets may be made of the same file: it is checked once.
    statuses = {status.path: status for name in chosen for status in datasets.verify(name)}
    table = Table("file", "state", "detail")
    for status in statuses.values():
        table.add_row(str(status.path), status.state, status.detail)
    console().print(table)
    if any(status.state != "ok" for status in statuses.values()):
        raise typer.Exit(1)


@app.command("check")
def check_answers(
    path: Annotated[Path, typer.Argument(help="A notebook (.ipynb) or a Python file (.py).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    time_limit: Annotated[
        float, typer.Option(min=0.1, help="Seconds for each cell or statement of the file.")
    ] = 10.0,
) -> None:
    """Grade the exercises in a file; exit code 0: all right, 1: some wrong, 2: unusable file."""
    try:
        grades = grade(path, time_limit)
    except CheckError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(grades.to_dict(), indent=1))
    else:
        show_grades(grades)
    if not grades.passed:
        raise typer.Exit(1)


def _arms(
    experiment: str, optimizer: str, lrs: list[float] | None, init: str, head_gain: float
) -> list[Arm]:
    one_of("init", init, dict.fromkeys(INITS))
    if not lrs:
        if (init, head_gain) != ("default", 1.0):
            raise ValueError(
                "--init and --head-gain act on the arms of --lr: give a learning rate with --lr; "
                f"got --init {init} and --head-gain {head_gain:g} without one"
            )
        return default_arms(experiment, optimizer)
    for what, values in (("lr", lrs), ("head_gain", [head_gain])):
        for value in values:
            if not 0.0 < value < math.inf:
                raise ValueError(f"{what} must be > 0 and finite, got {value}")
    if len({f"{lr:g}" for lr in lrs}) < len(lrs):
        given = " ".join(map(str, lrs))
        raise ValueError(f"every --lr must be another one, by its first six digits; got {given}")
    return [Arm(lr, teleports, init, head_gain) for lr in lrs for teleports in (False, True)]
