"""The figures of what a teleport costs, against sizes."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from teleport.lab.analysis.curves import style_of
from teleport.lab.bench.timing import ScalingCurve


def scaling_figure(
    panels: Mapping[str, tuple[str, Mapping[str, ScalingCurve]]], title: str
) -> Figure:
    """Seconds of a teleport against every size, one panel each, on logarithmic axes.

    A panel has the paper's claim about its size and one curve per method.
    """
    figure = Figure(figsize=(3.4 * len(panels), 4.6), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (size, (claim, curves)) in zip(row, panels.items(), strict=True):
        draw_scaling(axes, size, claim, curves)
    row[0].set_ylabel("seconds of a teleport")
    figure.suptitle(title)
    return figure


def draw_scaling(axes: Axes, size: str, claim: str, curves: Mapping[str, ScalingCurve]) -> None:
    """One panel: medians with quartiles; the legend tells the fitted exponents."""
    for number, (method, curve) in enumerate(curves.items()):
        low, middle, high = np.array([(s.low, s.median, s.high) for s in curve.seconds]).T
        fit = "" if curve.exponent is None else f": ${size}^{{{curve.exponent.value:.2f}}}$"
        axes.errorbar(
            curve.sizes,
            middle,
            yerr=(middle - low, high - middle),
            label=method + fit,
            markersize=4,
            capsize=2,
            **style_of(number),
        )
    ticks = sorted({s for curve in curves.values() for s in curve.sizes})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(size)
    axes.set_title(f"the paper: {claim} in {size}", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
