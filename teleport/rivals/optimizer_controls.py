"""Controls on the optimizer: what could explain a gain without moving any weight."""

import inspect
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from teleport.errors import require
from teleport.layers.support import cover


class RaisedLearningRate:
    """Takes an optimizer's steps with a raised learning rate for a while.

    A gradient enlarged by a factor and a learning rate raised by it give plain SGD the same first
    step. To be used as long as the gradient of the teleported run stays grown (`growth_duration`).

    The displacement of each step is multiplied, which is the same as multiplying the learning rate
    in every optimizer whose step is proportional to it (all of ``torch.optim`` but Rprop, LBFGS and
    those with ``lr_decay``), and does not disturb schedulers. Costs a copy of the parameters.

    Args:
        optimizer: any.
        factors: for all parameters, or one per parameter (absent: 1).
        steps: how many steps are raised; after them it is the optimizer alone.

    Raises:
        ValueError: for a factor that is not positive, or a negative number of steps.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> raised = RaisedLearningRate(torch.optim.SGD(layer.parameters(), lr=0.1), 3.0, steps=1)
        >>> before, layer.weight.grad = layer.weight.item(), torch.ones(1, 1)
        >>> raised.step()
        >>> round(before - layer.weight.item(), 3)
        0.3
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factors: float | Mapping[nn.Parameter, float],
        steps: int,
    ) -> None:
        given = factors.values() if isinstance(factors, Mapping) else (factors,)
        for factor in given:
            require("factor", factor, 0.0 < factor < math.inf, "> 0 and finite")
        require("steps", steps, steps >= 0, ">= 0")
        self.optimizer = optimizer
        self.factors = factors
        self.left = steps

    def step(self) -> None:
        """One step of the optimizer, raised while any are left."""
        if self.left == 0:
            self.optimizer.step()
            return
        self.left -= 1
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        self.optimizer.step()
        with torch.no_grad():
            for parameter, start in zip(parameters, before, strict=True):
                parameter.copy_(start.lerp(parameter, self._factor(parameter)))

    def _factor(self, parameter: nn.Parameter) -> float:
        if isinstance(self.factors, Mapping):
            return self.factors.get(parameter, 1.0)
        return self.factors


def factors_by_parameter(
    model: nn.Module, growths: Mapping[str, float]
) -> dict[nn.Parameter, float]:
    """A factor per layer, as in `Rehearsal.growths`, as a factor per parameter."""
    return {
        parameter: growths[block.name]
        for block in cover(model).blocks
        if block.name in growths
        for parameter in block.parameters
    }


def growth_duration(teleported: Sequence[float], plain: Sequence[float], growth: float) -> int:
    """For how many steps the gradient of a teleported run stays grown.

    Args:
        teleported: gradient norms step by step, from the first step after the teleport.
        plain: those of the same run without teleport.
        growth: factor of the teleport on the norm, > 1.

    Returns:
        Steps until their ratio is first below √growth, half of the growth on a logarithmic scale.
    """
    pairs = enumerate(zip(teleported, plain, strict=True))
    ended = (step for step, (grown, norm) in pairs if grown < math.sqrt(growth) * norm)
    return next(ended, len(plain))


def reset_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer forget: momentum, moments and step counts are as in a new one.

    Public code that builds a new optimizer after each teleport does this as a side effect.
    (The control "warm restart", SGDR, is ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts``.)
    """
    known = inspect.signature(type(optimizer)).parameters
    arguments = {k: v for k, v in optimizer.defaults.items() if k in known}
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.state = type(optimizer)(groups, **arguments).state
