"""What an arm of an experiment does, instead of a null-space teleport, whenever one is due."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from teleport.baselines import (
    RaisedLearningRate,
    Rehearsal,
    factors_by_parameter,
    rehearse,
    reset_optimizer,
)
from teleport.capture import Closure
from teleport.report import TeleportReport
from teleport.rivals import ways
from teleport.teleporter import DEFAULT_GROWTH, Teleporter

RAISED_STEPS = 5
"""For how many steps a learning rate stays raised: as long as a teleport's growth lasts."""

MOVES = (
    "symmetry, 1 step",
    "level set, 8 steps",
    "change of basis, best of 20",
    "random null direction, same growth",
    "random null direction, same norm",
    "noise, same norm",
    "layers rescaled",
)
"""The ways of `teleport.rivals` that an experiment has as arms."""

ON_THE_OPTIMIZER = ("lr raised", "lr raised per layer", "warm restarts", "optimizer reset")
"""Controls that move no weight."""

INTERVENTIONS = (*MOVES, *ON_THE_OPTIMIZER)


@dataclass
class Subject:
    """A training that something is done to.

    Attributes:
        period: steps between warm restarts.
        take_step: what the training calls for a step; some controls replace it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    period: int
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
    """Do to a training what an arm is named after.

    Controls are matched to a rehearsed teleport of the same growth; what the rehearsal costs is not
    in the report's seconds, which favours the control.

    Args:
        name: one of `INTERVENTIONS`.
        subject: the training.
        closure: the teleport batch.
        held_out: other data, for the report.
        growth: wanted factor on the gradient norm; default as `Teleporter`.
        seed: of random moves.

    Returns:
        The report of the move; for a control that moves no weight, of nothing moved.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in INTERVENTIONS:
        raise ValueError(f"unknown intervention {name!r}; there are: {', '.join(INTERVENTIONS)}")
    wanted = DEFAULT_GROWTH if growth is None else growth
    rehearsal = rehearse(Teleporter(subject.model, growth=wanted), closure)
    if name in MOVES:
        mover = ways(wanted, seed)[name](subject.model, rehearsal)
        return mover.step(closure, held_out=held_out)
    reason = _on_the_optimizer(name, subject, rehearsal)
    return _nothing_moved(rehearsal.report, reason)


def _on_the_optimizer(name: str, subject: Subject, rehearsal: Rehearsal) -> str:
    optimizer, growth = subject.optimizer, rehearsal.report.growth
    if name == "optimizer reset":
        reset_optimizer(optimizer)
        return "the optimizer forgot its state"
    if name == "warm restarts":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, subject.period)

        def restarted() -> None:
            optimizer.step()
            scheduler.step()

        subject.take_step = restarted
        return f"the learning rate falls as a cosine and restarts every {subject.period} steps"
    factors = (
        growth if name == "lr raised" else factors_by_parameter(subject.model, rehearsal.growths)
    )
    subject.take_step = RaisedLearningRate(optimizer, factors, RAISED_STEPS).step
    how = f"x {growth:.4g}" if name == "lr raised" else "by each layer's own growth"
    return f"the learning rate is raised {how} for {RAISED_STEPS} steps"


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
