"""Records of training runs: JSON lines on disk or packed, and what can be read off them.

One file per run. The first line is the configuration (``"type": "config"``: arm, seed, versions,
hardware, data checksum, command), then one line per evaluation and per teleport, last a line that
says how the run ended. Lines are written whole and at once, so a record is complete up to the
moment a run stops, whatever stops it. A record in a packed study (`teleport.lab.records.study`) is
read by the path it would have as a file.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from teleport.errors import RunError, os_errors_as
from teleport.lab.records.schema import ROWS, check_row, made_by
from teleport.lab.records.study import is_packed, packed_config, packed_rows, record_paths

FloatArray = npt.NDArray[np.float64]

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class Run:
    """One run as read from its record.

    Attributes:
        config: its first line.
        evaluations: rows with ``step``, ``epoch``, ``train_seconds``, ``teleport_seconds``,
            ``train_loss``, ``test_loss``, ``test_accuracy``, ``grad_norm``.
        teleports: rows with ``step`` and the fields of `teleport.TeleportReport`.
        status: ``finished``, ``diverged``, ``interrupted``, or ``unfinished`` without an end line.
        reason: why it diverged; else empty.
        steps: training steps at the end line; None without one.
    """

    path: Path
    config: dict[str, Any]
    evaluations: list[dict[str, Any]]
    teleports: list[dict[str, Any]]
    status: str
    reason: str = ""
    steps: int | None = None

    @property
    def arm(self) -> str:
        """Name of the way it was trained."""
        return str(self.config["arm"])

    @property
    def seed(self) -> int:
        """Seed of the initialisation and the order of the data."""
        return int(self.config["seed"])

    def column(self, name: str) -> FloatArray:
        """One column of the evaluations, float64 ``[evaluations]``; missing values are NaN."""
        values = [row.get(name) for row in self.evaluations]
        return np.array([math.nan if v is None else v for v in values], dtype=float)

    @property
    def seconds(self) -> FloatArray:
        """Seconds spent training and teleporting, evaluation excluded, ``[evaluations]``."""
        return self.column("train_seconds") + self.column("teleport_seconds")

    @property
    def work(self) -> FloatArray:
        """Training steps, teleporting included as the steps that its time was worth in this run.

        A training step is the same work with and without teleports; its seconds are not, where the
        runs are recorded one after the other on a machine that does other work as well.
        ``[evaluations]``.
        """
        steps, training = self.column("step"), self.column("train_seconds")
        pace = steps[-1] / training[-1] if training[-1] > 0 else 0.0
        return steps + pace * self.column("teleport_seconds")

    def first_below(self, loss: float, axis: FloatArray, split: Split = "train") -> float:
        """Where on ``axis`` the loss of a split first reaches ``loss``; NaN if it never does."""
        return first_below(self.column(f"{split}_loss"), loss, axis)


def first_below(losses: FloatArray, loss: float, axis: FloatArray) -> float:
    """Where on ``axis`` the losses first reach ``loss``; NaN if they never do.

    Between two evaluations log loss is interpolated linearly, where it falls by a finite number: a
    loss that fell to exactly 0 is reached when it is seen.
    """
    reached = np.flatnonzero(losses <= loss)
    if len(reached) == 0:
        return math.nan
    i = reached[0]
    if i == 0:
        return float(axis[0])
    above, below = log(losses[i - 1 : i + 1])
    if not 0.0 < above - below < math.inf:
        return float(axis[i])
    share = (above - np.log(loss)) / (above - below)
    return float(axis[i - 1] + share * (axis[i] - axis[i - 1]))


def log(losses: FloatArray) -> FloatArray:
    """Natural logarithms of losses; that of a loss of exactly 0 is minus infinity."""
    with np.errstate(divide="ignore"):
        return np.log(losses)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one record, its configuration first.

    RunError if the file cannot be read, or a line other than a torn last one is damaged or lacks
    what `teleport.lab.records.schema` says it must have.
    """
    if is_packed(path):
        packed = packed_rows(path)
        for number, row in enumerate(packed, start=1):
            check_row(path, number, row, packed[0])
        return packed
    lines = _read(path).splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = _row(line)
        except ValueError as error:
            torn = isinstance(error.__cause__ or error, (json.JSONDecodeError, UnicodeDecodeError))
            if torn and number == len(lines) > 1:
                break  # a killed run may leave half a line; what is before it counts
            raise RunError(f"{path}, line {number}: not a JSON record ({error})") from error
        rows.append(row)
        check_row(path, number, row, rows[0])
    if not rows or rows[0]["type"] != "config":
        raise RunError(f"{path}, line 1: not the configuration that a record begins with")
    return rows


def first_row(path: Path) -> dict[str, Any]:
    """The first row of one record, whatever the others are; RunError if it cannot be read."""
    if is_packed(path):
        return packed_config(path)
    try:
        with path.open("rb") as file:
            return _row(file.readline())
    except OSError as error:
        raise RunError(f"cannot read the record {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path}, line 1: not a JSON record ({error})") from error


def has_begun(path: Path) -> bool:
    """Whether the first row of a record is whole: a kill or a full disk may come before.

    RunError if the file cannot be read.
    """
    return is_packed(path) or b"\n" in _read(path)


def _read(path: Path) -> bytes:
    with os_errors_as(RunError, f"cannot read the record {path}"):
        return path.read_bytes()


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from error  # without the place in the line
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(row, dict) or not isinstance(row.get("type"), str):
        raise ValueError("expected an object with a type")
    return row


def read_run(path: Path) -> Run:
    """Read the record of one run; see `read_rows` for what can go wrong."""
    rows = read_rows(path)
    ends = [row for row in rows if row["type"] == "end"]
    return Run(
        path=path,
        config=rows[0],
        evaluations=[row for row in rows if row["type"] == "evaluation"],
        teleports=[row for row in rows if row["type"] == "teleport"],
        status=ends[-1]["status"] if ends else "unfinished",
        reason=ends[-1].get("reason", "") if ends else "",
        steps=ends[-1].get("step") if ends else None,
    )


def read_runs(folder: Path) -> list[Run]:
    """All records of a folder, in the order they were run; those that have not begun are left out.

    Raises:
        RunError: if the folder does not exist or holds no record, or one is damaged, or two are of
            one run.
    """
    paths = record_paths(folder)
    if not paths and not folder.is_dir():
        raise RunError(f"{folder} is not a folder; give one that `teleport run` has written")
    runs = [read_run(path) for path in paths if has_begun(path)]
    if not runs:
        raise RunError(f"{folder} holds no records (*.jsonl); give one `teleport run` has written")
    makers = {made_by(run.config): run.path for run in runs}
    for maker, path in makers.items():
        if maker not in ROWS:
            raise RunError(f"{path} is not the record of a run: its first line names no training")
    if len(makers) > 1:
        one, other, *_ = makers.values()
        raise RunError(f"{one} and {other} are records of two commands; move one to another folder")
    if "arm" in runs[0].config:
        check_once(runs)
        check_no_copies(runs)
    return sorted(runs, key=lambda run: (run.config["order"], run.seed))


def check_once(runs: Iterable[Run]) -> None:
    """Refuse runs of one arm with the same seed: a seed that counts twice makes chance a finding.

    RunError names two records of one arm and seed, whatever their files are called.
    """
    first: dict[tuple[str, int], Run] = {}
    for run in runs:
        key = run.arm, run.seed
        if key in first:
            raise RunError(twice(first[key].path, run.path, f"{run.arm} (seed {run.seed})"))
        first[key] = run


def twice(one: Path, other: Path, what: str) -> str:
    """The message about two records of which one may count."""
    return (
        f"{one} and {other} are both records of {what}, which counts once; keep one of them and "
        "move the other away"
    )


def check_no_copies(runs: Iterable[Run]) -> None:
    """Refuse records of one arm that hold the same measurements, seconds included.

    A run that is recorded again has the losses of the first, but never its seconds. A record
    without an evaluation after the start says too little to be told from another.

    Raises:
        RunError: naming the two records.
    """
    first: dict[str, Run] = {}
    for run in runs:
        if not any(row["train_seconds"] > 0 for row in run.evaluations):
            continue
        key = json.dumps([run.arm, run.evaluations, run.teleports])
        if key in first:
            what = f"one run of {run.arm}, with the same losses after the same seconds"
            raise RunError(twice(first[key].path, run.path, what))
        first[key] = run


def by_arm(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs grouped by arm, arms in the order they were run.

    Raises:
        RunError: if an arm has a seed twice.
    """
    groups: dict[str, list[Run]] = {}
    runs = list(runs)
    check_once(runs)
    for run in runs:
        groups.setdefault(run.arm, []).append(run)
    return groups
