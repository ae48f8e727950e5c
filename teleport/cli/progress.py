"""The bar of the commands that write records."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from teleport.cli.output import say
from teleport.runtime.progress import parts_of, progress_of


@contextmanager
def step_progress(
    total: int | None, folder: Path, unit: str = "step"
) -> Iterator[Callable[..., None]]:
    """The bar of `progress_of`; Ctrl-C says where the records are and ends with 130."""
    with _interrupted(folder), progress_of(total, unit) as progress:
        yield progress


@contextmanager
def part_progress(total: int, folder: Path) -> Iterator[Callable[[str], None]]:
    """That of `parts_of`; Ctrl-C likewise."""
    with _interrupted(folder), parts_of(total, "part") as begin:
        yield begin


@contextmanager
def _interrupted(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted; the records so far are complete in {folder}")
        raise typer.Exit(130) from None
