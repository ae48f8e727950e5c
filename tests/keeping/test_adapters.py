"""Low-rank adapters of PEFT in the null space: the old outputs are the same after any B."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from teleport import NullSpace, NullSpaceError, null_space
from tests.support.examples import examples
from tests.support.keeping import Learner
from tests.support.strategies import seeds

peft = pytest.importorskip("peft", reason="the extra peft is not installed")

KEPT = 1e-9
SEEN = 1e-3
few = examples(10)


def adapted(model: nn.Module, targets: list[str], **options: Any) -> nn.Module:
    config = peft.LoraConfig(r=3, target_modules=targets, **options)
    return peft.get_peft_model(copy.deepcopy(model), config).double()


def randomize_b(model: nn.Module) -> None:
    """Whatever an optimizer could do."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(10.0 * torch.randn_like(parameter))


@pytest.mark.verifies("thm-keep")
@few
@given(seeds, st.booleans(), st.booleans())
def test_old_outputs_are_the_same_after_any_b(seed: int, rslora: bool, wrapped: bool) -> None:
    learner = Learner.drawn(seed)
    space, targets = learner.space(), ["0", "3", "5"]
    if wrapped:
        model = adapted(learner.model, targets, use_rslora=rslora)
    else:
        config = peft.LoraConfig(r=3, target_modules=targets, use_rslora=rslora)
        model = peft.inject_adapter_in_model(config, copy.deepcopy(learner.model)).double()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    free = space.lora_(model)
    literal = learner.literal()
    for name in targets:
        width = len(literal[name]) - 1
        assert width - 2 <= free[name] <= width - 1
    randomize_b(model)
    assert (model(learner.old) - learner.out()).abs().max() <= KEPT * 1e2
    assert (model(learner.new) - learner.model(learner.new)).abs().max() > SEEN


@pytest.mark.verifies("thm-keep")
@few
@given(seeds, st.booleans(), st.integers(1, 2))
def test_rows_of_a_convolution_are_its_patches(seed: int, bias: bool, stride: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(4, 5, 3, stride=stride, padding=1, bias=bias)).double()
    old, new = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64)
    with_adapters = adapted(model, ["0"])
    null_space(model, [lambda: model(old)]).lora_(with_adapters)
    randomize_b(with_adapters)
    assert (with_adapters(old) - model(old)).abs().max() <= KEPT * 1e2
    assert (with_adapters(new) - model(new)).abs().max() > SEEN


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "Adagrad"])
def test_any_optimizer_keeps_the_old_outputs_and_learns(optimizer: str) -> None:
    learner = Learner.drawn(0)
    model = adapted(learner.model, ["0", "3"])
    learner.space().lora_(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if "lora_B" not in n}
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.05, weight_decay=0.1)
    loss = lambda: (model(learner.new) - learner.target).square().mean()  # noqa: E731
    before = float(loss().detach())
    for _ in range(20):
        made.zero_grad()
        loss().backward()
        made.step()
    assert (model(learner.old) - learner.out()).abs().max() <= KEPT
    assert float(loss().detach()) < before - SEEN
    held = dict(model.named_parameters())
    assert all(torch.equal(held[name], value) for name, value in frozen.items())


def test_rows_have_the_lengths_they_had() -> None:
    learner = Learner.drawn(0)
    model = adapted(learner.model, ["3"])
    (a,) = (p for n, p in model.named_parameters() if "lora_A" in n)
    before = a.detach().norm(dim=1)
    learner.space().lora_(model)
    assert torch.allclose(a.norm(dim=1), before, rtol=1e-12)
    assert not a.requires_grad


def test_below_tau_1_the_drift_is_that_of_the_energy_left_out() -> None:
    learner = Learner.drawn(0, samples=8)
    space = learner.space(0.9)
    model = adapted(learner.model, ["0"])
    space.lora_(model)
    randomize_b(model)
    layer = model.base_model.model[0]
    change = (layer(learner.old) - learner.model[0](learner.old)).detach()
    factors = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    move = layer.scaling["default"] * torch.nn.functional.pad(factors, (0, 1)).detach()
    bound = float(torch.linalg.matrix_norm(move, 2)) * space.bases["0"].residual
    assert SEEN < float(change.norm()) <= bound * (1 + 1e-9)


def test_where_inputs_span_everything_an_adapter_learns_nothing() -> None:
    learner = Learner.drawn(0, samples=8)
    model = adapted(learner.model, ["0", "3"])
    free = learner.space().lora_(model)
    assert free["0"] == 0
    assert free["3"] > 0
    rows = [p for n, p in model.named_parameters() if ".0.lora_A" in n]
    assert not rows[0].any()


def refused(space: NullSpace, model: nn.Module, match: str) -> None:
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(NullSpaceError, match=match):
        space.lora_(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"use_dora": True},
        {"modules_to_save": ["5"]},
    ],
    ids=str,
)
def test_what_else_would_be_trained_is_refused(options: dict[str, Any]) -> None:
    learner = Learner.drawn(0)
    model = adapted(learner.model, ["0", "3"], **options)
    refused(learner.space(), model, "would be trained, too")


def test_an_adapter_of_an_embedding_is_refused() -> None:
    """Of its factors PEFT trains the one with a column for every token, the old ones too."""
    model, tokens = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2)).double(), torch.arange(4)
    space = null_space(model, [lambda: model(tokens)])
    refused(space, adapted(model, ["0", "1"]), r"lora_embedding_A.*no embedding as a target")


def test_trained_adapters_are_refused() -> None:
    learner = Learner.drawn(0)
    model = adapted(learner.model, ["0", "3"])
    randomize_b(model)
    refused(learner.space(), model, "is not new: its B is not 0")


def to_be_trained_again(model: Any, how: str, folder: Path) -> Any:
    """What PEFT offers, each of which makes all factors of an adapter trainable."""
    if how == "choose":
        model.set_adapter("default")
    elif how == "disable":
        with model.disable_adapter():
            pass
    elif how == "copy":
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        model.set_adapter("default")
    else:
        model.save_pretrained(folder)
        base = model.unload()
        return peft.PeftModel.from_pretrained(base, folder, is_trainable=True).double()
    return model


@pytest.mark.parametrize("how", ["choose", "disable", "copy", "load"])
def test_adapters_stay_in_the_null_space_when_peft_frees_them(how: str, tmp_path: Path) -> None:
    learner = Learner.drawn(0)
    space, model = learner.space(), adapted(learner.model, ["0", "3"])
    space.lora_(model)
    model = to_be_trained_again(model, how, tmp_path)
    assert any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)
    for _ in range(2):  # adapters that have learned, too
        if how == "load":
            assert space.lora_(model).keys() == {"0", "3"}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
        before = (model(learner.new) - learner.target).square().mean()
        for _ in range(3):
            optimizer.zero_grad()
            (model(learner.new) - learner.target).square().mean().backward()
            optimizer.step()
        assert (model(learner.old) - learner.out()).abs().max() <= KEPT * 1e2
        assert (model(learner.new) - learner.target).square().mean() < before


def test_layers_outside_of_the_space_are_refused() -> None:
    learner = Learner.drawn(0)
    closures = [lambda: learner.model(learner.old)]
    space = null_space(learner.model, closures, exclude=["3"])
    model = adapted(learner.model, ["0", "3"])
    refused(space, model, "'3' has an adapter and no part in this null space")


def test_no_adapters_and_no_room_are_refused() -> None:
    learner = Learner.drawn(0, samples=math.prod((4, 4)))
    refused(learner.space(), learner.model, "no active low-rank adapter")
    refused(learner.space(), adapted(learner.model, ["0"]), "no adapter has a direction left")


def test_a_space_of_another_model_is_refused() -> None:
    learner = Learner.drawn(0)
    other = nn.Sequential(nn.Linear(5, 4)).double()
    refused(learner.space(), adapted(other, ["0"]), "has 5 inputs")


class _Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attention(x, x, x)[0]
        return out


def test_attention_in_one_module_is_refused_by_its_parts() -> None:
    """It was told to include a layer that the space has, in four parts."""
    model, x = _Attending().double(), torch.randn(2, 3, 8, dtype=torch.float64)
    space = null_space(model, lambda: model(x))
    with pytest.raises(NullSpaceError, match=r"one adapter for attention\.q, attention\.k"):
        space.lora_(adapted(model, ["attention"]))
