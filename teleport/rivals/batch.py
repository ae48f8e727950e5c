"""One teleport batch: what every rival measures and differentiates."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from teleport.errors import NonFiniteLossError
from teleport.objective import (
    ascent_double_backward,
    gradient,
    mean_grad_norm,
    mean_gradient,
    trainable,
)
from teleport.runtime.closures import Closure


class Batch:
    """One teleport batch: its loss, gradient and ascent direction at the model's parameters.

    Args:
        model: its trainable parameters are what is differentiated in.
        closures: equal parts of the batch; the loss is their mean.
    """

    def __init__(self, model: nn.Module, closures: Sequence[Closure]) -> None:
        self.closures = closures
        self.parameters = trainable(model)

    def measure(self) -> tuple[float, float]:
        """Loss and gradient norm; one gradient."""
        return mean_grad_norm(self.closures, self.parameters)

    def norm_squared(self) -> float:
        """Squared gradient norm, infinite where the loss is not finite."""
        try:
            return self.measure()[1] ** 2
        except NonFiniteLossError:
            return math.inf

    def ascent(self) -> tuple[float, list[Tensor], list[Tensor]]:
        """Loss, gradient g and H g, one tensor per parameter; about 4 gradients."""
        if len(self.closures) == 1:
            return self._ascent_of_one(self.closures[0])
        loss, velocity = mean_gradient(self.closures, self.parameters)
        shares = [ascent_double_backward(c, self.parameters, velocity) for c in self.closures]
        ascent = [sum_(pieces) / len(shares) for pieces in zip(*shares, strict=True)]
        return loss, velocity, ascent

    def _ascent_of_one(self, closure: Closure) -> tuple[float, list[Tensor], list[Tensor]]:
        loss, live = gradient(closure, self.parameters, create_graph=True)
        velocity = [g.detach() for g in live]
        attached = [(g, v) for g, v in zip(live, velocity, strict=True) if g.requires_grad]
        if not attached:
            return float(loss), velocity, [torch.zeros_like(v) for v in velocity]
        ascent = torch.autograd.grad(
            [g for g, _ in attached],
            self.parameters,
            [v for _, v in attached],
            materialize_grads=True,
        )
        return float(loss), velocity, list(ascent)


def sum_(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of tensors of one shape, as a tensor."""
    return torch.stack(list(tensors)).sum(0)
