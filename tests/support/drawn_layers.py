"""Layers with one part, as Hypothesis draws them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport.layers.part import LinearMap
from teleport.layers.rule import rule_for
from tests.support.strategies import seeds


@dataclass(frozen=True)
class Layer:
    """A module with one part, its settings, and the shape of its inputs."""

    kind: type[nn.Module]
    shape: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    frozen_bias: bool = False
    seed: int = 0

    def build(self) -> tuple[nn.Module, LinearMap, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            module = self.kind(**self.settings, dtype=torch.float64)
            if self.frozen_bias and module.bias is not None:
                module.bias.requires_grad_(False)
            (part,) = rule_for(module).parts(module)
            return module, part, torch.randn(self.shape, dtype=torch.float64)


@st.composite
def linears(draw: st.DrawFn) -> Layer:
    width = st.integers(1, 6)
    d_in, d_out = draw(width), draw(width)
    leading = draw(st.lists(st.integers(1, 3), max_size=3))
    settings = {"in_features": d_in, "out_features": d_out, "bias": draw(st.booleans())}
    return Layer(nn.Linear, (*leading, d_in), settings, draw(st.booleans()), draw(seeds))


@st.composite
def convolutions(draw: st.DrawFn) -> Layer:
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    small = st.integers(1, 2)
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    padding = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
    settings = {
        "in_channels": groups * draw(small),
        "out_channels": groups * draw(small),
        "kernel_size": kernel,
        "stride": [1] * dims if padding == "same" else [draw(small) for _ in range(dims)],
        "dilation": [draw(small) for _ in range(dims)],
        "groups": groups,
        "padding": padding,
        "padding_mode": draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
        "bias": draw(st.booleans()),
    }
    shape = (settings["in_channels"], *(draw(st.integers(5, 6)) for _ in range(dims)))
    shape = (draw(small), *shape) if draw(st.booleans()) else shape
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return Layer(kind, shape, settings, draw(st.booleans()), draw(seeds))


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Layer:
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    small = st.integers(1, 2)
    stride = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(small) for _ in range(dims)]
    settings = {
        "in_channels": groups * draw(small),
        "out_channels": groups * draw(small),
        "kernel_size": [draw(st.integers(1, 3)) for _ in range(dims)],
        "stride": stride,
        "dilation": dilation,
        "groups": groups,
        "padding": draw(st.integers(0, 1)),
        "output_padding": [
            draw(st.integers(0, max(pair) - 1)) for pair in zip(stride, dilation, strict=True)
        ],
        "bias": draw(st.booleans()),
    }
    shape = (settings["in_channels"], *(draw(st.integers(3, 4)) for _ in range(dims)))
    shape = (draw(small), *shape) if draw(st.booleans()) else shape
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    return Layer(kind, shape, settings, draw(st.booleans()), draw(seeds))
