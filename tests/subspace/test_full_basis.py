"""A basis of all directions that is worked out only where somebody asks which they are."""

import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport import NullSpace, null_space
from teleport.errors import NonFiniteInputError
from teleport.subspace import Basis, FullBasis, RowSpace, full_basis
from tests.support.examples import examples
from tests.support.strategies import seeds

few = examples(50)


def space_of(rows: Tensor) -> RowSpace:
    space = RowSpace()
    space.add(rows)
    return space


def found(rows: Tensor) -> FullBasis:
    basis = full_basis(space_of(rows))
    assert basis is not None
    return basis


def decomposed(basis: FullBasis) -> bool:
    return basis.__dict__["_gram"] is None


@st.composite
def barely_full(draw: st.DrawFn) -> Tensor:
    """Rows of which one direction, in one group, has any size down to nothing."""
    width, groups = draw(st.integers(1, 7)), draw(st.sampled_from([(), (2,)]))
    draws = torch.Generator().manual_seed(draw(seeds))
    rows = torch.randn(*groups, 3 * width + 1, width, generator=draws, dtype=torch.float64)
    rows[(*[0] * len(groups), ..., 0)] *= draw(st.just(0.0) | st.floats(-9, 0).map(lambda e: 10**e))
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=draws, dtype=torch.float64))
    return (rows @ turn).float() * 10.0 ** draw(st.integers(-12, 12))


@pytest.mark.verifies("thm-rank")
@few
@given(barely_full())
def test_what_is_called_full_is_what_a_decomposition_finds(rows: Tensor) -> None:
    whole, basis = space_of(rows).basis(), full_basis(space_of(rows))
    if basis is None:
        # At most the rounding of float64 is between the certificate and the rule.
        values = torch.linalg.svdvals(rows.double())
        cut = 2e-15 * rows.shape[-1] + rows.shape[-1] * torch.finfo(rows.dtype).eps ** 2
        energy = float(rows.double().square().sum())
        assert bool((values[..., -1].square() <= 1.01 * cut * energy + 1e-300).any())
        return
    assert torch.equal(basis.ranks, whole.ranks)
    move = torch.randn(*rows.shape[:-2], 3, rows.shape[-1], dtype=torch.float64)
    same = ("rank", "null_dim", "shape", "dtype", "device", "residual", "cut_off")
    assert [getattr(basis, name) for name in same] == [getattr(whole, name) for name in same]
    assert not basis.project(move).any()
    assert basis.drift_bound(move) == whole.drift_bound(move) == 0.0
    if len(basis.shape) == 1:
        assert basis.free_directions().shape == whole.free_directions().shape
    assert not decomposed(basis)


@few
@given(seeds, st.integers(2, 7), st.sampled_from([(), (2,)]))
def test_the_directions_are_those_of_the_decomposition(
    seed: int, width: int, groups: tuple[int, ...]
) -> None:
    draws = torch.Generator().manual_seed(seed)
    rows = torch.randn(*groups, 5 * width, width, generator=draws)
    whole = space_of(rows).basis()
    for read in ("vectors", "singular_values"):
        basis = found(rows)
        assert torch.equal(getattr(basis, read), getattr(whole, read))
        assert decomposed(basis)  # the Gram matrix is let go
    for derived, expected in (
        (found(rows).at(0.7), whole.at(0.7)),
        (found(rows).merge(whole), whole.merge(whole)),
        (whole.merge(found(rows)), whole.merge(whole)),
        (copy.deepcopy(basis), whole),
        (pickle.loads(pickle.dumps(found(rows))), whole),
        (found(rows).to(torch.device("cpu")), whole),
        (basis.to(torch.device("cpu")), whole),
    ):
        assert torch.equal(derived.vectors, expected.vectors)
        assert torch.equal(derived.singular_values, expected.singular_values)
        assert torch.equal(derived.ranks, expected.ranks)
    assert found(rows).numbers().rank == whole.rank


def test_where_it_does_not_serve_it_says_so() -> None:
    rows = torch.randn(9, 4)
    assert full_basis(space_of(rows.double())) is None
    assert full_basis(space_of(rows[:4])) is None
    assert full_basis(space_of(torch.zeros(9, 4))) is None
    for wrong in (torch.inf, torch.nan):
        with pytest.raises(NonFiniteInputError):
            full_basis(space_of(rows * wrong))
    assert not found(rows).project(torch.tensor([[torch.nan, 1, 1, 1]])).isfinite().all()


def test_a_null_space_decomposes_nothing_to_keep_what_fills_all_directions(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)), torch.randn(60, 4)
    space = null_space(model, [partial(model, x)], progress=False)
    kept = [basis for basis in space.bases.values() if isinstance(basis, FullBasis)]
    assert len(kept) == 2
    before, model_before = [p.clone() for p in model.parameters()], copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters())
    with space.attach(optimizer):
        model(x).square().sum().backward()
        optimizer.step()
    space.project_(model)
    assert all(map(torch.equal, before, model.parameters()))
    assert space.report(model_before, model, [x]).locked == 1.0
    assert str(space)
    assert not any(map(decomposed, kept))
    space.save(tmp_path / "space")
    for name, basis in NullSpace.load(tmp_path / "space").bases.items():
        own = space.bases[name]
        assert isinstance(basis, Basis)
        assert isinstance(own, Basis)
        assert torch.equal(basis.vectors, own.vectors)
