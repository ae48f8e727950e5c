"""The fast ascent direction: which way the gradient norm grows within the null space.

For the gradient norm objective T = ½‖g‖², projected on a layer's input null space, theorem
``thm-survivor`` leaves only

    π(Hg)_l = Σ_i δ_i (P_l ẋ_i)ᵀ,

the weight gradient of the layer with its inputs replaced by their tangents along g. That takes one
backward pass for δ and one forward-mode pass for ẋ; nothing is differentiated twice. With tangents
along ``M⁻¹ g`` it is the ascent of ``½ gᵀ M⁻¹ g`` instead (``thm-geometry``).

Cost model, in products of size rows x d_in x d_out per layer, of which one gradient takes three
(forward, δ, weight gradient):

====================================  ==============  ===================================
phase                                 rows < d_in     otherwise
====================================  ==============  ===================================
δ, one backward pass                  1               1
norm of the gradient                  Gram matrices   1 (the gradient itself)
drive, the gradient's action on x     Gram matrices   1
ẋ, one forward-mode pass              1               1
direction, for layers that can move   1               1
projection                            2 rank / max(rows, d_out), both
====================================  ==============  ===================================

Gram matrices are ``‖g_l‖² = Σ (δδᵀ)∘(xxᵀ)`` and ``G x = (xxᵀ) δ``, products of size rows x rows x
(d_in + d_out); where another step follows, one serves both: ``‖g_l‖² = Σ δ∘(G x)``. So a step costs
at least 3/3 of a gradient where the batch is smaller than the layers, and 5/3 elsewhere. Not
counted: the first layer needs no ẋ and no direction; ẋ ends at the last layer that can move;
activations, and the float64 bases, which are made once per batch. One look of the line search is
the first two lines. A preconditioner (``thm-geometry``) is applied to the gradient entry by entry,
so that no Gram matrix serves and the right column holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teleport.layers.support import WeightMatrix
from teleport.objective import EUCLIDEAN, Metric
from teleport.recording import Tape, push_tangents
from teleport.runtime.closures import Closure
from teleport.runtime.precision import at_least_single, rounding_unit, scaled
from teleport.runtime.ranks import Ranks
from teleport.subspace import Projector, aligned_mm

Direction = dict[WeightMatrix, Float[Tensor, "*groups d_out d_in"]]


def direction(
    tape: Tape,
    model: nn.Module,
    closure: Closure,
    bases: dict[WeightMatrix, Projector],
    metric: Metric = EUCLIDEAN,
    scale: float = 1.0,
    last: bool = False,
) -> Direction:
    """π(H M⁻¹ g) for the blocks in ``bases``, by one forward-mode pass over the tape.

    Exact at τ = 1. At τ < 1 it leaves out (Σ δ̇_i x_iᵀ) P_l, which is small because P_l removes all
    but a share 1 − τ of the energy of x.

    Args:
        tape: after `Tape.backward`.
        model: the model of the closure.
        closure: the closure the tape was recorded from.
        bases: what to project out, for each block that may move.
        metric: whose norm is ascended; π(Hg) by default.
        scale: of the velocity, so that it stays within the range of the dtype.
        last: no other direction is asked of the tape. Its graph goes, and then ``bases``.

    Returns:
        One matrix per block, zero where nothing but rounding survives the projection.
    """
    others = zip(tape.others, tape.other_gradients, strict=True)
    velocity = {p: metric.velocity(p, g, scale) for p, g in others}
    drive = {block: partial(tape.drive, block, metric, scale) for block in tape.blocks}
    tape.spare(bases.keys(), metric)
    order, found = list(bases), Direction()
    factors: dict[WeightMatrix, tuple[Tensor, Tensor]] = {}  # δ and ẋ, by rows

    def free(block: WeightMatrix, basis: Projector, rows: Tensor) -> Tensor:
        return without_rounding(basis.project(rows), rows, tape.computed_in(block))

    def multiply(block: WeightMatrix, own: dict[WeightMatrix, Projector]) -> None:
        deltas, x_dot = factors.pop(block)
        x_dot = free(block, own.pop(block), x_dot)
        whole = aligned_mm(deltas.to(x_dot.dtype).mT, x_dot).to(block.part.weight.parameter.dtype)
        found[block] = scaled(whole, 1 / scale)

    def done(block: WeightMatrix) -> None:
        """What a block needed goes as soon as it has served; large sums of few rows may wait."""
        few = block.other is None and tape.row_count(block) < block.part.matrix_shape[-2]
        if few and block in bases and (x_dot := tape.tangents(block)) is not None:
            factors[block] = tape.deltas(block), at_least_single(x_dot)
            if not last:
                multiply(block, {block: bases[block]})
        elif block in bases:
            found[block] = scaled(free(block, bases[block], tape.survivor(block)), 1 / scale)
        tape.free(block)

    push_tangents(tape, model, closure, drive, velocity, bases.keys(), done, last)
    own = {block: bases[block] for block in factors}
    if last:
        bases.clear()
    for block in list(own):
        multiply(block, own)
    return {block: found[block] for block in order}


def mean_direction(
    tapes: Iterator[tuple[Tape, float]],
    model: nn.Module,
    closures: Sequence[Closure],
    bases: Mapping[WeightMatrix, Projector],
    velocity: Mapping[nn.Parameter, Tensor],
    scale: float,
    computed_in: Mapping[WeightMatrix, torch.dtype],
    ranks: Ranks,
) -> Direction:
    """The same for a loss that is the mean of closures, each with its tape and share.

    Args:
        tapes: taken one by one, so that memory stays at what one of them needs.
        model: the model of the closures.
        closures: in the order of the tapes.
        bases: what to project out, for each block that may move.
        velocity: scaled M⁻¹ g of the mean loss, by parameter.
        scale: of the velocity.
        computed_in: the coarsest precision of a block's products in any tape.
        ranks: whose mean it is.
    """
    whole = {block: block.part.matrix().zero_() for block in bases}
    with ranks.together():
        for closure in closures:
            tape, share = next(tapes)
            drive = {b: partial(tape.drive_of, b, b.part.pieces_of(velocity)) for b in tape.blocks}
            push_tangents(tape, model, closure, drive, velocity, wanted=bases.keys(), last=True)
            for block in [b for b in tape.blocks if b in whole]:
                whole[block] += tape.survivor(block) * (share / scale)
            del tape, drive
    ranks.mean_(list(whole.values()))
    along = project_ascent(whole, bases, computed_in)
    ranks.of_first_(list(along.values()))
    return along


def project_ascent(
    ascent: Mapping[WeightMatrix, Tensor],
    bases: Mapping[WeightMatrix, Projector],
    computed_in: Mapping[WeightMatrix, torch.dtype] | None = None,
) -> Direction:
    """π of a full ascent direction (paper equation 11): the reference for `direction`.

    ``computed_in`` says in which precision, where not in that of the matrices.
    """
    dtypes = computed_in or {}
    return {
        block: without_rounding(basis.project(ascent[block]), ascent[block], dtypes.get(block))
        for block, basis in bases.items()
    }


def without_rounding(
    projected: Tensor, original: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Zero if what is left is no larger than the rounding of what was projected.

    Without this a layer that must not move (``thm-fixed``) would move along its own rounding.

    Args:
        projected: what is left.
        original: what was projected.
        dtype: that ``original`` was computed in, if not its own.
    """
    unit = rounding_unit(original.dtype if dtype is None else dtype, max(original.shape))
    cut, left = unit * original.norm(), projected.norm()  # 0 or infinite where squares are
    return torch.zeros_like(projected) if left <= cut and 0.0 < cut < torch.inf else projected
