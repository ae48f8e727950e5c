"""The records of the book, whichever form they have, as the JSON lines that a run writes."""

import json
from pathlib import Path

from teleport.lab.records.runs import read_rows
from teleport.lab.records.study import record_paths

RESULTS = Path(__file__).parents[2] / "chapters" / "results"


def lines_of(record: Path) -> str:
    """A record as the text of a file."""
    return "".join(json.dumps(row) + "\n" for row in read_rows(record))


def copy_record(record: Path, folder: Path) -> Path:
    """Write a record as a file into a folder."""
    path = folder / record.name
    path.write_text(lines_of(record))
    return path


def copy_records(source: Path, folder: Path) -> list[Path]:
    """All records of one folder."""
    return [copy_record(path, folder) for path in record_paths(source)]
