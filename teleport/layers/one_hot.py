"""Row spaces of one-hot inputs: spanned by coordinate axes, so a mask does for a basis.

An embedding is a linear layer whose input row is 1 at the token and 0 elsewhere. Rows of seen
tokens span their axes; the null space is the axes of tokens never seen. A vocabulary of 50,000
would need a Gram matrix of 20 gigabytes; the mask needs a byte per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from teleport.runtime.ranks import Ranks
from teleport.subspace import Projector, Space, require_tau


@dataclass(frozen=True)
class AxisBasis(Projector):
    """Keeps some coordinate axes.

    Attributes:
        kept: ``[d_in]``, which axes.
        counts: ``[d_in]``, float64, how often each was the input: its squared singular value.
        dtype: float64, for counts are exact.
    """

    kept: Bool[Tensor, " d_in"]
    counts: Float[Tensor, " d_in"]
    dtype: torch.dtype = torch.float64

    @property
    def device(self) -> torch.device:
        return self.kept.device

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.kept),)

    @property
    def rank(self) -> int:
        return int(self.kept.sum())

    @property
    def null_dim(self) -> int:
        return len(self.kept) - self.rank

    @property
    def residual(self) -> float:
        return float(self.counts[~self.kept].sum().sqrt())

    @property
    def cut_off(self) -> float:
        return 0.0

    def project(self, matrix: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        return matrix.masked_fill(self.kept, 0.0)

    def to(self, device: torch.device) -> "AxisBasis":
        return AxisBasis(self.kept.to(device), self.counts.to(device))

    def merge(self, other: Projector) -> "AxisBasis":
        if not isinstance(other, AxisBasis):
            raise TypeError(f"axes merge with axes, got {type(other).__name__}")
        counts = self.counts * self.kept + other.counts * other.kept
        return AxisBasis(self.kept | other.kept, counts)

    def at(self, tau: float) -> "AxisBasis":
        return AxisSpace.of_counts(self.counts).basis(tau)

    def _of_first(self, ranks: Ranks) -> "AxisBasis":
        kept, counts = self.kept.clone(), self.counts.clone()
        ranks.of_first_([kept, counts])
        return AxisBasis(kept, counts)


class AxisSpace(Space):
    """Counts how often each of ``size`` tokens is the input."""

    count: int = 0

    def __init__(self, size: int) -> None:
        self._size = size
        self._counts: Tensor | None = None

    def add(self, tokens: Int[Tensor, "..."]) -> None:
        """Take in more tokens."""
        self.count += tokens.numel()
        counts = torch.bincount(tokens.reshape(-1), minlength=self._size).double()
        self._counts = counts if self._counts is None else self._counts + counts

    @property
    def counts(self) -> Float[Tensor, " d_in"] | None:
        """How often each token was the input; None before the first."""
        return self._counts

    @classmethod
    def of_counts(cls, counts: Float[Tensor, " d_in"]) -> "AxisSpace":
        """The space of tokens counted elsewhere."""
        space = cls(len(counts))
        space.count, space._counts = int(counts.sum()), counts
        return space

    def absorb(self, other: "AxisSpace") -> None:
        if other._counts is not None:
            self.count += other.count
            self._counts = other._counts if self._counts is None else self._counts + other._counts

    def _joined(self, ranks: Ranks, shape: Sequence[int]) -> "AxisSpace":
        counts = torch.zeros(shape[-1], dtype=torch.float64, device=ranks.device)
        counts = counts if self.counts is None else self.counts.clone()
        ranks.sum_(counts)
        return AxisSpace.of_counts(counts)

    def basis(self, tau: float = 1.0) -> AxisBasis:
        require_tau(tau)
        if self._counts is None:
            raise ValueError("no tokens were added: a basis needs at least one input")
        if tau == 1.0:
            return AxisBasis(self._counts > 0, self._counts)
        # The fewest tokens with this share of the uses: the most frequent ones.
        energy, order = self._counts.sort(descending=True, stable=True)
        enough = int((energy.cumsum(0) < tau * energy.sum()).sum()) + 1
        kept = torch.zeros_like(self._counts, dtype=torch.bool)
        kept[order[:enough]] = True
        return AxisBasis(kept & (self._counts > 0), self._counts)
