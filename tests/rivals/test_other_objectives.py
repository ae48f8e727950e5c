"""Other objectives in the null space: their slopes are derivatives, their steps keep the loss."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from teleport import Teleporter, null_space
from teleport.objective import gradient
from teleport.report import TeleportReport
from teleport.rivals import (
    ObjectiveStep,
    flatter_curvature,
    sharpness,
    shorter_gradient,
    step_decrease,
)
from teleport.rivals.other_objectives import Slope
from teleport.runtime.closures import Closure
from tests.support.fingerprint import weights

seeds = st.integers(0, 2**31)


class Work:
    """A small perceptron in float64, smooth, with room in every layer but the first."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        layers = (nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))
        self.model = nn.Sequential(*layers).double()
        self.x, self.y = torch.randn(5, 7).double(), torch.randint(3, (5,))
        self.parameters = list(self.model.parameters())

    def closure(self) -> Tensor:
        return functional.cross_entropy(self.model(self.x), self.y)

    def hessian(self) -> tuple[Tensor, Tensor]:
        """g and H as one vector and one matrix, by autograd's own Hessian."""
        shapes = [p.shape for p in self.parameters]
        sizes = [p.numel() for p in self.parameters]
        names = [name for name, _ in self.model.named_parameters()]

        def loss(flat: Tensor) -> Tensor:
            parts = [f.reshape(s) for f, s in zip(flat.split(sizes), shapes, strict=True)]
            z = torch.func.functional_call(self.model, dict(zip(names, parts, strict=True)), self.x)
            return functional.cross_entropy(z, self.y)

        at = torch.cat([p.detach().flatten() for p in self.parameters])
        return torch.func.grad(loss)(at), torch.func.hessian(loss)(at)


def shorter(work: Work) -> float:
    g, _ = work.hessian()
    return float(-g @ g / 2)


def flatter(work: Work) -> float:
    g, h = work.hessian()
    return float(-(g @ h @ g) / (g @ g))


def decrease(work: Work) -> float:
    g, h = work.hessian()
    return float(0.3 * g @ g - 0.3**2 / 2 * g @ h @ g)


VALUES: dict[str, tuple[Slope, Callable[[Work], float]]] = {
    "shorter gradient": (shorter_gradient, shorter),
    "flatter curvature": (flatter_curvature, flatter),
    "step decrease": (step_decrease(0.3), decrease),
}


@pytest.mark.parametrize("name", VALUES)
@given(seeds)
@settings(max_examples=6)
def test_a_slope_is_the_derivative_of_its_objective(name: str, seed: int) -> None:
    work = Work(seed)
    slope, value = VALUES[name]
    slopes = slope(work.closure, work.parameters)
    along = [torch.randn_like(p) for p in work.parameters]
    ends = []
    for sign in (1.0, -2.0):  # there, and as far to the other side
        with torch.no_grad():
            for parameter, direction in zip(work.parameters, along, strict=True):
                parameter.add_(direction, alpha=sign * 1e-5)
        ends.append(value(work))
    expected = (ends[0] - ends[1]) / 2e-5
    found = sum(float((s * a).sum()) for s, a in zip(slopes, along, strict=True))
    scale = math.sqrt(sum(float(s.square().sum()) for s in slopes))
    assert found == pytest.approx(expected, abs=1e-6 * scale + 1e-9, rel=1e-4)


@given(seeds)
@settings(max_examples=10)
def test_sharpness_descends_the_loss_at_the_perturbed_weights(seed: int) -> None:
    work, other = Work(seed), Work(seed)
    before = weights(work.model)
    slopes = sharpness(0.1)(work.closure, work.parameters)
    assert weights(work.model) == before
    _, grads = gradient(other.closure, other.parameters)
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    with torch.no_grad():
        for parameter, grad in zip(other.parameters, grads, strict=True):
            parameter.add_(0.1 / norm * grad)
    _, expected = gradient(other.closure, other.parameters)
    for slope, grad in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, -grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", VALUES)
@given(seeds, st.floats(1.001, 1.5))
@settings(max_examples=6)
def test_a_step_lies_in_the_null_space_as_long_as_the_teleport_s(
    name: str, seed: int, growth: float
) -> None:
    work = Work(seed)
    teleported = Work(seed)
    report = Teleporter(teleported.model, growth=growth).step(teleported.closure)
    start = {n: p.detach().clone() for n, p in work.model.named_parameters()}
    space = null_space(work.model, [work.closure])
    slopes = VALUES[name][0](work.closure, work.parameters)
    found = ObjectiveStep(work.model, VALUES[name][0], report).step(work.closure)
    length = math.hypot(*(layer.move_norm for layer in report.layers))
    assert math.hypot(*(layer.move_norm for layer in found.layers)) == pytest.approx(length)
    assert found.loss_after == pytest.approx(found.loss_before, rel=1e-9)
    for parameter, slope in zip(work.parameters, slopes, strict=True):
        parameter.grad = slope
    space.project_(work.model)
    projected = torch.cat([p.grad.flatten() for p in work.parameters])
    moved = torch.cat([(p.detach() - start[n]).flatten() for n, p in work.model.named_parameters()])
    torch.testing.assert_close(moved, projected * (length / projected.norm()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", VALUES)
@given(seeds)
@settings(max_examples=6)
def test_a_short_step_raises_its_objective(name: str, seed: int) -> None:
    slope, value = VALUES[name]
    short = Work(seed)
    report = Teleporter(short.model, growth=1.0001).step(short.closure)
    work = Work(seed)
    before = value(work)
    assert ObjectiveStep(work.model, slope, report).step(work.closure).steps == 1
    assert value(work) > before


def moving(seed: int = 0) -> TeleportReport:
    work = Work(seed)
    return Teleporter(work.model, growth=1.2).step(work.closure)


def test_nothing_moves_where_the_teleport_did_not_or_the_slope_is_zero() -> None:
    still = nn.Linear(2, 1, bias=False)
    nothing = Teleporter(still).step(lambda: still(torch.eye(2)).square().sum())
    work = Work(0)
    report = ObjectiveStep(work.model, shorter_gradient, nothing).step(work.closure)
    assert (report.steps, report.loss_after) == (0, report.loss_before)
    assert "moved nothing" in report.reason
    flat = ObjectiveStep(
        work.model, lambda closure, ps: [torch.zeros_like(p) for p in ps], moving()
    ).step(work.closure)
    assert flat.steps == 0
    assert "norm 0" in flat.reason


def test_a_loss_whose_gradient_is_constant_has_no_slope() -> None:
    layer = nn.Linear(3, 1)
    closure = lambda: layer(torch.ones(1, 3)).sum()  # noqa: E731
    for slope in (shorter_gradient, flatter_curvature, step_decrease(0.1)):
        for part in slope(closure, list(layer.parameters())):
            assert not part.any()


def test_a_slope_may_come_with_its_graph() -> None:
    work = Work(3)
    like = Teleporter(work.model).step(work.closure)

    def live(closure: Closure, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return list(torch.autograd.grad(closure(), parameters, create_graph=True))

    assert ObjectiveStep(work.model, live, like).step(work.closure).steps == 1


def test_several_closures_are_one_batch() -> None:
    whole, parts = Work(3), Work(3)
    report = moving(3)
    for work in (whole, parts):
        work.x, work.y = work.x[:4], work.y[:4]

    def part(rows: slice) -> Callable[[], Tensor]:
        return lambda: functional.cross_entropy(parts.model(parts.x[rows]), parts.y[rows])

    halves = [part(slice(0, 2)), part(slice(2, 4))]
    ObjectiveStep(whole.model, step_decrease(0.1), report).step(whole.closure)
    ObjectiveStep(parts.model, step_decrease(0.1), report).step(halves)
    for one, two in zip(whole.parameters, parts.parameters, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_bad_values_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="lr must be > 0"):
        step_decrease(value)
    with pytest.raises(ValueError, match="rho must be > 0"):
        sharpness(value)
