"""Spaces merged by a share of the second's energy: Gradient Projection Memory's rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from teleport import NullSpaceError
from teleport.keeping.joint import kept_by_both
from teleport.keeping.keeper import _Ready
from teleport.layers.one_hot import AxisBasis
from teleport.subspace import Basis, RowSpace
from tests.support.examples import examples
from tests.support.strategies import seeds

few = examples(20)


def rows_of(seed: int, count: int, d: int, *groups: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(*groups, count, d, generator=draws, dtype=torch.float64)
    return rows * torch.arange(1, d + 1, dtype=torch.float64).pow(-1.5)


def basis_of(rows: Tensor, tau: float = 1.0) -> Basis:
    space = RowSpace()
    space.add(rows)
    return space.basis(tau)


def kept(basis: Basis, rows: Tensor) -> float:
    return float((rows @ basis.vectors).square().sum() / rows.square().sum())


@few
@given(seeds, st.integers(2, 9), st.floats(0.3, 0.999), st.floats(0.3, 0.999))
def test_the_share_is_kept_by_the_fewest_directions_beyond_the_first_space(
    seed: int, d: int, first: float, tau: float
) -> None:
    old, new = rows_of(seed, 6, d), rows_of(seed + 1, 5, d)
    one, two = basis_of(old, first), basis_of(new)
    both = kept_by_both(one, two, tau)
    assert isinstance(both, Basis)
    assert torch.allclose(both.vectors.mT @ both.vectors, torch.eye(both.rank).double(), atol=1e-9)
    assert (both.vectors @ (both.vectors.mT @ one.vectors) - one.vectors).abs().max() < 1e-9
    assert kept(both, new) >= tau - 1e-9
    # Written out: the leading directions of what the first space leaves of the new rows.
    rest = new - (new @ one.vectors) @ one.vectors.mT
    energies = torch.linalg.svdvals(rest).square()
    more = both.rank - one.rank
    if more:
        without = 1 - float(energies[more - 1 :].sum() / new.square().sum())
        assert without < tau + 1e-9
    lost = (old - (old @ both.vectors) @ both.vectors.mT).square().sum()
    lost_new = (new - (new @ both.vectors) @ both.vectors.mT).square().sum()
    # What the first space left out counts in full: more of it may be inside the joint one.
    left = (old - (old @ one.vectors) @ one.vectors.mT).square().sum()
    assert lost <= left + 1e-9
    assert both.residual**2 == pytest.approx(float(left + lost_new), abs=1e-9)


@few
@given(seeds, st.floats(0.3, 0.999))
def test_groups_take_what_each_of_them_needs(seed: int, tau: float) -> None:
    old, new = rows_of(seed, 3, 6, 2), rows_of(seed + 1, 4, 6, 2)
    both = kept_by_both(basis_of(old, 0.8), basis_of(new), tau)
    for group in range(2):
        single = kept_by_both(basis_of(old[group], 0.8), basis_of(new[group]), tau)
        assert isinstance(both, Basis)
        assert isinstance(single, Basis)
        ours = both.vectors[group] @ both.vectors[group].mT
        assert torch.allclose(ours, single.vectors @ single.vectors.mT, atol=1e-8)


def test_at_1_all_is_kept_and_embeddings_have_no_share() -> None:
    one, two = basis_of(rows_of(0, 2, 5)), basis_of(rows_of(1, 2, 5))
    assert kept_by_both(one, two).rank == 4
    axes = AxisBasis(torch.tensor([True, False]), torch.tensor([2.0, 0.0]))
    with pytest.raises(NullSpaceError, match="give both spaces their tau"):
        kept_by_both(axes, axes, 0.9)
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="tau must be in"):
            kept_by_both(one, two, wrong)


@few
@given(seeds, st.integers(1, 9), st.sampled_from([torch.float32, torch.float64]))
def test_a_prepared_projection_is_that_of_the_basis(
    seed: int, rank: int, dtype: torch.dtype
) -> None:
    """Whichever of the two products is smaller, also where little is left of the matrix."""
    basis = basis_of(rows_of(seed, rank, 10))
    ready, matrix = _Ready(basis), rows_of(seed + 1, 4, 10).to(dtype)
    inside = (matrix @ basis.vectors.to(dtype)) @ basis.vectors.mT.to(dtype)
    for each in (matrix, inside + 1e-6 * matrix):
        expected, found = basis.project(each), ready.project(each)
        assert found.dtype == dtype
        assert (found - expected).abs().max() <= 16 * torch.finfo(dtype).eps * each.norm()
        assert (found.double() @ basis.vectors).norm() <= 8 * torch.finfo(dtype).eps * each.norm()
    again = ready.project(matrix)
    assert torch.equal(again, ready.project(matrix)), "nothing is changed by use"
