"""The basis of a layer's inputs on a tape, and what it takes."""

import math
from functools import reduce

import torch
from torch import Tensor

from teleport.layers.support import WeightMatrix
from teleport.objective import squared_norm
from teleport.recording.tape import Tape
from teleport.runtime.precision import at_least_single
from teleport.subspace import Projector, RowSpace


def recorded_basis(tape: Tape, block: WeightMatrix, tau: float) -> Projector:
    """The basis of the inputs that a block had, for a share ``tau`` of their energy."""
    with block.named_in_errors():
        space = block.space()
        if tau == 1.0 and isinstance(space, RowSpace):
            return _basis_of_rows(tape, block, space)
        tape.collect(block, space)
        return block.basis(space, tau)


def _basis_of_rows(tape: Tape, block: WeightMatrix, space: RowSpace) -> Projector:
    """The basis at τ = 1; no more rows are read once they span everything."""
    calls, d_in = tape.calls_of(block), block.part.matrix_shape[-1]
    count = tape.row_count(block)
    if count < d_in:
        tape.collect(block, space)
        return space.basis_if_independent() or space.basis()
    norms = (call.part.row_norms(at_least_single(call.x.detach())) for call in calls)
    energy = sum(map(squared_norm, norms))

    def live() -> Tensor:
        return reduce(torch.logical_or, [call.part.live(call.x.detach()) for call in calls])

    enough = d_in + max(32, d_in // 4)
    for call in calls:
        for some in call.part.chunks(call.x.detach(), rows=max(512, enough)):
            space.add(call.part.rows(some))
            if space.count >= min(enough, count):
                if (full := space.basis_if_full(energy, live)) is not None:
                    return full
                enough = 4 * space.count
    return space.basis()


def multiplications(block: WeightMatrix, rows: int) -> float:
    """What a basis takes at least: the smaller Gram matrix, or as much again to decompose it.

    None on a device that is not the CPU, whose own threads are not ours to start, and none to speak
    of where inputs are tokens that are only counted.
    """
    on_cpu = block.part.weight.parameter.device.type == "cpu"
    if not on_cpu or not block.part.gram_pays:
        return 0.0
    *groups, _, d_in = block.part.matrix_shape
    return float(math.prod(groups) * min(rows, d_in) ** 2 * d_in)
