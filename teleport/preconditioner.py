"""The diagonal M by which an optimizer divides its gradients, read from its state.

A step of SGD goes along the gradient g, a step of Adam roughly along ``M⁻¹ g`` with
``M = diag(√v̂ + ε)``. `metric_of` reads M, so that a teleport can enlarge what the optimizer's next
step gains to first order, ``D_M = ½ gᵀ M⁻¹ g`` (``thm-geometry``).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from teleport.errors import OptimizerStateError
from teleport.objective import EUCLIDEAN, Metric, trainable
from teleport.runtime.precision import at_least_single

Group = Mapping[str, Any]
State = Mapping[str, Any]


def _adam(group: Group, state: State) -> Any:
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    unbiased = at_least_single(second) / (1.0 - group["betas"][1] ** float(state["step"]))
    return unbiased.sqrt() + group["eps"]


def _adagrad(group: Group, state: State) -> Any:
    return at_least_single(state["sum"]).sqrt() + group["eps"]


def _rmsprop(group: Group, state: State) -> Any:
    second = at_least_single(state["square_avg"])
    if group["centered"]:
        second = second - at_least_single(state["grad_avg"]).square()
    return second.sqrt() + group["eps"]


DIAGONALS: dict[type[Optimizer], Callable[[Group, State], Any] | None] = {
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
            f"optimizer must be one whose preconditioner is known ({known}), got "
            f"{type(optimizer).__name__}; use objective='grad_norm', which needs none"
        )
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if absent := _names(model, lambda p: p not in held):
        raise ValueError(
            "optimizer must hold every trainable parameter of the model, and it does not hold "
            f"{absent}. Add them with optimizer.add_param_group, or freeze them with "
            "requires_grad_(False)"
        )


def metric_of(optimizer: Optimizer, model: nn.Module) -> Metric:
    """M as it is now; what the optimizer does later does not change it.

    Learning rates, momentum and weight decay are no part of M.

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
        inverse = {p: 1.0 / read(group_of[p], state[p]) for p in trainable(model)}
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
