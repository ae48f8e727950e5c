"""What was seen along one direction: the parts of the squared norm at each look, and between them.

A search that knows where it ends need not look there: the report's numbers follow from the looks
that it has taken.
"""

import math
from dataclasses import dataclass, field

from teleport.objective import Shares

BESIDE = 0.01
"""How far from a look, as a share of the step, what was seen there serves for a neighbour."""

AGREEING = 3e-5
"""How far the sum of the shares found may be, as a share of it, from the squared norm that the
search expects, which knows the slope, too: a tenth of what it calls near enough."""


@dataclass
class Looks:
    """Looks along a direction.

    Attributes:
        seen: steps and shares, in the order of the looks; step 0 first if that was looked at.
        chord: squared lengths, by the same names, of what lies between the gradients at the first
            two steps; None if not all of them are known.
    """

    seen: list[tuple[float, Shares]] = field(default_factory=list)
    chord: Shares | None = None

    def between(self, step: float, reached: float) -> Shares | None:
        """Shares at a step where the squared norm is ``reached``; None if that is not known.

        Of one block that moves alone, gradients are a straight line in the step (``thm-polynomial``
        with one factor); so are they nearly where it does almost all. Otherwise, beside the last of
        three looks or more, by parabolas through those three.
        """
        found = self._on_chord(step) if len(self.seen) == 2 else self._parabolas(step)
        total = sum(found.values()) if found else math.nan
        if found is None or not abs(total - reached) <= AGREEING * reached:  # or it is no number
            return None
        return {name: share * (reached / total) for name, share in found.items()}

    def _on_chord(self, step: float) -> Shares | None:
        """``‖(1 - u) g + u h‖² = (1 - u) ‖g‖² + u ‖h‖² - u (1 - u) ‖h - g‖²``."""
        (start, first), (end, last) = self.seen
        if self.chord is None or start != 0.0 or not step <= end:
            return None
        u = step / end
        return {
            name: (1 - u) * share + u * last[name] - u * (1 - u) * self.chord[name]
            for name, share in first.items()
        }

    def _parabolas(self, step: float) -> Shares | None:
        steps = [where for where, _ in self.seen[-3:]]
        if len(set(steps)) < 3 or abs(steps[-1] - step) > BESIDE * step:
            return None
        weights = [
            math.prod((step - other) / (own - other) for other in steps if other != own)
            for own in steps
        ]
        parts = [shares for _, shares in self.seen[-3:]]
        return {
            name: sum(w * shares[name] for w, shares in zip(weights, parts, strict=True))
            for name in parts[-1]
        }
