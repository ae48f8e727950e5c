"""The leading directions of many rows, where a share of their energy is enough.

How much energy some orthonormal directions hold is known exactly from a Gram matrix, and what is
left out from its trace, whatever the directions came from. So they come from a decomposition in
float32, half the work, are made orthonormal in float64, and counted by the energies that they have.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from teleport.errors import NonFiniteInputError
from teleport.subspace import Basis, RowSpace, energy_rank

ENOUGH = 0.999
"""Largest share for which this serves. Float32 orders directions by their energies to 1e-7 of all
of it: what is that near to the whole needs better."""

WIDE = 1024
"""Columns from which on this is quicker."""


def leading_basis(space: RowSpace, tau: float) -> Basis | None:
    """The basis of a share ``tau`` of the energy, or None where `RowSpace.basis` has to tell it.

    The k-th of the fewest directions that hold a share ``tau`` has at least ``(1 - tau) / d_in`` of
    the energy, so that the rank rule (``thm-rank``) allows it. Directions that are not kept are
    known by their energies up to a few, and by the norm of all the rest.

    Args:
        space: of rows; this serves below double precision, if they are wide and more than that.
        tau: share of the energy, in (0, 1].

    Raises:
        NonFiniteInputError: if a row is NaN or infinite.
    """
    if tau > ENOUGH or space.dtype == torch.float64:
        return None
    if not WIDE <= space.factor().shape[-1] < space.count:
        return None
    gram = space.gram()
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    if not bool(total.isfinite().all()):
        raise NonFiniteInputError
    vectors = _candidates(gram / total.clamp(min=1e-300)[..., None, None], tau)
    energies = (vectors * (gram @ vectors)).sum(-2).clamp(min=0)
    rest = (total - energies.sum(-1)).clamp(min=0)
    values = torch.cat([energies, rest[..., None]], -1).sqrt()
    width = vectors.shape[-1]
    if bool((energy_rank(values, tau) > width).any()):
        return None
    every = torch.full(gram.shape[:-2], width, device=gram.device)
    return Basis(vectors, values, every, space.dtype).at(tau)


def _candidates(
    gram: Float[Tensor, "*groups d_in d_in"], tau: float
) -> Float[Tensor, "*groups d_in width"]:
    """Orthonormal directions of a Gram matrix of trace 1, a few more than hold the energy."""
    values, vectors = torch.linalg.eigh(gram.float())
    ample = tau + (1.0 - tau) / 8
    held = values.flip(-1).double().cumsum(-1)
    width = min(int((held < ample).sum(-1).max()) + 1, gram.shape[-1])
    leading = vectors[..., -width:].flip(-1).double()
    factor = torch.linalg.cholesky(leading.mT @ leading)
    found: Tensor = torch.linalg.solve_triangular(factor, leading.mT, upper=False).mT
    return found
