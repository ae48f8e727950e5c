"""Level-set teleportation: a step solves the linearised problem, and drifts as its square."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from teleport.rivals import LevelSetTeleporter
from tests.support.examples import examples
from tests.support.fingerprint import fingerprint
from tests.support.networks import task
from tests.support.strategies import Case, cases, gradient, gradient_norm

smooth = cases(depths=(2, 2), activations=("Tanh", "GELU"), most_positions=1)
lrs = st.sampled_from([1e-4, 1e-3, 1e-2])


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def position(model: nn.Module) -> Tensor:
    return flat(list(model.parameters()))


def hessian_by_definition(model: nn.Module, closure: Callable[[], Tensor]) -> Tensor:
    """Row by row, by differentiating each entry of the gradient."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(closure(), parameters, create_graph=True, materialize_grads=True)
    entries = torch.cat([g.flatten() for g in grads])
    rows = [
        flat(list(torch.autograd.grad(e, parameters, retain_graph=True, materialize_grads=True)))
        if e.requires_grad
        else torch.zeros_like(entries)
        for e in entries
    ]
    return torch.stack(rows)


@pytest.mark.verifies("thm-linearised")
@examples(15)
@given(smooth, lrs)
def test_one_step_solves_the_linearised_problem(case: Case, lr: float) -> None:
    problem = case.build()
    start = position(problem.model)
    g = flat(gradient(problem.model, problem.closure))
    ascent = hessian_by_definition(problem.model, problem.closure) @ g
    # max ⟨Hg, d⟩ - ‖d‖² / 2η over ⟨g, d⟩ = 0, by its optimality conditions as one linear system
    size = len(g)
    system = torch.zeros(size + 1, size + 1, dtype=g.dtype)
    system[:size, :size] = torch.eye(size) / lr
    system[:size, size] = system[size, :size] = g
    wanted = torch.linalg.solve(system, torch.cat([ascent, ascent.new_zeros(1)]))[:size]
    LevelSetTeleporter(problem.model, 1, lr, max_drift=None).step(problem.closure)
    moved = position(problem.model) - start
    scale = float(lr * ascent.norm())
    torch.testing.assert_close(moved, wanted, rtol=1e-6, atol=1e-9 * scale + 1e-15)


@pytest.mark.verifies("thm-linearised")
@examples(15)
@given(smooth)
def test_the_drift_of_a_step_is_of_second_order(case: Case) -> None:
    drifts, unit = [], 0.0
    for size in (2e-3, 1e-3, 5e-4):
        problem = case.build()
        g = flat(gradient(problem.model, problem.closure))
        ascent = hessian_by_definition(problem.model, problem.closure) @ g
        unit = float(ascent.norm())
        if unit < 1e-6 * float(g.norm()):
            return  # no curvature along the gradient: nothing moves
        lr = size / unit
        report = LevelSetTeleporter(problem.model, 1, lr, max_drift=None).step(problem.closure)
        drifts.append(report.drift)
    # The exponent is that of the leading term, unless dᵀHd happens to vanish: then it is larger.
    if drifts[-1] > 1e-12:
        slope = math.log(drifts[0] / drifts[2]) / math.log(4)
        assert slope > 1.7
    assert drifts[0] < 1.0


def bowl(point: tuple[float, float]) -> tuple[nn.Linear, Callable[[], Tensor]]:
    """x² + 4 y² from a point: level sets are ellipses."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([point], dtype=torch.float64)
    scale = torch.tensor([1.0, 4.0], dtype=torch.float64)
    return model, lambda: (scale * model.weight.square()).sum()


@pytest.mark.verifies("thm-linearised")
def test_the_exponent_is_two_on_a_quadratic() -> None:
    drifts = []
    for lr in (1e-2, 1e-3, 1e-4):
        model, closure = bowl((1.0, 0.5))
        drifts.append(LevelSetTeleporter(model, 1, lr, max_drift=None).step(closure).drift)
    for large, small in pairwise(drifts):
        assert math.log10(large / small) == pytest.approx(2.0, abs=0.01)


def test_errors_add_up_unless_each_step_returns_to_the_level() -> None:
    drift = {}
    for back in (False, True):
        for steps in (1, 10):
            model, closure = bowl((2.0, 0.1))
            teleporter = LevelSetTeleporter(
                model, steps, 2e-3, return_to_level=back, max_drift=None
            )
            drift[back, steps] = teleporter.step(closure).drift
    assert drift[False, 1] == drift[True, 1] > 0.0
    assert drift[False, 10] > 5 * drift[False, 1]
    assert drift[True, 10] < drift[False, 10] / 5


def test_many_small_steps_reach_the_largest_gradient_of_the_ellipse() -> None:
    model, closure = bowl((1.0, 0.5))
    report = LevelSetTeleporter(model, 400, 3e-3, max_drift=None).step(closure)
    # On x² + 4 y² = 2 the gradient (2x, 8y) is largest at x = 0: ‖g‖ = 8 √(1/2).
    assert report.grad_norm_after == pytest.approx(8 * math.sqrt(0.5), rel=1e-3)
    assert report.loss_after == pytest.approx(2.0, rel=1e-3)


def test_micro_batches_are_one_batch() -> None:
    case = Case(widths=(3, 6, 2), biases=(True, True), samples=4, rank=3)
    whole, parts = case.build(), case.build()
    LevelSetTeleporter(whole.model, 2, 1e-2).step(whole.closure)
    halves = [
        lambda x=x, y=y: functional.mse_loss(parts.model(x), y)
        for x, y in zip(parts.x.chunk(2), parts.y.chunk(2), strict=True)
    ]
    LevelSetTeleporter(parts.model, 2, 1e-2).step(halves)
    torch.testing.assert_close(position(whole.model), position(parts.model))


@examples(15)
@given(smooth)
def test_the_loss_is_kept_as_asked_or_the_model_is_as_before(case: Case) -> None:
    problem = case.build()
    before = fingerprint(problem.model)
    report = LevelSetTeleporter(problem.model, 2, 1.0, max_drift=1e-9).step(problem.closure)
    assert report.drift <= 1e-9 * report.loss_before
    if report.rolled_back or report.steps == 0:
        assert fingerprint(problem.model) == before


def test_too_much_drift_is_rolled_back() -> None:
    model, closure = bowl((1.0, 0.5))
    before = fingerprint(model)
    report = LevelSetTeleporter(model, 1, 0.1, max_drift=1e-3).step(closure)
    assert report.rolled_back
    assert "the loss moved by" in report.reason
    assert report.loss_after == report.loss_before
    assert fingerprint(model) == before


def test_growth_is_reached_on_a_transformer_like_graph() -> None:
    problem = task("attention")
    norm = gradient_norm(problem.model, problem.closure)
    report = LevelSetTeleporter(problem.model, 4, growth=1.2).step(problem.closure)
    assert report.steps == 4
    assert gradient_norm(problem.model, problem.closure) / norm == pytest.approx(1.2, rel=2e-3)


def test_a_flat_loss_moves_nothing() -> None:
    model, _ = bowl((1.0, 1.0))
    before = fingerprint(model)
    report = LevelSetTeleporter(model, 1, 1.0).step(lambda: 0.0 * model.weight.sum() + 1.0)
    assert report.steps == 0
    assert fingerprint(model) == before


def test_arguments_out_of_range_are_refused() -> None:
    model, _ = bowl((1.0, 1.0))
    with pytest.raises(ValueError, match="max_drift"):
        LevelSetTeleporter(model, 1, 1.0, max_drift=-1.0)
