"""Figures with something to move: a picture in the notebook, a slider in the web book.

A cell ends with an `Interactive`. All that it shows is computed by the cell, one state for each
position of the slider, and stored in the cell's output beside a still picture of one of them. The
still picture is what notebooks, print and e-books show. In the web book
``static/interactive.js`` puts the slider in its place; it computes nothing, so one script serves
every figure.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MIME = "text/vnd.teleport.interactive"
"""Under this name an output holds, as JSON, what the slider shows."""

SHOWN = ("all", "mark", "first", "own")
COLORS = ("#0b57a4", "#b23a00", "#1a7f37", "#6a3d9a")


@dataclass(frozen=True)
class Line:
    """A curve of a panel.

    Attributes:
        name: For the legend; empty for none.
        x: Its points: numbers in a list, a range, an array or a tensor. With ``shown="own"`` such
            numbers for each position of the slider.
        shown: ``all`` of it, whatever the position; all of it with a ``mark`` at the point that has
            the number of the position; its ``first`` points, as many as ``counts`` says; the points
            of the position ``own``.
        counts: With ``shown="first"``, the number of points for each position.
        style: ``-``, ``--``, or ``o`` for points that are not joined.
        color: Number of a colour, 0 to 3; -1 for grey.
    """

    name: str
    x: Any
    y: Any
    shown: str = "all"
    counts: Sequence[int] = ()
    style: str = "-"
    color: int = 0

    def at(self, position: int) -> tuple[list[Any], list[Any]]:
        """The points that are seen at a position."""
        if self.shown == "own":
            return list(self.x[position]), list(self.y[position])
        many = self.counts[position] if self.shown == "first" else len(self.x)
        return list(self.x[:many]), list(self.y[:many])


@dataclass(frozen=True)
class Panel:
    """Axes with curves.

    Attributes:
        title: What is to be seen.
        curves: What is drawn, the first at the back.
        log: The axes that are logarithmic: ``""``, ``"x"``, ``"y"`` or ``"xy"``.
        equal: Whether both axes have one unit.
        xlim: Ends of the horizontal axis; by default those of the curves.
        ylim: Ends of the vertical axis.
    """

    title: str
    x: str
    y: str
    curves: Sequence[Line]
    log: str = ""
    equal: bool = False
    xlim: tuple[float, float] | None = None
    ylim: tuple[float, float] | None = None


@dataclass(frozen=True)
class Interactive:
    """A figure with a slider; the last line of a cell shows it.

    Attributes:
        control: What the slider sets, such as ``growth``.
        positions: The text or number of each of its positions.
        says: For each position, what is to be read off there.
        at: The position of the still picture, and the one the slider starts at.

    Raises:
        ValueError: if a list has not one entry for each position, or a number is not finite.
    """

    control: str
    positions: Sequence[str | int | float]
    says: Sequence[str]
    panels: Sequence[Panel]
    at: int = 0

    def __post_init__(self) -> None:
        many = len(self.positions)
        if not 0 <= self.at < many:
            raise ValueError(f"at must be from 0 to {many - 1}, got {self.at}")
        lists = {"says": len(self.says)}
        for curve in (curve for panel in self.panels for curve in panel.curves):
            if curve.shown not in SHOWN:
                raise ValueError(f"shown must be one of {', '.join(SHOWN)}, got {curve.shown!r}")
            if curve.shown in ("mark", "own"):
                lists[f"curve {curve.name!r}"] = len(curve.x)
            elif curve.shown == "first":
                lists[f"counts of curve {curve.name!r}"] = len(curve.counts)
        for name, length in lists.items():
            if length != many:
                raise ValueError(f"{name}: {length} entries for {many} positions")

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What Jupyter stores and shows."""
        picture = base64.b64encode(self.picture()).decode("ascii")
        return {"image/png": picture, "text/plain": self.text(), MIME: self.data()}

    def text(self) -> str:
        """The sentence of the still picture."""
        return f"{self.control} {self.positions[self.at]}: {self.says[self.at]}"

    def data(self) -> str:
        """All that the slider shows, as JSON with four digits of each number."""
        return json.dumps(_short(asdict(self)), ensure_ascii=False, separators=(",", ":"))

    def picture(self) -> bytes:
        """The still picture, as PNG."""
        wide = 4.4 * len(self.panels)
        figure = Figure(figsize=(wide, 3.5), layout="constrained")
        for axes, panel in zip(
            figure.subplots(1, len(self.panels), squeeze=False)[0], self.panels, strict=True
        ):
            _draw(axes, panel, self.at)
        figure.suptitle(f"{self.control} {self.positions[self.at]}", fontsize=10)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        return file.getvalue()


def frontier(
    control: str,
    positions: Sequence[str | int | float],
    methods: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
) -> Interactive:
    """Methods that trade one measure for another, each with a mark at the setting of the slider.

    Args:
        control: What the slider sets, such as ``share of the energy kept``.
        positions: Its settings.
        methods: By name, for each setting the two measures; four methods at most, from a record.
        x: Name of the first measure.
        y: Name of the second.

    Raises:
        ValueError: if there are no methods or more than four, or one has not a pair for each
            setting.
    """
    if not 1 <= len(methods) <= len(COLORS):
        raise ValueError(f"a frontier shows 1 to {len(COLORS)} methods, got {len(methods)}")
    curves = []
    for number, (name, pairs) in enumerate(methods.items()):
        first, second = ([pair[which] for pair in pairs] for which in (0, 1))
        style = "-" if number % 2 == 0 else "--"
        curves.append(Line(name, first, second, "mark", style=style, color=number))
    says = [
        "; ".join(
            f"{name}: {x} {pairs[i][0]:.3g}, {y} {pairs[i][1]:.3g}"
            for name, pairs in methods.items()
        )
        for i in range(min(map(len, methods.values())))
    ]
    return Interactive(control, positions, says, [Panel(f"{y} against {x}", x, y, curves)])


def page_part(data: str) -> str:
    """The HTML from which the script of the web book makes the figure with its slider."""
    safe = data.replace("</", "<\\/")
    return f'<div class="interactive-figure"><script type="application/json">{safe}</script></div>'


def _draw(axes: Axes, panel: Panel, position: int) -> None:
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.set(xscale="log" if "x" in panel.log else "linear")
    axes.set(yscale="log" if "y" in panel.log else "linear")
    for curve in panel.curves:
        color = "0.7" if curve.color < 0 else COLORS[curve.color]
        x, y = curve.at(position)
        points = {"linestyle": "none", "marker": "o", "ms": 3.5}
        style: Mapping[str, Any] = points if curve.style == "o" else {"linestyle": curve.style}
        axes.plot(x, y, color=color, label=curve.name or None, **style)
        if curve.shown == "mark":
            axes.plot(x[position], y[position], "o", color=color, mfc="white", ms=8)
    if panel.xlim:
        axes.set_xlim(*panel.xlim)
    if panel.ylim:
        axes.set_ylim(*panel.ylim)
    if panel.equal:
        axes.set_aspect("equal", adjustable="datalim")
    if any(curve.name for curve in panel.curves):
        axes.legend(frameon=False, fontsize=8)


def _short(value: Any) -> Any:
    """Numbers with four digits, tensors and arrays as lists."""
    if isinstance(value, Mapping):
        return {key: _short(part) for key, part in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if hasattr(value, "tolist"):
        return _short(value.tolist())
    if isinstance(value, Sequence):
        return [_short(part) for part in value]
    if not math.isfinite(value):
        raise ValueError(f"a figure shows finite numbers only, got {value}")
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) else short
