"""One guarded move: measure, move, measure again, and say what is wrong with where it ended.

`Teleporter` and its rivals move within the same guard, so that only the moves differ.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from teleport.errors import GroupElementError, NonFiniteLossError
from teleport.landscape import Landscape
from teleport.layers.part import Pieces
from teleport.layers.support import WeightMatrix
from teleport.objective import mean_loss
from teleport.recording import Call
from teleport.report import LayerReport, TeleportReport
from teleport.runtime.clock import now
from teleport.runtime.closures import Closure
from teleport.runtime.precision import at_least_single, sum_rounding
from teleport.runtime.ranks import ALONE, Ranks
from teleport.subspace import Projector

DEFAULT_MAX_DRIFT = 0.01
"""Relative loss change allowed where the level set is left by design, and at most elsewhere."""


@dataclass(frozen=True)
class Standing:
    """Where a move began or ended: the numbers of the report that depend on it.

    Attributes:
        loss: of the batch.
        norm: of its gradient.
        held_out: loss of other data; None without any.
        norms: the parts of ``norm`` by layer, as far as the parameters are one layer's.
    """

    loss: float
    norm: float
    held_out: float | None = None
    norms: Mapping[str, float] = field(default_factory=dict)


class HeldOut:
    """The loss of data that a move does not see, and the time it took, which is not the move's."""

    def __init__(self, closure: Closure | None, ranks: Ranks = ALONE) -> None:
        self._closure, self._ranks = closure, ranks
        self.seconds = 0.0

    def loss(self) -> float | None:
        """None without data; NaN where it is not finite: it is only reported, nothing is undone."""
        if self._closure is None:
            return None
        started = now()
        try:
            return mean_loss([self._closure], self._ranks)
        except NonFiniteLossError:
            return math.nan
        finally:
            self.seconds += now() - started


class GuardedMove(ABC):
    """One move of a model within its transaction; leaves the model where it ends.

    Attributes:
        step_sizes: how far along each direction, as far as it got.
        norm_name: of the gradient norm, for the report.
    """

    step_sizes: list[float]
    norm_name: str = "gradient norm"

    def run(self) -> TeleportReport:
        """Measure, move, measure; a report with steps and without ``rolled_back`` is to be kept.

        It can be run again: each run begins at the model as it is.
        """
        self.step_sizes = []
        before = after = self._start()
        reason, failure, tolerance = "", "", 0.0
        try:
            reason, after = self._move(before)
            tolerance = self._tolerance(before)
            failure = self._objection(before, after, tolerance) if self.step_sizes else ""
        except NonFiniteLossError:
            failure = "the loss became NaN or infinite on the way"
        except GroupElementError as error:
            failure = str(error)
        end = before if failure else after
        return TeleportReport(
            loss_before=before.loss,
            loss_after=end.loss,
            grad_norm_before=before.norm,
            grad_norm_after=end.norm,
            held_out_before=before.held_out,
            held_out_after=end.held_out,
            tolerance=tolerance,
            steps=len(self.step_sizes),
            step_sizes=tuple(self.step_sizes),
            rolled_back=bool(failure),
            reason=(failure or reason) + self._notes(),
            seconds=0.0,
            layers=tuple(self._layers(before, end, bool(failure))),
            norm=self.norm_name,
        )

    @abstractmethod
    def _start(self) -> Standing:
        """Measure the start."""

    @abstractmethod
    def _move(self, before: Standing) -> tuple[str, Standing]:
        """Move and measure; why it ended, and where."""

    @abstractmethod
    def _tolerance(self, before: Standing) -> float:
        """How far the loss may be from where it began."""

    def _objection(self, before: Standing, after: Standing, allowed: float) -> str:
        """What is wrong with the new position, if anything."""
        if not math.isfinite(after.norm):
            return f"the gradient norm became {after.norm}"
        drift = abs(after.loss - before.loss)
        if drift <= allowed:
            return ""
        return f"the loss moved by {drift:.2e}, more than the allowed {allowed:.2e}"

    def _notes(self) -> str:
        """What else the reason has to say."""
        return ""

    @abstractmethod
    def _layers(self, before: Standing, end: Standing, failed: bool) -> Iterable[LayerReport]:
        """One report for every layer."""


def frozen_layers(frozen: Mapping[str, str]) -> Iterable[LayerReport]:
    """Reports of the layers that are not covered, from the reasons by name."""
    for name, why in frozen.items():
        yield LayerReport(name, "", None, None, None, None, 0.0, None, f"frozen: {why}")


def rounding(landscape: Landscape, bases: Mapping[WeightMatrix, Projector]) -> float:
    """How far the loss may move at τ = 1, to first order in the cotangents δ.

    Both parts are those of ``thm-rank``, in the one unit of the rank rule, `sum_rounding`. An
    output is a sum of d products; with probability 1 - 7e-4 its rounding error is at most
    2 √d eps ‖w‖ ‖x‖ (λ = 4), before the move and after it; half precision rounds once more,
    after summing in float32, and its weights to as much. The error reaches the loss through δ;
    outputs of one row add in quadrature, rows may share their errors. On what the rank rule
    cuts off ΔW acts, by at most ‖ΔW‖_F `Projector.cut_off`.
    """
    totals = list[float]()
    with landscape.ranks.together():
        for tape, _ in landscape.tapes():
            total = sum(_call_rounding(landscape, call) for call in tape.calls)
            moved = [b for b in tape.blocks if b in bases and landscape.move_norm(b)]
            for block in moved:  # in order: it decides rounding
                deltas = (c.delta for c in tape.calls_of(block) if c.delta is not None)
                norms = [float(at_least_single(delta).norm()) for delta in deltas]
                drift = landscape.move_norm(block) * bases[block].cut_off
                total += math.hypot(*norms) * drift
            totals.append(total)
            del tape  # before the next one is recorded
    own = 8 * torch.finfo(landscape.dtype).eps * abs(landscape.loss)
    return own + landscape.ranks.mean(sum(totals) / len(totals))


def _call_rounding(landscape: Landscape, call: Call) -> float:
    """The rounding errors of one call's outputs, before the move and after it."""
    if call.delta is None:
        return 0.0
    part, block, dtype = call.part, call.block, call.z.dtype
    start, here = landscape.start_of(block), block.part.pieces()

    def norms(pieces: Pieces) -> Tensor:
        return part.out_norms(tuple(map(at_least_single, pieces[: len(part.slots)])))

    still = block not in landscape.position
    weights = norms(start) * math.sqrt(2) if still else norms(start).hypot(norms(here))
    errors = part.weighted_norms(at_least_single(call.delta), weights)
    errors *= part.row_norms(at_least_single(call.x.detach()))
    unit = max(sum_rounding(dtype, part.matrix_shape[-1]), torch.finfo(dtype).eps)
    return 2 * unit * float(errors.sum())
