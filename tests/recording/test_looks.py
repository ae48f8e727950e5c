"""Between looks: parts of the squared norm where nobody looked are those that a look would find."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teleport.landscape import Landscape
from teleport.layers.support import cover
from teleport.line_search import _expected_miss
from teleport.objective import squared_norm
from teleport.recording import Looks, record
from teleport.recording.looks import AGREEING, BESIDE
from tests.support.examples import examples
from tests.support.networks import GRAPHS, task, without_dropout
from tests.support.strategies import seeds

few = examples(6)

parabolas = st.lists(st.tuples(*[st.floats(0.1, 10.0)] * 3), min_size=1, max_size=4)


@pytest.mark.verifies("thm-polynomial")
@given(parabolas, st.floats(0.05, 0.8), st.floats(-0.99, 0.99))
def test_shares_between_looks_are_exact_where_they_are_parabolas(
    parts: list[tuple[float, float, float]], first: float, beside: float
) -> None:
    def shares(step: float) -> dict[Any, float]:
        return {n: a + b * step + c * step**2 for n, (a, b, c) in enumerate(parts)}

    step = 1.0 + beside * BESIDE / 2
    looks = Looks([(where, shares(where)) for where in (9.0, 0.0, first, 1.0)])  # the last three
    found = looks.between(step, sum(shares(step).values()))
    assert found is not None
    assert all(abs(found[n] / share - 1) <= 1e-9 for n, share in shares(step).items())


def test_no_look_is_left_out_where_the_others_say_too_little() -> None:
    looks: list[tuple[float, Any]] = [(0.0, {1: 1.0}), (0.5, {1: 1.5}), (1.0, {1: 2.0})]
    assert Looks(looks).between(1.001, 2.001) is not None
    assert Looks(looks[1:]).between(1.001, 2.001) is None  # two of them
    assert Looks([looks[0], looks[2], looks[2]]).between(1.001, 2.001) is None
    assert Looks(looks).between(1.02, 2.02) is None  # far from the last
    assert Looks(looks).between(1.001, 2.001 * (1 + AGREEING / 2)) is not None
    assert Looks(looks).between(1.001, 2.001 * (1 + 2 * AGREEING)) is None  # another sum
    assert Looks([*looks[:2], (1.0, {1: math.inf})]).between(1.001, 2.001) is None
    assert Looks().between(1.0, 1.0) is None


@given(seeds, st.floats(0.01, 1.0), st.floats(0.1, 10.0))
def test_shares_on_a_chord_are_the_squares_of_the_gradients_there(
    seed: int, u: float, end: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    g, h = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)

    def squares(gradient: torch.Tensor) -> dict[Any, float]:
        return dict(enumerate(gradient.square().sum(1).tolist()))

    there = squares((1 - u) * g + u * h)
    looks = Looks([(0.0, squares(g)), (end, squares(h))], chord=squares(h - g))
    found = looks.between(u * end, sum(there.values()))
    assert found is not None
    assert found == pytest.approx(there, rel=1e-9)
    total = sum(there.values())
    assert looks.between(u * end, total * (1 + AGREEING / 2)) is not None
    assert looks.between(u * end, total * (1 + 2 * AGREEING)) is None  # the gradients are no line
    assert looks.between(1.01 * end, total) is None  # beyond the look
    assert Looks([(0.1, squares(g)), looks.seen[1]], looks.chord).between(u * end, total) is None
    assert Looks(looks.seen).between(u * end, total) is None


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("inside", [True, False])
@few
@given(seed=seeds)
def test_distances_are_those_of_two_gradients(name: str, inside: bool, seed: int) -> None:
    """Of all blocks moved or of the last alone; not known where a changed one was not formed."""
    problem = task(name, seed)
    without_dropout(problem.model)
    tape = record(problem.model, cover(problem.model).sites, problem.closure)
    tape.shares()
    first, plain = tape.formed(), [tape.weight_gradient(block).clone() for block in tape.blocks]
    others = [g.clone() for g in tape.other_gradients]
    moving = [b for b in tape.blocks if inside or tape.calls_of(b)[-1] is tape.calls[-1]]
    for block in moving:
        block.part.write(0.5 * block.part.matrix())
    tape.backward()
    found = tape.distances(first, moving)
    wanted: dict[Any, float] = {
        b: squared_norm(tape.weight_gradient(b) - g)
        for b, g in zip(tape.blocks, plain, strict=True)
    }
    for p, g, earlier in zip(tape.others, tape.other_gradients, others, strict=True):
        wanted[p] = squared_norm(g - earlier)
    changed = [b for b in tape.blocks if wanted[b] > 0.0]
    if found is None:
        assert any(b not in first for b in changed)
    else:
        assert found.keys() == wanted.keys()
        assert all(abs(found[n] - wanted[n]) <= 1e-12 * (1 + wanted[n]) for n in wanted)
    assert (found is not None) or inside or any(b not in first for b in changed)


@pytest.mark.verifies("thm-polynomial")
@pytest.mark.parametrize("name", GRAPHS)
@few
@given(
    seed=seeds,
    growth=st.floats(1.05, 3.0),
    head=st.sampled_from([0.01, 0.1, 1.0, 10.0]),
    damped=st.sampled_from([0.0, 0.001, 0.03, 1.0]),
)
def test_after_one_look_the_parabola_misses_by_no_more_than_estimated(
    name: str, seed: int, growth: float, head: float, damped: float
) -> None:
    """A small head makes the slope small beside what it becomes: the estimate must know of that.

    The moves of all but the largest are damped, so that there is something to leave out.
    """
    problem = task(name, seed)
    without_dropout(problem.model)
    sites = cover(problem.model).sites
    with torch.no_grad():
        sites[-1].blocks[0].part.weight.parameter.mul_(head)
    landscape = Landscape(problem.model, sites, [problem.closure], frozen=True)
    full = landscape.tangent_direction(landscape.bases(landscape.blocks, 1.0))
    squares = {block: squared_norm(matrix) for block, matrix in full.items()}
    most = max(squares, key=lambda block: squares[block])
    if squares[most] == 0.0 or landscape.degree([most]) != 2:
        return
    weight = {block: 1.0 if block is most else damped**0.5 for block in full}
    along = {block: weight[block] * matrix for block, matrix in full.items() if weight[block]}
    slope = sum(weight[block] * squares[block] for block in along)
    mixed = 1.0 - squares[most] / slope
    target = growth**2 * (start := landscape.norm_squared())
    guess = start / slope * (growth - 1.0)
    first, last = start / target - 1.0, landscape.norm_squared_at(along, guess) / target - 1.0
    a, b = (last - first) / guess**2 - 2 * slope / target / guess, 2 * slope / target
    step = -2 * first / (b + math.sqrt(b * b - 4 * a * first))
    estimate = _expected_miss([(0.0, first), (guess, last)], b, step, mixed)
    miss = landscape.norm_squared_at(along, step) / target - 1.0
    assert abs(miss) <= estimate + 1e-9
