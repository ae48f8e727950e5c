"""``teleport list``, ``run``, ``sweep``, ``report`` and ``figure``: experiments."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from teleport.cli.loading import loading
from teleport.cli.options import (
    COMMAND_LINE,
    CheckpointOption,
    ControlsOption,
    DeviceOption,
    EpochsOption,
    PresetOption,
    ResumeOption,
    Threads,
    check_names,
    out_option,
    seed_option,
    threads_option,
)
from teleport.cli.output import count_of, print_tables, say
from teleport.cli.study import interruptible
from teleport.errors import RunError, os_errors_as
from teleport.lab.experiments.choices import CHECKPOINT_SECONDS, INITS, OPTIMIZER_NAMES
from teleport.lab.experiments.entry import SCHEDULES
from teleport.runtime.progress import progress_of

if TYPE_CHECKING:
    from teleport.lab.experiments.arms import Arm
    from teleport.lab.experiments.sweep import Failure, Job


def list_experiments() -> None:
    """List the experiments, their presets and the default arms."""
    with loading():
        from rich.table import Table

        from teleport.lab.experiments.table import EXPERIMENTS

    table = Table("name", "what", "data", "presets (epochs)")
    for e in EXPERIMENTS.values():
        presets = ", ".join(f"{name} ({p.epochs})" for name, p in e.presets.items())
        table.add_row(e.name, e.title, e.data, presets)
    print_tables(table)
    arms = Table("experiment", "optimizer", "low lr", "tuned lr", "tuned initial gain", "tuned on")
    for e in EXPERIMENTS.values():
        for optimizer, t in e.tuning.items():
            gain = f"lr {t.gain_lr:g}, {t.init} init, head x {t.head_gain:g}"
            on = "" if t.on == e.name else t.on
            arms.add_row(e.name, optimizer, f"{t.low:g}", f"{t.tuned:g}", gain, on)
    print_tables(arms)


def run(
    name: Annotated[str, typer.Argument(help="Experiment; see `teleport list`.")] = "mnist-sample",
    preset: PresetOption = "cpu",
    optimizer: Annotated[
        str, typer.Option(help=f"{', '.join(OPTIMIZER_NAMES)}, or a class by its name.")
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
    epochs: EpochsOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 1,
    first_seed: Annotated[
        int, seed_option("The first of them; rates are tuned on others than compared.")
    ] = 0,
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
    controls: ControlsOption = False,
    rivals: Annotated[
        bool, typer.Option("--rivals", help="Add every rival and control as an arm.")
    ] = False,
    objectives: Annotated[
        bool, typer.Option("--objectives", help="Add moves in the null space to other objectives.")
    ] = False,
    activation: Annotated[
        str, typer.Option(help="relu (the paper's), leaky_relu (needed by --rivals) or tanh.")
    ] = "relu",
    device: DeviceOption = "cpu",
    out: Annotated[Path | None, out_option("<name>")] = None,
    resume: ResumeOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start over in the folder of --out.")
    ] = False,
    checkpoint: CheckpointOption = CHECKPOINT_SECONDS,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard (extra tensorboard).")
    ] = None,
    threads: Threads = None,
) -> None:
    """Train with and without teleportation; print a table, write records and a figure."""
    check_names([name], preset, schedule, init)  # at once; the rest is checked with PyTorch
    with loading():
        from teleport import data as datasets
        from teleport.cli.show import show
        from teleport.lab.experiments.arms import RunSettings, lent_tuning, teleport_settings
        from teleport.lab.experiments.run import device_of, run_arms, steps_per_run
        from teleport.lab.experiments.table import find_experiment
        from teleport.lab.experiments.tensorboard import check_tensorboard
        from teleport.lab.experiments.training import check_fits, late_teleport
        from teleport.lab.records.folders import open_folder, slug
        from teleport.line_search import load_search
        from teleport.runtime.threads import threads_for, using_threads

        load_search()

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
    settings = RunSettings(
        name, preset, optimizer, epochs, device=device, activation=activation, teleport=options
    )
    settings.size()  # names are checked before any folder is made
    device_of(device)
    added = {"controls": controls, "rivals": rivals, "objectives": objectives}
    known = _arms(name, optimizer, lr, init, head_gain, [n for n, given in added.items() if given])
    if rivals and activation == "relu":
        raise ValueError(
            "not all rivals act through relu: give --rivals with --activation leaky_relu; "
            f"got --activation {activation}"
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
    with (
        interruptible(folder),
        progress_of(total, "step") as progress,
        using_threads(threads_for(threads)),
    ):
        run_arms(
            settings,
            arms,
            range(first_seed, first_seed + seeds),
            folder,
            resume=resume,
            checkpoint_seconds=checkpoint,
            command=COMMAND_LINE.get(),
            tensorboard=tensorboard,
            threads=threads,
            progress=progress,
        )
    show(folder)


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
    preset: PresetOption = "cpu",
    schedule: Annotated[
        str, typer.Option(help=f"When to teleport: {' or '.join(SCHEDULES)}.")
    ] = "default",
    epochs: EpochsOption = None,
    controls: ControlsOption = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 1,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler, instead of --jobs.")
    ] = None,
    device: DeviceOption = "cpu",
    checkpoint: CheckpointOption = CHECKPOINT_SECONDS,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder; what is finished there is left. Default runs/<date>-sweep."),
    ] = None,
    threads: Annotated[
        int | None,
        threads_option(
            "PyTorch's threads of every run; default as of `teleport run`, shared by --jobs. "
            "A run that goes on keeps its number."
        ),
    ] = None,
) -> None:
    """Run every cell of a matrix (experiment, optimizer, arm, seed); list what failed."""
    with loading():
        from teleport.lab.experiments.table import names_in

    experiments = tuple(dict.fromkeys(one for name in names for one in names_in(name)))
    check_names(experiments, preset, schedule)  # at once; the rest is checked with PyTorch
    with loading():
        from teleport.cli.show import say_diverged
        from teleport.lab.experiments.executors import cluster
        from teleport.lab.experiments.run import device_named, device_of
        from teleport.lab.experiments.sweep import Plan, check_folders, check_jobs
        from teleport.lab.records.checkpoint import locked
        from teleport.lab.records.folders import open_folder
        from teleport.lab.records.runs import read_run
        from teleport.runtime.threads import threads_for, using_threads

    plan = Plan(
        experiments,
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
        with cluster(scheduler):
            pass  # as what runs the cells will be, before anything is written
    command = COMMAND_LINE.get()
    folder = open_folder("sweep", out, resume=out is not None).resolve()
    cells = plan.jobs(folder, checkpoint_seconds=checkpoint, command=command, threads=threads)
    with locked(folder / ".lock", str(folder)), using_threads(threads_for(threads)):
        check_folders(cells)
        failures = _sweep(cells, folder, jobs, scheduler)
    failed = [failure.job for failure in failures]
    say_diverged(read_run(job.folder / job.cell.record) for job in cells if job not in failed)
    for failure in failures:
        typer.echo(f"failed: {failure.job.cell}: {failure.reason}", err=True)
    typer.echo(f"{len(cells) - len(failures)} of {count_of(len(cells), 'cell')} are in {folder}")
    if failures:
        raise typer.Exit(1)


def _sweep(
    cells: "list[Job]", folder: Path, processes: int, scheduler: str | None
) -> "list[Failure]":
    from teleport.lab.experiments.executors import Processes, cluster, run_jobs
    from teleport.lab.experiments.sweep import Job, total_steps

    with (
        interruptible(folder),
        progress_of(total_steps(cells), "step") as progress,
        Processes(processes) if scheduler is None else cluster(scheduler) as executor,
    ):
        done = 0

        def stepped(steps: int) -> None:
            progress(f"cell {done} of {len(cells)}", steps)

        def ended(job: Job) -> None:
            nonlocal done
            done += 1
            stepped(0)

        stepped(0)
        return run_jobs(cells, executor, stepped=stepped, ended=ended)


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with records of runs and sweeps.")],
    figures: Annotated[
        Path | None, typer.Option(help="Folder for a figure of every experiment.")
    ] = None,
) -> None:
    """Print the matrix of all runs below a folder as Markdown."""
    with loading():
        from teleport.cli.show import draw_report
        from teleport.lab.analysis.outcomes import blocks, matrix_markdown

    with progress_of(None, "folder") as progress:
        found = blocks(folder, lambda done, of: progress("reading", done, of))
    typer.echo(matrix_markdown(found))
    if figures is None:
        return
    failed = f"cannot write figures to {figures}"
    with os_errors_as(RunError, failed, "; give another --figures"):
        figures.mkdir(parents=True, exist_ok=True)
        draw_report(found, figures)
    typer.echo(f"figures are in {figures}", err=True)


def figure(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of records: of `teleport run`, continual, bench and the other studies."
        ),
    ],
) -> None:
    """Redraw the figures and print the tables of finished runs from their records."""
    with loading():
        from teleport.cli.show import show

    for folder in folders:
        show(folder)


def _arms(
    experiment: str,
    optimizer: str,
    lrs: list[float] | None,
    init: str,
    head_gain: float,
    added: Sequence[str],
) -> "list[Arm]":
    """The arms of ``run``: those of --lr, or the fixed ones, with what is added to them."""
    from teleport.lab.experiments import arms

    if len(added) > 1 or (lrs and added not in ([], ["controls"])):
        given = f"--lr {lrs}" if lrs else f"--{added[0]}"
        raise ValueError(
            f"--{added[-1]} compares fixed arms: leave --lr, --controls, --rivals and --objectives "
            f"out beside it; got {given}"
        )
    if not lrs:
        if (init, head_gain) != ("default", 1.0):
            raise ValueError(
                "--init and --head-gain act on the arms of --lr: give a learning rate with --lr; "
                f"got --init {init} and --head-gain {head_gain:g} without one"
            )
        fixed = {
            "controls": arms.control_arms,
            "rivals": arms.rival_arms,
            "objectives": arms.objective_arms,
        }
        return (fixed[added[0]] if added else arms.default_arms)(experiment, optimizer)
    for what, values in (("lr", lrs), ("head_gain", [head_gain])):
        for value in values:
            if not 0.0 < value < math.inf:
                raise ValueError(f"{what} must be > 0 and finite, got {value}")
    if len({f"{lr:g}" for lr in lrs}) < len(lrs):
        given = " ".join(map(str, lrs))
        raise ValueError(f"every --lr must be another one, by its first six digits; got {given}")
    names = arms.GAIN_CONTROLS if added else ()
    plain = [arms.Arm(lr, False, init, head_gain) for lr in lrs]
    return [arm for one in plain for arm in (one, *arms.controlled(one, ("", *names)))]
