"""What records of a sequence of tasks say: what was learned, what was forgotten, at what price."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from teleport.lab.records.runs import FloatArray, Run, by_arm, first_below


def accuracy_matrix(run: Run) -> FloatArray:
    """Accuracy on task j (column) after learning task i (row), ``[tasks, tasks]``.

    Above the diagonal it is NaN, as are the rows of tasks that a run did not get to.
    """
    last = {int(row["task"]): row["accuracies"] for row in run.evaluations}
    matrix = np.full((int(run.config["tasks"]),) * 2, np.nan)
    for task, accuracies in last.items():
        matrix[task, : task + 1] = accuracies
    return matrix


def average_accuracy(matrix: FloatArray) -> float:
    """ACC: mean accuracy over all tasks after the last one."""
    return float(matrix[-1].mean())


def backward_transfer(matrix: FloatArray) -> float:
    """BWT: mean change of the old tasks' accuracy since each was learned; negative: forgotten."""
    return float((matrix[-1] - matrix.diagonal())[:-1].mean())


def course(run: Run, task: int) -> dict[str, FloatArray]:
    """The evaluations while one task was learned, as columns ``[evaluations]``.

    ``step`` and ``seconds`` count from the moment the task before was learned, so that the first
    row's seconds are those of the method's bases. ``space_seconds`` are the part of them that went
    into bases and projections. ``new_loss`` and ``new_accuracy`` are of this task; ``old_loss``
    and ``old_accuracy`` are means over the tasks before, NaN for the first.
    """
    rows = [row for row in run.evaluations if row["task"] == task]
    before = [row for row in run.evaluations if row["task"] == task - 1]
    spent = _seconds(before[-1]) if before else np.zeros(2)
    seconds = np.array([_seconds(row) - spent for row in rows]).reshape(-1, 2)
    losses, accuracies = (
        np.array([row[name] for row in rows], dtype=float) for name in ("losses", "accuracies")
    )
    columns = {
        "step": np.array([row["task_step"] for row in rows], dtype=float),
        "seconds": seconds.sum(1),
        "space_seconds": seconds[:, 1],
        "new_loss": losses[:, -1],
        "new_accuracy": accuracies[:, -1],
    }
    nothing = np.full(len(rows), np.nan)
    columns["old_loss"] = losses[:, :-1].mean(1) if task else nothing
    columns["old_accuracy"] = accuracies[:, :-1].mean(1) if task else nothing
    return columns


def measures(run: Run, plain: Run | None, reach: float, compare: float) -> dict[str, float]:
    """The numbers of one run; what a run did not get to is NaN.

    That of the same seed with the method ``plain`` is for the ratio of seconds. Steps and seconds
    are counted to the loss ``reach`` of the new task; at its loss ``compare`` the old loss is read.

    Returns:
        Means over the tasks after the first: ``steps`` and ``seconds`` to ``reach``,
        ``step_seconds`` of one step, ``basis_seconds`` before the first, ``old_loss`` at
        ``compare``, ``new_loss`` when the task is learned. ``seconds_ratio`` and ``step_ratio`` to
        plain's. At the end of all: ``old_accuracy``, ``new_accuracy`` of the last task, ``acc`` and
        ``bwt``.
    """
    means = _over_tasks(run, reach, compare)
    base = None if plain is None else _over_tasks(plain, reach, compare)
    matrix = accuracy_matrix(run)
    return {
        **means,
        "seconds_ratio": np.nan if base is None else means["seconds"] / base["seconds"],
        "step_ratio": np.nan if base is None else means["step_seconds"] / base["step_seconds"],
        "old_accuracy": float(matrix[-1, :-1].mean()),
        "new_accuracy": float(matrix[-1, -1]),
        "acc": average_accuracy(matrix),
        "bwt": backward_transfer(matrix),
    }


def summarise_forgetting(
    runs: Sequence[Run], reach: float, compare: float
) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard deviation over seeds of every measure, by arm.

    A measure that one seed did not get to is NaN.
    """
    plain = {run.seed: run for run in reversed(runs) if run.config["strategy"]["method"] == "plain"}
    summary = {}
    for arm, group in by_arm(runs).items():
        found = [measures(run, plain.get(run.seed), reach, compare) for run in group]
        summary[arm] = {name: _mean_and_spread([one[name] for one in found]) for name in found[0]}
    return summary


def _over_tasks(run: Run, reach: float, compare: float) -> dict[str, float]:
    """Means over the tasks after the first."""
    later = range(1, int(run.config["tasks"]))
    parts = [_of_task(course(run, task), reach, compare) for task in later]
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def _of_task(columns: Mapping[str, FloatArray], reach: float, compare: float) -> dict[str, float]:
    new = columns["new_loss"]
    if len(new) < 2:  # never reached, or diverged before the first look
        names = ("steps", "seconds", "old_loss", "new_loss", "step_seconds", "basis_seconds")
        return dict.fromkeys(names, np.nan)
    seconds = columns["seconds"]
    return {
        "steps": first_below(new, reach, columns["step"]),
        "seconds": first_below(new, reach, seconds),
        "old_loss": first_below(new, compare, columns["old_loss"]),
        "new_loss": float(new[-1]),
        "step_seconds": float((seconds[-1] - seconds[0]) / columns["step"][-1]),
        "basis_seconds": float(seconds[0]),
    }


def _seconds(row: dict[str, Any]) -> FloatArray:
    return np.array([row["train_seconds"], row["space_seconds"]], dtype=float)


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return float(np.mean(values)), spread
