"""The networks of the experiments: shapes, causality, null spaces, and that every one teleports."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import teleport
from teleport.lab.experiments.models import READOUTS, Transformer, cnn, initialise, mlp
from teleport.lab.experiments.residual import ResidualNetwork, ResNet18
from teleport.lab.experiments.sequence import Mamba, SequenceNetwork, TTTLinear


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Tiny:
    """A small copy of a network of the experiments, and a batch for it."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    answer: tuple[int, ...]


def tokens() -> Tensor:
    return torch.randint(11, (4, 6))


NETWORKS = {
    "mlp": Tiny(lambda: mlp(9, 3, (16, 16)), lambda: torch.randn(4, 9), (4, 3)),
    "cnn": Tiny(lambda: cnn((3, 4, 8), 8, 3), lambda: torch.randn(4, 3, 8, 8), (4, 3)),
    "residual": Tiny(lambda: ResidualNetwork((4, 8), 3), lambda: torch.randn(4, 3, 8, 8), (4, 3)),
    "resnet18": Tiny(lambda: ResNet18(3, width=4), lambda: torch.randn(4, 3, 8, 8), (4, 3)),
    "classifier": Tiny(
        lambda: Transformer(2, 3, 6, width=16), lambda: torch.randn(4, 6, 2), (4, 3)
    ),
    "regression": Tiny(
        lambda: Transformer(2, 2, 6, width=16, readout="last"),
        lambda: torch.randn(4, 6, 2),
        (4, 2),
    ),
    "language": Tiny(
        lambda: Transformer(11, 11, 6, width=16, readout="all", tokens=True, causal=True),
        tokens,
        (4, 6, 11),
    ),
    "mamba": Tiny(
        lambda: SequenceNetwork(2, 3, Mamba, width=16), lambda: torch.randn(4, 6, 2), (4, 3)
    ),
    "ttt": Tiny(
        lambda: SequenceNetwork(2, 3, TTTLinear, width=16, readout="all"),
        lambda: torch.randn(4, 6, 2),
        (4, 6, 3),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_answers_in_its_shape_and_teleports(name: str) -> None:
    torch.manual_seed(0)
    tiny = NETWORKS[name]
    model, x = tiny.make().double(), tiny.batch()
    x = x.double() if x.is_floating_point() else x
    outputs = model(x)
    assert outputs.shape == tiny.answer
    targets = torch.randint(tiny.answer[-1], tiny.answer[:-1]).flatten()
    report = teleport.Teleporter(model, growth=1.2).step(
        lambda: cross_entropy(model(x).flatten(0, -2), targets)
    )
    moved = [layer for layer in report.layers if layer.status == "moved"]
    assert moved, report
    assert not report.rolled_back, report
    assert report.growth == pytest.approx(1.2, rel=1e-6)
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-9)
    assert torch.allclose(model(x), outputs, atol=1e-8)


def test_the_papers_sizes() -> None:
    # Counted by hand from the channels, kernels and widths in the paper's text.
    assert parameters(mlp(784, 10)) == 784 * 1024 + 1024 + 1024**2 + 1024 + 10240 + 10
    assert parameters(cnn()) == 448 + 4640 + 18496 + 10 * (64 * 16) + 10
    convolutions = [m for m in ResidualNetwork().modules() if isinstance(m, nn.Conv2d)]
    channels = [convolutions[0].in_channels, *(m.out_channels for m in convolutions)]
    assert channels == [3, 64, 64, 64, 128, 128, 128, 256, 256, 256]
    assert [m.stride for m in convolutions].count((2, 2)) == 3
    widths = list(pairwise(channels))
    assert parameters(ResidualNetwork()) == sum(9 * a * b + b for a, b in widths) + 256 * 200 + 200
    assert parameters(ResNet18()) == 11_173_962, "the well-known size of the CIFAR variant"


@pytest.mark.parametrize(
    ("d_in", "outputs", "length", "heads", "blocks", "tokens"),
    [
        (1, 10, 784, 2, 2, False),
        (321, 321, 168, 4, 4, False),
        (862, 862, 168, 4, 4, False),
        (10_000, 10_000, 256, 4, 4, True),
    ],
    ids=["sequential MNIST", "electricity", "traffic", "Penn Treebank"],
)
def test_the_papers_transformers(
    d_in: int, outputs: int, length: int, heads: int, blocks: int, tokens: bool
) -> None:
    width = 64 * heads  # "each having a dimension of 64"
    model = Transformer(d_in, outputs, length, width, heads, blocks, tokens=tokens)
    assert [m.head_dim for m in model.modules() if isinstance(m, nn.MultiheadAttention)] == (
        [64] * blocks
    )
    first = d_in * width + (0 if tokens else width) + length * width
    attention = 4 * (width * width + width)
    feedforward = width * 4 * width + 4 * width + 4 * width * width + width
    norms = 2 * 2 * width
    head = 2 * width + width * outputs + outputs
    assert parameters(model) == first + blocks * (attention + feedforward + norms) + head


@given(
    channels=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    side=st.integers(8, 19),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_a_residual_network_is_its_literal_formula(
    channels: list[int], side: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model = ResidualNetwork(channels, 3).double()
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    h = x
    for down, one, two in (tuple(stage.children()) for stage in model.stages):
        h = torch.relu(down(h))
        h = torch.relu(h + two(torch.relu(one(h))))
        side = (side + 1) // 2
        assert h.shape[-1] == side
    assert torch.allclose(model(x), model.head(h.flatten(2).mean(2)), atol=1e-12)


@given(
    seed=st.integers(0, 999),
    length=st.integers(2, 6),
    norm_first=st.booleans(),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_a_causal_transformer_does_not_see_the_future(
    seed: int, length: int, norm_first: bool, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, length - 1))
    torch.manual_seed(seed)
    settings_ = {"width": 8, "readout": "all", "tokens": True, "norm_first": norm_first}
    for causal in (True, False):
        model = Transformer(7, 7, 6, causal=causal, **settings_).double()  # type: ignore[arg-type]
        x = torch.randint(7, (2, length))
        changed = x.clone()
        changed[:, place] = (x[:, place] + 1) % 7
        moved = (model(x) - model(changed)).abs().amax(dim=(0, 2)) > 1e-9
        assert moved[:place].any() == (place > 0 and not causal)
        assert moved[place:].all()


@given(seed=st.integers(0, 999), norm_first=st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_readout_is_taken_from_the_answers_at_all_positions(seed: int, norm_first: bool) -> None:
    torch.manual_seed(seed)
    model = Transformer(2, 3, 6, width=8, readout="all", norm_first=norm_first).double()
    x = torch.randn(2, 6, 2, dtype=torch.float64)
    answers = model(x)
    for readout, expected in (("mean", answers.mean(1)), ("last", answers[:, -1])):
        model.readout = readout
        assert torch.allclose(model(x), expected, atol=1e-12)


def test_the_last_position_sees_all_and_an_unknown_readout_is_refused() -> None:
    torch.manual_seed(0)
    model = Transformer(2, 3, 6, width=8, readout="last")
    x = torch.randn(1, 6, 2, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).all()
    for readout in READOUTS:
        assert model.__class__(2, 3, 6, width=8, readout=readout)(x).shape[-1] == 3
    with pytest.raises(ValueError, match="mean"):
        Transformer(2, 3, 6, readout="first")


@given(seed=st.integers(0, 99), width=st.integers(2, 6))
@settings(max_examples=15, deadline=None)
def test_a_narrow_mlp_has_no_null_space_and_says_so(seed: int, width: int) -> None:
    torch.manual_seed(seed)
    model = mlp(5, 3, (width, width), activation="tanh").double()
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randint(3, (40,))
    before = [p.clone() for p in model.parameters()]
    report = teleport.Teleporter(model).step(lambda: cross_entropy(model(x), y))
    assert [layer.null_dim for layer in report.layers if layer.name != "0"] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert "null space" in report.reason


@pytest.mark.parametrize("name", NETWORKS)
def test_the_initial_gain_scales_what_the_head_answers(name: str) -> None:
    tiny = NETWORKS[name]
    torch.manual_seed(0)
    plain = tiny.make()
    torch.manual_seed(0)
    scaled = tiny.make()
    initialise(scaled, head_gain=3.0)
    head = [m for m in plain.modules() if isinstance(m, nn.Linear)][-1]
    pairs = zip(plain.parameters(), scaled.parameters(), strict=True)
    for one, other in pairs:
        assert torch.equal(other, 3.0 * one if one is head.weight else one)


def test_he_initialisation_has_its_variance_in_every_layer() -> None:
    torch.manual_seed(0)
    model = ResidualNetwork((32, 64), 300)
    initialise(model, "he")
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            fan_in = layer.weight[0].numel()
            assert float(layer.weight.detach().square().mean()) == pytest.approx(
                2 / fan_in, rel=0.15
            )
            assert layer.bias is not None
            assert not layer.bias.any()
    with pytest.raises(ValueError, match="default"):
        initialise(model, "xavier")
