"""What a teleport can save, and whether it pays: ``Teleporter(model, growth="auto")``.

A step of the optimizer goes along ``v = η M⁻¹ g``. To second order the loss falls by
``a - ½ a k``: a = gᵀv, and k = vᵀHv / a, the *stride*, is the step as a share of the way to the
lowest point on the line. A teleport by γ makes a γ² times as large, so each of the next steps
gains ``(γ² - 1) a`` more, for about 1/k' steps, where k' is the stride afterwards: it saves about
``(γ² - 1) / k'`` steps (``thm-saving``). Measured, k' = γᵖ k, with p near 2 at tuned rates and up
to 8 far below them. Beyond k' = 1 a step overshoots, and beyond 2 the loss rises.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from teleport.errors import NonFiniteLossError
from teleport.objective import mean_gradient, mean_loss, metric_of, squared_norm, trainable
from teleport.report import TeleportReport
from teleport.runtime.clock import now
from teleport.runtime.closures import Closure
from teleport.runtime.precision import at_least_single
from teleport.runtime.ranks import ALONE, Ranks

MOST_GROWTH = 2.0
"""Three quarters of what any growth could save, if p is 2."""

FIRST_POWER = 6.0
"""p before it was measured: more than in any arm of the two data sets that the rule was made on."""

LEAST_POWER = 2.0
"""p where growth enlarges nothing but a factor before what is trained."""

GRADIENTS = 7.0
"""Gradients of the batch that a first teleport is taken to cost, before one has been timed."""

_LENGTHS = (1.0, 4.0, 16.0)
"""Steps along v, tried until the loss bends up by more than its rounding."""


@dataclass(frozen=True)
class TriedStep:
    """One step of the optimizer on the batch, tried and taken back.

    Attributes:
        loss, norm: of the batch, and of its gradient.
        fall: a, by how much the loss falls to first order.
        stride: k, the step as a share of the way to the lowest point on its line; never less than
            what rounding leaves visible.
    """

    loss: float
    norm: float
    fall: float
    stride: float

    def saved(self, growth: float, power: float = LEAST_POWER) -> float:
        """Steps of the optimizer that a growth saves; with the default power, at most."""
        return (growth**2 - 1.0) / (math.pow(growth, power) * self.stride)


def best_growth(power: float) -> float:
    """The growth that saves most steps, ``√(p / (p - 2))``, but no more than `MOST_GROWTH`."""
    return math.sqrt(power / max(power - 2.0, power / MOST_GROWTH**2))


def try_step(
    closures: Sequence[Closure],
    model: nn.Module,
    optimizer: Optimizer,
    ranks: Ranks = ALONE,
) -> TriedStep:
    """Measure ``a`` and ``k`` by a gradient and one to three forward passes.

    Args:
        closures: parts of the batch; the loss is their mean.
        model: left as it is, bit for bit.
        optimizer: one of those of `metric_of`. Its gradient is taken to be that of the batch, its
            momentum to have settled: v is divided by 1 - μ.
        ranks: the processes that train as one.

    Raises:
        OptimizerStateError: as `metric_of`.
    """
    parameters = trainable(model)
    loss, grads = mean_gradient(closures, parameters, ranks)
    # M with this gradient in it: where there were none before, M⁻¹ alone is beyond all measure.
    metric = metric_of(optimizer, model, dict(zip(parameters, grads, strict=True)))
    rates = _rates(optimizer)
    ways = [metric.velocity(p, g, rates[p]) for p, g in zip(parameters, grads, strict=True)]
    pairs = zip(grads, ways, strict=True)
    products = (at_least_single(g) * at_least_single(v).conj() for g, v in pairs)
    fall = ranks.of_first(sum(float(product.real.double().sum()) for product in products))
    norm = ranks.of_first(math.sqrt(sum(map(squared_norm, grads))))
    if not (math.isfinite(fall) and fall > 0.0):
        return TriedStep(loss, norm, fall, math.inf)
    visible = 64 * max(torch.finfo(p.dtype).eps for p in parameters) * abs(loss)
    for length in _LENGTHS:
        bend = _loss_at(closures, parameters, ways, length, ranks) - loss + length * fall
        if not bend <= visible:  # or it is not finite
            break
    return TriedStep(loss, norm, fall, 2 * max(bend, visible) / (length**2 * fall))


def _rates(optimizer: Optimizer) -> dict[Tensor, float]:
    """η by parameter, below zero for an optimizer that climbs."""
    return {
        p: (-1.0) ** bool(group.get("maximize")) * _rate(group)
        for group in optimizer.param_groups
        for p in group["params"]
    }


def _rate(group: Mapping[str, Any]) -> float:
    return float(group["lr"]) / (1.0 - float(group.get("momentum", 0.0)))


def _loss_at(
    closures: Sequence[Closure],
    parameters: Sequence[nn.Parameter],
    ways: Sequence[Tensor],
    length: float,
    ranks: Ranks,
) -> float:
    """The loss after so many steps; infinite where there is none."""
    before = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for parameter, way in zip(parameters, ways, strict=True):
                parameter.sub_(way, alpha=length)
        return mean_loss(closures, ranks)
    except NonFiniteLossError:
        return math.inf
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)


class Decision:
    """Whether to teleport, and how far, from what is measured: one rule for all data.

    Args:
        model: that is trained.
        optimizer: by which. Its steps are counted and timed from now on.
        budget: share of the training time so far that may go into teleports and their trials; the
            first teleport may exceed it, for its cost is guessed.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, budget: float) -> None:
        self.model, self.optimizer, self.budget = model, optimizer, budget
        self.steps, self.training, self.spent = 0, 0.0, 0.0
        self._since: float | None = None  # training time that is not counted yet begins here
        self._trial_cost = self._teleport_cost = 0.0  # seconds, as they were the last time
        self.trial: TriedStep | None = None
        self.power, self.told = FIRST_POWER, ""
        hook = optimizer.register_step_post_hook(_counter(weakref.ref(self)))
        weakref.finalize(self, hook.remove)

    def count(self) -> None:
        """The optimizer has taken a step."""
        here = now()
        if self._since is not None:
            self.training += here - self._since
            self.steps += 1
        self._since = here

    @property
    def growth(self) -> float:
        """By which it would be decided now."""
        return best_growth(self.power)

    def spend(self, seconds: float, moved: bool) -> None:
        """A call of `Teleporter.step` took so long, which is no training."""
        self.spent += seconds
        if self._since is not None:
            self._since += seconds
        if moved:
            self._teleport_cost = seconds

    def waiting(self, ranks: Ranks) -> str:
        """Why not even to try now, known without a look at the model; nothing if there is room."""
        self.trial = None
        return self._beyond_budget(self._trial_cost + self._teleport_cost, ranks)

    def refusal(self, closures: Sequence[Closure], ranks: Ranks) -> str:
        """Why not to teleport now; nothing if it is to be done, by `growth`."""
        started = now()
        self.trial = trial = try_step(closures, self.model, self.optimizer, ranks)
        self._trial_cost = now() - started
        expected = self._teleport_cost or GRADIENTS / 2 * self._trial_cost
        cost = ranks.of_first(expected * self.steps / self.training)
        saved = trial.saved(self.growth, self.power)
        self.told = (
            f"growth {self.growth:.3g} saves about {saved:.2g} steps of the optimizer and "
            f"costs about {cost:.2g}: a step goes {trial.stride:.2g} of the way to the lowest "
            "point along the gradient"
        )
        if not saved > cost or trial.stride * self.growth**self.power > 1.0:
            return f"it would not pay: {self.told}"
        return self._beyond_budget(self._trial_cost + expected, ranks)

    def _beyond_budget(self, seconds: float, ranks: Ranks) -> str:
        room = self.budget * self.training - self.spent
        if not self.steps:
            return "no two steps of the optimizer were seen since the Teleporter was made"
        if ranks.of_first(room - seconds) >= 0.0:
            return ""
        return (
            f"no room in the budget yet: {100 * self.budget:.3g} % of {self.training:.3g} s of "
            f"training, {self.steps} steps, is less than {self.spent:.3g} s spent and "
            f"{seconds:.3g} s to come"
        )

    def objection(
        self,
        closures: Sequence[Closure],
        ranks: Ranks,
        before: float | None,
        after: float | None,
    ) -> str:
        """What is wrong with where the teleport ended, for the steps that follow.

        Args:
            closures: parts of the batch.
            ranks: the processes that train as one.
            before: the held-out loss at the start, if there is one.
            after: where it ended.
        """
        end, start = try_step(closures, self.model, self.optimizer, ranks), self.trial
        if start is None:
            return ""
        if end.fall > start.fall and math.isfinite(end.stride):
            grown = math.log(end.fall / start.fall) / 2  # in the optimizer's own norm
            self.power = max(LEAST_POWER, math.log(end.stride / start.stride) / grown)
        if end.stride > 1.0:
            return (
                f"the next step of the optimizer would overshoot: it goes {end.stride:.2g} of the "
                "way to the lowest point along the gradient"
            )
        if before is None or after is None:
            return ""
        lost, saved = (after - before) / start.fall, (end.fall / start.fall - 1.0) / end.stride
        if lost <= saved:
            return ""
        return (
            f"the held-out loss rose by what {lost:.2g} steps gain, and the teleport saves about "
            f"{saved:.2g}"
        )


def _counter(decision: "weakref.ref[Decision]") -> Callable[..., None]:
    def count(*_: Any) -> None:
        if (alive := decision()) is not None:
            alive.count()

    return count


def not_moved(reason: str, trial: TriedStep | None) -> TeleportReport:
    """The report of a teleport that was decided against; NaN where nothing was looked at."""
    loss, norm = (math.nan, math.nan) if trial is None else (trial.loss, trial.norm)
    return TeleportReport(
        loss_before=loss,
        loss_after=loss,
        grad_norm_before=norm,
        grad_norm_after=norm,
        held_out_before=None,
        held_out_after=None,
        tolerance=0.0,
        steps=0,
        step_sizes=(),
        rolled_back=False,
        reason=reason,
        seconds=0.0,
        layers=(),
    )
