"""Table and figure of ways to change a model: what is learned against what is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from teleport.lab.keeping.comparison import USES_SPACE
from teleport.lab.records.runs import Run, by_arm


@dataclass(frozen=True)
class _Sheet:
    """What is shown of one kind of records.

    Attributes:
        columns: title and form of the measures in the table.
        kept, learned: measure and label of the figure's axes.
        goal: the corner that is to be reached, kept and learned, if there is one.
        caption: of the table.
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
        f"Recall@10, cosine: of unseen old queries in the old index, to what they were. {_TIMES}",
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
            rows.append([arm, f"{mean['step']:.0f}", *numbers, *times])
    return rows


def _sheet(runs: Sequence[Run]) -> _Sheet:
    return _SHEETS[runs[0].config["figure"]]


def frontier_table(runs: Sequence[Run]) -> Table:
    """The same for the terminal."""
    head, *rows = frontier_rows(runs)
    seeds = len({run.seed for run in runs})
    broken = [
        f"{run.arm} (seed {run.seed}): {run.status}" for run in runs if run.status != "finished"
    ]
    table = Table(
        *head,
        title=f"{runs[0].config['title']}, {seeds} seeds",
        caption="\n".join([_sheet(runs).caption, *broken]),
    )
    for row in rows:
        table.add_row(*row)
    return table


def frontier_figure(runs: Sequence[Run]) -> Figure:
    """What is learned against what is kept, a line for each way through its looks."""
    sheet = _sheet(runs)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(run.config["way"]["method"] for run in runs))
    marks = "osD^vP*Xh<>p"
    for arm, group in by_arm(runs).items():
        method = group[0].config["way"]["method"]
        number = methods.index(method)
        looks = min(len(run.evaluations) for run in group)
        names = sheet.kept[0], sheet.learned[0]
        points = np.array(
            [[[row[name] for name in names] for row in run.evaluations[:looks]] for run in group]
        ).mean(0)
        # From the end the line goes back towards the start: the early look is a point beside it.
        ours = method in USES_SPACE
        axes.plot(
            points[:, 0], points[:, 1], f"{marks[number]}-" if ours else f"{marks[number]}--",
            color=f"C{number}", label=arm, lw=1.8 if ours else 1.0, ms=6 if ours else 4,
        )  # fmt: skip
    if sheet.goal is not None:
        kept, learned = sheet.goal
        axes.axhspan(learned, 1.02, kept / 1.02, 1.0, alpha=0.12, color="k")
    axes.set(xlim=(0.0, 1.02), ylim=(-0.02, 1.02))
    axes.set_xlabel(sheet.kept[1])
    axes.set_ylabel(sheet.learned[1])
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="lower left")
    return figure
