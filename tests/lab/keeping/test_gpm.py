"""Gradient Projection Memory's protocol: its data, its thresholds, its steps."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from teleport.data import load
from teleport.lab.experiments.models import mlp
from teleport.lab.keeping.methods import (
    LEARNING_METHODS,
    Gpm,
    GpmGrowing,
    GpmLazy,
    Plain,
    Replay,
    TwoSided,
)
from teleport.lab.keeping.tasks import SEQUENCES
from teleport.lab.keeping.training import SequenceRun, default_strategies, run_strategies
from teleport.lab.records.runs import read_runs
from tests.support.examples import examples

SEEDS = st.integers(0, 2**31)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return mlp(9, 3, hidden=(8, 7), bias=False).double()


def data(seed: int, count: int = 12) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 9, generator=draws, dtype=torch.float64)
    return x * torch.arange(1, 10).pow(-1.0), torch.randint(3, (count,), generator=draws)


def learn(method: Plain, model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    """The hooks in the order of `teleport.lab.keeping.training`."""
    optimizer = method.optimizer(model.parameters(), lr=lr)  # type: ignore[call-arg]
    method.begins(model, optimizer)
    inputs = method.prepared(x)
    for step in range(steps):
        rows = [step % len(x), (3 * step + 1) % len(x)]
        optimizer.zero_grad()
        cross_entropy(method.outputs(model, inputs[rows]), y[rows]).backward()
        method.before_step(model)
        optimizer.step()
        method.after_step(model)
    method.ended()


@pytest.mark.verifies("thm-keep")
@given(SEEDS, st.sampled_from([0.6, 0.9, 1.0]))
@examples(8)
def test_gradients_of_projected_inputs_are_the_projected_gradients(seed: int, tau: float) -> None:
    """And so every step is that of `NullSpace.project_`, over two tasks."""
    ours, theirs = network(seed), network(seed)
    method = LEARNING_METHODS["gpm"](tau, torch.Generator())
    for task in range(2):
        x, y = data(seed + task, 4)
        method.learned(ours, x, y)
        literal = copy.deepcopy(method)
        assert isinstance(literal, Gpm)
        new, labels = data(seed + 100 + task)
        learn(method, ours, new, labels, 6, 0.1)
        assert literal.space is not None
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
        for step in range(6):
            rows = [step % 12, (3 * step + 1) % 12]
            optimizer.zero_grad()
            cross_entropy(theirs(new[rows]), labels[rows]).backward()
            literal.space.project_(theirs)
            optimizer.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-11)


@pytest.mark.verifies("thm-keep")
@pytest.mark.parametrize("name", ["gpm", "gpm-lazy", "gpm-growing", "gpm-adam"])
def test_at_tau_1_all_old_outputs_stay_while_something_is_learned(name: str) -> None:
    model, method = network(0), LEARNING_METHODS[name](1.0, torch.Generator())
    old = [data(task, 2) for task in range(2)]
    for task, (x, y) in enumerate(old):
        method.learned(model, x, y)
        before = [model(x) for x, _ in old[: task + 1]]
        start = copy.deepcopy(model)
        new, labels = data(50 + task)
        rate = 0.02 if name == "gpm-adam" else 0.3
        learn(method, model, new, labels, GpmLazy.EVERY + 7, rate)
        for (x, _), was in zip(old, before, strict=False):
            assert torch.allclose(model(x), was, rtol=0, atol=1e-11)
        assert cross_entropy(model(new), labels) < cross_entropy(start(new), labels) - 1e-3


def test_the_thresholds_are_those_of_the_protocol_and_grow_where_they_shall() -> None:
    layers = ["0", "2", "4"]
    method = Gpm(0.95, torch.Generator())
    assert method._taus(layers) == pytest.approx({"0": 0.95, "2": 0.99, "4": 0.99})
    growing = GpmGrowing(0.95, torch.Generator())
    seen = []
    for task in range(9):
        seen.append(growing._taus(layers)["0"])
        growing.learned(network(0), *data(task, 3))
    assert seen == pytest.approx([0.95 + 0.005 * task for task in range(9)])


@given(SEEDS, st.floats(0.01, 100))
@examples(5)
def test_the_two_sided_step_minimises_distance_plus_the_rise_of_old_losses(
    seed: int, strength: float
) -> None:
    """Per layer ``|W - V|^2 / 2 + s tr(G D A D') / 2`` is stationary, after any number of tasks."""
    model, method = network(seed), TwoSided(1.0, torch.Generator().manual_seed(seed))
    method.STRENGTH = strength
    for task in range(2):
        method.learned(model, *data(seed + task))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    method.begins(model, optimizer)
    origins = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.data += torch.randn(p.shape, generator=method.draws, dtype=p.dtype)
    moved = [p.detach().clone() for p in model.parameters()]
    method.after_step(model)
    assert all(torch.equal(p, v) for p, v in zip(model.parameters(), moved, strict=True))
    method.ended()
    rows = zip(model.parameters(), origins, moved, method._sums, strict=True)
    for p, origin, v, (seen, felt) in rows:
        slope = p - v + 0.5 * strength / 2 * felt @ (p - origin) @ seen
        assert slope.norm() < 1e-10 * (1 + strength) * v.norm()
        assert (p - origin).norm() < (v - origin).norm()


def test_the_two_sides_of_a_last_layer_with_one_input_are_its_loss_s_curvature() -> None:
    """There the product of both is the Hessian itself, but for the draw of the labels."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False)).double()
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64).expand(20000, 2)
    method = TwoSided(1.0, torch.Generator().manual_seed(0))
    method.learned(model, x, torch.zeros(20000, dtype=torch.long))
    ((seen, felt),) = method._sums

    def loss(weight: Tensor) -> Tensor:
        return cross_entropy(x[:1] @ weight.mT, torch.tensor([0]))

    found = torch.autograd.functional.hessian(loss, model[0].weight.detach())
    product = torch.einsum("ik,jl->ijkl", felt, seen)
    assert torch.allclose(product, found, rtol=0, atol=0.05)
    assert found.abs().max() > 0.3


def test_two_sides_keep_the_old_loss_better_than_plain_steps() -> None:
    rises = {}
    for kind in (Plain, TwoSided):
        model, method = network(3), kind(1.0, torch.Generator().manual_seed(0))
        old, labels = data(0, 60)
        learn(Plain(1.0, torch.Generator()), model, old, labels, 300, 0.3)
        method.learned(model, old, labels)
        before = cross_entropy(model(old), labels)
        new, targets = data(1, 60)
        start = cross_entropy(model(new), targets)
        learn(method, model, new, targets, 150, 0.3)
        assert cross_entropy(model(new), targets) < start
        rises[kind] = cross_entropy(model(old), labels) - before
    assert rises[TwoSided] < 0.75 * rises[Plain]


def test_what_is_kept_is_counted() -> None:
    x, y = data(0, 4)
    gpm, replay = Gpm(1.0, torch.Generator()), Replay(1.0, torch.Generator())
    assert gpm.stored() == replay.stored() == (0, 0)
    gpm.learned(network(0), x, y)
    replay.learned(network(0), x, y)
    assert gpm.space is not None
    ranks = {n: b.rank for n, b in gpm.space.bases.items()}
    assert ranks == {"0": 4, "2": 4, "4": 4}
    vectors = 8 * (9 * 4 + 8 * 4 + 7 * 4)
    assert gpm.stored()[0] >= vectors
    assert gpm.stored()[1] == 0
    assert replay.stored() == (4 * 9 * 8 + 4 * 8, 4)


def test_the_data_are_those_of_the_protocol() -> None:
    size = SEQUENCES["gpm-mnist"].presets["cpu"]
    assert (size.batch_size, size.steps, size.first_steps) == (10, 5 * 54000 // 10, 27000)
    assert (size.hidden, size.bias, size.first_lr, size.memory) == ((100, 100), False, 0.01, 300)
    assert size.validation == 6000
    tasks = SequenceRun("gpm-mnist", "tiny").tasks([load("mnist-sample")], 0)
    assert len(tasks) == 10
    images, _ = tasks[0].training()
    assert tasks[0].images(images).min() == pytest.approx(-0.1307 / 0.3081)
    assert tasks[0].images(images).max() == pytest.approx((1 - 0.1307) / 0.3081)


@pytest.mark.slow
def test_a_record_says_what_is_stored(tmp_path: Path) -> None:
    course = SequenceRun("gpm-mnist", "tiny")
    run_strategies(course, default_strategies("gpm-mnist"), [0], tmp_path)
    runs = read_runs(tmp_path)
    assert [run.config["strategy"]["method"] for run in runs] == list(
        SEQUENCES["gpm-mnist"].methods
    )
    for run in runs:
        assert run.status == "finished"
        kept = [row["stored_bytes"] for row in run.evaluations]
        assert (kept[-1] > 0) == (run.config["strategy"]["method"] != "plain")
        assert kept == sorted(kept)
        assert {row["stored_labels"] for row in run.evaluations} == {0}
