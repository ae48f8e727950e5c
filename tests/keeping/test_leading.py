"""Leading directions by float32, counted by the energies that they have."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from teleport import null_space
from teleport.errors import NonFiniteInputError
from teleport.keeping import leading as leading_module
from teleport.keeping.leading import ENOUGH, leading_basis
from teleport.subspace import Basis, RowSpace, row_space
from tests.support.examples import examples
from tests.support.strategies import seeds

few = examples(25)


@pytest.fixture(autouse=True, scope="module")
def narrow() -> Iterator[None]:
    """What serves wide layers alone is tried on narrow ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leading_module, "WIDE", 1)
        yield


def rows_of(seed: int, d: int, decay: float, *groups: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(*groups, 2 * d + 1, d, generator=draws)
    return rows * torch.arange(1, d + 1).pow(-decay)


def space_of(rows: Tensor) -> RowSpace:
    space = RowSpace()
    space.add(rows)
    return space


def leading(rows: Tensor, tau: float) -> Basis:
    basis = leading_basis(space_of(rows), tau)
    assert basis is not None
    return basis


@few
@given(seeds, st.integers(2, 40), st.floats(0.0, 3.0), st.floats(0.05, ENOUGH), st.integers(0, 2))
def test_the_share_is_kept_by_the_fewest_directions_and_the_rest_is_known(
    seed: int, d: int, decay: float, tau: float, groups: int
) -> None:
    rows = rows_of(seed, d, decay, *[2] * groups)
    basis, exact = leading(rows, tau), rows.double()
    vectors = basis.vectors
    total = exact.square().sum((-2, -1))
    left = (exact - (exact @ vectors) @ vectors.mT).square().sum((-2, -1))
    assert bool((left <= (1 - tau + 1e-12) * total).all())
    assert basis.residual**2 == pytest.approx(float(left.sum()), abs=1e-12 * float(total.sum()))
    # With one direction less the best choice of all would not do, to what float32 tells apart.
    energies = torch.linalg.svdvals(exact).square()
    before = torch.arange(d) < basis.ranks[..., None] - 1
    assert bool(((energies * before).sum(-1) < (tau + 1e-5) * total).all())
    inner = vectors.mT @ vectors
    assert float((inner - inner.round()).abs().max()) < 1e-13
    assert torch.equal(inner.diagonal(dim1=-2, dim2=-1).round().sum(-1).long(), basis.ranks)


@few
@given(seeds, st.floats(0.5, 0.9), st.floats(0.01, 0.4))
def test_smaller_shares_and_merged_spaces_are_as_of_all_directions(
    seed: int, tau: float, less: float
) -> None:
    rows = rows_of(seed, 12, 1.0)
    basis, whole = leading(rows, tau), space_of(rows).basis(tau)
    assert basis.at(tau - less).rank == whole.at(tau - less).rank
    one, two = basis.merge(basis), whole.merge(whole)
    assert one.rank == two.rank
    assert (one.vectors @ one.vectors.mT - two.vectors @ two.vectors.mT).abs().max() < 1e-3
    assert one.residual == pytest.approx(two.residual, rel=1e-5)
    with pytest.raises(ValueError, match="of which"):
        basis.at(1.0)


def test_where_it_does_not_serve_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(0, 6, 1.0)
    assert leading_basis(space_of(rows), 1.0) is None
    assert leading_basis(space_of(rows.double()), 0.9) is None
    assert leading_basis(space_of(rows[:6]), 0.9) is None
    assert leading(torch.zeros(9, 4), 0.9).rank == 0
    with pytest.raises(NonFiniteInputError):
        leading(rows * torch.inf, 0.9)
    monkeypatch.setattr(leading_module, "WIDE", 7)
    assert leading_basis(space_of(rows), 0.9) is None


def test_a_null_space_takes_it() -> None:
    model, x = torch.nn.Linear(9, 2, bias=False), rows_of(1, 9, 2.0)
    basis = null_space(model, [lambda: model(x)], 0.9).bases[""]
    assert isinstance(basis, Basis)
    assert torch.equal(basis.vectors, leading(x, 0.9).vectors)
    assert len(basis.singular_values) < 9


def test_a_gram_matrix_by_blocks_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_space, "BLOCK", 3)
    for d in (5, 6, 7, 11):
        rows = rows_of(d, d, 0.5, 2)
        wanted = rows.double().mT @ rows.double()
        space = space_of(rows)
        for times in (1, 2, 3):  # one triangle is made symmetric to be read, and added to again
            found = space.gram()
            assert (found - times * wanted).abs().max() <= 1e-14 * times * wanted.abs().max()
            space.add(rows)
