"""The report: readable as text, safe as HTML, plain as JSON."""

import json
import math
import re
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teleport import LayerReport, Teleporter, TeleportReport
from teleport.objective import trainable
from tests.support.networks import GRAPHS, Task, task, without_dropout

LAYER = LayerReport("body.2", "Linear", 17, 16, 7, 10, 0.4567, 0.01, "moved", 1, 0.5, 1.25)
REPORT = TeleportReport(
    loss_before=1.25,
    loss_after=1.5,
    grad_norm_before=2.0,
    grad_norm_after=5.0,
    held_out_before=3.125,
    held_out_after=4.5,
    tolerance=0.75,
    steps=2,
    step_sizes=(0.1, 0.2),
    rolled_back=False,
    reason="all steps taken",
    seconds=0.125,
    layers=(LAYER,),
)
numbers = st.floats(1e-3, 1e3)


def test_text_holds_the_numbers() -> None:
    text = str(REPORT)
    for part in ("1.25", "1.5", "2 -> 5", "x 2.5", "2.5e-01", "7.5e-01", "3.125", "4.5", "0.125 s"):
        assert part in text
    for part in (
        "body.2",
        "Linear",
        "16 x 17",
        "7",
        "10",
        "0.457",
        "x 2.5  ",
        "moved",
        "all steps",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "teleported"),
        ({"rolled_back": True}, "rolled back"),
        ({"steps": 0}, "not moved"),
    ],
)
def test_text_begins_with_the_verdict(changes: dict[str, int], verdict: str) -> None:
    assert str(replace(REPORT, **changes)).startswith(f"{verdict}: all steps taken")


@given(numbers, numbers, numbers, numbers)
def test_growth_and_drift_follow_from_the_numbers(
    before: float, after: float, start: float, end: float
) -> None:
    report = replace(
        REPORT, loss_before=before, loss_after=after, grad_norm_before=start, grad_norm_after=end
    )
    assert report.growth == end / start
    assert report.drift == abs(after - before)


def test_growth_of_a_zero_gradient_is_one() -> None:
    assert replace(REPORT, grad_norm_before=0.0, grad_norm_after=0.0).growth == 1.0


def test_without_held_out_data_the_report_is_silent_about_it() -> None:
    report = replace(REPORT, held_out_before=None, held_out_after=None)
    assert report.held_out_drift is None
    assert "held-out" not in str(report)
    assert "held-out" not in report._repr_html_()


def test_html_escapes_names_and_reasons() -> None:
    hostile = replace(LAYER, name="<script>alert(1)</script>", status='"&<b>')
    html = replace(REPORT, reason="<i>why</i>", layers=(hostile,))._repr_html_()
    assert "<script>" not in html
    assert "<i>" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;" in html


def test_html_holds_one_row_per_layer() -> None:
    html = replace(REPORT, layers=(LAYER,) * 3)._repr_html_()
    assert html.count("<tr>") == 4
    assert html.count("<td>body.2</td>") == 3


def bars(html: str) -> list[list[tuple[float, float]]]:
    """Of every drawing, left end and width of its parts."""
    return [
        [
            (float(x), float(wide))
            for x, wide in re.findall(r'x="([^"]+)" y="[^"]+" width="([^"]+)"', one)
        ]
        for one in re.findall(r"<svg.*?</svg>", html)
    ]


def test_bars_repeat_what_the_cells_say() -> None:
    still = replace(
        LAYER, rank=None, null_dim=None, move_norm=0.0, grad_norm_before=0.5, grad_norm_after=0.5
    )
    far = replace(LAYER, rank=0, null_dim=4, move_norm=2 * LAYER.move_norm, grad_norm_before=None)
    html = replace(REPORT, layers=(LAYER, still, far))._repr_html_()
    free, moved, grown, kept, all_free, farthest = bars(html)
    assert free == [(0.0, pytest.approx(90 * 7 / 17, abs=0.1)), (pytest.approx(37.1), 52.9)]
    assert moved == [(0.0, 45.0)]
    assert grown == [(0.0, 0.0), (0.0, 36.0), (0.0, 90.0)]
    assert kept == [(0.0, 0.0), (0.0, 36.0), (0.0, 36.0)]
    assert all_free == [(0.0, 0.0), (0.0, 90.0)]
    assert farthest == [(0.0, 90.0)]


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_bars_of_numbers_that_are_not_finite_have_no_length(value: float) -> None:
    norms = {"grad_norm_before": value, "grad_norm_after": value}
    layer = replace(LAYER, rank=0, null_dim=0, move_norm=value, **norms)
    html = replace(REPORT, layers=(layer,))._repr_html_()
    assert {wide for bar in bars(html) for _, wide in bar} == {0.0}
    assert replace(REPORT, layers=())._repr_html_().endswith("</table>")


@pytest.mark.parametrize("name", GRAPHS)
def test_dictionary_is_json_with_every_field(name: str) -> None:
    problem = task(name)
    report = Teleporter(problem.model).step(problem.closure, held_out=problem.closure)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert set(found) == {f.name for f in fields(TeleportReport)}
    assert [layer["name"] for layer in found["layers"]] == [x.name for x in report.layers]
    assert math.isclose(found["loss_after"], report.loss_after)


@pytest.mark.parametrize("name", GRAPHS)
def test_report_names_every_module_with_parameters(name: str) -> None:
    problem = task(name)
    report = Teleporter(problem.model).step(problem.closure)
    holders = {n for n, m in problem.model.named_modules() if list(m.parameters(recurse=False))}
    assert {layer.name for layer in report.layers} == holders
    assert report.seconds > 0


def layer_norms(problem: Task) -> dict[str, float]:
    """The gradient norm of every module's own parameters, by plain autograd; dropout off."""
    training = problem.model.training
    problem.model.train()
    without_dropout(problem.model)
    parameters = trainable(problem.model)
    grads = torch.autograd.grad(problem.closure(), parameters)
    problem.model.train(training)
    of = dict(zip(parameters, grads, strict=True))
    squares: dict[str, float] = {}
    for name, module in problem.model.named_modules():
        for parameter in module.parameters(recurse=False):
            squares[name] = squares.get(name, 0.0) + float(of[parameter].square().sum())
    return {name: math.sqrt(square) for name, square in squares.items()}


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "tied"])
@pytest.mark.parametrize("how", [{}, {"tau": 0.9, "max_drift": 1.0}, {"method": "double_backward"}])
@given(seed=st.integers(0, 10_000), pieces=st.integers(1, 2))
@settings(max_examples=5)
def test_every_layer_has_its_part_of_the_gradient(
    name: str, how: dict[str, object], seed: int, pieces: int
) -> None:
    problem = task(name, seed)
    before = layer_norms(problem)
    report = Teleporter(problem.model, **how).step([problem.closure] * pieces)
    after = layer_norms(problem)
    for layer in report.layers:
        assert layer.grad_norm_before == pytest.approx(before[layer.name], rel=1e-9, abs=1e-12)
        assert layer.grad_norm_after == pytest.approx(after[layer.name], rel=1e-9, abs=1e-12)
    parts = [layer.grad_norm_after or 0.0 for layer in report.layers]
    assert math.hypot(*parts) == pytest.approx(report.grad_norm_after, rel=1e-12)


def test_a_layer_without_a_gradient_of_its_own_shows_no_growth() -> None:
    for changes in ({"grad_norm_before": 0.0}, {"grad_norm_before": None}):
        line = str(replace(REPORT, layers=(replace(LAYER, **changes),))).splitlines()[-2]
        assert "0.457     -  " in line


def test_a_rolled_back_teleport_grows_no_layer() -> None:
    problem = task("plain")
    report = Teleporter(problem.model, tau=0.5, growth=50.0, max_drift=0.0).step(problem.closure)
    assert report.rolled_back
    for layer in report.layers:
        assert layer.grad_norm_before == layer.grad_norm_after
