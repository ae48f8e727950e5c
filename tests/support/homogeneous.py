"""Networks with positively homogeneous activations: what a change of basis can rescale."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.strategies import seeds

BENDS = {
    "ReLU": nn.ReLU, "LeakyReLU": lambda: nn.LeakyReLU(0.2), "Identity": nn.Identity,
    "PReLU": nn.PReLU,
}  # fmt: skip
POOLS = {
    "none": nn.Identity,
    "max": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "average": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "adaptive": lambda: nn.AdaptiveAvgPool2d(2),
}


@dataclass(frozen=True)
class Case:
    """A perceptron, or a convolutional network that ends in a linear layer."""

    channels: tuple[int, ...]
    groups: int = 1
    convolutions: int = 0
    activation: str = "ReLU"
    pool: str = "none"
    bias: bool = True
    seed: int = 0

    def build(self) -> tuple[nn.Sequential, Tensor, Tensor]:
        torch.manual_seed(self.seed)
        d = torch.float64
        layers: list[nn.Module] = []
        x = torch.randn(3, self.channels[0], *([5, 5] if self.convolutions else []), dtype=d)
        features = self.channels[0]
        for place, width in enumerate(self.channels[1:]):
            if place < self.convolutions:
                groups = self.groups if place else 1
                layers += [
                    nn.Conv2d(features, width, 3, padding=1, bias=self.bias, groups=groups),
                    BENDS[self.activation](),
                    POOLS[self.pool](),
                ]
            else:
                if place == self.convolutions:
                    layers += [nn.Flatten(), nn.Dropout(0.5)]
                    features = nn.Sequential(*layers).to(d)(x).shape[1]
                layers += [nn.Linear(features, width, self.bias), BENDS[self.activation]()]
            features = width
        y = torch.randn(3, self.channels[-1], dtype=d)
        return nn.Sequential(*layers[:-1]).to(d), x, y


@st.composite
def cases(draw: st.DrawFn) -> Case:
    convolutions = draw(st.integers(0, 2), label="convolutions")
    groups = draw(st.integers(1, 2), label="groups")
    maps = [groups * draw(st.integers(1, 2)) for _ in range(convolutions)]
    hidden = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2), label="hidden")
    return Case(
        (draw(st.integers(1, 3), label="in"), *maps, *hidden, 2),
        groups,
        convolutions,
        draw(st.sampled_from(sorted(BENDS)), label="activation"),
        draw(st.sampled_from(sorted(POOLS)), label="pool"),
        draw(st.booleans(), label="bias"),
        draw(seeds, label="seed"),
    )
