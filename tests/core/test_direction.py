"""The tangent direction and the projector behind it: T3, T4, T5, T6."""

import gc
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from teleport.direction import Direction, direction, project_ascent
from teleport.layers.support import WeightMatrix, cover
from teleport.line_search import step_to_norm
from teleport.objective import ascent_double_backward, trainable
from teleport.recording import Tape, record
from teleport.subspace import Basis, RowSpace
from tests.support.networks import GRAPHS, Task, task, without_dropout
from tests.support.strategies import (
    NEVER_DEAD,
    SMOOTH,
    Case,
    Problem,
    add_matrices,
    cases,
    gradient,
    gradient_norm,
    seeds,
)

Matrices = dict[WeightMatrix, Tensor]


def recorded(problem: Problem | Task) -> tuple[Tape, dict[WeightMatrix, Basis]]:
    tape = record(problem.model, cover(problem.model).sites, problem.closure)
    bases = {}
    for block in tape.blocks:
        space = RowSpace()
        space.add(tape.rows(block))
        bases[block] = space.basis()
    return tape, bases


def fast(problem: Problem | Task) -> Matrices:
    tape, bases = recorded(problem)
    return direction(tape, problem.model, problem.closure, bases)


def ascent(problem: Problem | Task, blocks: list[WeightMatrix]) -> Matrices:
    """Hg by double backward, one matrix per block."""
    parameters = trainable(problem.model)
    values = ascent_double_backward(problem.closure, parameters)
    found = dict(zip(parameters, values, strict=True))
    return {b: b.part.of(found) for b in blocks}


def norm(matrices: Matrices) -> float:
    return math.sqrt(sum(float(m.square().sum()) for m in matrices.values()))


def objective(problem: Problem) -> float:
    """T by plain autograd."""
    return gradient_norm(problem.model, problem.closure) ** 2 / 2


def agree(problem: Problem | Task) -> bool:
    """Fast and slow differ by rounding: a few thousand operations on numbers of the size of Hg."""
    tape, bases = recorded(problem)
    slow, full = ascent(problem, tape.blocks), norm(ascent(problem, tape.blocks))
    found = direction(tape, problem.model, problem.closure, bases)
    wanted = project_ascent(slow, bases)
    return norm({b: found[b] - wanted[b] for b in found}) <= 1e-11 * (1.0 + full)


@pytest.mark.verifies("thm-survivor")
@given(cases())
def test_tangent_direction_is_the_projected_double_backward(case: Case) -> None:
    assert agree(case.build())


@pytest.mark.verifies("thm-survivor")
@pytest.mark.parametrize("name", GRAPHS)
@given(seed=seeds)
def test_tangent_direction_holds_in_any_graph(name: str, seed: int) -> None:
    problem = task(name, seed)
    without_dropout(problem.model)
    assert agree(problem)


@pytest.mark.parametrize("name", GRAPHS)
@given(seed=seeds)
def test_the_last_direction_frees_outputs_and_another_computes_them_again(
    name: str, seed: int
) -> None:
    problem = task(name, seed)
    without_dropout(problem.model)
    tape, bases = recorded(problem)

    def find(**last: bool) -> Direction:
        tape.remember()
        return direction(tape, problem.model, problem.closure, bases, **last)

    plain, last, again = find(), find(last=True), find()
    assert all(torch.equal(last[block], plain[block]) for block in bases)
    assert any(call.z.is_meta for call in tape.calls)
    assert norm({b: again[b] - plain[b] for b in bases}) <= 1e-12 * (1.0 + norm(plain))


@pytest.mark.verifies("thm-survivor")
@given(cases(activations=SMOOTH))
def test_double_backward_is_the_change_of_the_gradient_along_itself(case: Case) -> None:
    problem = case.build()
    parameters = trainable(problem.model)
    ascents = ascent_double_backward(problem.closure, parameters)
    velocity = gradient(problem.model, problem.closure)
    size = 1 + gradient_norm(problem.model, problem.closure)

    def ahead(step: float) -> list[Tensor]:
        with torch.no_grad():
            for p, v in zip(parameters, velocity, strict=True):
                p.add_(v, alpha=step)
        return gradient(problem.model, problem.closure)

    h = 1e-5 / size
    pairs = zip(ahead(h), ahead(-2 * h), ascents, strict=True)
    # Central differences: h² ‖g‖³ times a fourth derivative, and eps ‖g‖ / h.
    assert all(((a - b) / (2 * h) - w).norm() <= 1e-6 * size**3 for a, b, w in pairs)


@pytest.mark.verifies("thm-layerwise")
@given(cases(depths=(2, 3), most_positions=1))
def test_layerwise_projection_is_the_projector_on_the_product_space(case: Case) -> None:
    """Dense P from unit vectors of all weights; the product of null spaces from the SVD."""
    tape, bases = recorded(case.build())
    outputs = {b: b.part.matrix().shape[0] for b in bases}
    eyes = {b: torch.eye(len(basis.vectors), dtype=torch.float64) for b, basis in bases.items()}
    projectors = {b: basis.project(eyes[b]) for b, basis in bases.items()}
    p = torch.block_diag(*[m for b, m in projectors.items() for _ in range(outputs[b])])
    free = sum(basis.null_dim * outputs[b] for b, basis in bases.items())
    assert (p - p.T).norm() <= 1e-12
    assert (p @ p - p).norm() <= 1e-12
    assert abs(float(p.trace()) - free) <= 1e-10
    inputs = torch.block_diag(*[tape.rows(b) for b in bases for _ in range(outputs[b])])
    assert (inputs @ p).norm() <= 1e-11 * (1 + inputs.norm())


@pytest.mark.verifies("thm-layerwise")
@given(cases(activations=SMOOTH))
def test_the_objective_grows_along_the_direction_by_its_squared_norm(case: Case) -> None:
    """Central difference of a polynomial: error h² times its third derivative, and eps T / h."""
    problem = case.build()
    along = list(fast(problem).values())
    squared = sum(float(a.square().sum()) for a in along)
    size = objective(problem)
    h = 1e-4 / (1 + math.sqrt(squared))
    add_matrices(problem, along, h)
    above = objective(problem)
    add_matrices(problem, along, -2 * h)
    slope = (above - objective(problem)) / (2 * h)
    assert squared >= 0.0
    assert abs(slope - squared) <= 1e-5 * (squared + squared**1.5 + size)


@pytest.mark.verifies("thm-fixed")
@given(cases())
def test_direction_of_the_first_layer_is_exactly_zero(case: Case) -> None:
    """By double backward it is a sum whose terms may cancel: zero to the rounding of the terms."""
    problem = case.build()
    tape, bases = recorded(problem)
    first = tape.blocks[0]
    slow = ascent(problem, tape.blocks)
    assert not direction(tape, problem.model, problem.closure, bases)[first].any()
    assert project_ascent(slow, bases)[first].norm() <= 1e-13 * (1 + objective(problem))


@pytest.mark.verifies("thm-fixed")
@given(cases())
def test_direction_of_a_full_rank_layer_is_exactly_zero(case: Case) -> None:
    problem = case.build()
    tape, bases = recorded(problem)
    found = direction(tape, problem.model, problem.closure, bases)
    assert not any(found[b].any() for b, basis in bases.items() if basis.null_dim == 0)


@given(cases())
def test_norm_of_the_tape_is_the_gradient_norm(case: Case) -> None:
    problem = case.build()
    tape, _ = recorded(problem)
    wanted = gradient_norm(problem.model, problem.closure) ** 2
    assert abs(tape.norm_squared() - wanted) <= 1e-11 * (1e-12 + wanted)


@pytest.mark.parametrize("name", GRAPHS)
def test_norm_of_the_tape_counts_all_parameters(name: str) -> None:
    problem = task(name)
    without_dropout(problem.model)
    tape, _ = recorded(problem)
    wanted = gradient_norm(problem.model, problem.closure) ** 2
    assert abs(tape.norm_squared() - wanted) <= 1e-11 * wanted


def samples_on_a_ray(case: Case, count: int) -> list[float]:
    """T at equal distances along the direction, scaled so that T grows a few times."""
    problem = case.build()
    along = list(fast(problem).values())
    scale = math.sqrt(sum(float(a.square().sum()) for a in along)) or 1.0
    found = [objective(problem)]
    for _ in range(count - 1):
        add_matrices(problem, along, 1.0 / scale)
        found.append(objective(problem))
    return found


def difference(values: list[float]) -> float:
    order = len(values) - 1
    return math.fsum((-1) ** i * math.comb(order, i) * v for i, v in enumerate(values))


@pytest.mark.verifies("thm-polynomial")
@given(cases())
def test_the_objective_is_a_polynomial_of_twice_the_moved_layers(case: Case) -> None:
    """One order more than the degree vanishes, to 2^order roundings of the largest value."""
    order = 2 * (len(case.widths) - 2) + 1
    values = samples_on_a_ray(case, order + 1)
    assert abs(difference(values)) <= 2**order * 1e-10 * max(values)


@pytest.mark.verifies("thm-polynomial")
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_degree_of_the_objective_is_reached(depth: int) -> None:
    """Along a ray that moves all layers by as much; the direction of ascent favours the last."""
    order = 2 * (depth - 1)
    problem = Case((4, *[9] * (depth - 1), 3), (True,) * depth, samples=4, rank=4, seed=5).build()
    generator = torch.Generator().manual_seed(0)
    _, bases = recorded(problem)
    moves = [
        basis.project(torch.randn(b.part.matrix().shape, generator=generator, dtype=torch.float64))
        for b, basis in bases.items()
    ]
    values = [objective(problem)]
    for _ in range(order):
        add_matrices(problem, moves)
        values.append(objective(problem))
    assert abs(difference(values)) > 0.01 * max(values)


@pytest.mark.verifies("thm-polynomial")
@given(cases(depths=(3, 4), roomy=True, activations=NEVER_DEAD), st.floats(0.01, 10.0))
def test_frozen_tape_gives_the_norm_of_the_moved_model(case: Case, distance: float) -> None:
    problem = case.build()
    tape, _ = recorded(problem)
    along = fast(problem)
    scale = distance / (norm(along) or 1.0)
    add_matrices(problem, list(along.values()), scale)
    tape.backward()
    wanted = 2 * objective(problem)
    terms = sum(float((tape.deltas(b).norm() * tape.rows(b).norm()) ** 2) for b in tape.blocks)
    rounding = 1e-14 * math.sqrt(wanted * terms)  # the gradient's terms may cancel
    assert abs(tape.norm_squared() - wanted) <= 1e-9 * wanted + rounding


@given(st.floats(0.1, 10.0), st.floats(0.0, 10.0), st.integers(1, 8), st.floats(1.01, 1e6))
def test_line_search_inverts_a_growing_polynomial(
    slope: float, curvature: float, degree: int, growth: float
) -> None:
    def value(step: float) -> float:
        return 1.0 + slope * step + curvature * step ** (2 * degree)

    step = step_to_norm(value, 1.0, slope, growth, 1e-14)
    assert step is not None
    assert abs(value(step) / growth - 1) <= 1e-12


@given(
    st.floats(0.1, 10.0),
    st.floats(1.5, 50.0),
    st.floats(0.05, 0.95),
    st.sampled_from([math.nan, math.inf, 1e300]),
)
def test_line_search_survives_values_beyond_all_numbers(
    slope: float, growth: float, where: float, beyond: float
) -> None:
    """As where a network that drifts overflows at some steps and not at others."""
    guess = 2.0 / slope * (math.sqrt(growth) - 1.0)

    def value(step: float) -> float:
        if step >= guess:
            return 2.0 * growth
        return beyond if step >= where * guess else 1.0 + 0.4 * (growth - 1.0) * step / guess

    step = step_to_norm(value, 1.0, slope, growth, 1e-12)
    assert step is not None
    assert 0.0 < step <= guess


@given(st.floats(0.1, 10.0), st.floats(1.5, 50.0))
def test_line_search_gives_up_soon_where_the_norm_saturates(slope: float, growth: float) -> None:
    """As that of a network whose activations saturate: each look is a pass of the model."""
    looks = []

    def value(step: float) -> float:
        looks.append(step)
        return 1.0 + 0.9 * (growth - 1.0) * math.tanh(slope * step)

    assert step_to_norm(value, 1.0, slope, growth, 1e-12) is None
    assert len(looks) <= 25


@pytest.mark.verifies("thm-polynomial")
@given(
    st.lists(st.floats(0.0, 10.0), min_size=1, max_size=5),
    st.floats(0.1, 10.0),
    st.floats(1.01, 9.0),
)
def test_line_search_looks_no_more_often_than_the_degree_asks(
    coefficients: list[float], slope: float, growth: float
) -> None:
    """A polynomial of degree k with known value and slope at 0 is known after k - 1 looks."""
    seen = []

    def value(step: float) -> float:
        powers = (c * step ** (n + 2) for n, c in enumerate(coefficients))
        seen.append(1.0 + slope * step + sum(powers))
        return seen[-1]

    degree = len(coefficients) + 1
    step = step_to_norm(value, 1.0, slope, growth, 1e-14, degree)
    assert step is not None
    bracketing = math.ceil(math.log2(growth))  # the first guesses may fall short
    if max(seen) < 10 * growth:  # values farther above drown the others: then it looks again
        assert len(seen) <= degree - 1 + bracketing
    assert abs(value(step) / growth - 1) <= 1e-9


def test_line_search_survives_a_first_guess_that_overflows() -> None:
    """A small slope before a steep rise: the extrapolated step is out of the numbers' range."""

    def value(step: float) -> float:
        return 1.0 + 1e-12 * step + (step**8 if step < 1e6 else math.inf)

    step = step_to_norm(value, 1.0, 1e-12, 4.0, 1e-14)
    assert step is not None
    assert abs(value(step) / 4.0 - 1) <= 1e-12


def test_line_search_gives_up_on_what_is_bounded() -> None:
    assert step_to_norm(lambda s: 2 - math.exp(-s), 1.0, 1.0, 3.0, 1e-12) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_line_search_gives_up_on_what_is_not_finite(value: float) -> None:
    assert step_to_norm(lambda s: value, 1.0, 1.0, 3.0, 1e-12) is None


@pytest.mark.parametrize("exact_slope", [True, False])
def test_a_search_keeps_nothing_of_what_it_looked_at(exact_slope: bool) -> None:
    """Without help from the garbage collector: a look holds a whole tape."""

    def search() -> weakref.ref[Callable[[float], float]]:
        def look(step: float) -> float:
            return math.exp(step)

        step = step_to_norm(look, 1.0, 1.0, 3.0, 1e-12, exact_slope=exact_slope)
        assert step == pytest.approx(math.log(3.0))
        return weakref.ref(look)

    gc.collect()
    gc.disable()
    try:
        assert search()() is None
    finally:
        gc.enable()
