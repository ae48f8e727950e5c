"""Leading directions by float32, counted by the energies that they have."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from threading import Event
from typing import Any

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from teleport import null_space
from teleport.errors import NonFiniteInputError
from teleport.keeping import leading as leading_module
from teleport.keeping.leading import ENOUGH, leading_basis
from teleport.runtime.threads import using_threads
from teleport.subspace import PIECE, Basis, FullBasis, RowSpace, relative_cut
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


def space_of(rows: Tensor, *, single: bool = False) -> RowSpace:
    space = RowSpace(single=single)
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
    directions = torch.linalg.qr(vectors).Q * (vectors != 0).any(-2, keepdim=True)
    left = total - (exact @ directions).square().sum((-2, -1))
    assert bool((left <= (1 - tau) * total).all())
    unknown = relative_cut(d, torch.float32)
    over = (basis.residual**2 - float(left.sum())) / float(total.sum())
    assert 0 <= over <= 2 * unknown
    # With one direction less the best choice of all would not do, to what float32 tells apart.
    energies = torch.linalg.svdvals(exact).square()
    before = torch.arange(d) < basis.ranks[..., None] - 1
    assert bool(((energies * before).sum(-1) < (tau + 2 * unknown) * total).all())
    inner = vectors.mT @ vectors
    assert float((inner - inner.round()).abs().max()) < 4 * unknown
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
    rough = leading_basis(space_of(x, single=True), 0.9)
    assert rough is not None
    assert torch.equal(basis.vectors, rough.vectors)
    assert len(basis.singular_values) < 9
    assert type(null_space(model, [lambda: model(x)], 1.0).bases[""]) is FullBasis


def test_layers_with_thresholds_near_to_1_are_told_exactly() -> None:
    """Also where they have the inputs of a layer whose threshold is not."""
    model, x = torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 2)), rows_of(1, 9, 2.0)
    both = torch.nn.ModuleDict({"rough": model[0], "exact": model[1]})

    def closure() -> None:
        both["rough"](x)
        both["exact"](x)

    bases = null_space(both, closure, {"rough": 0.9, "*": 0.9995}).bases
    rows = torch.cat([x, torch.ones(len(x), 1)], 1)
    exact = bases["exact"]
    assert isinstance(exact, Basis)
    assert torch.equal(exact.vectors, space_of(rows).basis(0.9995).vectors)
    rough = leading_basis(space_of(rows, single=True), 0.9)
    assert rough is not None
    assert bases["rough"].rank == rough.rank


@few
@given(seeds, st.integers(2, 30), st.integers(1, 5), st.floats(-6, 6), st.integers(0, 2))
def test_products_in_single_precision_round_as_a_layer_does(
    seed: int, d: int, times: int, scale: float, groups: int
) -> None:
    pieces = [rows_of(seed + t, d, 1.0, *[2] * groups) * 10.0**scale for t in range(times)]
    space = RowSpace(single=True)
    for rows in pieces:
        space.add(rows)
    wanted = sum((rows.double().mT @ rows.double() for rows in pieces), torch.zeros(()))
    wrong = torch.linalg.matrix_norm(space.gram() - wanted, ord=2)
    trace = wanted.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert bool((wrong <= relative_cut(d, torch.float32) * trace).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e13, 1e30])
def test_no_product_vanishes_or_overflows(scale: float) -> None:
    """Where its square would in float32, products are made in float64."""
    rows = torch.stack([rows_of(0, 5, 1.0), scale * rows_of(1, 5, 1.0)])
    gram, wanted = space_of(rows, single=True).gram(), rows.double().mT @ rows.double()
    assert bool((gram - wanted).abs().amax((-2, -1)).le(1e-14 * wanted.amax((-2, -1))).all())


def test_equal_rows_round_all_in_one_direction_and_that_is_counted() -> None:
    """Those of padding, say: each column another constant, and each sum off by its own amount."""
    constants = 1.0 + torch.arange(256) / 256
    rows = constants.expand(PIECE, -1)
    gram = space_of(rows, single=True).gram().diagonal()
    wrong = (gram / (PIECE * constants.double().square()) - 1.0).abs().max()
    assert relative_cut(64, torch.float32) < wrong < relative_cut(PIECE, torch.float32)


@pytest.mark.parametrize("offset", [0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
def test_where_one_direction_has_almost_all_the_rest_is_known_as_well(offset: float) -> None:
    """There the largest eigenvalue is off in float32 by more than is counted for rounding."""
    rows = offset + rows_of(0, 384, 3.7)
    basis, exact = leading(rows, 0.5), rows.double()
    direction = torch.linalg.qr(basis.vectors).Q
    left = float((exact - (exact @ direction) @ direction.mT).square().sum())
    over = (basis.residual**2 - left) / float(exact.square().sum())
    assert over == pytest.approx(relative_cut(PIECE, torch.float32), rel=0.2)


@pytest.mark.parametrize("d", [512, 768])
def test_more_found_than_there_is_leaves_the_rounding_counted(d: int) -> None:
    """The eigenvalue of equal inputs comes out too large in float32, so that no rest is left."""
    rows = torch.full((d + 100, d), 1.1)
    basis, exact = leading(rows, 0.9), rows.double()
    direction = torch.linalg.qr(basis.vectors).Q
    left = (exact - (exact @ direction) @ direction.mT).norm()
    assert left <= basis.residual
    assert basis.residual**2 >= 0.999 * relative_cut(d, torch.float32) * exact.square().sum()


def test_a_piece_without_rows_adds_nothing() -> None:
    space = space_of(rows_of(0, 5, 1.0), single=True)
    before = space.gram()
    space.add(torch.zeros(0, 5))
    assert torch.equal(space.gram(), before)


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_coarser_products_of_float32_are_not_used(setting: str) -> None:
    """TF32 and bfloat16, which PyTorch's settings allow; by whichever of them."""
    rows = rows_of(0, 5, 1.0)
    wanted, before = rows.double().mT @ rows.double(), torch.get_float32_matmul_precision()
    assert (space_of(rows, single=True).gram() - wanted).abs().max() > 1e-12
    torch.set_float32_matmul_precision(setting)
    try:
        found = space_of(rows, single=True).gram()
    finally:
        torch.set_float32_matmul_precision(before)
    assert (found - wanted).abs().max() < 1e-14 * wanted.max()


def test_settings_that_cannot_be_read_count_as_coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    rows = rows_of(0, 5, 1.0)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", unreadable)
    assert torch.equal(space_of(rows, single=True).gram(), space_of(rows).gram())


def test_a_decomposition_takes_one_thread_and_leaves_those_of_others_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    def found(number: int) -> list[list[int]]:
        during: list[list[int]] = []
        with pytest.MonkeyPatch.context() as patch, using_threads(number):
            real = scipy.linalg.eigh
            patch.setattr(
                scipy.linalg, "eigh", lambda *a, **k: during.append(threads()) or real(*a, **k)
            )
            leading(rows_of(0, 6, 1.0), 0.9)
        return during

    with threadpool_limits(2, "blas"):
        before = threads()
        assert 2 in before  # some libraries have no threads
        assert [set(counts) for counts in found(1)] == [{1}]
        assert threads() == before
        assert [set(counts) for counts in found(2)] == [{1}]  # small matrices are not worth more
    monkeypatch.setattr("teleport.runtime.threads.BY_ONE", 1)
    assert found(2) == []  # PyTorch's own uses both


def test_decompositions_in_two_threads_leave_the_threads_of_others_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SciPy's libraries have one number for the whole process."""

    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    rows, real, calls = rows_of(5, 12, 1.0), scipy.linalg.eigh, count()
    begun = [Event(), Event()]

    def eigh(*arguments: Any, **options: Any) -> Any:
        call = next(calls)
        begun[call].set()
        if call == 0:
            begun[1].wait(0.3)  # the other begins before this ends, if it may
        else:
            first.result()
        return real(*arguments, **options)

    monkeypatch.setattr(scipy.linalg, "eigh", eigh)

    def in_a_thread(work: Callable[[], Any]) -> Any:
        """Whoever sets the number has it to himself, in newer versions, while his thread lives."""
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    limits = in_a_thread(partial(threadpool_limits, 2, user_api="blas"))
    try:
        before = threads()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(leading, rows, 0.9)
            begun[0].wait()
            pool.submit(leading, rows, 0.9).result()
        assert 2 in before
        assert threads() == before
    finally:
        in_a_thread(limits.restore_original_limits)
