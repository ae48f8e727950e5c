"""Quantised weights stay and are named; experts that saw nothing may learn anything."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as PackedLinear
from torch.nn import functional

from teleport import null_space


class Int8Linear(nn.Module):
    """A frozen layer of eight bits, as libraries for large models have them."""

    def __init__(self, features: int) -> None:
        super().__init__()
        numbers = torch.randint(-127, 128, (features, features), dtype=torch.int8)
        self.weight = nn.Parameter(numbers, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype) / 127)


def packed(features: int) -> nn.Module:
    layer = PackedLinear(features, features)
    weight = torch.quantize_per_tensor(torch.randn(features, features), 0.05, 0, torch.qint8)
    layer.set_weight_bias(weight, None)
    return layer


def shaken(model: nn.Module) -> None:
    """As an optimizer may, only more: every floating-point weight moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += torch.randn_like(parameter)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Int8Linear, "no rule for Int8Linear"),
        (packed, "the weight of Linear is quantised"),
        (lambda d: nn.Linear(d, d).requires_grad_(False), "its weight does not require a gradient"),
    ],
)
def test_quantised_weights_stay_and_are_named(make: Any, why: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), make(9), nn.Tanh(), nn.Linear(9, 2))
    old = torch.randn(4, 6)
    space, before = null_space(model, [lambda: model(old)]), copy.deepcopy(model)
    assert set(space.bases) == {"0", "4"}
    assert space.frozen == {"2": why}
    with space.keep(model):
        shaken(model)
    new = torch.randn(4, 6)
    assert (model(new) - before(new)).abs().max() > 0.1
    assert (model(old) - before(old)).abs().max() < 1e-4
    assert f"2  frozen: {why}" in str(space.report(before, model, [old]))


class Experts(nn.Module):
    """Each row goes to one of three experts, by the signs of its first two entries."""

    def __init__(self, calls_all: bool) -> None:
        super().__init__()
        self.calls_all = calls_all
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long() + ((x[:, 0] > 0) & (x[:, 1] > 0)).long()
        out = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if self.calls_all or bool(mine.any()):
                out[mine] = expert(x[mine])
        return out


@pytest.mark.parametrize("calls_all", [True, False], ids=["with no rows", "not called"])
@pytest.mark.parametrize("tau", [0.9, 1.0])
def test_experts_that_saw_nothing_are_free(calls_all: bool, tau: float) -> None:
    torch.manual_seed(2)
    model, old = Experts(calls_all), torch.randn(12, 5)
    old[:, 0] = -old[:, 0].abs()
    old[:2, 0] *= -1
    old[:2, 1] = -old[:2, 1].abs()  # two rows for the second expert, none for the third
    closures = [lambda x=x: model(x) for x in old.split(4)]
    space, before = null_space(model, closures, tau), copy.deepcopy(model)
    ranks = [space.bases[f"experts.{n}"].rank for n in range(3)]
    assert ranks[0] >= 4
    assert 1 <= ranks[1] <= 2
    assert ranks[2] == 0
    with space.keep(model):
        shaken(model)
    moved = [
        (a.weight - b.weight).norm() for a, b in zip(model.experts, before.experts, strict=True)
    ]
    assert moved[2] > 1.0
    if tau == 1.0:
        assert (model(old) - before(old)).abs().max() < 1e-4
    layers = space.report(before, model, [old]).layers
    assert [layer.kept for layer in layers] == ranks
    assert layers[2].measured == 0.0
    assert layers[2].predicted == 0.0
