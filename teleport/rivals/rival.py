"""What all rivals share: one call, one transaction, one guard, one report.

`Rival` measures, lets its subclass move, measures again, and keeps the move or puts everything
back. What is compared is then only the move itself.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from teleport.errors import GroupElementError, NonFiniteLossError
from teleport.layers.support import Block, Coverage, cover
from teleport.line_search import load_search
from teleport.recording import Closure, evaluate, without_gradients
from teleport.report import LayerReport, TeleportReport
from teleport.rivals.batch import Batch, require
from teleport.rivals.climb import Move
from teleport.runtime.clock import now
from teleport.runtime.transaction import Transaction

MAX_DRIFT = 0.01
"""Relative change of the batch loss beyond which a rival that means to keep it is rolled back."""


class Rival(ABC):
    """A way to other parameters with the call of `teleport.Teleporter`.

    Parameters change in place, so optimizers stay valid. If the loss moved by more than
    ``max_drift``, if anything became NaN or was raised, the model is exactly as before.

    Args:
        model: what to move.
        max_drift: largest relative change of the batch loss; None for no bound.
    """

    def __init__(self, model: nn.Module, max_drift: float | None) -> None:
        require("max_drift", max_drift, max_drift is None or max_drift >= 0.0, ">= 0")
        self.model = model
        self.max_drift = max_drift
        self.coverage: Coverage = cover(model)

    @abstractmethod
    def _move(self, batch: Batch, loss: float, norm: float) -> Move:
        """Change the parameters; loss and gradient norm are those at the start."""

    def step(
        self, closure: Closure | Sequence[Closure], *, held_out: Closure | None = None
    ) -> TeleportReport:
        """Move on one batch.

        Args:
            closure: returns the scalar loss of the batch, deterministic, without calling
                ``backward``. A list of closures is one batch in equal parts.
            held_out: returns the loss of data the move does not see, for the report only.

        Returns:
            What was done, in the form of `Teleporter.step`.

        Raises:
            ClosureError: if the closure or its batch is unusable; the model is as before.
        """
        load_search()
        started = now()
        parts = [closure] if callable(closure) else list(closure)
        require("closure", closure, bool(parts), "a closure or a list of at least one")
        with torch.inference_mode(False), Transaction(self.model) as transaction:
            repeatable = [transaction.repeatable(part) for part in parts]
            held = None if held_out is None else _HeldOut(transaction.repeatable(held_out))
            batch = Batch(self.model, repeatable)
            report, note = transaction.until_quiet(lambda: self._attempt(batch, held))
            if report.steps and not report.rolled_back:
                transaction.commit()
        spent = now() - started - (held.seconds if held else 0.0)
        return replace(report, seconds=spent, reason=report.reason + note)

    def _attempt(self, batch: Batch, held_out: "_HeldOut | None") -> TeleportReport:
        before = batch.measure()
        held_before = held_out.loss() if held_out else None
        start = {block: block.part.matrix() for block in self.coverage.blocks}
        tolerance = math.inf if self.max_drift is None else self.max_drift * abs(before[0])
        move, after, held_after, failure = Move((), ""), before, held_before, ""
        try:
            move = self._move(batch, *before)
            if move.step_sizes:
                after = batch.measure()
                held_after = held_out.loss() if held_out else None
                failure = _objection(before[0], after, tolerance)
        except NonFiniteLossError:
            failure = "the loss became NaN or infinite on the way"
        except GroupElementError as error:
            failure = str(error)
        moved = {
            block: 0.0 if failure else float((block.part.matrix() - matrix).norm())
            for block, matrix in start.items()
        }
        return TeleportReport(
            loss_before=before[0],
            loss_after=before[0] if failure else after[0],
            grad_norm_before=before[1],
            grad_norm_after=before[1] if failure else after[1],
            held_out_before=held_before,
            held_out_after=held_before if failure else held_after,
            tolerance=tolerance,
            steps=len(move.step_sizes),
            step_sizes=move.step_sizes,
            rolled_back=bool(failure),
            reason=failure or move.reason,
            seconds=0.0,
            layers=tuple(self._layer_reports(moved, bool(failure))),
        )

    def _layer_reports(self, moved: dict[Block, float], failed: bool) -> list[LayerReport]:
        def report(block: Block, norm: float) -> LayerReport:
            status = "rolled back" if failed else "moved" if norm else "not moved"
            *groups, d_out, d_in = block.part.matrix().shape
            count = math.prod(groups)
            return LayerReport(
                block.name, block.kind, d_in, d_out, None, None, norm, None, status, count
            )

        frozen = (
            LayerReport(name, "", None, None, None, None, 0.0, None, f"frozen: {why}")
            for name, why in self.coverage.frozen.items()
        )
        return [*(report(block, norm) for block, norm in moved.items()), *frozen]


def _objection(loss: float, after: tuple[float, float], allowed: float) -> str:
    """What is wrong with the new position, if anything."""
    if not math.isfinite(after[1]):
        return f"the gradient norm became {after[1]}"
    drift = abs(after[0] - loss)
    if drift <= allowed:
        return ""
    return f"the loss moved by {drift:.2e}, more than the allowed {allowed:.2e}"


class _HeldOut:
    """The held-out loss, and the time it took, which is not the move's."""

    def __init__(self, closure: Closure) -> None:
        self.closure = closure
        self.seconds = 0.0

    def loss(self) -> float:
        started = now()
        try:
            return float(without_gradients(partial(evaluate, self.closure)).detach())
        except NonFiniteLossError:
            return math.nan  # only reported: no reason to undo anything
        finally:
            self.seconds += now() - started
