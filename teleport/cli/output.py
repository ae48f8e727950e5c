"""What the commands say while they run."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import rich.console


def console(**options: object) -> "rich.console.Console":
    """A console wide enough for the tables where the output is not a terminal."""
    from rich.console import Console  # late: help needs none

    console = Console(**options)  # type: ignore[arg-type]
    return console if console.is_terminal else Console(width=140, **options)  # type: ignore[arg-type]


def say(what: str) -> None:
    """A line for the user that is not the result: to the standard error."""
    typer.echo(what, err=True)


def count_of(number: int, thing: str) -> str:
    """``"1 cell"``, ``"2 cells"``."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


@contextmanager
def step_progress(total: int, folder: Path) -> Iterator[Callable[[str, int], None]]:
    """A bar of training steps; Ctrl-C says where the records are and ends with 130.

    What it yields is to be told what is being run, and the steps done since the last call.
    """
    from tqdm import tqdm  # late: help needs none

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
