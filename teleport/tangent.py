"""The fast ascent direction and the exact line search, both on frozen activations.

For the gradient norm objective T = ½‖g‖², projected on a layer's input null space, theorem
``thm-survivor`` leaves only

    π(Hg)_l = Σ_i δ_i (P_l ẋ_i)ᵀ,

the weight gradient of the layer with its inputs replaced by their tangents along g. That takes one
backward pass for δ and one forward-mode pass for ẋ; nothing is differentiated twice.

Cost in matrix products of size rows x d_in x d_out per layer, against 3 of one gradient (forward 1,
backward 2): δ 1, tangents 1, direction 1. The forward pass is on the tape, and the gradient itself
is never formed where rows < d_in: its norm and its action on the inputs need only the Gram matrices
of the rows, ‖g_l‖² = Σ (δδᵀ)∘(xxᵀ) and G x = (xxᵀ) δ.

Along a direction in the joint null space T is a polynomial in the step (``thm-polynomial``), and
each evaluation costs one backward pass: `step_to_norm` finds where it reaches a wanted value.
"""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from scipy.optimize import toms748
from torch import Tensor, nn

from teleport.capture import Closure, Tape
from teleport.coverage import Block
from teleport.precision import at_least_single, rounding_unit, scaled, unit_scale
from teleport.subspace import Projector

Direction = dict[Block, Float[Tensor, "*groups d_out d_in"]]


def grad_norm_squared(tape: Tape) -> float:
    """‖g‖² over all trainable parameters, from the tape's last backward pass."""
    norm = sum(float(g.double().square().sum()) for g in tape.other_gradients)
    return norm + sum(_block_norm_squared(tape, block) for block in tape.blocks)


def direction(
    tape: Tape, model: nn.Module, closure: Closure, bases: Mapping[Block, Projector]
) -> Direction:
    """π(Hg) for the blocks in ``bases``, by one forward-mode pass over the tape.

    Exact at τ = 1. At τ < 1 it leaves out (Σ δ̇_i x_iᵀ) P_l, which is small because P_l removes all
    but a share 1 − τ of the energy of x.

    Args:
        tape: after `Tape.backward`.
        model: the model of the closure.
        closure: the closure the tape was recorded from.
        bases: what to project out, for each block that may move.

    Returns:
        One matrix per block, zero where nothing but rounding survives the projection.
    """
    scale = unit_scale(lambda: grad_norm_squared(tape), tape.precision)
    velocity = {p: scaled(g, scale) for p, g in zip(tape.others, tape.other_gradients, strict=True)}
    drive = {block: _drive(tape, block, scale) for block in tape.blocks}
    tape.push_tangents(model, closure, drive, velocity)
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


def step_to_norm(
    norm_squared: Callable[[float], float], start: float, slope: float, target: float, rtol: float
) -> float | None:
    """The step at which the squared gradient norm along a ray reaches ``target``.

    Brackets by doubling from the step the slope suggests, then finds the root.

    Args:
        norm_squared: squared gradient norm at a step; one backward pass per evaluation.
        start: its value at step 0.
        slope: its derivative at step 0, > 0.
        target: the value wanted, > ``start``.
        rtol: relative accuracy wanted of the norm.

    Returns:
        The step, or None if none reaches the target within a hundred doublings or halvings.
    """
    seen = {0.0: start / target - 1.0}

    def excess(step: float) -> float:
        if step not in seen:
            ratio = norm_squared(step) / target - 1.0
            seen[step] = 0.0 if abs(ratio) <= rtol else ratio  # toms748 stops at an exact zero
        return seen[step]

    low, high, ceiling = 0.0, (target - start) / slope, math.inf
    for _ in range(100):
        if not math.isfinite(excess(high)):
            ceiling, high = high, (low + high) / 2
        elif excess(high) >= 0.0:
            return float(toms748(excess, low, high, xtol=1e-300, rtol=1e-15))
        else:
            low, high = high, min(2.0 * high, (high + ceiling) / 2)
    return None


def _block_norm_squared(tape: Tape, block: Block) -> float:
    if _prefers_gram(tape, block):
        deltas = at_least_single(tape.deltas(block))
        return float(((deltas @ deltas.mT) * tape.row_gram(block)).double().sum())
    return float(tape.weight_gradient(block).double().square().sum())


def _drive(tape: Tape, block: Block, scale: float) -> list[Tensor]:
    """G x, scaled, for every call of a block: the tangents due to the block's own weights."""
    calls, part = tape.calls_of(block), block.part
    if _prefers_gram(tape, block):
        counts = [part.out_rows(call.z).shape[-2] for call in calls]
        gram = tape.row_gram(block)
        pieces = (gram @ scaled(tape.deltas(block).to(gram.dtype), scale)).split(counts, dim=-2)
        return [part.from_out_rows(p, c.z) for p, c in zip(pieces, calls, strict=True)]
    return drive_of(tape, block, scaled(tape.weight_gradient(block), scale))


def drive_of(tape: Tape, block: Block, velocity: Tensor) -> list[Tensor]:
    """Ẇ x for every call of a block, in the shape of the outputs."""
    return [
        call.part.push_affine(call.x.detach(), block.seen_by(call.part, seen), call.z)
        for call, seen in ((call, velocity.to(call.z.dtype)) for call in tape.calls_of(block))
    ]


def _prefers_gram(tape: Tape, block: Block) -> bool:
    if block.other is not None or not block.part.gram_pays:
        return False
    return tape.row_count(block) < tape.matrices[block].shape[-1]


def _survivor(tape: Tape, block: Block, basis: Projector) -> Float[Tensor, "*groups d_out d_in"]:
    """Σ δ (P ẋ)ᵀ; the projection is done on rows or on the sum, whichever is smaller."""
    fewer_rows = tape.row_count(block) < tape.matrices[block].shape[-2]
    x_dot = tape.tangents(block) if fewer_rows and block.other is None else None
    dtype = tape.computed_in(block)
    if x_dot is None:
        whole = tape.survivor(block)
        return without_rounding(basis.project(whole), whole, dtype)
    x_dot = at_least_single(x_dot)
    projected = without_rounding(basis.project(x_dot), x_dot, dtype)
    deltas = tape.deltas(block).to(x_dot.dtype)
    return (deltas.mT @ projected).to(tape.matrices[block].dtype)


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
