"""Models that are more than a chain of layers, each with a batch and a closure."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """LayerNorm, a wide hidden layer and a skip connection; then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 12), nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.down(functional.gelu(self.up(self.norm(h))))
        return self.head(h)


class Attention(nn.Module):
    """One head of self-attention by plain operations, over 3 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.k, self.v = (nn.Linear(n, 14) for n in (3, 14, 14, 14))
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.reshape(-1, 3, 3))
        scores = self.q(h) @ self.k(h).transpose(-1, -2) / 14**0.5
        return self.head((scores.softmax(-1) @ self.v(h)).mean(1))


class Twice(nn.Module):
    """One layer used twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.core, self.head = nn.Linear(9, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x))
        return self.head(torch.tanh(self.core(torch.tanh(self.core(h)))))


class Tied(nn.Module):
    """Two layers that hold the same weight; a free layer before and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Linear(9, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(torch.tanh(self.embed(x)))))))


def zoo() -> nn.Sequential:
    """BatchNorm in train mode, Dropout, LayerNorm and PReLU around three linear layers."""
    return nn.Sequential(
        nn.Linear(9, 20), nn.BatchNorm1d(20), nn.PReLU(), nn.Dropout(0.5),
        nn.Linear(20, 20), nn.LayerNorm(20), nn.Tanh(), nn.Dropout(0.5),
        nn.Linear(20, 3),
    )  # fmt: skip


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 18), nn.ReLU(), nn.Linear(18, 3)
    )


GRAPHS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "plain": plain,
    "residual": Residual,
    "tied": Tied,
    "twice": Twice,
    "zoo": zoo,
}


@dataclass(frozen=True)
class Task:
    """A model with six samples and their classes."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def closure(self) -> Tensor:
        return functional.cross_entropy(self.model(self.x), self.y)


def task(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Task:
    """One of `GRAPHS` with a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = 3 if name == "residual" else 9
        x, y = torch.randn(6, width, dtype=torch.float64), torch.randint(3, (6,))
        return Task(GRAPHS[name]().to(dtype), x.to(dtype), y)


def without_dropout(model: nn.Module) -> None:
    """What teleportation does: dropout off, everything else as the user had it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
