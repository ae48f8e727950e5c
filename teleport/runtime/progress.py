"""A bar that tells how far a command is, how fast, and how long it takes; on a terminal only."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 0.2
"""Between two drawings; no thread draws, since it would disturb what is timed meanwhile."""


@contextmanager
def progress_of(total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    """A bar of so many units.

    What it yields is to be told what is being done, the units done since the last call, and the
    total if that was not known before; with another total it counts anew.
    """
    from rich.console import Console  # late: help needs none
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    output, drawn = Console(stderr=True), 0.0
    columns = (
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[at]}"),
    )
    quiet = not output.is_terminal
    with Progress(*columns, console=output, auto_refresh=False, disable=quiet) as bar:
        task = bar.add_task("", total=total, at="")

        def progress(what: str, done: int, of: int | None = None) -> None:
            nonlocal drawn
            if of is not None and of != bar.tasks[task].total:
                bar.reset(task, total=of)
            bar.update(task, description=what, advance=done)
            if time.monotonic() - drawn > SECONDS:
                speed = bar.tasks[task].speed
                bar.update(task, at=f"{speed:.3g} {unit}/s" if speed else "", refresh=True)
                drawn = time.monotonic()

        yield progress


@contextmanager
def parts_of(total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """A bar of parts that take a while each: what it yields is told when one begins.

    Where there is no terminal, each is a line of the standard error.
    """
    begun = 0
    with progress_of(total, unit) as progress:

        def begin(what: str) -> None:
            nonlocal begun
            progress(what, min(begun, 1))
            begun += 1
            if not sys.stderr.isatty():
                sys.stderr.write(f"{what}\n")

        yield begin
        progress("", min(begun, 1))
