"""Table and figure of the records of a sequence of tasks."""

from collections.abc import Callable, Sequence
from math import isnan

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from teleport.errors import RunError
from teleport.lab.analysis.curves import draw_accuracy_matrix, draw_band, draw_trade_off
from teleport.lab.keeping.comparison import table_of, unfinished
from teleport.lab.keeping.measures import accuracy_matrix, course, summarise_forgetting
from teleport.lab.keeping.tasks import SEQUENCES, TaskSequence
from teleport.lab.records.runs import FloatArray, Run, by_arm

GPM_PUBLISHED = (
    "Published for Gradient Projection Memory (Saha et al. 2021; as reprinted in table 1 of Lin et "
    "al. 2022, arXiv 2211.00789): ACC 93.91 ± 0.16 %, BWT -3 ± 0 %, 5 runs. Its budget is larger: "
    "ten tasks instead of five, and five passes over 54,000 images for each instead of "
    "one over 20,000; tau .95 for the first layer and .99 for the others, and no biases."
)

Measures = dict[str, tuple[float, float]]


def _pair(name: str, form: str) -> Callable[[Measures], str]:
    """A cell with mean and spread of a measure, or "-"."""

    def cell(measures: Measures) -> str:
        mean, spread = measures[name]
        if isnan(mean):
            return "-"
        return form.format(mean) + ("" if isnan(spread) else " ± " + form.format(spread))

    return cell


def columns(sequence: TaskSequence) -> dict[str, Callable[[Measures], str]]:
    """The table's columns after the first: title, and what makes a cell of one arm's measures."""
    return {
        f"steps to new loss {sequence.reach:g}": _pair("steps", "{:.0f}"),
        "seconds to it / plain": _pair("seconds_ratio", "{:.2f}"),
        "seconds per step / plain": _pair("step_ratio", "{:.2f}"),
        f"old loss at new loss {sequence.compare:g}": _pair("old_loss", "{:.3f}"),
        "final new loss": _pair("new_loss", "{:.3f}"),
        "old accuracy": _pair("old_accuracy", "{:.3f}"),
        "new accuracy": _pair("new_accuracy", "{:.3f}"),
        "ACC": _pair("acc", "{:.3f}"),
        "BWT": _pair("bwt", "{:.3f}"),
    }


def forgetting_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The table as text, its head first."""
    sequence = _sequence(runs)
    cells = columns(sequence)
    summary = summarise_forgetting(runs, sequence.reach, sequence.compare)
    rows = [[arm, *(cell(m) for cell in cells.values())] for arm, m in summary.items()]
    return [["method", *cells], *rows]


def _sequence(runs: Sequence[Run]) -> TaskSequence:
    name = runs[0].config["sequence"]
    if name not in SEQUENCES:
        raise RunError(f"{runs[0].path}: unknown sequence {name!r}; known: {', '.join(SEQUENCES)}")
    return SEQUENCES[name]


def forgetting_tables(runs: Sequence[Run]) -> list[Table]:
    """One table, a line for every arm."""
    sequence = _sequence(runs)
    seeds = len({run.seed for run in runs})
    title = f"{sequence.title}: {seeds} seeds, {runs[0].config['split']} images"
    return [table_of(forgetting_rows(runs), title, _caption(sequence, runs))]


def _caption(sequence: TaskSequence, runs: Sequence[Run]) -> str:
    text = (
        "Mean ± standard deviation over seeds, over the tasks after the first. Seconds count bases "
        "and projections; they are ratios to plain's of the same seed, run in the same process. "
        "Old: mean over all earlier tasks. ACC: mean accuracy at the end. BWT: mean change of the "
        "earlier tasks' accuracy since each was learned. '-': one of the seeds did not get there."
    )
    published = [GPM_PUBLISHED] if sequence.name == "permuted-mnist" else []
    return "\n".join([text, *unfinished(runs), *published])


def forgetting_figure(runs: Sequence[Run]) -> Figure:
    """Curves and a trade-off for two tasks, matrices of accuracy for more."""
    draw = _two_tasks if runs[0].config["tasks"] == 2 else _matrices
    figure = draw(by_arm(run for run in runs if run.status == "finished"))
    figure.suptitle(_sequence(runs).title)
    return figure


def _two_tasks(groups: dict[str, list[Run]]) -> Figure:
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    old, new, trade = figure.subplots(1, 3)
    # Of several taus of a method, only the last.
    last = {group[0].config["strategy"]["method"]: arm for arm, group in groups.items()}
    shown = {arm: group for arm, group in groups.items() if arm in last.values()}
    for number, (arm, group) in enumerate(shown.items()):
        steps = course(group[0], 1)["step"]
        for axes, column in ((old, "old_accuracy"), (new, "new_accuracy")):
            draw_band(axes, steps, _stacked(group, column), arm, number)
            axes.set_xlabel("training step on the new task")
            axes.set_ylabel(f"accuracy on the {column[:3]} task")
            axes.grid(alpha=0.25)
    new.legend(fontsize=8)
    draw_trade_off(trade, _by_method(groups))
    return figure


def _by_method(groups: dict[str, list[Run]]) -> dict[str, list[tuple[str, FloatArray, FloatArray]]]:
    """Final new and old accuracy of every arm, noted with its tau."""
    series: dict[str, list[tuple[str, FloatArray, FloatArray]]] = {}
    for group in groups.values():
        strategy = group[0].config["strategy"]
        note = "" if strategy["tau"] is None else f"{strategy['tau']:g}"
        new, old = (_stacked(group, name)[:, -1] for name in ("new_accuracy", "old_accuracy"))
        series.setdefault(strategy["method"], []).append((note, new, old))
    return series


def _matrices(groups: dict[str, list[Run]]) -> Figure:
    matrices = {arm: np.mean([accuracy_matrix(r) for r in g], axis=0) for arm, g in groups.items()}
    lowest = min((float(np.nanmin(matrix)) for matrix in matrices.values()), default=0.0)
    rows = -(-len(groups) // 4) or 1  # an empty figure where no run has finished
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    for number, (arm, matrix) in enumerate(matrices.items(), start=1):
        draw_accuracy_matrix(figure.add_subplot(rows, 4, number), matrix, arm, lowest)
    return figure


def _stacked(group: Sequence[Run], column: str) -> FloatArray:
    """One column of the second task, ``[seeds, evaluations]``."""
    return np.array([course(run, 1)[column] for run in group])
