"""What the commands share: options, and the command line as it was typed."""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Annotated, Any

import typer

from teleport.lab.experiments.choices import INITS
from teleport.lab.experiments.entry import SCHEDULES, one_of
from teleport.runtime.cores import check_threads

# What was typed, for the records.
COMMAND_LINE: ContextVar[str] = ContextVar("COMMAND_LINE", default="teleport")


# The largest seed: generators for several uses are seeded by multiples of it.
MAX_SEED = 2**31 - 1


def comma_separated(given: str | None) -> list[str] | None:
    """The names of an option that takes them with commas; None if it was not given."""
    return None if given is None else [name.strip() for name in given.split(",")]


def _checked(threads: int | None) -> int | None:
    if threads is not None:
        check_threads(threads)
    return threads


def out_option(name: str) -> Any:
    """Where a command writes; ``name`` is that of the folder it makes by itself."""
    return typer.Option(help=f"New folder; default runs/<date>-{name}.")


def seed_option(what: str) -> Any:
    """A seed of which generators can be made."""
    return typer.Option(min=0, max=MAX_SEED, help=what)


def threads_option(what: str) -> Any:
    """A number of PyTorch's threads, checked as `check_threads` says."""
    return typer.Option(callback=_checked, help=what)


PresetOption = Annotated[str, typer.Option(help="Size: tiny, cpu or paper.")]
SeedOption = Annotated[int, seed_option("Of initial values, data order, batch.")]
EpochsOption = Annotated[int | None, typer.Option(help="Epochs; default from the preset.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on in the folder of --out; what is complete stays.")
]
CheckpointOption = Annotated[
    float, typer.Option(min=0.0, help="Seconds between checkpoints of a run.")
]
ControlsOption = Annotated[
    bool, typer.Option("--controls", help="Add the controls that act on any network.")
]
Threads = Annotated[
    int | None,
    threads_option(
        "PyTorch's threads; default one for every core of ours but two, at least one. A resumed "
        "run keeps its number."
    ),
]


def check_names(
    experiments: Sequence[str], preset: str, schedule: str = "default", init: str = "default"
) -> None:
    """Refuse a wrong name before PyTorch is loaded; errors as of `one_of` and `find_experiment`."""
    from teleport.lab.experiments.table import find_experiment  # late: its table takes a while

    for name in experiments:
        one_of("preset", preset, find_experiment(name).presets)
    one_of("schedule", schedule, SCHEDULES)
    one_of("init", init, dict.fromkeys(INITS))
