"""Exercise notebooks as pages of the book: the questions, and the solutions folded."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teleport.errors import CheckError

MARKERS = re.compile(r"^[ \t]*### (BEGIN|END) SOLUTION[ \t]*\n?", re.MULTILINE)
STUB = re.compile(r"^( *)### BEGIN SOLUTION\n.*?^ *### END SOLUTION\n?", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class SheetExercise:
    """An exercise of a notebook, its parts as Markdown.

    Attributes:
        about: what the notebook notes about it: label, kind, difficulty, points.
        graded: the code that grades it, as Python.
    """

    about: dict[str, Any]
    title: str
    question: tuple[str, ...]
    answer: tuple[str, ...]
    graded: str


def exercises(path: Path) -> list[SheetExercise]:
    """The exercises of a notebook, in their order.

    Raises:
        CheckError: if the file is not such a notebook.
    """
    return [_exercise(group) for group in _read(path) if group and _about(group) is not None]


def exercise_markdown(path: Path) -> str:
    """A page of MyST ``exercise`` and ``solution`` directives from an exercise notebook.

    An exercise begins with a markdown cell whose metadata hold ``exercise: {label: …}`` and whose
    first line is a heading of level 2. Markdown that nbgrader marks as a solution, and code between
    its solution markers, goes into the folded solution. Code that grades is left out. Code outside
    of exercises is shown as it is: the exercises run after it.

    Raises:
        CheckError: if the file is not such a notebook.
    """
    return "\n\n".join(block for group in _read(path) for block in _blocks(group)) + "\n"


def _read(path: Path) -> list[list[dict[str, Any]]]:
    try:
        return list(_groups(json.loads(path.read_text(encoding="utf-8"))["cells"]))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckError(f"{path} is not a notebook of exercises ({error!r})") from error


def _groups(cells: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The cells before the first exercise, then those of each exercise."""
    group: list[dict[str, Any]] = []
    for cell in cells:
        if "exercise" in cell["metadata"]:
            yield group
            group = []
        group.append(cell)
    yield group


def _about(group: list[dict[str, Any]]) -> Any:
    return group[0]["metadata"].get("exercise")


def _blocks(group: list[dict[str, Any]]) -> Iterator[str]:
    if not group:
        return
    if _about(group) is None:
        for cell in group:
            yield _source(cell) if cell["cell_type"] == "markdown" else _python(_source(cell))
        return
    exercise = _exercise(group)
    label = exercise.about["label"]
    yield _directive("exercise", exercise.title, [f":label: {label}"], exercise.question)
    yield _directive("solution", label, [":class: dropdown"], exercise.answer)


def _exercise(group: list[dict[str, Any]]) -> SheetExercise:
    title, _, text = _source(group[0]).partition("\n")
    question = [text.strip()]
    answer: list[str] = []
    graded: list[str] = []
    for cell in group[1:]:
        marks = cell["metadata"].get("nbgrader", {})
        source = _source(cell)
        if cell["cell_type"] == "markdown":
            (answer if marks.get("solution") else question).append(source)
        elif marks.get("solution"):
            answer.append(_python(MARKERS.sub("", source).strip("\n")))
            stub = STUB.sub(r"\1...\n", source).strip("\n")
            if stub != "...":
                question.append(_python(stub))
        elif marks.get("grade"):
            graded.append(source)
        else:
            question.append(_python(source))
    heading = title.removeprefix("##").strip()
    return SheetExercise(_about(group), heading, tuple(question), tuple(answer), "\n".join(graded))


def _directive(kind: str, argument: str, options: list[str], parts: tuple[str, ...]) -> str:
    body = "\n\n".join(parts)
    longest = max([2, *(len(run) for run in re.findall(r"^:{3,}", body, re.MULTILINE))])
    fence = ":" * (longest + 1)
    return "\n".join([f"{fence}{{{kind}}} {argument}", *options, "", body, fence])


def _python(source: str) -> str:
    return f"```python\n{source}\n```"


def _source(cell: dict[str, Any]) -> str:
    source = cell["source"]
    return (source if isinstance(source, str) else "".join(source)).strip("\n")
