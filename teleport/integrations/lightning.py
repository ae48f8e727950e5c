"""Teleports in Lightning's ``Trainer``: `TeleportCallback`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil, isinf
from typing import Any

from torch import Tensor, nn

from teleport.errors import UnsupportedModelError
from teleport.integrations.attributes import mute
from teleport.integrations.teleports import ONCE, Teleports, scalars
from teleport.report import TeleportReport
from teleport.schedule import Schedule

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
except ImportError as error:
    raise ImportError(
        "teleport.integrations.lightning needs Lightning: "
        f"pip install 'nullspace-teleport[lightning]' ({error})"
    ) from error


class TeleportCallback(Callback):
    """Teleports by a schedule, on the batches that Lightning trains on.

    After an optimizer step at which a teleport is due, the model is teleported on the batch of
    that step; with ``accumulate_grad_batches`` on all its micro-batches together, by the loss that
    ``training_step`` gives in the trainer's precision. What ``training_step`` logs or keeps in
    attributes meanwhile, metrics included, does not count. In
    ``DistributedDataParallel`` all ranks teleport together, each with its own batch.

    A refused or failed teleport is a line of warning (logger ``teleport.integrations``); training
    goes on with the model as it was. What was done is in the state of the callback, so that
    a run that goes on from a checkpoint does not do it again. With ``schedule.batches`` > 1 a
    teleport right after that takes the batches seen since.

    Args:
        schedule: when; epochs are counted in optimizer steps, with the accumulation at the start.
        arguments: of `teleport.Teleporter`, but for the model and the optimizer: the latter is the
            trainer's with ``objective="preconditioned"`` or ``growth="auto"``.

    Raises:
        TypeError: for an unknown argument.
        ValueError: for one out of range; at the start of the fit for patterns that match no layer.

    Example:
        >>> callback = TeleportCallback(Schedule(epochs=1, warmup_steps=50), growth=1.5)
        >>> trainer = Trainer(max_epochs=1, callbacks=[callback], logger=False)
    """

    def __init__(self, schedule: Schedule = ONCE, **arguments: Any) -> None:
        super().__init__()
        self._teleports = Teleports(schedule, arguments)
        self._begun = 0

    @property
    def reports(self) -> list[tuple[int, TeleportReport]]:
        """The teleports of this process, each with the number of optimizer steps before it."""
        return self._teleports.reports

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what can be checked before it takes time.

        Raises:
            ValueError, UnsupportedModelError: for arguments that do not fit the model; for modules
                that step their optimizers themselves or fetch their own batches.
        """
        if self._teleports.schedule.epochs:
            _require_closure(pl_module)
        self._begun = trainer.global_step  # a checkpoint may lie in the middle of a step
        batches = trainer.num_training_batches
        length = None if isinf(batches) else ceil(batches / trainer.accumulate_grad_batches)
        self._teleports.start(
            _model(trainer),
            next(iter(trainer.optimizers), None),
            trainer.global_step,
            length,
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch if a teleport will be on it."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._begun = trainer.global_step
            self._teleports.begin_window()
        if self._teleports.wants(self._begun):
            self._teleports.add(batch, lambda copy: _loss(trainer, pl_module, copy, batch_idx))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Teleport if it is time, between two optimizer steps."""
        step = trainer.global_step
        if step == self._begun or not self._teleports.end_window(step):
            return
        with _mute(trainer, pl_module):
            reports = self._teleports.teleport(
                step,
                _model(trainer),
                trainer.optimizers[0],
                getattr(trainer.precision_plugin, "scaler", None),
                list(pl_module.modules()),
            )
        for report in reports:
            for logger in trainer.loggers if scalars(report) else ():
                logger.log_metrics(scalars(report), step=step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which teleports never came."""
        self._teleports.end(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """How many of the schedule's teleports lie behind."""
        return {"done": self._teleports.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._teleports.done = state_dict["done"]


def _model(trainer: Trainer) -> nn.Module:
    """The module, in the wrapper that the strategy has put it into."""
    model = trainer.strategy.model
    assert model is not None
    return model


def _require_closure(module: LightningModule) -> None:
    """Raise unless ``training_step`` gives the loss of a batch, as often as it is asked."""
    if not module.automatic_optimization:
        raise UnsupportedModelError(
            "TeleportCallback needs automatic optimization: with automatic_optimization=False "
            "training_step moves the parameters itself. Call teleport.Teleporter.step there"
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise UnsupportedModelError(
            "TeleportCallback needs a training_step(batch, batch_idx): one that takes a "
            "dataloader_iter has another batch each time. Call teleport.Teleporter.step there"
        )


def _loss(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """The loss of a batch, called as Lightning calls it: in its precision, through its wrapper."""
    arguments = [batch]
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        arguments.append(batch_idx)
    output = trainer.strategy.training_step(*arguments)
    loss: Tensor = output["loss"] if isinstance(output, Mapping) else output  # type: ignore[assignment]
    return loss


@contextmanager
def _mute(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Nothing is logged: neither by ``self.log`` nor by ``self.logger``."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        with mute(m for m in module.modules() if isinstance(m, LightningModule)):
            yield
    finally:
        trainer.loggers = loggers
