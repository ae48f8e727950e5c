"""How many directions are kept: the numerical rank (``thm-rank``) and the energy threshold τ."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from teleport.errors import is_between
from teleport.runtime.precision import sum_rounding


def numerical_rank(
    singular_values: Float[Tensor, "*groups values"], d_in: int, dtype: torch.dtype
) -> Int[Tensor, "*groups"]:
    """How many singular values exceed the cut, strictly: a zero matrix has rank 0 (``thm-rank``).

    Group by group; see `rank_cut` for the arguments.
    """
    cut = rank_cut(singular_values, d_in, dtype)
    return (singular_values > cut[..., None]).sum(dim=-1)


def require_tau(tau: float) -> None:
    """Raise ValueError for a share of energy that is none."""
    if not (tau == 1.0 or is_between(tau, 0.0, 1.0)):
        raise ValueError(f"tau must be in (0, 1], got {tau!r}; 1 keeps the whole input space")


def kept_rank(
    singular_values: Float[Tensor, "*groups values"], d_in: int, dtype: torch.dtype, tau: float
) -> Int[Tensor, "*groups"]:
    """How many directions to keep: `energy_rank` at ``tau``, never more than `numerical_rank`."""
    require_tau(tau)
    ranks = numerical_rank(singular_values, d_in, dtype)
    return ranks if tau == 1.0 else torch.minimum(ranks, energy_rank(singular_values, tau))


def rank_cut(
    singular_values: Float[Tensor, "*groups values"], d_in: int, dtype: torch.dtype
) -> Float[Tensor, "*groups"]:
    """Up to which singular value a direction is free: ``c = √d_in · eps · ‖R‖_F`` (``thm-rank``).

    A move ``ΔW`` along free directions changes the layer's outputs by at most ``‖ΔW‖_F c``. The
    layer rounds them by ``λ ‖W‖_F c`` anyway: an output is a sum of ``d_in`` products. So c does
    not depend on how many rows there are.

    Args:
        singular_values: all of them, of the rows R of each group.
        d_in: length of a row, the 1 for the bias included.
        dtype: of the rows, in which the layer computes. Half precision is summed in float32, whose
            eps counts. Below 4 · eps · ‖R‖_F float64 resolves nothing, so nothing less is a cut.
    """
    norms: Tensor = singular_values.norm(dim=-1)
    return relative_cut(d_in, dtype) * norms


def relative_cut(d_in: int, dtype: torch.dtype) -> float:
    """The cut as a share of the rows' norm."""
    return max(sum_rounding(dtype, d_in), 4 * torch.finfo(torch.float64).eps)


def energy_rank(
    singular_values: Float[Tensor, "*groups values"], tau: float
) -> Int[Tensor, "*groups"]:
    """Smallest k whose first k squared singular values reach ``tau`` of their sum (equation 3).

    For ``tau`` = 1 use `numerical_rank`: a cumulated sum in floating point need not reach its own
    total (``thm-rank``).
    """
    energy = singular_values.square().cumsum(dim=-1)
    total = energy[..., -1:]
    return ((energy < tau * total).sum(dim=-1) + 1) * (total[..., 0] > 0)


def mark_first(counts: Tensor, like: Tensor) -> Tensor:
    """Marks the first ``counts`` entries along the last axis of ``like``, group by group."""
    return torch.arange(like.shape[-1], device=like.device) < counts[..., None]
