"""What all rivals share: one call, one transaction, one guard, one report.

`Rival` measures, lets its subclass move, measures again, and keeps the move or puts everything
back. What is compared is then only the move itself.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from teleport.errors import require
from teleport.guard import GuardedMove, HeldOut, Standing, frozen_layers
from teleport.layers.support import Coverage, cover
from teleport.line_search import load_search
from teleport.report import LayerReport, TeleportReport
from teleport.rivals.batch import Batch
from teleport.rivals.climb import Move
from teleport.runtime.clock import now
from teleport.runtime.closures import Closure
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
            held = HeldOut(None if held_out is None else transaction.repeatable(held_out))
            move = _RivalMove(self, Batch(self.model, repeatable), held)
            report, note = transaction.until_quiet(move.run)
            if report.steps and not report.rolled_back:
                transaction.commit()
        spent = now() - started - held.seconds
        return replace(report, seconds=spent, reason=report.reason + note)


class _RivalMove(GuardedMove):
    """One call of `Rival.step`."""

    def __init__(self, rival: Rival, batch: Batch, held_out: HeldOut) -> None:
        self.rival, self.batch, self.held_out = rival, batch, held_out

    def _start(self) -> Standing:
        self._from = {block: block.part.matrix() for block in self.rival.coverage.blocks}
        return self._outcome()

    def _outcome(self) -> Standing:
        return Standing(*self.batch.measure(), self.held_out.loss())

    def _move(self, before: Standing) -> tuple[str, Standing]:
        move = self.rival._move(self.batch, before.loss, before.norm)
        self.step_sizes = list(move.step_sizes)
        return move.reason, self._outcome() if move.step_sizes else before

    def _tolerance(self, before: Standing) -> float:
        share = self.rival.max_drift
        return math.inf if share is None else share * abs(before.loss)

    def _layers(self, before: Standing, end: Standing, failed: bool) -> Iterable[LayerReport]:
        for block, start in self._from.items():
            norm = 0.0 if failed else float((block.part.matrix() - start).norm())
            status = "rolled back" if failed else "moved" if norm else "not moved"
            *groups, d_out, d_in = start.shape
            count = math.prod(groups)
            yield LayerReport(
                block.name, block.kind, d_in, d_out, None, None, norm, None, status, count
            )
        yield from frozen_layers(self.rival.coverage.frozen)
