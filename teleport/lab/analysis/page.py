"""A page about runs in one HTML file: curves with teleports marked, tables, layers as bars.

Everything is drawn here, as SVG, and can be read without scripts; ``static/watch.js`` adds the
values at any step. The file asks for nothing beside itself.
"""

import html
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from teleport.errors import RunError
from teleport.lab.analysis.outcomes import FolderOutcome, folder_outcomes, matrix_rows
from teleport.lab.records.runs import FloatArray, Run, by_arm
from teleport.report import LayerReport, TableCell, html_table, layers_html

PANELS = {
    "train_loss": "train loss",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "grad_norm": "gradient norm",
}
_WIDTH, _HEIGHT, _LEFT, _TOP, _INNER_WIDTH, _INNER_HEIGHT = 560, 300, 56, 10, 480, 244
_COLOURS = 8
_KNOWN = {field.name for field in fields(LayerReport)}


@dataclass(frozen=True)
class _Curve:
    """One column of one arm; places in the steps of the folder, NaN where there is no value.

    Attributes:
        seeds: ``[seeds, steps]``.
        mean: ``[steps]``, as far as all seeds have values.
    """

    seeds: FloatArray
    mean: FloatArray
    diverged: bool


def watch_page(
    folder: Path,
    seconds: float | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> str:
    """The page about all runs of a folder and those below it, as files or in a packed study.

    It loads itself again after so many seconds, if any are given; ``progress`` is that of
    `folder_outcomes`.

    Raises:
        RunError: if there are no records of `teleport run` or sweep, or one is damaged.
    """
    found = folder_outcomes(folder, progress)
    if not found:
        raise RunError(
            f"{folder} holds no records of `teleport run` or `teleport sweep` that have begun; "
            "`teleport figure` shows those of other commands"
        )
    static = files("teleport.lab.analysis") / "static"
    style, script = (static.joinpath(f"watch.{kind}").read_text("utf-8") for kind in ("css", "js"))
    many = max(len(block.summaries) for block in found)
    hidden = "".join(
        f"section:has(.t{n}:not(:checked)) .a{n}{{display:none}}"
        f".a{n}{{color:var(--c{n % _COLOURS})}}"
        for n in range(many)
    )
    title = html.escape(f"teleport watch {folder}")
    again = f'<noscript><meta http-equiv="refresh" content="{seconds}"></noscript>'
    following = (
        f'<p class="following" data-seconds="{seconds:g}">The run is going on; this page loads '
        f"itself again every {seconds:g} seconds.</p>"
        if seconds
        else ""
    )
    body = "".join(_section(number, block) for number, block in enumerate(found))
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'{again if seconds else ""}<link rel="icon" href="data:,"><title>{title}</title>'
        f"<style>{style}{hidden}</style></head><body><main><h1>{title}</h1>"
        f"{following}{_contents(found)}{body}</main><script>{script}</script></body></html>"
    )


def write_page(path: Path, page: str) -> None:
    """Write a page, at every moment the old or the new one whole; RunError if it cannot be."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # one in a packed study need not be there
        fresh.write_text(page, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        raise RunError(
            f"cannot write {path}: {error.strerror}; give another file with --out"
        ) from error


def _contents(found: Sequence[FolderOutcome]) -> str:
    if len(found) == 1:
        return ""
    links = (f'<li><a href="#f{n}">{html.escape(b.title)}</a></li>' for n, b in enumerate(found))
    return f"<nav><ul>{''.join(links)}</ul></nav>"


def _section(number: int, block: FolderOutcome) -> str:
    groups = by_arm(block.runs)
    steps = sorted({int(s) for run in block.runs for s in run.column("step")})
    columns = [c for c in PANELS if any(np.isfinite(run.column(c)).any() for run in block.runs)]
    curves = {c: [_curve(runs, c, steps) for runs in groups.values()] for c in columns}
    texts = [[[_text(v) for v in curve.mean] for curve in curves[column]] for column in columns]
    # A tag that ends the script must not stand in it.
    data = json.dumps({"steps": steps, "texts": texts}, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    figures = "".join(_figure(column, groups, curves[column], steps) for column in columns)
    rows = matrix_rows(block)
    table = html_table(rows[0], [[TableCell(text) for text in row] for row in rows[1:]])
    return (
        f'<section id="f{number}"><h2>{html.escape(block.title)}</h2>{_state(block)}'
        f'{_switches(number, groups)}<div class="at"></div><div class="panels">{figures}</div>'
        "<h3>Every arm, mean over seeds</h3>"
        "<p class=soft>Same lr and best: against the training without a teleport; steps and "
        "seconds are ratios, below 1 is faster; log loss: mean difference, -0.1 is 10 % lower.</p>"
        f"{_wide('Every arm', table)}{''.join(_layers(groups))}"
        f'<script type="application/json">{data}</script></section>'
    )


def _state(block: FolderOutcome) -> str:
    counts = Counter(run.status for run in block.runs)
    said = ", ".join(f"{many} {status}" for status, many in counts.items())
    ends = [f"{r.arm}, seed {r.seed}: {r.reason}" for r in block.runs if r.status == "diverged"]
    command = block.runs[0].config.get("command", "")
    lines = [f"Runs: {said}.", *ends]
    shown = "".join(f"<br>{html.escape(line)}" for line in lines)
    return f'<p class="soft"><code>{html.escape(str(command))}</code>{shown}</p>'


def _switches(number: int, groups: dict[str, list[Run]]) -> str:
    arms = "".join(
        f'<label><input type="checkbox" class="t{n}" checked> {_swatch(n, runs)} '
        f"{html.escape(arm)}</label>"
        for n, (arm, runs) in enumerate(groups.items())
    )
    axes = "".join(
        f'<label><input type="radio" name="axis{number}" class="{kind}"{chosen}> {name}</label>'
        for kind, name, chosen in (("log", "logarithmic", " checked"), ("linear", "linear", ""))
    )
    return (
        "<fieldset><legend>Arms (dashed: no teleport; thin: single seeds)</legend>"
        f"{arms}</fieldset>"
        f"<fieldset><legend>Vertical axis</legend>{axes}</fieldset>"
    )


def _swatch(number: int, runs: Sequence[Run]) -> str:
    line = f'<path class="mean{_plain(runs)}" d="M0 4H24"/>'
    return f'<svg class="a{number}" width="24" height="8" aria-hidden="true">{line}</svg>'


def _plain(runs: Sequence[Run]) -> str:
    return "" if runs[0].config["training"]["teleport"] else " plain"


def _curve(runs: Sequence[Run], column: str, steps: Sequence[int]) -> _Curve:
    place = {step: i for i, step in enumerate(steps)}
    begun = [run for run in runs if run.evaluations]
    seeds = np.full((len(begun), len(steps)), math.nan)
    for row, run in zip(seeds, begun, strict=True):
        row[[place[int(step)] for step in run.column("step")]] = run.column(column)
    mean = seeds.mean(0) if begun else np.full(len(steps), math.nan)
    return _Curve(seeds, mean, any(run.status == "diverged" for run in runs))


def _text(value: float | None) -> str:
    return f"{value:.4g}" if value is not None and math.isfinite(value) else "-"


def _figure(
    column: str, groups: dict[str, list[Run]], curves: Sequence[_Curve], steps: Sequence[int]
) -> str:
    name, kinds = PANELS[column], ("log", "lin") if column != "test_accuracy" else ("",)
    drawn = "".join(_chart(name, kind, groups, curves, steps) for kind in kinds)
    values = "".join(
        f'<li class="a{n}">{_swatch(n, runs)} {html.escape(arm)} <b>{_last(curve)}</b></li>'
        for n, ((arm, runs), curve) in enumerate(zip(groups.items(), curves, strict=True))
    )
    return (
        f'<figure><figcaption>{name}</figcaption>{drawn}<ul class="values">{values}</ul></figure>'
    )


def _last(curve: _Curve) -> str:
    return _text(next((v for v in curve.mean[::-1] if math.isfinite(v)), math.nan))


class _Axis:
    """From values to heights in pixels, counted from above.

    What diverged is outside of a linear axis, where nothing else could be seen beside it.
    """

    def __init__(self, curves: Sequence[_Curve], log: bool) -> None:
        self.log = log
        inside = [curve for curve in curves if log or not curve.diverged] or curves
        values = self._to(np.concatenate([curve.seeds.ravel() for curve in inside]))
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        air = 0.04 * (high - low) or 0.5
        self.low, self.high = low - air, high + air

    def _to(self, values: FloatArray) -> FloatArray:
        with np.errstate(divide="ignore", invalid="ignore"):
            logs: FloatArray = np.log10(values)
        return logs if self.log else values

    def at(self, values: FloatArray) -> FloatArray:
        """Heights of values; not finite where the axis has no place for them."""
        return _INNER_HEIGHT * (self.high - self._to(values)) / (self.high - self.low)

    def ticks(self) -> FloatArray:
        """Round values: multiples of 1, 2 or 5, or powers of ten."""
        low, high = (10.0 ** min(v, 300.0) if self.log else v for v in (self.low, self.high))
        decades = self.high - self.low if self.log else 0.0
        many = LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,))
        few = MaxNLocator(5, steps=[1, 2, 5, 10])
        found = (many if decades > 0.8 else few).tick_values(low, high)
        return np.array([tick for tick in found if low <= tick <= high])


def _chart(
    name: str,
    kind: str,
    groups: dict[str, list[Run]],
    curves: Sequence[_Curve],
    steps: Sequence[int],
) -> str:
    axis = _Axis(curves, kind == "log")
    first, span = steps[0], (steps[-1] - steps[0]) or 1
    x = _INNER_WIDTH * (np.array(steps) - first) / span
    lines: dict[bool, list[str]] = {True: [], False: []}  # baselines above, where curves are equal
    marks = []
    for number, (runs, curve) in enumerate(zip(groups.values(), curves, strict=True)):
        heights = axis.at(curve.mean)
        paths = [_path(x, axis.at(seed), "seed") for seed in curve.seeds] if len(runs) > 1 else []
        paths.append(_path(x, heights, f"mean{_plain(runs)}"))
        teleports = runs[0].config["training"]["teleport"]
        lines[teleports].append(f'<g class="a{number}">{"".join(paths)}</g>')
        drawn = [_mark(x, heights, (s - first) / span, said) for s, said in _teleports(runs)]
        marks.append(f'<g class="a{number}">{"".join(drawn)}</g>')
    size = f'width="{_INNER_WIDTH}" height="{_INNER_HEIGHT}"'
    cursor = f'<line class="cursor" y1="0" y2="{_INNER_HEIGHT}"/>'
    what = {"log": ", logarithmic", "lin": ", linear"}.get(kind, "")
    return (
        f'<svg class="{kind}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{name} over training steps{what}; the final values are in the list below">'
        f'{_frame(axis, first, span)}<svg x="{_LEFT}" y="{_TOP}" {size}>'
        f'<rect {size} fill="none"/>{"".join(lines[True] + lines[False] + [cursor] + marks)}'
        "</svg></svg>"
    )


def _frame(axis: _Axis, first: int, span: int) -> str:
    bottom, right = _TOP + _INNER_HEIGHT, _LEFT + _INNER_WIDTH
    parts = []
    ticks = axis.ticks()
    for value, height in zip(ticks, _TOP + axis.at(ticks), strict=True):
        parts.append(f'<path class="grid" d="M{_LEFT} {height:.1f}H{right}"/>')
        place = f'x="{_LEFT - 6}" y="{height + 4:.1f}"'
        parts.append(f'<text {place} text-anchor="end">{value:.4g}</text>')
    for step in MaxNLocator(5, integer=True).tick_values(first, first + span):
        if first <= step <= first + span:
            place = f'x="{_LEFT + _INNER_WIDTH * (step - first) / span:.1f}" y="{bottom + 18}"'
            parts.append(f'<text {place} text-anchor="middle">{step:g}</text>')
    box = f'<path class="frame" d="M{_LEFT} {_TOP}H{right}V{bottom}H{_LEFT}z"/>'
    middle = f'x="{(_LEFT + right) / 2:g}" y="{_HEIGHT - 6}" text-anchor="middle"'
    return f"{''.join(parts)}{box}<text {middle}>training step</text>"


def _path(x: FloatArray, y: FloatArray, kind: str) -> str:
    """A line through the points, broken where there is none."""
    points, pen = [], "M"
    for left, height in zip(x, y, strict=True):
        if math.isfinite(height):
            points.append(f"{pen}{left:.1f} {height:.1f}")
        pen = "L" if math.isfinite(height) else "M"
    return f'<path class="{kind}" d="{"".join(points)}"/>' if points else ""


def _mark(x: FloatArray, y: FloatArray, share: float, said: str) -> str:
    """A triangle on the curve where it teleported."""
    left, known = _INNER_WIDTH * share, np.isfinite(y)
    if not known.any():
        return ""
    height = float(np.interp(left, x[known], y[known]))
    shape = f"M{left:.1f} {height - 3:.1f}l6 -11h-12z"
    return f'<path class="mark" d="{shape}"><title>{html.escape(said)}</title></path>'


def _teleports(runs: Sequence[Run]) -> Iterator[tuple[int, str]]:
    """Every step after which an arm teleported, with what the first of its teleports there did."""
    first: dict[int, str] = {}
    for run in runs:
        for row in run.teleports:
            before, after = (_text(row[f"grad_norm_{when}"]) for when in ("before", "after"))
            said = f"teleport after step {row['step']}, seed {run.seed}: gradient norm "
            first.setdefault(int(row["step"]), f"{said}{before} → {after}")
    yield from first.items()


def _layers(groups: dict[str, list[Run]]) -> Iterator[str]:
    """The layers of the first and the last teleport of every arm's first seed, one table open."""
    opened = " open"
    for number, (arm, runs) in enumerate(groups.items()):
        rows = next((run.teleports for run in runs if run.teleports), [])
        for row in (*rows[:1], *rows[1:][-1:]):
            if row.get("layers"):
                yield _report(number, arm, row, opened)
                opened = ""


def _report(number: int, arm: str, row: dict[str, Any], opened: str) -> str:
    title = f"{arm}: layers of the teleport after step {row['step']}"
    table = layers_html([_layer(one) for one in row["layers"]])
    return (
        f'<details class="a{number}"{opened}><summary>{html.escape(title)}</summary>'
        f'<p class="soft">{html.escape(str(row.get("reason", "")))}</p>{_wide(title, table)}'
        "</details>"
    )


def _layer(row: dict[str, Any]) -> LayerReport:
    """Of older records, which have fewer fields."""
    return LayerReport(**{"output_bound": None, **{k: v for k, v in row.items() if k in _KNOWN}})


def _wide(name: str, table: str) -> str:
    """What can be scrolled sideways, by the keyboard, too."""
    named = f'role="region" aria-label="{html.escape(name)}"'
    return f'<div class="wide" tabindex="0" {named}>{table}</div>'
