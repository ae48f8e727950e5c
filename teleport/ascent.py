"""One attempt to teleport on one batch: walk, check, report. `Teleporter` wraps it safely."""

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import torch
from torch import nn

from teleport.direction import Direction
from teleport.errors import NonFiniteLossError
from teleport.landscape import FrozenWalk, StreamedWalk, Walk
from teleport.layers.support import Block, Coverage
from teleport.line_search import step_to_norm
from teleport.objective import (
    EUCLIDEAN,
    Metric,
    Shares,
    mean_gradient,
    mean_loss,
    shares_of,
    squared_norm,
    trainable,
)
from teleport.recording import Closure
from teleport.report import LayerReport, TeleportReport
from teleport.runtime.clock import now
from teleport.runtime.ranks import Ranks
from teleport.runtime.wrappers import holder_names
from teleport.subspace import Projector

DEFAULT_MAX_DRIFT = 0.01
"""Relative loss change allowed at tau < 1, where the level set is left by design, and at most at
tau = 1, where only rounding moves the loss."""

MISSED = 0.01
"""How far, as a share, the gradient norm may be from what frozen activations said it would be."""


@dataclass(frozen=True)
class Settings:
    """What `Teleporter` was asked for, checked; see there."""

    model: nn.Module
    coverage: Coverage
    movable: AbstractSet[str]
    tau: float
    steps: int
    lr: float | None
    growth: float | None
    cap: float | None
    method: str
    max_drift: float | None


NO_ROOM = (
    "nothing can move: no layer has a null space on this batch. Use a smaller batch, tau < 1 or "
    "wider layers"
)
"""Reason of a report if all layers have full rank."""
_NO_LAYER = (
    "nothing can move: no layer can be recorded in this closure; the report's layers say why"
)
FIXED = (
    "nothing can move: in every layer with a null space the inputs do not change with the "
    "parameters, or only within their own span"
)
"""Reason of a report if nothing moves by ``thm-fixed``, though there is room."""

UNFROZEN = (
    " (searched on the model itself: its gradient grows otherwise than with frozen activations. "
    "The move is so large that rounding counts, or a weight takes part past its layer)"
)
"""Added to the reason of a report if the walk had to be made again on the model itself."""

_OVERFLOW = (
    "the gradient or its derivative is not finite: it leaves the range of the dtype. Scale the "
    "loss down, or compute in bfloat16 or float32"
)


@dataclass
class _Outcome:
    """Where an attempt began or ended: the numbers of the report that depend on it."""

    loss: float
    norm: float
    held_out: float | None
    norms: dict[str, float]
    """By layer, as far as the parameters are one layer's."""


class Attempt:
    """One call of `Teleporter.step`, inside its transaction; leaves the model where it ends.

    Args:
        settings: how.
        closures: parts of the batch; the loss is their mean.
        held_out: loss of other data, for the report.
        ranks: the processes that teleport together, each with closures of its own.
        metric: of the gradient norm that is to grow.
    """

    def __init__(
        self,
        settings: Settings,
        closures: Sequence[Closure],
        held_out: Closure | None,
        ranks: Ranks,
        metric: Metric = EUCLIDEAN,
    ) -> None:
        self.settings = settings
        self.ranks, self.metric = ranks, metric
        self.closures = closures
        self.held_out = held_out
        self.held_out_seconds = 0.0

    def run(self) -> TeleportReport:
        """Walk, check and tell; a report with steps and without ``rolled_back`` is to be kept.

        It can be run again: each run begins at the model as it is.
        """
        self.bases: dict[Block, Projector] = {}
        self.step_sizes: list[float] = []
        self.fallback, self.unfrozen = "", False
        self.walk = self._start_walk()
        before = self._measure_start()
        self.bases = self._make_bases()
        after, failure, tolerance = before, "", 0.0
        try:
            finite = math.isfinite(before.norm)
            reason = self._ascend(math.sqrt(self.walk.norm_squared())) if finite else _OVERFLOW
            after, missed = self._arrive(before)
            if missed:
                reason = self._ascend_unfrozen()
                after, _ = self._arrive(before)
            tolerance = self._tolerance(before)
            failure = self._failure(before, after, tolerance) if self.step_sizes else ""
        except NonFiniteLossError:
            failure = "the loss became NaN or infinite on the way"
        return TeleportReport(
            loss_before=before.loss,
            loss_after=before.loss if failure else after.loss,
            grad_norm_before=before.norm,
            grad_norm_after=before.norm if failure else after.norm,
            held_out_before=before.held_out,
            held_out_after=before.held_out if failure else after.held_out,
            tolerance=tolerance,
            steps=len(self.step_sizes),
            step_sizes=tuple(self.step_sizes),
            rolled_back=bool(failure),
            reason=(failure or reason) + self._notes(),
            seconds=0.0,
            layers=tuple(self._layer_reports(before, None if failure else after)),
            norm=self.metric.name,
        )

    def _arrive(self, before: _Outcome) -> tuple[_Outcome, bool]:
        """Go where the walk ended; whether the gradient norm there is another than it said.

        A direction that is free by the rank rule holds energy up to its cut. A move many times as
        large as the weights changes what it reaches by as many times the rounding (``thm-rank``).
        And a weight of which a view was made beforehand has no tangent, so that the slope is wrong.
        """
        if not self.step_sizes:
            return before, False
        said = math.sqrt(self.walk.norm_squared())
        self.walk.write()
        after = self._measure_end()
        frozen = isinstance(self.walk, FrozenWalk) and self.walk.precision == self.walk.dtype
        by_growth = self.settings.lr is None and len(self.step_sizes) == self.settings.steps
        wanted = self._limit(before.norm) if by_growth else said
        off = max(abs(after.norm - norm) / norm for norm in (said, wanted))
        return after, frozen and off > MISSED

    def _ascend_unfrozen(self) -> str:
        """Walk again from the start, on a walk that runs the model wherever it looks."""
        self.walk.write_start()
        del self.walk  # before the next one is made: memory is that of one
        self.walk, self.unfrozen = self._streamed_walk(), True
        self.bases, self.step_sizes = self._make_bases(), []
        return self._ascend(math.sqrt(self.walk.norm_squared()))

    def _measure_start(self) -> _Outcome:
        if self.walk.precision != self.walk.dtype:
            return self._plain_outcome()
        return self._outcome(self.walk.loss, self.walk.shares())

    def _measure_end(self) -> _Outcome:
        """Where the walk ended, from scratch: the model runs again with the new parameters."""
        if self.walk.precision != self.walk.dtype:
            return self._plain_outcome()
        return self._outcome(*self.walk.measure())

    def _plain_outcome(self) -> _Outcome:
        """Measured by plain autograd.

        Layers that autocast computes in another precision than their recorded products, as
        recurrent ones, are another function by its rounding: compare the model with itself.
        """
        parameters = trainable(self.settings.model)
        loss, grads = mean_gradient(self.closures, parameters, self.ranks)
        gradient = dict(zip(parameters, grads, strict=True))
        return self._outcome(loss, shares_of(gradient, self.walk.blocks, self.metric))

    def _outcome(self, loss: float, shares: Shares) -> _Outcome:
        norm = self.ranks.of_first(math.sqrt(sum(shares.values())))
        holders = holder_names(self.settings.model)
        squares: dict[str, float] = {}
        for part, square in shares.items():
            name = part.name if isinstance(part, Block) else holders[part]
            squares[name] = squares.get(name, 0.0) + square
        # A norm from Gram matrices may be below zero by rounding.
        norms = {name: math.sqrt(max(square, 0.0)) for name, square in squares.items()}
        return _Outcome(loss, norm, self._held_out_loss(), norms)

    def _start_walk(self) -> Walk:
        model, sites, metric = self.settings.model, self.settings.coverage.sites, self.metric
        if self.settings.tau == 1.0 and len(self.closures) == 1 and self.ranks.size == 1:
            return FrozenWalk(model, sites, self.closures[0], metric)
        return self._streamed_walk()

    def _streamed_walk(self) -> Walk:
        s = self.settings
        return StreamedWalk(
            s.model, s.coverage.sites, self.closures, s.movable, self.ranks, self.metric
        )

    def _held_out_loss(self) -> float | None:
        if self.held_out is None:
            return None
        started = now()
        try:
            loss = mean_loss([self.held_out], self.ranks)
        except NonFiniteLossError:
            loss = math.nan  # it is only reported: no reason to undo or to refuse anything
        self.held_out_seconds += now() - started
        return loss

    def _make_bases(self) -> dict[Block, Projector]:
        """Bases of the layers that may move and have room to; full-rank layers are kept for show.

        The tangent direction of a layer whose inputs depend on no parameter is zero, so it needs
        no basis (``thm-fixed``).
        """
        walk, settings = self.walk, self.settings
        skipped = walk.fixed if settings.method == "tangent" else set()
        wanted = [b for b in walk.blocks if b.name in settings.movable and b not in skipped]
        return walk.bases(wanted, settings.tau)

    def _ascend(self, start: float) -> str:
        """Take the steps; return why they ended."""
        room = {block: basis for block, basis in self.bases.items() if basis.null_dim > 0}
        if not self.walk.blocks:
            return _NO_LAYER
        if not room:  # layers that are fixed points have no basis: nobody looked for their room
            return NO_ROOM if self.bases else FIXED
        if self.settings.tau == 1.0:  # their direction is zero, but for rounding (``thm-fixed``)
            room = {b: basis for b, basis in room.items() if b not in self.walk.fixed}
            if not room:
                return FIXED
        if start == 0.0:
            return "the gradient is zero: there is nothing to enlarge"
        limit = self._limit(start)
        if limit <= start:
            return f"the {self.metric.name} {start:.6g} is already at the cap {limit:.6g}"
        for number in range(1, self.settings.steps + 1):
            along = self._direction(room)
            slope = sum(map(squared_norm, along.values()))
            slope = self.ranks.of_first(slope)
            if not math.isfinite(slope):
                return _OVERFLOW
            if slope == 0.0:
                return FIXED if not self.step_sizes else "a stationary point was reached"
            share = number / self.settings.steps if self.settings.lr is None else 1.0
            step = self._step_size(along, slope, start * (limit / start) ** share)
            if step is None:
                self.walk.look_back()
                return f"no step along the ascent direction reaches the wanted {self.metric.name}"
            self.walk.advance(along, step)
            self.step_sizes.append(step)
            if self.settings.lr is not None and step != self.settings.lr:
                return self._limit_reached(limit)
        return self._limit_reached(limit) if self.settings.lr is None else "all steps taken"

    def _step_size(self, along: Direction, slope: float, target: float) -> float | None:
        """The fixed step, or where the norm reaches ``target`` if that comes first."""
        lr, start = self.settings.lr, self.walk.norm_squared()
        wanted = target * target  # infinite for the largest limits, where ** would raise
        if lr is not None and self.walk.norm_squared_at(along, lr) <= wanted:
            return lr
        return step_to_norm(
            lambda s: self.walk.norm_squared_at(along, s),
            start,
            2 * slope,
            wanted,
            rtol=8 * torch.finfo(self.walk.precision).eps,
            degree=self.walk.degree(along),
        )

    def _direction(self, room: dict[Block, Projector]) -> Direction:
        if self.settings.method == "tangent" and not self.fallback:
            try:
                return self.walk.tangent_direction(room)
            except NotImplementedError as error:  # no forward-mode derivative of some operation
                self.fallback = str(error).split(". ")[0]
        return self.walk.double_backward_direction(room)

    def _notes(self) -> str:
        note = f" (directions by double backward: {self.fallback})" if self.fallback else ""
        return note + UNFROZEN * self.unfrozen

    def _limit(self, start: float) -> float:
        """The gradient norm the walk must not exceed."""
        settings = self.settings
        by_growth = math.inf if settings.growth is None else settings.growth * start
        return min(by_growth, math.inf if settings.cap is None else settings.cap)

    def _limit_reached(self, limit: float) -> str:
        if self.settings.cap == limit:
            return f"{self.metric.name} reached the cap {limit:.6g}"
        return f"{self.metric.name} reached {self.settings.growth:.6g} x its start"

    def _failure(self, before: _Outcome, after: _Outcome, allowed: float) -> str:
        """What is wrong with the new position, if anything."""
        if not math.isfinite(after.norm):
            return f"the gradient norm became {after.norm}"
        drift = abs(after.loss - before.loss)
        if drift <= allowed:
            return ""
        why = f"the loss moved by {drift:.2e}, more than the allowed {allowed:.2e}"
        self.walk.write_start()
        again = [mean_loss(self.closures, self.ranks) for _ in range(2)]
        if any(abs(other - before.loss) > allowed for other in again):
            why += "; the closure is not deterministic: at the start it now returns another loss"
        return why

    def _tolerance(self, before: _Outcome) -> float:
        if self.settings.max_drift is not None:
            return self.settings.max_drift * abs(before.loss)
        if self.settings.tau < 1.0:
            return DEFAULT_MAX_DRIFT * abs(before.loss)
        # Far out rounding is as large as the loss, and nothing tells whether the loss was kept.
        ceiling = max(
            DEFAULT_MAX_DRIFT * abs(before.loss), math.sqrt(torch.finfo(self.walk.dtype).eps)
        )
        return min(self.walk.rounding(self.bases), ceiling)

    def _layer_reports(self, before: _Outcome, after: _Outcome | None) -> Iterator[LayerReport]:
        """One for every layer; ``after`` is None if the walk is undone."""
        end = before if after is None else after
        coverage = self.settings.coverage
        rows = [self._layer_report(block, after is None) for block in coverage.blocks]
        rows += [
            LayerReport(name, "", None, None, None, None, 0.0, None, f"frozen: {why}")
            for name, why in coverage.frozen.items()
        ]
        for row in rows:
            first, last = before.norms.get(row.name), end.norms.get(row.name)
            yield replace(row, grad_norm_before=first, grad_norm_after=last)

    def _layer_report(self, block: Block, failed: bool) -> LayerReport:
        (*groups, d_out, d_in), basis = block.part.matrix_shape, self.bases.get(block)
        moved = 0.0 if failed else self.walk.move_norm(block)
        return LayerReport(
            name=block.name,
            kind=block.kind,
            d_in=d_in,
            d_out=d_out,
            rank=None if basis is None else basis.rank,
            null_dim=None if basis is None else basis.null_dim,
            move_norm=moved,
            output_bound=moved * basis.residual if basis and moved else None,
            status=self._status(block, failed),
            groups=math.prod(groups),
        )

    def _status(self, block: Block, failed: bool) -> str:
        basis = self.bases.get(block)
        if block.name not in self.settings.movable:
            return "excluded"
        if block not in self.walk.blocks:
            return self.walk.left_out.get(block, "frozen: not called")
        if basis is not None and basis.null_dim == 0:
            return "full rank: no null space"
        if self.walk.move_norm(block) == 0.0:
            return "fixed point" if self.step_sizes or basis is None else "not moved"
        return "rolled back" if failed else "moved"
