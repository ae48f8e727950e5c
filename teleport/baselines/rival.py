"""What all rivals share: one call, one transaction, one guard, one report.

`Rival` measures, lets its subclass move, measures again, and keeps the move or puts everything
back. What is compared is then only the move itself.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from teleport.capture import Closure, evaluate
from teleport.coverage import Block, Coverage, cover
from teleport.errors import GroupElementError, NonFiniteLossError
from teleport.objective import ascent_double_backward, gradient, mean_grad_norm, trainable
from teleport.report import LayerReport, TeleportReport
from teleport.tangent import step_to_norm
from teleport.transaction import Transaction

MAX_DRIFT = 0.01
"""Relative change of the batch loss beyond which a rival that means to keep it is rolled back."""

GROWTH_ACCURACY = 1e-3
"""To what part of the wanted squared norm a rival's line search goes: its trials are expensive."""


def require(name: str, value: object, valid: bool, allowed: str) -> None:
    """Raise ValueError for an argument out of range, with its value and the range."""
    if not valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


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
        parts = [gradient(closure, self.parameters) for closure in self.closures]
        share = 1.0 / len(parts)
        velocity = [share * sum_(grads) for grads in zip(*(g for _, g in parts), strict=True)]
        shares = (
            ascent_double_backward(closure, self.parameters, velocity) for closure in self.closures
        )
        ascent = [share * sum_(pieces) for pieces in zip(*shares, strict=True)]
        return share * sum(float(loss) for loss, _ in parts), velocity, ascent

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


@dataclass(frozen=True)
class StepRule:
    """How far a rival goes: a fixed step, or the step that reaches a wanted growth.

    Args:
        steps: directions taken one after the other.
        lr: fixed step size.
        growth: wanted factor on the gradient norm, reached in equal shares over the steps by the
            same line search as `Teleporter` uses.

    Raises:
        ValueError: unless exactly one of ``lr`` and ``growth`` is given, within its range.
    """

    steps: int
    lr: float | None
    growth: float | None

    def __post_init__(self) -> None:
        lr, growth = self.lr, self.growth
        require("steps", self.steps, isinstance(self.steps, int) and self.steps >= 1, ">= 1")
        require("lr", lr, lr is None or 0.0 < lr < math.inf, "> 0 and finite")
        require("growth", growth, growth is None or 1.0 < growth < math.inf, "> 1 and finite")
        if (lr is None) == (growth is None):
            raise ValueError(f"give either lr or growth, got lr={lr!r} and growth={growth!r}")


@dataclass(frozen=True)
class Ray:
    """One direction as a curve: ``go`` writes the parameters at a step along it.

    Attributes:
        slope: derivative of ½‖g‖² in the step, at step 0.
    """

    go: Callable[[float], None]
    slope: float


@dataclass(frozen=True)
class Move:
    """What a rival did: the step sizes, and why it ended. No step means nothing moved."""

    step_sizes: tuple[float, ...]
    reason: str


def climb(batch: Batch, rule: StepRule, start: float, look: Callable[[], Ray]) -> Move:
    """Take the steps of a rule.

    Args:
        batch: what to measure the gradient norm on.
        rule: how far.
        start: gradient norm at the start.
        look: the ray at the present position.
    """
    taken: list[float] = []
    for number in range(1, rule.steps + 1):
        ray = look()
        if not math.isfinite(ray.slope) or ray.slope <= 0.0:
            return Move(tuple(taken), "a stationary point of the gradient norm was reached")
        step = rule.lr
        if rule.growth is not None:
            target = (start * rule.growth ** (number / rule.steps)) ** 2
            step = _step_to(batch, ray, target)
            if step is None:
                ray.go(0.0)
                return Move(tuple(taken), "no step along the direction reaches the wanted norm")
        assert step is not None
        ray.go(step)
        taken.append(step)
    reached = f"gradient norm reached {rule.growth:.6g} x its start" if rule.growth else ""
    return Move(tuple(taken), reached or "all steps taken")


def _step_to(batch: Batch, ray: Ray, target: float) -> float | None:
    def norm_squared(step: float) -> float:
        try:
            ray.go(step)
        except GroupElementError:
            return math.inf  # not a point of the curve: the search comes back towards the start
        return batch.norm_squared()

    present = batch.norm_squared()
    if present >= target:
        return None
    return step_to_norm(norm_squared, present, 2 * ray.slope, target, GROWTH_ACCURACY)


class Rival(ABC):
    """A way to other parameters with the call of `teleport.Teleporter`.

    Parameters change in place, so optimizers stay valid. If the loss moved by more than
    ``max_drift``, if anything became NaN or was raised, the model is exactly as before.

    Args:
        model: what to move.
        max_drift: largest relative change of the batch loss; None for no bound.
    """

    def __init__(self, model: nn.Module, max_drift: float | None) -> None:
        require("max_drift", max_drift, max_drift is None or max_drift >= 0.0, ">= 0")
        self.model = model
        self.max_drift = max_drift
        self.coverage: Coverage = cover(model)

    @abstractmethod
    def _move(self, batch: Batch, loss: float, norm: float) -> Move:
        """Change the parameters; loss and gradient norm are those at the start."""

    def step(
        self, closure: Closure | Sequence[Closure], *, held_out: Closure | None = None
    ) -> TeleportReport:
        """Move on one batch.

        Args:
            closure: returns the scalar loss of the batch, deterministic, without calling
                ``backward``. A list of closures is one batch in equal parts.
            held_out: returns the loss of data the move does not see, for the report only.

        Returns:
            What was done, in the form of `Teleporter.step`.

        Raises:
            ClosureError: if the closure or its batch is unusable; the model is as before.
        """
        started = time.perf_counter()
        parts = [closure] if callable(closure) else list(closure)
        require("closure", closure, bool(parts), "a closure or a list of at least one")
        with Transaction(self.model) as transaction:

            def repeatable(closure: Closure) -> Closure:
                def call() -> Tensor:
                    transaction.rewind_random()
                    return closure()

                return call

            held = None if held_out is None else _HeldOut(repeatable(held_out))
            report = self._attempt(Batch(self.model, [repeatable(p) for p in parts]), held)
            if report.steps and not report.rolled_back:
                transaction.commit()
        spent = time.perf_counter() - started - (held.seconds if held else 0.0)
        return replace(report, seconds=spent)

    def _attempt(self, batch: Batch, held_out: "_HeldOut | None") -> TeleportReport:
        before = batch.measure()
        held_before = held_out.loss() if held_out else None
        start = {block: block.part.matrix() for block in self.coverage.blocks}
        tolerance = math.inf if self.max_drift is None else self.max_drift * abs(before[0])
        move, after, held_after, failure = Move((), ""), before, held_before, ""
        try:
            move = self._move(batch, *before)
            if move.step_sizes:
                after = batch.measure()
                held_after = held_out.loss() if held_out else None
                failure = _objection(before[0], after, tolerance)
        except NonFiniteLossError:
            failure = "the loss became NaN or infinite on the way"
        except GroupElementError as error:
            failure = str(error)
        moved = {
            block: 0.0 if failure else float((block.part.matrix() - matrix).norm())
            for block, matrix in start.items()
        }
        return TeleportReport(
            loss_before=before[0],
            loss_after=before[0] if failure else after[0],
            grad_norm_before=before[1],
            grad_norm_after=before[1] if failure else after[1],
            held_out_before=held_before,
            held_out_after=held_before if failure else held_after,
            tolerance=tolerance,
            steps=len(move.step_sizes),
            step_sizes=move.step_sizes,
            rolled_back=bool(failure),
            reason=failure or move.reason,
            seconds=0.0,
            layers=tuple(self._layer_reports(moved, bool(failure))),
        )

    def _layer_reports(self, moved: dict[Block, float], failed: bool) -> list[LayerReport]:
        def report(block: Block, norm: float) -> LayerReport:
            status = "rolled back" if failed else "moved" if norm else "not moved"
            *groups, d_out, d_in = block.part.matrix().shape
            count = math.prod(groups)
            return LayerReport(
                block.name, block.kind, d_in, d_out, None, None, norm, None, status, count
            )

        frozen = (
            LayerReport(name, "", None, None, None, None, 0.0, None, f"frozen: {why}")
            for name, why in self.coverage.frozen.items()
        )
        return [*(report(block, norm) for block, norm in moved.items()), *frozen]


def _objection(loss: float, after: tuple[float, float], allowed: float) -> str:
    """What is wrong with the new position, if anything."""
    if not math.isfinite(after[1]):
        return f"the gradient norm became {after[1]}"
    drift = abs(after[0] - loss)
    if drift <= allowed:
        return ""
    return f"the loss moved by {drift:.2e}, more than the allowed {allowed:.2e}"


class _HeldOut:
    """The held-out loss, and the time it took, which is not the move's."""

    def __init__(self, closure: Closure) -> None:
        self.closure = closure
        self.seconds = 0.0

    def loss(self) -> float:
        started = time.perf_counter()
        try:
            with torch.no_grad():
                return float(evaluate(self.closure))
        except NonFiniteLossError:
            return math.nan  # only reported: no reason to undo anything
        finally:
            self.seconds += time.perf_counter() - started
