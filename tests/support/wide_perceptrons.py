"""Perceptrons on which the group of Zhao et al. acts: no narrower than their batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from teleport.rivals import Bend
from teleport.rivals.group_action import bend_of

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "Identity": nn.Identity,
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "ELU": lambda: nn.ELU(1.3),
    "Softplus": lambda: nn.Softplus(beta=0.7),
}


@dataclass(frozen=True)
class Case:
    """A perceptron no narrower than its batch, whose activations stay well inside their range."""

    samples: int
    widths: tuple[int, ...]
    activation: str = "Tanh"
    bias: bool = True
    seed: int = 0

    def build(self) -> "Problem":
        generator = torch.Generator().manual_seed(self.seed)
        layers: list[nn.Module] = []
        for d_in, d_out in zip(self.widths, self.widths[1:], strict=False):
            linear = nn.Linear(d_in, d_out, self.bias, dtype=torch.float64)
            for parameter in linear.parameters():
                drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data = (2 * drawn - 1) / d_in
            layers += [linear, ACTIVATIONS[self.activation]()]
        x = 2 * torch.rand(self.samples, self.widths[0], generator=generator, dtype=float64) - 1
        y = torch.randn(self.samples, self.widths[-1], generator=generator, dtype=float64)
        return Problem(nn.Sequential(*layers[:-1]), x, y, generator)


float64 = torch.float64


@dataclass(frozen=True)
class Problem:
    model: nn.Sequential
    x: Tensor
    y: Tensor
    generator: torch.Generator

    def closure(self) -> Tensor:
        return functional.mse_loss(self.model(self.x), self.y)

    @property
    def linears(self) -> list[nn.Linear]:
        return [m for m in self.model if isinstance(m, nn.Linear)]

    @property
    def matrices(self) -> list[Tensor]:
        return [
            torch.cat([p.detach().reshape(m.out_features, -1) for p in m.parameters()], dim=1)
            for m in self.linears
        ]

    @property
    def rows(self) -> Tensor:
        has_bias = self.linears[0].bias is not None
        return torch.cat([self.x, self.x.new_ones(len(self.x), int(has_bias))], dim=1)

    @property
    def bends(self) -> list[Bend]:
        return [bend_of([("", m)]) for m in self.model if not isinstance(m, nn.Linear)]

    def elements(self, size: float) -> list[Tensor]:
        """One group element per hidden layer, this far from the identity (spectral norm)."""
        drawn = [
            torch.randn(m.out_features, m.out_features, generator=self.generator, dtype=float64)
            for m in self.linears[:-1]
        ]
        return [torch.eye(len(d)) + size * d / torch.linalg.matrix_norm(d, 2) for d in drawn]

    def write(self, matrices: list[Tensor]) -> None:
        for linear, matrix in zip(self.linears, matrices, strict=True):
            linear.weight.data = matrix[:, : linear.in_features].clone()
            if linear.bias is not None:
                linear.bias.data = matrix[:, -1].clone()
