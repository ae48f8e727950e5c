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
from scipy.interpolate import KroghInterpolator
from scipy.optimize import toms748
from torch import Tensor, nn

from teleport.capture import Closure, Tape
from teleport.coverage import Block
from teleport.layers import Pieces
from teleport.objective import squared_norm
from teleport.subspace import Projector

Direction = dict[Block, Float[Tensor, "*groups d_out d_in"]]


def grad_norm_squared(tape: Tape) -> float:
    """‖g‖² over all trainable parameters, from the tape's last backward pass."""
    norm = sum(map(squared_norm, tape.other_gradients))
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
    velocity = dict(zip(tape.others, tape.other_gradients, strict=True))
    drive = {block: _drive(tape, block) for block in tape.blocks}
    tape.push_tangents(model, closure, drive, velocity, wanted=bases.keys())
    return {block: _survivor(tape, block, basis) for block, basis in bases.items()}


def project_ascent(ascent: Direction, bases: Mapping[Block, Projector]) -> Direction:
    """π of a full ascent direction (paper equation 11): the reference for `direction`."""
    return {
        block: without_rounding(basis.project(ascent[block]), ascent[block])
        for block, basis in bases.items()
    }


def step_to_norm(
    norm_squared: Callable[[float], float],
    start: float,
    slope: float,
    target: float,
    rtol: float,
    degree: int | None = None,
) -> float | None:
    """The step at which the squared gradient norm along a ray reaches ``target``.

    Brackets by doubling from the step the slope suggests, then finds the root of the polynomial
    through all that was seen.

    Args:
        norm_squared: squared gradient norm at a step; one backward pass per evaluation.
        start: its value at step 0.
        slope: its derivative at step 0, > 0.
        target: the value wanted, > ``start``.
        rtol: relative accuracy wanted of the norm.
        degree: of the squared norm as a polynomial in the step, at most (``thm-polynomial``). A
            step found from as many values as that takes is not looked at again.

    Returns:
        The step, or None if none reaches the target within a hundred doublings or halvings.
    """
    seen = {0.0: start / target - 1.0}

    def excess(step: float) -> float:
        if step not in seen:
            ratio = norm_squared(step) / target - 1.0
            seen[step] = 0.0 if abs(ratio) <= rtol else ratio
        return seen[step]

    # Exact where the norm itself grows linearly, as with one moved layer below a fixed one.
    guess = 2.0 * start / slope * (math.sqrt(target / start) - 1.0)
    low, high, ceiling = 0.0, guess, math.inf
    for _ in range(100):
        if not math.isfinite(excess(high)):
            ceiling, high = high, (low + high) / 2
        elif excess(high) >= 0.0:
            return _root(excess, seen, slope / target, degree, low, high)
        else:
            low, high = high, min(2.0 * high, (high + ceiling) / 2)
    return None


def _root(
    excess: Callable[[float], float],
    seen: dict[float, float],
    slope: float,
    degree: int | None,
    low: float,
    high: float,
) -> float:
    """A zero of ``excess`` in a bracket.

    The polynomial through all that was seen, and with the known slope at 0, is T itself as soon as
    it has the degree of T, and nears its root long before. Where it does not end in a few looks, a
    bracketing method takes over.
    """
    for _ in range(8):
        finite = [(s, e) for s, e in seen.items() if math.isfinite(e)]
        step = _polynomial_root(finite, slope, low, high)
        if step is None or not low < step < high:
            break
        if degree is not None and len(finite) >= degree:
            return step  # with the slope that is one value more than the degree
        value = excess(step)
        if value == 0.0:
            return step
        low, high = (step, high) if value < 0.0 else (low, step)
    return float(toms748(excess, low, high, xtol=1e-300, rtol=1e-15))


def _polynomial_root(
    points: list[tuple[float, float]], slope: float, low: float, high: float
) -> float | None:
    """The root in the bracket of the polynomial through ``points`` with this slope at step 0."""
    nodes = [0.0, *(s / high for s, _ in points)]  # step 0 twice: its value and its slope
    values = [points[0][1], *(e for _, e in points)]
    polynomial = KroghInterpolator(nodes, [*values[:1], slope * high, *values[2:]])
    if polynomial(low / high) >= 0.0 or polynomial(1.0) <= 0.0:
        return None
    return high * float(toms748(polynomial, low / high, 1.0, xtol=1e-300, rtol=1e-15))


def _block_norm_squared(tape: Tape, block: Block) -> float:
    if _prefers_gram(tape, block):
        deltas = tape.deltas(block)
        return float(((deltas @ deltas.mT) * tape.row_gram(block)).double().sum())
    return squared_norm(tape.weight_gradient(block))


def _drive(tape: Tape, block: Block) -> list[Tensor]:
    """G x for every call of a block: the outputs' tangent due to the block's own weights."""
    calls, part = tape.calls_of(block), block.part
    if _prefers_gram(tape, block):
        counts = [part.out_rows(call.z).shape[-2] for call in calls]
        pieces = (tape.row_gram(block) @ tape.deltas(block)).split(counts, dim=-2)
        return [part.from_out_rows(p, c.z) for p, c in zip(pieces, calls, strict=True)]
    return drive_of(tape, block, block.part.split(tape.weight_gradient(block)))


def drive_of(tape: Tape, block: Block, velocity: Pieces) -> list[Tensor]:
    """Ẇ x for every call of a block, in the shape of the outputs."""
    return [
        call.part.push_affine(call.x.detach(), velocity[: len(call.part.slots)], call.z)
        for call in tape.calls_of(block)
    ]


def _prefers_gram(tape: Tape, block: Block) -> bool:
    if block.other is not None or not block.part.gram_pays:
        return False
    return tape.row_count(block) < block.part.matrix_shape[-1]


def _survivor(tape: Tape, block: Block, basis: Projector) -> Float[Tensor, "*groups d_out d_in"]:
    """Σ δ (P ẋ)ᵀ; the projection is done on rows or on the sum, whichever is smaller."""
    fewer_rows = tape.row_count(block) < block.part.matrix_shape[-2]
    x_dot = tape.tangents(block) if fewer_rows and block.other is None else None
    if x_dot is None:
        whole = tape.survivor(block)
        return without_rounding(basis.project(whole), whole)
    return tape.deltas(block).mT @ without_rounding(basis.project(x_dot), x_dot)


def without_rounding(projected: Tensor, original: Tensor) -> Tensor:
    """Zero if what is left is no larger than the rounding of what was projected.

    Without this a layer that must not move (``thm-fixed``) would move along its own rounding.
    """
    cut = max(original.shape) * torch.finfo(original.dtype).eps * original.norm()
    return projected if projected.norm() > cut else torch.zeros_like(projected)
