"""Symmetry teleportation: the group action keeps the batch, and its ascent is the gradient."""

import math

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from teleport import ClosureError, GroupElementError, UnsupportedModelError
from teleport.rivals import SymmetryTeleporter, group_action
from teleport.rivals.batch import Batch
from teleport.rivals.group_action import bend_of
from tests.support.fingerprint import fingerprint
from tests.support.strategies import gradient_norm, seeds
from tests.support.wide_perceptrons import ACTIVATIONS, Case, Problem, float64


@st.composite
def cases(draw: st.DrawFn, deepest: int = 3) -> Case:
    samples = draw(st.integers(1, 4), label="samples")
    hidden = draw(st.lists(st.integers(samples, 6), min_size=1, max_size=deepest), label="hidden")
    return Case(
        samples,
        (draw(st.integers(samples, 6), label="d_in"), *hidden, draw(st.integers(1, 3))),
        draw(st.sampled_from(sorted(ACTIVATIONS)), label="activation"),
        draw(st.booleans(), label="bias"),
        draw(seeds, label="seed"),
    )


def condition(problem: Problem) -> float:
    """Largest condition number of the layers' inputs: what rounding is multiplied by."""
    x, worst = problem.x, 1.0
    for module in problem.model:
        if isinstance(module, nn.Linear):
            ones = x.new_ones(len(x), int(module.bias is not None))
            worst = max(worst, float(torch.linalg.cond(torch.cat([x, ones], dim=1).detach())))
        x = module(x)
    return worst


@pytest.mark.verifies("thm-group-action")
@given(cases())
def test_the_action_keeps_the_outputs_of_the_batch(case: Case) -> None:
    problem = case.build()
    before = problem.model(problem.x).detach()
    elements = problem.elements(0.05)
    moved = group_action(problem.matrices, problem.rows, elements, problem.bends)
    assert not torch.allclose(moved[-1], problem.matrices[-1], rtol=1e-6, atol=0.0)
    problem.write(moved)
    torch.testing.assert_close(
        problem.model(problem.x), before, rtol=0.0, atol=1e-12 * condition(problem) ** 2
    )


@pytest.mark.verifies("thm-group-action")
@given(cases())
def test_the_identity_element_changes_no_weight_even_if_the_batch_is_narrow(case: Case) -> None:
    problem = case.build()
    elements = [torch.eye(m.out_features, dtype=float64) for m in problem.linears[:-1]]
    for pseudo_inverse in ("qr", "svd"):
        moved = group_action(
            problem.matrices, problem.rows, elements, problem.bends, pseudo_inverse=pseudo_inverse
        )
        for new, old in zip(moved, problem.matrices, strict=True):
            torch.testing.assert_close(new, old, rtol=0.0, atol=0.0)


@given(cases(deepest=1))
def test_two_elements_act_like_their_product(case: Case) -> None:
    problem = case.build()
    (first,), (second,) = problem.elements(0.03), problem.elements(0.03)
    rows, bends = problem.rows, problem.bends
    once = group_action(problem.matrices, rows, [first], bends)
    twice = group_action(once, rows, [second], bends)
    product = group_action(problem.matrices, rows, [second @ first], bends)
    for a, b in zip(twice, product, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12 * condition(problem) ** 2)


@pytest.mark.verifies("thm-group-action")
@given(cases(deepest=2))
def test_hidden_activations_of_the_batch_are_multiplied_by_the_element(case: Case) -> None:
    problem = case.build()
    elements = problem.elements(0.05)
    before = problem.model[:2](problem.x).detach()
    problem.write(group_action(problem.matrices, problem.rows, elements, problem.bends))
    torch.testing.assert_close(
        problem.model[:2](problem.x),
        before @ elements[0].mT,
        rtol=0.0,
        atol=1e-12 * condition(problem) ** 2,
    )


@pytest.mark.verifies("thm-lie-gradient")
@given(cases())
def test_the_lie_gradient_is_that_of_finite_differences(case: Case) -> None:
    problem = case.build()
    if case.activation == "LeakyReLU":  # a kink may lie between the two points of a difference
        case = Case(case.samples, case.widths, "ELU", case.bias, case.seed)
        problem = case.build()
    teleporter = SymmetryTeleporter(problem.model, 1, 1e-3)
    matrices, rows = problem.matrices, problem.rows
    batch = Batch(problem.model, [problem.closure])
    gradients = teleporter._lie_gradient(batch, matrices, rows)
    directions = [element - torch.eye(len(element)) for element in problem.elements(1.0)]
    predicted = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))

    def objective(size: float) -> float:
        elements = [torch.eye(len(d)) + size * d for d in directions]
        problem.write(group_action(matrices, rows, elements, problem.bends))
        return gradient_norm(problem.model, problem.closure) ** 2 / 2

    step = 1e-5
    measured = (objective(step) - objective(-step)) / (2 * step)
    scale = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert measured == pytest.approx(predicted, abs=1e-5 * (1 + scale) * condition(problem))


def output_error(case: Case, inverse: str, size: float) -> float:
    problem = case.build()
    before = problem.model(problem.x).detach()
    elements = problem.elements(size)
    moved = group_action(
        problem.matrices, problem.rows, elements, problem.bends, inverse=inverse
    )  # fmt: skip
    problem.write(moved)
    return float((problem.model(problem.x).detach() - before).norm() / before.norm())


@pytest.mark.verifies("thm-first-order-inverse")
@given(cases())
def test_the_first_order_inverse_leaves_the_level_set_as_the_square(case: Case) -> None:
    small, large = (output_error(case, "first_order", size) for size in (1e-3, 1e-2))
    if large > 1e-7:  # the square of M may be small on the batch's activations
        assert math.log10(large / small) == pytest.approx(2.0, abs=0.2)


@pytest.mark.verifies("thm-first-order-inverse")
@given(cases(deepest=2))
def test_the_first_order_inverse_moves_the_next_outputs_by_the_square(case: Case) -> None:
    problem = case.build()
    element, *rest = problem.elements(0.1)
    elements = [element, *(torch.eye(len(other), dtype=float64) for other in rest)]
    hidden, second = problem.model[:2](problem.x).detach(), problem.linears[1]
    before, weight = second(hidden).detach(), second.weight.detach().clone()
    rows, bends = problem.rows, problem.bends
    problem.write(group_action(problem.matrices, rows, elements, bends, inverse="first_order"))
    change = problem.model[:3](problem.x).detach() - before
    away = element - torch.eye(len(element), dtype=float64)
    wanted = -hidden @ (weight @ away @ away).mT
    torch.testing.assert_close(change, wanted, rtol=0.0, atol=1e-12 * condition(problem) ** 2)


def test_the_first_order_inverse_does_not_keep_the_loss() -> None:
    def broken(case: Case) -> bool:
        return output_error(case, "first_order", 0.05) > 1e-3

    example = find(cases(), broken)
    assert output_error(example, "exact", 0.05) < 1e-9 * condition(example.build()) ** 2


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_keeps_the_loss_and_enlarges_the_gradient(activation: str, batch: int) -> None:
    problem = Case(4, (5, 7, 6, 2), activation).build()
    halves = [
        lambda x=x, y=y: functional.mse_loss(problem.model(x), y)
        for x, y in zip(problem.x.chunk(batch), problem.y.chunk(batch), strict=True)
    ]
    before, norm = problem.closure().item(), gradient_norm(problem.model, problem.closure)
    report = SymmetryTeleporter(problem.model, 3, growth=1.02).step(halves)
    assert not report.rolled_back
    assert report.steps == 3
    assert problem.closure().item() == pytest.approx(before, rel=1e-9)
    after = gradient_norm(problem.model, problem.closure)
    assert after / norm == pytest.approx(1.02, rel=2e-3)
    assert report.growth == pytest.approx(after / norm)


@pytest.mark.parametrize("inverse", ["exact", "first_order"])
def test_steps_are_lr_times_the_lie_gradient(inverse: str) -> None:
    problem = Case(3, (4, 5, 2), "LeakyReLU").build()
    batch = Batch(problem.model, [problem.closure])
    lr = 1.0
    teleporter = SymmetryTeleporter(problem.model, 1, lr, inverse, max_drift=None)
    (gradient,) = teleporter._lie_gradient(batch, problem.matrices, problem.rows)
    element = torch.eye(5, dtype=float64) + lr * gradient
    rows, bends = problem.rows, problem.bends
    wanted = group_action(problem.matrices, rows, [element], bends, inverse=inverse)
    other = group_action(problem.matrices, rows, [element], bends, inverse="exact")
    assert torch.allclose(wanted[1], other[1], rtol=1e-5) == (inverse == "exact")
    teleporter.step(problem.closure)
    for new, old in zip(problem.matrices, wanted, strict=True):
        torch.testing.assert_close(new, old)


def refused(model: nn.Module, error: type[Exception], match: str) -> None:
    before = fingerprint(model)
    with pytest.raises(error, match=match):
        SymmetryTeleporter(model, 1, 1e-3)
    assert fingerprint(model) == before


def test_an_activation_without_an_inverse_is_refused_by_name() -> None:
    for bad in (nn.ReLU(), nn.GELU(), nn.LeakyReLU(0.0), nn.LeakyReLU(-0.1)):
        model = nn.Sequential(nn.Linear(2, 3), bad, nn.Linear(3, 1))
        refused(model, UnsupportedModelError, "invertible")


def test_other_models_are_refused() -> None:
    linear = nn.Linear(3, 3)
    frozen = nn.Linear(3, 3)
    frozen.bias.requires_grad = False
    refused(linear, UnsupportedModelError, r"nn\.Sequential")
    refused(nn.Sequential(linear), UnsupportedModelError, "has 1")
    refused(nn.Sequential(linear, nn.Tanh(), linear), UnsupportedModelError, "used twice")
    refused(nn.Sequential(linear, nn.LayerNorm(3), frozen), UnsupportedModelError, "LayerNorm")
    refused(nn.Sequential(linear, nn.Tanh(), frozen), UnsupportedModelError, "bias")
    refused(nn.Sequential(linear, nn.Tanh(), nn.Tanh(), nn.Linear(3, 1)), UnsupportedModelError,
            "at most one")  # fmt: skip


def test_arguments_out_of_range_are_refused() -> None:
    model = Case(1, (2, 3, 1)).build().model
    for wrong in ({"lr": 0.0}, {"lr": 1.0, "growth": 2.0}, {}, {"growth": 1.0}, {"lr": math.nan}):
        with pytest.raises(ValueError, match=r"lr|growth"):
            SymmetryTeleporter(model, 1, **wrong)
    with pytest.raises(ValueError, match="steps"):
        SymmetryTeleporter(model, 0, 1.0)


def unusable(problem: Problem, match: str) -> None:
    before = fingerprint(problem.model)
    with pytest.raises(ClosureError, match=match):
        SymmetryTeleporter(problem.model, 2, 1e-3).step(problem.closure)
    assert fingerprint(problem.model) == before


def test_a_batch_larger_than_a_width_is_refused_and_nothing_changes() -> None:
    unusable(Case(6, (4, 8, 2)).build(), "6 samples .* 5 inputs .* layer 1")
    unusable(Case(6, (8, 4, 8, 2)).build(), "6 samples .* 5 inputs .* layer 2")


def test_a_singular_batch_is_refused_and_nothing_changes() -> None:
    problem = Case(3, (6, 6, 2)).build()
    problem.x[2] = problem.x[0]
    unusable(problem, "linearly dependent at the inputs of layer 1")


def test_least_squares_takes_a_large_batch_and_reports_the_drift() -> None:
    problem = Case(6, (4, 8, 2), "Tanh").build()
    report = SymmetryTeleporter(problem.model, 2, 0.3, pseudo_inverse="svd").step(problem.closure)
    assert report.drift > 0.0
    assert report.drift == pytest.approx(abs(problem.closure().item() - report.loss_before))


@pytest.mark.parametrize("activation", ["Tanh", "Sigmoid", "LeakyReLU"])
def test_too_large_a_step_is_rolled_back_bit_for_bit(activation: str) -> None:
    problem = Case(3, (4, 5, 5, 2), activation).build()
    before = fingerprint(problem.model)
    report = SymmetryTeleporter(problem.model, 2, 1e20).step(problem.closure)
    assert report.rolled_back
    assert report.growth == 1.0
    assert fingerprint(problem.model) == before


def test_a_singular_element_is_an_error_and_so_is_a_numerically_singular_one() -> None:
    problem = Case(2, (3, 4, 2), "Identity").build()
    singular, nearly = torch.eye(4, dtype=float64), torch.eye(4, dtype=float64)
    singular[1] = singular[0]
    nearly[1, 1] = 1e-17
    for element in (singular, nearly):
        with pytest.raises(GroupElementError, match="not invertible"):
            group_action(problem.matrices, problem.rows, [element], problem.bends)


def test_an_element_that_leads_out_of_the_range_is_an_error() -> None:
    problem = Case(2, (3, 4, 2), "Tanh").build()
    with pytest.raises(GroupElementError, match="range"):
        group_action(
            problem.matrices, problem.rows, [1e3 * torch.eye(4, dtype=float64)], problem.bends
        )


def test_saturated_activations_are_an_error() -> None:
    problem = Case(2, (3, 4, 2), "Tanh").build()
    eye = torch.eye(4, dtype=float64)
    with pytest.raises(GroupElementError, match="saturated"):
        group_action(
            [1e4 * m for m in problem.matrices], problem.rows, [eye], problem.bends
        )  # fmt: skip


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_inverses_invert(name: str) -> None:
    bend = bend_of([("", ACTIVATIONS[name]())])
    z = torch.linspace(-8, 8, 101, dtype=float64)
    torch.testing.assert_close(bend.inverse(bend.forward(z)), z, rtol=1e-8, atol=1e-9)
