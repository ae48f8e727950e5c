"""What two ranks do in `test_ranks.py`, and what one process does with their batches joined.

Everything runs in two processes that are started once; each scenario returns what the test looks
at. The same functions, called in one process, give what is expected.
"""

import math
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from teleport import Teleporter, TeleportReport, ascent, direction, null_space, supported
from teleport.runtime.transaction import Transaction
from teleport.subspace import Basis, RowSpace
from tests.support.fingerprint import all_but_weights, fingerprint
from tests.support.waiting import HANG

Closure = Callable[[], Tensor]
Found = dict[str, Any]
Ranks = list[Found]

SIZE = 2
RANKS_WAIT = timedelta(seconds=HANG)


class Sequences(nn.Module):
    """A recurrent layer over 3 steps of 3 features, with a penalty nobody asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Linear(3, 20), nn.LSTM(20, 20, batch_first=True)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x.reshape(-1, 3, 3)))[0][:, -1])


class Tokens(nn.Module):
    """Tokens of a vocabulary of 30, embedded by a table that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 40), nn.Linear(40, 30)
        self.middle = nn.Linear(40, 40)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embed((x[:, :2].abs() * 5).long()).mean(1))))


def perceptron() -> nn.Sequential:
    """Inputs of full rank; BatchNorm in evaluation mode; more and fewer rows than columns."""
    model = nn.Sequential(
        nn.Linear(9, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Linear(40, 20), nn.Tanh(),
        nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 3),
    )  # fmt: skip
    return model.eval()


def convolution() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 8, 2), nn.Tanh(),
        nn.Conv2d(8, 8, 2, groups=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(72, 3),
    )  # fmt: skip


MODELS = {
    "convolution": convolution,
    "perceptron": perceptron,
    "sequences": Sequences,
    "tokens": Tokens,
}
CASES: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    *((name, torch.float64, {}) for name in MODELS),
    *((name, torch.float64, {"tau": 0.95, "max_drift": 1.0}) for name in MODELS),
    *((name, torch.float64, {"method": "double_backward"}) for name in MODELS),
    ("perceptron", torch.float64, {"growth": None, "lr": 0.5, "steps": 3, "cap": 100.0}),
    ("perceptron", torch.float64, {"growth": 3.0, "steps": 2, "exclude": ["3"]}),
    ("perceptron", torch.float32, {}),
    ("sequences", torch.float32, {"tau": 0.95, "max_drift": 1.0}),
]


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]().to(dtype)


def batch(dtype: torch.dtype = torch.float64, samples: int = 24) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    x = torch.randn(samples, 9, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (samples,))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Closure:
    return lambda: functional.cross_entropy(model(x), y)


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def told(model: nn.Module, report: TeleportReport) -> Found:
    return {"report": report.to_dict() | {"seconds": 0.0}, "parameters": parameters(model)}


def shards(rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, y = batch(dtype)
    return x.chunk(SIZE)[rank], y.chunk(SIZE)[rank]


def error_of(act: Callable[[], Any]) -> tuple[str, str]:
    """Type and text of what is raised."""
    try:
        act()
    except BaseException as error:
        return type(error).__name__, str(error)
    return "nothing", ""


SAME = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Relative: sums in another order, times the condition of a teleport (step sizes up to 1e3)."""


def assert_same_report(found: Any, wanted: Any, rtol: float) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted.keys() - {"drift"}:  # of the size of rounding itself
            assert_same_report(found[key], wanted[key], rtol)
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_same_report(a, b, rtol)
    elif isinstance(wanted, float):
        # the bound of a layer at tau = 1 is of the size of rounding, and compares in absolute terms
        assert math.isclose(found, wanted, rel_tol=rtol, abs_tol=1e-2 * rtol), (found, wanted)
    else:
        assert found == wanted


# -- the same teleport ---------------------------------------------------------------------------


def case(number: int, shard: Callable[[Tensor], Tensor], wrap: Callable[[nn.Module], Any]) -> Found:
    name, dtype, settings = CASES[number]
    model = wrap(build(name, dtype))
    x, y = batch(dtype)
    closure = loss_of(model, shard(x), shard(y))
    teleporter = Teleporter(model, **({"growth": 2.0} | settings))
    return told(model, teleporter.step(closure, held_out=lambda: 2 * closure()))


def parts(mine: Callable[[list[Tensor]], Sequence[Tensor]], model: nn.Module, sizes: Any) -> Found:
    """Each rank has a list of closures of its own."""
    x, y = batch()
    pieces = zip(mine(list(x.split(sizes))), mine(list(y.split(sizes))), strict=True)
    report = Teleporter(model, growth=2.0).step([loss_of(model, a, b) for a, b in pieces])
    return told(model, report)


def in_train_mode(model: nn.Module, shards: Sequence[tuple[Tensor, Tensor]]) -> Found:
    """BatchNorm with the statistics of each shard, and running statistics of each rank's own."""
    model.train()
    for x, y in shards:
        with torch.no_grad():  # wrapped, this broadcasts: so that they differ, write them
            model(x)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(float(y.sum()))
    state = all_but_weights(model)
    report = Teleporter(model, growth=2.0).step([loss_of(model, x, y) for x, y in shards])
    return told(model, report) | {"state kept": all_but_weights(model) == state}


class Branches(nn.Module):
    """One of two ways through the middle, which one layer sees behind a parameter, one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.ways = nn.Linear(9, 30), nn.ModuleList(nn.Linear(30, 30) for _ in "ab")
        self.head = nn.Linear(30, 3)

    def forward(self, x: Tensor, way: int) -> Tensor:
        first = torch.tanh(self.shared(x))
        first = first.detach() if way else first
        return self.head(torch.tanh(self.ways[way](first)))


def branches(model: nn.Module, shards: Sequence[tuple[int, Tensor, Tensor]]) -> Found:
    """Each shard goes a way of its own; its loss looks at the weights of that way, too."""

    def loss(way: int, x: Tensor, y: Tensor) -> Tensor:
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        penalty = inner.ways[1].weight.square().sum() if way else 0.0
        return functional.cross_entropy(model(x, way), y) + penalty

    closures = [lambda shard=shard: loss(*shard) for shard in shards]
    return told(model, Teleporter(model, growth=2.0).step(closures))


def branched() -> nn.Module:
    torch.manual_seed(5)
    return Branches().double()


def training_goes_on(model: nn.Module, x: Tensor, y: Tensor) -> Found:
    """Adam before and after a teleport; gradients accumulated when it happens stay."""
    optimizer, grads = torch.optim.Adam(model.parameters(), lr=0.01), []

    def train() -> None:
        optimizer.zero_grad()
        loss_of(model, x, y)().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()

    for _ in range(3):
        train()
    state = all_but_weights(model)
    report = Teleporter(model, growth=2.0).step(loss_of(model, x, y))
    kept = all_but_weights(model) == state
    for _ in range(3):
        train()
    return told(model, report) | {"grads": torch.stack(grads), "state kept": kept}


def space_of(model: nn.Module, batches: Sequence[Tensor], **settings: Any) -> Found:
    space = null_space(model, (lambda x=x: model(x) for x in batches), **settings)
    return {
        name: (b.vectors @ b.vectors.mT, b.singular_values, b.ranks)
        for name, b in space.bases.items()
    }


def keeping(model: nn.Module, old: Tensor, space: Sequence[Tensor], x: Tensor, y: Tensor) -> Found:
    """A step of learning on each shard that keeps the outputs on all old data."""
    kept = null_space(model, [lambda x=x: model(x) for x in space], 0.9999999999)
    with torch.no_grad():
        before = model(old)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for projects in (True, False):
        optimizer.zero_grad()
        loss_of(model, x, y)().backward()
        if projects:
            kept.project_(model)
        with kept.keep(model):
            optimizer.step()
    with torch.no_grad():
        return {"change": float((model(old) - before).abs().max()), "at": parameters(model)}


def attached(model: nn.Module, old: Tensor, space: Sequence[Tensor], x: Tensor, y: Tensor) -> Found:
    """Some steps of AdamW with a null space attached."""
    kept = null_space(model, [lambda x=x: model(x) for x in space])
    with torch.no_grad():
        before = model(old)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with kept.attach(optimizer, every=2):
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, x, y)().backward()
            optimizer.step()
    with torch.no_grad():
        return {"change": float((model(old) - before).abs().max()), "at": parameters(model)}


# -- one rank in trouble -------------------------------------------------------------------------


class TroubleError(Exception):
    """What a user's closure raises."""


def troubled(rank: int, method: str, call: int, kind: str) -> Found:
    """Rank 1's closure fails at one of its calls: it raises, is interrupted, or returns NaN."""
    model = DistributedDataParallel(build("perceptron"))
    x, y = shards(rank)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == call:
            if kind == "nan":
                return loss_of(model, x, y)() * torch.nan
            raise KeyboardInterrupt if kind == "interrupt" else TroubleError("no more data")
        return loss_of(model, x, y)()

    start, reports = fingerprint(model), []
    teleporter = Teleporter(model, method=method, growth=2.0)
    error = error_of(lambda: reports.append(teleporter.step(closure)))
    return {
        "error": error,
        "calls": calls,
        "as before": fingerprint(model) == start,
        "reason": reports[0].reason if reports else None,
        "rolled back": reports[0].rolled_back if reports else None,
    }


class NoForwardMode(torch.autograd.Function):
    """The identity, without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Tensor:
        return delta


def one_rank_without_forward_mode(rank: int) -> Found:
    model = DistributedDataParallel(build("perceptron"))
    x, y = shards(rank)
    if rank == 1:
        model.module[4].register_forward_hook(lambda m, i, o: NoForwardMode.apply(o))
    return told(model, Teleporter(model, growth=2.0).step(loss_of(model, x, y)))


def outside_the_closure(rank: int, place: str) -> Found:
    """Rank 1 runs out of memory where the package itself computes."""
    model = DistributedDataParallel(build("perceptron"))
    x, y = shards(rank)
    owner, name = {
        "transaction": (Transaction, "__enter__"),
        "factor": (RowSpace, "factor"),
        "basis": (RowSpace, "basis"),
        "project": (direction, "without_rounding"),
        "report": (ascent.Ascent, "_layer"),
    }[place]
    original = getattr(owner, name)

    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    start = fingerprint(model)
    try:
        if rank == 1:
            setattr(owner, name, fails)
        step = Teleporter(model).step
        error = error_of(lambda: step(loss_of(model, x, y)))
    finally:
        setattr(owner, name, original)
    as_before = fingerprint(model) == start
    again = Teleporter(model, growth=2.0).step(loss_of(model, x, y))
    return {"error": error, "growth": again.growth, "as before": as_before}


def other_arithmetic(rank: int) -> Found:
    """Rank 1 rounds otherwise: another rank of a basis, another last digit of a direction."""
    model = DistributedDataParallel(build("perceptron"))
    basis, surviving = RowSpace.basis, direction.without_rounding

    def fewer(*args: Any, **kwargs: Any) -> Basis:
        whole = basis(*args, **kwargs)
        return Basis(whole.vectors[..., 1:], whole.singular_values, whole.ranks - 1, whole.dtype)

    try:
        if rank == 1:
            RowSpace.basis = fewer
            direction.without_rounding = lambda *args: surviving(*args) * (1 + 1e-12)
        return told(model, Teleporter(model, growth=2.0).step(loss_of(model, *shards(rank))))
    finally:
        RowSpace.basis, direction.without_rounding = basis, surviving


def disagreeing(rank: int) -> list[tuple[str, str]]:
    model = DistributedDataParallel(build("perceptron"))
    closure = loss_of(model, *shards(rank))
    return [
        error_of(lambda: Teleporter(model, growth=1.5 + rank).step(closure)),
        error_of(lambda: Teleporter(model).step(closure, held_out=closure if rank else None)),
        error_of(lambda: Teleporter(model).step([closure] if rank else [])),
    ]


def refused(rank: int) -> dict[str, tuple[str, str]]:
    inner = DistributedDataParallel(nn.Linear(9, 9))
    return {
        "part": error_of(lambda: Teleporter(nn.Sequential(inner, nn.Linear(9, 3)))),
    }


def under_autocast(rank: int) -> Found:
    model = DistributedDataParallel(build("perceptron", torch.float32))
    x, y = shards(rank, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        return told(model, Teleporter(model, growth=2.0).step(loss_of(model, x, y)))


def compiled(rank: int) -> Found:
    model = torch.compile(DistributedDataParallel(build("perceptron")))
    return told(model, Teleporter(model, growth=2.0).step(loss_of(model, *shards(rank))))


def names(model: nn.Module) -> list[str]:
    return [line[0] for line in supported(model).lines]


# -- running them --------------------------------------------------------------------------------

METHODS = ("tangent", "double_backward")
CALLS = {"tangent": range(1, 9), "double_backward": range(1, 6)}
PLACES = ("transaction", "factor", "basis", "project", "report")


def scenarios(rank: int) -> dict[str, Callable[[], Any]]:
    """What this rank does, in this order."""
    wrap = DistributedDataParallel
    x, y = shards(rank)
    xs = batch()[0]
    found: dict[str, Callable[[], Any]] = {
        f"case {i}": lambda i=i: case(i, lambda t: t.chunk(SIZE)[rank], wrap)
        for i in range(len(CASES))
    }
    found |= {
        "unequal": lambda: parts(lambda t: [t[rank]], wrap(build("perceptron")), [17, 7]),
        "lists": lambda: parts(
            lambda t: t[3 * rank : 3 * rank + 3 - rank], wrap(build("perceptron")), [4, 4, 4, 6, 6]
        ),
        "train mode": lambda: in_train_mode(wrap(build("perceptron")), [(x, y)]),
        "branches": lambda: branches(wrap(branched()), [(rank, x, y)]),
        "arithmetic": lambda: other_arithmetic(rank),
        "training": lambda: training_goes_on(wrap(build("perceptron")), x, y),
        "space": lambda: space_of(
            wrap(build("perceptron")), [] if rank else list(xs.split(6)), tau=0.99
        ),
        "space, both": lambda: space_of(wrap(build("sequences")), list(x.split(3 + 2 * rank))),
        "keeping": lambda: keeping(wrap(build("perceptron")), xs[:8], [xs[4 * rank :][:4]], x, y),
        "attached": lambda: attached(wrap(build("perceptron")), xs[:8], [xs[4 * rank :][:4]], x, y),
        "fallback": lambda: one_rank_without_forward_mode(rank),
        "disagreeing": lambda: disagreeing(rank),
        "refused": lambda: refused(rank),
        "autocast": lambda: under_autocast(rank),
        "compiled": lambda: compiled(rank),
        "names": lambda: (names(wrap(build("perceptron"))), names(build("perceptron"))),
    }
    for method in METHODS:
        for kind in ("raise", "nan"):
            for call in CALLS[method]:
                found[f"{kind}, {method}, {call}"] = lambda m=method, c=call, k=kind: troubled(
                    rank, m, c, k
                )
    found["interrupt, tangent, 2"] = lambda: troubled(rank, "tangent", 2, "interrupt")
    for place in PLACES:
        found[f"memory, {place}"] = lambda p=place: outside_the_closure(rank, p)
    return found


def run(rank: int, folder: str) -> None:
    run_scenarios(rank, folder, SIZE, scenarios)


def run_scenarios(
    rank: int, folder: str, size: int, scenarios: Callable[[int], dict[str, Callable[[], Any]]]
) -> None:
    """One rank: all scenarios, results in a file; a scenario that breaks says how."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", timeout=RANKS_WAIT, rank=rank, world_size=size
    )
    results: dict[str, Any] = {}
    for name, scenario in scenarios(rank).items():
        try:
            results[name] = scenario()
        except Exception:
            results[name] = traceback.format_exc()
            break  # the other ranks may wait elsewhere
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


def found_by(run: Callable[[int, str], None], size: int, folder: Path) -> Ranks:
    """What so many ranks found: one dictionary each, a key per scenario."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])  # the children import this folder, too
        multiprocessing.spawn(run, (str(folder),), nprocs=size)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(size)]
