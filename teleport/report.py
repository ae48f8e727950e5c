"""What a teleport did: `TeleportReport`, printed as a table."""

import html
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer of a teleport.

    Attributes:
        name: as in ``model.named_modules()``.
        kind: layer type.
        d_in: input width, the bias column included; None for a layer that was not covered.
        d_out: output width.
        rank: dimensions the batch's inputs span; None if it was not needed.
        null_dim: ``d_in - rank``, the dimensions free to move in.
        move_norm: Frobenius norm of the weight change.
        output_bound: bound on the Frobenius norm of the change of the layer's outputs on the batch,
            inputs as they were (``thm-drift``, with the Frobenius norm of the weight change in the
            place of the spectral one, which takes a decomposition: `Basis.drift_bound`). It
            matters at tau < 1. None if the layer was not moved.
        status: ``moved``, or why not.
        groups: how many matrices of ``[d_out, d_in]`` there are, each with a null space of its own
            (grouped convolutions); ``rank`` and ``null_dim`` are sums over them.
        grad_norm_before, grad_norm_after: the layer's own part of the gradient norm: where it
            grew. Their squares add up to those of the report. None where it is not known: for the
            rivals, and for parts that share a parameter.
    """

    name: str
    kind: str
    d_in: int | None
    d_out: int | None
    rank: int | None
    null_dim: int | None
    move_norm: float
    output_bound: float | None
    status: str
    groups: int = 1
    grad_norm_before: float | None = None
    grad_norm_after: float | None = None


@dataclass(frozen=True)
class TeleportReport:
    """One call of `Teleporter.step`.

    Attributes:
        loss_before, loss_after: loss on the teleport batch; NaN, as the norms, where
            ``growth="auto"`` had no room for a look.
        grad_norm_before, grad_norm_after: norm of its gradient over all trainable parameters.
            Which norm, `norm` says. In single precision the second is right to 3e-4.
        held_out_before, held_out_after: loss of the ``held_out`` closure; None without one.
        tolerance: how far the loss was allowed to move.
        steps: directions taken.
        step_sizes: how far along each of them.
        rolled_back: whether the model is as before because a check failed.
        reason: why the teleport ended.
        seconds: time spent on all but the held-out losses, which serve only the report; see
            `teleport.runtime.clock.now` for the clock.
        layers: one entry per layer that holds parameters.
        norm: ``"gradient norm"``, the Euclidean one; or with an optimizer's name the preconditioned
            one, √(gᵀ M⁻¹ g), the root of twice D_M (``thm-geometry``).
    """

    loss_before: float
    loss_after: float
    grad_norm_before: float
    grad_norm_after: float
    held_out_before: float | None
    held_out_after: float | None
    tolerance: float
    steps: int
    step_sizes: tuple[float, ...]
    rolled_back: bool
    reason: str
    seconds: float
    layers: tuple[LayerReport, ...]
    norm: str = "gradient norm"

    @property
    def growth(self) -> float:
        """Factor by which `norm` grew."""
        return growth(self.grad_norm_before, self.grad_norm_after)

    @property
    def drift(self) -> float:
        """How far the loss on the teleport batch moved."""
        return abs(self.loss_after - self.loss_before)

    @property
    def held_out_drift(self) -> float | None:
        """How far the held-out loss moved; None without a held-out closure."""
        if self.held_out_before is None or self.held_out_after is None:
            return None
        return abs(self.held_out_after - self.held_out_before)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        table = text_table([_COLUMNS, *map(_cells, self.layers)])
        return "\n".join([*self._summary(), "", *table, f"{self.seconds:.3f} s"])

    def _repr_html_(self) -> str:
        lines = "<br>".join(html.escape(line) for line in self._summary())
        return f"<p>{lines}</p>{layers_html(self.layers)}"

    def _summary(self) -> list[str]:
        verdict = "rolled back" if self.rolled_back else "teleported" if self.steps else "not moved"
        head = f"{verdict}: {self.reason}"
        if math.isnan(self.loss_before):  # nothing was looked at
            return [head]
        lines = [
            head,
            f"{self.norm}  {self.grad_norm_before:.6g} -> {self.grad_norm_after:.6g}"
            f"  (x {self.growth:.6g})",
            f"loss           {self.loss_before:.6g} -> {self.loss_after:.6g}"
            f"  (drift {self.drift:.1e}, allowed {self.tolerance:.1e})",
        ]
        if self.held_out_before is not None and self.held_out_after is not None:
            lines.append(
                f"held-out loss  {self.held_out_before:.6g} -> {self.held_out_after:.6g}"
                f"  (drift {self.held_out_drift:.1e})"
            )
        return lines


def growth(before: float, after: float) -> float:
    """Factor by which a gradient norm grew; 1 for a gradient of zero, which cannot grow."""
    return 1.0 if before == 0.0 else after / before


_COLUMNS = ("layer", "kind", "d_out x d_in", "rank", "free", "moved by", "gradient", "status")


def _cells(layer: LayerReport) -> tuple[str, ...]:
    shape = "-" if layer.d_in is None else f"{layer.d_out} x {layer.d_in}"
    shape = shape if layer.groups == 1 else f"{layer.groups} x {shape}"
    rank, free = ("-" if n is None else str(n) for n in (layer.rank, layer.null_dim))
    moved = f"{layer.move_norm:.3g}" if layer.move_norm else "-"
    grown = "-"
    if layer.grad_norm_before and layer.grad_norm_after is not None:
        grown = f"x {layer.grad_norm_after / layer.grad_norm_before:.3g}"
    return (layer.name or "(model)", layer.kind, shape, rank, free, moved, grown, layer.status)


_WIDTH, _HEIGHT, _DARK = 90, 10, 0.8
"""Of a bar, in pixels; and how dark its first part is, in the colour of the text around it."""


@dataclass(frozen=True)
class TableCell:
    """One cell.

    Attributes:
        text: what it says; the bars only repeat it.
        bars: one below the other, each a row of parts, in shares of the width: the first part is
            dark, the others are pale.
    """

    text: str
    bars: tuple[tuple[float, ...], ...] = ()


def html_table(head: Sequence[str], rows: Sequence[Sequence[TableCell]]) -> str:
    """A table as HTML; every text in it is escaped."""
    titles = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in head)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>"


def _cell(cell: TableCell) -> str:
    drawn = f" {_drawing(cell.bars)}" if cell.bars else ""
    return f"<td>{html.escape(cell.text)}{drawn}</td>"


def _drawing(bars: Sequence[Sequence[float]]) -> str:
    high, parts = _HEIGHT / len(bars), []
    for number, bar in enumerate(bars):
        left = 0.0
        for place, share in enumerate(bar):
            wide = _WIDTH * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
            size = f'x="{left:.1f}" y="{number * high:g}" width="{wide:.1f}" height="{high - 1:g}"'
            parts.append(f'<rect {size} opacity="{_DARK if place == 0 else 0.3}"/>')
            left += wide
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return f'<svg {size} fill="currentColor" aria-hidden="true">{"".join(parts)}</svg>'


def layers_html(layers: Sequence[LayerReport]) -> str:
    """The table of layers as HTML, with bars.

    *Free*: the rank, dark, against what is free. *Moved by*: against the layer that moved most.
    *Gradient*: its norm before and after, against the largest.
    """
    most = max((layer.move_norm for layer in layers), default=0.0) or 1.0
    norms = [n for x in layers for n in (x.grad_norm_before, x.grad_norm_after) if n]
    longest = max(norms, default=1.0)
    return html_table(_COLUMNS, [_with_bars(layer, most, longest) for layer in layers])


def _with_bars(layer: LayerReport, most: float, longest: float) -> list[TableCell]:
    bars: dict[str, tuple[tuple[float, ...], ...]] = {}
    if layer.rank is not None and layer.null_dim is not None:
        whole = max(layer.rank + layer.null_dim, 1)
        bars["free"] = ((layer.rank / whole, layer.null_dim / whole),)
    if layer.move_norm:
        bars["moved by"] = ((layer.move_norm / most,),)
    if layer.grad_norm_before is not None and layer.grad_norm_after is not None:
        before, after = layer.grad_norm_before / longest, layer.grad_norm_after / longest
        bars["gradient"] = ((0.0, before), (after,))
    cells = zip(_COLUMNS, _cells(layer), strict=True)
    return [TableCell(text, bars.get(column, ())) for column, text in cells]


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is the head, columns aligned at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
