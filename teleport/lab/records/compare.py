"""Runs side by side: an arm against its baselines, seed by seed, and one line for each arm."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from teleport.lab.records.runs import FloatArray, Run, Split, by_arm, check_once, log
from teleport.report import growth


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
        **{name: last(name) for name in ("train_loss", "test_loss", "test_accuracy")},
        **{name: last(name) for name in ("train_seconds", "teleport_seconds")},
        growth=teleports(lambda row: growth(row["grad_norm_before"], row["grad_norm_after"])),
        drift=teleports(lambda row: abs(row["loss_after"] - row["loss_before"])),
        held_out_drift=teleports(lambda row: row["held_out_after"] - row["held_out_before"]),
        to_own=compare(runs, groups[own]) if own != arm and own in groups else None,
        to_best=compare(runs, groups[best]) if best not in (arm, None) else None,
    )


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
