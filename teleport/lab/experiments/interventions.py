"""What an arm of an experiment does, instead of a null-space teleport, whenever one is due."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from teleport.errors import NonFiniteLossError
from teleport.lab.experiments.entry import one_of
from teleport.objective import grad_norm, trainable
from teleport.report import TeleportReport
from teleport.rivals import (
    ObjectiveStep,
    RaisedLearningRate,
    Rehearsal,
    factors_by_parameter,
    flatter_curvature,
    growth_duration,
    rehearse,
    reset_optimizer,
    sharpness,
    shorter_gradient,
    step_decrease,
)
from teleport.rivals.other_objectives import Slope
from teleport.rivals.ways import RESCALINGS, ways
from teleport.runtime.closures import Closure
from teleport.teleporter import DEFAULT_GROWTH, Teleporter

LONGEST_TRIAL = 40
"""Steps after which a growth that still lasts is not followed any more."""

MOVES = (
    "symmetry, 1 step",
    "level set, 8 steps",
    "change of basis, best of 20",
    "random null direction, same growth",
    "random null direction, same norm",
    "noise, same norm",
    "layers rescaled",
    *RESCALINGS,
)
"""The ways of `teleport.lab.bench.rivals` that an experiment has as arms."""

ON_THE_OPTIMIZER = ("lr raised", "lr raised per layer", "warm restarts", "optimizer reset")
"""Controls that move no weight."""

_SLOPES: dict[str, Callable[[float], Slope]] = {
    "shorter gradient": lambda lr: shorter_gradient,
    "flatter curvature": lambda lr: flatter_curvature,
    "step decrease": step_decrease,
    "sharpness": lambda lr: sharpness(),
}
OTHER_OBJECTIVES = tuple(_SLOPES)
"""What else can be climbed in the null space, for as long as the teleport's move is."""

INTERVENTIONS = (*MOVES, *ON_THE_OPTIMIZER, *OTHER_OBJECTIVES)


@dataclass
class Subject:
    """A training that something is done to.

    Attributes:
        period: steps between warm restarts.
        train_on: takes the training step on trial batch number i; for trials that are undone.
        take_step: what the training calls for a step; some controls replace it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    period: int
    train_on: Callable[[int], None]
    take_step: Callable[[], object] = field(init=False)

    def __post_init__(self) -> None:
        self.take_step = self.optimizer.step


def intervene(
    name: str,
    subject: Subject,
    closure: Closure,
    *,
    held_out: Closure | None = None,
    growth: float | None = None,
    seed: int = 0,
) -> TeleportReport:
    """Do to a training what an arm is named after, one of `INTERVENTIONS`.

    Controls are matched to a rehearsed teleport of the same growth, by default that of
    `Teleporter`; what the rehearsal costs is not in the report's seconds, which favours the
    control. ``closure`` is the teleport batch, and ``held_out`` other data for the report.

    Returns:
        The report of the move; for a control that moves no weight, of nothing moved.

    Raises:
        ValueError: for an unknown name.
    """
    one_of("intervention", name, dict.fromkeys(INTERVENTIONS))
    wanted = DEFAULT_GROWTH if growth is None else growth
    teleporter = Teleporter(subject.model, growth=wanted)
    rehearsal = rehearse(teleporter, closure)
    if name in MOVES:
        mover = ways(wanted, seed)[name](subject.model, rehearsal)
        return mover.step(closure, held_out=held_out)
    if name in OTHER_OBJECTIVES:
        slope = _SLOPES[name](float(subject.optimizer.param_groups[0]["lr"]))
        mover = ObjectiveStep(subject.model, slope, rehearsal.report)
        return mover.step(closure, held_out=held_out)
    if name == "optimizer reset":
        reset_optimizer(subject.optimizer)
        reason = "the optimizer forgot its state"
    elif name == "warm restarts":
        reason = _restart_warmly(subject)
    else:
        steps = lasting(subject, teleporter, closure)
        reason = _raise(subject, rehearsal, steps, per_layer=name == "lr raised per layer")
    return _nothing_moved(rehearsal.report, reason)


def lasting(subject: Subject, teleporter: Teleporter, closure: Closure) -> int:
    """For how many training steps the growth of a teleport lasts, by trial.

    Trains twice over the same trial batches, without and with the teleport, and puts everything
    back.

    Returns:
        At most `LONGEST_TRIAL`; see `growth_duration`.
    """
    start = deepcopy((subject.model.state_dict(), subject.optimizer.state_dict()))
    parameters = trainable(subject.model)

    def norms() -> list[float]:
        found: list[float] = []
        try:
            for number in range(LONGEST_TRIAL):
                found.append(grad_norm(closure, parameters)[1])
                subject.train_on(number)
        except NonFiniteLossError:  # the trial's end, not the run's: its gradient stays grown
            pass
        return [*found, *[math.inf] * (LONGEST_TRIAL - len(found))]

    def back() -> None:
        subject.model.load_state_dict(start[0])
        subject.optimizer.load_state_dict(deepcopy(start[1]))
        subject.optimizer.zero_grad()

    try:
        plain = norms()
        back()
        report = teleporter.step(closure)
        teleported = norms()
    finally:
        back()
    return growth_duration(teleported, plain, report.growth) if report.growth > 1.0 else 0


def _restart_warmly(subject: Subject) -> str:
    optimizer, period = subject.optimizer, subject.period
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, period)

    def restarted() -> None:
        optimizer.step()
        scheduler.step()

    subject.take_step = restarted
    return f"the learning rate falls as a cosine and restarts every {period} steps"


def _raise(subject: Subject, rehearsal: Rehearsal, steps: int, per_layer: bool) -> str:
    growth = rehearsal.report.growth
    factors = factors_by_parameter(subject.model, rehearsal.growths) if per_layer else growth
    subject.take_step = RaisedLearningRate(subject.optimizer, factors, steps).step
    how = "by each layer's own growth" if per_layer else f"x {growth:.4g}"
    return f"the learning rate is raised {how} for {steps} steps"


def _nothing_moved(report: TeleportReport, reason: str) -> TeleportReport:
    layers = tuple(
        replace(layer, move_norm=0.0, output_bound=None, status="not moved")
        for layer in report.layers
    )
    return replace(
        report,
        loss_after=report.loss_before,
        grad_norm_after=report.grad_norm_before,
        steps=0,
        step_sizes=(),
        reason=reason,
        seconds=0.0,
        layers=layers,
    )
