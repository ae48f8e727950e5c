"""Level-set teleportation by linearisation: on any model, with Hessian-vector products only.

The problem is ``max ½‖∇L(ω)‖²`` over ``L(ω) = L(ω₀)``. At ω both sides are replaced by their
first-order models, and a quadratic term bounds the step (a sequential quadratic step):

    max_d  ⟨H g, d⟩ - ‖d‖² / 2η    subject to    L(ω) + ⟨g, d⟩ = L(ω₀).

Its solution is ``d = η (H g - λ g) - c g`` with ``λ = ⟨g, H g⟩ / ‖g‖²``, the projection on the
tangent of the level set, and ``c = (L(ω) - L(ω₀)) / ‖g‖²``, a Newton step back to it. Each step
leaves the level set by ``½ dᵀ H d``, of the order of η²; without the way back these errors add up.

Source: the problem and its solution by linearisation are those of Mishkin, Bietti and Gower 2024
(arXiv 2403.03362). They admit ``L(ω) <= L(ω₀)``; here it is the level itself, as of a teleport.
The step above is derived here from the problem; their rule for the step size is not reproduced.
"""

import torch
from torch import nn

from teleport.rivals.batch import Batch
from teleport.rivals.climb import Move, Ray, StepRule, climb
from teleport.rivals.rival import MAX_DRIFT, Rival


class LevelSetTeleporter(Rival):
    """Level-set teleportation by linearisation (see the module for the derivation and source).

    Cost of a step: one double backward pass, about 4 gradients; with ``growth`` one gradient more
    for each trial of the line search. Limits: none on the model; the loss drifts as the square of
    the step, on the batch already, and nothing bounds it but ``max_drift``.

    Args:
        model: any module.
        steps: directions, one after the other.
        lr: step size η.
        growth: instead of ``lr``: wanted factor on the gradient norm.
        return_to_level: whether each step also corrects the drift of those before it; without it
            every step is the bare projected gradient.
        max_drift: largest relative change of the batch loss. Default 0.01.

    Raises:
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int = 8,
        lr: float | None = None,
        *,
        growth: float | None = None,
        return_to_level: bool = True,
        max_drift: float | None = MAX_DRIFT,
    ) -> None:
        super().__init__(model, max_drift)
        self._rule = StepRule(steps, lr, growth)
        self._return = return_to_level

    def _move(self, batch: Batch, loss: float, norm: float) -> Move:
        return climb(batch, self._rule, norm, lambda: self._look(batch, loss))

    def _look(self, batch: Batch, level: float) -> Ray:
        loss, velocity, ascent = batch.ascent()
        flat = torch.cat([v.flatten().double() for v in velocity])
        along = torch.cat([a.flatten().double() for a in ascent])
        start = [p.detach().clone() for p in batch.parameters]
        square = float(flat @ flat)
        rise = float(flat @ along)
        above = loss - level if self._return else 0.0

        def go(step: float) -> None:
            back = (step * rise + above) / square if square else 0.0
            move = step * along - back * flat
            pieces = move.split([p.numel() for p in start])
            with torch.no_grad():
                for parameter, place, piece in zip(batch.parameters, start, pieces, strict=True):
                    parameter.copy_(place + piece.reshape(place.shape).to(place))

        projected = float(along @ along) - (rise**2 / square if square else 0.0)
        return Ray(go, projected)
