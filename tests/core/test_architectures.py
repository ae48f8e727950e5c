"""Whole drawn networks: what holds layer by layer holds for what people build of them."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from teleport import Teleporter, TeleportError
from teleport.layers.support import cover
from teleport.recording import record
from teleport.runtime.transaction import Transaction
from teleport.subspace import RowSpace
from teleport.teleporter import METHODS
from tests.support.examples import examples
from tests.support.fingerprint import all_but_weights, fingerprint
from tests.support.strategies import gradient_norm, seeds

few = examples(12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
GROWTH = 1.5
REACHED = 1e-6


class Around(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Attending(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


class Unrolled(nn.Module):
    """The outputs of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Product(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(width, width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.bilinear(x, torch.tanh(x))], dim=-1)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def twice(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.Tanh(), layer)


C = 4
"""Channels of images all through."""
IMAGE: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(C),
    "batch norm, evaluated": lambda: nn.BatchNorm2d(C).eval(),
    "convolution": lambda: nn.Conv2d(C, C, 3, padding=1),
    "grouped convolution": lambda: nn.Conv2d(C, C, 3, padding=1, groups=2),
    "max pooling": lambda: nn.MaxPool2d(2, stride=1),
    "mean pooling": lambda: nn.AvgPool2d(2, stride=1),
    "relu in place": lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU(inplace=True)),
    "residual": lambda: Around(nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.ReLU(inplace=True))),
    "shared": lambda: twice(nn.Conv2d(C, C, 1)),
    "strided convolution": lambda: nn.Conv2d(C, C, 3, stride=2, padding=1),
    "transposed convolution": lambda: nn.ConvTranspose2d(C, C, 2, stride=2, padding=1),
}
D = 12
"""Width of sequences all through."""
SEQUENCE: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attending(D),
    "encoder": lambda: nn.TransformerEncoderLayer(D, 2, 16, 0.1, batch_first=True),
    "encoder, evaluated": lambda: nn.TransformerEncoderLayer(D, 2, 16, batch_first=True).eval(),
    "encoder, norm first": lambda: nn.TransformerEncoderLayer(
        D, 2, 16, 0.1, activation="gelu", batch_first=True, norm_first=True
    ),
    "gru": lambda: Unrolled(nn.GRU(D, D, batch_first=True)),
    "layer norm": lambda: nn.LayerNorm(D),
    "lstm": lambda: Unrolled(nn.LSTM(D, D // 2, batch_first=True, bidirectional=True)),
    "residual": lambda: Around(nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.GELU())),
    "rnn": lambda: Unrolled(nn.RNN(D, D, num_layers=2, dropout=0.1, batch_first=True)),
    "shared": lambda: twice(nn.Linear(D, D)),
}


@dataclass(frozen=True)
class Problem:
    model: nn.Module
    x: Tensor
    y: Tensor

    def closure(self) -> Tensor:
        return functional.cross_entropy(self.model(self.x), self.y)

    def measured(self) -> tuple[float, float]:
        """Loss and gradient norm by plain autograd, with dropout off."""
        with Transaction(self.model):
            loss = float(self.closure().detach())
            return loss, gradient_norm(self.model, self.closure)


@dataclass(frozen=True)
class Network:
    """A network by the names of its layers; the head is wider than the batch is long."""

    kind: str
    layers: tuple[str, ...]
    samples: int = 3
    length: int = 4
    product: bool = False
    seed: int = 0

    def build(self) -> Problem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            x, first, last, known = self._ends()
            body = nn.Sequential(first, *(known[name]() for name in self.layers), last)
            with Transaction(body), torch.no_grad():
                width = body.float()(x.float()).shape[-1]
            middle = [Product(24)] if self.product else []
            head = [nn.Linear(29 if self.product else 24, 3)]
            stem = [nn.Linear(width, 24), nn.Tanh()]
            model = nn.Sequential(body, *stem, *middle, *head).double()
            problem = Problem(model, x, torch.randint(3, (self.samples,)))
            with Transaction(model):
                gradients = torch.autograd.grad(
                    problem.closure(), list(model.parameters()), materialize_grads=True
                )
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            return problem

    def _ends(self) -> tuple[Tensor, nn.Module, nn.Module, dict[str, Callable[[], nn.Module]]]:
        if self.kind == "image":
            x = torch.randn(self.samples, 2, 8, 8, dtype=torch.float64)
            return x, nn.Conv2d(2, C, 3), nn.Flatten(), IMAGE
        x = torch.randn(self.samples, self.length, 5, dtype=torch.float64)
        return x, nn.Linear(5, D), Mean(), SEQUENCE


@st.composite
def networks(draw: st.DrawFn, *, most: int = 4) -> Network:
    """At most ``most`` layers of one kind between the first and the head, two samples or three."""
    kind = draw(st.sampled_from(["image", "sequence"]))
    names = st.sampled_from(sorted(IMAGE if kind == "image" else SEQUENCE))
    return Network(
        kind=kind,
        layers=tuple(draw(st.lists(names, min_size=1, max_size=most))),
        samples=draw(st.integers(2, 3)),
        length=draw(st.integers(1, 4)),
        product=draw(st.booleans()),
        seed=draw(seeds),
    )


def grows(case: Network, method: str) -> tuple[float, ...]:
    """Teleport; everything that has to hold does; return the step sizes."""
    problem = case.build()
    before, state = problem.measured(), all_but_weights(problem.model)
    report = Teleporter(problem.model, growth=GROWTH, method=method).step(problem.closure)
    assert all_but_weights(problem.model) == state
    assert not report.rolled_back, report.reason
    assert report.steps == 1, report.reason
    loss, norm = problem.measured()
    assert abs(loss - before[0]) <= report.tolerance
    assert abs(norm / before[1] / GROWTH - 1) <= REACHED
    return report.step_sizes


@pytest.mark.slow
@pytest.mark.verifies("thm-invariance", "thm-survivor")
@few
@given(networks())
def test_any_network_grows_at_the_same_loss_by_the_same_step_in_both_ways(case: Network) -> None:
    """Tangent and double backward differ by rounding, which the step sees by its condition."""
    fast, slow = (grows(case, method) for method in METHODS)
    assert abs(fast[0] / slow[0] - 1) <= 1e-8


@pytest.mark.verifies("thm-invariance", "thm-survivor")
@pytest.mark.parametrize(
    ("kind", "name"),
    [("image", name) for name in IMAGE] + [("sequence", name) for name in SEQUENCE],
)
def test_every_layer_type_grows_by_the_same_step_in_both_ways(kind: str, name: str) -> None:
    case = Network(kind, (name,), product=True, seed=1)
    fast, slow = (grows(case, method) for method in METHODS)
    assert abs(fast[0] / slow[0] - 1) <= 1e-8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SEQUENCE)
def test_a_batch_of_one_sequence_of_length_one_grows(name: str, method: str) -> None:
    grows(Network("sequence", (name,), samples=1, length=1, seed=2), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", IMAGE)
def test_a_batch_of_one_image_grows(name: str, method: str) -> None:
    grows(Network("image", (name,), samples=1, seed=2), method)


class InterruptionError(Exception):
    """What a user's closure raises."""


@few
@given(networks(most=3), st.integers(1, 8), st.sampled_from(METHODS), st.booleans())
def test_a_closure_that_raises_leaves_any_network_as_it_was(
    case: Network, at: int, method: str, late: bool
) -> None:
    problem, calls = case.build(), 0
    before = fingerprint(problem.model)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = problem.closure() if late else None
        if calls == at:
            raise InterruptionError
        return problem.closure() if loss is None else loss

    try:
        Teleporter(problem.model, growth=GROWTH, method=method).step(closure)
    except InterruptionError:
        assert fingerprint(problem.model) == before
    else:
        assert calls != at or not late


def moves(problem: Problem, projected: bool, seed: int) -> tuple[dict, int]:
    """A random matrix per block, of norm 1; how many products lie on the longest path, at most."""
    torch.manual_seed(seed)
    with sdpa_kernel(SDPBackend.MATH):
        tape = record(problem.model, cover(problem.model).sites, problem.closure)
    found = {}
    for block in tape.blocks:
        space = RowSpace()
        space.add(tape.rows(block))
        raw = torch.randn_like(block.part.matrix())
        move = space.basis().project(raw) if projected else raw
        length = move.norm()
        found[block] = move / length if length > 1e-6 * raw.norm() else torch.zeros_like(move)
    return found, len(tape.calls)


@pytest.mark.verifies("thm-invariance")
@few
@given(networks(most=3), seeds, st.floats(-2.0, 3.0))
def test_a_null_space_move_of_all_layers_keeps_the_output(
    case: Network, seed: int, power: float
) -> None:
    """Up to 1e3 times a unit move, as far as rounding leaves something to be seen.

    A layer moved by s multiplies an error that reaches it by at most s + ‖W‖ <= 10 (1 + s), and
    adds 1e-13 (1 + s): over L products 1e-12 (10 (1 + s))^L. The size is cut where that is above
    1e-3.
    """
    problem = case.build()
    with Transaction(problem.model), torch.no_grad():
        found, count = moves(problem, True, seed)
        size = min(10.0**power, max((1e-3 / 1e-12) ** (1 / count) / 10 - 1, 0.01))
        before = problem.model(problem.x)
        for block, move in found.items():
            block.part.write(block.part.matrix() + size * move)
        drift = (problem.model(problem.x) - before).norm() / (1 + before.norm())
    assume(any(move.any() for move in found.values()))
    assert drift <= min(1e-3, 1e-12 * (10 * (1 + size)) ** count)


@pytest.mark.verifies("thm-invariance")
@few
@given(networks(most=3), seeds)
def test_a_small_move_of_all_layers_out_of_the_null_space_is_seen(case: Network, seed: int) -> None:
    """The control."""
    problem = case.build()
    with Transaction(problem.model), torch.no_grad():
        found, _ = moves(problem, False, seed)
        before = problem.model(problem.x)
        for block, move in found.items():
            block.part.write(block.part.matrix() + move)
        assert (problem.model(problem.x) - before).norm() > 1e-2


class Packed(nn.Module):
    """An LSTM over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Linear(5, D), nn.LSTM(D, D, batch_first=True)
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x))
        packed = pack_padded_sequence(h, torch.tensor([4, 2, 1]), batch_first=True)
        return self.head(self.body(packed)[1][0][-1])


@pytest.mark.parametrize("method", METHODS)
def test_a_packed_sequence_freezes_its_layer_and_breaks_nothing(method: str) -> None:
    model = Packed().double()
    problem = Problem(model, torch.randn(3, 4, 5, dtype=torch.float64), torch.tensor([0, 1, 2]))
    before = [p.detach().clone() for p in model.body.parameters()]
    report = Teleporter(model, growth=GROWTH, method=method).step(problem.closure)
    assert abs(report.growth / GROWTH - 1) <= REACHED
    pairs = zip(model.body.parameters(), before, strict=True)
    assert all(torch.equal(p, b) for p, b in pairs)
    status = {layer.name: layer.status for layer in report.layers}
    assert all("frozen" in status[f"body.{part}_l0"] for part in ("ih", "hh"))


class Checkpointed(nn.Module):
    """A block whose activations are not stored but computed again."""

    def __init__(self, reentrant: bool, inner: int) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed, self.head = nn.Linear(9, 20), nn.Linear(20, 3)
        self.block = nn.Sequential(nn.Linear(20, inner), nn.Tanh(), nn.Linear(inner, 20))

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.block, torch.tanh(self.embed(x)), use_reentrant=self.reentrant)
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inner", [20, 24], ids=["same width", "other width"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_a_checkpointed_block_grows_as_wanted_or_is_refused(
    method: str, inner: int, reentrant: bool
) -> None:
    model = Checkpointed(reentrant, inner).double()
    x, y = torch.randn(5, 9, dtype=torch.float64), torch.randint(3, (5,))
    problem = Problem(model, x, y)
    before = fingerprint(model)
    try:
        report = Teleporter(model, growth=GROWTH, method=method).step(problem.closure)
    except TeleportError as error:
        refusal = str(error)
    else:
        assert abs(report.growth / GROWTH - 1) <= REACHED
        return
    assert "checkpoint" in refusal
    assert fingerprint(model) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_a_compiled_model_teleports_as_if_it_were_not(method: str, warm: bool) -> None:
    found = []
    for compiled in (True, False):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3)
        ).double()
        call = torch.compile(model, backend="eager") if compiled else model
        x, y = torch.randn(5, 9, dtype=torch.float64), torch.randint(3, (5,))
        if warm:
            call(x)
        closure = lambda call=call, x=x, y=y: functional.cross_entropy(call(x), y)  # noqa: E731
        report = Teleporter(model, growth=GROWTH, method=method).step(closure)
        found.append(({x.name: x.status for x in report.layers}, report.step_sizes))
    (statuses, steps), (wanted, wanted_steps) = found
    assert statuses == wanted
    assert abs(steps[0] / wanted_steps[0] - 1) <= 1e-8
