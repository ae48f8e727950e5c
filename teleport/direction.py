"""The fast ascent direction and the exact line search, both on frozen activations.

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
(d_in + d_out). So a step costs at least 3/3 of a gradient where the batch is smaller than the
layers, and 5/3 elsewhere. Not counted: the first layer needs no ẋ and no direction; ẋ ends at the
last layer that can move; activations, and the float64 bases, which are made once per batch. One
look of the line search is the first two lines. A preconditioner (``thm-geometry``) is applied to
the gradient entry by entry, so that no Gram matrix serves and the right column holds.

Along a direction in the joint null space T is a polynomial in the step (``thm-polynomial``), and
each evaluation costs one backward pass: `step_to_norm` finds where it reaches a wanted value.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teleport.layers.part import Pieces
from teleport.layers.support import Block
from teleport.objective import EUCLIDEAN, Metric, Shares
from teleport.recording import Closure, Tape
from teleport.runtime.precision import at_least_single, rounding_unit, scaled, unit_scale
from teleport.subspace import Projector

Direction = dict[Block, Float[Tensor, "*groups d_out d_in"]]


def grad_norm_shares(tape: Tape, metric: Metric = EUCLIDEAN) -> Shares:
    """What every block and every other trainable parameter has of ‖g‖² in the last backward."""
    others = zip(tape.others, tape.other_gradients, strict=True)
    shares: Shares = {p: metric.squared_norm(p, g) for p, g in others}
    shares |= {block: _block_norm_squared(tape, block, metric) for block in tape.blocks}
    return shares


def grad_norm_squared(tape: Tape, metric: Metric = EUCLIDEAN) -> float:
    """‖g‖² over all trainable parameters, from the tape's last backward pass."""
    return sum(grad_norm_shares(tape, metric).values())


def direction(
    tape: Tape,
    model: nn.Module,
    closure: Closure,
    bases: Mapping[Block, Projector],
    metric: Metric = EUCLIDEAN,
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

    Returns:
        One matrix per block, zero where nothing but rounding survives the projection.
    """
    scale = unit_scale(lambda: grad_norm_squared(tape, metric.of_velocities()), tape.precision)
    others = zip(tape.others, tape.other_gradients, strict=True)
    velocity = {p: metric.velocity(p, g, scale) for p, g in others}
    drive = {block: partial(_drive, tape, block, metric, scale) for block in tape.blocks}
    tape.push_tangents(model, closure, drive, velocity, wanted=bases.keys())
    return {b: scaled(_survivor(tape, b, basis), 1 / scale) for b, basis in bases.items()}


def project_ascent(
    ascent: Direction, bases: Mapping[Block, Projector], dtype: torch.dtype | None = None
) -> Direction:
    """π of a full ascent direction (paper equation 11): the reference for `direction`.

    ``dtype`` is what the ascent was computed in, if not its own.
    """
    return {
        block: without_rounding(basis.project(ascent[block]), ascent[block], dtype)
        for block, basis in bases.items()
    }


def _block_norm_squared(tape: Tape, block: Block, metric: Metric) -> float:
    if _prefers_gram(tape, block, metric):
        deltas = at_least_single(tape.deltas(block))
        return float(((deltas @ deltas.mT) * tape.row_gram(block)).double().sum())
    return metric.block_squared_norm(block, tape.weight_gradient(block))


def _drive(tape: Tape, block: Block, metric: Metric, scale: float) -> Iterator[Tensor]:
    """(M⁻¹ G) x, scaled, for every call of a block: the tangents due to the block's own weights."""
    calls, part = tape.calls_of(block), block.part
    if not _prefers_gram(tape, block, metric):
        velocity = metric.block_velocity(block, tape.weight_gradient(block), scale)
        yield from drive_of(tape, block, block.part.split(velocity))
        return
    gram = tape.row_gram(block)
    products = gram @ scaled(tape.deltas(block).to(gram.dtype), scale)
    counts = [call.part.row_count(call.z) for call in calls]
    for call, rows in zip(calls, products.split(counts, dim=-2), strict=True):
        yield part.from_out_rows(rows, call.z)


def drive_of(tape: Tape, block: Block, velocity: Pieces) -> Iterator[Tensor]:
    """Ẇ x for every call of a block, in the shape of the outputs; each when it is asked for."""
    for call in tape.calls_of(block):
        pieces = velocity[: len(call.part.slots)]
        same = tuple(piece.to(call.z.dtype) for piece in pieces)
        yield call.part.push_affine(call.x.detach(), same, call.z)


def _prefers_gram(tape: Tape, block: Block, metric: Metric) -> bool:
    """Whether no gradient need be formed; a preconditioner takes it entry by entry."""
    if metric.inverse is not None or block.other is not None or not block.part.gram_pays:
        return False
    return tape.row_count(block) < block.part.matrix_shape[-1]


def _survivor(tape: Tape, block: Block, basis: Projector) -> Float[Tensor, "*groups d_out d_in"]:
    """Σ δ (P ẋ)ᵀ; the projection is done on rows or on the sum, whichever is smaller."""
    fewer_rows = tape.row_count(block) < block.part.matrix_shape[-2]
    x_dot = tape.tangents(block) if fewer_rows and block.other is None else None
    dtype = tape.computed_in(block)
    if x_dot is None:
        whole = tape.survivor(block)
        return without_rounding(basis.project(whole), whole, dtype)
    x_dot = at_least_single(x_dot)
    projected = without_rounding(basis.project(x_dot), x_dot, dtype)
    deltas = tape.deltas(block).to(x_dot.dtype)
    return (deltas.mT @ projected).to(block.part.weight.parameter.dtype)


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
    cut = unit * original.norm()
    return torch.zeros_like(projected) if projected.norm() <= cut else projected
