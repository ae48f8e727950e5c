"""Chapters run from the first cell to the last, in a copy of their folder."""

import time
from collections.abc import Callable
from pathlib import Path

from teleport.book.extras import needed
from teleport.book.manifest import Book, Chapter
from teleport.errors import BookError


def execute(
    book: Book, folder: Path, started: Callable[[Chapter], None] = lambda chapter: None
) -> dict[str, float]:
    """Run all chapters of a book and replace the notebooks in a folder; return seconds by file.

    Args:
        book: The book; its own files stay as they are.
        folder: A copy of the book's source folder. The chapters run in it.
        started: Called before each chapter.

    Raises:
        BookError: if a cell fails or the chapter takes longer than its budget, with chapter and
            cell.
    """
    seconds = {}
    for chapter in book.chapters:
        started(chapter)
        name = chapter.file.relative_to(book.source).as_posix()
        seconds[name] = run_notebook(folder / name, chapter.seconds)
    return seconds


def run_notebook(file: Path, limit: float) -> float:
    """Run a notebook in its folder and write the outputs into it; return the seconds it took.

    BookError if a cell fails, or if all cells together take longer than ``limit`` seconds.
    """
    nbformat, nbclient = needed("nbformat"), needed("nbclient")
    exceptions = needed("nbclient.exceptions")
    notebook = nbformat.read(file, as_version=4)
    start, current = time.monotonic(), [0]

    def left(cell: object) -> float:
        return max(0.1, limit - (time.monotonic() - start))

    client = nbclient.NotebookClient(
        notebook,
        timeout_func=left,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=40"],  # its warnings are no matter of a chapter
        resources={"metadata": {"path": str(file.parent)}},
        on_cell_start=lambda cell, cell_index: current.__setitem__(0, cell_index),
    )
    where = f"chapter {file.name}"
    try:
        client.execute()
    except exceptions.CellTimeoutError as error:
        raise BookError(
            f"{where}, cell {current[0]}: the chapter takes longer than its {limit:g} s; make it "
            "faster, or raise `seconds` in book.toml"
        ) from error
    except exceptions.CellExecutionError as error:
        raise BookError(f"{where}, cell {current[0]}: {error.ename}: {error.evalue}") from error
    except exceptions.DeadKernelError as error:
        raise BookError(f"{where}, cell {current[0]}: the kernel died") from error
    nbformat.write(notebook, file)
    return time.monotonic() - start
