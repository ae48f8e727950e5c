"""Moves in the null space along other objectives than the gradient norm.

The null space keeps the batch loss whatever a move in it is made from (``thm-invariance``), so any
objective can be climbed there. Reviewers of the paper asked for flatter places instead of steeper
ones; symmetry teleportation was tried with such objectives by Zhao et al. (arXiv 2305.13404).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from teleport.direction import Direction
from teleport.errors import require
from teleport.objective import ascent_double_backward, gradient, squared_norm
from teleport.report import TeleportReport
from teleport.rivals.batch import Batch, sum_
from teleport.rivals.climb import Move
from teleport.rivals.controls import as_still, move_norms, null_landscape
from teleport.rivals.rival import MAX_DRIFT, Rival
from teleport.runtime.closures import Closure

Slope = Callable[[Closure, Sequence[nn.Parameter]], list[Tensor]]
"""The gradient of an objective of a closure's loss, one tensor per parameter."""


def shorter_gradient(closure: Closure, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Of ``-½‖g‖²``: the teleport's objective, downhill."""
    return [-slope for slope in ascent_double_backward(closure, parameters)]


def flatter_curvature(closure: Closure, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Of ``-gᵀ H g / ‖g‖²``: less curvature along the gradient."""
    squared, bent = _second_order(closure, parameters)
    return _differentiated(-bent / squared, parameters)


def step_decrease(lr: float) -> Slope:
    """Of ``lr ‖g‖² - ½ lr² gᵀ H g``: by how much a step of gradient descent lowers the loss.

    To second order. Where the curvature grows with the gradient, as it does at a tuned ``lr``, a
    longer gradient alone does not.

    Raises:
        ValueError: unless ``lr`` is positive and finite.
    """
    require("lr", lr, 0.0 < lr < math.inf, "> 0 and finite")

    def slope(closure: Closure, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        squared, bent = _second_order(closure, parameters)
        return _differentiated(lr * squared - lr**2 / 2 * bent, parameters)

    return slope


def sharpness(rho: float = 0.05) -> Slope:
    """Of ``-L(ω + ρ g / ‖g‖)``, the perturbation held fixed, as sharpness-aware minimisation does.

    Source: Foret et al., arXiv 2010.01412, whose ρ is the default.

    Raises:
        ValueError: unless ``rho`` is positive and finite.
    """
    require("rho", rho, 0.0 < rho < math.inf, "> 0 and finite")

    def slope(closure: Closure, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        _, grads = gradient(closure, parameters)
        norm = math.sqrt(sum(map(squared_norm, grads)))
        start = [p.detach().clone() for p in parameters]
        if norm == 0.0:
            return [torch.zeros_like(p) for p in start]
        try:
            with torch.no_grad():
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.add_(grad, alpha=rho / norm)
            return [-g for g in gradient(closure, parameters)[1]]
        finally:
            with torch.no_grad():
                for parameter, before in zip(parameters, start, strict=True):
                    parameter.copy_(before)

    return slope


def _second_order(closure: Closure, parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """``‖g‖²`` and ``gᵀ H g``, both with their graph."""
    _, grads = gradient(closure, parameters, create_graph=True)
    with torch.enable_grad():
        squared = torch.stack([g.square().sum() for g in grads]).sum()
        if not squared.requires_grad:
            return squared, torch.zeros_like(squared)
        turned = torch.autograd.grad(
            squared / 2, parameters, create_graph=True, materialize_grads=True
        )
        pairs = zip(grads, turned, strict=True)
        return squared, torch.stack([(g * t).sum() for g, t in pairs]).sum()


def _differentiated(value: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    return list(torch.autograd.grad(value, parameters, materialize_grads=True))


class ObjectiveStep(Rival):
    """One step in the joint null space along the gradient of any objective.

    As long as the move of a teleport, all layers together. Cost: that of the slope, the bases, and
    two gradients.

    Args:
        model: any module with a covered layer.
        slope: gradient of the objective that is to grow.
        like: report of the teleport to match in length; moves nothing if that did not.
    """

    def __init__(self, model: nn.Module, slope: Slope, like: TeleportReport) -> None:
        super().__init__(model, MAX_DRIFT)
        self._slope, self._like = slope, like
        self._length = math.hypot(*move_norms(like).values())

    def _move(self, batch: Batch, loss: float, norm: float) -> Move:
        if not self._length:
            return as_still(self._like)
        landscape = null_landscape(self, batch)
        bases = landscape.bases([b for b in landscape.blocks if b not in landscape.fixed], 1.0)
        slopes = dict(zip(batch.parameters, self._of_batch(batch), strict=True))
        along: Direction = {
            block: basis.project(block.part.of(slopes))
            for block, basis in bases.items()
            if basis.null_dim > 0
        }
        length = math.sqrt(sum(map(squared_norm, along.values())))
        if not 0.0 < length < math.inf:
            return Move((), f"the objective's slope in the null space has the norm {length:g}")
        step = self._length / length
        landscape.advance(along, step)
        landscape.write()
        return Move((step,), "a step in the null space along another objective")

    def _of_batch(self, batch: Batch) -> list[Tensor]:
        """The objective of the mean loss of all parts."""
        parts = batch.closures
        return self._slope(lambda: sum_([part() for part in parts]) / len(parts), batch.parameters)
