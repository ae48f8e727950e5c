"""Ways to learn the next task without losing the old ones.

Each is a class with the same few hooks in a training step, and one line in `LEARNING_METHODS`.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from teleport.keeping.keeper import Keeper
from teleport.keeping.null_space import NullSpace, null_space
from teleport.subspace import Basis


class Plain:
    """SGD, and nothing else; the base of the other methods.

    Args:
        tau: share of input energy kept, where the method uses a null space.
        draws: source of the method's own random choices.
    """

    uses_tau = False

    def __init__(self, tau: float, draws: torch.Generator) -> None:
        self.tau, self.draws = tau, draws

    def learned(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Called after every task with the images of it that may be kept, and their labels."""

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What to train on instead of a batch of the new task."""
        return inputs, targets

    def before_step(self, model: nn.Module) -> None:
        """Called when the gradients are there."""

    def after_step(self, model: nn.Module) -> None:
        """Called when the optimizer has moved the parameters."""

    def ended(self) -> None:
        """Called when the last step on a task is done."""


class Replay(Plain):
    """Some of the kept old images, with their labels, join every batch."""

    PER_BATCH = 16

    def __init__(self, tau: float, draws: torch.Generator) -> None:
        super().__init__(tau, draws)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def learned(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Keep images and labels."""
        joined = zip(*self._kept, (inputs, targets), strict=True)
        self._kept = [tuple(torch.cat(parts) for parts in joined)]  # type: ignore[list-item]

    def batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch with old images, drawn from all old tasks alike, behind it."""
        old, labels = self._kept[0]
        rows = torch.randint(len(old), (self.PER_BATCH,), generator=self.draws)
        return torch.cat([inputs, old[rows]]), torch.cat([targets, labels[rows]])


class Projected(Plain):
    """Every gradient is projected into the null space of the kept old images.

    This is Gradient Projection Memory (Saha et al. 2021), with biases and with one tau for all
    layers; spaces of several tasks are joined whole.
    """

    uses_tau = True
    space: NullSpace | None = None

    def learned(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Add the null space of these images; labels are not used, images not kept."""
        new = self._space(model, inputs)
        self.space = new if self.space is None else self.space.merge(new)

    def before_step(self, model: nn.Module) -> None:
        """Project the gradients."""
        if self.space is not None:
            self.space.project_(model)

    def _space(self, model: nn.Module, inputs: Tensor) -> NullSpace:
        return null_space(model, [lambda: model(inputs)], self.tau)


class Lazy(Projected):
    """The displacement is projected, once every ten steps and at the end of the task."""

    EVERY = 10
    _keeper: Keeper | None = None

    def learned(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Add the null space, and count displacements from here."""
        super().learned(model, inputs, targets)
        assert self.space is not None
        self._keeper = self.space.keep(model, every=self.EVERY)

    def before_step(self, model: nn.Module) -> None:
        """Leave the gradients as they are."""

    def after_step(self, model: nn.Module) -> None:
        """Project if it is time."""
        if self._keeper is not None:
            with self._keeper:
                pass

    def ended(self) -> None:
        """Project what has come since."""
        if self._keeper is not None:
            self._keeper.project()


class Random(Projected):
    """The control: gradients projected as in `Projected`, with random subspaces of its ranks."""

    def _space(self, model: nn.Module, inputs: Tensor) -> NullSpace:
        found = super()._space(model, inputs)
        bases = {n: b for n, b in found.bases.items() if isinstance(b, Basis)}  # no embeddings here
        return NullSpace({n: random_basis(b, self.draws) for n, b in bases.items()})


LEARNING_METHODS: dict[str, type[Plain]] = {
    "plain": Plain,
    "projected": Projected,
    "lazy": Lazy,
    "replay": Replay,
    "random": Random,
}


def random_basis(basis: Basis, draws: torch.Generator) -> Basis:
    """A basis of a random subspace with the same ranks, uniformly distributed.

    Its singular values are those of ``basis``; they say nothing about the random vectors.
    """
    shape = basis.vectors.shape
    noise = torch.randn(shape, dtype=basis.vectors.dtype, generator=draws)
    kept = torch.arange(shape[-1]) < basis.ranks[..., None]
    orthonormal = torch.linalg.qr(noise).Q * kept[..., None, :]
    return replace(basis, vectors=orthonormal)
