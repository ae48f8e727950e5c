"""The leading directions of many rows, where a share of their energy is enough.

Float32 orders directions by their energies to 1e-7 of all of it, so nothing is gained by more until
a share is that near to the whole: products and decomposition in float32 are half the work. What
they may be wrong by counts as energy that is left out.
"""

from functools import cache
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from teleport.errors import NonFiniteInputError
from teleport.runtime.threads import factorised, factorising_threads
from teleport.subspace import PIECE, Basis, RowSpace, energy_rank, relative_cut

ENOUGH = 0.999
"""Largest share for which this serves."""

FIRST = 16
"""Directions whose energies are measured in float64, for theirs are what float32 rounds most."""

WIDE = 256
"""Columns from which on this is quicker."""


def single_serves(tau: float, d_in: int) -> bool:
    """Whether a share ``tau`` of the energy of rows of this length is told in float32."""
    return tau <= ENOUGH and d_in >= WIDE


def leading_basis(space: RowSpace, tau: float) -> Basis | None:
    """The basis of a share ``tau`` of the energy, or None where `RowSpace.basis` has to tell it.

    The k-th of the fewest directions that hold a share ``tau`` has at least ``(1 - tau) / d_in`` of
    the energy, so that the rank rule (``thm-rank``) allows it. Directions that are not kept are
    known by their energies up to a few, and by the norm of all the rest. The first energies are
    measured, for each eigenvalue is found to a part of the largest one. To the rest a share
    ``√n · eps`` of the energy is added, what sums of ``n`` products in float32 round by: of
    ``d_in`` in the decomposition, of `PIECE` rows at most in the Gram matrix.

    Args:
        space: of rows; this serves below double precision, if they are wide and more than that.
        tau: share of the energy, in (0, 1].

    Raises:
        NonFiniteInputError: if a row is NaN or infinite.
    """
    gram = space.factor()
    d_in = gram.shape[-1]
    if space.dtype == torch.float64 or not single_serves(tau, d_in) or space.count <= d_in:
        return None
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        raise NonFiniteInputError
    scaled = torch.empty_like(gram, dtype=torch.float32)
    torch.div(gram, _nonzero(total)[..., None], out=scaled)
    shares, vectors = _candidates(scaled, tau)
    first = vectors[..., :FIRST]
    shares[..., :FIRST] = ((gram @ first) * first).sum(-2) / _nonzero(total)
    # Of rank 1 the decomposition can find more than there is, and must not use up what is added.
    rest = (1.0 - shares.sum(-1, keepdim=True)).clamp(min=0)
    unknown = rest + relative_cut(min(space.count, max(d_in, PIECE)), torch.float32)
    values = (total * torch.cat([shares, unknown], -1)).sqrt()
    width = vectors.shape[-1]
    if bool((energy_rank(values, tau) > width).any()):
        return None
    every = torch.full(gram.shape[:-2], width, device=gram.device)
    return Basis(vectors, values, every, space.dtype).at(tau)


def _nonzero(energy: Tensor) -> Tensor:
    """To divide by, also where all rows are 0."""
    return energy.clamp(min=1e-300)


def _candidates(
    gram: Float[Tensor, "*groups d_in d_in"], tau: float
) -> tuple[Float[Tensor, "*groups width"], Float[Tensor, "*groups d_in width"]]:
    """Energies and directions of a Gram matrix of trace 1, a few more than hold the share."""
    values, vectors = _eigh(gram)
    energies = values.flip(-1).clamp(min=0).double()
    ample = tau + (1.0 - tau) / 8
    width = min(int((energies.cumsum(-1) < ample).sum(-1).max()) + 1, gram.shape[-1])
    leading = vectors[..., -width:].flip(-1).double()
    leading /= leading.norm(dim=-2, keepdim=True)  # which is off by more than their products are
    return energies[..., :width], leading


def _eigh(gram: Float[Tensor, "*groups d_in d_in"]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, smallest first, and vectors; by SciPy where one thread of a CPU does it.

    It is quicker than PyTorch there, which in turn makes use of more threads.
    """
    if gram.device.type != "cpu" or gram.dim() > 2 or factorising_threads(gram) > 1:
        values, vectors = factorised(torch.linalg.eigh, gram)
        return values, vectors
    from scipy import linalg  # late: its libraries have threads of their own

    with _LIMITING, _threads().limit(limits=1, user_api="blas"):
        found = linalg.eigh(
            gram.numpy(), lower=False, driver="evd", overwrite_a=True, check_finite=False
        )
    values, vectors = map(torch.from_numpy, found)
    return values, vectors


_LIMITING = Lock()
"""SciPy's libraries have one number of threads for the whole process: of two who limit it at a time
the later puts back the limit of the other. Little is lost: SciPy holds Python's lock most of it."""


@cache
def _threads() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
