"""The teleport objective, half the squared gradient norm, and its gradient by definition.

The norm is that of a `Metric`: the Euclidean one for T (paper equation 4), or one in which the
gradient is divided as an optimizer divides it, for ``D_M = ½ gᵀ M⁻¹ g`` (``thm-geometry``). A step
of SGD goes along the gradient g, a step of Adam roughly along ``M⁻¹ g`` with ``M = diag(√v̂ + ε)``:
`metric_of` reads M from an optimizer, so that a teleport can enlarge what its next step gains to
first order.

`ascent_double_backward` differentiates through the gradient, as the paper does: the reference for
`teleport.direction`, and the method of choice where forward-mode differentiation lacks an
operation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from teleport.errors import OptimizerStateError
from teleport.layers.support import WeightMatrix
from teleport.runtime.closures import Closure, evaluate, without_gradients
from teleport.runtime.precision import at_least_single, scaled, sum_of_squares
from teleport.runtime.ranks import ALONE, Ranks


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters the gradient is taken in: all that require one."""
    return [p for p in model.parameters() if p.requires_grad]


def squared_norm(tensor: Tensor) -> float:
    """Sum of squares: row by row in the tensor's precision, over the rows in float64.

    A float32 sum over a million entries is wrong in the fifth digit, and a float64 copy of them
    takes fifty times as long as the sum.
    """
    rows = at_least_single(tensor)
    rows = rows.reshape(1, -1) if tensor.dim() < 2 else rows.flatten(1)
    found = float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
    return found if 1e-30 < found < math.inf else sum_of_squares(rows)  # squares in float32's range


BlockOrParameter = WeightMatrix | nn.Parameter
"""Whose gradient it is: of a block as its matrix ``[*groups, d_out, d_in]``, or of a parameter."""


@dataclass(frozen=True, eq=False)
class Metric:
    """The norm ``√(gᵀ M⁻¹ g)`` of gradients, for a diagonal M that does not change.

    Attributes:
        inverse: ``M⁻¹`` by parameter, elementwise, at least in single precision; None for M = I.
        name: of the norm, for reports.
    """

    inverse: Mapping[nn.Parameter, Tensor] | None = None
    name: str = "gradient norm"

    def velocity(self, of: BlockOrParameter, grad: Tensor, scale: float = 1.0) -> Tensor:
        """``scale M⁻¹ g``: the tangent direction of the objective."""
        inverse = self._inverse(of)
        return scaled(grad, scale) if inverse is None else (inverse * scale * grad).to(grad.dtype)

    def squared_norm(self, of: BlockOrParameter, grad: Tensor) -> float:
        """``gᵀ M⁻¹ g``."""
        inverse = self._inverse(of)
        return squared_norm(grad if inverse is None else inverse.sqrt() * grad)

    def _inverse(self, of: BlockOrParameter) -> Tensor | None:
        if self.inverse is None:
            return None
        return of.part.of(self.inverse) if isinstance(of, WeightMatrix) else self.inverse[of]

    def of_velocities(self) -> "Metric":
        """The metric in which the gradient has the norm that its velocity has in the Euclidean."""
        if self.inverse is None:
            return self
        return Metric({p: inverse.square() for p, inverse in self.inverse.items()}, self.name)


EUCLIDEAN = Metric()

Gradient = dict[nn.Parameter, Tensor]

Shares = dict[BlockOrParameter, float]
"""What each covered block, and each parameter outside of them, has of a squared gradient norm."""


def shares_of(
    gradient: Mapping[nn.Parameter, Tensor],
    blocks: Sequence[WeightMatrix],
    metric: Metric = EUCLIDEAN,
) -> Shares:
    """The shares in the squared norm of a gradient that is given parameter by parameter."""
    covered = {parameter for block in blocks for parameter in block.parameters}
    shares: Shares = {p: metric.squared_norm(p, g) for p, g in gradient.items() if p not in covered}
    shares |= {b: metric.squared_norm(b, b.part.of(gradient)) for b in blocks}
    return shares


def gradient(
    closure: Closure, parameters: Sequence[nn.Parameter], create_graph: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Loss and its gradient; zeros where the loss does not depend on a parameter.

    Args:
        closure: returns the scalar loss.
        parameters: what to differentiate in.
        create_graph: keep the graph, so that the gradient can be differentiated again.

    Returns:
        The loss (detached) and one tensor per parameter. ``.grad`` is not touched.

    Raises:
        ClosureError: if the closure does not return one finite number.
    """
    with torch.enable_grad():
        loss = evaluate(closure)
        grads = torch.autograd.grad(
            loss, parameters, create_graph=create_graph, materialize_grads=True
        )
    return loss.detach(), list(grads)


def mean_gradient(
    closures: Sequence[Closure], parameters: Sequence[nn.Parameter], ranks: Ranks = ALONE
) -> tuple[float, list[Tensor]]:
    """Mean loss of some closures and its gradient, one closure at a time."""
    losses, summed = list[float](), list[Tensor]()
    with ranks.together():
        for closure in closures:
            loss, grads = gradient(closure, parameters)
            losses.append(float(loss))
            grads = [g.to_dense() if g.is_sparse else g for g in grads]
            if len(closures) > 1:
                grads = [g * (1.0 / len(closures)) for g in grads]
            summed = [a + g for a, g in zip(summed, grads, strict=True)] if summed else grads
    ranks.mean_(summed)
    return ranks.mean(sum(losses) / len(losses)), summed


def mean_grad_norm(
    closures: Sequence[Closure], parameters: Sequence[nn.Parameter]
) -> tuple[float, float]:
    """Mean loss of some closures and the Euclidean norm of its gradient."""
    loss, grads = mean_gradient(closures, parameters)
    return loss, math.sqrt(sum(map(squared_norm, grads)))


def mean_loss(closures: Sequence[Closure], ranks: Ranks = ALONE) -> float:
    """Mean of what the closures return."""
    with ranks.together():
        losses = [float(without_gradients(partial(evaluate, c)).detach()) for c in closures]
    return ranks.mean(sum(losses) / len(losses))


def grad_norm(closure: Closure, parameters: Sequence[nn.Parameter]) -> tuple[float, float]:
    """Loss and the Euclidean norm of its gradient over all ``parameters``."""
    return mean_grad_norm([closure], parameters)


def ascent_double_backward(
    closure: Closure, parameters: Sequence[nn.Parameter], velocity: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The gradient of T = ½‖∇L‖² (paper equation 4), which is H ∇L, one tensor per parameter.

    With ``velocity`` it is H times that instead of ∇L: the share of one micro-batch, whose own
    Hessian acts on the gradient of the whole batch; or, with ``M⁻¹ g``, the gradient of D_M.
    """
    _, grads = gradient(closure, parameters, create_graph=True)
    with torch.enable_grad():
        pairs = zip(grads, grads if velocity is None else velocity, strict=True)
        products = ((g * v.conj()).sum().real for g, v in pairs)  # complex ones as pairs of reals
        objective = sum(products, torch.zeros((), device="cpu"))
        if not objective.requires_grad:
            return [torch.zeros_like(p) for p in parameters]
        ascent = torch.autograd.grad(objective, parameters, materialize_grads=True)
    return [a / 2 for a in ascent] if velocity is None else list(ascent)


OptimizerState = Mapping[str, Any]
"""Options of a parameter group, or what an optimizer knows of a parameter."""


def _adam(group: OptimizerState, state: OptimizerState) -> Any:
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    unbiased = at_least_single(second) / (1.0 - group["betas"][1] ** float(state["step"]))
    return unbiased.sqrt() + group["eps"]


def _adagrad(group: OptimizerState, state: OptimizerState) -> Any:
    return at_least_single(state["sum"]).sqrt() + group["eps"]


def _rmsprop(group: OptimizerState, state: OptimizerState) -> Any:
    second = at_least_single(state["square_avg"])
    if group["centered"]:
        second = second - at_least_single(state["grad_avg"]).square()
    return second.sqrt() + group["eps"]


def _after(group: OptimizerState, state: OptimizerState, grad: Tensor) -> OptimizerState:
    """What the optimizer will know of a parameter when it divides this gradient by M."""
    square, new = at_least_single(grad).abs().square(), dict(state)
    if "sum" in state:
        new["sum"] = state["sum"] + square
    weights = {"square_avg": group.get("alpha"), "exp_avg_sq": group.get("betas", (0, 0))[1]}
    for name in state.keys() & weights.keys():
        new[name] = torch.lerp(square, at_least_single(state[name]), weights[name])
    if "grad_avg" in state:
        new["grad_avg"] = torch.lerp(grad, state["grad_avg"], group["alpha"])
    if "max_exp_avg_sq" in state:
        new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], new["exp_avg_sq"])
    new["step"] = float(state["step"]) + 1.0
    return new


DIAGONALS: dict[type[Optimizer], Callable[[OptimizerState, OptimizerState], Any] | None] = {
    SGD: None,
    Adam: _adam,
    AdamW: _adam,
    Adagrad: _adagrad,
    RMSprop: _rmsprop,
}
"""M of one parameter by optimizer; None for the identity. A subclass may divide by anything."""


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer whose M is not known, or which does not train all of the model.

    Raises:
        ValueError: with the known types, or the names of the parameters it does not hold.
    """
    if type(optimizer) not in DIAGONALS:
        known = ", ".join(kind.__name__ for kind in DIAGONALS)
        raise ValueError(
            f"optimizer must be one whose preconditioner is known ({known}; of a wrapper, its "
            f".optimizer), got {type(optimizer).__name__}; objective='grad_norm' needs none"
        )
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if absent := _names(model, lambda p: p not in held):
        raise ValueError(
            "optimizer must hold every trainable parameter of the model, and it does not hold "
            f"{absent}. Add them with optimizer.add_param_group, or freeze them with "
            "requires_grad_(False)"
        )


def metric_of(
    optimizer: Optimizer, model: nn.Module, following: Mapping[nn.Parameter, Tensor] | None = None
) -> Metric:
    """M as it is now; what the optimizer does later does not change it.

    Learning rates, momentum and weight decay are no part of M.

    Args:
        optimizer: one of `DIAGONALS`.
        model: that it trains.
        following: a gradient; M is then as the optimizer will have it at the step with this one.

    Raises:
        OptimizerStateError: if a trainable parameter has no state yet, or its M is not positive and
            finite; the parameters are named.
    """
    read, name = DIAGONALS[type(optimizer)], type(optimizer).__name__
    if read is None:
        return EUCLIDEAN
    state = optimizer.state
    if fresh := _names(model, lambda p: float(state[p]["step"] if p in state else 0.0) == 0.0):
        raise OptimizerStateError(
            f"{name} has no state yet for {fresh}: its preconditioner is made of past gradients. "
            "Let it take a step before the teleport, and freeze parameters that get no gradient "
            "with requires_grad_(False)"
        )
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    with torch.no_grad():
        known = {p: (group_of[p], state[p]) for p in trainable(model)}
        if following is not None:
            known = {p: (group, _after(*known[p], following[p])) for p, (group, _) in known.items()}
        inverse = {p: 1.0 / read(*of) for p, of in known.items()}
    if bad := _names(model, lambda p: not bool((inverse[p].isfinite() & (inverse[p] > 0.0)).all())):
        raise OptimizerStateError(
            f"the preconditioner of {name} is not positive and finite for {bad}: use eps > 0, and "
            "check that its state is finite"
        )
    return Metric(inverse, f"preconditioned gradient norm ({name})")


def _names(model: nn.Module, bad: Callable[[nn.Parameter], bool]) -> str:
    """Names of the trainable parameters for which something holds, the first few."""
    found = [n for n, p in model.named_parameters() if p.requires_grad and bad(p)]
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return ", ".join(map(repr, found[:5])) + more
