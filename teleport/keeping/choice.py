"""Which layers may move, and how much of their inputs each keeps: patterns of their names."""

from collections.abc import Mapping, Sequence
from typing import Any

from teleport.layers.support import Coverage, WeightMatrix, require_matches, selected
from teleport.subspace import require_tau

LEFT_OUT = "left out by include or exclude"

Tau = float | Mapping[str, float]
"""A share of energy in (0, 1] for all layers, or for those whose names match a pattern."""


def taus_of(tau: Tau, names: list[str], default: Any) -> dict[str, Any]:
    """The threshold of every layer."""
    if not isinstance(tau, Mapping):
        require_tau(tau)
        return dict.fromkeys(names, tau)
    for share in tau.values():
        require_tau(share)
    require_matches(names, list(tau))
    first = {pattern: selected(names, [pattern], None) for pattern in tau}
    return {n: next((tau[p] for p, those in first.items() if n in those), default) for n in names}


def left_out_of(
    coverage: Coverage, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> set[WeightMatrix]:
    """The layers that stay as they are, by the patterns of those that may move and must not."""
    for argument, patterns in {"include": include, "exclude": exclude}.items():
        if isinstance(patterns, str):
            raise ValueError(f"{argument} takes a list of patterns: [{patterns!r}]")
    names = [block.name for block in coverage.blocks]
    require_matches(names, [*(include or ()), *(exclude or ())])
    wanted = selected(names, include, exclude)
    if not wanted:
        raise ValueError(
            f"include={include!r} and exclude={exclude!r} leave no layer that may move; the "
            f"model's layers are {names}"
        )
    return {block for block in coverage.blocks if block.name not in wanted}
