"""Commands for one question each: ``teleport spectrum``, ``tau``, ``moves``, ``saving``, more."""

import math
from pathlib import Path
from typing import Annotated

import typer

from teleport.cli.loading import loading
from teleport.cli.options import (
    COMMAND_LINE,
    EpochsOption,
    PresetOption,
    ResumeOption,
    SeedOption,
    Threads,
    check_names,
    out_option,
)
from teleport.cli.study import recording


def spectrum(
    names: Annotated[list[str], typer.Argument(help="Experiments; see `teleport list`.")],
    preset: PresetOption = "cpu",
    trained: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Training steps to look after; may be repeated. Default 0, 50."),
    ] = None,
    seed: SeedOption = 0,
    out: Annotated[Path | None, out_option("spectrum")] = None,
    resume: ResumeOption = False,
    threads: Threads = None,
) -> None:
    """Show how few directions hold the input energy of every layer (the paper's Figure 6a)."""
    check_names(names, preset)
    with loading():
        from teleport.lab.paper.input_energy import write_spectra
        from teleport.lab.paper.snapshot import check_moment

    for name in names:
        check_moment(name, preset)  # before any folder is made
    moments = list(dict.fromkeys(trained or (0, 50)))
    total = len(names) * len(moments)
    with recording("spectrum", out, resume, threads, total) as to:
        write_spectra(names, to, preset=preset, steps=moments, seed=seed)


def tau(
    name: Annotated[str, typer.Argument(help="Experiment; see `teleport list`.")],
    preset: PresetOption = "cpu",
    trained: Annotated[int, typer.Option(min=0, help="Training steps before.")] = 50,
    lr: Annotated[
        float | None, typer.Option(help="Teleport step size; default the paper schedule's.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Teleport steps.")] = 8,
    seed: SeedOption = 0,
    out: Annotated[Path | None, out_option("tau")] = None,
    resume: ResumeOption = False,
    threads: Threads = None,
) -> None:
    """Follow gradient norm and loss over teleport steps for every tau (the paper's Figure 6b)."""
    check_names([name], preset)
    with loading():
        from teleport.lab.paper.input_energy import FIGURE_TAUS
        from teleport.lab.paper.snapshot import check_moment
        from teleport.lab.paper.threshold import write_trajectories

    check_moment(name, preset)
    if lr is not None and not 0.0 < lr < math.inf:
        raise ValueError(f"lr must be > 0 and finite, got {lr}")
    total = 1 + len(FIGURE_TAUS)
    with recording("tau", out, resume, threads, total) as to:
        write_trajectories(
            name, to, preset=preset, trained=trained, lr=lr, teleport_steps=steps, seed=seed
        )


def moves(
    names: Annotated[list[str], typer.Argument(help="Experiments; see `teleport list`.")],
    preset: PresetOption = "cpu",
    trained: Annotated[int, typer.Option(min=0, help="Training steps before.")] = 50,
    growth: Annotated[float, typer.Option(help="Of the gradient norm, asked for.")] = 1.5,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Examples of the teleport batch; default theirs.")
    ] = None,
    evaluating: Annotated[
        bool, typer.Option("--evaluating", help="In evaluation mode, which BatchNorm notices.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 3,
    out: Annotated[Path | None, out_option("moves")] = None,
    resume: ResumeOption = False,
    threads: Threads = None,
) -> None:
    """Show which layers one teleport moves, and with which drift, for every tau."""
    check_names(names, preset)
    with loading():
        from teleport.lab.paper.moves import MOVE_TAUS, write_moves
        from teleport.lab.paper.snapshot import check_moment

    if not 1.0 < growth < math.inf:
        raise ValueError(f"growth must be > 1 and finite, got {growth}")
    for name in names:
        check_moment(name, preset, batch)  # before any folder is made
    names = list(dict.fromkeys(names))
    total = len(names) * seeds * (1 + len(MOVE_TAUS))
    with recording("moves", out, resume, threads, total) as to:
        write_moves(
            names,
            to,
            preset=preset,
            trained=trained,
            growth=growth,
            n=batch,
            evaluating=evaluating,
            seeds=seeds,
        )


def saving(
    names: Annotated[list[str], typer.Argument(help="Experiments; see `teleport list`.")],
    optimizers: Annotated[
        str, typer.Option(help="Separated by commas; those an experiment was tuned for.")
    ] = "sgd,momentum,adagrad,adam",
    preset: PresetOption = "cpu",
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0.")] = 2,
    out: Annotated[Path | None, out_option("saving")] = None,
    resume: ResumeOption = False,
    threads: Threads = None,
) -> None:
    """Predict how many training steps a teleport saves, and whether growth="auto" would go."""
    check_names(names, preset)
    with loading():
        from teleport.lab.paper.savings import check_savings, write_savings

    chosen = [part.strip() for part in optimizers.split(",")]
    total = seeds * check_savings(names, chosen, preset)  # before any folder is made
    names, chosen = list(dict.fromkeys(names)), list(dict.fromkeys(chosen))
    with recording("saving", out, resume, threads, total) as to:
        write_savings(names, chosen, to, preset=preset, seeds=seeds)


def product(
    name: Annotated[str, typer.Argument(help="Experiment; see `teleport list`.")],
    layer: Annotated[
        str | None, typer.Option(help="Name of a layer in the network; default the first.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the inputs to show.")] = 48,
    preset: PresetOption = "cpu",
    trained: Annotated[int, typer.Option(min=0, help="Training steps before.")] = 50,
    seed: SeedOption = 0,
    out: Annotated[Path | None, out_option("product")] = None,
    threads: Threads = None,
) -> None:
    """Show a layer as products of matrices, forward and backward (the paper's Figure 7)."""
    check_names([name], preset)
    with loading():
        from teleport.cli.show import show
        from teleport.lab.paper.products import product_at, write_product
        from teleport.lab.records.folders import new_folder
        from teleport.runtime.progress import progress_of
        from teleport.runtime.threads import threads_for, using_threads

    with progress_of(trained, "step") as progress, using_threads(threads_for(threads)):
        config, found = product_at(
            name,
            layer=layer,
            rows=rows,
            preset=preset,
            trained=trained,
            seed=seed,
            progress=progress,
        )
    folder = new_folder("product", out)
    write_product(folder, {"command": COMMAND_LINE.get(), **config}, found)
    show(folder)


def connectivity(
    names: Annotated[list[str], typer.Argument(help="Experiments; see `teleport list`.")],
    preset: PresetOption = "cpu",
    epochs: EpochsOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted from 0.")] = 5,
    points: Annotated[int, typer.Option(min=3, help="On every line, its ends included.")] = 11,
    out: Annotated[Path | None, out_option("connectivity")] = None,
    resume: ResumeOption = False,
    threads: Threads = None,
) -> None:
    """Follow the loss on the line between networks trained with and without a teleport."""
    check_names(names, preset)
    with loading():
        from teleport.lab.analysis.connectivity import check_connectivity, write_lines

    names = list(dict.fromkeys(names))
    total = seeds * sum(check_connectivity(name, preset, epochs) for name in names)
    with recording("connectivity", out, resume, threads, total, "step") as to:
        write_lines(names, to, preset=preset, epochs=epochs, seeds=seeds, points=points)


def sensitivity(
    name: Annotated[str, typer.Argument(help="Experiment; see `teleport list`.")],
    preset: PresetOption = "cpu",
    epochs: EpochsOption = None,
    points: Annotated[int, typer.Option(help="Of the design, three runs each.")] = 48,
    out: Annotated[Path | None, out_option("sensitivity")] = None,
    resume: ResumeOption = False,
    threads: Threads = None,
) -> None:
    """Change all settings of a teleport at once; print the effect of each on the loss."""
    check_names([name], preset)
    with loading():
        from teleport.lab.analysis.sensitivity import (
            SIZE_FACTORS,
            check_sensitivity,
            latin_hypercube,
            write_design,
        )

    total = (
        len(latin_hypercube(points))
        * (1 + len(SIZE_FACTORS))
        * check_sensitivity(name, preset, epochs)
    )
    with recording("sensitivity", out, resume, threads, total, "step") as to:
        write_design(name, to, preset=preset, epochs=epochs, points=points)
