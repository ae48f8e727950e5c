"""``book.toml``: what the book is made of, read and checked to the last key.

The document has these keys; all are needed unless marked. Files are named from the folder that
holds ``book.toml``, and have to exist.

=================  ======================================================================
``title``          a text
``authors``        a list of texts
``language``       the code of the language, as in HTML: ``en``
``licence``        the licence of text and code, its SPDX name
``front``          Markdown file of the first page; its folder holds all other files
``bibliography``   BibTeX file with the sources that the chapters cite
``[links]``        what the foot of every page links to: text = address (optional)
``[[chapter]]``    the chapters in their order, each with

                   - ``file``: a notebook, named ``NN_name.ipynb`` with NN the chapter's number
                   - ``seconds``: its time budget, the limit when the book is executed
                   - ``data``: a list of the data sets it reads, as ``teleport data list`` has them
                   - ``exercises``: a notebook that the chapter links to (optional)
``[[page]]``       the pages behind the chapters in their order, each with ``file`` (optional)
=================  ======================================================================

The checks are by hand: pydantic knows neither the lines of a file nor what it may name.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from teleport.book.places import Keys, key_lines
from teleport.errors import BookError
from teleport.lab.records.schema import POSITIVE, Kind
from teleport.runtime.toml import tomllib


@dataclass(frozen=True)
class Chapter:
    """One chapter.

    Attributes:
        seconds: Time budget for running all its cells.
    """

    file: Path
    seconds: float
    data: tuple[str, ...]
    exercises: Path | None

    @property
    def number(self) -> int:
        """The chapter's number, which begins its file's name."""
        return int(self.file.name[:2])


@dataclass(frozen=True)
class Book:
    """What ``book.toml`` says.

    Attributes:
        file: ``book.toml`` itself.
        licence: SPDX name of its licence.
        front: Markdown file of the first page.
        links: Text and address of what the foot of every page links to.
    """

    file: Path
    title: str
    authors: tuple[str, ...]
    language: str
    licence: str
    front: Path
    bibliography: Path
    links: dict[str, str]
    chapters: tuple[Chapter, ...]
    pages: tuple[Path, ...]

    @property
    def source(self) -> Path:
        """The folder that holds all files of the book."""
        return self.front.parent

    def document(self, file: Path) -> str:
        """The name of a file's page: its path in the source folder without the suffix."""
        return file.relative_to(self.source).with_suffix("").as_posix()


def read_book(path: Path) -> Book:
    """Read ``book.toml``.

    Raises:
        BookError: if the file cannot be read or is not TOML, if a key is unknown, missing or of
            the wrong type, or if a file it names is missing; with the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BookError(
            f"cannot read {path}: {error}; run this in the top folder of the repository, or name "
            "another book.toml with --book"
        ) from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BookError(f"{path} is not TOML: {error}") from error
    return _Reader(path.resolve(), path, key_lines(text)).book(table)


def _list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


_TEXT = Kind("a text", lambda v: isinstance(v, str) and bool(v.strip()))
_TEXTS = Kind("a list of texts", partial(_list_of, str))
_TABLES = Kind("tables, each with a header in double brackets", partial(_list_of, dict))
_LINKS = Kind(
    "a table of addresses", lambda v: isinstance(v, dict) and _list_of(str, list(v.values()))
)
_SECONDS = Kind("a number of seconds > 0", lambda v: POSITIVE.holds(v) and v < 86400)

_BOOK = {
    "title": _TEXT,
    "authors": _TEXTS,
    "language": _TEXT,
    "licence": _TEXT,
    "front": _TEXT,
    "bibliography": _TEXT,
    "links": _LINKS,
    "chapter": _TABLES,
    "page": _TABLES,
}
_CHAPTER = {"file": _TEXT, "seconds": _SECONDS, "data": _TEXTS, "exercises": _TEXT}
_PAGE = {"file": _TEXT}
_OPTIONAL = {"links", "page", "exercises"}


@dataclass(frozen=True)
class _Reader:
    """Reads the tables of one document; `fail` names file and line."""

    path: Path
    name: Path
    lines: dict[Keys, int]
    seen: set[Path] = field(default_factory=set)

    def fail(self, keys: Keys, message: str) -> BookError:
        """The error for a key, with the line of the key or of the table that should hold it."""
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return BookError(f"{self.name}:{self.lines.get(keys, 1)}: {message}")

    def book(self, table: dict[str, Any]) -> Book:
        self.check(table, (), _BOOK)
        front = self.file(table["front"], ("front",), ".md")
        chapters = tuple(
            self.chapter(entry, ("chapter", i), front.parent)
            for i, entry in enumerate(table["chapter"])
        )
        if not chapters:
            raise self.fail(("chapter",), "a book needs at least one [[chapter]]")
        pages = []
        for i, entry in enumerate(table.get("page", [])):
            self.check(entry, ("page", i), _PAGE)
            pages.append(self.file(entry["file"], ("page", i, "file"), ".md", front.parent))
        self.in_order(chapters)
        return Book(
            self.path,
            table["title"],
            tuple(table["authors"]),
            table["language"],
            table["licence"],
            front,
            self.file(table["bibliography"], ("bibliography",), ".bib", front.parent),
            self.links(table.get("links", {})),
            chapters,
            tuple(pages),
        )

    def chapter(self, entry: dict[str, Any], keys: Keys, folder: Path) -> Chapter:
        self.check(entry, keys, _CHAPTER)
        file = self.file(entry["file"], (*keys, "file"), ".ipynb", folder)
        if not (file.name[:2].isdigit() and file.name[2] == "_"):
            raise self.fail(
                (*keys, "file"),
                f"the name of a chapter is NN_name.ipynb with its number NN, got {file.name!r}",
            )
        from teleport import data as datasets  # late: it loads PyTorch

        known = [info.name for info in datasets.available()]
        for name in entry["data"]:
            if name not in known:
                raise self.fail(
                    (*keys, "data"), f"unknown data set {name!r}; there are: {', '.join(known)}"
                )
        exercises = entry.get("exercises")
        return Chapter(
            file,
            float(entry["seconds"]),
            tuple(entry["data"]),
            exercises and self.file(exercises, (*keys, "exercises"), ".ipynb", folder),
        )

    def check(self, table: dict[str, Any], keys: Keys, known: dict[str, Kind]) -> None:
        where = f" in [[{keys[0]}]]" if keys else ""
        for key, value in table.items():
            if key not in known:
                raise self.fail(
                    (*keys, key), f"unknown key {key!r}{where}; allowed: {', '.join(known)}"
                )
            if not known[key].holds(value):
                allowed = known[key].what
                raise self.fail((*keys, key), f"{key!r}{where} must be {allowed}, got {value!r}")
        for key in known:
            if key not in table and key not in _OPTIONAL:
                raise self.fail(keys, f"the key {key!r} is missing{where}")

    def links(self, table: dict[str, str]) -> dict[str, str]:
        for text, address in table.items():
            if not address.startswith(("https://", "http://")):
                raise self.fail(
                    ("links", text), f"a link begins with https:// or http://, got {address!r}"
                )
        return dict(table)

    def file(self, name: str, keys: Keys, suffix: str, folder: Path | None = None) -> Path:
        file = (self.path.parent / name).resolve()
        if not file.is_file():
            raise self.fail(keys, f"there is no file {name!r} in {self.path.parent}")
        if file.suffix != suffix:
            raise self.fail(keys, f"expected a file that ends in {suffix}, got {name!r}")
        if folder is not None and not file.is_relative_to(folder):
            raise self.fail(keys, f"{name!r} is not in the folder of the front page, {folder}")
        if file in self.seen:
            raise self.fail(keys, f"{file.name!r} is listed twice")
        self.seen.add(file)
        return file

    def in_order(self, chapters: tuple[Chapter, ...]) -> None:
        for i, (before, after) in enumerate(pairwise(chapters)):
            if before.number >= after.number:
                raise self.fail(
                    ("chapter", i + 1, "file"),
                    f"chapter {after.number} stands after chapter {before.number}; their order is "
                    "that of their numbers",
                )
