"""Reading a file of answers: its pieces of code, and which of them are exercises.

A notebook is read cell by cell. Its exercises are the graded code cells of nbgrader, with their
points; in a notebook without any, every cell that calls a check. A Python file is read statement by
statement. Its exercises are the statements that call a check, as in ``check.projection(mine)``,
and every function that has the name of a check and is not passed to one, one point each.
"""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teleport.check import CHECKS
from teleport.errors import CheckError

RECALL = ("choice", "value")


@dataclass(frozen=True)
class Unit:
    """A piece of code that is run as a whole.

    Attributes:
        source: Python code.
        place: where it stands, in words.
        exercise: name of the exercise that it grades, or empty.
        points: of the exercise.
        syntax_error: why it cannot be run, or empty.
    """

    source: str
    place: str
    exercise: str = ""
    points: float = 0.0
    syntax_error: str = ""


def read_submission(path: Path) -> list[Unit]:
    """The pieces of a ``.py`` or ``.ipynb`` file, in order.

    Raises:
        CheckError: if the file is none, cannot be read, or holds no exercise.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckError(f"cannot read {path}: {error}") from error
    if path.suffix == ".ipynb":
        units = _notebook(path, text)
    elif path.suffix == ".py":
        units = _script(path, text)
    else:
        raise CheckError(f"{path} is neither a notebook (.ipynb) nor a Python file (.py)")
    if not any(unit.exercise for unit in units):
        raise CheckError(
            f"no exercise in {path}: a notebook needs graded cells or cells that call a check, as "
            "in check.projection(my_function); in a Python file a function with the name of a "
            "check is enough"
        )
    return units


def _notebook(path: Path, text: str) -> list[Unit]:
    try:
        cells = json.loads(text)["cells"]
        found = [(number, cell) for number, cell in enumerate(cells, 1) if _kind(cell) == "code"]
        sources = {number: _source(cell) for number, cell in found}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckError(f"{path} is not a notebook of format 4 ({error})") from error
    marked = any(_grade(cell) for _, cell in found)
    units, names = [], _Names()
    for number, cell in found:
        source, place, grade = sources[number], f"cell {number}", _grade(cell)
        if isinstance(_parsed(source), SyntaxError):
            source = _without_magics(source)
        tree, name, points = _parsed(source), "", 0.0
        if grade:
            name = names.new(str(grade.get("grade_id", place)))
            points = float(grade.get("points", 1))
        elif not marked and (calls := _checks_called(tree)):
            name, points = names.new(calls[0]), float(len(calls))
        broken = f"line {tree.lineno}: {tree.msg}" if isinstance(tree, SyntaxError) else ""
        units.append(Unit(source, place, name, points, broken))
    return units


def _kind(cell: Any) -> str:
    return str(cell["cell_type"])


def _source(cell: Any) -> str:
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def _grade(cell: Any) -> dict[str, Any]:
    """Nbgrader's description of a cell that grades without a person, or nothing."""
    found = cell.get("metadata", {}).get("nbgrader", {})
    return found if found.get("grade") and not found.get("solution") else {}


def _without_magics(source: str) -> str:
    """IPython's own lines turned into comments: they change the session, not the answers."""
    lines = source.splitlines()
    return "\n".join(
        f"# {line}" if line.lstrip().startswith(("%", "!")) else line for line in lines
    )


def _script(path: Path, text: str) -> list[Unit]:
    tree = _parsed(text)
    if isinstance(tree, SyntaxError):
        raise CheckError(f"{path} is not Python: line {tree.lineno}: {tree.msg}")
    lines = text.splitlines()
    units, names, passed = [], _Names(), set()
    for node in tree.body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        # Empty lines in front keep the line numbers of messages.
        source = "\n" * (first - 1) + "\n".join(lines[first - 1 : node.end_lineno])
        calls = _checks_called(node)
        passed |= _arguments(node)
        name = names.new(calls[0]) if calls else ""
        units.append(Unit(source, f"line {first}", name, float(len(calls))))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in CHECKS and node.name not in passed:
            place = f"line {node.lineno}"
            code = f"import teleport.check\nteleport.check.{node.name}({node.name})"
            units.append(Unit(code, place, names.new(node.name), 1.0))
    return units


def _parsed(source: str) -> ast.Module | SyntaxError:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        return error
    except ValueError as error:  # null bytes
        return SyntaxError(str(error))


def _calls(tree: ast.AST | SyntaxError) -> Iterator[tuple[str, ast.Call]]:
    """Calls ``check.<name>(…)``, outside of functions that are only defined."""
    if isinstance(tree, (SyntaxError, ast.FunctionDef, ast.ClassDef)):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if owner in ("check", "teleport.check") and node.func.attr in (*CHECKS, *RECALL):
                yield node.func.attr, node


def _checks_called(tree: ast.AST | SyntaxError) -> list[str]:
    return [name for name, _ in _calls(tree)]


def _arguments(tree: ast.AST) -> set[str]:
    """Names that are passed to a check."""
    return {a.id for _, call in _calls(tree) for a in call.args if isinstance(a, ast.Name)}


class _Names:
    """Makes names of exercises different."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def new(self, wanted: str) -> str:
        name, number = wanted, 2
        while name in self._taken:
            name, number = f"{wanted}-{number}", number + 1
        self._taken.add(name)
        return name
