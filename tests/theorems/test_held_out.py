"""T8 for the library: what a teleport does to data that were not in its batch."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from teleport import Teleporter, null_space
from tests.support.examples import examples
from tests.support.strategies import (
    NEVER_DEAD,
    Case,
    Problem,
    cases,
    layer_rows,
    network,
    seeds,
    with_bias,
)

EXACT = 1e-9
"""Relative error of two ways to compute one drift. P of 41 inputs at most is right to about
d^{3/2} eps = 6e-14; sums over few samples, and W as large as ΔW or larger, take the rest."""

few = examples(15)
roomy = cases(depths=(2, 4), biases=with_bias, roomy=True, activations=NEVER_DEAD)


def moved(problem: Problem, include: list[str] | None = None) -> list[Tensor]:
    """ΔW of every layer by a teleport of growth 2."""
    before = network(problem.model)
    report = Teleporter(problem.model, growth=2.0, include=include).step(problem.closure)
    assert not report.rolled_back, report.reason
    return [w - v for w, v in zip(network(problem.model), before, strict=True)]


def other_rows(problem: Problem, seed: int) -> list[Tensor]:
    """Input rows of every layer on other data, ten times as large as those of the batch."""
    torch.manual_seed(seed)
    x = 10 * torch.randn(20, problem.x.shape[-1], dtype=torch.float64)
    return layer_rows(replace(problem, x=x))


@pytest.mark.verifies("thm-batch")
@few
@given(roomy, seeds)
def test_on_other_inputs_a_layer_moves_by_their_free_part(case: Case, seed: int) -> None:
    problem = case.build()
    space = null_space(problem.model, [lambda: problem.model(problem.x)])
    rows = other_rows(problem, seed)
    moves = moved(problem)
    for move, x, basis in zip(moves, rows, space.bases.values(), strict=True):
        assert (x @ move.T - basis.project(x) @ move.T).norm() <= EXACT * x.norm() * (
            1 + move.norm()
        )


@pytest.mark.verifies("thm-batch")
@few
@given(roomy, seeds)
def test_the_mean_square_drift_of_the_output_is_predicted_by_the_second_moment(
    case: Case, seed: int
) -> None:
    """Only the last layer moves, so that its inputs on other data are the same after it."""
    problem = case.build()
    rows = other_rows(problem, seed)[-1]
    last = str(len(problem.model) - 1)
    head = problem.model[-1]
    before = head(rows[:, :-1]).detach()
    move = moved(problem, include=[last])[-1]
    mean_square = (head(rows[:, :-1]).detach() - before).square().sum() / len(rows)
    moment = rows.T @ rows / len(rows)
    predicted = (move @ moment @ move.T).trace()
    size = moment.trace() * move.square().sum()
    assert abs(mean_square - predicted) <= EXACT * (size + before.square().mean())
    assert size > 0


@pytest.mark.verifies("thm-batch")
@few
@given(cases(depths=(2, 3), biases=with_bias), st.integers(2, 5), seeds)
def test_more_data_leave_less_of_other_inputs_free(case: Case, parts: int, seed: int) -> None:
    problem = case.build()
    torch.manual_seed(seed)
    d = problem.x.shape[-1]
    chunks = [torch.randn(2, d, dtype=torch.float64) for _ in range(parts)]
    free = []
    for count in range(1, parts + 1):
        space = null_space(problem.model, [lambda x=x: problem.model(x) for x in chunks[:count]])
        rows = layer_rows(replace(problem, x=chunks[-1]))
        pairs = list(zip(rows, space.bases.values(), strict=True))
        free.append([float(basis.project(x).norm() / x.norm()) for x, basis in pairs])
    for fewer, more in pairwise(free):
        assert all(b <= a + EXACT for a, b in zip(fewer, more, strict=True))
    assert max(free[-1]) <= EXACT  # by then the inputs themselves are in the batch
