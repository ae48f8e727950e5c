"""Table and figure of the records of new words beside an old index."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from teleport.lab.keeping.frontier import WORDS_TITLE
from teleport.lab.records.runs import Run, by_arm

WANTED_LEARNED, WANTED_RECALL = 0.95, 0.95
"""The goal of the issue: so many words at so much recall."""


def frontier_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The table as text, its head first: every way at every look after the start."""
    rows = [["way", "step", "learned", "recall@10", "mean cosine", "least", "seconds", "space s"]]
    for arm, group in by_arm(runs).items():
        for look in range(1, min(len(run.evaluations) for run in group)):
            found = [run.evaluations[look] for run in group]
            mean = {
                name: float(np.mean([row[name] for row in found]))
                for name in found[0]
                if name != "type"
            }
            numbers = [f"{mean[name]:.2f}" for name in ("learned", "recall")]
            numbers += [f"{mean[name]:.3f}" for name in ("cosine", "least_cosine")]
            times = [f"{mean[name]:.0f}" for name in ("train_seconds", "space_seconds")]
            rows.append([arm, f"{mean['step']:.0f}", *numbers, *times])
    return rows


def frontier_table(runs: Sequence[Run]) -> Table:
    """The same for the terminal."""
    head, *rows = frontier_rows(runs)
    seeds = len({run.seed for run in runs})
    broken = [
        f"{run.arm} (seed {run.seed}): {run.status}" for run in runs if run.status != "finished"
    ]
    caption = (
        "Means over seeds. Learned: held-out sentences with new words that find their own thing. "
        "Recall@10, cosine: of unseen old queries in the old index, to what they were. Seconds of "
        "training; of the null space, once for all ways of a seed."
    )
    table = Table(
        *head, title=f"{WORDS_TITLE}, {seeds} seeds", caption="\n".join([caption, *broken])
    )
    for row in rows:
        table.add_row(*row)
    return table


def frontier_figure(runs: Sequence[Run]) -> Figure:
    """Words learned against recall, a line for each way through its looks."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    methods = list(dict.fromkeys(run.config["way"]["method"] for run in runs))
    marks = "osD^vP*Xh<>p"
    for arm, group in by_arm(runs).items():
        method = group[0].config["way"]["method"]
        number = methods.index(method)
        looks = min(len(run.evaluations) for run in group)
        points = np.array(
            [
                [[run.evaluations[i][k] for k in ("recall", "learned")] for i in range(looks)]
                for run in group
            ]
        ).mean(0)
        ours = method in ("attach", "lora null", "attach+distil")
        axes.plot(
            points[:, 0], points[:, 1], f"{marks[number]}-" if ours else f"{marks[number]}--",
            color=f"C{number}", label=arm, lw=1.8 if ours else 1.0, ms=6 if ours else 4,
        )  # fmt: skip
    axes.axhspan(WANTED_LEARNED, 1.02, WANTED_RECALL / 1.02, 1.0, alpha=0.12, color="k")
    axes.set(xlim=(0.0, 1.02), ylim=(-0.02, 1.02))
    axes.set_xlabel("recall@10 of old queries in the old index")
    axes.set_ylabel("share of new words learned")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="lower left")
    return figure
