"""``teleport continual``: keep what was learned before."""

from pathlib import Path
from typing import Annotated

import typer

from teleport.cli.loading import loading
from teleport.cli.options import COMMAND_LINE, ResumeOption, Threads
from teleport.cli.progress import step_progress
from teleport.lab.experiments.choices import METHOD_NAMES, SEQUENCE_NAMES
from teleport.lab.experiments.entry import one_of


def continual(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(SEQUENCE_NAMES)}.")] = "digits",
    preset: Annotated[str, typer.Option(help="Size: tiny or cpu.")] = "cpu",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 8,
    first_seed: Annotated[
        int, typer.Option(min=0, help="The first one; with --tune it is added to that of tuning.")
    ] = 0,
    methods: Annotated[
        str | None,
        typer.Option(help=f"Some of {','.join(METHOD_NAMES)}, with commas; default all."),
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
    resume: ResumeOption = False,
    out: Annotated[
        Path | None, typer.Option(help="New folder; default runs/<date>-<name>.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Learn tasks in turn, keeping the old ones; print a table, write records and a figure."""
    one_of("sequence", name, dict.fromkeys(SEQUENCE_NAMES))  # at once; the rest with PyTorch
    with loading():
        from teleport.cli.show import show
        from teleport.lab.keeping.training import (
            LR_GRID,
            TUNING_SEED,
            SequenceRun,
            default_strategies,
            run_strategies,
        )
        from teleport.lab.records.folders import resumed_folder
        from teleport.runtime.threads import threads_for, using_threads

    rates = list(LR_GRID) if tune and not lr else lr
    strategies = default_strategies(name, methods.split(",") if methods else None, tau, rates)
    course = SequenceRun(name, preset, "validation" if tune else "test")
    course.size()
    start = first_seed + TUNING_SEED if tune else first_seed
    numbers = range(start, start + seeds)
    total = course.steps(course.sets()) * len(strategies) * seeds
    folder = resumed_folder(name, out, resume)
    with step_progress(total, folder) as progress, using_threads(threads_for(threads)):
        command = COMMAND_LINE.get()
        run_strategies(
            course, strategies, numbers, folder, resume=resume, command=command, progress=progress
        )
    show(folder)
