"""IPython's syntax in the cells of a notebook: `%magics`, `!shell`, `help?`.

It is read by IPython's own transformer. What runs Python code (`%time`, `%%time`, `%%capture`,
`%%prun`) becomes that code; everything else becomes a call of a `Shell`, which does nothing: the
answers do not depend on it, and no command of a file that is graded is run.
"""

import ast
from typing import Any

from teleport.check.units import NOTHING, parsed
from teleport.errors import CheckError

RUNS_ITS_CELL = ("time", "capture", "prun")
"""Cell magics whose cell is code that stays: its variables are the notebook's."""


class Shell:
    """What ``get_ipython()`` gives: it takes every call and does nothing."""

    def getoutput(self, *arguments: Any, **options: Any) -> list[str]:
        """Lines of output of a shell command, of which none is run."""
        return []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


def parse_cell(source: str) -> tuple[ast.Module, str, str]:
    """The code of a cell.

    Returns:
        Its tree; the lines that the tree is of; and the cell magic because of which its code is not
        run, or nothing.

    Raises:
        SyntaxError: if it is neither Python nor IPython.
        CheckError: if it is not Python and IPython is not installed.
    """
    try:
        return parsed(source), source, ""
    except SyntaxError as error:
        text = _transformed(source, error)
    tree = parsed(text)
    magic = _magic(tree.body[0]) if len(tree.body) == 1 else None
    if magic is None or magic[0] != "run_cell_magic" or len(magic) != 4:
        return ast.fix_missing_locations(_Timed().visit(tree)), text, ""
    _, name, _, body = magic
    if name not in RUNS_ITS_CELL:
        return NOTHING, source, f"%%{name}"
    above = "\n" * (source.count("\n") - body.count("\n"))  # lines are counted as in the cell
    return parse_cell(above + body)


def _transformed(source: str, error: SyntaxError) -> str:
    try:
        from IPython.core.inputtransformer2 import TransformerManager
    except ImportError:
        raise CheckError(
            f"a cell is not Python ({error.msg}), and what reads IPython's %magics, !commands and "
            "help? is not installed: pip install 'nullspace-teleport[course]'"
        ) from error
    try:
        return str(TransformerManager().transform_cell(source))
    except (SyntaxError, ValueError, RecursionError):
        raise error from None


def _magic(node: ast.AST) -> list[str] | None:
    """Method and arguments of a call ``get_ipython().method("…", "…")``."""
    match node.value if isinstance(node, ast.Expr) else node:
        case ast.Call(ast.Attribute(ast.Call(ast.Name("get_ipython")), method), arguments):
            return [method, *(str(a.value) for a in arguments if isinstance(a, ast.Constant))]
    return None


class _Timed(ast.NodeTransformer):
    """Puts what `%time` times in its place."""

    def visit_Expr(self, node: ast.Expr) -> Any:
        found = self._timed(node)
        if not found:
            return self.generic_visit(node)
        return [ast.copy_location(statement, node) for statement in found]

    def visit_Call(self, node: ast.Call) -> Any:
        found = self._timed(node)
        if len(found) == 1 and isinstance(found[0], ast.Expr):
            return ast.copy_location(found[0].value, node)
        return self.generic_visit(node)

    def _timed(self, node: ast.AST) -> list[ast.stmt]:
        magic = _magic(node)
        if magic is None or magic[:2] != ["run_line_magic", "time"] or len(magic) < 3:
            return []
        body = parsed(magic[2].removeprefix("--no-raise-error").strip()).body
        for inner in (inner for statement in body for inner in ast.walk(statement)):
            if hasattr(inner, "lineno"):
                ast.copy_location(inner, node)
        return body
