"""Packed studies: the records of many finished runs in a few files, without losing a number.

A study is a folder with

- ``runs.jsonl``, a line for every record: the ``folder`` inside the study and the name ``record``
  that it had as a file, how many ``lines``, its first row ``config``, and by their lines the
  ``rows`` that are in no table, its end among them;
- a Parquet file for every type of `TABLES`: ``evaluations.parquet``, ``teleports.parquet``. A row
  begins with the ``folder``, ``record`` and ``line`` where it was and its ``keys`` in their order;
  its fields follow. Columns of numbers, flags and texts hold these; a binary column holds JSON.

A record in a study keeps its path: ``study/folder/record``, though there is no such file.
"""

import json
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teleport.errors import RunError, os_errors_as

if TYPE_CHECKING:
    import polars as pl

Row = dict[str, Any]

INDEX = "runs.jsonl"
TABLES = {
    "evaluation": "evaluations",
    "teleport": "teleports",
    "spectrum": "spectra",
    "point": "points",
    "move": "moves",
    "measurement": "measurements",
}
"""The types of rows of which a record has many, and the tables they are in."""

_BEGINS = b'{"folder": '
_WHERE = ("folder", "record", "line", "keys")
_ENTRY = {"folder", "record", "lines", "config", "rows"}


def is_index(path: Path) -> bool:
    """Whether a file is the list of the records of a packed study."""
    if path.name != INDEX or not path.is_file():
        return False
    with os_errors_as(RunError, f"cannot read {path}"), path.open("rb") as file:
        return file.read(len(_BEGINS)) == _BEGINS


def study_of(folder: Path) -> Path | None:
    """The packed study that a folder is or is in, if any; the folder need not be on disk."""
    whole = _whole(folder)
    return next((above for above in (whole, *whole.parents) if is_index(above / INDEX)), None)


def refuse_packed(folder: Path) -> None:
    """Raise RunError for a folder that is, or is in, a packed study: no runs are written there."""
    study = study_of(folder)
    if study is not None:
        raise RunError(
            f"{folder} is in the packed study {study}, to which no runs are added; give another "
            "--out. To go on with its runs, `teleport unpack` them into a new folder first"
        )


def record_paths(folder: Path) -> list[Path]:
    """The records of one folder, as files or in a packed study, sorted by name."""
    loose = [path for path in folder.glob("*.jsonl") if not is_index(path)]
    study = study_of(folder)
    packed = [] if study is None else _index(study).get(_inside(study, folder), {})
    return sorted({*loose, *(folder / name for name in packed)})


def record_folders(folder: Path) -> list[Path]:
    """The folder and all below it that hold records, as files or in packed studies, sorted."""
    whole, files = _whole(folder), list(folder.rglob("*.jsonl"))
    studies = {path.parent for path in map(_whole, files) if is_index(path)}
    above = study_of(folder)
    if above is not None:
        studies.add(above)
    places = [study / inside for study in studies for inside in _index(study)]
    packed = {folder / p.relative_to(whole) for p in places if p.is_relative_to(whole)}
    return sorted({path.parent for path in files if not is_index(path)} | packed)


def is_packed(path: Path) -> bool:
    """Whether a record is no file, but in a packed study."""
    return not path.exists() and _line(path) is not None


def packed_config(path: Path) -> Row:
    """The first row of a record in a packed study; of its tables nothing is read."""
    config: Row = _entry(path)["config"]
    return config


def packed_rows(path: Path) -> list[Row]:
    """All rows of a record in a packed study; RunError if that is damaged or lacks a table."""
    study = study_of(path.parent)
    assert study is not None
    entry = _entry(path)
    rows = {1: entry["config"], **{int(line): row for line, row in entry["rows"].items()}}
    for kind, name in TABLES.items():
        table = study / f"{name}.parquet"
        if table.exists():
            own = _in_table(table, _stamp(table), entry["folder"]).get(entry["record"], [])
            rows |= {columns["line"]: _row(kind, columns) for columns in own}
    if sorted(rows) != list(range(1, entry["lines"] + 1)):
        raise RunError(
            f"{path} has {len(rows)} of its {entry['lines']} rows; a table of the packed study "
            f"{study} is missing or of another study"
        )
    return [rows[line] for line in sorted(rows)]


def write_study(study: Path, records: Iterable[tuple[Path, Sequence[Row]]]) -> None:
    """Write records, paths inside it with rows, the configuration first, into an existing folder.

    Raises:
        OSError: if it cannot be written.
    """
    tables: dict[str, list[Row]] = {}
    with (study / INDEX).open("w", encoding="utf-8", newline="\n") as index:
        for path, (config, *rows) in records:
            where = {"folder": path.parent.as_posix(), "record": path.name}
            left = {}
            for line, row in enumerate(rows, start=2):
                if _fits(row):
                    keys = json.dumps(list(row))
                    tables.setdefault(row["type"], []).append(
                        {**where, "line": line, "keys": keys, **row}
                    )
                else:
                    left[line] = row
            entry = {**where, "lines": 1 + len(rows), "config": config, "rows": left}
            index.write(json.dumps(entry) + "\n")
    for kind, rows in tables.items():
        _frame(rows).write_parquet(
            study / f"{TABLES[kind]}.parquet", compression="zstd", compression_level=19
        )


def _fits(row: Row) -> bool:
    """Whether a table can hold a row: its fields can be columns, beside those that say where."""
    names = row.keys() - {"type"}
    return row["type"] in TABLES and all(
        name.isascii() and name.isidentifier() and name not in _WHERE for name in names
    )


def _frame(rows: list[Row]) -> "pl.DataFrame":
    import polars as pl  # late, as below: only packed studies need it

    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name != "type"]
    return pl.DataFrame([_column(name, [row.get(name) for row in rows]) for name in names])


def _column(name: str, values: list[Any]) -> "pl.Series":
    """Values of one plain kind as they are, else as JSON; what is null or missing is null."""
    import polars as pl

    kinds = {type(value) for value in values if value is not None}
    plain = {float: pl.Float64, int: pl.Int64, bool: pl.Boolean, str: pl.String}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind in plain and all(value is None or _is_exact(value) for value in values):
        return pl.Series(name, values, dtype=plain[kind])
    texts = [None if value is None else json.dumps(value).encode() for value in values]
    return pl.Series(name, texts, dtype=pl.Binary)


def _is_exact(value: Any) -> bool:
    """Whether a column of its kind gives a value back as it is."""
    if isinstance(value, str):
        return value.isascii()  # texts may hold what UTF-8 cannot; JSON escapes it
    return not isinstance(value, int) or -(2**63) <= value < 2**63


@lru_cache(maxsize=len(TABLES))
def _in_table(table: Path, stamp: object, folder: str) -> dict[str, list[Row]]:
    """The rows that a table has of one folder, as columns, by record; no others are kept."""
    import polars as pl

    try:
        own = pl.col("folder") == folder, pl.all_horizontal(pl.col(_WHERE).is_not_null())
        frame = pl.scan_parquet(table).filter(*own).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"cannot read {table}, a table of a packed study: {reason}") from error
    found: dict[str, list[Row]] = {}
    for columns in frame.iter_rows(named=True):
        found.setdefault(columns["record"], []).append(columns)
    return found


def _row(kind: str, columns: Row) -> Row:
    """A row as it was, a new one every time: what is JSON (bytes) becomes objects only here."""
    values = {**columns, "type": kind}
    found = {key: values[key] for key in json.loads(columns["keys"])}
    return {k: json.loads(v) if isinstance(v, bytes) else v for k, v in found.items()}


def _entry(path: Path) -> Row:
    line = _line(path)
    assert line is not None
    entry: Row = json.loads(line)
    return entry


def _line(path: Path) -> bytes | None:
    """The line about a record in the list of the study it is in."""
    study = study_of(path.parent)
    if study is None:
        return None
    return _index(study).get(_inside(study, path.parent), {}).get(path.name)


def _index(study: Path) -> dict[str, dict[str, bytes]]:
    return _read_index(study / INDEX, _stamp(study / INDEX))


def _stamp(path: Path) -> tuple[int, ...]:
    """Changes when a file is written anew."""
    of = path.stat()
    return of.st_ino, of.st_size, of.st_mtime_ns


@lru_cache(maxsize=4)
def _read_index(path: Path, stamp: object) -> dict[str, dict[str, bytes]]:
    """The lines of the list by folder and record."""
    found: dict[str, dict[str, bytes]] = {}
    with os_errors_as(RunError, f"cannot read {path}"):
        lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not entry.keys() >= _ENTRY:
            raise RunError(
                f"{path}, line {number}: not a record of a packed study; pack the study again"
            )
        if found.setdefault(entry["folder"], {}).setdefault(entry["record"], line) is not line:
            raise RunError(f"{path}, line {number}: {entry['record']} once more; pack it again")
    return found


def _whole(folder: Path) -> Path:
    return Path(os.path.abspath(folder))


def _inside(study: Path, folder: Path) -> str:
    return _whole(folder).relative_to(study).as_posix()
