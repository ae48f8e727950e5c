"""The ``teleport`` command."""

import json
import math
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

import teleport
from teleport import bench as benchmarks
from teleport import data as datasets
from teleport.bench_tables import Sheet, curves, holds_benchmarks, read_benchmarks, sheets
from teleport.book.commands import app as book_app
from teleport.check.grading import Grades, grade
from teleport.checkpoint import locked
from teleport.cluster import check_cluster, run_on_cluster
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
    objective_arms,
    rival_arms,
    teleport_settings,
)
from teleport.folders import new_folder, open_folder, slug
from teleport.forgetting_report import forgetting_figure, forgetting_tables
from teleport.matrix import Block, blocks, markdown, smaller, without_controls
from teleport.models import INITS
from teleport.moment import check_moment
from teleport.optimizers import OPTIMIZERS
from teleport.plots import (
    gap_figure,
    loss_figure,
    matrix_figure,
    product_figure,
    scaling_figure,
    spectrum_figure,
    threshold_figure,
)
from teleport.pool import run_local
from teleport.product import product_at, read_product, write_product
from teleport.recipe import one_of
from teleport.records import ArmSummary, Comparison, Run, by_arm, read_run, read_runs, summarise
from teleport.registry import EXPERIMENTS, find_experiment, names_in
from teleport.remembering import METHODS
from teleport.run import (
    CHECKPOINT_SECONDS,
    Progress,
    device_of,
    run_arms,
    steps_per_run,
)
from teleport.schedule import SCHEDULES
from teleport.spectrum import Measured, read_spectra, write_spectra
from teleport.sweep import Failure, Job, Plan, check_jobs, total_steps
from teleport.tasks import SEQUENCES
from teleport.tensorboard import check_tensorboard
from teleport.threshold import Trajectories, read_trajectories, write_trajectories
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
    _console().print(table)
    arms = Table("experiment", "optimizer", "low lr", "tuned lr", "tuned initial gain")
    for e in EXPERIMENTS.values():
        for optimizer, t in e.tuning.items():
            gain = f"lr {t.gain_lr:g}, {t.init} init, head x {t.head_gain:g}"
            arms.add_row(e.name, optimizer, f"{t.low:g}", f"{t.tuned:g}", gain)
    _console().print(arms)


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
    options = teleport_settings(
        name,
        schedule,
        batches=batches,
        steps=steps,
        lr=teleport_lr,
        growth=growth,
        cap=cap,
        tau=tau,
    )
    settings = Settings(
        name, preset, optimizer, epochs, device=device, activation=activation, teleport=options
    )
    settings.size()  # names are checked before any folder is made
    if rivals and (lr or activation == "relu"):
        raise ValueError(
            "--rivals compares fixed arms, and not all of them act through relu: leave --lr out "
            f"and give --activation leaky_relu; got --lr {lr} and --activation {activation}"
        )
    device_of(device)
    if objectives and (lr or rivals):
        raise ValueError("--objectives compares fixed arms: leave --lr and --rivals out")
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
    if teleporting and (note := late_teleport(settings, dataset)):
        _say(f"note: {note}")
    total = steps_per_run(settings, dataset) * len(arms) * seeds
    if tensorboard is not None:
        check_tensorboard(tensorboard)
    folder = open_folder(slug(name), out, resume, force)
    with _progress(total, folder) as progress:
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
    _show(folder)


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
    if resume and out is None:
        raise ValueError("--resume needs the folder to go on in; give it with --out")
    start = first_seed + TUNING_SEED if tune else first_seed
    numbers = range(start, start + seeds)
    total = course.steps(course.sets()) * len(strategies) * seeds
    folder = (
        out
        if resume and out is not None and out.is_dir()
        else new_folder(name, out, ", or --resume to go on in it")
    )
    with _progress(total, folder) as progress:
        command = COMMAND_LINE.get()
        run_strategies(
            course, strategies, numbers, folder, resume=resume, command=command, progress=progress
        )
    _show(folder)


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
    _show_benchmarks(folder)


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
        tuple(dict.fromkeys(name.strip() for name in optimizers.split(","))),
        seeds,
        preset,
        schedule,
        epochs,
        controls,
        device,
    )
    device_of(device)
    for note in check_jobs(plan.jobs(Path())):  # all is checked before any folder is made
        _say(f"note: {note}")
    if scheduler is not None:
        check_cluster(scheduler)
    command = COMMAND_LINE.get()
    folder = open_folder("sweep", out, resume=out is not None).resolve()
    cells = plan.jobs(folder, checkpoint_seconds=checkpoint, command=command)
    with locked(folder / ".lock", str(folder)):
        failures = _sweep(cells, folder, jobs, scheduler)
    failed = [failure.job for failure in failures]
    _say_diverged(read_run(job.folder / job.cell.record) for job in cells if job not in failed)
    for failure in failures:
        typer.echo(f"failed: {failure.job.cell}: {failure.reason}", err=True)
    typer.echo(f"{len(cells) - len(failures)} of {_count(len(cells), 'cell')} are in {folder}")
    if failures:
        raise typer.Exit(1)


def _sweep(cells: list[Job], folder: Path, processes: int, scheduler: str | None) -> list[Failure]:
    with _progress(total_steps(cells), folder) as progress:
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
) -> None:
    """Show how few directions hold the input energy of every layer (the paper's Figure 6a)."""
    for name in names:
        check_moment(name, preset)  # before any folder is made
    folder = new_folder("spectrum", out)
    write_spectra(
        names,
        folder,
        preset=preset,
        steps=list(dict.fromkeys(trained or (0, 50))),
        seed=seed,
        command=COMMAND_LINE.get(),
        progress=_say,
    )
    _show_spectra(folder)


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
) -> None:
    """Follow gradient norm and loss over teleport steps for every tau (the paper's Figure 6b)."""
    check_moment(name, preset)
    if lr is not None and not 0.0 < lr < math.inf:
        raise ValueError(f"lr must be > 0 and finite, got {lr}")
    folder = new_folder("tau", out)
    write_trajectories(
        name,
        folder,
        preset=preset,
        trained=trained,
        lr=lr,
        teleport_steps=steps,
        seed=seed,
        command=COMMAND_LINE.get(),
        progress=_say,
    )
    _show_trajectories(folder)


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
        name, layer=layer, rows=rows, preset=preset, trained=trained, seed=seed, progress=_say
    )
    folder = new_folder("product", out)
    write_product(folder, {"command": COMMAND_LINE.get(), **config}, found)
    _show_product(folder)


def _say(what: str) -> None:
    typer.echo(what, err=True)


def _show_spectra(folder: Path) -> None:
    found = read_spectra(folder)
    looked_after = dict.fromkeys(steps for measured in found for steps in measured.by_step)
    figures = {f"figure-{steps}-steps.png": spectrum_figure(found, steps) for steps in looked_after}
    _keep(folder, [_spectrum_table(measured) for measured in found], figures)


def _show_trajectories(folder: Path) -> None:
    found = read_trajectories(folder)
    _keep(folder, [_threshold_table(found)], {"figure.png": threshold_figure(found)})


def _show_product(folder: Path) -> None:
    config, found = read_product(folder)
    title = f"{config['title']}: layer {found.layer}, after {config['trained']} training steps"
    table = Table("matrix", "shape", "what", title=title)
    d_out, d_in = found.weight.shape
    table.add_row("X", f"{found.count} x {d_in}", "inputs, one row per position")
    table.add_row("W", f"{d_out} x {d_in}", "weights" + (" and bias" if found.bias else ""))
    table.add_row("Z = X Wᵀ", f"{found.count} x {d_out}", "outputs")
    table.add_row("D", f"{d_out} x {found.count}", "derivative of the loss by the outputs")
    table.add_row("g = D X", f"{d_out} x {d_in}", "gradient")
    _keep(folder, [table], {"figure.png": product_figure(found, title)})


def _keep(folder: Path, tables: list[Table], figures: dict[str, Figure]) -> None:
    """Print tables, keep them as text beside the figures, say where."""
    _console().print(*tables)
    try:
        with (folder / "table.txt").open("w", encoding="utf-8") as file:
            _console(file=file).print(*tables)
        for name, drawn in figures.items():
            drawn.savefig(folder / name, dpi=150)
    except OSError as error:
        raise RunError(
            f"cannot write the table and the figures to {folder}: {error.strerror}; the records "
            "are complete"
        ) from error
    names = ["records", "table.txt", *figures]
    typer.echo(f"{', '.join(names[:-1])} and {names[-1]} are in {folder}")


def _spectrum_table(measured: Measured) -> Table:
    """Directions that every threshold keeps, layer by layer."""
    taus = list(next(iter(measured.by_step.values()))[0].ranks)
    right = [Column(f"tau {tau:g}", justify="right") for tau in taus]
    config = measured.config
    table = Table(
        "steps",
        "layer",
        Column("inputs", justify="right"),
        *right,
        title=f"{config['title']}: input directions kept, batch of {config['teleport_batch']}",
        caption=f"trained with {config['optimizer']}, lr {config['lr']:g}",
    )
    for step, layers in measured.by_step.items():
        for s in layers:
            table.add_row(str(step), s.layer, str(s.d_in), *(str(s.ranks[tau]) for tau in taus))
        table.add_section()
    return table


def _threshold_table(found: Trajectories) -> Table:
    """Gradient norm and loss after every teleport step, a column for every threshold."""
    rows = max(map(len, found.by_tau.values()))
    table = Table(
        "teleport steps",
        *(f"tau {tau:g}" for tau in found.by_tau),
        title=f"{found.config['title']}: gradient norm / loss on the teleport batch",
        caption=f"after {found.config['trained']} training steps, teleport step size "
        f"{found.config['teleport_lr']:g}; '-': not followed beyond 1000 x the gradient norm",
    )
    for number in range(rows):
        points = [
            by_number[number] if number < len(by_number) else None
            for by_number in found.by_tau.values()
        ]
        cells = ("-" if p is None else f"{p.grad_norm:.4g} / {p.loss:.4f}" for p in points)
        table.add_row(str(number), *cells)
    return table


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
        _draw_report(found, figures)
    except OSError as error:
        raise RunError(
            f"cannot write figures to {figures}: {error.strerror}; give another --figures"
        ) from error
    typer.echo(f"figures are in {figures}", err=True)


def _draw_report(found: list[Block], figures: Path) -> None:
    for name in dict.fromkeys(block.experiment for block in found):
        rows = {
            f"{block.optimizer} ({block.folder})": without_controls(block)
            for block in found
            if block.experiment == name
        }
        title = EXPERIMENTS[name].title if name in EXPERIMENTS else name
        config = next(b for b in found if b.experiment == name).runs[0].config
        matrix_figure(rows, title + smaller(config)).savefig(figures / f"{slug(name)}.png", dpi=150)


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
        if holds_benchmarks(folder):
            _show_benchmarks(folder)
            continue
        kind = str(read_runs(folder)[0].config.get("figure", ""))
        kinds = {
            "spectrum": _show_spectra,
            "tau": _show_trajectories,
            "product": _show_product,
        }
        kinds.get(kind, _show)(folder)


@data_app.command("list")
def data_list() -> None:
    """List the data sets, where their files are, and how to get those that are missing."""
    table = Table("name", "kind", "what", "where", "to get it")
    for info in datasets.available():
        table.add_row(info.name, info.kind, info.what, info.where, info.how)
    _console().print(table)


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
    _console().print(table)
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
        _show_grades(grades)
    if not grades.passed:
        raise typer.Exit(1)


def _show_grades(grades: Grades) -> None:
    """The table of points, then what is to be said about the exercises that failed."""
    table = Table("exercise", "where", Column("points", justify="right"), "of", "theorem")
    for exercise in grades.exercises:
        theorem = next((v.theorem for v in exercise.verdicts if not v), "")
        numbers = f"{exercise.points:g}", f"{exercise.possible:g}"
        table.add_row(exercise.name, exercise.place, *numbers, theorem)
    table.add_section()
    table.add_row("total", "", f"{grades.points:g}", f"{grades.possible:g}", "")
    _console().print(table)
    for exercise in grades.exercises:
        if not exercise.passed:
            said = [str(verdict) for verdict in exercise.verdicts if not verdict]
            typer.echo("\n".join([f"\n{exercise.name} ({exercise.place})", *said]))
            if exercise.reason:
                typer.echo(textwrap.indent(exercise.reason, "  "))


@contextmanager
def _progress(total: int, folder: Path) -> Iterator[Progress]:
    """A bar of training steps; Ctrl-C says where the records are and ends with 130."""
    interval = 0.2 if sys.stderr.isatty() else 10.0  # a log needs no line per step
    with tqdm(total=total, unit="step", dynamic_ncols=True, mininterval=interval) as bar:

        def progress(what: str, done: int) -> None:
            bar.set_description(what, refresh=False)
            bar.update(done)

        try:
            yield progress
        except KeyboardInterrupt:
            bar.close()
            typer.echo(f"interrupted; the records so far are complete in {folder}", err=True)
            raise typer.Exit(130) from None


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


def _show(folder: Path) -> None:
    """Print the tables of a folder, keep them as text, draw the figure, say where."""
    runs = read_runs(folder)
    if "sequence" in runs[0].config:
        tables, drawn = forgetting_tables(runs), forgetting_figure(runs)
    else:
        tables, drawn = _tables(runs), _loss_figure(runs)
    for table in tables:
        _console().print(table)
    _say_diverged(runs)
    try:
        with (folder / "table.txt").open("w", encoding="utf-8") as file:
            _console(file=file).print(*tables)
        drawn.savefig(folder / "figure.png", dpi=150)
    except OSError as error:
        raise RunError(
            f"cannot write table.txt and figure.png to {folder}: {error.strerror}; the records "
            f"are complete, and `teleport figure {folder}` draws them when there is room"
        ) from error
    typer.echo(f"records, table.txt and figure.png are in {folder}")


def _say_diverged(runs: Iterable[Run]) -> None:
    for run in runs:
        if run.status == "diverged":
            _say(f"diverged: {run.path}: {run.reason}")


def _show_benchmarks(folder: Path) -> None:
    """Print the tables of benchmarks, keep them as text, draw the scaling figure, say where."""
    found = read_benchmarks(folder)
    tables = [_sheet(sheet) for benchmark in found.values() for sheet in sheets(benchmark)]
    figures = {}
    if "scaling" in found:
        title = found["scaling"].title
        figures["scaling.png"] = scaling_figure(curves(found["scaling"]), title)
    _keep(folder, tables, figures)


def _sheet(sheet: Sheet) -> Table:
    table = Table(*sheet.columns, title=sheet.title, caption=sheet.caption or None)
    for row in sheet.rows:
        table.add_row(*row)
    return table


def _tables(runs: list[Run]) -> list[Table]:
    summaries = summarise(runs)
    if len(summaries) > MOST_COLUMNS:
        return [_many(summaries)]
    return [_losses(runs), _summaries(summaries)]


def _loss_figure(runs: list[Run]) -> Figure:
    summaries = summarise(runs)
    many = len(summaries) > MOST_COLUMNS
    return gap_figure(summaries, _title(runs)) if many else loss_figure(runs, _title(runs))


def _title(runs: list[Run]) -> str:
    name, optimizer = runs[0].config["experiment"], runs[0].config["settings"]["optimizer"]
    what = EXPERIMENTS[name].title if name in EXPERIMENTS else name
    seeds = _count(len({run.seed for run in runs}), "seed")
    return f"{what}{smaller(runs[0].config)} - {optimizer}, {seeds}"


def _losses(runs: list[Run]) -> Table:
    """Train and test loss of every arm at each evaluation, averaged over seeds."""
    groups = by_arm(runs)
    table = Table("step", *groups, title="train loss / test loss")
    rows = max(len(run.evaluations) for run in runs)
    for i in range(rows):
        step = next(r.evaluations[i]["step"] for r in runs if i < len(r.evaluations))
        table.add_row(str(step), *(_loss_cell(group, i) for group in groups.values()))
    return table


def _loss_cell(group: list[Run], i: int) -> str:
    rows = [run.evaluations[i] for run in group if i < len(run.evaluations)]
    if not rows:
        return "-"
    train, test = (  # a loss that was not finite is missing
        sum(math.nan if r[c] is None else r[c] for r in rows) / len(rows)
        for c in ("train_loss", "test_loss")
    )
    return f"{train:.4f} / {test:.4f}"


_SUMMARY: dict[str, Callable[[ArmSummary], str]] = {
    "ended": lambda s: s.status,
    "final train loss": lambda s: f"{s.train_loss:.4f}",
    "final test loss": lambda s: f"{s.test_loss:.4f}",
    "final test accuracy": lambda s: _number(s.test_accuracy, "{:.4f}"),
    "seconds training": lambda s: f"{s.train_seconds:.2f}",
    "seconds teleporting": lambda s: f"{s.teleport_seconds:.2f}",
    "gradient-norm growth": lambda s: _number(s.growth, "x {:.4f}"),
    "drift, teleport batches": lambda s: _number(s.drift, "{:.1e}"),
    "drift, held-out data": lambda s: _number(s.held_out_drift, "{:+.4f}"),
    "to own baseline: steps": lambda s: _ratio(s.to_own, "steps"),
    "to own baseline: seconds": lambda s: _ratio(s.to_own, "seconds"),
    "to own baseline: log loss": lambda s: _gap(s.to_own),
    "to best baseline: steps": lambda s: _ratio(s.to_best, "steps"),
    "to best baseline: seconds": lambda s: _ratio(s.to_best, "seconds"),
    "to best baseline: log loss": lambda s: _gap(s.to_best),
}

MOST_COLUMNS = 8
"""Arms that fit side by side; more are shown one below the other."""

_IN_BRIEF = {
    "final train loss": "train loss",
    "final test loss": "test loss",
    "seconds training": "train s",
    "seconds teleporting": "teleport s",
    "gradient-norm growth": "growth",
    "drift, teleport batches": "drift",
    "to own baseline: steps": "steps",
    "to own baseline: seconds": "seconds",
    "to own baseline: log loss": "log loss",
}

_CAPTION = (
    "Own baseline: the same arm without teleport; best baseline: the lowest final train loss of "
    "all arms without. Steps and seconds (teleporting included) are ratios of the way to the "
    "baseline's final train loss; log loss is the mean difference of log train loss, -0.1 being "
    "10 % lower. '-': does not apply, or never reached."
)


def _many(summaries: list[ArmSummary]) -> Table:
    """One row per arm, and only what the arms are compared by."""
    table = Table(
        Column("arm", no_wrap=True), *_IN_BRIEF.values(), title="summary", caption=_CAPTION
    )
    for summary in summaries:
        ended = "" if summary.status == "finished" else f" ({summary.status})"
        table.add_row(summary.arm + ended, *(_SUMMARY[name](summary) for name in _IN_BRIEF))
    return table


def _summaries(summaries: list[ArmSummary]) -> Table:
    """One column per arm."""
    table = Table("", *(s.arm for s in summaries), title="summary", caption=_CAPTION)
    for name, cell in _SUMMARY.items():
        table.add_row(name, *map(cell, summaries))
    return table


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def _ratio(comparison: Comparison | None, axis: str) -> str:
    return "-" if comparison is None else _number(getattr(comparison, axis), "x {:.2f}")


def _gap(comparison: Comparison | None) -> str:
    if comparison is None or math.isnan(comparison.log_loss):
        return "-"
    spread = _number(comparison.log_loss_spread, " ± {:.3f}").replace("-", "")
    return f"{comparison.log_loss:+.3f}{spread}"


def _console(**options: object) -> Console:
    """A console wide enough for the tables where the output is not a terminal."""
    console = Console(**options)  # type: ignore[arg-type]
    return console if console.is_terminal else Console(width=140, **options)  # type: ignore[arg-type]
