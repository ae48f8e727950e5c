"""A tape whose graph goes with the one derivative that needs it, and is made again for another."""

import weakref
from collections.abc import Callable
from functools import partial
from itertools import count
from threading import Thread

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn import functional

from teleport import ClosureError, Teleporter
from teleport.layers.support import cover
from teleport.recording import Tape, push_tangents, record
from tests.support.fingerprint import fingerprint
from tests.support.networks import GRAPHS, Task, task, without_dropout
from tests.support.strategies import Case, Problem, cases


def both(problem: Problem | Task) -> tuple[Tape, Tape]:
    """A tape that lets its graph go, and one that keeps it."""
    model, closure, sites = problem.model, problem.closure, cover(problem.model).sites
    return record(model, sites, closure, once=True), record(model, sites, closure)


def assert_same(once: Tape, kept: Tape) -> None:
    """To the last bit, but for norms: where the graph is kept, drives serve them, too."""
    for one, other in zip(once.calls, kept.calls, strict=True):
        assert one.block is other.block
        assert (one.delta is None) == (other.delta is None)
        if one.delta is not None and other.delta is not None:
            assert torch.equal(one.delta, other.delta)
    assert all(map(torch.equal, once.other_gradients, kept.other_gradients))
    assert once.norm_squared() == pytest.approx(kept.norm_squared(), rel=1e-13)


def push_last(tape: Tape, problem: Problem | Task, last: bool) -> list[Tensor | None]:
    """The tangents along the gradient of every call."""
    gradients = {block: tape.weight_gradient(block) for block in tape.blocks}
    drive = {b: partial(tape.drive_of, b, b.part.split(gradients[b])) for b in tape.blocks}
    velocity = dict(zip(tape.others, tape.other_gradients, strict=True))
    push_tangents(tape, problem.model, problem.closure, drive, velocity, last=last)
    return [call.x_dot for call in tape.calls]


def check(problem: Problem | Task) -> None:
    once, kept = both(problem)
    assert_same(once, kept)
    for block in kept.blocks:  # weights that a graph made again has to look up, as the first does
        with torch.no_grad():
            block.part.weight.parameter.data.mul_(1.25)
    once.backward()
    kept.backward()
    assert_same(once, kept)
    assert all(torch.equal(a.x, b.x) for a, b in zip(once.calls, kept.calls, strict=True))


@given(cases())
def test_a_graph_made_again_gives_the_same_cotangents(case: Case) -> None:
    check(case.build())


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_made_again_gives_the_same_cotangents_in_every_graph(name: str) -> None:
    problem = task(name)
    without_dropout(problem.model)
    check(problem)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_last_forward_mode_pass_finds_its_inputs_again(name: str) -> None:
    problem = task(name)
    without_dropout(problem.model)
    once, kept = both(problem)
    for one, other in zip(
        push_last(once, problem, True), push_last(kept, problem, False), strict=True
    ):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)
    once.backward()
    kept.backward()
    assert_same(once, kept)


def perceptron(inplace: bool = False) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 12), nn.ReLU(inplace), nn.Linear(12, 12), nn.ReLU(inplace)]
    return nn.Sequential(*layers, nn.Linear(12, 3)), torch.randn(4, 6), torch.arange(4) % 3


@pytest.mark.parametrize("inplace", [False, True])
def test_the_graph_goes_unless_outputs_were_overwritten(inplace: bool) -> None:
    """They are what makes it again, and would have to be computed anew."""
    model, x, y = perceptron(inplace)
    seen: list[weakref.ref[Tensor]] = []
    model[1].register_forward_hook(lambda _, given, out: seen.append(weakref.ref(out)))
    tape = record(
        model, cover(model).sites, lambda: functional.cross_entropy(model(x), y), once=True
    )
    assert tape.loss.requires_grad == inplace
    assert (seen[0]() is not None) == inplace


def test_a_graph_that_was_there_before_stays() -> None:
    """What the closure did not compute belongs to somebody else, who may differentiate it yet."""
    layers, x, y = perceptron()
    model = nn.Sequential(nn.LayerNorm(6), *layers)
    features = model[0](x)

    def closure() -> Tensor:
        return functional.cross_entropy(model[1:](features), y)

    report = Teleporter(model).step(closure)
    assert report.steps == 1
    assert report.growth == pytest.approx(1.5, rel=1e-3)
    features.sum().backward()
    assert model[0].weight.grad is not None


def test_a_closure_that_changes_its_ways_when_the_graph_is_made_again_is_refused() -> None:
    """The run for the tangents ends within the model, before it counts."""
    model, x, y = perceptron()
    calls = count(1)

    def closure() -> Tensor:
        h = model(x)
        return functional.cross_entropy(h if next(calls) != 2 else h + model(x), y)

    before = fingerprint(model)
    with pytest.raises(ClosureError, match="not deterministic: call 4"):
        Teleporter(model).step(closure)
    assert fingerprint(model) == before


class Recurrent(nn.Module):
    """One layer, called again and again on what the model's own parameters changed before."""

    def __init__(self, width: int, awkward: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(width)), nn.Linear(width, width)
        self.awkward = awkward

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x * self.scale))
        self.awkward(h)
        return torch.tanh(self.layer(torch.tanh(self.layer(h))))


@pytest.mark.parametrize("rows", [3, 8])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_forward_mode_pass_begun_again_has_what_the_first_took(rows: int, steps: int) -> None:
    """Between two calls of one layer it turns out that the closure needs gradients."""

    def moved(awkward: Callable[[Tensor], object]) -> Tensor:
        torch.manual_seed(0)
        model = Recurrent(24, awkward).double()
        x = torch.randn(rows, 24, dtype=torch.float64)
        report = Teleporter(model, steps=steps).step(lambda: model(x).square().mean())
        assert report.steps == steps
        assert "searched" not in report.reason
        return model.layer.weight.detach()

    expected = moved(lambda h: None)
    assert torch.allclose(moved(Tensor.retain_grad), expected, rtol=1e-9, atol=1e-12)


def test_a_graph_of_another_thread_stays() -> None:
    """Threads number what they compute each on its own: that one is ahead of this one."""
    layers, x, y = perceptron()
    model = nn.Sequential(nn.LayerNorm(6), *layers)
    features: list[Tensor] = []

    def prepare() -> None:
        one = torch.ones((), requires_grad=True)
        for _ in range(10_000):
            one.clone()
        features.append(model[0](x).square())

    thread = Thread(target=prepare)
    thread.start()
    thread.join()
    report = Teleporter(model).step(lambda: functional.cross_entropy(model[1:](features[0]), y))
    assert report.steps == 1
    features[0].sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("leaf", [True, False])
def test_a_loss_that_was_there_before_is_still_its_owners(leaf: bool) -> None:
    model, x, _ = perceptron()
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    loss = model.scale if leaf else model.scale.exp()

    def closure() -> Tensor:
        model(x)
        return loss

    assert Teleporter(model).step(closure).steps == 0
    loss.backward()
    assert model.scale.grad is not None


def test_a_closure_without_gradients_when_the_graph_is_made_again_is_refused() -> None:
    model, x, y = perceptron()
    calls = count(1)

    def closure() -> Tensor:
        loss = functional.cross_entropy(model(x), y)
        return loss.detach() if next(calls) == 2 else loss

    before = fingerprint(model)
    with pytest.raises(ClosureError, match="not deterministic: its loss has no gradient now"):
        Teleporter(model).step(closure)
    assert fingerprint(model) == before
