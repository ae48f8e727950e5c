"""Teleports in the ``Trainer`` of Hugging Face's transformers: `TeleportCallback`."""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch import Tensor

from teleport.integrations.attributes import mute
from teleport.integrations.teleports import ONCE, Teleports, scalars
from teleport.report import TeleportReport
from teleport.schedule import Schedule

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ImportError as error:
    raise ImportError(
        "teleport.integrations.transformers needs transformers and Accelerate: "
        f"pip install 'nullspace-teleport[transformers]' ({error})"
    ) from error


class TeleportCallback(TrainerCallback):
    """Teleports by a schedule, on the batches that a ``Trainer`` trains on.

    After an optimizer step at which a teleport is due, the model is teleported on the batch of
    that step; with ``gradient_accumulation_steps`` on all its micro-batches together, by the
    trainer's own ``compute_loss``, normalised as in training and in its precision. A callback is
    told neither the batch nor the loss, so this one takes the trainer: add it afterwards. During
    the steps before a teleport, and no others, ``trainer.compute_loss`` keeps what it is called
    with. What ``compute_loss`` logs or keeps in attributes meanwhile does not count. In
    ``DistributedDataParallel`` all ranks teleport together, each with its own batch.

    A refused or failed teleport is a line of warning (logger ``teleport.integrations``); training
    goes on with the model as it was. A run that goes on from a checkpoint does not do again
    what lies before the step of the checkpoint: a teleport is in the checkpoint of its step. With
    ``schedule.batches`` > 1 a teleport right after that takes the batches seen since.

    Args:
        schedule: when; epochs are counted in optimizer steps.
        trainer: whose batches and loss.
        arguments: of `teleport.Teleporter`, but for the model and the optimizer: the latter is the
            trainer's with ``objective="preconditioned"`` or ``growth="auto"``.

    Raises:
        TypeError: for an unknown argument, or something else than a trainer.
        ValueError: for one out of range; when training begins for patterns that match no layer.

    Example:
        ``trainer.add_callback(TeleportCallback(teleport.Schedule(), trainer=trainer, growth=1.5))``
    """

    def __init__(self, schedule: Schedule = ONCE, *, trainer: Any, **arguments: Any) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"trainer must be a transformers.Trainer, got {type(trainer).__name__}: make it "
                "first, and add the callback by trainer.add_callback"
            )
        self.trainer = trainer
        self._teleports = Teleports(schedule, arguments)

    @property
    def reports(self) -> list[tuple[int, TeleportReport]]:
        """The teleports of this process, each with the number of optimizer steps before it."""
        return self._teleports.reports

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **options: Any,
    ) -> None:
        """Check what can be checked before it takes time.

        Raises:
            ValueError, UnsupportedModelError: for arguments that do not fit the model, and in the
                training of another trainer.
        """
        if state is not self.trainer.state:
            raise ValueError(
                "this callback was made for another trainer, whose batches it would wait for: make "
                "it with the trainer that it is added to, TeleportCallback(trainer=trainer)"
            )
        _Listening.stop(self.trainer, self._teleports)  # the last training may have been stopped
        self._teleports.done = None  # the step tells
        self._teleports.start(
            self.trainer.model_wrapped,
            _inner(options.get("optimizer")),
            state.global_step,
            _steps_per_epoch(options.get("train_dataloader"), args),
        )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **options: Any,
    ) -> None:
        """Keep the batches of this step if a teleport will be on them."""
        self._teleports.begin_window()
        if self._teleports.wants(state.global_step):
            _Listening.start(self.trainer, self._teleports)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **options: Any,
    ) -> None:
        """Teleport if it is time, between two optimizer steps."""
        _Listening.stop(self.trainer, self._teleports)
        if not self._teleports.end_window(state.global_step):
            return
        trainer = self.trainer
        with mute([trainer]):  # a loss may log, as some trainers' do
            reports = self._teleports.teleport(
                state.global_step,
                trainer.model_wrapped,
                _inner(options.get("optimizer")),
                getattr(trainer.accelerator, "scaler", None),
                [trainer, *trainer.model_wrapped.modules()],
            )
        should_log = control.should_log  # of the training loss; logging anything clears it
        for told in filter(None, map(scalars, reports)):
            trainer.log(told)
        control.should_log = should_log

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **options: Any,
    ) -> None:
        """Say which teleports never came."""
        self._teleports.end(state.global_step)


class _Listening:
    """In the place of a trainer's ``compute_loss``: calls it, and tells what it is called with.

    There is one for a trainer, however many callbacks it has: it is there as long as one listens.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._own = trainer, vars(trainer).get("compute_loss")
        self._compute_loss = trainer.compute_loss
        self._told: list[Teleports] = []

    def __call__(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        for teleports in self._told if torch.is_grad_enabled() else ():  # evaluation has none
            loss = _loss(self._trainer, self._compute_loss, model, args, options)
            teleports.add(inputs, loss)
        return self._compute_loss(model, inputs, *args, **options)

    @staticmethod
    def start(trainer: Trainer, teleports: Teleports) -> None:
        """Tell these teleports, too."""
        there = vars(trainer).get("compute_loss")
        if not isinstance(there, _Listening):
            there = vars(trainer)["compute_loss"] = _Listening(trainer)
        if teleports not in there._told:
            there._told.append(teleports)

    @staticmethod
    def stop(trainer: Trainer, teleports: Teleports) -> None:
        """Tell these no more."""
        there = vars(trainer).get("compute_loss")
        if not isinstance(there, _Listening) or teleports not in there._told:
            return
        there._told.remove(teleports)
        if not there._told:
            del vars(trainer)["compute_loss"]
            if there._own is not None:
                vars(trainer)["compute_loss"] = there._own


def _loss(
    trainer: Trainer,
    compute_loss: Callable[..., Any],
    model: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> Callable[[Any], Tensor]:
    """The loss of inputs, such that the mean over the micro-batches is the loss of the step."""
    count = options.get("num_items_in_batch")
    parts = getattr(trainer, "current_gradient_accumulation_steps", 1)
    factor = parts if _sums(trainer, count) else 1

    def loss(inputs: Any) -> Tensor:
        with trainer.compute_loss_context_manager():
            found = compute_loss(model, inputs, *args, **options)
        value: Tensor = found[0] if isinstance(found, tuple) else found
        return value if factor == 1 else factor * value

    return loss


def _sums(trainer: Trainer, count: Any) -> bool:
    """Whether the losses of the micro-batches are parts of a sum: as `Trainer.training_step`."""
    told: bool | None = getattr(trainer, "loss_is_scaled_for_ga", None)
    if told is not None:
        return told
    by_model = trainer.model_accepts_loss_kwargs and count is not None
    return by_model or trainer.compute_loss_func is not None


def _steps_per_epoch(loader: Any, args: TrainingArguments) -> int | None:
    try:
        return ceil(len(loader) / args.gradient_accumulation_steps)
    except TypeError:  # an iterable data set
        return None


def _inner(optimizer: Any) -> Any:
    """The optimizer that Accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
