"""Rows of any layer: `RowSpace` collects them, `Basis` spans what is kept of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from teleport.errors import NonFiniteInputError
from teleport.runtime.precision import PRECISIONS, coarsest
from teleport.runtime.ranks import Ranks
from teleport.runtime.threads import factorised
from teleport.subspace.projector import Projector, Space
from teleport.subspace.rank import kept_rank, mark_first, rank_cut, relative_cut, require_tau

BLOCK = 128
"""Columns at a time of a Gram matrix: few enough to leave out most of what symmetry tells."""

WAITING = 256
"""Rows that wait for one addition to a Gram matrix: enough to make its traffic in memory small."""

NARROW = 256
"""Columns of a product below which it does not matter where its rows begin."""

PIECE = 1024
"""Rows at a time whose products are summed, in float32 where that is enough."""


@dataclass(frozen=True)
class Basis(Projector):
    """Orthonormal basis of the kept part of a layer's input space (paper equation 3, step 2).

    Attributes:
        vectors: ``[*groups, d_in, width]``, float64; the paper's ``B_l``. The first ``ranks``
            columns are orthonormal, to rounding in float32 where that is what they were found in;
            the others zero.
        singular_values: ``[*groups, min(rows, d_in)]`` of the rows at most, largest first, float64.
            Of merged bases two more, the norms of what each had left out.
        ranks: ``[*groups]``, how many directions each group keeps.
        dtype: of the inputs; the precision to which the space is known.
    """

    vectors: Float[Tensor, "*groups d_in width"]
    singular_values: Float[Tensor, "*groups values"]
    ranks: Int[Tensor, "*groups"]
    dtype: torch.dtype = torch.float64

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.vectors.shape[:-2], self.vectors.shape[-2])

    @property
    def rank(self) -> int:
        return int(self.ranks.sum())

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def null_dim(self) -> int:
        return self.ranks.numel() * self.shape[-1] - self.rank

    @property
    def residual(self) -> float:
        return float(self._residuals().norm())

    @property
    def cut_off(self) -> float:
        cut = rank_cut(self.singular_values, self.shape[-1], self.dtype)
        return float(torch.minimum(self._left_out().amax(dim=-1), cut).max())

    def numbers(self) -> "Basis":
        return replace(self, vectors=self.vectors.to("meta"))

    def to(self, device: torch.device) -> "Basis":
        vectors, values = self.vectors.to(device), self.singular_values.to(device)
        return Basis(vectors, values, self.ranks.to(device), self.dtype)

    def free_directions(self) -> Float[Tensor, "d_in free"]:
        """Orthonormal directions that are not kept, of a basis without groups."""
        free: Tensor = torch.linalg.qr(self.vectors, mode="complete").Q[:, self.rank :]
        return free.contiguous()

    def weighted_rows(self) -> Float[Tensor, "*groups width d_in"]:
        """Rows with the same span and energies as the inputs kept, to merge spaces by."""
        width = self.vectors.shape[-1]
        return (self.vectors * self.singular_values[..., None, :width]).mT

    def merge(self, other: Projector) -> "Basis":
        """The basis of both spans, re-factorized: their vectors together may be dependent.

        What each of the two left out stays in the residual. At τ = 1 the rows of both together lose
        at most √2 times the cut that the rule makes for all of them (``thm-rank``).
        """
        if not isinstance(other, Basis):
            raise TypeError(f"a basis merges with a basis, got {type(other).__name__}")
        joint = RowSpace()
        joint.add(self.weighted_rows())
        joint.add(other.weighted_rows())
        if not joint.count:
            return self
        basis = joint.basis(dtype=coarsest([self.dtype, other.dtype]))
        left_out = torch.stack([self._residuals(), other._residuals()], dim=-1)
        values = torch.cat([basis.singular_values, left_out], dim=-1)
        return replace(basis, singular_values=values)

    def at(self, tau: float) -> "Basis":
        wanted = kept_rank(self.singular_values, self.shape[-1], self.dtype, tau)
        if bool((wanted > self.ranks).any()):
            raise ValueError(
                f"tau = {tau:g} takes {int(wanted.sum())} directions, of which {self.rank} are held"
            )
        return _cut(self.vectors, self.singular_values, wanted, self.dtype)

    def _of_first(self, ranks: Ranks) -> "Basis":
        width, vectors = int(ranks.of_first(self.vectors.shape[-1])), self.vectors.clone()
        if width != vectors.shape[-1]:  # else keep how it lies in memory: that decides rounding
            vectors = vectors.new_zeros(*vectors.shape[:-1], width)
        values, ranks_kept = self.singular_values.clone(), self.ranks.clone()
        ranks.of_first_([vectors, values, ranks_kept])
        return Basis(vectors, values, ranks_kept, self.dtype)

    def drift_bound(self, move: Float[Tensor, "*groups d_out d_in"]) -> float:
        """Bound on the change of the layer's outputs on these inputs, ``‖ΔW R‖_F`` (``thm-drift``).

        ``‖ΔW‖₂`` times the root of the energy left out, which is at most ``√(1 - τ) ‖R‖_F``; for a
        projected ``ΔW``, group by group.
        """
        norms = torch.linalg.matrix_norm(move.double(), ord=2)
        return float((norms * self._residuals()).norm())

    def _residuals(self) -> Float[Tensor, "*groups"]:
        norms: Tensor = self._left_out().norm(dim=-1)
        return norms

    def _left_out(self) -> Float[Tensor, "*groups values"]:
        """The singular values with zeros for those of the directions that are kept."""
        return self.singular_values * ~mark_first(self.ranks, self.singular_values)

    def project(
        self, matrix: Float[Tensor, "*groups rows d_in"]
    ) -> Float[Tensor, "*groups rows d_in"]:
        """``M - M B Bᵀ``: the rows of ``matrix`` with their part in the kept space removed.

        This is paper equation (11), applied once more if little is left: one pass leaves a
        remainder of the size of the rounding of ``matrix`` itself, which is not small beside a
        result that is (Kahan and Parlett: twice is enough).
        """
        vectors = self.vectors.to(matrix.dtype)
        once = matrix - aligned_mm(matrix @ vectors, vectors.mT)
        if 2 * once.norm() > matrix.norm():
            return once
        return once - aligned_mm(once @ vectors, vectors.mT)


class RowSpace(Space):
    """Collects input rows, in any number of pieces, and gives a `Basis` of their span.

    Memory stays at one ``d_in x d_in`` matrix however many rows are added: they wait as they came
    for as long as they take less, and few at a time once there is one. Double-precision rows
    are reduced by QR factorizations, which keep their condition number. Rows of lower precision
    are reduced to a float64 Gram matrix, which is cheaper and squares the condition number: it
    resolves singular values down to about 1e-8 of the rows' norm, a tenth of the rank cut for
    float32 or less.

    Args:
        single: whether float32 is enough for the products of a few rows at a time, whose sums the
            Gram matrix has. It costs half, and an eigenvalue is known to 1e-7 of their sum.
    """

    count: int = 0
    single: bool = False

    _is_half = False

    def __init__(self, *, single: bool = False) -> None:
        self.single = single
        self._pending: list[Tensor] = []
        self._reduced: Tensor | None = None  # of a Gram matrix the upper triangle if it `_is_half`
        self._dtype = torch.float64

    @torch.inference_mode(False)  # so that a Gram matrix can be added to outside of it, too
    def add(self, rows: Float[Tensor, "*groups rows d_in"], *, keep: bool = False) -> None:
        """Take in more rows.

        They are copied or reduced, since a model may overwrite its inputs; with ``keep`` they may
        be kept, for nobody else has them.
        """
        dtype = coarsest([self._dtype, rows.dtype])
        if self._reduced is not None and self._exact() and dtype != self._dtype:
            self._reduced = gram_matrix(self._reduced)
        self._dtype = dtype
        self.count += rows.shape[-2]
        self._pending.append(rows.detach())
        if self._is_crowded():
            self._reduce()
        elif not keep:
            self._pending[-1] = rows.detach().clone()

    @torch.inference_mode(False)
    def absorb(self, other: "RowSpace") -> None:
        if other.count == 0:
            return
        if not self._exact():  # else the factor waits with the rows, as it does for `joined`
            self._settle()
        factor, dtype = other.factor(), coarsest([self._dtype, other._dtype])
        total = self.count + other.count
        reduced = self._reduced is not None or other._reduced is not None
        if dtype == torch.float64 or not (reduced or total > factor.shape[-1]):
            self._take(factor, other.count, dtype)
            return
        grams = [gram_matrix(rows.double()) for rows in self._pending]
        if self._reduced is not None:
            grams.insert(0, gram_matrix(self._reduced) if self._exact() else self._reduced)
        self.count, self._dtype, self._pending = total, dtype, []
        self._reduced = reduce(torch.add, [*grams, other.gram()])

    def basis(self, tau: float = 1.0, dtype: torch.dtype | None = None) -> Basis:
        """Basis of the span (``tau`` = 1), or of the fewest directions with energy >= ``tau``.

        Args:
            tau: share of the rows' squared Frobenius norm to keep, in (0, 1].
            dtype: precision of the rows for the rank rule, if not the one they came in.

        Returns:
            The basis; at most the numerical rank many vectors at any ``tau``.

        Raises:
            ValueError: if ``tau`` is outside (0, 1], or no rows were added.
            NonFiniteInputError: if a row is NaN or infinite.
        """
        require_tau(tau)
        if self.count == 0:
            raise ValueError("no rows were added: a basis needs at least one input row")
        values, vectors = self._decompose()
        known = self._dtype if dtype is None else dtype
        return _cut(vectors, values, kept_rank(values, vectors.shape[-2], known, tau), known)

    def basis_if_full(
        self, energy: float, live: Callable[[], Bool[Tensor, "*groups d_in"]] | None = None
    ) -> Basis | None:
        """The basis of all directions, if these rows show that all rows have full rank.

        Of all but the inputs that are 0 in every row, as those behind a unit that is never active:
        ``live`` is asked for the others where these rows have such inputs; all by default. A column
        of zeros adds an eigenvalue 0 to the Gram matrix and changes no other.

        ``energy`` is the squared Frobenius norm of all rows, which decides the cut. Rows only add
        to a space: the smallest singular value does not fall when more come. So it is safe to stop
        reading if it exceeds that cut (``thm-rank``).

        The singular values of the basis are this upper bound: nobody has computed them.
        """
        gram = self.gram()
        d_in = gram.shape[-1]
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        cut = relative_cut(d_in, self._dtype) ** 2 * energy
        rounding = d_in * torch.finfo(torch.float64).eps * diagonal.sum(-1, keepdim=True)
        asked = live is not None and not bool(diagonal.all())
        alive = live() if live and asked else torch.ones_like(diagonal, dtype=torch.bool)
        # A Cholesky factor of G - c exists just if no eigenvalue of G is as small as c.
        diagonal -= cut + rounding
        diagonal.masked_fill_(~alive, 1.0)  # zero is all that its row and column hold beside it
        if bool(factorised(torch.linalg.cholesky_ex, gram).info.any()):
            return None
        # Zeros and ones, exact in any precision: a quarter of the memory.
        first = torch.argsort(~alive, stable=True)
        ranks = alive.sum(-1)
        every = torch.eye(d_in, dtype=torch.float16, device=gram.device)[first].mT
        values = energy**0.5 * mark_first(ranks, first).to(gram.dtype)
        return _cut(every, values, ranks, self._dtype)

    def basis_if_independent(
        self,
        gram: Float[Tensor, "*groups rows rows"] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Basis | None:
        """The basis of fewer rows than columns, if they are linearly independent beyond doubt.

        ``gram`` has the inner products of all pairs of rows, float64, where somebody knows them,
        and ``dtype`` is that to round the vectors to.

        With the Cholesky factor ``R Rᵀ = L Lᵀ`` the columns of ``Rᵀ L⁻ᵀ`` are orthonormal, to the
        square of the condition number of R times the rounding of float64. That is asked to be
        1e-10, far inside what the rank rule calls full (``thm-rank``), and costs a tenth of an
        eigendecomposition. The singular values of the basis are an upper bound.
        """
        self._settle()
        if self._reduced is not None or self._exact():
            return None
        rows = self._waiting()
        gram = products_of_rows(rows) if gram is None else gram
        total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        smallest = max(1e-6, relative_cut(rows.shape[-1], self._dtype) ** 2)
        shifted = gram.clone()
        shifted.diagonal(dim1=-2, dim2=-1).sub_((smallest * total)[..., None])
        if bool(factorised(torch.linalg.cholesky_ex, shifted).info.any()):
            return None
        factor = factorised(torch.linalg.cholesky, gram)
        del gram, shifted  # with what follows they would be the most there is in memory
        vectors = torch.empty_like(rows, dtype=dtype)
        for start in range(0, rows.shape[-1], BLOCK):  # so that all are never there three times
            block = slice(start, start + BLOCK)
            few = rows[..., block].double()
            vectors[..., block] = torch.linalg.solve_triangular(factor, few, upper=False)
        bound = total.sqrt()[..., None].expand(*factor.shape[:-1])
        ranks = torch.full(factor.shape[:-2], factor.shape[-1], device=factor.device)
        return Basis(vectors.mT, bound, ranks, self._dtype)

    def _joined(self, ranks: Ranks, shape: Sequence[int]) -> "RowSpace":
        code = PRECISIONS.index(self.dtype) if self.count else 0
        here = torch.tensor([self.count, code], dtype=torch.int64, device=ranks.device)
        counts, codes = torch.stack(ranks.gather(here)).T.tolist()
        total, dtype, (*groups, _, d_in) = sum(counts), PRECISIONS[max(codes)], shape
        if total == 0:
            return self
        empty = torch.zeros(*groups, 0, d_in, dtype=torch.float64, device=ranks.device)
        if total > d_in and dtype != torch.float64:
            gram = (self.gram() if self.count else empty.mT @ empty).contiguous()
            ranks.sum_(gram)
            return RowSpace.of_gram(gram, total, dtype)
        rows = self.factor() if self.count else empty
        padding = min(max(counts), d_in) - rows.shape[-2]
        rows = torch.cat([rows, rows.new_zeros(*groups, padding, d_in)], dim=-2)
        space = RowSpace()
        for piece, count in zip(ranks.gather(rows.contiguous()), counts, strict=True):
            space._take(piece[..., : min(count, d_in), :], count, dtype)
        return space

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows as they came in."""
        return self._dtype

    def factor(self) -> Float[Tensor, "*groups fewer d_in"]:
        """The rows, or ``d_in`` rows of the same Gram matrix.

        Many rows below double precision are kept as a Gram matrix only: for them it is `gram`.
        """
        self._settle()
        return self._waiting().double() if self._reduced is None else self._reduced

    def gram(self) -> Float[Tensor, "*groups d_in d_in"]:
        """Inner products of all pairs of columns of the rows, float64."""
        factor = self.factor()
        is_gram = self._reduced is not None and not self._exact()
        return factor.clone() if is_gram else gram_matrix(factor)

    @classmethod
    def of_gram(
        cls, gram: Float[Tensor, "*groups d_in d_in"], count: int, dtype: torch.dtype
    ) -> "RowSpace":
        """The space of ``count`` rows below double precision, from `gram`, which it takes over."""
        space = cls()
        space.count, space._dtype, space._reduced = count, dtype, gram
        return space

    def _take(self, factor: Tensor, count: int, dtype: torch.dtype) -> None:
        """Take in the factor of another space; below double precision only few rows in all."""
        self.count, self._dtype = self.count + count, dtype
        if count:
            self._pending.append(factor)
        if self._exact() and max(count, sum(p.shape[-2] for p in self._pending)) > factor.shape[-1]:
            self._reduce()

    def _exact(self) -> bool:
        return self._dtype == torch.float64

    def _waiting(self) -> Tensor:
        """The rows that wait."""
        return self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending, dim=-2)

    def _is_crowded(self) -> bool:
        """Whether the rows that wait take more memory than a matrix that they can be reduced to."""
        count = sum(rows.shape[-2] for rows in self._pending)
        if self._reduced is not None and not self._exact():
            return count >= WAITING
        size = sum(rows.shape[-2] * rows.element_size() for rows in self._pending)
        return size > self._pending[0].shape[-1] * torch.float64.itemsize

    @torch.inference_mode(False)
    def _settle(self) -> None:
        """Nothing waits that is to be reduced: rows that a Gram matrix or a factor has joined."""
        if self._pending:
            count = sum(rows.shape[-2] for rows in self._pending)
            if self._reduced is not None or count > self._pending[0].shape[-1]:
                self._reduce()
        if self._is_half and self._reduced is not None:
            _mirror(self._reduced)
            self._is_half = False

    @torch.inference_mode(False)
    def _reduce(self) -> None:
        few = self._exact() or any(rows.shape[-2] < WAITING for rows in self._pending)
        waiting, self._pending = [self._waiting()] if few else self._pending, []
        if self._exact():
            factor = _triangle(waiting[0].double())
            both = factor if self._reduced is None else torch.cat([self._reduced, factor], dim=-2)
            self._reduced = factorised(torch.linalg.qr, both, mode="r").R
            return
        if self._reduced is None:
            *groups, _, d_in = waiting[0].shape
            self._reduced = waiting[0].new_zeros(*groups, d_in, d_in, dtype=torch.float64)
        for rows in waiting:
            for piece in rows.split(PIECE, dim=-2):
                single = self.single and _float32_serves(piece)
                _add_products(self._reduced, piece.float() if single else piece.double())
        self._is_half = True

    def _decompose(self) -> tuple[Tensor, Tensor]:
        """Singular values, largest first, and right singular vectors as columns."""
        rows = self.factor()
        if self._exact():
            if not bool(rows.isfinite().all()):
                raise NonFiniteInputError
            _, values, transposed = factorised(torch.linalg.svd, rows, full_matrices=False)
            return values, transposed.mT
        if self._reduced is not None:
            return _singular_from_gram(rows)
        return _singular_from_rows(rows)


def _cut(vectors: Tensor, values: Tensor, ranks: Tensor, dtype: torch.dtype) -> "Basis":
    """The basis of the first ``ranks`` of these vectors."""
    kept = vectors[..., : int(ranks.max())]
    return Basis(kept * mark_first(ranks, kept[..., 0, :])[..., None, :], values, ranks, dtype)


def _triangle(rows: Float[Tensor, "*groups rows d_in"]) -> Float[Tensor, "*groups fewer d_in"]:
    """R of a QR factorization, by halves: its rounding does not grow with the number of rows."""
    count, d_in = rows.shape[-2:]
    if count > max(64, 2 * d_in):
        rows = torch.cat([_triangle(half) for half in rows.tensor_split(2, dim=-2)], dim=-2)
    factor: Tensor = factorised(torch.linalg.qr, rows, mode="r").R
    return factor


def empty_aligned(like: Tensor, *shape: int) -> Tensor:
    """A matrix of the dtype of another, each row of which begins at a multiple of eight numbers.

    A product of a width such as 1,025, inputs and a bias, takes longer to write where rows begin
    anywhere; a narrow one does not.
    """
    *rows, width = shape
    padding = -width % 8 if width >= NARROW else 0
    return like.new_empty(*rows, width + padding)[..., :width]


def aligned_mm(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, into `empty_aligned` where they help and nothing else is at work.

    Autograd, transforms of ``torch.func`` and autocast do not know of products into a place.
    """
    width, both = right.shape[-1], (left, right)
    helps = width >= NARROW and width % 8 and left.dim() > 1
    derived = any(t.requires_grad or unpack_dual(t).tangent is not None for t in both)
    transformed = torch._C._functorch.maybe_current_level() is not None
    if not helps or derived or transformed or torch.is_autocast_enabled(left.device.type):
        return left @ right
    return torch.matmul(left, right, out=empty_aligned(left, *left.shape[:-1], width))


def gram_matrix(rows: Float[Tensor, "*groups rows d_in"]) -> Float[Tensor, "*groups d_in d_in"]:
    """``rowsᵀ rows``: one triangle, block by block, for it is symmetric."""
    d_in = rows.shape[-1]
    if d_in <= BLOCK:
        return rows.mT @ rows
    gram = rows.new_empty(*rows.shape[:-2], d_in, d_in)
    for start in range(0, d_in, BLOCK):
        block, rest = slice(start, start + BLOCK), slice(start, None)
        part = rows[..., block].mT @ rows[..., rest]
        gram[..., block, rest], gram[..., rest, block] = part, part.mT
    return gram


def products_of_rows(
    rows: Float[Tensor, "*groups rows d_in"],
) -> Float[Tensor, "*groups rows rows"]:
    """Inner products of all pairs of a few rows, float64: few columns at a time are copied."""
    *groups, count, _ = rows.shape
    gram = rows.new_zeros(*groups, count, count, dtype=torch.float64)
    for some in rows.mT.split(WAITING, dim=-2):
        _add_products(gram, some.double())
    _mirror(gram)
    return gram


def _add_products(
    gram: Float[Tensor, "*groups d_in d_in"], rows: Float[Tensor, "*groups rows d_in"]
) -> None:
    """Add ``rowsᵀ rows`` in place, in the upper triangle alone, block by block."""
    for start in range(0, rows.shape[-1], BLOCK):
        block, rest = slice(start, start + BLOCK), slice(start, None)
        gram[..., block, rest].add_(rows[..., block].mT @ rows[..., rest])


def _float32_serves(rows: Float[Tensor, "*groups rows d_in"]) -> bool:
    """Whether products of these rows are as exact as float32 can say, and none over- or underflows.

    Settings of PyTorch may allow TF32 or bfloat16 there; where they are made by its newer options,
    the older one cannot be read.
    """
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        exact = False
    if not exact or not rows.numel():
        return False
    largest = torch.maximum(rows.amax((-2, -1)), -rows.amin((-2, -1)))
    return bool(((largest > 1e-12) & (largest < 1e12)).all())


def _mirror(gram: Float[Tensor, "*groups d_in d_in"]) -> None:
    """Make a matrix whose upper triangle alone is known symmetric."""
    d_in = gram.shape[-1]
    for start in range(0, d_in, BLOCK):
        block, rest = slice(start, start + BLOCK), slice(start + BLOCK, None)
        gram[..., rest, block] = gram[..., block, rest].mT


def _singular_from_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    if not bool(gram.diagonal(dim1=-2, dim2=-1).isfinite().all()):
        raise NonFiniteInputError
    values, vectors = factorised(torch.linalg.eigh, gram)
    return values.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)


def _singular_from_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Fewer rows than columns: decompose the smaller Gram, then carry its vectors over.

    The columns of ``rowsᵀ U`` have inner products of 1e-16 σ₁², so normalised they are orthonormal
    to 1e-8 even where σ is as small as the rank cut of float32 allows.
    """
    values, left = _singular_from_gram(gram_matrix(rows.mT))
    # Beyond this the Gram holds only rounding; the rank rule cuts those vectors off.
    resolved = values > 1e-7 * values[..., :1]
    return values, rows.mT @ (left / torch.where(resolved, values, torch.inf)[..., None, :])
