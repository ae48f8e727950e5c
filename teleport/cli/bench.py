"""``teleport bench``: what a teleport costs."""

from pathlib import Path
from typing import Annotated

import typer

from teleport.cli.loading import loading
from teleport.cli.options import COMMAND_LINE, DeviceOption, out_option, threads_option
from teleport.cli.study import interruptible
from teleport.lab.experiments.choices import BENCHMARK_NAMES, NOT_IN_ALL
from teleport.runtime.progress import progress_of


def bench(
    what: Annotated[
        str,
        typer.Argument(
            help=f"One of {', '.join(BENCHMARK_NAMES)}, or all: all but {', '.join(NOT_IN_ALL)}."
        ),
    ],
    preset: Annotated[
        str, typer.Option(help="Size: tiny (seconds), cpu (minutes) or paper (for a GPU).")
    ] = "cpu",
    device: DeviceOption = "cpu",
    threads: Annotated[
        int, threads_option("PyTorch's threads; with more than one, a busy machine disturbs.")
    ] = 1,
    out: Annotated[Path | None, out_option("bench-<what>")] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Folder with a record to compare with, such as chapters/results/bench/now; exit "
            "status 1 if an operation costs twice as many gradients as there."
        ),
    ] = None,
) -> None:
    """Measure what teleporting costs, in gradients; print tables with the budgets beside."""
    with loading():
        from teleport.cli.show import show, show_changes
        from teleport.lab.bench import benchmarks
        from teleport.lab.bench.against import TOO_MUCH, changes, require_preset
        from teleport.lab.bench.tables import read_benchmarks
        from teleport.lab.experiments.run import device_of
        from teleport.lab.records.folders import new_folder

    names, _ = benchmarks.chosen(what, preset)
    before = None if against is None else read_benchmarks(against)
    if before is not None:
        require_preset(preset, before)
    where = device_of(device)
    folder = new_folder(f"bench-{what}", out)
    command = COMMAND_LINE.get()
    with interruptible(folder), progress_of(None, "job") as progress:
        benchmarks.run_benchmarks(
            names, preset, where, folder, threads=threads, command=command, progress=progress
        )
    show(folder)
    if before is not None:
        found = changes(read_benchmarks(folder), before)
        show_changes(found)
        if found[0].factor >= TOO_MUCH:
            raise typer.Exit(1)
