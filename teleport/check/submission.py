"""Reading a file of answers: its pieces of code, and which of them are exercises.

A notebook is read cell by cell. Its exercises are the graded code cells of nbgrader, with their
points; in a notebook without any, every cell that calls a check. A Python file is read statement by
statement, as Python reads it: UTF-8 with or without a byte order mark, or what its first lines say.
Its exercises are the statements that call a check, as in ``check.projection(mine)``, and every
function that has the name of a check and is not passed to one, one point each.
"""

import ast
from pathlib import Path

from teleport.check import CHECKS
from teleport.check.notebook import read_notebook
from teleport.check.units import (
    Names,
    Submission,
    Unit,
    checks_called,
    parsed,
    passed_to_checks,
    said,
)
from teleport.errors import CheckError


def read_submission(path: Path) -> Submission:
    """The pieces of a ``.py`` or ``.ipynb`` file, in order.

    Raises:
        CheckError: if the file is none, cannot be read, or holds no exercise.
    """
    readers = {".ipynb": read_notebook, ".py": _read_script}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise CheckError(f"{path} is neither a notebook (.ipynb) nor a Python file (.py)")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckError(f"cannot read {path}: {error}") from error
    submission = read(path, content)
    if not any(unit.exercise for unit in submission.units):
        raise CheckError(
            f"no exercise in {path}: a notebook needs graded cells or cells that call a check, as "
            "in check.projection(my_function); in a Python file a function with the name of a "
            "check is enough"
        )
    return submission


def _read_script(path: Path, content: bytes) -> Submission:
    try:
        tree = parsed(content)
    except SyntaxError as error:
        # What Python does not run, we do not either: a file that is graded can be imported.
        advice = "" if error.lineno else "; save it as UTF-8"
        raise CheckError(f"{path} is not Python: {said(error)}{advice}") from error
    units, names, passed = [], Names(), set()
    answers: dict[str, int] = {}
    for node in tree.body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        calls = checks_called(node)
        passed |= passed_to_checks(node)
        name = names.new(calls[0]) if calls else ""
        piece = ast.Module([node], [])
        units.append(Unit(piece, f"line {first}", name, float(len(calls)), calls=tuple(calls)))
        # Of a function that is defined again the last one is the answer.
        answers |= {answer: node.lineno for answer in _functions(node) if answer in CHECKS}
    for name, line in answers.items():
        if name not in passed:
            piece = parsed(f"import teleport.check\nteleport.check.{name}({name})")
            units.append(Unit(piece, f"line {line}", names.new(name), 1.0, calls=(name,)))
    return Submission(units, str(path))


def _functions(node: ast.stmt) -> list[str]:
    """Names that a statement gives to functions."""
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []
