"""What the threshold τ trades: gradient norm and loss over teleport steps (paper Figure 6b).

With a smaller τ fewer input directions are kept, the projected direction is longer, the gradient
norm grows faster, and the loss is not kept any more.
"""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from teleport.errors import RunError
from teleport.lab.experiments.table import find_experiment
from teleport.lab.paper.input_energy import FIGURE_TAUS
from teleport.lab.paper.snapshot import moment
from teleport.lab.records.folders import slug
from teleport.lab.records.record_folder import RecordFolder, read_records
from teleport.runtime.closures import Closure
from teleport.runtime.transaction import Transaction
from teleport.teleporter import Teleporter

DIVERGED_GROWTH = 1000.0
"""Growth of the gradient norm beyond which a trajectory is not followed: it diverges there."""


@dataclass(frozen=True)
class TrajectoryPoint:
    """Where a teleport of some steps ends.

    Attributes:
        held_out: loss on other examples; None if it was not finite, in a record.
    """

    number: int
    loss: float
    grad_norm: float
    held_out: float | None


def trajectory(
    model: nn.Module, closure: Closure, held_out: Closure, tau: float, *, lr: float, steps: int
) -> tuple[list[TrajectoryPoint], str]:
    """Loss and gradient norm after 0, 1, ..., ``steps`` teleport steps of a fixed size.

    Each is the end of a teleport of its own from the same start: within a teleport the bases stay
    those of its start (paper Algorithm 1), which a step after a step would not do at τ < 1. The
    drift is not bounded, and the growth of the norm only by `DIVERGED_GROWTH`. The model is as
    before afterwards.

    Returns:
        The points, and why there are fewer than ``steps + 1`` of them; empty if there are not.
    """
    points: list[TrajectoryPoint] = []
    for number in range(1, steps + 1):
        teleporter = Teleporter(
            model, tau=tau, lr=lr, steps=number, growth=DIVERGED_GROWTH, max_drift=math.inf
        )
        with Transaction(model):  # nothing is committed: the next one starts at the same place
            report = teleporter.step(closure, held_out=held_out)
        before, after = report.held_out_before, report.held_out_after
        assert before is not None
        assert after is not None
        if not points:
            points.append(TrajectoryPoint(0, report.loss_before, report.grad_norm_before, before))
        if report.rolled_back or report.step_sizes != (lr,) * number:
            return points, report.reason
        points.append(TrajectoryPoint(number, report.loss_after, report.grad_norm_after, after))
    return points, ""


def write_trajectories(
    name: str,
    out: RecordFolder,
    *,
    preset: str = "cpu",
    trained: int = 50,
    lr: float | None = None,
    teleport_steps: int = 8,
    seed: int = 0,
) -> None:
    """Record the trajectories of a named experiment by τ, after some training steps.

    The step size ``lr`` is by default that of the experiment's paper schedule. Errors as of
    `moment`, `Teleporter` and `RecordFolder`.
    """
    step_size = lr if lr is not None else find_experiment(name).teleport.lr
    asked = {
        "preset": preset,
        "seed": seed,
        "trained": trained,
        "teleport_lr": step_size,
        "teleport_steps": teleport_steps,
        "taus": list(FIGURE_TAUS),
    }
    with out.held("tau", {"experiment": name, **asked}, added=asked):
        path = out.missing(f"00-{slug(name)}", {"experiment": name})
        if path is None:
            return
        out.progress(f"{name}: training")
        at = moment(name, preset, trained, seed)
        with out.writing(path, order=0, figure="tau", **(asked | at.config)) as writer:
            for tau in FIGURE_TAUS:
                out.progress(f"{name}: tau {tau:g}")
                points, reason = trajectory(
                    at.model, at.closure, at.held_out, tau, lr=step_size, steps=teleport_steps
                )
                for point in points:
                    writer.write("point", tau=tau, **asdict(point))
                if reason:
                    writer.write("broken off", tau=tau, reason=reason)


@dataclass(frozen=True)
class Trajectories:
    """The record of one experiment: its configuration, and points by τ."""

    config: dict[str, Any]
    by_tau: dict[float, list[TrajectoryPoint]]


def read_trajectories(folder: Path) -> Trajectories:
    """The trajectories of a folder; RunError as of `read_records`, or for more than one record."""
    found = read_records(folder, "tau", "trajectories", unfinished=True)
    if len(found) > 1:
        names = " and ".join(path.name for path, _, _ in found)
        raise RunError(
            f"{folder} does not hold one record ({names}); give a folder of `teleport tau`"
        )
    ((path, config, rows),) = found
    by_tau: dict[float, list[TrajectoryPoint]] = {}
    for row in (row for row in rows if row["type"] == "point"):
        point = TrajectoryPoint(*(row[field.name] for field in fields(TrajectoryPoint)))
        by_tau.setdefault(row["tau"], []).append(point)
    if not by_tau:
        raise RunError(f"{path} ends before the first teleport; run `teleport tau` again")
    return Trajectories(config, by_tau)
