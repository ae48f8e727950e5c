"""What the records of `teleport moves` say, as tables."""

import math
from typing import Any

from teleport.ascent import FIXED, NO_ROOM
from teleport.lab.analysis.outcomes import range_text
from teleport.lab.paper.moves import Moves

REACHED = 0.01
"""How far, as a share, the growth may be from what was asked for and still count as reached."""


def outcome(row: dict[str, Any], growth: float) -> str:
    """What became of a move: reached, undone, or why it could not be; read off its row."""
    if row["undone"]:
        return "undone by the guard"
    reached = _share(row["grad_norm_after"], row["grad_norm_before"])
    if abs(reached - growth) <= REACHED * growth:
        return "reached"
    if row["reason"].startswith(NO_ROOM):
        return "cannot: no null space (thm-fixed)"
    if row["reason"].startswith(FIXED):
        return "cannot: what is free does not change (thm-fixed)"
    return str(row["reason"])


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
        f"{range_text(moved)} of {len(layers[0])}",
        f"{range_text(free)} of {inputs}",
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
