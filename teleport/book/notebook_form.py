"""The book's notebooks as files: reading their text, and the one form they have on disk.

A chapter is committed with its outputs. So that a change of a chapter shows what was changed, and
not who ran it, every file has the same metadata, order of keys and joined streams: `tidy`. Nothing
is executed here; ``python -m teleport.book.notebook_form`` tidies whole folders.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

NotebookCell = dict[str, Any]
"""One cell of a notebook, as nbformat 4.5 defines it; ``source`` may be text or lines."""

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""Metadata of every chapter: the same whoever ran it last, with any version of Python."""

KEPT = ("mystnb", "tags")
"""Cell metadata that readers or tests use; the rest is an editor's and is dropped."""

_FENCE = re.compile(r"^\s*(?P<fence>`{3,}|~{3,}|:{3,})\s*(?P<info>[^`]*)$")


def load_notebook(path: Path) -> dict[str, Any]:
    """The notebook in a file; ValueError if it is none."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a notebook: {error}") from error
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise ValueError(f"{path} is not a notebook: it has no list of cells")
    return notebook


def joined(lines: str | list[str]) -> str:
    """Source or output of a cell as one string, however it is stored."""
    return lines if isinstance(lines, str) else "".join(lines)


def page_markdown(path: Path) -> str:
    """The text of a page of the book: a Markdown file, or all Markdown cells of a notebook."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = (c for c in load_notebook(path)["cells"] if c["cell_type"] == "markdown")
    return "\n\n".join(joined(cell["source"]) for cell in cells)


def outside_of_code(markdown: str) -> Iterator[str]:
    """Lines of Markdown without those that are shown as code; those of directives stay."""
    fences: list[tuple[str, bool]] = []
    for line in markdown.splitlines():
        found = _FENCE.match(line)
        in_code = bool(fences) and fences[-1][1]
        if found and not found["info"] and fences and found["fence"].startswith(fences[-1][0]):
            fences.pop()
        elif found and found["info"] and not in_code:
            shown = found["fence"][0] != ":" and not found["info"].startswith("{")
            fences.append((found["fence"], shown or found["info"].startswith("{code")))
        elif found and not in_code and found["fence"][0] != ":":
            fences.append((found["fence"], True))
        if not in_code and not (fences and fences[-1][1]):
            yield line


def is_tidy(path: Path) -> bool:
    """Whether a notebook is in normal form."""
    return path.read_text(encoding="utf-8") == normal_form(load_notebook(path))


def tidy(path: Path) -> bool:
    """Bring a notebook into normal form; sources and the content of outputs stay as they are.

    Returns:
        Whether the file was changed.
    """
    if is_tidy(path):
        return False
    path.write_text(normal_form(load_notebook(path)), encoding="utf-8")
    return True


def normal_form(notebook: dict[str, Any]) -> str:
    """The notebook as the text its file has to have."""
    taken = {cell["id"] for cell in notebook["cells"] if "id" in cell}
    cells = []
    for number, cell in enumerate(notebook["cells"]):
        new = next(name for name in _names(number) if name not in taken)
        cells.append(_normal_cell(cell, cell.get("id", new)))
    whole = {"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _names(number: int) -> Iterator[str]:
    yield f"c{number:03}"
    yield from (f"c{number:03}-{suffix}" for suffix in range(2, 1000))


def _normal_cell(cell: NotebookCell, name: str) -> NotebookCell:
    kept = {key: cell["metadata"][key] for key in KEPT if cell["metadata"].get(key)}
    new = {"cell_type": cell["cell_type"], "id": name, "metadata": kept}
    new["source"] = joined(cell["source"]).rstrip("\n").splitlines(keepends=True)
    if cell["cell_type"] == "code":
        new["execution_count"] = cell["execution_count"]
        new["outputs"] = [_normal_output(output) for output in _merged(cell["outputs"])]
    if "attachments" in cell:
        new["attachments"] = cell["attachments"]
    return new


def _merged(outputs: list[NotebookCell]) -> Iterator[NotebookCell]:
    """Outputs with neighbours of one stream joined: where a stream was cut is chance."""
    for _, group in groupby(outputs, lambda o: o["name"] if "name" in o else id(o)):
        first, *others = group
        if others:
            first = {**first, "text": "".join(joined(each["text"]) for each in (first, *others))}
        yield first


def _normal_output(output: NotebookCell) -> NotebookCell:
    new = {**output}
    if "text" in output:
        new["text"] = joined(output["text"]).splitlines(keepends=True)
    if "metadata" in output:
        new["metadata"] = {}
    return new


def main(arguments: list[str] | None = None) -> int:
    """Bring notebooks into normal form; return 1 if with ``--check`` one is not, else 0."""
    parser = argparse.ArgumentParser("python -m teleport.book.notebook_form", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="default: chapters/*.ipynb")
    parser.add_argument("--check", action="store_true", help="change no file")
    options = parser.parse_args(arguments)
    paths = options.paths or sorted(Path("chapters").glob("*.ipynb"))
    if not paths:
        parser.error("there is no chapters/*.ipynb here: name the notebooks")
    if options.check:
        wrong = [path for path in paths if not is_tidy(path)]
        sys.stdout.writelines(f"not in normal form: {path}\n" for path in wrong)
        return int(bool(wrong))
    sys.stdout.writelines(f"tidied {path}\n" for path in paths if tidy(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
