"""Table and figure of ways to change a model: what is learned against what is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from teleport.lab.keeping.comparison import USES_SPACE, table_of, unfinished
from teleport.lab.records.runs import FloatArray, Run, by_arm


@dataclass(frozen=True)
class _Sheet:
    """What is shown of one kind of records.

    Attributes:
        columns: title and form of the measures in the table.
        kept, learned: measure and label of the figure's axes.
        goal: the corner that is to be reached, kept and learned, if there is one.
    """

    columns: Mapping[str, tuple[str, str]]
    kept: tuple[str, str]
    learned: tuple[str, str]
    goal: tuple[float, float] | None
    caption: str


_TIMES = "Seconds of training; of the null space, once for all ways of a seed."
_SHEETS = {
    "words": _Sheet(
        {
            "learned": ("learned", ".2f"),
            "recall": ("recall@10", ".3f"),
            "cosine": ("mean cosine", ".3f"),
            "least_cosine": ("least", ".3f"),
        },
        ("recall", "recall@10 of old queries in the old index"),
        ("learned", "share of new words learned"),
        (0.95, 0.95),
        "Means over seeds. Learned: held-out sentences with new words that find their own thing. "
        "Recall@10, cosine: of unseen old queries in the old index, to what they were. Back to "
        f"a: the old weights and a times the change. {_TIMES}",
    ),
    "edit": _Sheet(
        {
            "efficacy": ("said", ".2f"),
            "paraphrases": ("in other words", ".2f"),
            "neighbours": ("neighbours same", ".2f"),
            "loss": ("loss elsewhere", "+.3f"),
        },
        ("neighbours", "sentences of real subjects with the next word that they had"),
        ("paraphrases", "share of new facts said in other words"),
        None,
        "Means over seeds. Said: facts whose answer is the most likely next word, in their own "
        "sentence and in two others. Neighbours: the same sentences of real subjects, with the "
        f"next word that they had. Loss of other text: its growth. {_TIMES}",
    ),
}


def frontier_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The table as text, its head first: every way at every look after the start."""
    columns = _sheet(runs).columns
    rows = [["way", "step", *(title for title, _ in columns.values()), "seconds", "space s"]]
    for arm, group in by_arm(runs).items():
        for look in range(1, min(len(run.evaluations) for run in group)):
            found = [run.evaluations[look] for run in group]
            mean = {
                name: float(np.mean([row[name] for row in found]))
                for name in (*columns, "step", "train_seconds", "space_seconds")
            }
            numbers = [f"{mean[name]:{form}}" for name, (_, form) in columns.items()]
            times = [f"{mean[name]:.0f}" for name in ("train_seconds", "space_seconds")]
            back = f", back to {found[0]['alpha']:g}" if "alpha" in found[0] else ""
            rows.append([arm, f"{mean['step']:.0f}{back}", *numbers, *times])
    return rows


def _sheet(runs: Sequence[Run]) -> _Sheet:
    return _SHEETS[runs[0].config["figure"]]


def frontier_table(runs: Sequence[Run]) -> Table:
    """The same for the terminal."""
    title = f"{runs[0].config['title']}, {len({run.seed for run in runs})} seeds"
    caption = "\n".join([_sheet(runs).caption, *unfinished(runs)])
    return table_of(frontier_rows(runs), title, caption)


def _points(
    looks: Sequence[dict[str, Any]], names: tuple[str, str]
) -> tuple[FloatArray, FloatArray]:
    """From the old weights to those at the end, and the earlier looks; both ``[looks, 2]``."""
    last = looks[-1]["step"]
    ends = [row for row in looks if row["step"] in (0, last)]
    ends.sort(key=lambda row: row.get("alpha", float(row["step"] > 0)))
    early = [row for row in looks if row not in ends]
    path, before = ([[row[name] for name in names] for row in rows] for rows in (ends, early))
    return np.array(path), np.array(before).reshape(-1, 2)


def frontier_figure(runs: Sequence[Run]) -> Figure:
    """What is learned against what is kept, a line for each way, from the old weights to the end.

    Earlier looks are hollow.
    """
    sheet = _sheet(runs)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(run.config["way"]["method"] for run in runs))
    marks = "osD^vP*Xh<>p"
    for arm, group in by_arm([run for run in runs if run.status == "finished"]).items():
        method = group[0].config["way"]["method"]
        number = methods.index(method)
        names, ours = (sheet.kept[0], sheet.learned[0]), method in USES_SPACE
        common = min(len(run.evaluations) for run in group)
        found = (_points(run.evaluations[:common], names) for run in group)
        path, early = (np.mean(one, 0) for one in zip(*found, strict=True))
        mark, color, size = marks[number], f"C{number}", 6 if ours else 4
        axes.plot(
            *path.T, f"{mark}-" if ours else f"{mark}--", color=color, label=arm,
            lw=1.8 if ours else 1.0, ms=size,
        )  # fmt: skip
        axes.plot(*early.T, mark, color=color, ms=size, mfc="none")
    if sheet.goal is not None:
        kept, learned = sheet.goal
        axes.axhspan(learned, 1.02, kept / 1.02, 1.0, alpha=0.12, color="k")
    axes.set(xlim=(0.0, 1.02), ylim=(-0.02, 1.02), xlabel=sheet.kept[1], ylabel=sheet.learned[1])
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="lower left")
    return figure
