"""Small notebooks: cells, and files of them."""

import copy
import json
from pathlib import Path
from typing import Any

from teleport.book import notebook_form

Cell = dict[str, Any]


def code(source: str, *outputs: Cell, **metadata: object) -> Cell:
    return {
        "cell_type": "code",
        "id": "a",
        "metadata": metadata,
        "source": source,
        "execution_count": 1,
        "outputs": list(outputs),
    }


def prose(source: str) -> Cell:
    return {"cell_type": "markdown", "id": "a", "metadata": {}, "source": source}


def printed(text: str, name: str = "stdout") -> Cell:
    return {"output_type": "stream", "name": name, "text": text}


def saved(folder: Path, *cells: Cell, tidy: bool = True) -> Path:
    """A notebook with these cells, numbered in order where they were executed."""
    cells, path = copy.deepcopy(cells), folder / "01_x.ipynb"
    executed = (cell for cell in cells if cell.get("execution_count"))
    for count, cell in enumerate(executed, start=1):
        cell["execution_count"] = count
    for number, cell in enumerate(cells):
        cell["id"] = f"c{number}"
    whole = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(whole), encoding="utf-8")
    if tidy:
        notebook_form.tidy(path)
    return path
