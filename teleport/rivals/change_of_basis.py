"""Change of basis: rescale every neuron by a positive number; no input notices.

How a factor is applied, and why the function stays, is in `teleport.rivals.rescaling`.

Source: Armenta, Judge, Painchaud, Skandarani, Lemaire, Gibeau-Sanchez, Spino and Jodoin 2023,
"Neural teleportation" (arXiv 2012.01118): factors drawn uniformly from [1 - spread, 1 + spread].
They also treat activations that are not homogeneous, by changing the activation of each neuron;
that is another network, and not done here.
"""

import torch
from torch import Tensor, nn

from teleport.errors import require
from teleport.rivals.batch import Batch
from teleport.rivals.climb import Move
from teleport.rivals.rescaling import ROUNDING, Rescaling
from teleport.rivals.rival import Rival


class ChangeOfBasisTeleporter(Rival):
    """Random change of basis, or the best of several (see the module for source and derivation).

    The identity on all inputs, so the held-out loss stays too. Uses no gradient to find where to
    go. Cost: two gradients; with ``draws`` > 1 one gradient for each draw.

    Limits: the networks of `Rescaling`.

    Args:
        model: the network.
        draws: 1 takes a random change of basis as it comes; more keep that with the largest
            gradient norm, or the start if none exceeds it.
        spread: factors are uniform in [1 - spread, 1 + spread], in (0, 1).
        seed: of the draws; successive steps draw on.

    Raises:
        UnsupportedModelError: for another model, or an activation that is not homogeneous.
        ValueError: for an argument out of range.
    """

    def __init__(
        self, model: nn.Module, draws: int = 1, spread: float = 0.5, *, seed: int = 0
    ) -> None:
        super().__init__(model, ROUNDING)
        require("draws", draws, isinstance(draws, int) and draws >= 1, "an integer >= 1")
        require("spread", spread, 0.0 < spread < 1.0, "in (0, 1), so that factors are positive")
        self.draws, self.spread = draws, spread
        self._generator = torch.Generator().manual_seed(seed)
        self._rescaling = Rescaling(model, self.coverage, "a change of basis")
        self._stages = self._rescaling.stages

    def _move(self, batch: Batch, loss: float, norm: float) -> Move:
        start = [stage.block.part.matrix() for stage in self._stages]
        best, best_norm = start, norm
        for _ in range(self.draws):
            for stage, matrix in zip(self._stages, start, strict=True):
                stage.block.part.write(matrix)
            self._rescaling.apply([self._draw(width) for width in self._rescaling.widths])
            if self.draws == 1:
                return Move((1.0,), "one random change of basis")
            _, drawn_norm = batch.measure()
            if drawn_norm > best_norm:
                best, best_norm = [s.block.part.matrix() for s in self._stages], drawn_norm
        for stage, matrix in zip(self._stages, best, strict=True):
            stage.block.part.write(matrix)
        if best is start:
            return Move((), f"none of {self.draws} changes of basis enlarges the gradient")
        return Move((1.0,), f"the best of {self.draws} changes of basis")

    def _draw(self, width: int) -> Tensor:
        uniform = torch.rand(width, generator=self._generator, dtype=torch.float64)
        return 1.0 + self.spread * (2.0 * uniform - 1.0)
