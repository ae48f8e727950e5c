"""Row spaces of layer inputs: numerical rank, basis for an energy threshold, projector.

A layer leaves its outputs on a batch unchanged exactly when its weight change kills every input row
of that batch (theorem ``thm-invariance``). The rows span a space; `RowSpace` collects them,
`Basis` is an orthonormal basis of what is kept of that space, and `Basis.project` removes it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """Orthonormal basis of the kept part of a layer's input space (paper equation 3, step 2).

    Attributes:
        vectors: ``[d_in, rank]``, orthonormal columns, float64; the paper's ``B_l``.
        singular_values: ``[min(rows, d_in)]`` of the rows at most, largest first, float64.
    """

    vectors: Float[Tensor, "d_in rank"]
    singular_values: Float[Tensor, " values"]

    @property
    def rank(self) -> int:
        """How many directions are kept."""
        return self.vectors.shape[1]

    @property
    def null_dim(self) -> int:
        """How many directions stay free to move in."""
        return self.vectors.shape[0] - self.rank

    @property
    def residual(self) -> float:
        """Root of the energy left out: the norm of the rows' part outside the kept space."""
        return float(self.singular_values[self.rank :].norm())

    def project(self, matrix: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """``M - M B Bᵀ``: the rows of ``matrix`` with their part in the kept space removed.

        This is paper equation (11), applied twice: one pass leaves a remainder of the size of the
        rounding of ``matrix`` itself, which is not small beside a result that is.
        """
        vectors = self.vectors.to(matrix.dtype)
        once = matrix - (matrix @ vectors) @ vectors.T
        return once - (once @ vectors) @ vectors.T


class RowSpace:
    """Collects input rows, in any number of pieces, and gives a `Basis` of their span.

    Memory stays at one ``d_in x d_in`` matrix however many rows are added. Double-precision rows
    are reduced by QR factorizations, which keep their condition number. Rows of lower precision
    are reduced to a float64 Gram matrix, which is cheaper and squares the condition number: it
    resolves singular values down to about 1e-8 of the largest, far below the rank cut for float32.
    """

    def __init__(self) -> None:
        self.count = 0
        self._pending: list[Tensor] = []
        self._reduced: Tensor | None = None
        self._dtype = torch.float64

    def add(self, rows: Float[Tensor, "rows d_in"]) -> None:
        """Take in more rows; they are copied or reduced, never kept by reference to a graph."""
        self._dtype = rows.dtype
        self.count += len(rows)
        self._pending.append(rows.detach().double())
        if sum(map(len, self._pending)) > rows.shape[1]:
            self._reduce()

    def basis(self, tau: float = 1.0) -> Basis:
        """Basis of the span (``tau`` = 1), or of the fewest directions with energy >= ``tau``.

        Args:
            tau: share of the rows' squared Frobenius norm to keep, in (0, 1].

        Returns:
            The basis; at most the numerical rank many vectors at any ``tau``.

        Raises:
            ValueError: if ``tau`` is outside (0, 1], or no rows were added.
        """
        if not 0.0 < tau <= 1.0:
            raise ValueError(f"tau must be in (0, 1], got {tau}; 1 keeps the whole input space")
        if self.count == 0:
            raise ValueError("no rows were added: a basis needs at least one input row")
        values, vectors = self._decompose()
        rank = numerical_rank(values, (self.count, vectors.shape[0]), self._dtype)
        if tau < 1.0:
            rank = min(rank, energy_rank(values, tau))
        return Basis(vectors[:, :rank].contiguous(), values)

    def _exact(self) -> bool:
        return self._dtype == torch.float64

    def _reduce(self) -> None:
        rows = torch.cat(self._pending)
        self._pending = []
        if self._exact():
            stacked = rows if self._reduced is None else torch.cat([self._reduced, rows])
            self._reduced = torch.linalg.qr(stacked, mode="r").R
        else:
            gram = rows.T @ rows
            self._reduced = gram if self._reduced is None else self._reduced + gram

    def _decompose(self) -> tuple[Tensor, Tensor]:
        """Singular values, largest first, and right singular vectors as columns."""
        if self._reduced is not None and self._pending:
            self._reduce()
        if self._exact():
            rows = torch.cat(self._pending) if self._reduced is None else self._reduced
            _, values, vectors_t = torch.linalg.svd(rows, full_matrices=False)
            return values, vectors_t.T
        if self._reduced is not None:
            return _singular_from_gram(self._reduced)
        return _singular_from_rows(torch.cat(self._pending))


def numerical_rank(
    singular_values: Float[Tensor, " values"], shape: tuple[int, int], dtype: torch.dtype
) -> int:
    """How many singular values exceed ``max(shape) * eps(dtype) * largest`` (``thm-rank``).

    Strictly: a zero matrix has rank 0. ``dtype`` is that of the inputs, not of the values: rounding
    of the inputs is what a smaller singular value cannot be told from. Half precision inputs are
    cut like float32: their stored values are exact there, and their own eps would cut everything.
    """
    eps = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
    if singular_values.numel() == 0:
        return 0
    cut = max(shape) * eps * singular_values.max()
    return int((singular_values > cut).sum())


def energy_rank(singular_values: Float[Tensor, " values"], tau: float) -> int:
    """Smallest k whose first k squared singular values reach ``tau`` of their sum (equation 3).

    For ``tau`` = 1 use `numerical_rank`: a cumulated sum in floating point need not reach its own
    total (``thm-rank``).
    """
    energy = singular_values.square().cumsum(0)
    return int((energy < tau * energy[-1]).sum()) + 1 if energy[-1] > 0 else 0


def _singular_from_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def _singular_from_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Fewer rows than columns: decompose the smaller Gram, then carry its vectors over.

    The columns of ``rowsᵀ U`` have inner products of 1e-16 σ₁², so normalised they are orthonormal
    to 1e-8 even where σ is as small as the rank cut of float32 allows.
    """
    values, left = _singular_from_gram(rows @ rows.T)
    resolved = int((values > 1e-7 * values[0]).sum())  # beyond it the Gram holds only rounding
    return values, rows.T @ (left[:, :resolved] / values[:resolved])
