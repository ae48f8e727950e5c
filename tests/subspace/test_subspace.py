"""Row spaces: rank, basis, projector, energy rule (T9, and the projector of T3)."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from teleport.subspace import (
    Basis,
    RowSpace,
    aligned_mm,
    energy_rank,
    numerical_rank,
    products_of_rows,
)
from teleport.subspace.row_space import BLOCK, NARROW, WAITING
from tests.support.strategies import Rows, rows_of_rank, seeds

EPS = torch.finfo(torch.float64).eps
TOLERANCE = 1e3 * EPS
"""For projectors of at most 9 x 9: a few dozen roundings, and an SVD or QR in front of them."""

GRAM_TOLERANCE = 1e-6
"""A float64 Gram resolves directions to eps / σ², and σ ≥ 1e-4 of the largest for our integers."""


def basis_of(rows: Tensor, tau: float = 1.0) -> Basis:
    space = RowSpace()
    space.add(rows)
    return space.basis(tau)


def projector(basis: Basis) -> Tensor:
    """P as a matrix: what `Basis.project` does to the unit vectors."""
    return basis.project(torch.eye(basis.vectors.shape[0], dtype=torch.float64))


def spectral(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2)) if matrix.numel() else 0.0


@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2 * NARROW)),
    st.booleans(),
)
def test_an_aligned_product_is_that_of_matmul_with_aligned_rows(
    groups: list[int], sizes: tuple[int, int, int], transposed: bool
) -> None:
    rows, inner, width = sizes
    left = torch.arange(1.0, 1 + rows * inner).reshape(rows, inner).expand(*groups, rows, inner)
    right = torch.ones(inner, width).cumsum(-1).expand(*groups, inner, width)
    left = left.mT.contiguous().mT if transposed else left
    found = aligned_mm(left, right)
    assert torch.equal(found, left @ right)
    assert found.dtype == left.dtype
    if rows > 1 and width >= NARROW:
        assert found.stride(-2) == -(-width // 8) * 8


def test_an_aligned_product_is_left_to_matmul_where_something_watches() -> None:
    left, right = torch.ones(2, 3), torch.ones(3, NARROW + 1)
    wanted = left @ right
    assert torch.equal(aligned_mm(left[0], right), wanted[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert aligned_mm(left, right).dtype == torch.bfloat16
        assert aligned_mm(left.bfloat16(), right).dtype == torch.bfloat16
    _, forward = torch.func.jvp(lambda left: aligned_mm(left, right), (left,), (left,))
    assert torch.equal(forward, wanted)
    with dual_level():
        assert torch.equal(unpack_dual(aligned_mm(make_dual(left, left), right)).tangent, wanted)
    assert torch.equal(torch.func.vmap(aligned_mm, (0, None))(left[None], right)[0], wanted)
    left.requires_grad_()
    aligned_mm(left, right).sum().backward()
    assert torch.equal(left.grad, torch.full((2, 3), NARROW + 1.0))


@given(rows_of_rank())
def test_basis_vectors_are_orthonormal(case: Rows) -> None:
    vectors = basis_of(case.build()).vectors
    assert vectors.dtype == torch.float64
    assert spectral(vectors.T @ vectors - torch.eye(vectors.shape[1])) <= TOLERANCE


@pytest.mark.verifies("thm-rank")
@given(rows_of_rank())
def test_rank_and_null_dimension_are_right(case: Rows) -> None:
    basis = basis_of(case.build())
    assert (basis.rank, basis.null_dim) == (case.rank, case.width - case.rank)


@pytest.mark.verifies("thm-layerwise")
@given(rows_of_rank())
def test_projector_is_idempotent_and_self_adjoint(case: Rows) -> None:
    p = projector(basis_of(case.build()))
    assert spectral(p @ p - p) <= TOLERANCE
    assert spectral(p - p.T) <= TOLERANCE


@pytest.mark.verifies("thm-layerwise")
@given(rows_of_rank(), seeds)
def test_projector_never_lengthens(case: Rows, seed: int) -> None:
    matrix = torch.randn(3, case.width, generator=torch.Generator().manual_seed(seed)).double()
    projected = basis_of(case.build()).project(matrix)
    assert projected.norm() <= (1 + TOLERANCE) * matrix.norm()


@pytest.mark.verifies("thm-layerwise")
@given(rows_of_rank())
def test_projector_has_the_rank_of_the_null_space(case: Rows) -> None:
    trace = float(projector(basis_of(case.build())).trace())
    assert abs(trace - (case.width - case.rank)) <= TOLERANCE


@given(rows_of_rank())
def test_projector_kills_the_inputs(case: Rows) -> None:
    rows = case.build().double()
    left = basis_of(case.build()).project(rows)
    tolerance = TOLERANCE if case.dtype == torch.float64 else GRAM_TOLERANCE
    assert left.norm() <= tolerance * rows.norm()


@given(rows_of_rank(), seeds)
def test_projector_keeps_what_is_perpendicular_to_the_inputs(case: Rows, seed: int) -> None:
    rows = case.build()
    matrix = torch.randn(3, case.width, generator=torch.Generator().manual_seed(seed)).double()
    perpendicular = matrix - matrix @ torch.linalg.pinv(rows.double()) @ rows.double()
    kept = basis_of(rows).project(perpendicular)
    assert (kept - perpendicular).norm() <= GRAM_TOLERANCE * matrix.norm()


@given(rows_of_rank(), st.data())
def test_rows_in_pieces_in_any_order_give_the_same_projector(
    case: Rows, data: st.DataObject
) -> None:
    rows = case.build()
    order = data.draw(st.permutations(range(case.count)), label="order")
    cuts = data.draw(st.lists(st.integers(0, case.count), max_size=4).map(sorted), label="cuts")
    space = RowSpace()
    for piece in rows[order].tensor_split(cuts):
        space.add(piece)
    difference = projector(space.basis()) - projector(basis_of(rows))
    assert spectral(difference) <= GRAM_TOLERANCE
    assert space.count == case.count


@given(rows_of_rank())
def test_asking_for_a_basis_twice_changes_nothing(case: Rows) -> None:
    space = RowSpace()
    space.add(case.build())
    first = projector(space.basis())
    space.basis(0.5)
    assert spectral(projector(space.basis()) - first) <= GRAM_TOLERANCE


@given(rows_of_rank())
def test_singular_values_are_those_of_the_rows(case: Rows) -> None:
    values = basis_of(case.build()).singular_values
    wanted = torch.linalg.svdvals(case.build().double())
    count = min(len(values), len(wanted))
    # The root of a Gram's rounding is √eps of the largest value.
    tolerance = (TOLERANCE if case.dtype == torch.float64 else 1e-7) * float(wanted[0])
    assert float((values[:count] - wanted[:count]).abs().max()) <= tolerance
    assert float(values[count:].sum()) <= 10 * tolerance


@given(rows_of_rank(), st.floats(0.01, 0.99))
def test_energy_rule_keeps_the_fewest_directions_that_reach_tau(case: Rows, tau: float) -> None:
    rows = case.build().double()
    values = torch.linalg.svdvals(rows).square().tolist()
    rank = basis_of(case.build(), tau).rank
    total, slack = math.fsum(values), 1e-9 * math.fsum(values)
    assert math.fsum(values[:rank]) >= tau * total - slack
    assert rank == 0 or math.fsum(values[: rank - 1]) < tau * total + slack


@given(rows_of_rank(), st.floats(0.01, 0.99))
def test_energy_outside_the_kept_space_is_at_most_one_minus_tau(case: Rows, tau: float) -> None:
    rows = case.build().double()
    left = basis_of(case.build(), tau).project(rows)
    # A Gram's rounding adds up to √eps of the norm.
    assert left.norm() <= (math.sqrt(1 - tau) + GRAM_TOLERANCE) * rows.norm()


@pytest.mark.verifies("thm-rank")
@given(
    st.integers(3, 40),
    st.integers(3, 40),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(0.05, 0.95),
    st.floats(1.05, 20.0),
)
def test_a_singular_value_below_the_cut_is_dropped_and_one_above_it_is_kept(
    count: int, width: int, dtype: torch.dtype, below: float, above: float
) -> None:
    """A diagonal matrix has its entries as singular values, whatever its rounding."""
    cut = width**0.5 * torch.finfo(dtype).eps
    if dtype == torch.float64:
        cut = max(cut, 4 * EPS)  # what the decomposition resolves
    rows = torch.zeros(count, width, dtype=dtype)
    rows[0, 2], rows[1, 0], rows[2, 1] = 1.0, cut * above, cut * below
    basis = basis_of(rows)
    assert basis.rank == 2
    kept = torch.zeros(width, dtype=torch.float64)
    kept[:3] = torch.tensor([1.0, 0.0, 1.0])
    assert spectral(projector(basis) - torch.diag(1 - kept)) <= TOLERANCE


@pytest.mark.verifies("thm-rank")
@given(st.integers(0, 4), st.sampled_from([torch.float32, torch.float64]))
def test_a_singular_value_equal_to_the_cut_is_dropped(exponent: int, dtype: torch.dtype) -> None:
    """Widths that are powers of 4, and squares of the cut that vanish beside 1: nothing rounds."""
    width = 16 * 4**exponent
    cut = 4 * 2.0**exponent * torch.finfo(dtype).eps
    scale = math.sqrt(1 + cut**2)  # what the norm rounds to
    for value, rank in ((cut * scale, 1), (cut * scale * (1 + 4 * EPS), 2)):
        values = torch.tensor([1.0, value], dtype=torch.float64)
        assert int(numerical_rank(values, width, dtype)) == rank


@pytest.mark.verifies("thm-rank")
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([torch.float32, torch.float64]))
def test_a_zero_matrix_has_rank_zero(count: int, width: int, dtype: torch.dtype) -> None:
    rows = torch.zeros(count, width, dtype=dtype)
    for tau in (1.0, 0.9):
        basis = basis_of(rows, tau)
        assert (basis.rank, basis.null_dim) == (0, width)
        assert torch.equal(projector(basis), torch.eye(width, dtype=torch.float64))


@pytest.mark.verifies("thm-rank")
def test_a_cumulated_float32_sum_gives_the_wrong_rank() -> None:
    """The failure of the naive rule that T9 replaces, in both directions."""

    def naive(values: Tensor) -> int:
        share = values.float().square() / values.float().square().sum()
        return int((share.cumsum(0) < 1.0).sum()) + 1

    equal, steep = torch.ones(41, dtype=torch.float64), torch.tensor([1.0, 1e-4]).double()
    assert naive(equal) == 42  # the cumulated sum ends below 1: more directions than there are
    assert naive(steep) == 1  # the second share vanishes beside 1, a thousand times above rounding
    assert int(numerical_rank(equal, 41, torch.float32)) == 41
    assert int(numerical_rank(steep, 2, torch.float32)) == 2


@pytest.mark.parametrize("tau", [0.0, -0.5, 1.0000001, math.nan, math.inf])
def test_tau_outside_its_range_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=r"tau must be in \(0, 1\], got"):
        basis_of(torch.eye(2), tau)


def test_a_basis_needs_rows() -> None:
    with pytest.raises(ValueError, match="at least one input row"):
        RowSpace().basis()


@given(st.integers(1, 6), st.floats(0.5, 1.0))
def test_energy_rank_of_equal_values_is_their_share(count: int, tau: float) -> None:
    """Small integers are exact, so "at least tau" is decided without rounding."""
    rank = energy_rank(torch.ones(count, dtype=torch.float64), tau)
    assert int(rank) == math.ceil(tau * count)


@pytest.mark.verifies("thm-drift")
@given(rows=rows_of_rank((torch.float64,)), tau=st.floats(0.3, 1.0), seed=seeds)
def test_outputs_drift_no_further_than_the_bound(rows: Rows, tau: float, seed: int) -> None:
    matrix = rows.build()
    basis = basis_of(matrix, tau)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(3, matrix.shape[1], generator=generator, dtype=torch.float64)
    move = basis.project(random)
    rounding = 1e-13 * matrix.norm() * random.norm()
    drift = (matrix @ move.T).norm()
    assert drift <= basis.drift_bound(move) + rounding
    assert (
        drift <= torch.linalg.matrix_norm(move, 2) * ((1 - tau) ** 0.5 * matrix.norm()) + rounding
    )


@pytest.mark.verifies("thm-drift")
def test_the_drift_bound_is_reached_along_the_one_direction_left_out() -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    basis = basis_of(matrix, 0.85)
    move = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    assert basis.rank == 1
    assert float((matrix @ move.T).norm()) == pytest.approx(basis.drift_bound(move), rel=1e-12)


@st.composite
def barely_full(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Rows in random directions, one direction shrunk by a drawn power of ten; how many are read.

    From full rank beyond doubt to no full rank at all.
    """
    width = draw(st.integers(1, 6))
    count = draw(st.integers(width, 12 * width))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    shrink = 10.0 ** draw(st.floats(-18, 0))
    generator = torch.Generator().manual_seed(draw(seeds))
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    rows[:, 0] *= shrink
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return (rows @ turn).to(dtype), draw(st.integers(1, count))


@pytest.mark.verifies("thm-rank")
@given(barely_full())
def test_reading_stops_early_only_where_all_rows_have_full_rank(
    case: tuple[torch.Tensor, int],
) -> None:
    rows, read = case
    some, all_ = RowSpace(), RowSpace()
    some.add(rows[:read])
    all_.add(rows)
    early = some.basis_if_full(float(rows.double().square().sum()))
    if early is not None:
        assert early.rank == all_.basis().rank == rows.shape[1]
        matrix = torch.randn(3, rows.shape[1], dtype=rows.dtype)
        assert not early.project(matrix).any()
    assert read >= rows.shape[1] or early is None


def test_reading_stops_early_on_plain_noise() -> None:
    rows = torch.randn(5000, 20)
    some = RowSpace()
    some.add(rows[:100])
    assert some.basis_if_full(float(rows.square().sum())) is not None


def test_groups_stop_together_or_not_at_all() -> None:
    rows = torch.randn(2, 100, 5)
    one_short = rows.clone()
    one_short[1, :, 0] = 0.0
    for given_rows, full in ((rows, True), (one_short, False)):
        space = RowSpace()
        space.add(given_rows)
        found = space.basis_if_full(float(given_rows.square().sum()))
        assert (found is not None) is full


@pytest.mark.verifies("thm-rank")
@given(
    st.integers(0, 3),
    st.integers(2, 8),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seeds,
    st.data(),
)
def test_inputs_that_are_always_zero_leave_the_basis_of_the_others(
    groups: int, width: int, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    """The same projector as by decomposing, to rounding; the part read may show more zeros."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*[groups] * (groups > 0), 40, width)
    rows = torch.randn(shape, generator=generator)
    for group in range(max(groups, 1)):
        dead = data.draw(st.sets(st.integers(0, width - 1), max_size=width))
        (rows[group] if groups else rows)[:, list(dead)] = 0.0
    late = data.draw(st.booleans())
    rows[..., :20, 0] *= not late  # nothing of this input but in rows that are not read
    rows = rows.to(dtype)
    some, whole = RowSpace(), RowSpace()
    some.add(rows[..., :20, :])
    whole.add(rows)
    live = (rows != 0).any(dim=-2)
    short = some.basis_if_full(float(rows.double().square().sum()), lambda: live)
    if late and bool(live[..., 0].any()):
        assert short is None
        return
    assert short is not None
    long = whole.basis()
    assert torch.equal(short.ranks, long.ranks)
    assert short.residual == short.cut_off == 0.0
    matrix = torch.randn(*shape[:-2], 3, width, generator=generator, dtype=torch.float64)
    assert (short.project(matrix) - long.project(matrix)).abs().max() <= 1e-12


def test_the_numbers_of_a_basis_need_no_vectors() -> None:
    space = RowSpace()
    space.add(torch.randn(2, 5, 9))
    basis = space.basis(0.9)
    bare = basis.numbers()
    assert (bare.rank, bare.null_dim, bare.shape) == (basis.rank, basis.null_dim, basis.shape)
    assert (bare.residual, bare.cut_off) == (basis.residual, basis.cut_off)
    assert bare.vectors.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(bare.project(torch.ones(2, 1, 9, dtype=torch.float64)).sum())


def test_inputs_that_are_zero_are_not_asked_for_where_there_are_none() -> None:
    space = RowSpace()
    space.add(torch.randn(50, 6))
    assert space.basis_if_full(1.0, lambda: pytest.fail("asked")) is not None


@st.composite
def few_rows(draw: st.DrawFn) -> torch.Tensor:
    """Fewer rows than columns in float32; the last one depends on the others to a drawn degree.

    Some have more columns than are taken at a time.
    """
    count = draw(st.integers(1, 8))
    width = count + draw(st.integers(1, 8) | st.sampled_from([BLOCK, 2 * WAITING]))
    generator = torch.Generator().manual_seed(draw(seeds))
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    if count > 1:
        rows[-1] = rows[:-1].sum(0) + 10.0 ** draw(st.floats(-12, 0)) * rows[-1]
    return rows.float()


@given(few_rows(), st.integers(1, 3))
def test_products_of_rows_are_taken_a_few_columns_at_a_time(rows: Tensor, groups: int) -> None:
    rows = rows.expand(groups, -1, -1) * torch.arange(1.0, groups + 1.0)[:, None, None]
    gram, wanted = products_of_rows(rows), rows.double() @ rows.double().mT
    assert gram.dtype == torch.float64
    assert bool(((gram - wanted).abs() <= 1e-14 * rows.shape[-1] * wanted.abs().max()).all())


@pytest.mark.verifies("thm-rank")
@given(few_rows())
def test_independent_rows_have_the_basis_of_the_decomposition(rows: torch.Tensor) -> None:
    """Where the short way answers, it is the same projector: orthonormal, of the same rank."""
    space = RowSpace()
    space.add(rows)
    gram = rows.double() @ rows.double().T
    short, long = space.basis_if_independent(gram), space.basis()
    assert (short is None) == (space.basis_if_independent() is None)
    assert space.basis_if_independent(0.0 * gram) is None  # it is the one that is given
    if short is None:
        return
    assert short.rank == long.rank == len(rows)
    assert short.residual == 0.0
    eye = torch.eye(len(rows), dtype=torch.float64)
    assert (short.vectors.T @ short.vectors - eye).abs().max() <= 1e-9
    matrix = torch.randn(4, rows.shape[1], dtype=torch.float64)
    assert (short.project(matrix) - long.project(matrix)).abs().max() <= 1e-8


def test_plainly_independent_rows_need_no_decomposition() -> None:
    space = RowSpace()
    space.add(torch.randn(50, 200))
    assert space.basis_if_independent() is not None
    space.add(torch.zeros(1, 200))
    assert space.basis_if_independent() is None


def bytes_held(space: RowSpace) -> int:
    file = io.BytesIO()
    torch.save(space, file)
    return file.tell()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_wait_in_no_more_memory_than_they_came_in_or_a_gram_matrix_takes(
    dtype: torch.dtype,
) -> None:
    """And few at a time once there is one: at most 256 rows of float64 here, for a factor."""
    width, piece, space = 128, 32, RowSpace()
    matrix, record = width**2 * 8, 5_000
    for count in range(piece, 12 * width, piece):
        space.add(torch.randn(piece, width).to(dtype))
        came = count * width * dtype.itemsize
        if came <= matrix:
            assert bytes_held(space) <= came + record
        waiting = min(matrix, 256 * width * dtype.itemsize)
        assert bytes_held(space) <= matrix + waiting + record


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(48, torch.bfloat16), (48, torch.float32), (1030, torch.bfloat16)],  # the last by blocks
)
def test_a_gram_matrix_is_that_of_all_rows_however_they_came(
    width: int, dtype: torch.dtype
) -> None:
    rows = torch.randn(width + 300, width).to(dtype)
    space = RowSpace()
    for some in rows.split([width + 20, 1, 4, 200, 75]):
        space.add(some)
        so_far = rows[: space.count].double()
        torch.testing.assert_close(space.gram(), so_far.T @ so_far, rtol=0, atol=1e-10)
    before = space.gram()
    space.gram().zero_()
    assert torch.equal(space.gram(), before)


def test_more_rows_than_columns_that_still_wait_are_decomposed_as_a_gram_matrix() -> None:
    rows = torch.randn(36, 24)
    few, reduced = RowSpace(), RowSpace.of_gram(rows.double().T @ rows.double(), 36, torch.float32)
    few.add(rows[:20])
    few.add(rows[20:])
    assert few.basis_if_independent() is None
    torch.testing.assert_close(few.basis().singular_values, reduced.basis().singular_values)
    assert few.basis().rank == few.factor().shape[-2] == 24


def test_rows_may_come_in_and_outside_of_inference_mode() -> None:
    rows, space, other = torch.randn(400, 16), RowSpace(), RowSpace()
    with torch.inference_mode():
        space.add(rows[:100].clone())
        other.add(rows[100:200].clone())
        space.absorb(other)
    space.add(rows[200:])
    whole = rows.double().T @ rows.double()
    torch.testing.assert_close(space.gram(), whole)
