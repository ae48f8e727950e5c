"""The Hessian's action on a vector where nothing can be differentiated twice: two gradients.

PyTorch differentiates a gradient once more by what its backward functions have recorded. A custom
``autograd.Function`` may record nothing, marked ``once_differentiable`` or computing by a kernel
of its own, and `torch.autograd.grad` then leaves its terms out without a word. So what is not made
of PyTorch's own functions alone is told by

    (∇L(θ + h v) − ∇L(θ − h v)) / 2h,    h ‖v‖ = eps^⅓ ‖θ‖,

at which truncation, O(h²), and rounding, eps / h, are about as large: two thirds of the digits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from teleport.objective import ascent_double_backward, gradient, squared_norm
from teleport.runtime.closures import Closure, evaluate


def hessian_times(
    closure: Closure,
    parameters: Sequence[nn.Parameter],
    velocity: Sequence[Tensor],
    precision: torch.dtype,
) -> tuple[list[Tensor], str]:
    """H v, one tensor per parameter, and how, unless by double backward: by differences, and why.

    Args:
        closure: whose loss it is.
        parameters: at which; moved and put back where differences are taken.
        velocity: v, one tensor per parameter.
        precision: the coarsest that the loss is computed in.
    """
    why = _hidden(closure)
    if not why:
        try:
            return ascent_double_backward(closure, parameters, velocity), ""
        except RuntimeError as error:  # NotImplementedError is one
            why = str(error).split(". ")[0].splitlines()[0]
            if "implement" not in why:
                raise
    how = f"differences of gradients: {why}"
    return _difference(closure, parameters, velocity, precision), how


def coarser(dtype: torch.dtype) -> torch.dtype:
    """The next coarser precision: a difference of gradients is right to more digits than it has."""
    return torch.float32 if dtype == torch.float64 else torch.bfloat16


def _hidden(closure: Closure) -> str:
    """Which function of the loss may hide its second derivative, if one does."""
    with torch.enable_grad():
        ahead, seen = [evaluate(closure).grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            function = type(node)._forward_cls  # those of FSDP stand around the model
            if not function.__module__.startswith("torch.distributed."):
                name = function.__name__
                return f"{name}, a custom autograd.Function, may have no second derivative"
        ahead += [before for before, _ in node.next_functions]
    return ""


def _difference(
    closure: Closure,
    parameters: Sequence[nn.Parameter],
    velocity: Sequence[Tensor],
    precision: torch.dtype,
) -> list[Tensor]:
    start = [p.detach().clone() for p in parameters]
    weights, speed = (math.sqrt(sum(map(squared_norm, some))) for some in (start, velocity))
    if speed == 0.0:
        return [torch.zeros_like(p) for p in start]
    h = torch.finfo(precision).eps ** (1 / 3) * (weights or 1.0) / speed

    def put(step: float) -> None:
        """Past autograd: recorded graphs stay valid, since all is put back before they serve."""
        for p, origin, v in zip(parameters, start, velocity, strict=True):
            p.data.copy_(torch.add(origin, v, alpha=step))

    sides = []
    try:
        for step in (h, -h):
            put(step)
            grads = gradient(closure, parameters)[1]
            sides.append([g.to_dense() if g.is_sparse else g for g in grads])
    finally:
        put(0.0)
    return [(ahead - behind) / (2 * h) for ahead, behind in zip(*sides, strict=True)]
