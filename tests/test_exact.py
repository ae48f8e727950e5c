"""T1, T2, T4 and T6 without rounding: rational arithmetic, ``==``, no tolerance."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Matrix, Rational, binomial

from teleport import reference
from tests import exact
from tests.strategies import seeds

DEEP = ((2, 2, 2, 1), (1, 3, 2, 1))
SHAPES = ((2, 3, 1), (1, 3, 2), *DEEP)
few = settings(max_examples=10)


def null_direction(seen: exact.Run, weights: list[Matrix], seed: int) -> list[Matrix]:
    """Rational matrices with ``ΔW R = 0`` in every layer, from integer ones by projection."""
    draw = random.Random(seed)
    return [
        Matrix(w.rows, w.cols, lambda *_: draw.randint(-3, 3)) * exact.null_projector(x)
        for w, x in zip(weights, seen.inputs, strict=True)
    ]


def ray(net: exact.IntegerNet, seed: int, step: int | Rational) -> list[Matrix]:
    weights = list(net.weights)
    moves = null_direction(exact.run(net, weights), weights, seed)
    return [w + step * m for w, m in zip(weights, moves, strict=True)]


def difference(values: list[Rational]) -> Rational:
    """The finite difference of order ``len(values) - 1``: zero for polynomials of lower degree."""
    order = len(values) - 1
    return sum((-1) ** (order - i) * binomial(order, i) * v for i, v in enumerate(values))


@pytest.mark.verifies("thm-span")
@few
@given(exact.integer_nets(SHAPES))
def test_the_gradient_is_the_sum_of_cotangent_times_input(net: exact.IntegerNet) -> None:
    by_calculus, _ = exact.by_calculus(net)
    assert exact.gradient(exact.run(net, list(net.weights))) == by_calculus


@pytest.mark.verifies("thm-span")
@pytest.mark.verifies("thm-survivor")
@given(exact.integer_nets(SHAPES))
def test_the_reference_is_exact_on_integers(net: exact.IntegerNet) -> None:
    weights = [exact.as_tensor(w) for w in net.weights]
    batch, target = list(exact.as_tensor(net.batch).T), exact.as_tensor(net.target).T
    bend = reference.RELU if net.relu else reference.IDENTITY
    arguments = (weights, batch, bend, lambda z: ((z - target) ** 2).sum() / 2)
    seen = exact.run(net, list(net.weights))
    gradient = [exact.as_tensor(g) for g in exact.gradient(seen)]
    tangents = exact.input_tangents(list(net.weights), seen)
    survivor = [exact.as_tensor(d * x.T) for d, x in zip(seen.deltas, tangents, strict=True)]
    assert all(map(torch.equal, reference.primary_gradient(*arguments), gradient))
    assert all(map(torch.equal, reference.killed_and_survivor(*arguments)[1], survivor))


@pytest.mark.verifies("thm-invariance")
@given(exact.integer_nets(SHAPES), seeds, st.sampled_from([1, -7, 10**6, Rational(1, 3)]))
def test_null_moves_of_any_size_keep_every_activation(
    net: exact.IntegerNet, seed: int, step: int | Rational
) -> None:
    before = exact.run(net, list(net.weights))
    after = exact.run(net, ray(net, seed, step))
    assert after.inputs == before.inputs
    assert after.outputs == before.outputs
    assert exact.loss(net, after) == exact.loss(net, before)


@pytest.mark.verifies("thm-survivor")
@few
@given(exact.integer_nets(SHAPES))
def test_what_survives_the_projection_is_cotangent_times_input_tangent(
    net: exact.IntegerNet,
) -> None:
    weights = list(net.weights)
    seen = exact.run(net, weights)
    _, ascent = exact.by_calculus(net)
    tangents = exact.input_tangents(weights, seen)
    for h_g, delta, x, x_dot in zip(ascent, seen.deltas, seen.inputs, tangents, strict=True):
        projector = exact.null_projector(x)
        assert h_g * projector == delta * (projector * x_dot).T


@pytest.mark.verifies("thm-fixed")
@few
@given(exact.integer_nets(SHAPES))
def test_nothing_survives_in_the_first_layer(net: exact.IntegerNet) -> None:
    _, ascent = exact.by_calculus(net)
    inputs = exact.run(net, list(net.weights)).inputs[0]
    assert (ascent[0] * exact.null_projector(inputs)).is_zero_matrix


@pytest.mark.verifies("thm-polynomial")
@few
@given(exact.integer_nets(SHAPES), seeds)
def test_the_objective_on_a_null_ray_has_degree_at_most_twice_the_moved_layers(
    net: exact.IntegerNet, seed: int
) -> None:
    order = 2 * (len(net.weights) - 1) + 1
    values = [exact.objective(ray(net, seed, s), net) for s in range(order + 1)]
    assert difference(values) == 0


@pytest.mark.verifies("thm-polynomial")
@pytest.mark.parametrize("widths", SHAPES, ids=str)
def test_the_degree_is_reached(widths: tuple[int, ...]) -> None:
    draw = random.Random(0)

    def matrix(rows: int, columns: int) -> Matrix:
        return Matrix(rows, columns, lambda *_: draw.choice([-2, -1, 1, 2]))

    weights = tuple(matrix(o, i + 1) for i, o in pairwise(widths))
    net = exact.IntegerNet(weights, matrix(widths[0], 1), matrix(widths[-1], 1), relu=False)
    order = 2 * (len(weights) - 1)
    assert difference([exact.objective(ray(net, 1, s), net) for s in range(order + 1)]) != 0
