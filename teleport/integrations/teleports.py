"""The teleports of one training run, whoever trains: when, on which batches, what came of them."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD

from teleport.errors import ClosureError, UnsupportedModelError
from teleport.integrations.attributes import undisturbed
from teleport.report import TeleportReport
from teleport.runtime.closures import Closure
from teleport.schedule import Schedule
from teleport.teleporter import Teleporter

_logger = logging.getLogger("teleport.integrations")

ONCE = Schedule()
"""One teleport, after 50 steps."""

_PATTERNS = ("include", "exclude")
"""Arguments that nobody can check without the model."""


class Teleports:
    """The teleports of one training run.

    A *window* is what one optimizer step is made of: a batch, or the micro-batches whose gradients
    are accumulated. A teleport comes between two windows, never in one; its batch is the window
    just trained on, a closure for each micro-batch. With ``schedule.batches`` = k it is the last k
    windows, one after the other, and so never before step k.

    Args:
        schedule: when.
        arguments: of `Teleporter`, but for the model and the optimizer, which are the trainer's.

    Attributes:
        reports: each with the number of the optimizer step after which it was.
        done: how many of the schedule's teleports lie behind; None if nobody knows.

    Raises:
        TypeError: for an unknown argument.
        ValueError: for one out of range.
    """

    def __init__(self, schedule: Schedule, arguments: Mapping[str, Any]) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a teleport.Schedule, got {schedule!r}")
        _check(arguments)
        self.schedule, self.arguments = schedule, dict(arguments)
        self.reports: list[tuple[int, TeleportReport]] = []
        self.done: int | None = None
        self._due: list[int] = []
        self._windows: deque[list[Closure]] = deque(maxlen=schedule.batches)
        self._parts: list[Closure] = []
        self._decides = arguments.get("growth") == "auto"
        self._deciding: Teleporter | None = None

    def start(
        self, model: nn.Module, optimizer: Any, step: int, steps_per_epoch: int | None
    ) -> None:
        """Training begins, or goes on, after so many optimizer steps.

        Args:
            model: what will be teleported.
            optimizer: of the preconditioned objective.
            step: optimizer steps behind; 0 forgets what was done before.
            steps_per_epoch: optimizer steps of an epoch; None if the data have no length.

        Raises:
            ValueError: for patterns that match no layer, for an optimizer that gives no
                preconditioner, and if the schedule needs a length that is not known.
            UnsupportedModelError: with ``strict``, if a layer is frozen.
        """
        self._windows.clear()
        self._parts, self._deciding = [], None
        if steps_per_epoch is None and self.schedule.epochs > 1:
            raise ValueError(
                f"nobody knows when epoch 2 of {self.schedule.epochs} begins: the training data "
                "have no length. Use Schedule(epochs=1), or bound the batches of an epoch"
            )
        due = self.schedule.due_steps(steps_per_epoch or 1)
        self._due = sorted({max(number, self.schedule.batches) for number in due})
        if step == 0:
            self.done = 0
        elif self.done is None:
            self.done = sum(number <= step for number in self._due)
        if self._due:
            try:
                self._teleporter(model, optimizer, 1.0)
            except UnsupportedModelError:
                if self.arguments.get("strict"):
                    raise  # else it is a line when its time comes: layers may change until then

    def wants(self, step: int) -> bool:
        """Whether the window after so many steps will serve a teleport."""
        due = self._next()
        return due is not None and step + 1 > due - self.schedule.batches

    def begin_window(self) -> None:
        """An optimizer step begins; what was kept of one that did not end is forgotten."""
        self._parts = []

    def add(self, batch: Any, loss: Callable[[Any], Tensor]) -> None:
        """Keep a micro-batch of this window.

        Args:
            batch: copied, so that a training step may overwrite it; every call gets a copy, too.
            loss: of the batch, as often as it is called.
        """
        try:
            kept = deepcopy(batch)
        except Exception as error:  # on one rank alone, perhaps: all hear of it in the teleport
            self._parts.append(partial(_fail, f"the batch cannot be copied: {error}"))
        else:
            self._parts.append(lambda: loss(deepcopy(kept)))

    def end_window(self, step: int) -> bool:
        """An optimizer step, this many by now, has ended; whether a teleport is due."""
        if self._parts:
            self._windows.append(self._parts)
        self._parts = []
        due = self._next()
        return due is not None and step >= due

    def teleport(
        self, step: int, model: nn.Module, optimizer: Any, scaler: Any, holders: Iterable[Any]
    ) -> list[TeleportReport]:
        """Teleport on the windows kept; what fails is a line of warning, the model as before.

        Args:
            step: optimizer steps behind.
            model: what is teleported.
            optimizer: of the preconditioned objective.
            scaler: a gradient scaler: the loss is scaled as in training; or None.
            holders: whose attributes the training step may write to.

        Returns:
            A report for each window on which there was something to report.
        """
        windows, reports = list(self._windows), []
        self._windows.clear()
        scaled = scaler is not None and not self._decides  # who decides compares with real steps
        scale = float(scaler.get_scale()) if scaled else 1.0
        if not windows:
            _warn(step, "no batch was seen")
        for window in windows:
            try:
                with undisturbed(holders) as as_before:
                    teleporter = self._teleporter(model, optimizer, scale)
                    report = teleporter.step([partial(_run, p, scale, as_before) for p in window])
            except Exception as error:  # whatever it is, training goes on
                _warn(step, f"{type(error).__name__}: {error}")
                continue
            report = _unscaled(report, scale)
            if report.rolled_back or not report.steps:
                _warn(step, report.reason)
            reports.append(report)
        self.done = sum(number <= step for number in self._due)  # now: Ctrl-C may have come before
        self.reports += [(step, report) for report in reports]
        return reports

    def end(self, step: int) -> None:
        """Training has ended after so many optimizer steps; say which teleports never came."""
        if left := self._due[self.done or 0 :]:
            _logger.warning(
                "training ended after step %d, before the teleports due after %s: a Schedule with "
                "fewer warmup_steps or epochs has them earlier",
                step,
                _steps(left),
            )

    def _next(self) -> int | None:
        """The optimizer step after which the next teleport is due."""
        done = self.done or 0
        return self._due[done] if done < len(self._due) else None

    def _teleporter(self, model: nn.Module, optimizer: Any, scale: float) -> Teleporter:
        """For a loss times ``scale``: gradients grow by it, the way to more of them by its square.

        Errors as of `Teleporter`.
        """
        own = {name: value for name, value in self.arguments.items() if value is not None}
        if self._decides:  # one for the whole training, whose steps it counts
            if self._deciding is None:
                self._deciding = Teleporter(model, **own, **_optimizer_for(own, optimizer))
            return self._deciding
        if "cap" in own:
            own["cap"] *= scale
        if "lr" in own:
            own["lr"] /= scale**2
        return Teleporter(model, **own, **_optimizer_for(own, optimizer))


def scalars(report: TeleportReport) -> dict[str, float]:
    """What a trainer's logger gets of a report; nothing if nothing was looked at."""
    if math.isnan(report.loss_before):
        return {}
    return {
        "teleport/growth": report.growth,
        "teleport/grad_norm_before": report.grad_norm_before,
        "teleport/grad_norm_after": report.grad_norm_after,
        "teleport/drift": report.drift,
        "teleport/seconds": report.seconds,
    }


def _check(arguments: Mapping[str, Any]) -> None:
    """Raise for arguments that no model would make right."""
    for name in ("model", "optimizer"):
        if name in arguments:
            raise TypeError(f"the {name} is the trainer's: leave {name}= out")
    layer = nn.utils.skip_init(nn.Linear, 1, 1)  # its values would be drawn
    known = {n: v for n, v in arguments.items() if n not in _PATTERNS or isinstance(v, str)}
    Teleporter(layer, **known, **_optimizer_for(known, SGD(layer.parameters(), lr=1.0)))


def _optimizer_for(arguments: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """The optimizer as an argument, if the objective or the growth asks for it."""
    asked = arguments.get("objective") == "preconditioned" or arguments.get("growth") == "auto"
    return {"optimizer": optimizer} if asked else {}


def _run(closure: Closure, scale: float, as_before: Callable[[], None]) -> Tensor:
    """The loss, as the first run found things: a step may count, or keep a state for the next."""
    as_before()
    loss = closure()
    return loss if scale == 1.0 or not isinstance(loss, Tensor) else scale * loss


def _unscaled(report: TeleportReport, scale: float) -> TeleportReport:
    """The report for the loss itself."""
    if scale == 1.0:
        return report
    names = ("loss_before", "loss_after", "grad_norm_before", "grad_norm_after", "tolerance")
    return replace(
        report,
        **{name: getattr(report, name) / scale for name in names},
        step_sizes=tuple(size * scale**2 for size in report.step_sizes),
        layers=tuple(
            layer
            if layer.grad_norm_before is None or layer.grad_norm_after is None
            else replace(
                layer,
                grad_norm_before=layer.grad_norm_before / scale,
                grad_norm_after=layer.grad_norm_after / scale,
            )
            for layer in report.layers
        ),
    )


def _steps(numbers: Sequence[int]) -> str:
    """The first few."""
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"step{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:5]))}{more}"


def _fail(why: str) -> Tensor:
    raise ClosureError(why)


def _warn(step: int, why: str) -> None:
    """One line."""
    _logger.warning("no teleport after step %d: %s", step, " ".join(why.split()))
