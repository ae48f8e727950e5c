"""Bars in the cells of an HTML table: in notebooks, and on the page of ``teleport watch``."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

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
