"""The figures of the paper's claims: input energy, threshold, products."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from teleport.lab.analysis.curves import LINE_STYLES, SHADES, layer_names, style_of
from teleport.lab.paper.input_energy import Measured, Spectrum
from teleport.lab.paper.products import Product
from teleport.lab.paper.threshold import Trajectories
from teleport.lab.records.runs import FloatArray


def spectrum_figure(found: Sequence[Measured], step: int) -> Figure:
    """Share of the input energy that the leading eigenvectors capture, a panel per network.

    Experiments that were not looked at after so many training steps are left out.
    """
    shown = [measured for measured in found if step in measured.by_step]
    figure = Figure(figsize=(8.5, 0.5 + 2.9 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, measured in zip(panels, shown, strict=True):
        config = measured.config
        axes.set_title(f"{config['title']}, n = {config['teleport_batch']}", fontsize=9)
        draw_spectra(axes, measured.by_step[step])
    when = f"after {step} training steps" if step else "at the initial weights"
    figure.suptitle(f"input energy captured by the leading eigenvectors, {when}")
    return figure


def draw_spectra(axes: Axes, layers: Sequence[Spectrum]) -> None:
    """One panel: layers with the same inputs share a curve; the ends are the whole energy."""
    alike: dict[tuple[float, ...], list[Spectrum]] = {}
    for layer in layers:
        alike.setdefault(layer.shares, []).append(layer)
    for number, (_, same) in enumerate(alike.items()):
        spectrum = same[0]
        count = np.arange(1, len(spectrum.shares) + 1)
        axes.plot(
            count / spectrum.d_in,
            spectrum.captured,
            label=f"{layer_names([s.layer for s in same])} ({spectrum.d_in})",
            linestyle=LINE_STYLES[number // len(SHADES) % len(LINE_STYLES)],
            markersize=3,
            markevery=0.1,
            linewidth=1.2,
            **style_of(number),
        )
    axes.set_xscale("log")
    axes.set_ylim(0.0, 1.03)
    axes.set_xlabel("leading eigenvectors / input width", fontsize=9)
    axes.set_ylabel("share of input energy", fontsize=9)
    axes.grid(alpha=0.25, which="both")
    axes.legend(
        fontsize=8,
        title="layer (input width)",
        title_fontsize=8,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
    )


def threshold_figure(found: Trajectories) -> Figure:
    """Gradient norm (left) and loss (right) over teleport steps, a curve per τ.

    The loss is drawn within a quarter of its start: a curve that leaves the panel diverges.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (tau, points) in enumerate(found.by_tau.items()):
        steps, style = [point.number for point in points], style_of(number)
        style |= {"linestyle": LINE_STYLES[number % len(LINE_STYLES)], "markersize": 4}
        left.plot(steps, [point.grad_norm for point in points], label=f"τ = {tau:g}", **style)
        right.plot(steps, [point.loss for point in points], **style)
    for axes in (left, right):
        axes.set_xlabel("teleport step")
        axes.grid(alpha=0.25, which="both")
    left.set_yscale("log")
    left.set_ylabel("gradient norm")
    left.legend(fontsize=9)
    start = next(iter(found.by_tau.values()))[0].loss
    losses = [point.loss for points in found.by_tau.values() for point in points]
    near = [loss for loss in losses if abs(loss - start) <= abs(start) / 4]
    margin = 0.1 * (max(near) - min(near)) or 1e-3 * abs(start)
    right.set_ylim(min(near) - margin, max(near) + margin)
    right.set_ylabel("loss on the teleport batch")
    config = found.config
    figure.suptitle(
        f"{config['title']}, after {config['trained']} steps, step size {config['teleport_lr']:g}",
        fontsize=11,
    )
    return figure


def product_figure(product: Product, title: str = "") -> Figure:
    """A layer as products of matrices: Z = X Wᵀ (top) and its gradient g = D X (bottom)."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    upper, lower = figure.subplots(2, 3)
    r, d_in = product.rows.shape
    d_out = len(product.weight)
    rows = f"{product.count} rows" + (f", the first {r}" if r < product.count else "")
    inputs = f"{d_in} inputs" + (", the last the bias" if product.bias else "")
    outputs = f"{d_out} outputs"
    draw_matrix(upper[0], product.rows, "X: one row per position", rows, inputs)
    draw_matrix(upper[1], product.weight.T, "Wᵀ", inputs, outputs)
    draw_matrix(upper[2], product.outputs, "Z = X Wᵀ", rows, outputs)
    draw_matrix(lower[0], product.deltas.T, "D: dL/dz", outputs, rows)
    draw_matrix(lower[1], product.rows, "X", rows, inputs)
    draw_matrix(lower[2], product.gradient, "g = D X, over all rows", outputs, inputs)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def draw_matrix(axes: Axes, matrix: FloatArray, title: str, down: str, across: str) -> None:
    """A matrix as shades, the lowest entry dark, with what its rows and its columns are."""
    shades = axes.imshow(matrix, cmap="cividis", aspect="auto", interpolation="nearest")
    axes.figure.colorbar(shades, ax=axes, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(down, fontsize=9)
    axes.set_xlabel(across, fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(labelsize=8)
