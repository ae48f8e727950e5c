"""What a record is of, and what may lie beside it.

The records of one folder are made by one command, and but for what that command compares - the arms
and seeds of `teleport run`, say - with the same settings: else tables and figures would mix them.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from teleport.errors import RunError
from teleport.lab.records.runs import Run, first_row, has_begun, read_rows, twice
from teleport.lab.records.schema import check_row, made_by
from teleport.lab.records.study import refuse_packed

SHARED = ("experiment", "preset", "settings", "size", "network", "batch_size", "data")
"""Keys of a training run's first row that are the same for all runs of a folder."""

ADDED = ("batch_size",)
"""Keys that older records of training runs do not have."""

ELSEWHERE = "resume with the command that made it, or give another --out"


def differences(
    config: dict[str, Any], wanted: dict[str, Any], added: Collection[str] = ()
) -> list[str]:
    """What a first row says otherwise than is wanted, key by key with both values.

    Other keys of it do not matter; the ``added`` ones an older record need not have.
    """
    keys = [key for key in wanted if key in config or key not in added]
    return [what for key in keys for what in _differences(key, config.get(key), wanted[key])]


def _differences(where: str, found: Any, wanted: Any) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*wanted, *found]):
            yield from _differences(f"{where}.{key}", found.get(key), wanted.get(key))
    elif found != as_read(wanted):
        yield f"{where} ({found!r}, not {as_read(wanted)!r})"


def as_read(value: Any) -> Any:
    """A value as it comes back from JSON: tuples are lists there."""
    return json.loads(json.dumps(value))


def check_same(
    path: Path, config: dict[str, Any], wanted: dict[str, Any], added: Collection[str] = ()
) -> None:
    """Raise RunError for a record of something else, with the `differences` and what to do."""
    differing = differences(config, wanted, added)
    if differing:
        raise RunError(f"{path} is a record with another {', '.join(differing)}; {ELSEWHERE}")


def check_folder(
    folder: Path,
    command: str,
    shared: dict[str, Any],
    added: Collection[str] = (),
    names: Mapping[tuple[str, int], str] | None = None,
) -> None:
    """Refuse a folder whose records do not belong beside those that are to be written.

    It exists, and the ``command``, as `made_by` names it, writes there. The first row of all its
    records must say what is ``shared``; the ``added`` keys older ones do not have. The ``names``
    are of the records to be written, by arm and seed. RunError names the first record that does not
    belong, or is one to be written under another name, or two of one arm and seed, or the study.
    """
    refuse_packed(folder)
    kept: dict[tuple[str, int], Path] = {}
    for path in sorted(folder.glob("*.jsonl")):
        if not has_begun(path):
            continue
        config = first_row(path)
        maker = made_by(config)
        if maker != command:
            of = f"of `teleport {maker}`" if maker else "of another program"
            raise RunError(
                f"{path} is a record {of}, and `teleport {command}` keeps its own apart; "
                "give another --out"
            )
        check_row(path, 1, config, config)
        check_same(path, config, shared, added)
        arm, seed = str(config.get("arm")), config.get("seed")
        if (names or {}).get((arm, seed or 0), path.name) != path.name:
            raise RunError(
                f"{path} holds {arm} (seed {seed}) already; leave that out, or {ELSEWHERE}"
            )
        if "arm" in config and kept.setdefault((arm, seed or 0), path) != path:
            raise RunError(twice(kept[arm, seed or 0], path, f"{arm} (seed {seed})"))


def check_alike(runs: Sequence[Run]) -> None:
    """Raise RunError for training runs that differ in more than arm and seed, naming two."""
    first = runs[0]
    keys = [key for key in SHARED if key in first.config or key not in ADDED]
    wanted = {key: first.config.get(key) for key in keys}
    for run in runs[1:]:
        differing = differences(run.config, wanted, ADDED)
        if differing:
            raise RunError(
                f"{run.path} cannot be compared with {first.path}: it has another "
                f"{', '.join(differing)}; move one of them to another folder"
            )


def is_complete(path: Path, wanted: dict[str, Any], added: Collection[str] = ()) -> bool:
    """Whether this very record is there, by its first row, and ended by itself.

    RunError if it says something else, or is damaged; it stays as it is.
    """
    if not path.exists() or not has_begun(path):
        return False
    config, *rows = read_rows(path)
    check_same(path, config, wanted, added)
    if not rows or rows[-1]["type"] != "end":  # other rows may have a status, too
        return False
    return rows[-1]["status"] in ("finished", "diverged")
