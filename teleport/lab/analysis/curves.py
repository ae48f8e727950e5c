"""Figures from records: numbers in, `Axes` out; no file is read or written here."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from teleport.data import SOURCES
from teleport.lab.analysis.connectivity import Lines, excess
from teleport.lab.analysis.counts import low_and_tuned, schedule_name
from teleport.lab.analysis.outcomes import FolderOutcome
from teleport.lab.analysis.sensitivity import Effects
from teleport.lab.records.compare import ArmSummary
from teleport.lab.records.runs import SPLITS, FloatArray, Run, by_arm, log

SHADES = ("#0b3c5d", "#c8553d", "#5b8e7d", "#8d6a9f", "#c49a1a", "#4a4a4a")

POINT_MARKERS = ("o", "s", "^", "D", "v", "P")

LINE_STYLES = ("-", "--", ":", "-.")


def style_of(number: int) -> dict[str, Any]:
    """Colour and marker of a curve, counted from 0."""
    shade, marker = SHADES[number % len(SHADES)], POINT_MARKERS[number % len(POINT_MARKERS)]
    return {"color": shade, "marker": marker}


def loss_figure(runs: Sequence[Run], title: str = "") -> Figure:
    """Train loss (top) and test loss (bottom), against steps (left) and seconds (right).

    Several seeds of an arm become a mean with a band of one standard deviation. The figure is not
    known to pyplot; save it with ``savefig``.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row")
    groups = by_arm(runs)
    for row, column in enumerate(("train_loss", "test_loss")):
        for axes, against in zip(panels[row], ("step", "seconds"), strict=True):
            draw_losses(axes, groups, column, against)
    _legend_below(figure, panels[0][0])
    if title:
        figure.suptitle(title)
    return figure


def matrix_figure(rows: Mapping[str, Sequence[Run]], title: str = "") -> Figure:
    """Train loss against steps (left) and seconds (right), a row for every optimizer, by its name.

    Mean with a band of one standard deviation.
    """
    figure = Figure(figsize=(10, 0.6 + 4.0 * len(rows)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (name, runs) in zip(parts, rows.items(), strict=True):
        left, right = part.subplots(1, 2, sharey=True)
        groups = by_arm(runs)
        draw_losses(left, groups, "train_loss", "step")
        draw_losses(right, groups, "train_loss", "seconds")
        left.set_title(name, fontsize=10, loc="left")
        _legend_below(part, left)
    if title:
        figure.suptitle(title)
    return figure


Axis = Literal["step", "work"]
"""Where two runs are compared: after as many steps, or after as much time, see `Run.work`."""


def loss_differences(
    arm: Sequence[Run], baseline: Sequence[Run], at: Axis = "step"
) -> tuple[FloatArray, FloatArray]:
    """Log train loss of an arm minus its baseline's, along the training, paired by seed.

    The baseline's loss is taken after as many steps, or after as much time, counted in training
    steps; between two evaluations it is interpolated.

    Returns:
        The steps, or the time, as means over the seeds ``[points]``, and the differences
        ``[seeds, points]``, as far as all runs have them.
    """
    partner = {run.seed: run for run in baseline if run.evaluations}
    pairs = [(run, partner[run.seed]) for run in arm if run.evaluations and run.seed in partner]
    places, values = [], []
    for run, plain in pairs:
        x, theirs = (r.work if at == "work" else r.column("step") for r in (run, plain))
        inside = x <= theirs[-1]
        level = np.interp(x[inside], theirs, log(plain.column("train_loss")))
        places.append(x[inside])
        values.append(log(run.column("train_loss")[inside]) - level)
    count = min(map(len, values), default=0)
    return np.mean([x[:count] for x in places], axis=0), np.array([v[:count] for v in values])


def differences_figure(
    rows: Mapping[str, Sequence[FolderOutcome]], at: Sequence[Axis] = ("step",), most: float = 0.4
) -> Figure:
    """What a teleport changes along the training: `loss_differences` to the same rate.

    Args:
        rows: by name of an experiment its folders. There is a column for every optimizer; colours
            tell how the baseline was tuned, dashes the paper's schedule; mean over the seeds with a
            band of one standard deviation.
        at: one row of panels for each, of every experiment.
        most: half the height of a panel, at most. Where a curve leaves, a triangle stands on the
            edge; a cross stands where the first of its seeds diverged.
    """
    named = {block.optimizer for found in rows.values() for block in found}
    known = [name for name in ("sgd", "momentum", "adagrad", "adam") if name in named]
    optimizers = [*known, *sorted(named - set(known))]
    lines = [(name, found, axis) for name, found in rows.items() for axis in at]
    size = 0.8 + 2.3 * len(optimizers), 0.8 + 1.9 * len(lines)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(lines), len(optimizers), sharey="row", squeeze=False)
    for row, (name, found, axis) in zip(panels, lines, strict=True):
        reach = 0.0
        for axes, optimizer in zip(row, optimizers, strict=True):
            chosen = [block for block in found if block.optimizer == optimizer]
            reach = max([reach, *(_draw_block(axes, b, axis, most) for b in chosen)])
            axes.axhline(0.0, color="0.4", linewidth=0.8)
            axes.set_visible(bool(chosen))
            axes.set_title(f"{name}, {optimizer}", fontsize=9)
            axes.set_xlabel("steps" if axis == "step" else "time, in steps", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.25)
        edge = min(most, 1.05 * reach) or 1.0
        row[0].set_ylim(-edge, edge)
        row[0].set_ylabel("log loss - baseline's", fontsize=8)
    _legend_of_differences(figure)
    return figure


def _draw_block(axes: Axes, block: FolderOutcome, at: Axis, most: float) -> float:
    """The curves of one folder; returns how far from 0 they reach, ``most`` at most."""
    groups, reach = by_arm(block.runs), 0.0
    for number, places in enumerate(low_and_tuned([block]).values()):
        for _, arm in places:
            x, values = loss_differences(groups[arm.arm], groups[arm.baseline], at)
            middle, spread = values.mean(0), values.std(0)
            style = "--" if schedule_name(block) == "paper" else "-"
            axes.plot(x, middle, linestyle=style, color=SHADES[number], linewidth=1.2)
            band = middle - spread, middle + spread
            axes.fill_between(x, *band, color=SHADES[number], alpha=0.15, linewidth=0)
            for side in (1, -1):
                if (left := np.flatnonzero(side * middle > most)).size:
                    (mark,) = axes.plot(x[left[0]], side * most, color=SHADES[number], markersize=5)
                    mark.set(marker="^" if side > 0 else "v", clip_on=False)
            if any(run.status == "diverged" for run in groups[arm.arm]):
                axes.plot(x[-1], np.clip(middle[-1], -most, most), "x", color=SHADES[number])
            reach = max(reach, float(np.max(np.abs(band), initial=0.0)))
    return min(most, reach)


def _legend_of_differences(figure: Figure) -> None:
    """What colours and dashes mean, once and below all panels."""
    tuned = ("low rate", "tuned rate", "tuned rate and gain")
    keys = [Line2D([], [], color=SHADES[n], label=name) for n, name in enumerate(tuned)]
    keys.append(Line2D([], [], color="0.3", linestyle="-", label="one teleport"))
    keys.append(Line2D([], [], color="0.3", linestyle="--", label="the paper's schedule"))
    figure.legend(handles=keys, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def _legend_below(figure: FigureBase, axes: Axes) -> None:
    """Below the panels, where it covers no curve; none if nothing was drawn."""
    curves, names = axes.get_legend_handles_labels()
    if curves:
        figure.legend(curves, names, loc="outside lower center", ncols=3, fontsize=9)


def draw_losses(axes: Axes, groups: Mapping[str, Sequence[Run]], column: str, against: str) -> None:
    """One panel: ``column`` of every arm on a log axis, against ``"step"`` or ``"seconds"``.

    Arms with a teleport are drawn solid, baselines dashed and above them, with their markers at
    different places, so that the figure reads in grey and curves that are the same are both seen.
    Seconds exclude evaluation and include teleporting; over seeds they are averaged. Some initial
    gains begin far above everything that follows; such a start is cut off, see `_frame`. The curve
    of an arm ends where the first of its seeds diverged, and its label says so.
    """
    shown: list[FloatArray] = []
    for number, (arm, begun) in enumerate(groups.items()):
        runs = [run for run in begun if run.evaluations]
        if not runs:
            continue
        count = min(len(run.evaluations) for run in runs)
        places = [run.seconds if against == "seconds" else run.column(against) for run in runs]
        x = np.mean([place[:count] for place in places], axis=0)
        logs = log(np.array([run.column(column)[:count] for run in runs]))
        with np.errstate(invalid="ignore"):  # no spread around a loss of exactly 0
            middle, spread = logs.mean(0), logs.std(0)
        teleports = bool(runs[0].config["training"]["teleport"])
        every, style = max(1, count // 10), style_of(number)
        axes.plot(
            x,
            np.exp(middle),
            label=f"{arm} (diverged)" if any(run.status == "diverged" for run in runs) else arm,
            **style,
            linestyle="-" if teleports else "--",
            markersize=4,
            markevery=(number * every // len(groups), every),
            zorder=2.0 if teleports else 2.1,
        )
        if len(runs) > 1:
            band = np.exp(middle - spread), np.exp(middle + spread)
            axes.fill_between(x, *band, color=style["color"], alpha=0.15, linewidth=0)
        shown.append(np.stack([middle - spread, middle + spread]))
    _frame(axes, shown)
    axes.set_xlabel("training step" if against == "step" else "seconds (teleporting included)")
    axes.set_ylabel(column.replace("_", " ") + _unit(groups))
    axes.grid(alpha=0.25, which="both")


def _frame(axes: Axes, bands: Sequence[FloatArray]) -> None:
    """A log axis with limits and ticks that let differences between trainings be seen.

    The bands of every arm are ``[2, points]``, natural logarithms of the lower and upper edge. The
    lowest start is in the picture, and of what follows all that is finite. If nothing is, as where
    every loss is exactly 0, the axis stays linear.
    """
    starts = [start for band in bands if np.isfinite(start := band[:, 0].mean())]
    after = [band[:, 1:].ravel() for band in bands]
    inside = np.concatenate([np.array([min(starts, default=np.nan)]), *after])
    inside = inside[np.isfinite(inside)]
    if not inside.size:
        return
    axes.set_yscale("log")
    low, high = inside.min(), inside.max()
    margin = max(0.04 * (high - low), 0.002)
    axes.set_ylim(np.exp(low - margin), np.exp(high + margin))
    if high - low > np.log(1e3):
        return  # powers of ten are the better labels
    near = high - low < np.log(10.0)
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10]) if near else LogLocator(subs=(1.0, 2.0, 5.0))
    axes.yaxis.set_major_locator(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _unit(groups: Mapping[str, Sequence[Run]]) -> str:
    """Of the loss, in brackets; nothing if the records' data sets are unknown or of two kinds."""
    names = {run.config.get("data", {}).get("name") for runs in groups.values() for run in runs}
    kinds = {SOURCES[name].kind if name in SOURCES else "" for name in names}
    if kinds == {"windows"}:
        return " (mean squared error)"
    return " (nats)" if kinds <= {"images", "sequences", "tokens"} else ""


def gap_figure(summaries: Sequence[ArmSummary], title: str = "") -> Figure:
    """Every arm against the same training without it: one panel per baseline, one line per arm.

    A dot is the mean log train loss of the arm minus that of its baseline, with one standard
    deviation over seeds: left of the line is better. Beside it stand the ratios of steps and
    seconds to the baseline's final train loss; "-" if their median never got there. Arms without a
    baseline are not drawn.
    """
    groups: dict[str, list[ArmSummary]] = {}
    for summary in summaries:
        if summary.to_own is not None:
            groups.setdefault(summary.baseline, []).append(summary)
    rows = [len(arms) for arms in groups.values()] or [1]
    height = 0.5 + sum(1.1 + 0.3 * count for count in rows)
    figure = Figure(figsize=(8, height), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (baseline, arms) in zip(panels, groups.items(), strict=False):
        _draw_gaps(axes, baseline, arms)
    if title:
        figure.suptitle(title)
    return figure


def _draw_gaps(axes: Axes, baseline: str, arms: Sequence[ArmSummary]) -> None:
    axes.axvline(0.0, color="black", linewidth=0.8)
    beside = axes.get_yaxis_transform()
    for place, head in ((1.02, "steps"), (1.15, "seconds")):
        axes.text(place, -0.8, head, transform=beside, va="center", fontsize=8)
    for row, arm in enumerate(arms):
        assert arm.to_own is not None
        gap, spread = arm.to_own.log_loss, np.nan_to_num(arm.to_own.log_loss_spread)
        axes.errorbar(gap, row, xerr=spread, fmt="o", color=SHADES[0], capsize=3)
        for place, ratio in ((1.02, arm.to_own.steps), (1.15, arm.to_own.seconds)):
            text = "-" if np.isnan(ratio) else f"× {ratio:.2f}"
            axes.text(place, row, text, transform=beside, va="center", fontsize=8)
    names = [arm.arm.removeprefix(baseline).removeprefix(" + ") for arm in arms]
    axes.set_yticks(range(len(arms)), names)
    axes.invert_yaxis()
    axes.set_title(f"against {baseline}", fontsize=10)
    axes.set_xlabel("mean log train loss minus the baseline's (bar: standard deviation over seeds)")
    axes.grid(alpha=0.25, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(5))


def layer_names(names: Sequence[str]) -> str:
    """Names that differ in their last part as one: ``"attn.q, k, v"``."""
    first, *rest = names
    front = first.rpartition(".")[0]
    return ", ".join([first, *(n.removeprefix(f"{front}.") if front else n for n in rest)])


def connectivity_figure(found: Sequence[Lines]) -> Figure:
    """Loss above the straight line between two trained networks, a panel for each experiment.

    A curve for each other network, train loss solid and test loss dashed: mean over the seeds with
    a band of one standard deviation.
    """
    figure = Figure(figsize=(0.5 + 3.6 * len(found), 4.0), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, lines in zip(panels, found, strict=True):
        for number, to in enumerate(lines.others):
            for split in SPLITS:
                label = to if split == "train" else ""
                above = excess(lines.losses[to, split])
                draw_band(axes, lines.shares, above, label, number, dashed=split == "test")
        axes.axhline(0.0, color="0.6", linewidth=0.8)
        axes.set_title(lines.config["experiment"], fontsize=10)
        axes.set_xlabel("from plain (0) to the other network (1)", fontsize=9)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("loss above the straight line")
    _legend_below(figure, panels[0])
    return figure


def effects_figure(found: Sequence[Effects], title: str = "") -> Figure:
    """Effects of the factors of a design on the log loss with 95 % intervals, a panel for each."""
    figure = Figure(figsize=(0.5 + 4.6 * len(found), 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, effects in zip(panels, found, strict=True):
        axes.axvline(0.0, color="0.6", linewidth=0.8)
        places = range(len(effects.names))
        bars = {"fmt": "o", "color": "black", "markersize": 4, "capsize": 3}
        axes.errorbar(effects.values, places, xerr=effects.half_widths, **bars)
        axes.set_yticks(places, effects.names)
        axes.invert_yaxis()
        axes.set_title(f"{effects.design}, {effects.points} points", fontsize=10)
        axes.set_xlabel("effect on the log loss")
        axes.grid(alpha=0.25, axis="x")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def draw_band(
    axes: Axes, x: FloatArray, values: FloatArray, label: str, number: int, dashed: bool = False
) -> None:
    """One curve of ``values [seeds, points]``: their mean with a band of one standard deviation.

    The ``number`` of the curve gives its colour and marker; without a label it is not in the
    legend.
    """
    middle, spread, style = values.mean(0), values.std(0), style_of(number)
    style |= {"linestyle": "--" if dashed else "-", "markersize": 3}
    axes.plot(x, middle, label=label or None, markevery=max(1, len(x) // 10), **style)
    band = middle - spread, middle + spread
    axes.fill_between(x, *band, color=style["color"], alpha=0.15, linewidth=0)


def draw_trade_off(
    axes: Axes, series: Mapping[str, Sequence[tuple[str, FloatArray, FloatArray]]]
) -> None:
    """Accuracy on the old tasks against the new one's, a point with its spreads for every setting.

    ``series`` has by method its settings in a row: a note beside the point, new and old accuracy
    ``[seeds]``.
    """
    for number, (method, points) in enumerate(series.items()):
        new, old = (np.array([point[i] for point in points]) for i in (1, 2))
        places, style = (new.mean(1), old.mean(1)), style_of(number)
        spreads = old.std(1), new.std(1)
        axes.errorbar(*places, *spreads, label=method, linewidth=1, markersize=5, **style)
        # One method's notes above, the next one's below: their points may lie close together.
        beside: dict[str, Any] = {"xytext": (4, 4 if number % 2 else -11), "color": style["color"]}
        for (note, *_), x, y in zip(points, *places, strict=True):
            axes.annotate(note, (x, y), textcoords="offset points", fontsize=8, **beside)
    axes.set(xlabel="final accuracy on the new task", ylabel="final accuracy on the old task")
    axes.grid(alpha=0.25)


def draw_accuracy_matrix(axes: Axes, matrix: FloatArray, title: str, lowest: float = 0.0) -> None:
    """Accuracy on task j (column) after learning task i (row), ``[tasks, tasks]``, as numbers.

    Shades go from ``lowest`` to 1.
    """
    count = len(matrix)
    axes.imshow(matrix, cmap="cividis", vmin=lowest, vmax=1.0)
    for i, j in np.argwhere(np.isfinite(matrix)):
        colour = "black" if matrix[i, j] > (1 + lowest) / 2 else "white"
        text = f"{100 * matrix[i, j]:.0f}"
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(count), [str(t + 1) for t in range(count)])
    axes.set_yticks(range(count), [str(t + 1) for t in range(count)])
    axes.set(xlabel="accuracy on task, %", ylabel="after learning task")
    axes.set_title(title, fontsize=9)
