"""Small models with old and new data, and the projection of displacements written out."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from teleport import NullSpace, null_space


@dataclass(frozen=True)
class Learner:
    """A perceptron, its old data, and what is to be learned; all float64.

    `literal` is the space written out: for every linear layer the projector, ``[d_in + 1, d_in +
    1]``, of what is orthogonal to all its old inputs with their 1.
    """

    model: nn.Sequential
    old: Tensor
    new: Tensor
    target: Tensor

    @classmethod
    def drawn(cls, seed: int, samples: int = 2) -> "Learner":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = nn.Sequential(
                nn.Linear(7, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 8), nn.GELU(),
                nn.Linear(8, 2),
            ).double()  # fmt: skip
            old, new = torch.randn(2 * samples, 7, dtype=torch.float64).split(samples)
            return cls(model, old, new, torch.randn(samples, 2, dtype=torch.float64))

    @property
    def linears(self) -> dict[str, nn.Linear]:
        named = self.model.named_modules()
        return {name: module for name, module in named if isinstance(module, nn.Linear)}

    def space(self, tau: float = 1.0) -> NullSpace:
        return null_space(self.model, [lambda: self.model(self.old)], tau)

    def loss(self) -> Tensor:
        return functional.mse_loss(self.model(self.new), self.target)

    def out(self) -> Tensor:
        return self.model(self.old).detach()

    def copy(self) -> "Learner":
        return Learner(copy.deepcopy(self.model), self.old, self.new, self.target)

    def literal(self) -> dict[str, Tensor]:
        projectors, x = {}, self.old
        for name, module in self.model.named_children():
            if isinstance(module, nn.Linear):
                rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1).detach()
                _, values, right = torch.linalg.svd(rows)
                rank = int((values > 1e-10 * values[0]).sum())
                projectors[name] = right[rank:].T @ right[rank:]
            x = module(x)
        return projectors

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def project_literally(
    learner: Learner, start: dict[str, Tensor], projectors: dict[str, Tensor]
) -> None:
    """``W <- W0 + (W - W0) P`` for all linear layers; everything else back to where it was."""
    now = learner.state()
    for name, p in learner.model.named_parameters():
        if name.rsplit(".", 1)[0] not in projectors:
            p.data.copy_(start[name])
    for name, projector in projectors.items():
        moved = torch.cat(
            [
                now[f"{name}.weight"] - start[f"{name}.weight"],
                (now[f"{name}.bias"] - start[f"{name}.bias"])[:, None],
            ],
            dim=1,
        )
        kept = moved @ projector
        learner.linears[name].weight.data.copy_(start[f"{name}.weight"] + kept[:, :-1])
        learner.linears[name].bias.data.copy_(start[f"{name}.bias"] + kept[:, -1])
