"""A bar that tells how far a command is, how fast, and how long it takes; on a terminal only."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from teleport.cli.output import console, say

SECONDS = 0.2
"""Between two drawings; no thread draws, since it would disturb what is timed meanwhile."""


@contextmanager
def step_progress(
    total: int | None, folder: Path, unit: str = "step"
) -> Iterator[Callable[..., None]]:
    """A bar of training steps; Ctrl-C says where the records are and ends with 130.

    What it yields is to be told what is being run, the steps done since the last call, and the
    total if that was not known before.
    """
    from rich.progress import MofNCompleteColumn, Progress, TextColumn  # late: help needs none

    output, drawn = console(stderr=True), 0.0
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
            bar.update(task, description=what, advance=done, total=of)
            if time.monotonic() - drawn > SECONDS:
                speed = bar.tasks[task].speed
                bar.update(task, at=f"{speed:.3g} {unit}/s" if speed else "", refresh=True)
                drawn = time.monotonic()

        try:
            yield progress
        except KeyboardInterrupt:
            bar.stop()
            say(f"interrupted; the records so far are complete in {folder}")
            raise typer.Exit(130) from None
