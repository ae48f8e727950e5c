"""Records moved between their two forms: JSON lines as runs write them, and packed studies."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from teleport.errors import RunError
from teleport.lab.records.runs import has_begun, read_rows
from teleport.lab.records.study import record_folders, record_paths, study_of, write_study


def pack(
    folder: Path, study: Path, progress: Callable[[int, int], None] = lambda done, of: None
) -> int:
    """Pack all records of a folder and those below it into a new study; return how many there are.

    The study is read back and compared with the records before it is there by its name. Tables and
    figures beside the records are not packed; nothing is removed. ``progress`` is told how many
    records were read or compared since, and how many there are to be.

    Raises:
        RunError: if there are none, one is damaged or has not ended, ``study`` is there already or
            inside another study, or cannot be written.
    """
    records = _records(folder)
    for path in records:
        if not has_begun(path) or read_rows(path)[-1]["type"] != "end":
            raise RunError(
                f"{path} has not ended, and only whole records are packed; make it again with "
                "--resume, or move it away"
            )
        progress(1, 2 * len(records))
    with _new(study) as fresh:
        write_study(fresh, ((path.relative_to(folder), read_rows(path)) for path in records))
        for path in records:
            # As text: numbers that are equal, as 1 and 1.0, are not the same there, and NaN is.
            kept = read_rows(fresh / path.relative_to(folder))
            if json.dumps(kept) != json.dumps(read_rows(path)):
                raise RunError(f"{path} cannot be packed: it does not come back as it is")
            progress(1, 2 * len(records))
    return len(records)


def unpack(folder: Path, out: Path) -> int:
    """Write the records of a packed study, or of a folder in one, as JSON lines; return how many.

    RunError if there are none, the study is damaged, or ``out`` is there, in a study, or cannot be
    written.
    """
    records = _records(folder)
    with _new(out) as fresh:
        for path in records:
            place = fresh / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row) + "\n" for row in read_rows(path)]
            place.write_text("".join(lines), encoding="utf-8", newline="\n")
    return len(records)


def _records(folder: Path) -> list[Path]:
    found = [path for one in record_folders(folder) for path in record_paths(one)]
    if not found:
        raise RunError(f"{folder} holds no records; give a folder of finished runs or a study")
    return found


@contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """A folder under another name, which gets this one when all in it is written."""
    study = study_of(folder)
    if folder.exists() or study is not None:
        there = "exists already" if folder.exists() else f"is in the packed study {study}"
        raise RunError(f"{folder} {there}; give a new folder")
    fresh = folder.with_name(f"{folder.name}.new")
    try:
        fresh.mkdir(parents=True)
        try:
            yield fresh
            os.replace(fresh, folder)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}") from error
