"""Theorems without rounding: integers in, rational arithmetic, ``==`` out, no tolerance.

Each test is a theorem of the book, literally. Derivatives are taken by definition (dual numbers),
projectors by Gauss elimination; see `tests.support.exact`. Square activations have a curvature that
ReLU lacks; with ReLU the slope at the kink is 0.
"""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teleport import reference
from tests.support import exact
from tests.support.exact import equal, inner, matrices, plus, projected
from tests.support.examples import examples

few = examples(20)
steps = st.one_of(st.fractions(-9, 9, max_denominator=9), st.sampled_from([10**6, -(10**9)]))


@st.composite
def nets_with_null_move(draw: st.DrawFn, deepest: int = 3) -> tuple[exact.Net, exact.Weights]:
    """A network and ``ΔW`` with ``ΔW R = 0`` in every layer."""
    net = draw(exact.nets(deepest))
    return net, projected(draw(exact.directions(net.weights)), exact.null_projectors(net))


def difference(values: list[Fraction]) -> Fraction:
    """The finite difference of order ``len(values) - 1``: zero for polynomials of lower degree."""
    order = len(values) - 1
    return sum((-1) ** (order - i) * comb(order, i) * v for i, v in enumerate(values))


@pytest.mark.verifies("thm-span", exact=True)
@given(exact.nets())
def test_the_gradient_is_the_sum_of_cotangent_times_input(net: exact.Net) -> None:
    by_definition = exact.gradient_by_definition(lambda w: exact.loss(net, w), net.weights)
    assert equal(exact.gradient(net, net.weights), by_definition)


@pytest.mark.verifies("thm-span", exact=True)
@given(exact.nets())
def test_every_row_of_the_gradient_is_a_combination_of_inputs(net: exact.Net) -> None:
    by_definition = exact.gradient_by_definition(lambda w: exact.loss(net, w), net.weights)
    inputs, _ = exact.inputs_and_outputs(net, net.weights, net.batch)
    for g, x in zip(by_definition, inputs, strict=True):
        assert exact.rank(np.hstack([x, g.T])) == exact.rank(x)


@pytest.mark.verifies("thm-span", "thm-survivor", exact=True)
@given(exact.nets(bends=("identity", "relu")))
def test_the_reference_is_exact_on_integers(net: exact.Net) -> None:
    weights = [exact.as_tensor(w) for w in net.weights]
    batch, target = list(exact.as_tensor(net.batch).T), exact.as_tensor(net.target).T
    bend = reference.RELU if net.bend == "relu" else reference.IDENTITY
    arguments = (weights, batch, bend, lambda z: ((z - target) ** 2).sum() / 2)
    g = exact.gradient(net, net.weights)
    tangents = exact.input_tangents(net, net.weights, g)
    deltas = exact.cotangents(net, net.weights)
    survivor = [d @ x.T for d, x in zip(deltas, tangents, strict=True)]
    found = reference.primary_gradient(*arguments), reference.killed_and_survivor(*arguments)[1]
    for tensors, fractions in zip(found, (g, survivor), strict=True):
        assert all(map(torch.equal, tensors, map(exact.as_tensor, fractions)))


@pytest.mark.verifies("thm-invariance", exact=True)
@given(nets_with_null_move(deepest=4), steps)
def test_null_moves_of_any_size_in_all_layers_at_once_change_nothing(
    case: tuple[exact.Net, exact.Weights], step: Fraction
) -> None:
    net, move = case
    moved = plus(net.weights, step, move)
    inputs, outputs = exact.inputs_and_outputs(net, net.weights, net.batch)
    inputs_after, outputs_after = exact.inputs_and_outputs(net, moved, net.batch)
    assert equal(inputs, inputs_after)
    assert equal(outputs, outputs_after)
    assert exact.loss(net, moved) == exact.loss(net, net.weights)


@pytest.mark.verifies("thm-layerwise", exact=True)
@few
@given(exact.nets(), st.data())
def test_projecting_each_layer_is_the_orthogonal_projection_of_all(
    net: exact.Net, data: st.DataObject
) -> None:
    """The constraints ``ΔW_l R_l = 0`` of all layers as one matrix for the flattened weights."""
    inputs, _ = exact.inputs_and_outputs(net, net.weights, net.batch)
    size = sum(w.size for w in net.weights)
    constraints, start = [], 0
    for w, x in zip(net.weights, inputs, strict=True):
        block = np.kron(exact.eye(len(w)), x)
        constraints.append(np.vstack([exact.zeros(start, block.shape[1]), block]))
        start += w.size
    constraints = [
        np.vstack([c, exact.zeros(size - len(c), c.shape[1])]) for c in constraints
    ]  # one row per weight, one column per constraint
    whole = exact.null_projector(np.hstack(constraints))
    move = data.draw(exact.directions(net.weights))
    by_layer = projected(move, exact.null_projectors(net))
    assert np.array_equal(flat(move) @ whole, flat(by_layer))


def flat(parts: exact.Weights) -> exact.Matrix:
    return np.concatenate([part.ravel() for part in parts])


@pytest.mark.verifies("thm-layerwise", exact=True)
@given(exact.nets(), st.data())
def test_the_projection_is_self_adjoint_idempotent_and_no_longer(
    net: exact.Net, data: st.DataObject
) -> None:
    projectors = exact.null_projectors(net)
    a, b = (data.draw(exact.directions(net.weights)) for _ in range(2))
    pa, pb = projected(a, projectors), projected(b, projectors)
    assert inner(pa, b) == inner(a, pb)
    assert equal(projected(pa, projectors), pa)
    assert inner(pa, pa) <= inner(a, a)


@pytest.mark.verifies("thm-layerwise", exact=True)
@few
@given(exact.nets())
def test_the_objective_grows_by_the_square_of_the_projected_ascent(net: exact.Net) -> None:
    g = exact.gradient(net, net.weights)
    ascent = exact.hessian_times(lambda w: exact.loss(net, w), net.weights, g)
    direction = projected(ascent, exact.null_projectors(net))
    slope = exact.derivative(lambda w: exact.objective(net, w), net.weights, direction)
    assert slope == inner(direction, direction)


@pytest.mark.verifies("thm-survivor", exact=True)
@given(exact.nets())
def test_what_survives_the_projection_is_cotangent_times_input_tangent(net: exact.Net) -> None:
    g = exact.gradient(net, net.weights)
    ascent = exact.hessian_times(lambda w: exact.loss(net, w), net.weights, g)
    deltas = exact.cotangents(net, net.weights)
    tangents = exact.input_tangents(net, net.weights, g)
    survivor = [
        d @ (p @ x).T for d, p, x in zip(deltas, exact.null_projectors(net), tangents, strict=True)
    ]
    assert equal(projected(ascent, exact.null_projectors(net)), survivor)


@pytest.mark.verifies("thm-survivor", exact=True)
def test_the_gradient_of_the_objective_can_leave_the_span_of_the_inputs() -> None:
    """Two layers, one sample, no activation: the paper's section 3.2 is wrong, by hand.

    z = w₂ (w₁ x + b₁) + b₂ with x = 1, w₁ = 1, b₁ = 0, w₂ = 2, b₂ = 0 and target y = 1: z = 2 and
    δ₂ = 1, δ₁ = 2, so ∇L = (2, 2) and (1, 1). Along it ż = 2·(2 + 2) + 1 + 1 = 10 and the hidden
    activation moves by 2 + 2 = 4, so (∇T)₂ = ż·(1, 1) + δ₂·(4, 0) = (14, 10). The inputs of layer 2
    span the multiples of (1, 1) only.
    """
    weights = [exact.matrix([[1, 0]]), exact.matrix([[2, 0]])]
    net = exact.Net(weights, exact.matrix([[1]]), exact.matrix([[1]]), "identity")
    inputs, _ = exact.inputs_and_outputs(net, weights, net.batch)
    assert inputs[1].T.tolist() == [[1, 1]]
    assert [g.tolist() for g in exact.gradient(net, weights)] == [[[2, 2]], [[1, 1]]]
    ascent = exact.gradient_by_definition(lambda w: exact.objective(net, w), weights)
    assert ascent[1].tolist() == [[14, 10]]
    kept = ascent[1] @ exact.null_projector(inputs[1])
    assert kept.tolist() == [[2, -2]]  # the whole direction of the teleport; the claim says 0


@pytest.mark.verifies("thm-fixed", exact=True)
@given(exact.nets())
def test_the_first_layer_and_layers_of_full_rank_stay(net: exact.Net) -> None:
    ascent = exact.gradient_by_definition(lambda w: exact.objective(net, w), net.weights)
    inputs, _ = exact.inputs_and_outputs(net, net.weights, net.batch)
    moves = projected(ascent, exact.null_projectors(net))
    for layer, (move, x) in enumerate(zip(moves, inputs, strict=True)):
        if layer == 0 or exact.rank(x) == len(x):
            assert (move == 0).all()


@pytest.mark.verifies("thm-polynomial", exact=True)
@given(nets_with_null_move(deepest=4))
def test_the_objective_on_a_null_ray_has_degree_at_most_twice_the_moved_layers(
    case: tuple[exact.Net, exact.Weights],
) -> None:
    net, move = case
    order = 2 * (len(net.weights) - 1) + 1
    values = [exact.objective(net, plus(net.weights, s, move)) for s in range(order + 1)]
    assert difference(values) == 0


@pytest.mark.verifies("thm-polynomial", exact=True)
@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize("bend", exact.BENDS)
def test_the_degree_is_reached(layers: int, bend: str) -> None:
    """All weights 1 and all biases 0, moved by (1, …, 1, -Σ of the inputs)."""
    weights = [exact.matrix([[1, 1, 0]] * 2)] * layers
    net = exact.Net(weights, exact.matrix([[1], [2]]), exact.matrix([[0], [0]]), bend)
    inputs, _ = exact.inputs_and_outputs(net, weights, net.batch)
    move = [np.array([[1, 1, -x[:2].sum()]] * 2, dtype=object) for x in inputs]
    order = 2 * (layers - 1)
    values = [exact.objective(net, plus(weights, s, move)) for s in range(order + 1)]
    assert exact.loss(net, plus(weights, 1, move)) == exact.loss(net, weights)
    assert difference(values) != 0


@pytest.mark.verifies("thm-drift", exact=True)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=5).filter(any),
    st.fractions(0, 1, max_denominator=20),
    st.data(),
)
def test_one_layer_drifts_no_more_than_the_energy_left_out(
    sizes: list[int], tau: Fraction, data: st.DataObject
) -> None:
    """Orthogonal inputs of integer lengths; one output, so that ‖ΔW‖₂ is a length, too."""
    squares = sorted((Fraction(s) ** 2 for s in sizes), reverse=True)
    total = sum(squares)
    k = next(k for k in range(1, len(sizes) + 1) if sum(squares[:k]) >= tau * total)
    move = data.draw(matrices(1, len(sizes)))[0]
    move[:k] = 0  # what the projection leaves of it
    drift = sum(m**2 * square for m, square in zip(move, squares, strict=True))
    assert drift <= sum(m**2 for m in move) * (1 - tau) * total


@pytest.mark.verifies("thm-batch", exact=True)
@given(matrices(3, 2), matrices(3, 4), matrices(2, 3))
def test_on_other_data_the_output_moves_by_what_the_batch_left_free(
    batch: exact.Matrix, other: exact.Matrix, weight: exact.Matrix
) -> None:
    """And the mean square of that is tr(ΔW C ΔWᵀ), with C the second moment of the other data."""
    free = exact.null_projector(batch)
    move = weight @ free
    drift = (weight + move) @ other - weight @ other
    assert np.array_equal(drift, move @ free @ other)
    moment = other @ other.T / Fraction(other.shape[1])
    mean_square = (drift * drift).sum() / other.shape[1]
    assert mean_square == np.trace(move @ moment @ move.T)
    assert mean_square <= (move * move).sum() * np.trace(free @ moment)


@pytest.mark.verifies("thm-batch", exact=True)
@given(matrices(4, 2), matrices(4, 2), matrices(4, 3))
def test_with_more_data_in_the_batch_less_of_other_data_is_free(
    batch: exact.Matrix, more: exact.Matrix, other: exact.Matrix
) -> None:
    """The free part of every input gets no longer; of inputs in the batch nothing is left."""
    before = exact.null_projector(batch)
    after = exact.null_projector(np.hstack([batch, more]))
    squares = [((p @ other) ** 2).sum(axis=0) for p in (before, after)]
    assert (squares[1] <= squares[0]).all()
    assert (after @ np.hstack([batch, more]) == 0).all()


@pytest.mark.verifies("thm-batch", exact=True)
@given(st.integers(1, 3), st.integers(1, 7), st.data())
def test_at_most_as_many_inputs_as_dimensions_bring_something_new(
    width: int, count: int, data: st.DataObject
) -> None:
    inputs = data.draw(matrices(width, count))
    free = [exact.null_projector(inputs[:, :n]) @ inputs[:, n] for n in range(count)]
    assert sum((part != 0).any() for part in free) == exact.rank(inputs) <= width


@pytest.mark.verifies("thm-batch", exact=True)
def test_a_single_direction_may_drift_more_with_more_data() -> None:
    """What shrinks is the free part of x', and so the mean over all directions, not each drift.

    W = (1, 1) and x' = (2, -1): with nothing in the batch W x' = 1; with (0, 1) in it W P x' = 2.
    """
    weight, other = exact.matrix([[1, 1]]), exact.matrix([[2], [-1]])
    nothing, one = exact.matrix([[0], [0]]), exact.matrix([[0], [1]])
    assert (weight @ exact.null_projector(nothing) @ other).tolist() == [[1]]
    assert (weight @ exact.null_projector(one) @ other).tolist() == [[2]]


@pytest.mark.verifies("thm-layernorm", exact=True)
@given(st.integers(2, 4), st.integers(1, 3), st.data())
def test_behind_a_layer_norm_one_direction_changes_nothing_on_any_data(
    width: int, outputs: int, data: st.DataObject
) -> None:
    n = data.draw(matrices(width, 5))
    n = n - n.sum(axis=0) / width  # whatever it is divided by then, its sum stays 0
    scale, shift = data.draw(matrices(width, 1)) + 4, data.draw(matrices(width, 1))
    h = scale * n + shift
    weight, bias, u = (data.draw(matrices(outputs, c)) for c in (width, 1, 1))
    moved = weight + u @ (1 / scale).T
    moved_bias = bias - u * (shift / scale).sum()
    assert np.array_equal(moved @ h + moved_bias, weight @ h + bias)


@pytest.mark.verifies("thm-keep", exact=True)
@few
@given(exact.nets(bends=("identity", "relu")), st.data())
def test_learning_something_else_in_the_null_space_keeps_every_old_output(
    net: exact.Net, data: st.DataObject
) -> None:
    """Projected gradient steps on a new task, then a projected displacement of any other origin."""
    task = exact.Net(
        net.weights,
        data.draw(matrices(*net.batch.shape), label="new inputs"),
        data.draw(matrices(*net.target.shape), label="new targets"),
        net.bend,
    )
    projectors, weights = exact.null_projectors(net), net.weights
    for _ in range(2):
        update = projected(exact.gradient(task, weights), projectors)
        weights = plus(weights, Fraction(-1, 10), update)
    weights = plus(weights, 1, projected(data.draw(exact.directions(weights)), projectors))
    _, before = exact.inputs_and_outputs(net, net.weights, net.batch)
    _, after = exact.inputs_and_outputs(net, weights, net.batch)
    assert equal(before, after)


@pytest.mark.verifies("thm-keep", exact=True)
def test_with_a_null_space_of_other_data_the_first_layer_learns() -> None:
    """Old input (1, 0), new input (0, 1): the new weight moves, the old output does not."""
    weights = [exact.matrix([[1, 1, 0]])]
    old = exact.Net(weights, exact.matrix([[1], [0]]), exact.matrix([[0]]), "identity")
    new = exact.Net(weights, exact.matrix([[0], [1]]), exact.matrix([[0]]), "identity")
    update = projected(exact.gradient(new, weights), exact.null_projectors(old))
    moved = plus(weights, -1, update)
    assert update[0].tolist() == [[Fraction(-1, 2), 1, Fraction(1, 2)]]
    assert exact.inputs_and_outputs(old, moved, old.batch)[1][0].tolist() == [[1]]
    assert exact.loss(new, moved) == Fraction(1, 8) < exact.loss(new, weights) == Fraction(1, 2)
