"""The span of two spaces together, or of as much of the second as is asked for."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from teleport.errors import NullSpaceError
from teleport.subspace import Basis, Projector, RowSpace, require_tau


def kept_by_both(basis: Projector, other: Projector, tau: float = 1.0) -> Projector:
    """Keep all that one space keeps, and a share of the energy that another one holds.

    What the first keeps of the second's energy counts. What is missing is taken from the rest of
    the second by its leading directions, as few as will do: equations 8 and 9 of Gradient
    Projection Memory (Saha et al. 2021).

    Args:
        basis: kept whole.
        other: of other data; best with all its directions, for what it left out cannot be kept.
        tau: share of the energy of the directions of ``other``, in (0, 1]; at 1 it is kept whole.

    Raises:
        ValueError: if ``tau`` is out of range.
        NullSpaceError: for ``tau`` < 1 if the layer is none whose directions have an order.
    """
    require_tau(tau)
    if tau == 1.0:
        return basis.merge(other)
    if not (isinstance(basis, Basis) and isinstance(other, Basis)):
        raise NullSpaceError(
            f"a share of a {type(other).__name__}, as of embeddings and tied layers, cannot be "
            "merged: give both spaces their tau when they are made, and merge them whole"
        )
    return _extended(basis, other, tau)


def _extended(basis: Basis, other: Basis, tau: float) -> Basis:
    rows = other.weighted_rows()
    inside = (rows @ basis.vectors) @ basis.vectors.mT
    rest = rows - inside
    rest -= (rest @ basis.vectors) @ basis.vectors.mT
    _, values, directions = torch.linalg.svd(rest, full_matrices=False)
    new = directions * _needed(rows, values, tau)[..., None]
    seen = inside + (rows @ new.mT) @ new
    space = RowSpace()
    space.add(seen)
    part = space.basis(dtype=other.dtype)
    left_out = torch.hypot((rows - seen).norm(dim=(-2, -1)), _residuals(other))
    return basis.merge(
        replace(part, singular_values=torch.cat([part.singular_values, left_out[..., None]], -1))
    )


def _needed(
    rows: Float[Tensor, "*groups rows d_in"], values: Float[Tensor, "*groups values"], tau: float
) -> Float[Tensor, "*groups values"]:
    """1 for the first directions of the rest, as many as it takes, 0 for the others."""
    total = rows.square().sum((-2, -1))
    energy = values.square()
    before = (total - energy.sum(-1))[..., None] + energy.cumsum(-1) - energy
    return (before < tau * total[..., None]).to(rows.dtype)


def _residuals(basis: Basis) -> Float[Tensor, "*groups"]:
    """Root of the energy that each group has left out."""
    values = basis.singular_values
    after = torch.arange(values.shape[-1], device=values.device) >= basis.ranks[..., None]
    norms: Tensor = (values * after).norm(dim=-1)
    return norms
