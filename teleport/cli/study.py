"""Around the commands that write records."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from teleport.cli.loading import loading
from teleport.cli.options import COMMAND_LINE
from teleport.cli.output import say
from teleport.runtime.progress import parts_of, progress_of

if TYPE_CHECKING:
    from teleport.lab.records.record_folder import RecordFolder


@contextmanager
def interruptible(folder: Path) -> Iterator[None]:
    """Ctrl-C says where the records are and ends with 130."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted; the records so far are complete in {folder}")
        raise typer.Exit(130) from None


@contextmanager
def recording(
    study: str, out: Path | None, resume: bool, threads: int | None, total: int, unit: str = "part"
) -> "Iterator[RecordFolder]":
    """Where the records of a study are written, a new folder or ``out``; afterwards they are shown.

    There are ``total`` of the ``unit``, which is ``"part"``, told by name, or ``"step"``.
    """
    with loading():
        from teleport.cli.show import show
        from teleport.lab.records.folders import open_folder
        from teleport.lab.records.record_folder import RecordFolder
        from teleport.line_search import load_search
        from teleport.runtime.threads import threads_for, using_threads

        load_search()

    folder = open_folder(study, out, resume)
    bar = parts_of(total, unit) if unit == "part" else progress_of(total, unit)
    with interruptible(folder), bar as progress, using_threads(threads_for(threads)):
        yield RecordFolder(folder, resume, COMMAND_LINE.get(), progress)
    show(folder)
