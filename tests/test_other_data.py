"""T8: what a move does to data outside the teleport batch. Exact, then with the library."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sympy import Matrix, Rational, zeros
from torch import nn

import teleport
from tests import exact
from tests.strategies import seeds

ENTRIES = st.integers(-2, 2)


@st.composite
def integer_columns(draw: st.DrawFn, d: int, least: int, most: int) -> Matrix:
    """Integer inputs of ``d`` entries, one column each."""
    count = draw(st.integers(least, most))
    entries = draw(st.lists(ENTRIES, min_size=d * count, max_size=d * count))
    return Matrix(d, count, entries)


def second_moment(columns: Matrix) -> Matrix:
    return columns * columns.T * Rational(1, columns.cols)


@pytest.mark.verifies("thm-batch")
@given(integer_columns(4, 1, 3), integer_columns(4, 1, 5), integer_columns(4, 2, 2))
def test_the_mean_squared_drift_of_other_data_follows_from_their_second_moment(
    batch: Matrix, others: Matrix, rows: Matrix
) -> None:
    move = rows.T * exact.null_projector(batch)
    drift = move * others
    measured = sum(entry**2 for entry in drift) * Rational(1, others.cols)
    assert move * batch == zeros(2, batch.cols)
    assert (move * second_moment(others) * move.T).trace() == measured
    assert drift == move * exact.null_projector(batch) * others


@pytest.mark.verifies("thm-batch")
@given(integer_columns(4, 1, 2), integer_columns(4, 1, 2), integer_columns(4, 1, 5))
def test_a_larger_batch_leaves_other_data_no_more_energy_outside(
    batch: Matrix, more: Matrix, others: Matrix
) -> None:
    small, large = (exact.null_projector(m) for m in (batch, Matrix.hstack(batch, more)))
    assert (large * second_moment(others)).trace() <= (small * second_moment(others)).trace()
    assert large * small == large


@pytest.mark.verifies("thm-batch")
@given(integer_columns(3, 1, 8))
def test_at_most_d_inputs_have_a_part_outside_the_span_of_those_before(inputs: Matrix) -> None:
    new = 0
    for n in range(inputs.cols):
        outside = exact.null_projector(inputs[:, :n]) if n else Matrix.eye(3)
        new += outside * inputs[:, n] != zeros(3, 1)
    assert new == inputs.rank() <= 3


@pytest.mark.verifies("thm-batch")
@given(seeds, st.integers(2, 9), st.integers(1, 12))
def test_the_library_drifts_on_other_data_as_predicted(seed: int, count: int, size: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 2)).double()
    x, others = torch.randn(count, 3).double(), torch.randn(size, 3).double()
    seen = torch.cat([model[:2](others), torch.ones(size, 1)], dim=1).detach()
    before, head = model(others).detach(), _head(model)
    report = teleport.Teleporter(model, growth=2.0).step(lambda: model(x).square().mean())
    assert report.steps == 1
    move = _head(model) - head
    predicted = (move @ (seen.T @ seen / size) @ move.T).trace()
    measured = (model(others).detach() - before).square().sum(1).mean()
    assert abs(predicted - measured) <= 1e-11 * move.square().sum() * seen.square().sum()


def _head(model: nn.Sequential) -> torch.Tensor:
    return torch.cat([model[2].weight, model[2].bias[:, None]], dim=1).detach()
