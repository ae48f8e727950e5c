"""One weight used from both sides, such as an embedding table that is also the output head.

The head's inputs are rows that ``ΔW`` must kill from the right, ``ΔW (I - P) = 0``; the embedding's
tokens are rows of ``ΔW`` that must be zero, a projection from the left. The two commute, so their
product is the orthogonal projector onto the moves that leave both uses unchanged. A bias of the
head, the last column, is projected from the left with the rest: where a row of ``ΔW`` is zero, a
change of its bias alone would change the outputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from teleport.runtime.ranks import Ranks
from teleport.subspace import Projector, Space


@dataclass(frozen=True)
class TiedBasis(Projector):
    """Keeps the inputs of a matrix and those of its transpose.

    Attributes:
        own: for the matrix, ``[d_out, d_in]``.
        other: for the transpose, ``[d_in, d_out]``.
    """

    own: Projector
    other: Projector

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    @property
    def device(self) -> torch.device:
        return self.own.device

    @property
    def shape(self) -> tuple[int, ...]:
        return self.own.shape

    @property
    def rank(self) -> int:
        return self.own.rank

    @property
    def null_dim(self) -> int:
        """Free input directions; none if the other use leaves no row of the matrix free."""
        return self.own.null_dim if self.other.null_dim else 0

    @property
    def residual(self) -> float:
        return math.hypot(self.own.residual, self.other.residual)

    @property
    def cut_off(self) -> float:
        return math.hypot(self.own.cut_off, self.other.cut_off)

    def project(self, matrix: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "d_out d_in"]:
        return self.other.project(self.own.project(matrix).mT).mT

    def to(self, device: torch.device) -> "TiedBasis":
        return TiedBasis(self.own.to(device), self.other.to(device))

    def merge(self, other: Projector) -> "TiedBasis":
        if not isinstance(other, TiedBasis):
            raise TypeError(f"a tied basis merges with a tied basis, got {type(other).__name__}")
        return TiedBasis(self.own.merge(other.own), self.other.merge(other.other))

    def at(self, tau: float) -> "TiedBasis":
        return TiedBasis(self.own.at(tau), self.other.at(tau))

    def _of_first(self, ranks: Ranks) -> "TiedBasis":
        return TiedBasis(self.own.of_first(ranks), self.other.of_first(ranks))


class TiedSpace(Space):
    """Collects the inputs of both uses, each in its own space."""

    def __init__(self, own: Space, other: Space) -> None:
        self.own, self.other = own, other

    @property
    def count(self) -> int:
        """Inputs of both uses."""
        return self.own.count + self.other.count

    def absorb(self, other: "TiedSpace") -> None:
        self.own.absorb(other.own)
        self.other.absorb(other.other)

    def _joined(self, ranks: Ranks, shape: Sequence[int]) -> "TiedSpace":
        other = self.other.joined(ranks, (shape[-1], shape[-2]))
        return TiedSpace(self.own.joined(ranks, shape), other)

    def basis(self, tau: float = 1.0) -> TiedBasis:
        return TiedBasis(self.own.basis(tau), self.other.basis(tau))
