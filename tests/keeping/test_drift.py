"""The report: predicted and measured drift against a layer written out."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport import NullSpaceError, null_space
from tests.support.examples import examples
from tests.support.keeping import Learner
from tests.support.strategies import seeds


def trained(learner: Learner, tau: float) -> tuple[object, nn.Module]:
    """The space, and the model before it learned in it."""
    space, before = learner.space(tau), copy.deepcopy(learner.model)
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=1e-2)
    with space.attach(optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            learner.loss().backward()
            optimizer.step()
    return space, before


@pytest.mark.verifies("thm-drift")
@examples(8)
@given(seeds, st.floats(0.5, 1.0), st.integers(1, 8))
def test_measured_is_written_out_and_within_the_prediction(
    seed: int, tau: float, samples: int
) -> None:
    """‖ΔW R‖ by a loop over the samples, and the bound with its slack for rounding."""
    learner = Learner.drawn(seed, samples)
    space, before = trained(learner, tau)
    halves = learner.old.split(max(1, samples // 2))
    report = space.report(before, learner.model, halves, [learner.new])
    assert [layer.name for layer in report.layers] == ["0", "3", "5"]
    for layer in report.layers:
        index = int(layer.name)
        was, now = before[index], learner.model[index]
        squared = outputs = 0.0
        for x in before[:index](learner.old):
            squared += float((now(x) - was(x)).square().sum())
            outputs += float(was(x).square().sum())
        assert layer.measured == pytest.approx(math.sqrt(squared), rel=1e-6, abs=1e-12)
        assert layer.relative == pytest.approx(math.sqrt(squared / outputs), rel=1e-6, abs=1e-12)
        assert layer.measured <= layer.predicted * (1 + 1e-9) + 1e-12
        basis = space.bases[layer.name]
        assert layer.locked == basis.rank / (basis.rank + basis.null_dim)
    gap = (learner.model(learner.old) - before(learner.old)).detach()
    assert report.old.largest == pytest.approx(float(gap.abs().max()), rel=1e-9, abs=1e-15)
    assert report.old.relative == pytest.approx(
        float(gap.norm() / before(learner.old).norm()), rel=1e-9, abs=1e-15
    )
    gap = (learner.model(learner.new) - before(learner.new)).detach()
    assert report.held_out.largest == pytest.approx(float(gap.abs().max()), rel=1e-9, abs=1e-15)


def test_the_locked_share_counts_weights() -> None:
    """8, 10 and 9 input directions with 2 kept; 9, 8 and 2 outputs; 18 weights of LayerNorm."""
    learner = Learner.drawn(0)
    space, before = trained(learner, 1.0)
    report = space.report(before, learner.model, [learner.old])
    free = 6 * 9 + 8 * 8 + 7 * 2
    assert report.locked == pytest.approx(1 - free / (8 * 9 + 10 * 8 + 9 * 2 + 18))
    assert report.held_out is None


def test_a_report_prints_and_becomes_json() -> None:
    learner = Learner.drawn(0)
    space, before = trained(learner, 0.9)
    report = space.report(before, learner.model, [learner.old], [learner.new])
    text = str(report)
    for part in ("predicted", "measured", "held-out", "of the weights are locked", "2  frozen: "):
        assert part in text
    held = json.loads(json.dumps(report.to_dict()))
    assert held["layers"][1]["measured"] == report.layers[1].measured
    assert held["old"]["largest"] == report.old.largest


def test_a_model_that_was_frozen_since_is_measured_like_one_that_was_not() -> None:
    """As PEFT leaves it after the adapters are merged; it was a KeyError."""
    learner = Learner.drawn(0, samples=4)
    space, before = trained(learner, 0.9)
    told = space.report(before, learner.model, [learner.old])
    learner.model.requires_grad_(False)
    assert space.report(before, learner.model, [learner.old]) == told
    assert not any(p.requires_grad for p in learner.model.parameters())


def test_models_are_as_before_a_report() -> None:
    learner = Learner.drawn(0)
    space, before = trained(learner, 1.0)
    learner.model.train()
    start = learner.state()
    space.report(before, learner.model, [learner.old])
    assert learner.model.training
    assert all(torch.equal(value, learner.state()[name]) for name, value in start.items())


def test_a_shared_table_is_measured_in_both_uses() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(9, 4).double()
    before = nn.Sequential(table, nn.Linear(4, 9, bias=False).double())
    before[1].weight = table.weight
    tokens = torch.tensor([0, 1, 1, 2])
    space, after = null_space(before, [lambda: before(tokens)], 0.7), copy.deepcopy(before)
    with torch.no_grad(), space.keep(after):
        after[0].weight.add_(torch.randn(9, 4))
    (layer,) = space.report(before, after, [tokens]).layers
    move = (after[0].weight - before[0].weight).detach()
    measured = move[tokens].square().sum() + (before[0](tokens) @ move.T).square().sum()
    assert layer.measured == pytest.approx(float(measured.sqrt()))
    assert 0 < layer.measured <= layer.predicted


class Named(nn.Module):
    """Takes named arguments and returns a mapping, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, object]:
        return {"out": self.layer(x) * scale, "count": torch.tensor(len(x)), "none": None}


@pytest.mark.parametrize("kind", ["mapping", "tuple", "tensor"])
def test_batches_are_arguments_of_the_model(kind: str) -> None:
    model, x = Named(), torch.randn(4, 3)
    space, after = null_space(model, [lambda: model(x)]), copy.deepcopy(model)
    after.layer.bias.data += 1.0
    batch = {"mapping": {"x": x, "scale": 2.0}, "tuple": (x, 2.0), "tensor": x}[kind]
    report = space.report(model, after, [batch])
    assert report.old.largest == pytest.approx(1.0 if kind == "tensor" else 2.0, rel=1e-5)


def test_outputs_without_numbers_and_other_models_are_refused() -> None:
    learner = Learner.drawn(0)
    space = learner.space()
    with pytest.raises(NullSpaceError, match="not those of this null space"):
        space.report(learner.model, nn.Linear(2, 2), [learner.old])
    argmax = nn.Sequential(nn.Linear(3, 2))
    argmax.register_forward_hook(lambda m, args, out: out.argmax(-1))
    own = null_space(argmax, [lambda: argmax(torch.randn(1, 3))])
    wide = nn.Sequential(nn.Linear(3, 1)), nn.Sequential(nn.Linear(3, 2))  # they would broadcast
    with pytest.raises(NullSpaceError, match=r"other shapes: \[\(1, 1\)\] and \[\(1, 2\)\]"):
        space.drift(*wide, [torch.randn(1, 3)])
    with pytest.raises(TypeError, match=r"called with a list.*unpack the lists of a DataLoader"):
        own.report(argmax, argmax, [[torch.randn(1, 3)]])
    with pytest.raises(NullSpaceError, match="no tensor of real numbers"):
        own.report(argmax, argmax, [torch.randn(1, 3)])
