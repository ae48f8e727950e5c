"""The cells of a notebook as pieces of a file of answers.

What nbgrader marked is looked at closely: a cell whose marks cannot be read, or whose exercise
cannot be tried any more, would otherwise change the points without a word.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from teleport.check.magics import parse_cell
from teleport.check.units import NOTHING, Names, Submission, Unit, checks_called, said
from teleport.errors import CheckError

KINDS = ("code", "markdown", "raw")


@dataclass(frozen=True)
class AnswerCell:
    """A cell of a notebook, its parts of the kind they have to be.

    Attributes:
        number: in the notebook, the first being 1.
        source: its lines end with line feeds.
        graded: what nbgrader notes about a cell that grades without a person; else nothing.
        heading: what our sheets note about an exercise that begins here; else nothing.
    """

    number: int
    kind: str
    source: str
    graded: dict[str, Any]
    heading: dict[str, Any]

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        return f"cell {self.number}"


def read_notebook(path: Path, content: bytes) -> Submission:
    """The pieces of a notebook.

    Raises:
        CheckError: if it is none of format 4, or what nbgrader noted about a cell cannot be read.
    """
    cells = _cells(path, content)
    marked = any(cell.graded or cell.heading for cell in cells)
    units, lines, names = [], 0, Names()
    texts = []
    for cell in cells:
        unit, text = _unit(path, cell, marked, names)
        if unit is not None:
            if unit.tree is not NOTHING:
                ast.increment_lineno(unit.tree, lines)
            units.append(unit)
            texts.append(text)
            lines += text.count("\n")
    units += _deleted(cells)
    _check_copies(path, units)
    return Submission(_without_text(units), f"<{path.name}>", "".join(texts))


def _cells(path: Path, content: bytes) -> list[AnswerCell]:
    if not content.strip():
        raise CheckError(f"{path} is empty: save the notebook in Jupyter first")
    try:
        book = json.loads(content)  # UTF-8, UTF-16 or UTF-32, with a byte order mark or without
    except (ValueError, RecursionError) as error:
        raise CheckError(f"{path} is not a notebook: {error}") from error
    version = book.get("nbformat", 4) if isinstance(book, dict) else 4
    if version != 4 or isinstance(version, bool):
        raise CheckError(
            f"{path} is not a notebook of format 4, but of format {version!r}: open it in Jupyter "
            "and save it, which brings it up to date"
        )
    found = book.get("cells") if isinstance(book, dict) else None
    if not isinstance(found, list):
        raise CheckError(f"{path} is not a notebook of format 4: it has no list of cells")
    return [_cell(f"{path}, cell {number}", number, cell) for number, cell in enumerate(found, 1)]


def _cell(where: str, number: int, cell: Any) -> AnswerCell:
    if not isinstance(cell, dict):
        raise CheckError(f"{where}: not a notebook cell, but {_shown(cell)}")
    kind, source = cell.get("cell_type"), cell.get("source")
    if kind not in KINDS:
        raise CheckError(f"{where}: not a notebook cell: its cell_type is {_shown(kind)}")
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        source = "".join(source)
    if not isinstance(source, str):
        raise CheckError(f"{where}: its source is {_shown(source)}, expected text")
    source = source.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    metadata = _object(where, "metadata", cell.get("metadata", {}))
    marks = _object(where, "metadata.nbgrader", metadata.get("nbgrader", {}))
    heading = metadata.get("exercise", {})
    return AnswerCell(
        number,
        kind,
        source.rstrip("\n") + "\n",
        _graded(where, marks),
        heading if isinstance(heading, dict) and kind == "markdown" else {},
    )


def _object(where: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckError(f"{where}: its {name} is {_shown(value)}, expected an object")
    return value


def _graded(where: str, marks: dict[str, Any]) -> dict[str, Any]:
    """The marks of a cell that grades without a person, if it is one."""
    for name in ("grade", "solution"):
        if not isinstance(marks.get(name, False), bool):
            got = _shown(marks[name])
            raise CheckError(f"{where}: its nbgrader {name} is {got}, expected true or false")
    if not marks.get("grade") or marks.get("solution"):
        return {}
    exercise, points = marks.get("grade_id"), marks.get("points")
    if not isinstance(exercise, str) or not exercise.strip():
        got = _shown(exercise)
        raise CheckError(f"{where}: its nbgrader grade_id is {got}, expected the exercise's name")
    if not _is_points(points):
        raise CheckError(
            f"{where}: its nbgrader points are {_shown(points)}, expected a number >= 0"
        )
    return marks


def _is_points(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e9  # neither NaN nor beyond all measure


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _unit(path: Path, cell: AnswerCell, marked: bool, names: Names) -> tuple[Unit | None, str]:
    """A cell as a piece, and the lines that it adds to the text; None if it is no code."""
    exercise = str(cell.graded.get("grade_id", ""))
    points = float(cell.graded.get("points", 0))
    if cell.kind != "code":
        if not exercise:
            return None, ""
        fault = f"the graded cell is {cell.kind} now, not code: nothing is tried"
        return Unit(NOTHING, cell.place, exercise, points, fault), ""
    tree, text, fault, lost = NOTHING, cell.source, "", False
    try:
        tree, text, magic = parse_cell(cell.source)
    except SyntaxError as error:
        fault = f"SyntaxError: {said(error)}"
    except CheckError as error:
        raise CheckError(f"{path}, {cell.place}: {error}") from error
    else:
        if exercise and magic:
            fault = f"the graded cell begins with {magic}: its code is not run as Python"
        elif exercise and not tree.body:
            fault = "the graded cell is empty: nothing is tried"
        elif lost := _changed(cell) and not _tries(tree):
            fault = "the graded cell is not as it was handed out: nothing is tried"
    calls: list[str] = []
    if not marked and (calls := checks_called(tree)):
        exercise, points = names.new(calls[0]), float(len(calls))
    source = "" if lost else cell.source.strip()
    unit = Unit(tree, cell.place, exercise, points, fault, tuple(calls), source, _changed(cell))
    return unit, text


def _changed(cell: AnswerCell) -> bool:
    """Whether a graded cell is another than the one of which nbgrader noted the checksum."""
    noted = cell.graded.get("checksum")
    if not isinstance(noted, str):
        return False
    # As nbgrader does it: source, kind, that it grades, is no solution and locked, name, points.
    name, points = cell.graded["grade_id"], float(cell.graded["points"])
    handed = f"{cell.source[:-1]}codeTrueFalseTrue{name}{points}".encode("utf-8", "replace")
    return hashlib.md5(handed, usedforsecurity=False).hexdigest() != noted


def _tries(tree: ast.Module) -> bool:
    return bool(checks_called(tree)) or any(isinstance(n, ast.Assert) for n in ast.walk(tree))


def _deleted(cells: list[AnswerCell]) -> Iterator[Unit]:
    """Exercises of our sheets that have their heading left, but not the cell that grades them.

    A cell that was moved below another heading is not missing: there are as many as headings then.
    """
    headings: dict[str, AnswerCell] = {}
    graded: dict[str, set[str]] = {}
    label = ""
    for cell in cells:
        if cell.heading.get("kind") == "derive":  # graded by a person
            label = ""
        elif cell.heading and isinstance(cell.heading.get("label"), str):
            label = str(cell.heading["label"])
            headings.setdefault(label, cell)
        if cell.graded:
            graded.setdefault(label, set()).add(str(cell.graded["grade_id"]))
    missing = len(headings) - len(set().union(*graded.values()))
    for label, cell in headings.items():
        points = cell.heading.get("points")
        if label not in graded and missing > 0 and _is_points(points):
            fault = "its graded cell is not there any more: nothing is tried"
            yield Unit(NOTHING, cell.place, label, float(points or 0), fault)


def _check_copies(path: Path, units: list[Unit]) -> None:
    """Refuse cells of one exercise that do not agree what it is worth."""
    first: dict[str, Unit] = {}
    for unit in units:
        other = first.setdefault(unit.exercise, unit)
        if unit.exercise and other.points != unit.points:
            raise CheckError(
                f"{path}: {other.place} and {unit.place} both grade {unit.exercise!r}, with "
                f"{other.points:g} and {unit.points:g} points; delete the copy"
            )


def _without_text(units: list[Unit]) -> list[Unit]:
    """Copies of a graded cell that try nothing grade nothing, if the cell is there."""
    tried = {unit.exercise for unit in units if unit.source}
    lost = (unit for unit in units if not unit.source and unit.exercise in tried)
    plain = {id(unit): replace(unit, exercise="", fault="") for unit in lost}
    return [plain.get(id(unit), unit) for unit in units]
