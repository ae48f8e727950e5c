"""The pieces of a file of answers, and which checks they call."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from teleport.check import CHECKS

RECALL = ("answer", "choice", "value")

NOTHING = ast.Module([], [])


@dataclass(frozen=True)
class Unit:
    """A piece of code that is run as a whole.

    Attributes:
        tree: Python code, its lines counted as in the text of its `Submission`.
        exercise: name of the exercise that it grades, or empty.
        fault: why it is not run, or empty.
        calls: checks that it has to call for the points.
        source: what stands there; of two pieces that grade one exercise, whether they are the same.
        changed: whether it is not what nbgrader handed out.
    """

    tree: ast.Module
    place: str
    exercise: str = ""
    points: float = 0.0
    fault: str = ""
    calls: tuple[str, ...] = ()
    source: str = ""
    changed: bool = False


@dataclass(frozen=True)
class Submission:
    """A file of answers.

    Attributes:
        file: what the code is said to come from, in tracebacks and for `inspect`.
        text: the code of a notebook as one text; None if ``file`` is there to be read.
    """

    units: list[Unit]
    file: str
    text: str | None = None


def parsed(code: str | bytes) -> ast.Module:
    """The tree of Python code.

    Raises:
        SyntaxError: whatever is wrong with it, nesting that is too deep for Python included.
    """
    try:
        tree = ast.parse(code)
        # Python 3.10 reads what it then cannot compile, as a sum of ten thousand terms.
        compile(tree, "<answer>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        return tree
    except ValueError as error:  # null bytes, halves of surrogate pairs
        raise SyntaxError(str(error)) from error
    except (RecursionError, MemoryError) as error:
        raise SyntaxError("nested too deeply") from error


def said(error: SyntaxError) -> str:
    """The error in words, with its line where it is of one."""
    return f"line {error.lineno}: {error.msg}" if error.lineno else error.msg


def checks_called(tree: ast.AST) -> list[str]:
    """Names of the checks that a piece calls, as in ``check.projection(mine)``, once per call."""
    return [name for name, _ in _calls(tree)]


def passed_to_checks(tree: ast.AST) -> set[str]:
    """Names of the variables that a piece passes to checks."""
    return {a.id for _, call in _calls(tree) for a in call.args if isinstance(a, ast.Name)}


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls of checks, but for those in functions: these are only defined."""
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        left += reversed(list(ast.iter_child_nodes(node)))
        match node:
            case ast.Call(ast.Attribute(owner, name)) if name in (*CHECKS, *RECALL):
                match owner:
                    case ast.Name("check") | ast.Attribute(ast.Name("teleport"), "check"):
                        yield name, node


def bound(tree: ast.AST) -> set[str]:
    """Names that a piece gives to functions, classes and values."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name) | ast.ClassDef(name) | ast.Name(name, ast.Store()):
                names.add(name)
    return names


class Names:
    """Makes names of exercises different."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def new(self, wanted: str) -> str:
        """The name, or with a number if it is taken."""
        name, number = wanted, 2
        while name in self._taken:
            name, number = f"{wanted}-{number}", number + 1
        self._taken.add(name)
        return name
