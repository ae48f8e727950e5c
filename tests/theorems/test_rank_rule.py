"""The rank rule: what it promises, what it does not depend on, and what it cannot promise (T9)."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from teleport import data
from teleport.layers.one_hot import AxisSpace
from teleport.layers.shared_weight import TiedBasis
from teleport.runtime.precision import sum_rounding
from teleport.subspace import Basis, RowSpace, numerical_rank, rank_cut
from tests.support.strategies import seeds

DTYPES = (torch.float64, torch.float32)
GRAY = 1.5
"""By how much a singular value of `graded` must miss the cut: computed ones are wrong by less."""


@dataclass(frozen=True)
class Graded:
    """Rows with known singular values: a few powers of ten, in random directions, in float64."""

    count: int
    width: int
    powers: tuple[float, ...]
    seed: int

    @property
    def values(self) -> Tensor:
        return torch.tensor([10.0**power for power in self.powers], dtype=torch.float64)

    def build(self) -> Tensor:
        rank = len(self.powers)
        left, right = (
            orthonormal(size, self.seed + place)[:, :rank]
            for place, size in enumerate((self.count, self.width))
        )
        return (left * self.values) @ right.T


def orthonormal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(square).Q


@st.composite
def graded(draw: st.DrawFn, lowest: float = -12.0) -> Graded:
    """Fewer and more rows than columns; singular values from 1 down to ``10 ** lowest``."""
    count, width = draw(st.integers(1, 14)), draw(st.integers(1, 20))
    most = min(count, width)
    powers = draw(st.lists(st.floats(lowest, 0.0), min_size=1, max_size=most))
    return Graded(count, width, tuple(powers), draw(seeds))


def space_of(rows: Tensor, dtype: torch.dtype = torch.float64) -> RowSpace:
    """Of rows that are exact as they stand, for a layer that computes in ``dtype``.

    Through a Gram matrix for single precision, as the rows of such a layer are.
    """
    space = RowSpace()
    if dtype == torch.float64:
        space.add(rows)
        return space
    return RowSpace.of_gram(rows.mT @ rows, rows.shape[-2], dtype)


def basis_of(rows: Tensor, dtype: torch.dtype = torch.float64, tau: float = 1.0) -> Basis:
    return space_of(rows, dtype).basis(tau)


def clear(rows: Tensor, dtype: torch.dtype) -> bool:
    """No singular value is so near the cut that rounding decides."""
    values = torch.linalg.svdvals(rows)
    share = values / rank_cut(values, rows.shape[-1], dtype)
    return not bool(((share > 1 / GRAY) & (share < GRAY)).any())


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


# --- What the rule does not depend on ------------------------------------------------------------


@pytest.mark.verifies("thm-rank")
@pytest.mark.parametrize("dtype", DTYPES)
@given(case=graded(), times=st.integers(2, 300))
@example(case=Graded(14, 3, (0.0, -5.0), 0), times=200)
@example(case=Graded(14, 3, (0.0, -14.0), 0), times=200)
def test_repeating_the_batch_changes_no_rank(dtype: torch.dtype, case: Graded, times: int) -> None:
    """The rule of `numpy.linalg.matrix_rank` multiplies its cut by ``times``."""
    rows = case.build()
    assume(clear(rows, dtype))
    assert basis_of(rows.repeat(times, 1), dtype).rank == basis_of(rows, dtype).rank


@pytest.mark.verifies("thm-rank")
@pytest.mark.parametrize("dtype", DTYPES)
@given(case=graded(), seed=seeds, power=st.integers(-60, 60), zeros=st.integers(0, 100))
@example(case=Graded(14, 3, (0.0, -5.5), 0), seed=0, power=0, zeros=100)
def test_order_basis_scale_and_empty_rows_change_no_rank(
    dtype: torch.dtype, case: Graded, seed: int, power: int, zeros: int
) -> None:
    rows = case.build()
    assume(clear(rows, dtype))
    rank, width = basis_of(rows, dtype).rank, rows.shape[1]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    assert basis_of(rows[order], dtype).rank == rank
    assert basis_of(rows @ orthonormal(width, seed), dtype).rank == rank
    assert basis_of(orthonormal(len(rows), seed) @ rows, dtype).rank == rank
    assert basis_of(2.0**power * rows, dtype).rank == rank
    assert basis_of(torch.cat([rows, rows.new_zeros(zeros, width)]), dtype).rank == rank


@pytest.mark.verifies("thm-rank")
def test_the_same_images_have_the_same_rank_however_often_they_are_seen() -> None:
    """One less than there are; the rule of NumPy finds 552, 454 and 200."""
    images = data.load("mnist-sample").train_inputs[:784]
    space = RowSpace()
    space.add(torch.cat([images, images.new_ones(784, 1)], dim=1))
    gram = space.gram()
    for times in (1, 32, 200):
        assert RowSpace.of_gram(times * gram, times * 784, torch.float32).basis().rank == 560


@pytest.mark.verifies("thm-rank")
def test_the_rule_is_not_monotone_in_the_data() -> None:
    """Larger rows raise the layer's own rounding, and a small direction goes under in it."""
    small = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1e-6, 0.0]], dtype=torch.float64)
    large = torch.tensor([[0.0, 0.0, 1e3]], dtype=torch.float64)
    assert basis_of(small, torch.float32).rank == 2
    assert basis_of(torch.cat([small, large]), torch.float32).rank == 2  # of 3
    assert basis_of(torch.cat([small, 1e8 * large]), torch.float32).rank == 1


# --- What it promises ----------------------------------------------------------------------------


@pytest.mark.verifies("thm-rank")
@pytest.mark.parametrize("dtype", DTYPES)
@given(case=graded(), seed=seeds, d_out=st.integers(1, 5))
@example(case=Graded(14, 2, (0.0, -6.0), 0), seed=0, d_out=1)
def test_a_free_move_changes_the_outputs_by_no_more_than_its_norm_times_the_cut(
    dtype: torch.dtype, case: Graded, seed: int, d_out: int
) -> None:
    """``‖ΔW P Rᵀ‖_F ≤ ‖ΔW‖_F c``; in a Gram matrix up to its own resolution."""
    rows = case.build()
    basis, width = basis_of(rows, dtype), rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    move = torch.randn(d_out, width, generator=generator, dtype=torch.float64)
    free = basis.project(move)
    cut = float(rank_cut(torch.linalg.svdvals(rows), width, dtype))
    resolved = (1e-14 if dtype == torch.float64 else 5e-8) * norm(rows)
    assert norm(free @ rows.T) <= norm(free) * (cut + resolved) + 1e-15 * norm(move) * norm(rows)
    assert norm(free @ rows.T) <= norm(free) * (basis.cut_off + resolved) + 1e-14 * norm(move)


@pytest.mark.verifies("thm-rank")
@given(st.integers(2, 40), st.integers(2, 40), seeds)
def test_the_bound_is_reached_by_a_direction_at_the_cut(count: int, width: int, seed: int) -> None:
    """Not vacuous: one direction just below the cut, and a move along it."""
    cut = sum_rounding(torch.float32, width)
    case = Graded(count, width, (0.0, math.log10(0.99 * cut)), seed)
    rows = case.build()
    basis = basis_of(rows, torch.float32)
    move = orthonormal(width, seed + 1)[:, 1][None]
    assert basis.rank == 1
    assert norm(basis.project(move) @ rows.T) == pytest.approx(0.99 * cut, rel=1e-5)
    assert 0.9 * cut < basis.cut_off <= cut * (1 + 1e-9)


@pytest.mark.verifies("thm-rank")
@given(st.integers(1, 300), st.integers(1, 60), st.integers(1, 20), seeds)
def test_a_layer_rounds_by_less_than_the_cut_times_the_norm_of_its_weights(
    d_in: int, count: int, d_out: int, seed: int
) -> None:
    """``λ c ‖W‖_F`` with λ = 2, in float32, against the same product in float64."""
    generator = torch.Generator().manual_seed(seed)
    rows, weight = (torch.randn(size, d_in, generator=generator) for size in (count, d_out))
    exact = rows.double() @ weight.double().T
    wrong = norm((rows @ weight.T).double() - exact)
    cut = float(rank_cut(torch.linalg.svdvals(rows.double()), d_in, torch.float32))
    assert wrong <= 2 * cut * norm(weight.double())


@pytest.mark.verifies("thm-rank")
@given(case=graded(lowest=-5.0), seed=seeds)
def test_rounded_rows_have_no_larger_rank_and_with_a_gap_the_same(case: Graded, seed: int) -> None:
    """Rows that were rounded to single precision, whose singular values are far above rounding."""
    rows = case.build()
    stored = rows.float()
    space = RowSpace()
    space.add(stored)
    rank, cut = space.basis().rank, float(rank_cut(case.values, case.width, torch.float32))
    assert rank <= len(case.powers)
    if float(case.values.min()) > 1.5 * cut + 1e-7 * norm(rows):
        assert rank == len(case.powers)


@pytest.mark.verifies("thm-rank")
@given(st.lists(st.floats(-9.0, 0.0), min_size=1, max_size=12), st.integers(1, 5000))
def test_nothing_is_cut_that_the_rule_of_numpy_keeps(powers: list[float], more: int) -> None:
    """``√d eps ‖R‖_F ≤ max(n, d) eps σ₁``: the rule only ever keeps more."""
    values = torch.tensor(sorted((10.0**p for p in powers), reverse=True), dtype=torch.float64)
    width, count = len(powers), len(powers) + more
    numpy = int((values > count * torch.finfo(torch.float32).eps * values[0]).sum())
    assert int(numerical_rank(values, width, torch.float32)) >= numpy


@pytest.mark.verifies("thm-rank")
@given(case=graded(), factor=st.floats(1e-9, 1e9))
def test_every_group_has_a_cut_of_its_own(case: Graded, factor: float) -> None:
    """Inputs of one group do not reach the outputs of another, nor their rounding."""
    rows = case.build()
    assume(clear(rows, torch.float64))
    alone = basis_of(rows)
    both = basis_of(torch.stack([rows, factor * rows]))
    assert both.ranks.tolist() == [alone.rank, alone.rank]


@pytest.mark.verifies("thm-rank")
@given(st.integers(2, 9), st.integers(1, 8), st.integers(1, 3000), st.booleans(), seeds)
@example(33, 1, 20_000, False, 2)
@example(9, 1, 20_000, True, 4)
def test_rows_that_are_exactly_dependent_have_their_rank_in_double_precision(
    width: int, rank: int, count: int, uneven: bool, seed: int
) -> None:
    """However many there are: the QR factorization must not round by more than the cut.

    One factorization of all rows together does, tenfold.
    """
    rank = min(rank, width - 1, count)
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randint(-9, 10, size, generator=generator).double()
        for size in ((count, rank), (rank, width))
    )
    if uneven:
        left = left.abs()
        left[0] *= 1000
    rows = left @ right
    true = int(torch.linalg.matrix_rank(rows, rtol=1e-12))
    assert basis_of(rows).rank == true


def test_rows_of_two_precisions_count_as_the_coarser_in_any_order() -> None:
    rows = torch.diag(torch.tensor([1.0, 1e-3, 1e-9], dtype=torch.float64))
    more = torch.tensor([[1.0, 0.0, 0.0]]).repeat(5, 1)
    for pieces in ((rows.repeat(2, 1), more), (more, rows.repeat(2, 1))):
        space = RowSpace()
        for piece in pieces:
            space.add(piece)
        assert space.dtype == torch.float32
        assert space.basis().rank == 2
        values = space.basis().singular_values
        assert float(values[0]) == pytest.approx(math.sqrt(7), rel=1e-12)
        assert float(values[1]) == pytest.approx(math.sqrt(2) * 1e-3, rel=1e-6)


# --- The guard's share ---------------------------------------------------------------------------


@pytest.mark.verifies("thm-rank")
@pytest.mark.parametrize("dtype", DTYPES)
@given(case=graded(), tau=st.floats(0.5, 1.0))
def test_what_a_rank_rule_may_leave_out_is_never_more_than_the_cut(
    dtype: torch.dtype, case: Graded, tau: float
) -> None:
    """Whatever is left out for another reason does not widen what the guard allows."""
    basis = basis_of(case.build(), dtype, tau)
    cut = float(rank_cut(basis.singular_values, case.width, dtype))
    assert basis.cut_off <= min(cut, basis.residual)
    largest = max(basis.singular_values[basis.rank :].tolist(), default=0.0)
    assert basis.cut_off == min(cut, largest)


def test_tokens_that_are_counted_are_never_cut() -> None:
    space = AxisSpace(5)
    space.add(torch.tensor([0, 3]))
    tokens = space.basis()
    rows = basis_of(torch.eye(2, dtype=torch.float64))
    assert tokens.cut_off == 0.0
    assert TiedBasis(rows, tokens).cut_off == rows.cut_off


# --- Several batches -----------------------------------------------------------------------------


@pytest.mark.verifies("thm-rank", "thm-batch")
@pytest.mark.parametrize("dtype", DTYPES)
@given(cases=st.lists(graded(), min_size=2, max_size=4), seed=seeds)
def test_merged_bases_lose_at_most_a_cut_for_each_merge(
    dtype: torch.dtype, cases: list[Graded], seed: int
) -> None:
    """After m merges ``‖ΔW P Rᵀ‖_F ≤ √(m + 1) ‖ΔW‖_F c`` on all rows, c the cut for all of them."""
    width = cases[0].width
    batches = [Graded(c.count, width, c.powers[:width], c.seed).build() for c in cases]
    merged = basis_of(batches[0], dtype)
    for rows in batches[1:]:
        merged = merged.merge(basis_of(rows, dtype))
    rows = torch.cat(batches)
    cut = float(rank_cut(torch.linalg.svdvals(rows), width, dtype))
    generator = torch.Generator().manual_seed(seed)
    move = torch.randn(2, width, generator=generator, dtype=torch.float64)
    free, resolved = merged.project(move), (1e-14 if dtype == torch.float64 else 1e-7) * norm(rows)
    rounding = 2 * resolved * norm(free) + 1e-15 * norm(move) * norm(rows)
    assert norm(free @ rows.T) <= norm(free) * math.sqrt(len(batches)) * cut + rounding
    assert norm(free @ rows.T) <= norm(free) * merged.residual + rounding


@pytest.mark.verifies("thm-drift")
@given(first=graded(-2.0), second=graded(-2.0), tau=st.floats(0.3, 0.999), seed=seeds)
def test_merged_bases_remember_what_each_left_out(
    first: Graded, second: Graded, tau: float, seed: int
) -> None:
    """Below one the drift bound of the merged space holds on the rows of both."""
    width = first.width
    batches = [Graded(c.count, width, c.powers[:width], c.seed).build() for c in (first, second)]
    one, other = (basis_of(rows, tau=tau) for rows in batches)
    merged, rows = one.merge(other), torch.cat(batches)
    generator = torch.Generator().manual_seed(seed)
    any_move = torch.randn(2, width, generator=generator, dtype=torch.float64)
    move = merged.project(any_move)
    assert norm(move @ rows.T) <= merged.drift_bound(move) + 1e-13 * norm(rows) * norm(any_move)
    assert merged.residual >= math.hypot(one.residual, other.residual) * (1 - 1e-12)


@pytest.mark.verifies("thm-rank")
@pytest.mark.parametrize("dtype", DTYPES)
@given(case=graded(), cut_at=st.floats(0.0, 1.0))
def test_rows_joined_from_two_places_have_the_rank_of_all(
    dtype: torch.dtype, case: Graded, cut_at: float
) -> None:
    """As ranks do it: the sum of Gram matrices, or factors side by side."""
    rows = case.build()
    assume(clear(rows, dtype))
    at = round(cut_at * len(rows))
    parts = [space_of(part, dtype) for part in (rows[:at], rows[at:]) if len(part)]
    joined = RowSpace()
    for part in parts:
        joined.absorb(part)
    assert (joined.count, joined.dtype) == (len(rows), dtype)
    assert joined.basis().rank == basis_of(rows, dtype).rank
    if dtype != torch.float64:
        joined = RowSpace.of_gram(sum(part.gram() for part in parts), len(rows), dtype)
        assert joined.basis().rank == basis_of(rows, dtype).rank
