"""Factors and Gram matrices of rows: what `RowSpace` reduces rows to, and decomposes.

Double-precision rows go by QR and SVD; rows of lower precision by a float64 Gram matrix.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from teleport.errors import NonFiniteInputError

BLOCK = 512
"""Columns at a time of a Gram matrix of many: few enough to leave out what symmetry tells."""


def triangle(rows: Float[Tensor, "*groups rows d_in"]) -> Float[Tensor, "*groups fewer d_in"]:
    """R of a QR factorization, by halves: its rounding does not grow with the number of rows."""
    count, d_in = rows.shape[-2:]
    if count > max(64, 2 * d_in):
        rows = torch.cat([triangle(half) for half in rows.tensor_split(2, dim=-2)], dim=-2)
    factor: Tensor = torch.linalg.qr(rows, mode="r").R
    return factor


def gram_of(
    rows: Float[Tensor, "*groups rows d_in"], onto: Tensor | None = None
) -> Float[Tensor, "*groups d_in d_in"]:
    """``rowsᵀ rows``, added to another Gram matrix in place.

    Of many columns one triangle, block by block, for it is symmetric.
    """
    d_in = rows.shape[-1]
    if d_in < 2 * BLOCK:
        return rows.mT @ rows if onto is None else onto.add_(rows.mT @ rows)
    gram = rows.new_empty(*rows.shape[:-2], d_in, d_in) if onto is None else onto
    for start in range(0, d_in, BLOCK):
        block, rest = slice(start, start + BLOCK), slice(start, None)
        part = rows[..., block].mT @ rows[..., rest]
        if onto is not None:
            part += onto[..., block, rest]
        gram[..., block, rest], gram[..., rest, block] = part, part.mT
    return gram


def singular_from_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, largest first, and right singular vectors of rows with this Gram matrix."""
    if not bool(gram.diagonal(dim1=-2, dim2=-1).isfinite().all()):
        raise NonFiniteInputError
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)


def singular_from_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Fewer rows than columns: decompose the smaller Gram, then carry its vectors over.

    The columns of ``rowsᵀ U`` have inner products of 1e-16 σ₁², so normalised they are orthonormal
    to 1e-8 even where σ is as small as the rank cut of float32 allows.
    """
    values, left = singular_from_gram(rows @ rows.mT)
    # Beyond this the Gram holds only rounding; the rank rule cuts those vectors off.
    resolved = values > 1e-7 * values[..., :1]
    return values, rows.mT @ (left / torch.where(resolved, values, torch.inf)[..., None, :])
