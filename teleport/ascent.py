"""The ascent of one teleport: take the steps in the null space, and say why they ended."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from teleport.direction import Direction
from teleport.guard import (
    DEFAULT_MAX_DRIFT,
    GuardedMove,
    HeldOut,
    Standing,
    frozen_layers,
    rounding,
)
from teleport.landscape import Landscape
from teleport.layers.support import Coverage, WeightMatrix
from teleport.line_search import step_to_norm
from teleport.objective import EUCLIDEAN, Metric, Shares, mean_loss, shares_of, squared_norm
from teleport.report import LayerReport
from teleport.runtime.closures import Closure
from teleport.runtime.ranks import Ranks
from teleport.runtime.wrappers import holder_names
from teleport.subspace import Projector

MISSED = 0.01
"""How far, as a share, the gradient norm may be from what frozen activations said it would be."""

UNSEEN = 3e-4
"""How far, as a share and ten times over, the squared norm may be from the wanted one where nobody
looks: half the digits of float32. In double precision and at a cap the search goes to rounding."""

NO_ROOM = (
    "nothing can move: no layer has a null space on this batch. Use a smaller batch, tau < 1 or "
    "wider layers"
)
"""Reason of a report if all layers have full rank."""
_NO_LAYER = (
    "nothing can move: no layer can be recorded in this closure; the report's layers say why"
)
_EXCLUDED = "nothing can move: include and exclude leave no layer that this closure calls"
FIXED = (
    "nothing can move: in every layer with a null space the inputs do not change with the "
    "parameters, or only within their own span"
)
"""Reason of a report if nothing moves by ``thm-fixed``, though there is room."""

UNFROZEN = (
    " (searched on the model itself: its gradient grows otherwise than with frozen activations. "
    "The move is so large that rounding counts, or a weight takes part past its layer)"
)
"""Added to the reason of a report if the ascent had to be made again on the model itself."""

_OVERFLOW = (
    "the gradient or its derivative is not finite: it leaves the range of the dtype. Scale the "
    "loss down, or compute in bfloat16 or float32"
)
_SMALL = "the square of the gradient is below the range of the dtype. Scale the loss up"


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


class Ascent(GuardedMove):
    """One call of `Teleporter.step`.

    Args:
        settings: how.
        closures: parts of the batch; the loss is their mean.
        held_out: loss of other data, for the report.
        ranks: the processes that teleport together, each with closures of its own.
        metric: of the gradient norm that is to grow.
        kept: values of parameters at the start that somebody holds already.
        object_to: says what else is wrong with where it ended, if anything; told the start and the
            end.
    """

    def __init__(
        self,
        settings: Settings,
        closures: Sequence[Closure],
        held_out: HeldOut,
        ranks: Ranks,
        metric: Metric = EUCLIDEAN,
        kept: Mapping[nn.Parameter, Tensor] | None = None,
        object_to: Callable[[Standing, Standing], str] = lambda before, after: "",
    ) -> None:
        self.object_to, self.kept = object_to, kept
        self.settings, self.closures, self.held_out = settings, closures, held_out
        self.ranks, self.metric, self.norm_name = ranks, metric, metric.name

    # ---- the start, and where it ends

    def _start(self) -> Standing:
        alone = len(self.closures) == 1 and self.ranks.size == 1
        self.fallback, self.unfrozen = "", False
        self._rounded: float | None = None
        self.landscape = self._landscape(frozen=alone and self.settings.tau == 1.0)
        start = self.landscape
        before = self._outcome(start.loss, start.shares()) if self._same() else self._plainly()
        self.bases = self._make_bases()
        return before

    def _landscape(self, frozen: bool) -> Landscape:
        s = self.settings
        return Landscape(
            s.model, s.coverage.sites, self.closures, frozen=frozen, movable=s.movable,
            ranks=self.ranks, metric=self.metric, kept=self.kept,
            once=s.method == "tangent" and s.steps == 1,
        )  # fmt: skip

    def _make_bases(self) -> dict[WeightMatrix, Projector]:
        """Bases of the layers that may move and have room to; full-rank layers are kept for show.

        The tangent direction of a layer whose inputs depend on no parameter is zero, so it needs
        no basis (``thm-fixed``).
        """
        settings = self.settings
        skipped = self.landscape.fixed if settings.method == "tangent" else set()
        able = [b for b in self.landscape.blocks if b.name in settings.movable]
        wanted = [b for b in able if b not in skipped]
        return self.landscape.bases(wanted, settings.tau)

    def _move(self, before: Standing) -> tuple[str, Standing]:
        if not math.isfinite(before.norm):
            return _OVERFLOW, before
        reason = self._ascend()
        if not self.step_sizes:
            return reason, before
        frozen = self.landscape.tape is not None
        said = math.sqrt(self.landscape.norm_squared()) if frozen else math.nan
        after = self._arrive(before)
        if frozen and self._missed(before, after, said):
            self.landscape.write_start()
            self._rounded = None
            del self.landscape  # before the next one is made: memory is that of one
            self.landscape, self.unfrozen = self._landscape(frozen=False), True
            self.bases, self.step_sizes = self._make_bases(), []
            reason = self._ascend()
            after = self._arrive(before) if self.step_sizes else before
        return reason, after

    def _arrive(self, before: Standing) -> Standing:
        """Where it ended: the model runs again with the new parameters.

        A move no longer than twice the weights changes what a layer gives by no more than twice
        what the layer rounds (``thm-rank``): the gradient is that of the tape, unless it is near
        zero, and a forward pass shows that the loss is the same. Everywhere else it is taken anew.
        """
        if self.landscape.tape is not None and self._same() and self.landscape.is_near():
            shares = self.landscape.shares()
            self.landscape.write()  # first, so that rounding finds the weights there
            allowed, cancelled = self._rounding(), self.landscape.tape.cancels()
            self.landscape.tape.forget()
            loss = math.nan if cancelled else mean_loss(self.closures)
            if abs(loss - before.loss) <= allowed:
                return self._outcome(loss, shares)
        self.landscape.write()
        self._rounded = None
        return self._outcome(*self.landscape.measure()) if self._same() else self._plainly()

    def _missed(self, before: Standing, after: Standing, said: float) -> bool:
        """Whether the gradient norm there is another than frozen activations said.

        A direction that is free by the rank rule holds energy up to its cut. A move many times as
        large as the weights changes what it reaches by as many times the rounding (``thm-rank``).
        And a weight of which a view was made beforehand has no tangent, so that the slope is wrong.
        """
        if not self._same():
            return False
        by_growth = self.settings.lr is None and len(self.step_sizes) == self.settings.steps
        wanted = self._limit(before.norm) if by_growth else said
        return max(abs(after.norm - norm) / norm for norm in (said, wanted)) > MISSED

    def _same(self) -> bool:
        """Whether the recorded products are those of the model, to the last bit.

        Layers that autocast computes in another precision than their recorded products, as
        recurrent ones, are another function by its rounding: compare the model with itself.
        """
        return self.landscape.precision == self.landscape.dtype

    def _plainly(self) -> Standing:
        loss, gradient = self.landscape.measure_plainly()
        return self._outcome(loss, shares_of(gradient, self.landscape.blocks, self.metric))

    def _outcome(self, loss: float, shares: Shares) -> Standing:
        norm = self.ranks.of_first(math.sqrt(sum(shares.values())))
        holders = holder_names(self.settings.model)
        squares: dict[str, float] = {}
        for part, square in shares.items():
            name = part.name if isinstance(part, WeightMatrix) else holders[part]
            squares[name] = squares.get(name, 0.0) + square
        # A norm from Gram matrices may be below zero by rounding.
        norms = {name: math.sqrt(max(square, 0.0)) for name, square in squares.items()}
        return Standing(loss, norm, self.held_out.loss(), norms)

    # ---- the steps

    def _ascend(self) -> str:
        """Take the steps; return why they ended."""
        landscape, settings = self.landscape, self.settings
        start = math.sqrt(landscape.norm_squared())
        room = {block: basis for block, basis in self.bases.items() if basis.null_dim > 0}
        if not landscape.blocks:
            return _NO_LAYER
        if not any(block.name in settings.movable for block in landscape.blocks):
            return _EXCLUDED
        if not room:  # layers that are fixed points have no basis: nobody looked for their room
            return NO_ROOM if self.bases else FIXED
        if settings.tau == 1.0:  # their direction is zero, but for rounding (``thm-fixed``)
            room = {b: basis for b, basis in room.items() if b not in landscape.fixed}
            if not room:
                return FIXED
        if start * start < min(torch.finfo(d).tiny for d in (landscape.dtype, torch.float32)):
            return _SMALL if start > 0.0 else "the gradient is zero: there is nothing to enlarge"
        limit = self._limit(start)
        if limit <= start:
            return f"the {self.norm_name} {start:.6g} is already at the cap {limit:.6g}"
        for number in range(1, settings.steps + 1):
            if last := number == settings.steps:
                self.bases = {block: basis.numbers() for block, basis in self.bases.items()}
            along = self._direction(room, last)
            room = {} if last else room
            squares = {block: squared_norm(matrix) for block, matrix in along.items()}
            along = {block: along[block] for block, square in squares.items() if square != 0.0}
            slope = self.ranks.of_first(sum(squares.values()))
            if not math.isfinite(slope):
                return _OVERFLOW
            if slope == 0.0:
                return FIXED if not self.step_sizes else "a stationary point was reached"
            share = number / settings.steps if settings.lr is None else 1.0
            target = start * (limit / start) ** share
            step = self._step_size(along, squares, slope, target)
            if step is None:
                return f"no step along the ascent direction reaches the wanted {self.norm_name}"
            landscape.advance(along, step, target * target if self._estimates() else None)
            self.step_sizes.append(step)
            if settings.lr is not None and step != settings.lr:
                return self._limit_reached(limit)
        return self._limit_reached(limit) if settings.lr is None else "all steps taken"

    def _direction(self, room: dict[WeightMatrix, Projector], last: bool) -> Direction:
        if self.settings.method == "tangent" and not self.fallback:
            try:
                return self.landscape.tangent_direction(room, last)
            except NotImplementedError as error:  # no forward-mode derivative of some operation
                self.fallback = "double backward: " + str(error).partition("\n")[0].split(". ")[0]
        return self.landscape.double_backward_direction(room)

    def _step_size(
        self, along: Direction, squares: Mapping[WeightMatrix, float], slope: float, target: float
    ) -> float | None:
        """The fixed step, or where the norm reaches ``target`` if that comes first."""
        landscape, lr = self.landscape, self.settings.lr
        start = landscape.norm_squared()
        most = max(along, key=squares.__getitem__)
        wanted = target * target  # infinite for the largest limits, where ** would raise
        if lr is not None and landscape.norm_squared_at(along, lr) <= wanted:
            return lr
        return step_to_norm(
            lambda s: landscape.norm_squared_at(along, s),
            start,
            2 * slope,
            wanted,
            rtol=8 * torch.finfo(landscape.precision).eps,
            degree=landscape.degree(along),
            unseen=UNSEEN if self._estimates() else 0.0,
            mixed=1.0 - squares[most] / slope if landscape.degree([most]) == 2 else 1.0,
        )

    def _estimates(self) -> bool:
        """Whether the norm where the search ends may be known from its looks alone; see `UNSEEN`.

        Without frozen activations it is no polynomial (``thm-polynomial``).
        """
        landscape = self.landscape
        exact = landscape.tape is None or landscape.precision == torch.float64
        return not exact and self.settings.cap is None

    def _limit(self, start: float) -> float:
        """The gradient norm the ascent must not exceed."""
        settings = self.settings
        by_growth = math.inf if settings.growth is None else settings.growth * start
        return min(by_growth, math.inf if settings.cap is None else settings.cap)

    def _limit_reached(self, limit: float) -> str:
        if self.settings.cap == limit:
            return f"{self.norm_name} reached the cap {limit:.6g}"
        return f"{self.norm_name} reached {self.settings.growth:.6g} x its start"

    # ---- the verdict

    def _tolerance(self, before: Standing) -> float:
        allowed, settings = DEFAULT_MAX_DRIFT * abs(before.loss), self.settings
        if settings.max_drift is not None:
            return settings.max_drift * abs(before.loss)
        if settings.tau < 1.0:
            return allowed
        # Far out rounding is as large as the loss, and nothing tells whether the loss was kept.
        ceiling = max(allowed, math.sqrt(torch.finfo(self.landscape.dtype).eps))
        return min(self._rounding(), ceiling)

    def _rounding(self) -> float:
        """How far rounding may move the loss where the ascent ended."""
        if self._rounded is None:
            self._rounded = rounding(self.landscape, self.bases)
        return self._rounded

    def _objection(self, before: Standing, after: Standing, allowed: float) -> str:
        why = super()._objection(before, after, allowed)
        if not why:
            return self.object_to(before, after)
        if not math.isfinite(after.norm):
            return why
        self.landscape.write_start()
        again = [mean_loss(self.closures, self.ranks) for _ in range(2)]
        if any(abs(other - before.loss) > allowed for other in again):
            why += "; the closure is not deterministic: at the start it now returns another loss"
        return why

    def _notes(self) -> str:
        how = self.landscape.by_differences or self.fallback
        note = f" (directions by {how})" if how else ""
        return note + UNFROZEN * self.unfrozen

    def _layers(self, before: Standing, end: Standing, failed: bool) -> Iterable[LayerReport]:
        coverage = self.settings.coverage
        rows = [self._layer(block, failed) for block in coverage.blocks]
        for row in [*rows, *frozen_layers(coverage.frozen)]:
            first, last = before.norms.get(row.name), end.norms.get(row.name)
            yield replace(row, grad_norm_before=first, grad_norm_after=last)

    def _layer(self, block: WeightMatrix, failed: bool) -> LayerReport:
        (*groups, d_out, d_in), basis = block.part.matrix_shape, self.bases.get(block)
        reached = self.landscape.move_norm(block)
        moved = 0.0 if failed else reached
        return LayerReport(
            name=block.name,
            kind=block.kind,
            d_in=d_in,
            d_out=d_out,
            rank=None if basis is None else basis.rank,
            null_dim=None if basis is None else basis.null_dim,
            move_norm=moved,
            output_bound=moved * basis.residual if basis and moved else None,
            status=self._status(block, reached, failed),
            groups=math.prod(groups),
        )

    def _status(self, block: WeightMatrix, reached: float, failed: bool) -> str:
        basis = self.bases.get(block)
        if block.name not in self.settings.movable:
            return "excluded"
        if block not in self.landscape.blocks:
            return self.landscape.left_out.get(block, "frozen: not called")
        if basis is not None and basis.null_dim == 0:
            return "full rank: no null space"
        if reached == 0.0:
            return "fixed point" if self.step_sizes or basis is None else "not moved"
        return "rolled back" if failed else "moved"
