"""How far a rival goes: fixed steps, or until the gradient norm has grown by a factor."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from teleport.errors import GroupElementError, require
from teleport.line_search import step_to_norm
from teleport.rivals.batch import Batch

GROWTH_ACCURACY = 1e-3
"""To what part of the wanted squared norm a rival's line search goes: its trials are expensive."""


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
