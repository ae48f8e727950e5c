"""What one teleport moves in the networks of the experiments, and with which drift, by τ.

A growth of the gradient norm is asked for. Whether it is reached, what for if not, and what it
costs the loss: for networks whose layers have much room, little or none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from teleport.ascent import UNFROZEN
from teleport.lab.paper.snapshot import moment
from teleport.lab.records.folders import slug
from teleport.lab.records.record_folder import RecordFolder, read_records
from teleport.objective import grad_norm, trainable
from teleport.report import TeleportReport
from teleport.runtime.clock import now
from teleport.runtime.closures import Closure
from teleport.runtime.transaction import Transaction
from teleport.teleporter import Teleporter

MOVE_TAUS = (1.0, 0.999, 0.99, 0.9)
"""The thresholds that are tried."""


def try_move(
    model: nn.Module, closure: Closure, held_out: Closure, tau: float, growth: float
) -> tuple[TeleportReport, str]:
    """One default teleport; where the guard undoes it, the same without a guard.

    The model is as before afterwards.

    Returns:
        The report of the move, with the guard's tolerance, and why the guard undid it; empty if it
        did not.
    """

    def teleported(max_drift: float | None) -> TeleportReport:
        with Transaction(model):  # nothing is committed: the next one starts at the same place
            teleporter = Teleporter(model, tau=tau, growth=growth, max_drift=max_drift)
            return teleporter.step(closure, held_out=held_out)

    guarded = teleported(None)
    if not guarded.rolled_back:
        return guarded, ""
    unguarded = teleported(math.inf)
    return replace(unguarded, tolerance=guarded.tolerance), guarded.reason


def write_moves(
    names: Sequence[str],
    out: RecordFolder,
    *,
    preset: str = "cpu",
    trained: int = 50,
    growth: float = 1.5,
    n: int | None = None,
    evaluating: bool = False,
    seeds: int = 3,
) -> None:
    """Record what moves in named experiments for every τ, one file for each of the seeds from 0.

    Teleports come after so many training steps and ask for a growth > 1. The batch has ``n``
    examples, by default the experiment's. With ``evaluating`` they are in evaluation mode, which
    BatchNorm tells from training mode. Errors as of `moment`, `Teleporter` and `RecordFolder`.
    """
    asked = {"preset": preset, "trained": trained, "growth": growth, "n": n}
    asked |= {"evaluating": evaluating, "taus": list(MOVE_TAUS)}
    with out.held("moves", asked):
        for order, name in enumerate(names):
            for seed in range(seeds):
                own = {"experiment": name, "seed": seed}
                path = out.missing(f"{order:02d}-{slug(name)}-seed{seed}", own)
                if path is None:
                    continue
                out.progress(f"{name}, seed {seed}: training")
                at = moment(name, preset, trained, seed, n)
                at.model.train(not evaluating)
                shared = {"order": order, "figure": "moves", **asked, **at.config}
                with out.writing(path, **shared) as writer:
                    for tau in MOVE_TAUS:
                        out.progress(f"{name}, seed {seed}: tau {tau:g}")
                        base = _gradient_seconds(at.model, at.closure)
                        report, undone = try_move(at.model, at.closure, at.held_out, tau, growth)
                        row = report.to_dict() | {"undone": undone, "gradient_seconds": base}
                        searched = UNFROZEN in report.reason + undone
                        writer.write("move", tau=tau, searched=searched, **row)


def _gradient_seconds(model: nn.Module, closure: Closure) -> float:
    """What one gradient of the batch takes, the second of two: the first finds nothing warm."""
    with Transaction(model) as transaction:
        run = transaction.repeatable(closure)

        def timed() -> float:
            for _ in range(2):
                started = now()
                grad_norm(run, trainable(model))
                seconds = now() - started
            return seconds

        return transaction.until_quiet(timed)[0]


@dataclass(frozen=True)
class Moves:
    """The records of one experiment: the configuration of the first, and rows by τ, of all."""

    config: dict[str, Any]
    by_tau: dict[float, list[dict[str, Any]]]


def read_moves(folder: Path) -> list[Moves]:
    """What moved in the experiments of a folder, in their order; errors as of `read_records`."""
    found: dict[str, Moves] = {}
    for _, config, rows in read_records(folder, "moves", "moves", row="move"):
        moves = found.setdefault(config["title"], Moves(config, {}))
        for row in (row for row in rows if row["type"] == "move"):
            moves.by_tau.setdefault(row["tau"], []).append(row)
    return list(found.values())
