"""The basis of rows of full rank, which nobody has to decompose to know that nothing is free.

Whether a Gram matrix has full rank by the rank rule (``thm-rank``) is told by a Cholesky factor of
it less the squared cut, a small part of the work of a decomposition. Most uses of such a basis ask
for no more: what it projects is 0.
"""

import math
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from teleport.errors import NonFiniteInputError
from teleport.subspace.row_space import Basis, RowSpace


class FullBasis(Basis):
    """A `Basis` of all directions; which they are is worked out when somebody asks.

    Args:
        gram: ``[*groups, d_in, d_in]``, float64, inner products of the columns of rows of full
            rank; it is let go when the directions are worked out.
        dtype: of the rows, below double precision.
    """

    def __init__(self, gram: Float[Tensor, "*groups d_in d_in"], dtype: torch.dtype) -> None:
        *groups, d_in = gram.shape[:-1]
        ranks = torch.full(groups, d_in, device=gram.device)
        self.__dict__.update(_gram=gram, _shape=(*groups, d_in), ranks=ranks, dtype=dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        found: tuple[int, ...] = self.__dict__["_shape"]
        return found

    @property
    def cut_off(self) -> float:
        return 0.0

    @property
    def vectors(self) -> Tensor:
        return self._decomposed.vectors

    @property
    def singular_values(self) -> Tensor:
        return self._decomposed.singular_values

    def numbers(self) -> Basis:
        return self._decomposed.numbers()

    def to(self, device: torch.device) -> Basis:
        gram = self.__dict__["_gram"]
        if gram is None:
            return self._decomposed.to(device)
        return FullBasis(gram.to(device), self.dtype)

    def project(
        self, matrix: Float[Tensor, "*groups rows d_in"]
    ) -> Float[Tensor, "*groups rows d_in"]:
        """Zeros, for nothing is free; what is not finite shows."""
        return matrix * 0.0

    def free_directions(self) -> Float[Tensor, "d_in 0"]:
        return self.ranks.new_zeros(*self.shape, 0, dtype=torch.float64)

    def _left_out(self) -> Float[Tensor, "*groups 1"]:
        return self.ranks.new_zeros(*self.ranks.shape, 1, dtype=torch.float64)

    @cached_property
    def _decomposed(self) -> Basis:
        about: dict[str, Any] = self.__dict__
        space = RowSpace.of_gram(about["_gram"], self.shape[-1], self.dtype)
        found = space.basis()
        about["_gram"] = None
        return found


def full_basis(space: RowSpace) -> FullBasis | None:
    """The basis of all directions, or None where `RowSpace.basis` has to tell how many there are.

    Args:
        space: of rows; this serves below double precision, if they are more than wide.

    Raises:
        NonFiniteInputError: if a row is NaN or infinite.
    """
    d_in = space.factor().shape[-1]
    if space.dtype == torch.float64 or space.count <= d_in:
        return None
    gram = space.gram()
    energy = float(gram.diagonal(dim1=-2, dim2=-1).sum())
    if not math.isfinite(energy):
        raise NonFiniteInputError
    return None if space.basis_if_full(energy) is None else FullBasis(gram, space.dtype)
