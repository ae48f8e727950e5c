"""Around the commands that write the records of a study."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from teleport.cli.loading import loading
from teleport.cli.options import COMMAND_LINE
from teleport.cli.progress import part_progress, step_progress

if TYPE_CHECKING:
    from teleport.lab.records.record_folder import RecordFolder


@contextmanager
def recording(
    study: str, out: Path | None, resume: bool, threads: int | None, total: int, unit: str = "part"
) -> "Iterator[RecordFolder]":
    """Where the records of a study are written; afterwards they are shown.

    Args:
        study: names a new folder.
        out: the folder that was given, if any.
        resume: whether to go on in it.
        threads: of PyTorch, if given.
        total: how many of ``unit``, which is ``"part"``, told by name, or ``"step"``.
        unit: of the bar.
    """
    with loading():
        from teleport.cli.show import show
        from teleport.lab.records.folders import open_folder
        from teleport.lab.records.record_folder import RecordFolder
        from teleport.line_search import load_search
        from teleport.runtime.threads import threads_for, using_threads

        load_search()

    folder = open_folder(study, out, resume)
    bar = part_progress if unit == "part" else step_progress
    with bar(total, folder) as progress, using_threads(threads_for(threads)):
        yield RecordFolder(folder, resume, COMMAND_LINE.get(), progress)
    show(folder)
