"""A walk: the position of one teleport in parameter space, and the gradient norm around it.

Two ways to know the norm at another position. At τ = 1 and on one batch activations are frozen
(``thm-invariance``): `FrozenWalk` keeps one tape, and a norm costs one backward pass over it. In
all other cases `StreamedWalk` runs the closures again, one at a time, so that memory stays at what
one of them needs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from teleport.direction import (
    Direction,
    direction,
    drive_of,
    grad_norm_shares,
    grad_norm_squared,
    project_ascent,
    without_rounding,
)
from teleport.layers.part import Pieces
from teleport.layers.support import Block, Site
from teleport.objective import (
    EUCLIDEAN,
    Metric,
    Shares,
    ascent_double_backward,
    gradient,
    mean_gradient,
    shares_of,
    squared_norm,
    trainable,
)
from teleport.recording import USED_OUTSIDE, Call, Closure, Tape, record
from teleport.runtime.precision import (
    PRECISIONS,
    at_least_single,
    coarsest,
    is_half,
    scaled,
    sum_rounding,
    unit_scale,
)
from teleport.runtime.ranks import ALONE, Ranks
from teleport.runtime.threads import in_parallel, worth_threads
from teleport.subspace import Projector, RowSpace, Space

Gradient = dict[nn.Parameter, Tensor]
Position = dict[Block, Pieces]


class Walk(ABC):
    """Where a teleport is, and how it looks around.

    Attributes:
        blocks: the covered blocks that are called.
        position: the weights of the blocks that moved; all others are as they were.
        loss: at the start.
        dtype: of the loss.
        precision: the coarsest that products were computed in; coarser under autocast.
        fixed: blocks whose inputs depend on no parameter (``thm-fixed``).
        left_out: blocks that cannot be recorded, and why.
        ranks: the processes that walk together.
        metric: of the gradient norm.
    """

    loss: float
    dtype: torch.dtype
    precision: torch.dtype
    fixed: set[Block]
    left_out: dict[Block, str]
    ranks: Ranks = ALONE
    metric: Metric = EUCLIDEAN

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._model = model
        self.blocks = list(blocks)
        self.position: Position = {}
        self._start: Position = {}  # of what was written to, copied just before
        self._ahead: float | None = None
        self._behind = False
        self._ahead_at: Position = {}  # memory for the next look: fresh memory costs a pass
        self._move_norms: dict[Block, float] = {}

    def norm_squared(self) -> float:
        """The squared gradient norm where the walk last looked, or has advanced to since."""
        self._catch_up()
        return self._norm_squared(self.metric)

    @abstractmethod
    def _norm_squared(self, metric: Metric) -> float:
        """The same in any metric, where the walk last looked."""

    @abstractmethod
    def shares(self) -> Shares:
        """What every block and every other parameter has of it, where the walk last looked."""

    def _velocity_scale(self) -> float:
        """What brings the velocity near length one, where float16 needs that."""

        def length_squared() -> float:
            self._catch_up()
            return self._norm_squared(self.metric.of_velocities())

        return unit_scale(length_squared, self.precision)

    @abstractmethod
    def bases(
        self, blocks: Collection[Block], tau: float, parallel: bool | None = None
    ) -> dict[Block, Projector]:
        """Bases of the blocks' inputs at the start.

        ``parallel`` says whether several are made at the same time; by default, if that pays.
        """

    @abstractmethod
    def tangent_direction(self, bases: Mapping[Block, Projector]) -> Direction:
        """π(H M⁻¹ g) of the given blocks at the present position (``thm-survivor``)."""

    @abstractmethod
    def degree(self, along: Direction) -> int | None:
        """Degree of the squared norm along a direction, at most (``thm-polynomial``), if known."""

    @abstractmethod
    def measure(self) -> tuple[float, Shares]:
        """Loss and squared gradient norm of the model as it is written now, from scratch."""

    @abstractmethod
    def ascent(self) -> Gradient:
        """H M⁻¹ g at the present position by double backward, with the position in the model."""

    @abstractmethod
    def _look_at(self, position: Position) -> None:
        """Make this where `norm_squared` is: given blocks there, all others at the start."""

    @abstractmethod
    def _tapes(self) -> Iterator[tuple[Tape, float]]:
        """Tapes at the present position, and the share of each in the loss."""

    def norm_squared_at(self, along: Direction, step: float) -> float:
        """Look ahead: the squared norm at a step along a direction; the position stays."""
        if step > torch.finfo(self.dtype).max:
            return math.inf
        self._look_at(self._moved(along, step))
        self._ahead, self._behind = step, False
        return self._norm_squared(self.metric)

    def advance(self, along: Direction, step: float) -> None:
        """Go there; it is looked at when that is needed, if the last look ahead was elsewhere."""
        self.position = self._moved(along, step)
        self._behind = step != self._ahead
        self._move_norms, self._ahead, self._ahead_at = {}, None, {}

    def look_back(self) -> None:
        """Look at the present position again, after looking ahead in vain."""
        self._look_at(self.position)
        self._ahead, self._behind = None, False

    def _catch_up(self) -> None:
        if self._behind:
            self.look_back()

    def write(self) -> None:
        """Put the position into the model's parameters."""
        self._write(self.position)

    def write_start(self) -> None:
        """Put the start back into the model's parameters."""
        self._write({})

    def double_backward_direction(self, bases: Mapping[Block, Projector]) -> Direction:
        """π(∇T) by definition: the reference for `tangent_direction`."""
        self.write()
        ascent = self.ascent()
        full = {block: block.part.of(ascent) for block in bases}
        dtype = self.precision if is_half(self.precision) else None
        return self._of_first(project_ascent(full, bases, dtype))

    def move_norm(self, block: Block) -> float:
        """Frobenius norm of the block's change since the start."""
        if block not in self.position:
            return 0.0
        if block not in self._move_norms:
            pairs = zip(self.position[block], self._start_of(block), strict=True)
            self._move_norms[block] = math.sqrt(sum(squared_norm(a - b) for a, b in pairs))
        return self._move_norms[block]

    def rounding(self, bases: Mapping[Block, Projector]) -> float:
        """How far the loss may move at τ = 1, to first order in the cotangents δ.

        Both parts are those of ``thm-rank``, in the one unit of the rank rule, `sum_rounding`. An
        output is a sum of d products; with probability 1 - 7e-4 its rounding error is at most
        2 √d eps ‖w‖ ‖x‖ (λ = 4), before the move and after it; half precision rounds once more,
        after summing in float32, and its weights to as much. The error reaches the loss through δ;
        outputs of one row add in quadrature, rows may share their errors. On what the rank rule
        cuts off ΔW acts, by at most ‖ΔW‖_F `Projector.cut_off`.
        """
        with self.ranks.together():
            total = self._first_order_rounding(bases)
        return 8 * torch.finfo(self.dtype).eps * abs(self.loss) + self.ranks.mean(total)

    def _first_order_rounding(self, bases: Mapping[Block, Projector]) -> float:
        total = 0.0
        for tape, share in self._tapes():
            total += share * sum(self._call_rounding(call) for call in tape.calls)
            for block in [b for b in tape.blocks if b in bases]:  # in order: it decides rounding
                deltas = (c.delta for c in tape.calls_of(block) if c.delta is not None)
                norms = [float(at_least_single(delta).norm()) for delta in deltas]
                drift = self.move_norm(block) * bases[block].cut_off
                total += share * math.hypot(*norms) * drift
            del tape
        return total

    def _call_rounding(self, call: Call) -> float:
        """The rounding errors of one call's outputs, before the move and after it."""
        if call.delta is None:
            return 0.0
        part, block, dtype = call.part, call.block, call.z.dtype
        ends = [self._start_of(block), self.position.get(block, self._start_of(block))]
        norms = (map(at_least_single, pieces[: len(part.slots)]) for pieces in ends)
        weights = torch.hypot(*(part.out_norms(tuple(pieces)) for pieces in norms))
        deltas = at_least_single(part.out_rows(call.delta)) * weights[..., None, :]
        errors = deltas.norm(dim=-1) * part.row_norms(at_least_single(call.x.detach()))
        unit = max(sum_rounding(dtype, part.matrix_shape[-1]), torch.finfo(dtype).eps)
        return 2 * unit * float(errors.sum())

    def _start_of(self, block: Block) -> Pieces:
        return self._start.get(block) or block.part.pieces()

    def _moved(self, along: Direction, step: float) -> Position:
        """The position at a step along a direction."""
        position = dict(self.position)
        for block, matrix in along.items():
            here = self.position.get(block) or self._start_of(block)
            if block not in self._ahead_at:
                self._ahead_at[block] = tuple(torch.empty_like(piece) for piece in here)
            position[block] = self._ahead_at[block]
            for w, d, out in zip(here, block.part.split(matrix), position[block], strict=True):
                torch.add(w, d, alpha=step, out=out)
        return position

    def _write(self, position: Position) -> None:
        """Put a position into the parameters; what it does not name goes back to the start."""
        for block in position.keys() - self._start.keys():
            self._start[block] = tuple(piece.clone() for piece in block.part.pieces())
        for block, start in self._start.items():
            block.part.put(position.get(block, start))

    def _of_first(self, along: Direction) -> Direction:
        """One direction for all ranks, to the last bit."""
        self.ranks.of_first_(list(along.values()))
        return along


class FrozenWalk(Walk):
    """One batch at τ = 1: one tape for the whole walk."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        closure: Closure,
        metric: Metric = EUCLIDEAN,
    ) -> None:
        self.metric = metric
        self._sites, self._closure = sites, closure
        self._tape = record(model, sites, closure)
        super().__init__(model, self._tape.blocks)
        self.loss = float(self._tape.loss.detach())
        self.dtype, self.precision = self._tape.loss.dtype, self._tape.precision
        self.fixed = {b for b in self._tape.blocks if not self._tape.depends_on_parameters(b)}
        self.left_out = self._tape.left_out

    def _norm_squared(self, metric: Metric) -> float:
        return grad_norm_squared(self._tape, metric)

    def shares(self) -> Shares:
        return grad_norm_shares(self._tape, self.metric)

    def bases(
        self, blocks: Collection[Block], tau: float, parallel: bool | None = None
    ) -> dict[Block, Projector]:
        tape, same_rows = self._tape, dict[Any, list[Block]]()
        for block in blocks:
            same_rows.setdefault(tape.rows_key(block), []).append(block)

        def basis(block: Block) -> Projector:
            with block.named_in_errors():
                if tau == 1.0 and block.other is None:
                    return self._basis(block)
                space = block.space()
                tape.collect(block, space)
                return block.basis(space, tau)

        first = [sharing[0] for sharing in same_rows.values()]
        if parallel is None:
            parallel = worth_threads(_multiplications(b, tape.row_count(b)) for b in first)
        found = in_parallel(basis, first, parallel)
        groups = zip(same_rows.values(), found, strict=True)
        return {block: basis for sharing, basis in groups for block in sharing}

    def _basis(self, block: Block) -> Projector:
        """The basis at τ = 1; no more rows are read once they span everything."""
        calls, (*_, d_in) = self._tape.calls_of(block), block.part.matrix_shape
        count, space = self._tape.row_count(block), block.part.space()
        if not isinstance(space, RowSpace):
            self._tape.collect(block, space)
            return block.basis(space, 1.0)
        if count < d_in:
            self._tape.collect(block, space)
            return space.basis_if_independent() or space.basis()
        norms = (call.part.row_norms(at_least_single(call.x.detach())) for call in calls)
        energy = sum(map(squared_norm, norms))
        enough = 2 * d_in
        for call in calls:
            for some in call.part.chunks(call.x.detach(), rows=max(1024, enough)):
                space.add(call.part.rows(some))
                if space.count >= min(enough, count):
                    if (full := space.basis_if_full(energy)) is not None:
                        return full
                    enough = 4 * space.count
        return space.basis()

    def tangent_direction(self, bases: Mapping[Block, Projector]) -> Direction:
        self._catch_up()
        return direction(self._tape, self._model, self._closure, bases, self.metric)

    def ascent(self) -> Gradient:
        parameters, metric = trainable(self._model), self.metric
        velocity, scale = None, self._velocity_scale()
        if scale != 1.0 or metric.inverse is not None:
            grads = gradient(self._closure, parameters)[1]
            pairs = zip(parameters, grads, strict=True)
            velocity = [metric.velocity(p, g, scale) for p, g in pairs]
        ascent = ascent_double_backward(self._closure, parameters, velocity)
        return {p: scaled(a, 1 / scale) for p, a in zip(parameters, ascent, strict=True)}

    def measure(self) -> tuple[float, Shares]:
        del self._tape  # before the next one is recorded: memory is that of one
        self._tape, self._behind = record(self._model, self._sites, self._closure), False
        return float(self._tape.loss.detach()), self.shares()

    def degree(self, along: Direction) -> int | None:
        return 2 * sum(len(self._tape.calls_of(b)) for b, matrix in along.items() if matrix.any())

    def _look_at(self, position: Position) -> None:
        self._tape.moved = position
        self._tape.backward()

    def _tapes(self) -> Iterator[tuple[Tape, float]]:
        self._catch_up()
        yield self._tape, 1.0


class StreamedWalk(Walk):
    """Micro-batches of one batch, or τ < 1: closures run again wherever the walk looks.

    The loss is the mean of the closures, and over ranks the mean of their losses. Each closure is
    recorded, used and forgotten in turn.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        closures: Sequence[Closure],
        movable: AbstractSet[str],
        ranks: Ranks = ALONE,
        metric: Metric = EUCLIDEAN,
    ) -> None:
        self.ranks, self.metric = ranks, metric
        self._sites, self._closures, self._movable = sites, closures, movable
        self._model = model
        self._gradient: Gradient = {}
        self.left_out = {}
        while found := self._survey():
            self.left_out |= found
            self._sites = [site.without(self.left_out) for site in self._sites]
        super().__init__(model, list(self._spaces))
        self.fixed = {block for block, depends in self._depends.items() if not depends}

    def _norm_squared(self, metric: Metric) -> float:
        norm = sum(metric.squared_norm(p, grad) for p, grad in self._gradient.items())
        return self.ranks.of_first(norm)

    def shares(self) -> Shares:
        return shares_of(self._gradient, self.blocks, self.metric)

    def bases(
        self, blocks: Collection[Block], tau: float, parallel: bool | None = None
    ) -> dict[Block, Projector]:
        blocks = list(blocks)
        if parallel is None:
            counts = (self._spaces[block].count for block in blocks)
            parallel = worth_threads(map(_multiplications, blocks, counts))
        found = in_parallel(lambda b: b.basis(self._spaces[b], tau), blocks, parallel)
        return {b: own.of_first(self.ranks) for b, own in zip(blocks, found, strict=True)}

    def tangent_direction(self, bases: Mapping[Block, Projector]) -> Direction:
        self.write()
        self._catch_up()
        whole = {block: block.part.matrix().zero_() for block in bases}
        scale = self._velocity_scale()
        velocity = {p: self.metric.velocity(p, g, scale) for p, g in self._gradient.items()}
        with self.ranks.together():
            for closure in self._closures:
                tape = record(self._model, self._sites, closure)
                drive = {
                    block: partial(drive_of, tape, block, _pieces_of(block, velocity))
                    for block in tape.blocks
                }
                tape.push_tangents(self._model, closure, drive, velocity, wanted=bases.keys())
                for block in [b for b in tape.blocks if b in whole]:
                    whole[block] += tape.survivor(block) / (len(self._closures) * scale)
                del tape, drive
        self.ranks.mean_(list(whole.values()))
        along = {
            b: without_rounding(bases[b].project(sum_), sum_, self._computed_in[b])
            for b, sum_ in whole.items()
        }
        return self._of_first(along)

    def ascent(self) -> Gradient:
        self._catch_up()
        parameters = trainable(self._model)
        scale = self._velocity_scale()
        velocity = [self.metric.velocity(p, self._grad(p), scale) for p in parameters]
        total = [torch.zeros_like(v) for v in velocity]
        with self.ranks.together():
            for closure in self._closures:
                shares = ascent_double_backward(closure, parameters, velocity)
                for place, share in zip(total, shares, strict=True):
                    place.add_(share, alpha=1.0 / len(self._closures))
        self.ranks.mean_(total)
        return {p: scaled(sum_, 1 / scale) for p, sum_ in zip(parameters, total, strict=True)}

    def _survey(self) -> dict[Block, str]:
        """Loss, gradient and row spaces at the start; blocks that have to be left out, if any."""
        self._spaces: dict[Block, Space] = {}
        self._depends: dict[Block, bool] = {}
        self._computed_in: dict[Block, torch.dtype] = {}
        losses = []
        precisions = []

        def note(tape: Tape) -> None:
            losses.append(float(tape.loss.detach()))
            self.dtype = tape.loss.dtype
            precisions.append(tape.precision)
            for block in tape.blocks:
                known = self._computed_in.get(block, tape.computed_in(block))
                self._computed_in[block] = coarsest([known, tape.computed_in(block)])
                space = self._spaces.setdefault(block, block.space())
                depends = tape.depends_on_parameters(block)
                self._depends[block] = self._depends.get(block, False) or depends
                if block.name in self._movable:
                    tape.collect(block, space)

        left_out: dict[Block, str] = {}
        self._gradient = {}
        with self.ranks.together():
            for closure in self._closures:
                tape = record(self._model, self._sites, closure)
                left_out |= tape.left_out
                note(tape)
                self._add(tape)
                del tape  # before the next one is recorded: memory is that of one
        self.loss = self.ranks.mean(sum(losses) / len(losses))
        self.precision = coarsest(precisions)
        if self.ranks.size > 1:
            left_out = self._share_survey(left_out)
        return left_out

    def measure(self) -> tuple[float, Shares]:
        parameters = trainable(self._model)
        loss, grads = mean_gradient(self._closures, parameters, self.ranks)
        gradient = dict(zip(parameters, grads, strict=True))
        return loss, shares_of(gradient, self.blocks, self.metric)

    def degree(self, along: Direction) -> int | None:
        return None  # a layer that drifts, as at τ < 1, makes it no polynomial at all

    def _share_survey(self, left_out: dict[Block, str]) -> dict[Block, str]:
        """What other ranks have seen; all go on with the same blocks in the same order."""
        blocks = list(dict.fromkeys(b for site in self._sites for b in site.blocks))
        seen = [(b in left_out, b in self._spaces, self._depends.get(b, False)) for b in blocks]
        anywhere = self.ranks.most([int(flag) for flags in seen for flag in flags])
        out, called, depends = (dict(zip(blocks, anywhere[i::3], strict=True)) for i in range(3))
        if any(out.values()):
            return {b: left_out.get(b, USED_OUTSIDE) for b in blocks if out[b]}
        blocks = [block for block in blocks if called[block]]
        precisions = [PRECISIONS.index(self.precision)]
        precisions += [PRECISIONS.index(self._computed_in.get(b, torch.float64)) for b in blocks]
        self.precision, *each = (PRECISIONS[i] for i in self.ranks.most(precisions))
        self._computed_in = dict(zip(blocks, each, strict=True))
        self._depends = {block: bool(depends[block]) for block in blocks}
        spaces = {block: self._spaces.get(block, block.space()) for block in blocks}
        self._spaces = {b: s.joined(self.ranks, b.part.matrix().shape) for b, s in spaces.items()}
        self._share_gradient()
        return {}

    def _share_gradient(self) -> None:
        """The mean of the ranks' gradients, for parameters that any of them may have reached."""
        if self.ranks.size > 1:
            self.ranks.mean_([self._grad(p) for p in trainable(self._model)])

    def _look_at(self, position: Position) -> None:
        self._write(position)
        self._gradient = {}
        with self.ranks.together():
            for closure in self._closures:
                self._add(record(self._model, self._sites, closure))
        self._share_gradient()

    def _add(self, tape: Tape) -> None:
        """Add one micro-batch's share to the gradient."""
        share = 1.0 / len(self._closures)
        for block in tape.blocks:
            pieces = block.part.split(tape.weight_gradient(block))
            for slot, piece in zip(block.part.slots, pieces, strict=True):
                slot.of(self._grad(slot.parameter)).add_(piece, alpha=share)
        for parameter, grad in zip(tape.others, tape.other_gradients, strict=True):
            self._grad(parameter).add_(grad, alpha=share)

    def _grad(self, parameter: nn.Parameter) -> Tensor:
        if parameter not in self._gradient:
            self._gradient[parameter] = torch.zeros_like(parameter, requires_grad=False)
        return self._gradient[parameter]

    def _tapes(self) -> Iterator[tuple[Tape, float]]:
        self.write()
        for closure in self._closures:
            yield record(self._model, self._sites, closure), 1.0 / len(self._closures)


def _multiplications(block: Block, rows: int) -> float:
    """What a basis takes at least: the smaller Gram matrix, or as much again to decompose it.

    None on a device that is not the CPU, whose own threads are not ours to start, and none to speak
    of where inputs are tokens that are only counted.
    """
    on_cpu = block.part.weight.parameter.device.type == "cpu"
    if not on_cpu or not block.part.gram_pays:
        return 0.0
    *groups, _, d_in = block.part.matrix_shape
    return float(math.prod(groups) * min(rows, d_in) ** 2 * d_in)


def _pieces_of(block: Block, values: Mapping[nn.Parameter, Tensor]) -> Pieces:
    """A block's share of a value per parameter."""
    return tuple(slot.of(values[slot.parameter]) for slot in block.part.slots)
