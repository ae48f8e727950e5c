"""What one teleport moves in the networks of the experiments, and with which drift, by τ.

A growth of the gradient norm is asked for. Whether it is reached, what for if not, and what it
costs the loss: for networks whose layers have much room, little or none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from teleport.ascent import UNFROZEN
from teleport.errors import RunError
from teleport.lab.paper.snapshot import moment
from teleport.lab.records.checkpoint import locked
from teleport.lab.records.folders import slug
from teleport.lab.records.runs import has_begun, read_rows, twice
from teleport.lab.records.sameness import check_folder, is_complete
from teleport.lab.records.study import record_paths
from teleport.lab.records.writer import RecordWriter
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

    Args:
        model: the model.
        closure: returns the loss of the teleport batch.
        held_out: returns that of other examples.
        tau: share of the input energy that is kept.
        growth: of the gradient norm, asked for.

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
    folder: Path,
    *,
    preset: str = "cpu",
    trained: int = 50,
    growth: float = 1.5,
    n: int | None = None,
    evaluating: bool = False,
    seeds: int = 3,
    resume: bool = False,
    command: str = "",
    progress: Callable[[str], None] = lambda what: None,
) -> None:
    """Record what moves in named experiments for every τ, one file for each seed.

    Args:
        names: of the experiments.
        folder: an existing one, for the records.
        preset: their size.
        trained: training steps before the teleport.
        growth: of the gradient norm, asked for, > 1.
        n: examples of the teleport batch; default the experiment's.
        evaluating: teleport in evaluation mode, which BatchNorm tells from training mode.
        seeds: how many, see `teleport.lab.paper.snapshot.moment`.
        resume: leave complete records, and make those again that were broken off.
        command: the command line, for the record.
        progress: told what is being computed.

    Raises:
        ValueError: for an unknown name, or a value out of range.
        RunError: if the folder is in use or holds other records, a record exists already, or it
            cannot be written.
    """
    asked = {"preset": preset, "trained": trained, "growth": growth, "n": n}
    asked |= {"evaluating": evaluating, "taus": list(MOVE_TAUS)}
    with locked(folder / ".lock", str(folder)):
        check_folder(folder, "moves", asked)
        for order, name in enumerate(names):
            for seed in range(seeds):
                path = folder / f"{order:02d}-{slug(name)}-seed{seed}.jsonl"
                if resume:
                    if is_complete(path, {"experiment": name, "seed": seed}):
                        continue
                    path.unlink(missing_ok=True)
                with RecordWriter(path) as writer:
                    progress(f"{name}, seed {seed}: training")
                    at = moment(name, preset, trained, seed, n)
                    at.model.train(not evaluating)
                    shared = {"command": command, "order": order, "figure": "moves"}
                    writer.write("config", **shared, **(asked | at.config))
                    for tau in MOVE_TAUS:
                        progress(f"{name}, seed {seed}: tau {tau:g}")
                        base = _gradient_seconds(at.model, at.closure)
                        report, undone = try_move(at.model, at.closure, at.held_out, tau, growth)
                        row = report.to_dict() | {"undone": undone, "gradient_seconds": base}
                        searched = UNFROZEN in report.reason + undone
                        writer.write("move", tau=tau, searched=searched, **row)
                    writer.write("end", status="finished")


def _gradient_seconds(model: nn.Module, closure: Closure) -> float:
    """What one gradient of the batch takes, the second of two: the first finds nothing warm."""
    with Transaction(model) as transaction:
        run = transaction.repeatable(closure)
        for _ in range(2):
            started = now()
            grad_norm(run, trainable(model))
            seconds = now() - started
    return seconds


@dataclass(frozen=True)
class Moves:
    """The records of one experiment: the configuration of the first, and rows by τ, of all."""

    config: dict[str, Any]
    by_tau: dict[float, list[dict[str, Any]]]


def read_moves(folder: Path) -> list[Moves]:
    """What moved in the experiments whose records a folder holds, in their order.

    Raises:
        RunError: if there is none, or a record is damaged or of something else, or two are of the
            same.
    """
    found: dict[str, Moves] = {}
    first: dict[tuple[str, int], Path] = {}
    for path in filter(has_begun, record_paths(folder)):
        config, *rows = read_rows(path)
        if config.get("figure") != "moves":
            raise RunError(f"{path} is not a record of `teleport moves`")
        one = first.setdefault((config["title"], config["seed"]), path)
        if one != path:
            raise RunError(twice(one, path, f"{config['title']} (seed {config['seed']})"))
        if not rows or rows[-1]["type"] != "end":
            continue  # broken off; --resume makes it again
        moves = found.setdefault(config["title"], Moves(config, {}))
        for row in (row for row in rows if row["type"] == "move"):
            moves.by_tau.setdefault(row["tau"], []).append(row)
    kept = [moves for moves in found.values() if moves.by_tau]
    if not kept:
        raise RunError(f"{folder} holds no moves; give a folder `teleport moves` has written")
    return kept
