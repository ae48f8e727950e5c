"""What a finished chapter must not contain, found by reading the notebook only.

The outputs that are stored are what readers see, and the code is what they copy: `faults` lists
what is wrong with one notebook and what to do; ``python -m teleport.book.notebook_rules`` prints it
for all.
"""

import argparse
import ast
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from teleport.book.notebook_form import (
    NotebookCell,
    is_tidy,
    joined,
    load_notebook,
    outside_of_code,
)

MOST_LINES = 20
"""Lines of a code cell that still fit a screen with the text above them."""

FEWEST_WORDS = 5
"""Words of an alternative text, below which it cannot tell what a figure shows."""

_ABSOLUTE = re.compile(
    r"(?<![\w.:/~])/(?:home|root|tmp|usr|work|Users|mnt|opt|var|private|content|kaggle)/"
    r"|\b[A-Za-z]:\\|file://"
)
_WARNING = re.compile(r"Traceback \(most recent call last\)|\b[A-Z]\w*Warning\b:")
_ADDRESS = re.compile(r"<[^<>\n]* at 0x[0-9a-fA-F]+>")
_BARE_IMAGE = re.compile(r"!\[\s*\]\(")


def faults(path: Path) -> list[str]:
    """What is wrong with a chapter, one line each with the cell and what to do; empty if nothing.

    Of every notebook it is asked that

    - all code cells were run from top to bottom, once, and those that print have their output;
    - no output is an error, a warning, an address or anything on the standard error stream;
    - no path of one machine is used, and every name of this package comes from where it is defined
      (mypy would say that, too, but by nbqa it takes 10 s a chapter and finds much else, too;
      private names are ruff's to find, names that are not there show when the chapter is run);
    - no code cell has more than 20 lines;
    - a cell that shows a figure also prints a number, and says in ``mystnb.image.alt`` of its
      metadata what is to be seen, for those who cannot see it; images in text have a description;
    - the file is in normal form (`tidy`).
    """
    notebook = load_notebook(path)
    found = list(_order(notebook["cells"]))
    for number, cell in enumerate(notebook["cells"]):
        place = f"{path.name}, cell {number} ({cell.get('id', 'without id')}): "
        checks = CODE_CHECKS if cell["cell_type"] == "code" else TEXT_CHECKS
        found += [place + fault for check in checks for fault in check(cell)]
    if not is_tidy(path):
        found.append(
            f"{path.name} is not in normal form (an editor's metadata, split streams, order of "
            f"keys): run `python -m teleport.book.notebook_form`"
        )
    return found


def _order(cells: list[NotebookCell]) -> Iterator[str]:
    counts = [
        c["execution_count"] for c in cells if c["cell_type"] == "code" and joined(c["source"])
    ]
    if counts != list(range(1, len(counts) + 1)):
        at = next(i for i, count in enumerate(counts) if count != i + 1)
        yield (
            f"code cell {at + 1} has the execution count {counts[at]}: restart the kernel, run all "
            "cells from top to bottom and save"
        )


def _outputs(cell: NotebookCell) -> Iterator[str]:
    if not cell["outputs"] and any(map(_speaks, _statements(cell))):
        yield "prints or shows something, but no output is stored: run it and save"
    for output in cell["outputs"]:
        if output["output_type"] == "error":
            yield f"ends with the error {output['ename']}: make it run, or catch and print it"
        elif output.get("name") == "stderr":
            start = joined(output["text"]).strip()[:60]
            yield f"writes to the standard error stream ({start}...): remove the cause"
        elif found := _WARNING.search(_shown(output)):
            yield f"shows {found[0]!r} in its output: remove the cause"
        elif found := _ADDRESS.search(_shown(output)):
            yield f"shows {found[0]!r}, another address each time: end the last line with ;"


def _statements(cell: NotebookCell) -> list[ast.stmt]:
    try:
        return _parsed(cell).body
    except SyntaxError:
        return []


def _parsed(cell: NotebookCell) -> ast.Module:
    """The code of a cell; the one magic that chapters may need to show figures is left out."""
    lines = joined(cell["source"]).splitlines()
    return ast.parse("\n".join("" if line == "%matplotlib inline" else line for line in lines))


def _speaks(node: ast.AST) -> bool:
    """Whether a call of ``print`` or of some ``show`` is executed here, not only defined."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda | ast.AsyncFunctionDef):
        return False
    if isinstance(node, ast.Call):
        name = node.func
        if isinstance(name, ast.Name) and name.id == "print":
            return True
        if isinstance(name, ast.Attribute) and name.attr == "show":
            return True
    return any(map(_speaks, ast.iter_child_nodes(node)))


def _shown(output: NotebookCell) -> str:
    """What an output shows as text."""
    data = output.get("data", {})
    return joined(output.get("text", "")) + joined(data.get("text/plain", ""))


def _paths(cell: NotebookCell) -> Iterator[str]:
    whole = [joined(cell["source"]), *map(_shown, cell.get("outputs", []))]
    for part in whole:
        if found := _ABSOLUTE.search(part):
            line = next(line for line in part.splitlines() if found[0] in line).strip()
            yield f"holds a path of one machine ({line[:60]}): use a relative one or none"


def _length(cell: NotebookCell) -> Iterator[str]:
    lines = len(joined(cell["source"]).splitlines())
    if lines > MOST_LINES:
        yield f"has {lines} lines, {MOST_LINES} are allowed: split it where the idea changes"


def _figures(cell: NotebookCell) -> Iterator[str]:
    outputs = cell["outputs"]
    if not any(kind.startswith("image/") for o in outputs for kind in o.get("data", {})):
        return
    printed = [joined(o["text"]) for o in outputs if o["output_type"] == "stream"]
    printed += [_shown(o) for o in outputs if o["output_type"] == "execute_result"]
    if not any(re.search(r"\d", part) for part in printed):
        yield "shows a figure and no number: print what is to be read off it in the same cell"
    described = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
    if len(described.split()) < FEWEST_WORDS:
        yield (
            'shows a figure without alternative text: put {"mystnb": {"image": {"alt": "..."}}} '
            f"into the cell's metadata, at least {FEWEST_WORDS} words on what is to be seen"
        )


def _names_used(cell: NotebookCell) -> Iterator[str]:
    try:
        tree = _parsed(cell)
    except SyntaxError as error:
        yield (
            f"is not plain Python ({error.msg}, line {error.lineno}): no shell lines, and no magic "
            "but %matplotlib inline"
        )
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "teleport":
            wrong = [n.name for n in node.names if n.name not in public(str(node.module))]
            for name in wrong:
                yield f"imports {name} from {node.module}, which does not define it: find its own"


def public(module: str) -> set[str]:
    """Names that a module of this package offers.

    They are those in its ``__all__``; without one, those it defines itself. Modules below a package
    count, and what a module merely imports does not. A module that is not there offers none.
    """
    try:
        found = importlib.import_module(module)
    except ImportError:
        return set()
    below = {
        path.stem for folder in getattr(found, "__path__", []) for path in _parts(Path(folder))
    }
    names = set(found.__all__) if hasattr(found, "__all__") else _defined(found)
    return {name for name in names | below if not name.startswith("_")}


def _parts(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.py")
    yield from (path for path in folder.iterdir() if (path / "__init__.py").exists())


def _defined(module: ModuleType) -> set[str]:
    names = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return names


def _images(cell: NotebookCell) -> Iterator[str]:
    lines = list(outside_of_code(joined(cell["source"])))
    if any(map(_BARE_IMAGE.search, lines)):
        yield "has an image without a description: ![what is to be seen](file)"
    if any(re.match(r"\s*(:{3,}|`{3,})\{(image|figure)\}", line) for line in lines) and not any(
        line.strip().startswith(":alt:") for line in lines
    ):
        yield "has an image directive without :alt:"


CODE_CHECKS: tuple[Callable[[NotebookCell], Iterator[str]], ...] = (
    _outputs,
    _paths,
    _names_used,
    _length,
    _figures,
)
TEXT_CHECKS: tuple[Callable[[NotebookCell], Iterator[str]], ...] = (_paths, _images)


def main(arguments: list[str] | None = None) -> int:
    """List the faults of notebooks; return the exit code, 1 if there are any."""
    parser = argparse.ArgumentParser(
        "python -m teleport.book.notebook_rules", description=faults.__doc__
    )
    parser.add_argument("paths", nargs="*", type=Path, help="default: chapters/*.ipynb")
    paths = parser.parse_args(arguments).paths or sorted(Path("chapters").glob("*.ipynb"))
    if not paths:
        parser.error("there is no chapters/*.ipynb here: name the notebooks")
    found = [fault for path in paths for fault in faults(path)]
    sys.stdout.writelines(f"{fault}\n" for fault in found)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
