"""Cases from small integers, so that a counterexample can be worked out by hand."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from teleport.errors import CheckError

T = TypeVar("T")


def hypothesis() -> Any:
    """The library that finds and shrinks counterexamples.

    Raises:
        CheckError: if it is not installed, with the line that installs it.
    """
    # Where it is imported for our sake only, it leaves no folder of its own beside the exercises.
    if "hypothesis" not in sys.modules:
        place = Path(tempfile.gettempdir()) / "teleport-check"
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(place))
    try:
        import hypothesis
    except ImportError as error:
        raise CheckError(
            "teleport.check finds counterexamples with Hypothesis, which is not installed: "
            "pip install 'nullspace-teleport[course]'"
        ) from error
    return hypothesis


class Draw:
    """Draws the parts of a case; every draw shrinks towards its first or smallest value."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self._draw = draw
        self._strategies = hypothesis().strategies

    def integer(self, low: int, high: int) -> int:
        """A whole number of a range, both ends included."""
        return int(self._draw(self._strategies.integers(low, high)))

    def choice(self, *options: T) -> T:
        """One of the options; the first is the simplest."""
        chosen: T = self._draw(self._strategies.sampled_from(options))
        return chosen

    def order(self, count: int) -> list[int]:
        """The numbers from 0 in some order."""
        return list(self._draw(self._strategies.permutations(range(count))))

    def matrix(self, *shape: int, low: int = -3, high: int = 3) -> Tensor:
        """A tensor of whole numbers, float64."""
        count = int(torch.Size(shape).numel())
        entries = self._strategies.integers(low, high)
        flat = self._draw(self._strategies.lists(entries, min_size=count, max_size=count))
        return torch.tensor(flat, dtype=torch.float64).reshape(shape)

    def positive(self, *shape: int, high: int = 4) -> Tensor:
        """A tensor of whole numbers from 1, float64."""
        return self.matrix(*shape, low=1, high=high)

    def orthonormal(self, size: int, count: int, turned: bool = True) -> Tensor:
        """``[size, count]``, orthonormal: axes, and if ``turned``, some by a right triangle.

        The entries of 3-4-5 are short, and no decimals hold those of 5-12-13: rounding shows.
        """
        order = self.order(size)
        vectors = torch.eye(size, dtype=torch.float64)
        if turned and size > 1 and (sides := self.choice((), (3, 4, 5), (5, 12, 13))):
            a, b, c = sides
            turn = torch.tensor([[a, -b], [b, a]], dtype=torch.float64) / c
            pair = torch.tensor([order[0], order[-1]])
            vectors[:, pair] = vectors[:, pair] @ turn
        return vectors[:, order[:count]].contiguous()

    def independent(self, rows: int, columns: int, bias: bool = False) -> Tensor:
        """Linearly independent rows, ``rows <= columns``; the last column is 1 if ``bias``."""
        identity = torch.eye(rows, dtype=torch.float64)
        rest = self.matrix(rows, columns - rows)
        if bias and columns > rows:
            rest[:, -1] = 1.0
            front = torch.cat([identity, rest[:, :-1]], dim=1)
            return torch.cat([front[:, self.order(columns - 1)], rest[:, -1:]], dim=1)
        return torch.cat([identity, rest], dim=1)[:, self.order(columns)]
