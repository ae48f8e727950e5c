"""The literal reference against autograd and finite differences: T1, T4, equations 3 to 13."""

from typing import Any

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport import reference
from teleport.layers.rule import rule_for
from tests.support.strategies import (
    BENDS,
    SMOOTH,
    Case,
    Problem,
    Rows,
    add_matrices,
    cases,
    gradient_norm,
    join_like,
    matrix_gradients,
    network,
    rows_of_rank,
    seeds,
    with_bias,
)

perceptrons = cases(biases=with_bias)
TOLERANCE = 1e-11
"""A few thousand roundings in float64, of gradients and their products of size 1."""


def arguments(problem: Problem, case: Case) -> tuple[Any, ...]:
    """What most functions of the reference take."""
    return network(problem.model), problem.batch, BENDS[case.activation].reference, problem.loss


def close(found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> bool:
    return bool((found - wanted).norm() <= tolerance * (1 + wanted.norm()))


def double_backward(problem: Problem) -> list[Tensor]:
    """∇T by autograd alone."""
    parameters = list(problem.model.parameters())
    first = torch.autograd.grad(problem.closure(), parameters, create_graph=True)
    objective = sum(g.square().sum() for g in first) / 2
    return join_like(problem, torch.autograd.grad(objective, parameters, materialize_grads=True))


@pytest.mark.verifies("thm-span")
@given(perceptrons)
def test_primary_gradient_is_that_of_autograd(case: Case) -> None:
    problem = case.build()
    found = reference.primary_gradient(*arguments(problem, case))
    assert all(map(close, found, matrix_gradients(problem)))


@given(perceptrons)
def test_equation_4_is_half_the_squared_gradient_norm(case: Case) -> None:
    problem = case.build()
    wanted = gradient_norm(problem.model, problem.closure) ** 2 / 2
    assert close(
        reference.equation_4(*arguments(problem, case)), torch.tensor(wanted, dtype=torch.float64)
    )


@pytest.mark.verifies("thm-survivor")
@given(perceptrons)
def test_killed_and_survivor_add_up_to_the_teleport_gradient(case: Case) -> None:
    problem = case.build()
    terms = reference.killed_and_survivor(*arguments(problem, case))
    found = [killed + survivor for killed, survivor in zip(*terms, strict=True)]
    assert all(map(close, found, reference.teleport_gradient(*arguments(problem, case))))


@pytest.mark.verifies("thm-survivor")
@given(perceptrons)
def test_teleport_gradient_is_that_of_double_backward(case: Case) -> None:
    problem = case.build()
    found = reference.teleport_gradient(*arguments(problem, case))
    assert all(map(close, found, double_backward(problem)))


@pytest.mark.verifies("thm-survivor")
@given(cases(biases=with_bias, activations=SMOOTH))
def test_teleport_gradient_is_the_change_of_the_gradient_along_itself(case: Case) -> None:
    """Hg by central differences: error h²‖g‖³ times a fourth derivative, and eps‖g‖/h."""
    problem = case.build()
    ascent = reference.teleport_gradient(*arguments(problem, case))
    direction = matrix_gradients(problem)
    h = 1e-5 / (1 + torch.stack([d.norm() for d in direction]).norm())
    add_matrices(problem, direction, float(h))
    ahead = matrix_gradients(problem)
    add_matrices(problem, direction, -2 * float(h))
    found = [(a - b) / (2 * h) for a, b in zip(ahead, matrix_gradients(problem), strict=True)]
    size = 1 + torch.stack([d.norm() for d in direction]).norm() ** 3
    assert all(close(f, w, 1e-6 * float(size)) for f, w in zip(found, ascent, strict=True))


@pytest.mark.verifies("thm-survivor")
@given(perceptrons)
def test_the_projection_kills_the_first_term_and_only_that(case: Case) -> None:
    problem = case.build()
    killed, survivor = reference.killed_and_survivor(*arguments(problem, case))
    ascent = reference.teleport_gradient(*arguments(problem, case))
    bases = reference.bases_of_batch(*arguments(problem, case)[:3], tau=1.0)
    for k, s, a, basis in zip(killed, survivor, ascent, bases, strict=True):
        size = TOLERANCE * (1 + a.norm() + k.norm())
        assert reference.equation_11(k, basis).norm() <= size
        assert (reference.equation_11(a - s, basis)).norm() <= size


@pytest.mark.verifies("thm-fixed")
@given(perceptrons)
def test_nothing_survives_in_the_first_layer(case: Case) -> None:
    _, survivor = reference.killed_and_survivor(*arguments(problem := case.build(), case))
    assert not survivor[0].any()
    assert survivor[0].shape == network(problem.model)[0].shape


def outside_the_span(case: Case) -> float:
    """Largest share of a layer's ∇T that lies outside the span of its inputs."""
    problem = case.build()
    ascent = reference.teleport_gradient(*arguments(problem, case))
    bases = reference.bases_of_batch(*arguments(problem, case)[:3], tau=1.0)
    shares = [
        float(reference.equation_11(a, b).norm() / a.norm().clamp(min=1e-300))
        for a, b in zip(ascent, bases, strict=True)
    ]
    return max(shares)


@pytest.mark.verifies("thm-survivor")
@pytest.mark.parametrize("activation", ["ReLU", "Tanh"])
def test_the_teleport_gradient_is_not_in_the_input_span(activation: str) -> None:
    """The claim of the paper's section 3.2, refuted: the smallest network that shows it."""
    claims = cases(biases=with_bias, activations=[activation])
    found = find(
        claims,
        lambda case: outside_the_span(case) > 0.01,
        settings=settings(max_examples=200, derandomize=True, database=None),
    )
    assert outside_the_span(found) > 0.01


@pytest.mark.verifies("thm-survivor")
def test_a_fixed_counterexample_to_the_input_span_claim() -> None:
    case = Case((4, 12, 12, 3), (True,) * 3, "ReLU", "cross_entropy", samples=5, rank=4, seed=3)
    assert outside_the_span(case) > 0.01


@pytest.mark.verifies("thm-rank")
@given(rows_of_rank([torch.float64]))
def test_equation_3_at_tau_1_is_the_rank(case: Rows) -> None:
    representation = reference.equation_8(list(case.build()))
    assert representation.shape == (case.width, case.count)
    assert reference.equation_3(representation, 1.0) == case.rank


@given(rows_of_rank([torch.float64]), st.floats(0.01, 0.99))
def test_equation_3_keeps_the_fewest_directions_that_reach_tau(case: Rows, tau: float) -> None:
    energy = torch.linalg.svdvals(case.build()).square()
    k = reference.equation_3(case.build().T, tau)
    slack = 1e-9 * energy.sum()
    assert energy[:k].sum() >= tau * energy.sum() - slack
    assert k == 0 or energy[: k - 1].sum() < tau * energy.sum() + slack


@given(perceptrons)
def test_steps_end_when_the_gradient_is_above_the_cap(case: Case) -> None:
    problem = case.build()
    weights, batch, bend, loss = arguments(problem, case)
    after = reference.algorithm_1_teleport(weights, [batch], [loss], bend, 1.0, 8, cap=0.0)
    small = gradient_norm(problem.model, problem.closure) == 0.0
    assert small or all(map(torch.equal, after, weights))


def test_algorithm_1_teleports_before_the_epochs_of_the_schedule() -> None:
    order: list[str] = []
    note = lambda what: lambda net: (order.append(what), net)[1]  # noqa: E731
    reference.algorithm_1([], note("train"), note("teleport"), epochs=3, schedule={0, 2})
    assert order == ["teleport", "train", "train", "teleport", "train"]


@pytest.mark.verifies("thm-span")
@given(
    channels=st.integers(1, 2),
    size=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    seed=seeds,
)
def test_equation_9_holds_the_rows_of_a_convolution(
    channels: int, size: int, stride: int, padding: int, seed: int
) -> None:
    """Against the library's rule and, through the weights, against torch."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, channels, 4, 5, generator=generator, dtype=torch.float64)
    module = nn.Conv2d(channels, 3, size, stride, padding, bias=False).double()
    (part,) = rule_for(module).parts(module)
    representation = reference.equation_9(list(images), size, stride, padding)
    assert torch.equal(representation.T, part.rows(images))
    outputs = representation.T @ module.weight.detach().reshape(3, -1).T
    assert close(part.from_out_rows(outputs, module(images)), module(images).detach())


def test_equation_10_holds_the_tokens_of_all_sequences() -> None:
    sequences = torch.randn(2, 3, 4, dtype=torch.float64)
    (part,) = rule_for(nn.Linear(4, 2)).parts(nn.Linear(4, 2, bias=False))
    assert torch.equal(reference.equation_10(list(sequences)).T, part.rows(sequences))


@pytest.mark.verifies("thm-layerwise")
@given(rows_of_rank((torch.float64,)), seeds)
def test_equations_12_and_13_are_equation_11_transposed(case: Rows, seed: int) -> None:
    basis = reference.significant_basis(case.build().T, 1.0)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(3, len(basis), generator=generator, dtype=torch.float64)
    wanted = reference.equation_11(gradient, basis)
    for equation in (reference.equation_12, reference.equation_13):
        assert close(equation(gradient.T, basis).T, wanted)
