"""A teleport batch in pieces, or in one, with frozen activations or without, is one teleport."""

import gc
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from teleport import Teleporter, TeleportReport
from teleport.ascent import UNSEEN
from teleport.direction import without_rounding
from teleport.lab.experiments.models import cnn, mlp
from teleport.landscape import Landscape
from teleport.layers.support import WeightMatrix, cover
from teleport.recording import Tape, multiplications
from teleport.runtime.closures import Closure
from teleport.runtime.threads import WORTH_THREADS, in_parallel, using_threads, worth_threads
from teleport.subspace import Basis, RowSpace
from teleport.teleporter import METHODS
from tests.support.examples import examples
from tests.support.networks import GRAPHS, Task, task, without_dropout
from tests.support.strategies import gradient_norm, seeds
from tests.support.waiting import HANG

few = examples(6)
methods = pytest.mark.parametrize("method", METHODS)

SAME_STEP = 1e-8
"""Relative. The line search stops at 8 eps of the norm; a step follows with the condition number
of the norm in the step, and directions agree to 1e-11 (tests/core/test_direction.py)."""

SAME_PLACE = 1e-10
"""Relative, of all parameters: steps here are far shorter than the weights are long."""

IN_BATCHES = ("attention", "plain", "residual", "tied", "twice")
"""Graphs without batch statistics: for them the loss of a batch is the mean of its parts."""


def pieces(problem: Task, sizes: list[int]) -> list[Closure]:
    """Closures whose mean is the loss of the whole, from any parts: each is weighted."""

    def part(x: Tensor, y: Tensor) -> Closure:
        weight = len(sizes) * len(x) / len(problem.x)
        return lambda: weight * functional.cross_entropy(problem.model(x), y)

    return [part(x, y) for x, y in zip(problem.x.split(sizes), problem.y.split(sizes), strict=True)]


def parameters(problem: Task) -> Tensor:
    return torch.cat([p.detach().flatten() for p in problem.model.parameters()])


def same(one: tuple[Task, TeleportReport], other: tuple[Task, TeleportReport]) -> bool:
    """Both moved, by the same steps, to the same place."""
    (a, found), (b, wanted) = one, other
    assert not found.rolled_back, found.reason
    assert not wanted.rolled_back, wanted.reason
    assert found.steps == wanted.steps > 0
    pairs = zip(found.step_sizes, wanted.step_sizes, strict=True)
    assert all(abs(s / t - 1) <= SAME_STEP for s, t in pairs)
    return bool((parameters(a) - parameters(b)).norm() <= SAME_PLACE * parameters(b).norm())


@st.composite
def partitions(draw: st.DrawFn) -> list[int]:
    """Sizes of at most four parts of six samples, of at least one each."""
    cuts = sorted(draw(st.sets(st.integers(1, 5), min_size=1, max_size=3)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, 6], strict=True)]


def moved(
    name: str, seed: int, sizes: list[int], order: list[int] | None = None, **settings: object
) -> tuple[Task, TeleportReport]:
    problem = task(name, seed)
    without_dropout(problem.model)
    parts = pieces(problem, sizes)
    parts = parts if order is None else [parts[i] for i in order]
    settings.setdefault("growth", 1.5)
    return problem, Teleporter(problem.model, **settings).step(parts)


@methods
@pytest.mark.parametrize("tau", [1.0, 0.999])
@few
@given(name=st.sampled_from(IN_BATCHES), seed=seeds, sizes=partitions())
def test_a_list_of_closures_is_one_batch(
    method: str, tau: float, name: str, seed: int, sizes: list[int]
) -> None:
    """A drift of half the loss is allowed: whether it is in bounds at τ < 1 is not asked here."""
    given = {"method": method, "tau": tau, "max_drift": 0.5, "steps": 2}
    assert same(moved(name, seed, sizes, **given), moved(name, seed, [6], **given))


@methods
@pytest.mark.parametrize("tau", [1.0, 0.999])
@few
@given(name=st.sampled_from(IN_BATCHES), seed=seeds, sizes=partitions(), data=st.data())
def test_the_order_of_closures_is_irrelevant(
    method: str, tau: float, name: str, seed: int, sizes: list[int], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(sizes))))
    given = {"method": method, "tau": tau, "max_drift": 0.5}
    assert same(moved(name, seed, sizes, order, **given), moved(name, seed, sizes, **given))


@methods
@pytest.mark.parametrize("name", GRAPHS)
def test_a_list_of_one_closure_is_that_closure(name: str, method: str) -> None:
    listed, alone = task(name), task(name)
    reports = [
        Teleporter(listed.model, method=method).step([listed.closure]),
        Teleporter(alone.model, method=method).step(alone.closure),
    ]
    assert torch.equal(parameters(listed), parameters(alone))
    assert reports[0].step_sizes == reports[1].step_sizes


def test_an_empty_list_of_closures_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one closure"):
        Teleporter(task("plain").model).step([])


def frozen(model: nn.Module, closure: Callable[[], Tensor]) -> Landscape:
    return Landscape(model, cover(model).sites, [closure], frozen=True)


def kept_tape(landscape: Landscape) -> Tape:
    assert landscape.tape is not None
    return landscape.tape


def both(name: str, seed: int) -> tuple[Landscape, Landscape]:
    """Of one batch, with frozen activations and without, each on a model of its own."""
    one, other = task(name, seed), task(name, seed)
    for problem in (one, other):
        without_dropout(problem.model)
    return (
        frozen(one.model, one.closure),
        Landscape(other.model, cover(other.model).sites, [other.closure]),
    )


def named(values: dict) -> dict:
    return {block.name: value for block, value in values.items()}


@pytest.mark.verifies("thm-survivor")
@pytest.mark.parametrize("name", GRAPHS)
@few
@given(seed=seeds)
def test_both_landscapes_agree(name: str, seed: int) -> None:
    """Loss, norm, fixed layers, directions to 1e-10 of the whole direction."""
    one, other = both(name, seed)
    assert abs(one.loss - other.loss) <= 1e-12 * one.loss
    assert abs(one.norm_squared() / other.norm_squared() - 1) <= 1e-11
    assert {b.name for b in one.fixed} == {b.name for b in other.fixed}
    found, wanted = (named(w.tangent_direction(w.bases(w.blocks, 1.0))) for w in both(name, seed))
    size = sum(float(d.square().sum()) for d in wanted.values()) ** 0.5
    assert found.keys() == wanted.keys()
    assert all((found[n] - d).norm() <= 1e-10 * size for n, d in wanted.items())


@pytest.mark.verifies("thm-invariance")
@pytest.mark.parametrize("name", GRAPHS)
@few
@given(seed=seeds, length=st.floats(0.01, 1.0))
def test_both_landscapes_have_the_same_norm_ahead(name: str, seed: int, length: float) -> None:
    """One by a backward pass over a frozen tape, the other by running the moved model."""
    norms = []
    for landscape in both(name, seed):
        along = landscape.tangent_direction(landscape.bases(landscape.blocks, 1.0))
        size = sum(float(d.square().sum()) for d in along.values()) ** 0.5
        ahead = landscape.norm_squared_at(along, length / size)
        landscape.advance(along, length / size)
        assert landscape.norm_squared() == ahead
        norms.append((ahead, landscape.norm_squared()))
    assert all(abs(a / b - 1) <= 1e-9 for a, b in zip(*norms, strict=True))


@pytest.mark.parametrize("name", GRAPHS)
@few
@given(seed=seeds, growth=st.floats(1.05, 3.0))
@example(seed=65536, growth=2.75)  # of the zoo: parabolas beside a look were off by 3.05e-4
def test_norms_that_were_not_looked_at_are_those_of_a_look(
    name: str, seed: int, growth: float
) -> None:
    """In single precision nobody looks where the search ends: the report is right all the same."""
    problem = task(name, seed, torch.float32)
    without_dropout(problem.model)
    report = Teleporter(problem.model, growth=growth).step(problem.closure)
    if not report.rolled_back and report.steps:
        assert_norms_are_those_of_a_look(report, growth, problem.model, problem.closure)


def assert_norms_are_those_of_a_look(
    report: TeleportReport, growth: float, model: nn.Module, closure: Closure
) -> None:
    there = frozen(model, closure)
    norm = math.sqrt(there.norm_squared())
    assert abs(norm / report.grad_norm_before / growth - 1) <= UNSEEN
    assert abs(norm / report.grad_norm_after - 1) <= UNSEEN
    shares = {b.name: share for b, share in there.shares().items() if isinstance(b, WeightMatrix)}
    said = {layer.name: layer.grad_norm_after or 0.0 for layer in report.layers}
    assert all(abs(said[n] ** 2 - share) <= UNSEEN * norm**2 for n, share in shares.items())


@few
@given(seed=seeds, growth=st.floats(1.05, 1.6))
def test_one_look_is_enough_where_one_layer_alone_moves(seed: int, growth: float) -> None:
    """Convolutions have full rank: behind the head gradients are a line in the step."""
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(seed)
        model, x, y = cnn((1, 6, 8), 8, 3), torch.randn(20, 1, 8, 8), torch.arange(20) % 3
        done: list[Tape] = []

        def differentiate(tape: Tape, suspects: Any) -> Any:
            done.append(tape)
            return plainly(tape, suspects)

        plainly = Tape.differentiate
        patch.setattr(Tape, "differentiate", differentiate)
        closure = partial(entropy_of, model, x, y)
        report = Teleporter(model, growth=growth).step(closure)
        assert [layer.name for layer in report.layers if layer.move_norm] == ["7"]
        assert len(done) == 2  # the start, and one look
        assert_norms_are_those_of_a_look(report, growth, model, closure)


def test_the_last_step_is_looked_at_only_in_double_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = {}
    for dtype in (torch.float32, torch.float64):
        done = []

        def backward(tape: Tape, done: list[Tape] = done) -> None:
            done.append(tape)
            tape.differentiate([])

        monkeypatch.setattr(Tape, "backward", backward)
        torch.manual_seed(0)
        model, x, y = mlp(30, 5, (40, 40)).to(dtype), torch.randn(9, 30), torch.arange(9) % 5
        report = Teleporter(model).step(partial(entropy_of, model, x.to(dtype), y))
        assert abs(report.growth / 1.5 - 1) <= 1e-6
        looks[dtype] = len(done)
    assert looks[torch.float32] < looks[torch.float64]


def wide(dtype: torch.dtype) -> Landscape:
    torch.manual_seed(0)
    model, x, y = mlp(30, 5, (40, 40, 40)), torch.randn(9, 30), torch.arange(9) % 5
    return frozen(model.to(dtype), partial(entropy_of, model, x.to(dtype), y))


def test_a_basis_is_kept_in_the_precision_it_projects_in() -> None:
    """With the same result to the bit."""
    landscape = wide(torch.float32)
    tape = kept_tape(landscape)
    for block, basis in landscape.bases(landscape.blocks, 1.0).items():
        space, matrix = RowSpace(), block.part.matrix()
        space.add(tape.rows(block))
        whole = space.basis_if_independent(tape.row_gram(block))
        assert isinstance(basis, Basis)
        assert whole is not None
        assert (basis.vectors.dtype, whole.vectors.dtype) == (torch.float32, torch.float64)
        assert torch.equal(basis.project(matrix), whole.project(matrix))
    double = wide(torch.float64)
    (basis, *_) = double.bases(double.blocks, 1.0).values()
    assert isinstance(basis, Basis)
    assert basis.vectors.dtype == torch.float64


def test_a_layer_s_cotangents_go_when_its_direction_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    landscape, alive = wide(torch.float32), []
    deltas = [call.delta for call in kept_tape(landscape).calls if call.delta is not None]
    memory = [weakref.ref(delta.untyped_storage()) for delta in deltas]
    del deltas

    def watched(*given: Any) -> Tensor:
        alive.append(sum(of() is not None for of in memory))
        return without_rounding(*given)

    monkeypatch.setattr("teleport.direction.without_rounding", watched)
    moving = [block for block in landscape.blocks if block not in landscape.fixed]
    landscape.tangent_direction(landscape.bases(moving, 1.0))
    assert alive == [3, 2, 1]  # the first layer, which cannot move, has used its own


def entropy_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("name", GRAPHS)
def test_writing_the_start_undoes_writing_the_position(name: str) -> None:
    problem = task(name)
    landscape = frozen(problem.model, problem.closure)
    before = parameters(problem)
    along = landscape.tangent_direction(landscape.bases(landscape.blocks, 1.0))
    landscape.advance(along, 1.0)
    landscape.write()
    assert not torch.equal(parameters(problem), before)
    landscape.write_start()
    assert torch.equal(parameters(problem), before)


@pytest.mark.parametrize("name", GRAPHS)
def test_looking_ahead_does_not_move_the_position(name: str) -> None:
    problem = task(name)
    landscape = frozen(problem.model, problem.closure)
    along = landscape.tangent_direction(landscape.bases(landscape.blocks, 1.0))
    for step in (0.5, 0.25):
        landscape.norm_squared_at(along, 3.0)
        landscape.advance(along, step)
    landscape.write()
    norm, here = landscape.norm_squared(), parameters(problem)
    landscape.norm_squared_at(along, 2.0)
    assert not torch.equal(parameters(problem), here)  # a look puts its weights into the model
    landscape.write()
    assert torch.equal(parameters(problem), here)
    landscape.write_start()
    for block, matrix in along.items():
        block.part.write(block.part.matrix() + 0.75 * matrix)
    assert (parameters(problem) - here).abs().max() <= 1e-12 * (1 + here.abs().max())
    assert landscape.norm_squared() == pytest.approx(norm, rel=1e-12)


def test_layers_with_the_same_inputs_share_a_basis() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    ).double()
    model.eval()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            landscape = frozen(model, lambda: model(x).square().mean())
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    bases = {
        b.name.rsplit(".", 1)[-1]: basis
        for b, basis in landscape.bases(landscape.blocks, 1.0).items()
    }
    assert bases["q"] is bases["k"] is bases["v"]
    assert bases["q"] is not bases["out"]
    alone = landscape.bases([b for b in landscape.blocks if b.name.endswith("k")], 1.0)
    assert torch.equal(next(iter(alone.values())).vectors, bases["q"].vectors)


def test_layers_in_parallel_are_layers_in_turn() -> None:
    """Order, results, errors and the caller's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen, meeting = set(), threading.Barrier(3)

        def work(n: int) -> tuple[int, int]:
            if n < 3 and threading.current_thread() is not threading.main_thread():
                meeting.wait(HANG)  # for three at once
            seen.add(threading.get_ident())
            return n * n, torch.get_num_threads()

        assert in_parallel(work, list(range(7))) == [(n * n, 1) for n in range(7)]
        assert len(seen) == 3
        assert in_parallel(work, list(range(3)), parallel=False) == [(n * n, 3) for n in range(3)]
        assert len(seen) == 4
        assert threading.get_ident() in seen
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError):
            in_parallel(lambda n: 1 // n, [1, 0, 2])
        assert torch.get_num_threads() == 3
        problem = task("residual")
        landscape = frozen(problem.model, problem.closure)
        many = named(landscape.bases(landscape.blocks, 1.0, parallel=True))
        torch.set_num_threads(1)
        one = named(landscape.bases(landscape.blocks, 1.0))
        assert all(torch.equal(one[n].vectors, many[n].vectors) for n in one)
    finally:
        torch.set_num_threads(before)


def test_threads_are_worth_it_by_the_work_beside_the_largest_job() -> None:
    assert not worth_threads([])
    assert not worth_threads([100 * WORTH_THREADS])
    assert worth_threads([100 * WORTH_THREADS, WORTH_THREADS])
    assert not worth_threads([100 * WORTH_THREADS, 0.999 * WORTH_THREADS])
    layer = 513.0 * 128**2
    assert [n for n in (2, 4, 8, 16, 32) if worth_threads([layer] * n)] == [16, 32]


@pytest.mark.parametrize("tau", [1.0, 0.9])
@pytest.mark.parametrize("pays", [True, False])
def test_bases_are_made_at_the_same_time_where_the_rule_says_or_the_caller(
    monkeypatch: pytest.MonkeyPatch, tau: float, pays: bool
) -> None:
    costs, asked = list[list[float]](), list[bool]()

    def rule(multiplications: Iterable[float]) -> bool:
        costs.append(sorted(multiplications))
        return pays

    def jobs(work: Any, items: Sequence[Any], parallel: bool) -> list[Any]:
        asked.append(parallel)
        return in_parallel(work, items, parallel)

    monkeypatch.setattr("teleport.landscape.worth_threads", rule)
    monkeypatch.setattr("teleport.landscape.in_parallel", jobs)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 9, bias=False)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    sites = cover(model).sites
    landscape = frozen(model, lambda: model(x).square().sum())
    if tau < 1.0:
        landscape = Landscape(model, sites, [lambda: model(x).square().sum()], movable={"0", "2"})
    with using_threads(2):
        found = [landscape.bases(landscape.blocks, tau, parallel=p) for p in (None, True, False)]
    assert asked == [pays, True, False]
    assert costs == [[6.0 * 6 * 6, 7.0 * 6 * 6]]
    first = named(found[0])
    assert all(torch.equal(named(f)[n].vectors, first[n].vectors) for f in found for n in first)


def test_work_that_is_not_a_product_on_the_cpu_needs_no_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens are counted; and a GPU has threads of its own."""
    costs = list[float]()
    monkeypatch.setattr("teleport.landscape.worth_threads", lambda c: bool(costs.extend(c)))
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 3)).double()
    tokens = torch.randint(50, (6,))
    landscape = frozen(model, lambda: model(tokens).square().sum())
    landscape.bases(landscape.blocks, 1.0)
    assert costs == [0.0, 5.0**3]
    (elsewhere,) = cover(nn.Sequential(nn.Linear(4, 3, device="meta"))).blocks
    assert multiplications(elsewhere, 6) == 0.0


class Living:
    """Counts the tapes alive whenever a new one is made."""

    def __init__(self) -> None:
        self.tapes: list[weakref.ref] = []
        self.most = 0

    def count(self) -> int:
        return sum(ref() is not None for ref in self.tapes)

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        made = Tape.__init__

        def remember(tape: Tape, *args: object, **kwargs: object) -> None:
            made(tape, *args, **kwargs)
            self.tapes.append(weakref.ref(tape))
            self.most = max(self.most, self.count())

        with monkeypatch.context() as patch:
            patch.setattr(Tape, "__init__", remember)
            yield


@methods
@pytest.mark.parametrize("tau", [1.0, 0.99])
def test_at_most_one_more_tape_is_alive_than_the_one_in_use(
    monkeypatch: pytest.MonkeyPatch, method: str, tau: float
) -> None:
    """A loop's name may hold the last tape until the next is made; never one per micro-batch."""
    problem, living = task("residual"), Living()
    with living.watching(monkeypatch):
        Teleporter(problem.model, method=method, tau=tau, steps=2, max_drift=0.5).step(
            pieces(problem, [2, 1, 1, 1, 1])
        )
    assert len(living.tapes) >= 5
    assert living.most <= 2
    gc.collect()
    assert living.count() == 0


@methods
def test_only_one_tape_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Memory is what one micro-batch needs, without help from the garbage collector."""
    problem, living = task("plain"), Living()
    with living.watching(monkeypatch):
        Teleporter(problem.model, method=method).step(pieces(problem, [2, 1, 1, 1, 1]))
    assert living.most == 1


@few
@given(st.sampled_from(IN_BATCHES), seeds, partitions(), st.floats(1.1, 3.0))
def test_the_report_of_a_list_is_about_the_whole_batch(
    name: str, seed: int, sizes: list[int], growth: float
) -> None:
    before = task(name, seed)
    problem, report = moved(name, seed, sizes, growth=growth)
    assert abs(report.loss_before - float(before.closure().detach())) <= 1e-12 * report.loss_before
    for at, wanted in ((before, report.grad_norm_before), (problem, report.grad_norm_after)):
        assert abs(gradient_norm(at.model, at.closure) / wanted - 1) <= 1e-9
    assert abs(report.growth / growth - 1) <= 1e-6
    assert report.drift <= report.tolerance


class Branches(nn.Module):
    """Layers side by side, so that each has as much of the loss as any other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.branches = nn.ModuleList(nn.Linear(24, 3) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        parts = (branch((1 + i) * hidden).tanh() for i, branch in enumerate(self.branches))
        return torch.stack(list(parts)).sum(0)


def test_a_report_is_the_same_to_the_last_bit_wherever_its_layers_lie_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Far above what is cut off here, so that the sum over the layers is all of the tolerance.
    monkeypatch.setattr(Basis, "cut_off", property(lambda basis: 1e-6))
    alive = []

    def report() -> dict[str, Any]:
        torch.manual_seed(0)
        model = Branches(16)
        x, y = torch.randn(6, 12), torch.randint(3, (6,))
        alive.append(model)  # the next one has to lie elsewhere
        found = Teleporter(model).step(lambda: functional.cross_entropy(model(x), y))
        return found.to_dict() | {"seconds": 0.0}

    first = report()
    assert first["steps"] == 1
    assert all(report() == first for _ in range(10))
