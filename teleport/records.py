"""Records of training runs: JSON lines on disk, and what can be read off them.

One file per run. The first line is the configuration (``"type": "config"``: arm, seed, versions,
hardware, data checksum, command), then one line per evaluation and per teleport, last a line that
says how the run ended. Lines are written whole and at once, so a record is complete up to the
moment a run stops, whatever stops it.
"""

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtr, stdtrit

from teleport.clock import clock_name
from teleport.errors import RunError
from teleport.report import growth
from teleport.schema import ROWS, check_row, made_by

FloatArray = npt.NDArray[np.float64]
Split = Literal["train", "test"]


class RecordWriter:
    """Appends rows to a record, each written whole.

    Args:
        path: of a new file, or of a record to go on with.
        keep: bytes of that record to keep, what follows them being dropped; None for a new file.
        also: told every row that was written, as its type and its values.

    Raises:
        RunError: if a new record's file exists already, or if it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        keep: int | None = None,
        also: Callable[[str, dict[str, Any]], None] = lambda kind, row: None,
    ) -> None:
        self.path, self._also = path, also
        self.length = keep or 0
        try:
            self._file = path.open("xb" if keep is None else "r+b", buffering=0)
            self._file.seek(self.length)
            self._file.truncate()
        except OSError as error:
            raise RunError(f"cannot write the record {path}: {error.strerror}") from error

    def write(self, kind: str, **row: Any) -> None:
        """Write one row; numbers that are not finite become null, as JSON has no name for them.

        Raises:
            RunError: if it cannot be written, a full disk for one; all rows before it are there.
        """
        line = json.dumps({"type": kind, **_finite(row)}, allow_nan=False) + "\n"
        rest = memoryview(line.encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self.length)
            raise RunError(
                f"cannot write the record {self.path}: {error.strerror}; what is before is "
                "complete. Make room, then run the same command again, `teleport run` with --resume"
            ) from error
        self.length += len(line.encode())
        self._also(kind, row)

    def sync(self) -> int:
        """Wait until all rows are on the disk; return their bytes.

        Raises:
            RunError: if they do not get there.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(f"cannot write the record {self.path}: {error.strerror}") from error
        return self.length

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


@dataclass(frozen=True)
class Run:
    """One run as read from its record.

    Attributes:
        path: the record.
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

    Raises:
        RunError: if the file cannot be read, or a line other than a torn last one is damaged or
            lacks what `teleport.schema` says it must have.
    """
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
    """The first row of one record, whatever the others are.

    Raises:
        RunError: if the file cannot be read, or the line is damaged.
    """
    try:
        with path.open("rb") as file:
            return _row(file.readline())
    except OSError as error:
        raise RunError(f"cannot read the record {path}: {error.strerror}") from error
    except ValueError as error:
        raise RunError(f"{path}, line 1: not a JSON record ({error})") from error


def has_begun(path: Path) -> bool:
    """Whether the first row of a record is whole: a kill or a full disk may come before.

    Raises:
        RunError: if the file cannot be read.
    """
    return b"\n" in _read(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read the record {path}: {error.strerror}") from error


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
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder; give one that `teleport run` has written")
    runs = [read_run(path) for path in sorted(folder.glob("*.jsonl")) if has_begun(path)]
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

    Raises:
        RunError: naming two records of one arm and seed, whatever their files are called.
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


@dataclass(frozen=True)
class Comparison:
    """One arm against a baseline with the same seeds.

    Attributes:
        steps: steps to the baseline's final loss over the baseline's own. The loss is that of the
            training split unless another was asked for. Median over seeds, where one that does not
            get there counts as the last; NaN if the median does not.
        seconds: the same with the time of teleporting, by `Run.work`: each run's time is counted in
            its own training steps, as timings are ratios within one process.
        log_loss: mean over evaluations of log(loss) minus the baseline's: -0.1 is 10 % lower.
            Mean over seeds. Infinite where one of the two has losses of exactly 0.
        log_loss_spread: standard deviation of that over seeds; NaN for one seed.
        seeds: how many both have.
        diverged: how many of the arm's did not finish because their loss was too large.
    """

    steps: float
    seconds: float
    log_loss: float
    log_loss_spread: float
    seeds: int
    diverged: int = 0

    @property
    def resolved(self) -> bool:
        """Whether the seeds tell ``log_loss`` from 0.

        That is, whether its 95 % interval, by Student's t, leaves 0 out. One seed resolves nothing,
        and of many comparisons without a difference one in twenty is resolved by chance.
        """
        return abs(self.log_loss) > self.half_width

    @property
    def half_width(self) -> float:
        """Half the 95 % interval of ``log_loss`` by Student's t; NaN for fewer than two seeds."""
        times = stdtrit(self.seeds - 1, 0.975)  # NaN for no seeds
        return float(times * self.log_loss_spread / math.sqrt(max(self.seeds, 1)))

    @property
    def p_value(self) -> float:
        """Of Student's t test that ``log_loss`` is 0; NaN for fewer than two seeds."""
        if self.seeds < 2 or math.isnan(self.log_loss):
            return math.nan
        if self.log_loss_spread == 0.0:
            return 1.0 if self.log_loss == 0.0 else 0.0
        t = abs(self.log_loss) / self.log_loss_spread * math.sqrt(self.seeds)
        return float(2.0 * stdtr(self.seeds - 1, -t))


def compare(arm: list[Run], baseline: list[Run], split: Split = "train") -> Comparison:
    """Pair the runs by seed and compare their losses on one split of the data.

    Runs without an evaluation, killed or diverged before, are left out.

    Raises:
        RunError: if one of the two has a seed twice.
    """
    check_once(arm)
    check_once(baseline)
    partner = {run.seed: run for run in baseline if run.evaluations}
    pairs = [(run, partner[run.seed]) for run in arm if run.evaluations and run.seed in partner]
    steps = [_ratio(a, b, a.column("step"), b.column("step"), split) for a, b in pairs]
    seconds = [_ratio(a, b, a.work, b.work, split) for a, b in pairs]
    gaps = [_log_gap(a, b, split) for a, b in pairs]
    with np.errstate(invalid="ignore"):  # infinite gaps have no spread, and may have no mean
        log_loss = _mean(gaps)
        spread = float(np.std(gaps, ddof=1)) if len(gaps) > 1 else math.nan
    return Comparison(
        steps=_median(steps),
        seconds=_median(seconds),
        log_loss=log_loss,
        log_loss_spread=spread,
        seeds=len(pairs),
        diverged=sum(run.status == "diverged" for run in arm),
    )


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds; each number is a mean, NaN where there is nothing to average.

    Attributes:
        arm: its name, and ``baseline`` that of the same arm without teleportation.
        runs: number of runs, and ``status`` what they ended as.
        train_loss, test_loss, test_accuracy: at the last evaluation.
        train_seconds, teleport_seconds: spent in all.
        growth: factor by which one teleport enlarged the gradient norm.
        drift: change of the loss on the teleport batch, in absolute value.
        held_out_drift: change of the loss on held-out data, with its sign.
        to_own: against the same arm without teleportation; None for a baseline.
        to_best: against the best baseline; None for that baseline itself.
    """

    arm: str
    baseline: str
    runs: int
    status: str
    train_loss: float
    test_loss: float
    test_accuracy: float
    train_seconds: float
    teleport_seconds: float
    growth: float
    drift: float
    held_out_drift: float
    to_own: Comparison | None
    to_best: Comparison | None


def summarise(runs: Sequence[Run]) -> list[ArmSummary]:
    """One line per arm, in the order they were run."""
    groups = by_arm(runs)
    best = best_baseline(groups)
    return [_summary(arm, group, groups, best) for arm, group in groups.items()]


def best_baseline(groups: dict[str, list[Run]]) -> str | None:
    """The arm without teleport whose runs all finished with the lowest mean log train loss."""
    scores = {
        arm: float(np.mean([log(run.column("train_loss")[-1:]) for run in runs]))
        for arm, runs in groups.items()
        if not runs[0].config["training"]["teleport"]
        and all(run.status == "finished" and run.evaluations for run in runs)
    }
    known = {arm: score for arm, score in scores.items() if not math.isnan(score)}
    return min(known, key=lambda arm: known[arm]) if known else None


def _summary(
    arm: str, runs: list[Run], groups: dict[str, list[Run]], best: str | None
) -> ArmSummary:
    def last(column: str) -> float:
        return _mean([run.column(column)[-1] for run in runs if run.evaluations])

    def teleports(value: Callable[[dict[str, Any]], float]) -> float:
        rows = [row for run in runs for row in run.teleports]
        values = [value({k: math.nan if v is None else v for k, v in row.items()}) for row in rows]
        return _mean(values)

    own = runs[0].config["baseline"]
    return ArmSummary(
        arm=arm,
        baseline=own,
        runs=len(runs),
        status=", ".join(sorted({run.status for run in runs})),
        train_loss=last("train_loss"),
        test_loss=last("test_loss"),
        test_accuracy=last("test_accuracy"),
        train_seconds=last("train_seconds"),
        teleport_seconds=last("teleport_seconds"),
        growth=teleports(lambda row: growth(row["grad_norm_before"], row["grad_norm_after"])),
        drift=teleports(lambda row: abs(row["loss_after"] - row["loss_before"])),
        held_out_drift=teleports(lambda row: row["held_out_after"] - row["held_out_before"]),
        to_own=compare(runs, groups[own]) if own != arm and own in groups else None,
        to_best=compare(runs, groups[best]) if best not in (arm, None) else None,
    )


def environment() -> dict[str, Any]:
    """Versions and hardware, for the configuration line."""
    return {
        "versions": {
            "teleport": version("nullspace-teleport"),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
            "clock": clock_name(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _mean(values: Sequence[float]) -> float:
    """NaN if there are none."""
    return float(np.mean(values)) if values else math.nan


def _median(ratios: Sequence[float]) -> float:
    """Of ratios of which some are NaN, for never; NaN if that is the median, or there are none."""
    if not ratios:
        return math.nan
    middle = float(np.median([math.inf if math.isnan(ratio) else ratio for ratio in ratios]))
    return middle if math.isfinite(middle) else math.nan


def _ratio(run: Run, base: Run, axis: FloatArray, base_axis: FloatArray, split: Split) -> float:
    """Way to the baseline's final loss over the baseline's own; NaN if that never improved."""
    goal = base.column(f"{split}_loss")[-1]
    way = base.first_below(goal, base_axis, split)
    return run.first_below(goal, axis, split) / way if way > 0 else math.nan


def _log_gap(run: Run, base: Run, split: Split) -> float:
    """Mean log-loss difference over the evaluations both have, the common start left out.

    NaN if there are none, because one of them diverged before. Two losses of exactly 0 are equal.
    """
    count = min(len(run.evaluations), len(base.evaluations))
    if count < 2:
        return math.nan
    losses, base_losses = (r.column(f"{split}_loss") for r in (run, base))
    losses, base_losses = losses[1:count], base_losses[1:count]
    with np.errstate(invalid="ignore"):
        gaps = np.where(losses == base_losses, 0.0, log(losses) - log(base_losses))
        return float(np.mean(gaps))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
