"""thm-fast-weights: a matrix that learns while it reads meets its keys and queries, and no more."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import teleport
from teleport.lab.experiments.sequence import TTTLinear
from tests.support import exact
from tests.support.exact import Matrix, matrices
from tests.support.examples import examples
from tests.support.strategies import seeds

few = examples(20)
INNER: dict[str, Callable[[Matrix, Matrix], Matrix]] = {
    "squares": lambda z, v: z - v,
    "fourth powers": lambda z, v: (z - v) * (z - v) * (z - v),
    "products": lambda _, v: -v,
}
"""The derivative by z of inner losses: ``½ ‖z - v‖²``, ``¼ Σ (z - v)⁴``, ``-zᵀ v``."""


def read(
    start: Matrix, views: tuple[Matrix, Matrix, Matrix], size: int, inner: str
) -> tuple[Matrix, Matrix]:
    """``W_t q_t`` and ``W_t - W_0`` at the end, by gradient steps on ``W`` itself, token by token.

    The views hold a token in a column. Rates are 1/2, 1/3, ... .
    """
    q, k, v = views
    learned, batch, answers = start, start, []
    for t in range(q.shape[1]):
        if t % size == 0:
            batch = learned
        key, value = k[:, t : t + 1], v[:, t : t + 1]
        slope = INNER[inner](batch @ key, value) @ key.T
        learned = learned - Fraction(1, t + 2) * slope
        answers.append(learned @ q[:, t : t + 1])
    return np.hstack(answers), learned - start


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Matrix, tuple[Matrix, Matrix, Matrix], int, str]:
    width, tokens = draw(st.integers(3, 5)), draw(st.integers(1, 3))
    views = tuple(draw(matrices(width, tokens)) for _ in range(3))
    size = draw(st.integers(1, 3), label="inner batch")
    return draw(matrices(width, width)), views, size, draw(st.sampled_from(sorted(INNER)))


@pytest.mark.verifies("thm-fast-weights", exact=True)
@few
@given(sequences(), st.fractions(-9, 9, max_denominator=9), st.data())
def test_a_start_moved_off_keys_and_queries_learns_and_answers_the_same(
    case: tuple[Matrix, tuple[Matrix, Matrix, Matrix], int, str],
    step: Fraction,
    data: st.DataObject,
) -> None:
    start, views, size, inner = case
    free = exact.null_projector(np.hstack(views[:2]))
    moved = start + step * data.draw(matrices(*start.shape)) @ free
    answers, learned = read(start, views, size, inner)
    after, learned_after = read(moved, views, size, inner)
    assert np.array_equal(after, answers)
    assert np.array_equal(learned_after, learned)


@pytest.mark.verifies("thm-fast-weights", exact=True)
@few
@given(sequences(), st.data())
def test_off_the_keys_alone_it_learns_the_same_and_answers_move_with_the_queries(
    case: tuple[Matrix, tuple[Matrix, Matrix, Matrix], int, str], data: st.DataObject
) -> None:
    start, views, size, inner = case
    move = data.draw(matrices(*start.shape)) @ exact.null_projector(views[1])
    answers, learned = read(start, views, size, inner)
    after, learned_after = read(start + move, views, size, inner)
    assert np.array_equal(learned_after, learned)
    assert np.array_equal(after - answers, move @ views[0])


@pytest.mark.verifies("thm-fast-weights", exact=True)
def test_off_the_queries_alone_it_learns_something_else() -> None:
    """One key (0, 1), one query (1, 1): a move off the query changes what the key is taught."""
    start, v = exact.zeros(2, 2), exact.matrix([[0], [0]])
    q, k = exact.matrix([[1], [1]]), exact.matrix([[0], [1]])
    move = exact.matrix([[1, -1], [0, 0]])
    assert not (move @ q).any()
    answers, _ = read(start, (q, k, v), 1, "squares")
    after, learned = read(start + move, (q, k, v), 1, "squares")
    assert learned.tolist() == [[0, Fraction(1, 2)], [0, 0]]
    assert (after - answers).tolist() == [[Fraction(1, 2)], [0]]


@pytest.mark.verifies("thm-fast-weights", exact=True)
@few
@given(sequences())
def test_the_gradient_by_the_start_is_a_combination_of_keys_and_queries(
    case: tuple[Matrix, tuple[Matrix, Matrix, Matrix], int, str],
) -> None:
    start, views, size, inner = case

    def loss(weights: exact.Weights) -> exact.Number:
        answers, _ = read(weights[0], views, size, inner)
        return (answers * answers).sum()

    (slope,) = exact.gradient_by_definition(loss, [start])
    met = np.hstack(views[:2])
    assert exact.rank(np.hstack([met, slope.T])) == exact.rank(met)


def layer(seed: int, width: int, size: int, tokens: int) -> tuple[TTTLinear, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = TTTLinear(width, size).double()
        return made, torch.randn(2, tokens, width, dtype=torch.float64)


@pytest.mark.verifies("thm-fast-weights")
@examples(8)
@given(seeds, st.integers(2, 12), st.integers(1, 4), st.integers(1, 6))
def test_the_library_keeps_the_span_of_keys_and_queries(
    seed: int, width: int, size: int, tokens: int
) -> None:
    model, x = layer(seed, width, size, tokens)
    met: list[Tensor] = []
    model.start.register_forward_pre_hook(lambda _, inputs: met.append(inputs[0].detach()))
    model(x)
    rows = torch.cat([rows.flatten(0, 1) for rows in met])
    assert len(rows) == 2 * 2 * tokens
    basis = teleport.null_space(model, [lambda: model(x)]).bases["start"]
    assert basis.rank == min(width, len(rows))
    outside = torch.eye(width, dtype=torch.float64) - torch.linalg.pinv(rows) @ rows
    assert torch.allclose(basis.project(torch.eye(width).double()), outside, atol=1e-8)
    before = model(x).detach()
    with torch.no_grad():
        model.start.weight += 100 * torch.randn(width, width).double() @ outside
    assert torch.allclose(model(x), before, atol=1e-7)
