"""The web book: Sphinx, given its settings as a dictionary, with every warning an error."""

import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from teleport.book.configuration import FORMATS, sphinx_settings
from teleport.book.execute import execute
from teleport.book.extras import needed
from teleport.book.manifest import Book, Chapter, read_book
from teleport.errors import BookError

MARKER = ".buildinfo"
"""The file by which Sphinx knows its own output folder."""

TIMES_NAME = "execution.json"
"""What each chapter took, in the folder of a book that was executed."""


def build(
    file: Path,
    out: Path,
    *,
    run: bool = False,
    form: str = "html",
    repository: str = "",
    started: Callable[[Chapter], None] = lambda chapter: None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Build the web book.

    Args:
        file: ``book.toml``.
        out: Folder for the pages: a new one, an empty one, or an earlier book, which is replaced.
        repository: Where the book lies on GitHub, as ``owner/name``, for links to Colab; empty for
            none.
        form: ``html`` for the web book, ``slides`` of its chapters, or an ``epub``.
        run: Run all chapters first, in a scratch folder; otherwise the committed outputs are shown.
        started: Called before each chapter that is run.
        progress: Told how many pages Sphinx has read or written since, and of how many.

    Returns:
        The first page, or the e-book.

    Raises:
        BookError: if ``book.toml`` is wrong, if a package of the extra ``book`` is missing, if
            ``out`` holds something else, if a cell fails, or if Sphinx has anything to warn of.
    """
    if repository and not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise BookError(f"a repository is named as owner/name, got {repository!r}")
    book = read_book(file)
    for extension in sphinx_settings(book, form)["extensions"]:
        needed(extension)
    with ExitStack() as stack:
        source, seconds = book.source, None
        if run:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            source = scratch / book.source.name
            shutil.copytree(book.source, source, ignore=shutil.ignore_patterns(".*"))
            seconds = execute(book, source, started)
        _clear(out)
        settings = sphinx_settings(book, form) | {"teleport_repository": repository}
        warnings = _run_sphinx(settings, source, out, form, progress)
    if warnings:
        raise BookError(
            f"Sphinx warns, and every warning is an error; the pages are in {out} for a look:\n"
            f"{warnings.replace(str(source), book.source.name)}"
        )
    if seconds is not None:
        (out / TIMES_NAME).write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
    if form == "epub":
        return next(out.glob("*.epub"))
    return out / f"{book.document(book.front)}.html"


def _run_sphinx(
    settings: dict[str, Any],
    source: Path,
    out: Path,
    form: str,
    progress: Callable[[int, int], None],
) -> str:
    """Build the pages from nothing; return what Sphinx warned of."""
    sphinx, docutils = needed("sphinx.application"), needed("sphinx.util.docutils")
    said = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as doctrees,
        docutils.patch_docutils(),
        docutils.docutils_namespace(),
    ):
        app = sphinx.Sphinx(
            srcdir=str(source),
            confdir=None,
            outdir=str(out),
            doctreedir=doctrees,
            buildername=FORMATS[form],
            confoverrides=settings,
            status=None,
            warning=said,
            freshenv=True,
        )
        for event in ("source-read", "doctree-resolved"):
            app.connect(event, lambda app, *rest: progress(1, 2 * len(app.env.found_docs)))
        app.build(force_all=True)
    return re.sub("\x1b\\[[0-9;]*m", "", said.getvalue()).strip()


def _clear(out: Path) -> None:
    """Remove an earlier book; anything else is left alone."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise BookError(f"{out} is not empty and holds no book; name another folder with --out")
        shutil.rmtree(out)
    elif out.exists() and not out.is_dir():
        raise BookError(f"{out} is a file; name a folder with --out")


def over_budget(book: Book, out: Path) -> list[str]:
    """Which chapters took longer than their budget when the book in ``out`` was executed."""
    if not (out / TIMES_NAME).is_file():
        return []
    seconds = json.loads((out / TIMES_NAME).read_text(encoding="utf-8"))
    budgets = {c.file.relative_to(book.source).as_posix(): c.seconds for c in book.chapters}
    return [
        f"{name} took {taken:.0f} s, its budget is {budgets[name]:g} s"
        for name, taken in seconds.items()
        if name in budgets and taken > budgets[name]
    ]
