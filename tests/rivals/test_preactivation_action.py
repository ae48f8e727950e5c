"""Symmetry teleportation on pre-activations: it keeps the batch, and what it does not keep."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, find, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from teleport import ClosureError, UnsupportedModelError
from teleport.rivals import SymmetryTeleporter, preactivation_action
from teleport.rivals.batch import Batch
from teleport.rivals.preactivation_action import elementwise_of
from tests.support.fingerprint import fingerprint
from tests.support.strategies import gradient_norm, seeds
from tests.support.wide_perceptrons import Case, Problem

float64 = torch.float64
FUNCTIONS: dict[str, Callable[[], nn.Module]] = {
    "Identity": nn.Identity,
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "ReLU": nn.ReLU,
    "GELU": nn.GELU,
}
SMOOTH = ("Identity", "Tanh", "Sigmoid", "GELU")


def problem_of(case: Case) -> Problem:
    """The case with its activation replaced by one of `FUNCTIONS`."""
    problem = replace(case, activation="Identity").build()
    layers = [
        FUNCTIONS[case.activation]() if isinstance(m, nn.Identity) else m for m in problem.model
    ]
    return replace(problem, model=nn.Sequential(*layers))


def functions(problem: Problem) -> list[Callable[[Tensor], Tensor]]:
    return [m for m in problem.model if not isinstance(m, nn.Linear)]


@st.composite
def cases(draw: st.DrawFn, activations: tuple[str, ...] = tuple(FUNCTIONS)) -> Case:
    samples = draw(st.integers(1, 3), label="samples")
    hidden = draw(st.lists(st.integers(samples, 6), min_size=1, max_size=3), label="hidden")
    return Case(
        samples,
        (draw(st.integers(1, 6), label="d_in"), *hidden, draw(st.integers(1, 3))),
        draw(st.sampled_from(activations), label="activation"),
        draw(st.booleans(), label="bias"),
        draw(seeds, label="seed"),
    )


def acted(problem: Problem, elements: list[Tensor], pseudo_inverse: str = "qr") -> list[Tensor]:
    return preactivation_action(
        problem.matrices, problem.rows, elements, functions(problem), pseudo_inverse=pseudo_inverse
    )


def identities(problem: Problem) -> list[Tensor]:
    return [torch.eye(m.out_features, dtype=float64) for m in problem.linears[:-1]]


def condition(problem: Problem, matrices: list[Tensor]) -> float:
    """Largest condition number of the hidden layers' activations: what rounding is multiplied by.

    Infinite where they are dependent, as behind a ReLU that is off for every sample.
    """
    rows, worst = problem.rows, 1.0
    for matrix, following, function in zip(
        matrices, matrices[1:], functions(problem), strict=False
    ):
        hidden = function(rows @ matrix.mT).detach()
        ones = hidden.new_ones(len(hidden), following.shape[1] - hidden.shape[1])
        rows = torch.cat([hidden, ones], dim=1)
        if len(rows) > rows.shape[1]:
            return math.inf
        values = torch.linalg.svdvals(rows)
        worst = max(worst, float(values[0] / values[-1]) if values[-1] > 0 else math.inf)
    return worst


@given(cases())
def test_the_action_keeps_the_outputs_of_the_batch(case: Case) -> None:
    problem = problem_of(case)
    elements = problem.elements(0.3)
    moved = acted(problem, elements, "svd")
    worst = max(condition(problem, problem.matrices), condition(problem, moved))
    assume(worst < 1e5)
    moved = acted(problem, elements)
    before = problem.model(problem.x).detach()
    assert not torch.allclose(moved[0], problem.matrices[0], rtol=1e-6, atol=0.0)
    problem.write(moved)
    after = problem.model(problem.x).detach()
    torch.testing.assert_close(after, before, rtol=0.0, atol=1e-12 * worst**2)


@given(cases())
def test_preactivations_are_multiplied_by_the_element_on_every_input(case: Case) -> None:
    problem = problem_of(case)
    (first, *_), elements = problem.linears, problem.elements(0.3)
    others = torch.randn(9, case.widths[0], dtype=float64, generator=problem.generator)
    wanted = first(others).detach() @ elements[0].mT
    problem.write(acted(problem, elements, "svd"))
    torch.testing.assert_close(first(others).detach(), wanted)


@given(cases())
def test_the_identity_element_changes_no_weight_even_if_the_batch_is_narrow(case: Case) -> None:
    problem = problem_of(case)
    for new, old in zip(acted(problem, identities(problem), "svd"), problem.matrices, strict=True):
        torch.testing.assert_close(new, old, rtol=0.0, atol=0.0)


def published(problem: Problem, element: Tensor) -> list[Tensor]:
    """The public code's formula for one hidden layer without bias: U' = U h h'⁺, in columns."""
    v, u = problem.matrices
    (sigma,) = functions(problem)
    x = problem.x.mT
    projected = u @ sigma(v @ x) @ torch.linalg.pinv(sigma(element @ v @ x))
    return [element @ v, projected]


def on_other_inputs(case: Case) -> tuple[float, float]:
    """By how much outputs on other inputs change at g = I: the published form, and ours."""
    changes = []
    for action in (published, lambda p, g: acted(p, [g], "svd")):
        problem = problem_of(replace(case, widths=(*case.widths[:2], case.widths[-1]), bias=False))
        others = torch.randn(20, case.widths[0], dtype=float64, generator=problem.generator)
        before = problem.model(others).detach()
        problem.write(action(problem, *identities(problem)))
        changes.append(float((problem.model(others).detach() - before).norm() / before.norm()))
    return changes[0], changes[1]


def test_the_published_form_is_no_identity_on_other_inputs_and_ours_is() -> None:
    example = find(cases(), lambda case: on_other_inputs(case)[0] > 0.1)
    assert on_other_inputs(example)[1] == 0.0


@given(cases())
def test_on_the_batch_the_published_form_acts_alike(case: Case) -> None:
    problem = problem_of(replace(case, widths=(*case.widths[:2], case.widths[-1]), bias=False))
    (element,) = problem.elements(0.3)
    moved, theirs = acted(problem, [element], "svd"), published(problem, element)
    worst = condition(problem, moved)
    assume(worst < 1e5)
    torch.testing.assert_close(theirs[0], moved[0])
    (sigma,) = functions(problem)
    hidden = sigma(problem.x @ moved[0].mT).detach()
    scale = 1e-12 * worst**2
    torch.testing.assert_close(hidden @ theirs[1].mT, hidden @ moved[1].mT, rtol=0.0, atol=scale)


@given(cases(activations=SMOOTH))
def test_the_lie_gradient_is_that_of_finite_differences(case: Case) -> None:
    problem = problem_of(case)
    assume(condition(problem, problem.matrices) < 1e3)
    teleporter = SymmetryTeleporter(problem.model, 1, 1e-3, action="preactivations")
    matrices, rows = problem.matrices, problem.rows
    batch = Batch(problem.model, [problem.closure])
    gradients = teleporter._lie_gradient(batch, matrices, rows)
    directions = [element - torch.eye(len(element)) for element in problem.elements(1.0)]
    predicted = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))

    def objective(size: float) -> float:
        elements = [torch.eye(len(d)) + size * d for d in directions]
        problem.write(
            preactivation_action(matrices, rows, elements, functions(problem), pseudo_inverse="svd")
        )
        return gradient_norm(problem.model, problem.closure) ** 2 / 2

    step = 1e-5
    measured = (objective(step) - objective(-step)) / (2 * step)
    scale = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    worst = condition(problem, matrices)
    assert measured == pytest.approx(predicted, abs=1e-5 * (1 + scale) * worst)


@pytest.mark.parametrize("activation", sorted(FUNCTIONS))
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_keeps_the_loss_and_enlarges_the_gradient(activation: str, batch: int) -> None:
    problem = problem_of(Case(4, (5, 9, 8, 2), activation))
    halves = [
        lambda x=x, y=y: functional.mse_loss(problem.model(x), y)
        for x, y in zip(problem.x.chunk(batch), problem.y.chunk(batch), strict=True)
    ]
    before, norm = problem.closure().item(), gradient_norm(problem.model, problem.closure)
    mover = SymmetryTeleporter(problem.model, 2, growth=1.02, action="preactivations")
    report = mover.step(halves)
    assert not report.rolled_back
    assert report.steps == 2
    assert problem.closure().item() == pytest.approx(before, rel=1e-8)
    after = gradient_norm(problem.model, problem.closure)
    assert after / norm == pytest.approx(1.02, rel=2e-3)


def test_too_large_a_step_is_rolled_back_bit_for_bit() -> None:
    problem = problem_of(Case(3, (4, 5, 5, 2), "ReLU"))
    before = fingerprint(problem.model)
    mover = SymmetryTeleporter(problem.model, 2, 1e200, action="preactivations")
    report = mover.step(problem.closure)
    assert report.rolled_back
    assert fingerprint(problem.model) == before


def unusable(problem: Problem, match: str) -> None:
    before = fingerprint(problem.model)
    with pytest.raises(ClosureError, match=match):
        SymmetryTeleporter(problem.model, 2, 1e-3, action="preactivations").step(problem.closure)
    assert fingerprint(problem.model) == before


def test_a_batch_that_a_hidden_layer_cannot_tell_apart_is_refused_and_nothing_changes() -> None:
    unusable(problem_of(Case(6, (8, 4, 2), "Tanh")), "6 samples .* 5 inputs .* layer 2")
    repeated = problem_of(Case(3, (6, 6, 2), "Tanh"))
    repeated.x[2] = repeated.x[0]
    unusable(repeated, "linearly dependent at the inputs of layer 2")
    dead = problem_of(Case(3, (6, 6, 2), "ReLU"))
    dead.linears[0].bias.data.fill_(-100.0)
    unusable(dead, "linearly dependent at the inputs of layer 2")


def test_narrow_inputs_are_no_obstacle_here() -> None:
    """The action of 2022 would need as many inputs as samples."""
    problem = problem_of(Case(6, (2, 9, 2), "Tanh"))
    mover = SymmetryTeleporter(problem.model, 1, growth=1.05, action="preactivations")
    report = mover.step(problem.closure)
    assert report.growth == pytest.approx(1.05, rel=2e-3)
    assert report.drift <= 1e-6 * report.loss_before


def test_least_squares_takes_a_large_batch_and_reports_the_drift() -> None:
    problem = problem_of(Case(9, (4, 5, 2), "Tanh"))
    mover = SymmetryTeleporter(
        problem.model, 2, 0.3, pseudo_inverse="svd", action="preactivations", max_drift=None
    )
    report = mover.step(problem.closure)
    assert report.drift > 0.0
    assert report.drift == pytest.approx(abs(problem.closure().item() - report.loss_before))


def test_what_cannot_act_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Softmax(-1), nn.Linear(3, 1))
    with pytest.raises(UnsupportedModelError, match=r"elementwise .* '1' is Softmax.*ReLU"):
        SymmetryTeleporter(model, 1, 1.0, action="preactivations")
    with pytest.raises(UnsupportedModelError, match="at most one"):
        elementwise_of([("1", nn.ReLU()), ("2", nn.Tanh())])
    with pytest.raises(ValueError, match="action must be one of"):
        SymmetryTeleporter(model, 1, 1.0, action="weights")
    with pytest.raises(ValueError, match="inverse must be 'exact' on pre-activations"):
        SymmetryTeleporter(model, 1, 1.0, "first_order", action="preactivations")
