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

from teleport.attempt import UNFROZEN
from teleport.capture import Closure
from teleport.checkpoint import locked
from teleport.clock import now
from teleport.errors import RunError
from teleport.folders import slug
from teleport.moment import moment
from teleport.objective import grad_norm, trainable
from teleport.provenance import check_folder, is_complete
from teleport.records import RecordWriter, has_begun, read_rows, twice
from teleport.report import TeleportReport
from teleport.teleporter import Teleporter
from teleport.transaction import Transaction

TAUS = (1.0, 0.999, 0.99, 0.9)
"""The thresholds that are tried."""

REACHED = 0.01
"""How far, as a share, the growth may be from what was asked for and still count as reached."""


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


def outcome(row: dict[str, Any], growth: float) -> str:
    """What became of a move: reached, undone, or why it could not be; read off its row."""
    if row["undone"]:
        return "undone by the guard"
    reached = row["grad_norm_before"] and row["grad_norm_after"] / row["grad_norm_before"]
    if abs(reached - growth) <= REACHED * growth:
        return "reached"
    room = [layer for layer in row["layers"] if layer["null_dim"]]
    if row["steps"] or row["rolled_back"] or any(layer["move_norm"] for layer in room):
        return str(row["reason"])
    return "cannot: free inputs do not move" if room else "cannot: no null space"


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
        seeds: how many, see `teleport.moment.moment`.
        resume: leave complete records, and make those again that were broken off.
        command: the command line, for the record.
        progress: told what is being computed.

    Raises:
        ValueError: for an unknown name, or a value out of range.
        RunError: if the folder is in use or holds other records, a record exists already, or it
            cannot be written.
    """
    asked = {"preset": preset, "trained": trained, "growth": growth, "n": n}
    asked |= {"evaluating": evaluating, "taus": list(TAUS)}
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
                    for tau in TAUS:
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
    for path in filter(has_begun, sorted(folder.glob("*.jsonl"))):
        config, *rows = read_rows(path)
        if config.get("figure") != "moves":
            raise RunError(f"{path} is not a record of `teleport moves`")
        one = first.setdefault((config["title"], config["seed"]), path)
        if one != path:
            raise RunError(twice(one, path, f"{config['title']} (seed {config['seed']})"))
        moves = found.setdefault(config["title"], Moves(config, {}))
        for row in (row for row in rows if row["type"] == "move"):
            moves.by_tau.setdefault(row["tau"], []).append(row)
    kept = [moves for moves in found.values() if moves.by_tau]
    if not kept:
        raise RunError(f"{folder} holds no moves; give a folder `teleport moves` has written")
    return kept


MOVE_COLUMNS = (
    "tau",
    "layers moved",
    "free of inputs",
    "growth",
    "drift",
    "held-out drift",
    "gradients",
    "searched",
    "outcome",
)
"""Of a table of `move_cells`."""


def move_cells(moves: Moves, tau: float) -> list[str]:
    """What became of the moves at one τ, all seeds together; in the order of `MOVE_COLUMNS`."""
    rows, growth = moves.by_tau[tau], moves.config["growth"]
    layers = [[layer for layer in row["layers"] if layer["d_in"]] for row in rows]
    moved = [sum(layer["move_norm"] > 0 for layer in of) for of in layers]
    free = [sum(layer["null_dim"] or 0 for layer in of) for of in layers]
    inputs = sum(
        layer["groups"] * layer["d_in"] for layer in layers[0] if layer["rank"] is not None
    )
    reached = [_share(row["grad_norm_after"], row["grad_norm_before"]) for row in rows]
    drifts = [
        max(abs(_share(row[f"{what}_after"], row[f"{what}_before"]) - 1) for row in rows)
        for what in ("loss", "held_out")
    ]
    cost = sum(row["seconds"] / row["gradient_seconds"] for row in rows) / len(rows)
    outcomes = [outcome(row, growth) for row in rows]
    counts = {what: outcomes.count(what) for what in outcomes}
    return [
        f"{tau:g}",
        f"{_range(moved)} of {len(layers[0])}",
        f"{_range(free)} of {inputs}",
        f"{sum(reached) / len(rows):.3f}",
        *(f"{drift:.0e}" for drift in drifts),
        f"{cost:.0f}",
        f"{sum(row['searched'] for row in rows)} of {len(rows)}",
        "; ".join(f"{what} ({count} of {len(rows)})" for what, count in counts.items()),
    ]


def room(moves: Moves) -> list[list[str]]:
    """Free input directions of the first seed's layers, a column for every τ; and the status."""
    first = [rows[0]["layers"] for rows in moves.by_tau.values()]
    table = []
    for same in zip(*first, strict=True):
        layer = same[0]
        if layer["d_in"]:
            free = ["-" if one["null_dim"] is None else str(one["null_dim"]) for one in same]
            width = str(layer["groups"] * layer["d_in"])
            table.append([layer["name"], width, *free, layer["status"]])
    return table


def _share(after: float | None, before: float | None) -> float:
    """Their ratio; infinite for what was not finite."""
    return math.inf if after is None or not before else after / before


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
