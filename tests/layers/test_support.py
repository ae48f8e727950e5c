"""What `supported` says of a model is what a teleport then does."""

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune

from teleport import Teleporter, UnsupportedModelError, supported
from teleport.direction import direction, project_ascent
from teleport.layers.support import cover
from teleport.objective import ascent_double_backward, trainable
from teleport.recording import record
from teleport.subspace import RowSpace
from tests.support.examples import examples
from tests.support.fingerprint import fingerprint
from tests.support.networks import GRAPHS, task
from tests.support.strategies import gradient_norm, seeds


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", amount=0.5)


def replaced(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: 2 * functional.linear(x, layer.weight, layer.bias)
    return layer


def fixed(layer: nn.Module) -> nn.Module:
    layer.weight.requires_grad_(False)
    return layer


OBSTACLES: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "old weight norm": (old_weight_norm, "computed from other parameters"),
    "pruned": (pruned, "computed from other parameters"),
    "replaced forward": (replaced, "forward method has been replaced"),
    "requires no gradient": (fixed, "does not require a gradient"),
    "spectral norm": (parametrizations.spectral_norm, ""),  # any reason
    "weight norm": (parametrizations.weight_norm, ""),
}


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3)
    ).double()


def closure_of(model: nn.Module, width: int = 9) -> Callable[[], Tensor]:
    x, y = torch.randn(5, width, dtype=torch.float64), torch.randint(3, (5,))
    return lambda: functional.cross_entropy(model(x), y)


def teleported(model: nn.Module, closure: Callable[[], Tensor], growth: float = 2.0) -> None:
    """The gradient norm grows as wanted and the loss stays, whatever is frozen."""
    before, loss = gradient_norm(model, closure), float(closure().detach())
    report = Teleporter(model, growth=growth).step(closure)
    assert not report.rolled_back, report.reason
    assert abs(gradient_norm(model, closure) / before / growth - 1) <= 1e-6
    assert abs(float(closure().detach()) - loss) <= report.tolerance


def test_layers_with_a_rule_can_move() -> None:
    found = supported(perceptron())
    assert found.moves == ["0", "2", "4"]
    assert found.frozen == {}


def test_layers_without_a_rule_are_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.PReLU())
    assert supported(model).frozen == {
        "1": "frozen: no rule for BatchNorm1d",
        "2": "frozen: no rule for PReLU",
    }


def test_the_table_prints_every_layer_with_kind_and_size() -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40))
    lines = str(supported(model)).splitlines()
    assert lines[0].split() == ["layer", "kind", "parameters", "verdict"]
    assert lines[1].split() == ["0", "Linear", "1,240", "can", "move"]
    assert lines[2].split()[:4] == ["1", "BatchNorm1d", "80", "frozen:"]
    assert not any(line != line.rstrip() for line in lines)


def test_a_model_that_is_one_layer_is_named() -> None:
    assert "(model)" in str(supported(nn.BatchNorm1d(3)))


@pytest.mark.parametrize("name", GRAPHS)
def test_every_parameter_is_in_one_line_or_shared(name: str) -> None:
    model = task(name).model
    found = supported(model)
    total = sum(p.numel() for p in model.parameters())
    frozen_parts = sum("in part" in why for why in found.frozen.values())
    assert frozen_parts or sum(count for _, _, count, _ in found.lines) == total


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_layer_that_only_looks_linear_is_frozen_with_its_reason(name: str) -> None:
    spoil, reason = OBSTACLES[name]
    model = perceptron()
    model[2] = spoil(model[2])
    found = supported(model)
    assert found.moves == ["0", "4"]
    whys = [why for layer, why in found.frozen.items() if layer.split(".")[0] == "2"]
    assert whys
    assert any(reason in why and len(why) > len("frozen: ") for why in whys)


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_model_with_a_frozen_layer_teleports_with_the_others(name: str) -> None:
    """Spectral norm in train mode updates a buffer at every call: evaluated as it is in use."""
    model = perceptron()
    model[2] = OBSTACLES[name][0](model[2])
    teleported(model.eval(), closure_of(model))


def test_layers_that_share_everything_are_one_block() -> None:
    model = perceptron()
    model[4] = nn.Linear(20, 20).double()
    model[4].weight, model[4].bias = model[2].weight, model[2].bias
    model.append(nn.Linear(20, 3).double())
    assert supported(model).moves == ["0", "2", "5"]
    assert supported(model).frozen == {}
    teleported(model, closure_of(model))


def test_layers_that_share_in_part_are_frozen() -> None:
    found = supported(task("tied").model)
    assert found.moves == ["embed", "head"]
    assert set(found.frozen) == {"one", "two"}
    assert all("shares a parameter" in why for why in found.frozen.values())


def test_a_weight_that_a_layer_without_rule_uses_too_is_frozen() -> None:
    class Scaled(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    head = nn.Linear(4, 5)
    found = supported(nn.Sequential(Scaled(head.weight), nn.Linear(4, 4), head))
    assert found.moves == ["1"]
    assert "shares a parameter" in found.frozen["2"]


def test_one_module_under_two_names_is_one_block() -> None:
    core = nn.Linear(4, 4)
    assert supported(nn.Sequential(core, nn.Tanh(), core)).moves == ["0"]


class Attending(nn.Module):
    """Self-attention between two linear layers; its tokens fit into no layer's full width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attn = nn.Linear(3, 14), nn.MultiheadAttention(14, 2, batch_first=True)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x.reshape(-1, 3, 3)))
        return self.head(torch.tanh(self.attn(h, h, h, need_weights=False)[0].mean(1)))


def attending(seed: int = 0) -> tuple[Attending, Callable[[], Tensor]]:
    torch.manual_seed(seed)
    model = Attending().double()
    x, y = torch.randn(3, 9, dtype=torch.float64), torch.randint(3, (3,))
    return model, lambda: functional.cross_entropy(model(x), y)


def test_what_attention_is_made_of_its_rule_answers_for() -> None:
    model, _ = attending()
    found = supported(model)
    assert found.moves == ["embed", *(f"attn.{part}" for part in ("q", "k", "v", "out")), "head"]
    assert found.frozen == {}
    assert "no rule" not in str(found)
    assert "out_proj" not in str(found)


def test_include_and_exclude_match_names_of_parts() -> None:
    model, closure = attending()
    report = Teleporter(model, include=["*.q", "head"], exclude=["head"]).step(closure)
    status = {layer.name: layer.status for layer in report.layers}
    assert status.pop("attn.q") == "moved"
    assert set(status.values()) == {"excluded"}


def test_patterns_that_match_no_layer_are_refused_with_the_names() -> None:
    model, _ = attending()
    with pytest.raises(ValueError, match=r"attn\.q"):
        Teleporter(model, include=["*.query"])


def test_strict_refuses_a_frozen_layer_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    with pytest.raises(UnsupportedModelError, match="BatchNorm1d"):
        Teleporter(model, strict=True)
    Teleporter(perceptron(), strict=True)


def test_a_model_without_any_layer_is_refused_with_the_reasons() -> None:
    with pytest.raises(UnsupportedModelError, match="no rule for BatchNorm1d"):
        Teleporter(nn.BatchNorm1d(3))


@pytest.mark.parametrize("name", [*GRAPHS, "attending"])
def test_asking_changes_nothing(name: str) -> None:
    model = attending()[0] if name == "attending" else task(name).model
    before = fingerprint(model)
    supported(model)
    assert fingerprint(model) == before


LEAKS: dict[str, tuple[Callable[[Attending], Tensor], set[str]]] = {
    "attn.out": (lambda m: m.attn.out_proj.weight, {"attn.out"}),
    "attn.q, k and v": (lambda m: m.attn.in_proj_weight, {"attn.q", "attn.k", "attn.v"}),
    "embed": (lambda m: m.embed.bias, {"embed"}),
}


@pytest.mark.verifies("thm-survivor")
@pytest.mark.parametrize("leak", LEAKS)
@examples(8)
@given(seed=seeds)
@sdpa_kernel(SDPBackend.MATH)  # the fused ones have no second derivative
def test_with_a_leaking_part_the_tangent_direction_is_double_backwards(
    leak: str, seed: int
) -> None:
    """Rounding: a few thousand operations on numbers of the size of Hg."""
    model, loss = attending(seed)
    penalised, left_out = LEAKS[leak]
    closure = lambda: loss() + 0.1 * penalised(model).square().sum()  # noqa: E731
    tape = record(model, cover(model).sites, closure)
    assert {block.name for block in tape.left_out} == left_out
    bases = {}
    for block in tape.blocks:
        space = RowSpace()
        space.add(tape.rows(block))
        bases[block] = space.basis()
    ascent = dict(
        zip(trainable(model), ascent_double_backward(closure, trainable(model)), strict=True)
    )
    wanted = project_ascent({b: b.part.of(ascent) for b in bases}, bases)
    found = direction(tape, model, closure, bases)
    size = sum(float(a.square().sum()) for a in ascent.values()) ** 0.5
    assert abs(tape.norm_squared() / gradient_norm(model, closure) ** 2 - 1) <= 1e-11
    assert all((found[b] - wanted[b]).norm() <= 1e-11 * (1 + size) for b in bases)
    assert any(d.any() for d in found.values())


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leaking_part_stays_and_the_others_move(leak: str) -> None:
    model, loss = attending()
    penalised, left_out = LEAKS[leak]
    before = penalised(model).detach().clone()
    closure = lambda: loss() + 0.1 * penalised(model).square().sum()  # noqa: E731
    report = Teleporter(model, growth=2.0).step(closure)
    assert abs(report.growth / 2.0 - 1) <= 1e-6
    assert torch.equal(penalised(model), before)
    moved = {layer.name for layer in report.layers if layer.status == "moved"}
    assert moved
    assert not moved & left_out
