"""Row spaces of layer inputs: numerical rank, basis for an energy threshold, projector.

A layer leaves its outputs on a batch unchanged exactly when its weight change kills every input row
of that batch (theorem ``thm-invariance``). The rows span a space; `RowSpace` collects them,
`Basis` is an orthonormal basis of what is kept of that space, and `Basis.project` removes it.
"""

from teleport.subspace.full_basis import FullBasis, full_basis
from teleport.subspace.projector import Projector, Space
from teleport.subspace.rank import (
    energy_rank,
    kept_rank,
    numerical_rank,
    rank_cut,
    relative_cut,
    require_tau,
)
from teleport.subspace.row_space import (
    PIECE,
    Basis,
    RowSpace,
    aligned_mm,
    empty_aligned,
    products_of_rows,
)

__all__ = [
    "PIECE",
    "Basis",
    "FullBasis",
    "Projector",
    "RowSpace",
    "Space",
    "aligned_mm",
    "empty_aligned",
    "energy_rank",
    "full_basis",
    "kept_rank",
    "numerical_rank",
    "products_of_rows",
    "rank_cut",
    "relative_cut",
    "require_tau",
]
