"""The landscape of one teleport: a position in parameter space, and the gradient norm around it.

At τ = 1 and on one batch activations are frozen (``thm-invariance``): one tape is kept, and the
norm at another position costs one backward pass over it. In all other cases the closures run again
wherever it looks, one at a time, so that memory stays at what one of them needs. A look leaves its
weights in the model.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from teleport.direction import Direction, direction, mean_direction, project_ascent
from teleport.layers.part import Pieces
from teleport.layers.support import CoveredModule, WeightMatrix
from teleport.objective import (
    EUCLIDEAN,
    Gradient,
    Metric,
    Shares,
    mean_gradient,
    shares_of,
    squared_norm,
    trainable,
)
from teleport.recording import (
    USED_OUTSIDE,
    Formed,
    Looks,
    Tape,
    multiplications,
    record,
    recorded_basis,
)  # fmt: skip
from teleport.recording.differences import coarser, hessian_times
from teleport.runtime.closures import Closure
from teleport.runtime.precision import PRECISIONS, coarsest, is_half, scaled, unit_scale
from teleport.runtime.ranks import ALONE, Ranks
from teleport.runtime.threads import in_parallel, worth_threads
from teleport.subspace import Basis, Projector, Space


class Position:
    """The moves away from the start, one after the other; each a direction and how far along it."""

    def __init__(self, *moves: tuple[Direction, float]) -> None:
        self._moves = moves

    def __contains__(self, block: WeightMatrix) -> bool:
        return any(block in along for along, _ in self._moves)

    @property
    def blocks(self) -> list[WeightMatrix]:
        """Those that moved."""
        return list(dict.fromkeys(block for along, _ in self._moves for block in along))

    def changes(self, block: WeightMatrix) -> list[tuple[Pieces, float]]:
        """What is added to a block's weights, each with its factor."""
        moves = ((along[block], step) for along, step in self._moves if block in along)
        return [(block.part.split(matrix), step) for matrix, step in moves]

    def ahead(self, along: Direction, step: float) -> "Position":
        """One move on."""
        return Position(*self._moves, (along, step))

    def distance(self, block: WeightMatrix) -> float:
        """Frobenius norm of the block's change since the start, after at most one move."""
        if block not in self:
            return 0.0
        ((along, step),) = self._moves
        return abs(step) * math.sqrt(squared_norm(along[block]))

    def joined(self) -> "Position":
        """The same with all moves made one: as much memory, however many there were."""
        if len(self._moves) < 2:
            return self
        whole: Direction = {}
        for along, step in self._moves:
            for block, new in along.items():
                old = whole.get(block)
                whole[block] = scaled(new, step) if old is None else old.add(new, alpha=step)
        return Position((whole, 1.0))


class Landscape:
    """Where a teleport is, and how it looks around.

    Args:
        model: its trainable parameters are what the gradient is taken in.
        sites: the layers to cover.
        closures: parts of the batch; the loss is their mean, over ranks the mean of their losses.
        frozen: keep the activations of the start, as a move in the joint null space does: for one
            closure on one rank, at τ = 1.
        movable: names of the blocks whose inputs are collected; all by default.
        ranks: the processes that look together.
        metric: of the gradient norm.
        kept: values of parameters at the start, if somebody holds them already.
        once: no second direction will be asked for, so that of the start no graph need be kept.

    Attributes:
        blocks: the covered blocks that are called.
        position: the moves so far, of the blocks that moved; all others are as they were.
        loss: at the start.
        dtype: of the loss.
        precision: the coarsest that products were computed in; coarser under autocast.
        fixed: blocks whose inputs depend on no parameter (``thm-fixed``).
        left_out: blocks that cannot be recorded, and why.
        by_differences: why the direction is no derivative of the gradient, if it is none.
        tape: the one that is kept; None if activations are not frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[CoveredModule],
        closures: Sequence[Closure],
        *,
        frozen: bool = False,
        movable: AbstractSet[str] | None = None,
        ranks: Ranks = ALONE,
        metric: Metric = EUCLIDEAN,
        kept: Mapping[nn.Parameter, Tensor] | None = None,
        once: bool = False,
    ) -> None:
        if frozen and (len(closures) != 1 or ranks.size != 1):
            raise ValueError("activations are frozen for one closure on one rank only")
        self.ranks, self.metric = ranks, metric
        self.tape: Tape | None = None
        self._model, self._sites, self._closures = model, sites, closures
        self._frozen, self._movable = frozen, movable
        self._once = once or not frozen
        self._gradient: Gradient = {}
        self.by_differences = ""
        self.left_out: dict[WeightMatrix, str] = {}
        while found := self._survey():
            self.left_out |= found
            self._sites = [site.without(self.left_out) for site in self._sites]
            if frozen:
                break  # its tape has left them out already
        self.blocks = list(self._depends)
        self.fixed = {block for block, depends in self._depends.items() if not depends}
        self._kept = kept or {}
        self._start: dict[WeightMatrix, Pieces] = {}  # of what was written to
        self.position = Position()
        self._move_norms: dict[WeightMatrix, float] = {}  # at the position
        self._seen: Position | None = self.position  # where the gradient was taken last
        self._ahead: tuple[Direction, float, Position] | None = None
        self._looks = Looks()  # along the direction ahead
        self._first: Formed = {}  # the gradient at the position, as far as it was formed
        self._estimate: Shares | None = None  # at the position, if it was looked at only nearby

    # ---- the norm, here and elsewhere

    def shares(self) -> Shares:
        """What every block and every other parameter has of the squared norm at the position."""
        if self._estimate is not None:
            return self._estimate
        self._look()
        if self.tape is not None:
            return self.tape.shares(self.metric)
        return shares_of(self._gradient, self.blocks, self.metric)

    def norm_squared(self) -> float:
        """The squared gradient norm at the position."""
        if self._estimate is not None:
            return sum(self._estimate.values())
        self._look()
        return self._norm_squared_seen(self.metric)

    def norm_squared_at(self, along: Direction, step: float) -> float:
        """The squared norm at a step along a direction, left in the model; the position stays."""
        if step > torch.finfo(self.dtype).max:
            return math.inf
        if self.tape is not None and (self._ahead is None or self._ahead[0] is not along):
            here = self._seen is self.position and self._estimate is None
            self._looks = Looks([(0.0, self.tape.shares(self.metric))] if here else [])
        self._ahead = self._seen = self._estimate = None  # before the next: memory is that of one
        self._ahead = along, step, self.position.ahead(along, step)
        self._look_at(self._ahead[2])
        if self.tape is not None:
            self._looks.seen.append((step, self.tape.shares(self.metric)))
            if len(self._looks.seen) == 2:
                self._looks.chord = self.tape.distances(self._first, along, self.metric)
        return self._norm_squared_seen(self.metric)

    def advance(self, along: Direction, step: float, reached: float | None = None) -> None:
        """Go there, where the squared norm is ``reached`` if that is known without a look.

        Where `Looks.between` tells the shares, no further one is made before somebody needs a
        direction: until then shares are those, and cotangents those of the last look.
        """
        ahead, self._ahead = self._ahead, None
        known = ahead is not None and ahead[0] is along and ahead[1] == step
        there = ahead[2] if ahead and known else self.position.ahead(along, step)
        looks, self._looks, self._estimate, self._first = self._looks, Looks(), None, {}
        if reached is not None and ahead and ahead[0] is along and not known:
            self._estimate = looks.between(step, reached)
        self.position = there.joined()
        if self._seen is there:
            self._seen = self.position
        self._move_norms = {}

    def degree(self, along: Collection[WeightMatrix]) -> int | None:
        """Degree of the squared norm as blocks move, at most (``thm-polynomial``), if known."""
        if self.tape is None:
            return None  # a layer that drifts, as at τ < 1, makes it no polynomial at all
        return 2 * sum(len(self.tape.calls_of(block)) for block in along)

    def _norm_squared_seen(self, metric: Metric) -> float:
        if self.tape is not None:
            return self.tape.norm_squared(metric)
        squares = (metric.squared_norm(p, grad) for p, grad in self._gradient.items())
        return self.ranks.of_first(sum(squares))

    def _look(self) -> None:
        if self._seen is not self.position:
            self._look_at(self.position)

    def _look_at(self, position: Position) -> None:
        """Put a position into the model and take the gradient there."""
        self._estimate = self._seen = None
        self._write(position)
        if self.tape is not None:
            self.tape.backward()
            self._seen = position
            return
        self._gradient = {}
        with self.ranks.together():
            for tape, share in self._recorded():
                self._add(tape, share)
                del tape  # see `_recorded`
        self._share_gradient()
        self._seen = position

    def _recorded(self) -> Iterator[tuple[Tape, float]]:
        """A tape of every closure for the weights in the model, and its share in the loss.

        Whoever takes them forgets each before asking for the next: memory is that of one.
        """
        for closure in self._closures:
            tape = record(self._model, self._sites, closure, self._once)
            yield tape, 1.0 / len(self._closures)
            del tape

    def tapes(self) -> Iterator[tuple[Tape, float]]:
        """Tapes at the position, and the share of each in the loss."""
        if self.tape is None:
            self.write()
            yield from self._recorded()
            return
        if self._estimate is None:
            self._look()
        self.tape.remember()
        yield self.tape, 1.0

    def measure(self) -> tuple[float, Shares]:
        """Loss and shares of the squared norm of the model as it is written now, from scratch."""
        if self._frozen:
            self.tape = None  # before the next one is recorded: memory is that of one
            self.tape = record(self._model, self._sites, self._closures[0], self._once)
            self._seen, self._estimate = self.position, None
            return float(self.tape.loss.detach()), self.shares()
        loss, found = self.measure_plainly()
        return loss, shares_of(found, self.blocks, self.metric)

    def measure_plainly(self) -> tuple[float, Gradient]:
        """Loss and gradient of the model as it is written now, by autograd, nothing replaced."""
        parameters = trainable(self._model)
        loss, grads = mean_gradient(self._closures, parameters, self.ranks)
        return loss, dict(zip(parameters, grads, strict=True))

    # ---- which way the norm grows

    def bases(
        self, blocks: Collection[WeightMatrix], tau: float, parallel: bool | None = None
    ) -> dict[WeightMatrix, Projector]:
        """Bases of the blocks' inputs at the start.

        ``parallel`` says whether several are made at the same time; by default, if that pays.
        Blocks whose inputs are the same have one basis.
        """
        tape, sharing = self.tape, dict[Any, list[WeightMatrix]]()
        for block in blocks:
            sharing.setdefault(block if tape is None else tape.rows_key(block), []).append(block)
        first = [same[0] for same in sharing.values()]
        if parallel is None:
            parallel = worth_threads(multiplications(b, self._row_count(b)) for b in first)
        found = in_parallel(lambda block: self._rounded_basis(block, tau), first, parallel)
        groups = zip(sharing.values(), found, strict=True)
        return {block: own.of_first(self.ranks) for same, own in groups for block in same}

    def _row_count(self, block: WeightMatrix) -> int:
        return self._spaces[block].count if self.tape is None else self.tape.row_count(block)

    def _rounded_basis(self, block: WeightMatrix, tau: float) -> Projector:
        """In the precision it projects in, which gives the same; ranks send all that they found."""
        basis, dtype = self._basis(block, tau), block.part.weight.parameter.dtype
        if self.ranks.size > 1 or not isinstance(basis, Basis):
            return basis
        if basis.vectors.dtype.itemsize <= dtype.itemsize:
            return basis
        return replace(basis, vectors=basis.vectors.to(torch.float32))

    def _basis(self, block: WeightMatrix, tau: float) -> Projector:
        if self.tape is None:
            return block.basis(self._spaces[block], tau)
        return recorded_basis(self.tape, block, tau)

    def tangent_direction(
        self, bases: dict[WeightMatrix, Projector], last: bool = False
    ) -> Direction:
        """π(H M⁻¹ g) of the given blocks at the position (``thm-survivor``); whether the last."""
        scale = self._velocity_scale()
        if self.tape is not None:
            self._first = {} if self.precision == torch.float64 else self.tape.formed()
            model, closure = self._model, self._closures[0]
            along = direction(self.tape, model, closure, bases, self.metric, scale, last)
            self.forget()
            return along
        velocity = {p: self.metric.velocity(p, g, scale) for p, g in self._gradient.items()}
        self.write()
        return mean_direction(
            self._recorded(), self._model, self._closures, bases, velocity, scale,
            self._computed_in, self.ranks,
        )  # fmt: skip

    def double_backward_direction(self, bases: Mapping[WeightMatrix, Projector]) -> Direction:
        """π(∇T) by definition: the reference for `tangent_direction`."""
        ascent = self._ascent()
        full = {block: block.part.of(ascent) for block in bases}
        rough = coarser(self.precision) if self.by_differences else self.precision
        dtypes = dict.fromkeys(bases, rough) if self.by_differences or is_half(rough) else None
        along = project_ascent(full, bases, dtypes)
        self.ranks.of_first_(list(along.values()))
        return along

    def _ascent(self) -> Gradient:
        """H M⁻¹ g by double backward, with the position in the model."""
        scale, parameters = self._velocity_scale(), trainable(self._model)
        self.write()
        if self.tape is not None:
            self._gradient = self.measure_plainly()[1]
        velocity = [self.metric.velocity(p, self._grad(p), scale) for p in parameters]
        total = [torch.zeros_like(v) for v in velocity]
        with self.ranks.together():
            for closure in self._closures:
                shares, how = hessian_times(closure, parameters, velocity, self.precision)
                self.by_differences = how or self.by_differences
                for place, share in zip(total, shares, strict=True):
                    place.add_(share * (1.0 / len(self._closures)))
        self.ranks.mean_(total)
        return {p: scaled(sum_, 1 / scale) for p, sum_ in zip(parameters, total, strict=True)}

    def _velocity_scale(self) -> float:
        """What brings the velocity near length one, where float16 needs that."""
        self._look()
        return unit_scale(
            lambda: self._norm_squared_seen(self.metric.of_velocities()), self.precision
        )

    # ---- positions and the model

    def write(self) -> None:
        """Put the position into the model's parameters."""
        self._write(self.position)

    def write_start(self) -> None:
        """Put the start back into the model's parameters."""
        self._write(Position())

    def start_of(self, block: WeightMatrix) -> tuple[Tensor, ...]:
        """A block's weights at the start."""
        return self._start.get(block) or block.part.pieces()

    def _kept_of(self, block: WeightMatrix) -> Pieces | None:
        held = all(slot.parameter in self._kept for slot in block.part.slots)
        return block.part.pieces_of(self._kept) if held else None

    def forget(self) -> None:
        """Free what the last look left, but for known shares."""
        if self.tape is not None:
            self.tape.forget()

    def move_norm(self, block: WeightMatrix) -> float:
        """Frobenius norm of the block's change since the start."""
        if block not in self._move_norms:
            self._move_norms[block] = self.position.distance(block)
        return self._move_norms[block]

    def is_near(self) -> bool:
        """Whether no block moved farther than twice the length of its weights."""

        def length(block: WeightMatrix) -> float:
            return math.sqrt(sum(map(squared_norm, self.start_of(block))))

        return all(self.move_norm(block) <= 2 * length(block) for block in self.position.blocks)

    def _write(self, position: Position) -> None:
        """Put a position into the parameters; what it does not name goes back to the start.

        Graphs recorded before notice nothing, unless it is kept: see `Transaction.commit`.
        """
        for block in position.blocks:
            if block not in self._start:
                kept = self._kept_of(block)
                self._start[block] = kept or tuple(piece.clone() for piece in block.part.pieces())
        for block, start in self._start.items():
            block.part.put(start, position.changes(block), noticed=False)

    # ---- the start

    def _survey(self) -> dict[WeightMatrix, str]:
        """Loss, gradient and inputs at the start; blocks that have to be left out, if any."""
        self._spaces: dict[WeightMatrix, Space] = {}
        self._depends: dict[WeightMatrix, bool] = {}
        self._computed_in: dict[WeightMatrix, torch.dtype] = {}
        self._gradient = {}
        losses: list[float] = []
        precisions: list[torch.dtype] = []
        left_out: dict[WeightMatrix, str] = {}
        with self.ranks.together():
            for tape, share in self._recorded():
                left_out |= tape.left_out
                self.dtype = tape.loss.dtype
                losses.append(float(tape.loss.detach()))
                precisions.append(tape.precision)
                self._note(tape)
                if self._frozen:
                    self.tape = tape
                else:
                    self._add(tape, share)
                del tape  # see `_recorded`
        self.loss = self.ranks.mean(sum(losses) / len(losses))
        self.precision = coarsest(precisions)
        return self._share_survey(left_out) if self.ranks.size > 1 else left_out

    def _note(self, tape: Tape) -> None:
        for block in tape.blocks:
            known = self._computed_in.get(block, tape.computed_in(block))
            self._computed_in[block] = coarsest([known, tape.computed_in(block)])
            depends = tape.depends_on_parameters(block)
            self._depends[block] = self._depends.get(block, False) or depends
            if not self._frozen:
                space = self._spaces.setdefault(block, block.space())
                if self._movable is None or block.name in self._movable:
                    own = block.space() if len(self._closures) > 1 else space
                    tape.collect(block, own)
                    if own is not space:
                        space.absorb(own)

    def _share_survey(self, left_out: dict[WeightMatrix, str]) -> dict[WeightMatrix, str]:
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

    # ---- the gradient of several closures

    def _add(self, tape: Tape, share: float) -> None:
        """Add one micro-batch's share to the gradient; in the arithmetic of `Ranks.mean_`."""
        for block in tape.blocks:
            pieces = block.part.split(tape.weight_gradient(block))
            for slot, piece in zip(block.part.slots, pieces, strict=True):
                slot.of(self._grad(slot.parameter)).add_(piece * share)
        for parameter, grad in zip(tape.others, tape.other_gradients, strict=True):
            self._grad(parameter).add_(grad * share)

    def _grad(self, parameter: nn.Parameter) -> Tensor:
        if parameter not in self._gradient:
            self._gradient[parameter] = torch.zeros_like(parameter, requires_grad=False)
        return self._gradient[parameter]

    def _share_gradient(self) -> None:
        """The mean of the ranks' gradients, for parameters that any of them may have reached."""
        if self.ranks.size > 1:
            self.ranks.mean_([self._grad(p) for p in trainable(self._model)])
