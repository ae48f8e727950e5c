"""One training run: an arm, a seed, a record, and a state that can be saved and restored."""

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teleport.data import Dataset, batches, take
from teleport.errors import NonFiniteLossError, RunError
from teleport.lab.experiments.arms import Arm, RunSettings
from teleport.lab.experiments.entry import Preset
from teleport.lab.experiments.interventions import Subject, intervene
from teleport.lab.experiments.models import initialise
from teleport.lab.experiments.optimizers import find_optimizer, within_range
from teleport.lab.records.checkpoint import foreign, is_plain, load_checkpoint
from teleport.lab.records.writer import RecordWriter
from teleport.objective import grad_norm, trainable
from teleport.runtime.clock import now
from teleport.runtime.closures import Closure


def train_size(size: Preset, dataset: Dataset) -> int:
    """Training examples that are used."""
    return min(size.train_size or len(dataset.train_inputs), len(dataset.train_inputs))


def separate_draws(seed: int, use: int = 1) -> torch.Generator:
    """Random numbers of a run apart from the order of its data, which they must not change.

    They are for one use: 1, teleport batches; 2, trials; 3, another order of the data.
    """
    return torch.Generator().manual_seed(seed + use * 1_000_000 + 3)


def check_fits(settings: RunSettings, dataset: Dataset, teleports: bool = True) -> None:
    """Refuse, before anything is written, what every run would break off with.

    Raises:
        RunError: if the training examples are fewer than a batch, or where one teleports than a
            teleport and its held-out data, or if the network cannot be built for the data and
            applied to them.
    """
    size, options = settings.size(), settings.teleport
    count = train_size(size, dataset)
    needs = {"a training batch needs": settings.batch()}
    if teleports:
        wanted = options.batch_size + options.held_out_size
        needs["a teleport batch and its held-out data need"] = wanted
    for what, wanted in needs.items():
        if count < wanted:
            raise RunError(
                f"{what} {wanted} examples, the preset {settings.preset} of "
                f"{settings.experiment} trains on {count}; give it a larger train_size"
            )
    _check_network(settings, dataset)


def _check_network(settings: RunSettings, dataset: Dataset) -> None:
    inputs, targets = dataset.train_inputs[:2], dataset.train_targets[:2]
    wanted = targets.shape if dataset.loss_kind == "mse" else (*targets.shape, dataset.outputs)
    try:
        model = settings.recipe().build(dataset, settings.size(), settings.activation)
        with torch.no_grad():
            outputs = model.to(targets.device).eval()(dataset.prepare(inputs))
        if outputs.shape != wanted:  # the loss would broadcast some of those that are not
            raise ValueError(
                f"for {len(inputs)} examples its outputs are {list(outputs.shape)}, where the loss "
                f"needs {list(wanted)}"
            )
        dataset.loss(outputs, targets)
    except Exception as error:  # PyTorch raises errors of many kinds for sizes that do not fit
        raise RunError(
            f"the network {settings.recipe().network['kind']!r} of {settings.experiment} does not "
            f"fit the data set {dataset.name}: {str(error).splitlines()[0]}"
        ) from error


def late_teleport(settings: RunSettings, dataset: Dataset) -> str:
    """What to tell the user if no run gets as far as its first teleport; else nothing."""
    size = settings.size()
    per_epoch = train_size(size, dataset) // settings.batch()
    steps, due = size.epochs * per_epoch, settings.teleport.schedule.due_steps(per_epoch)
    if not due or min(due) < steps:
        return ""
    return (
        f"{settings.experiment} never teleports: the first is due after {min(due)} "
        f"training steps, and a run has {steps}; give more --epochs, or --schedule paper"
    )


def look(
    model: nn.Module, dataset: Dataset, inputs: Tensor, targets: Tensor, size: int
) -> tuple[float, float]:
    """Mean loss and accuracy of a network, NaN for a regression, on ``size`` examples at a time."""
    losses, hits = 0.0, 0.0
    with torch.no_grad():
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            outputs = model(dataset.prepare(x))
            losses += float(dataset.loss(outputs, y)) * len(x)
            if dataset.loss_kind == "cross_entropy":
                hits += float((outputs.argmax(-1) == y).double().mean()) * len(x)
    accuracy = hits / len(inputs) if dataset.classes else math.nan
    return losses / len(inputs), accuracy


STATE = (
    *("model", "optimizer", "epoch_start", "draws", "random", "random_gpu"),
    *("step", "train_seconds", "teleport_seconds", "record_bytes"),
)
"""Keys of `Training.state`."""


def read_state(path: Path) -> dict[str, Any]:
    """What `Training.state` returned, from a checkpoint; RunError if it holds none."""
    state = load_checkpoint(path)
    if missing := [name for name in STATE if name not in state]:
        raise foreign(path, f"it has no {', '.join(missing)}")
    for name in ("step", "record_bytes"):
        if type(state.get(name)) is not int or state[name] < 0:
            raise foreign(path, f"its {name} is {state.get(name)!r:.40}")
    return state


class Training:
    """A run that goes on from wherever its state is, its data on the device.

    The seed is that of the initial values, the order of the data and the teleport batches.

    Raises:
        RunError: as `check_fits`.
    """

    writer: RecordWriter

    def __init__(self, settings: RunSettings, arm: Arm, seed: int, dataset: Dataset) -> None:
        self.settings, self.arm, self.seed = settings, arm, seed
        self.dataset, self.size = dataset, settings.size()
        check_fits(settings, dataset, arm.teleport)
        count = train_size(self.size, dataset)
        self.inputs, self.targets = dataset.train_inputs[:count], dataset.train_targets[:count]
        look = self.size.evaluate_size
        self.seen = (self.inputs[:look], self.targets[:look])
        self.unseen = (dataset.test_inputs[:look], dataset.test_targets[:look])
        self.device = self.targets.device
        self.steps_per_epoch = count // settings.batch()
        self.steps = self.size.epochs * self.steps_per_epoch
        torch.manual_seed(seed)
        model = settings.recipe().build(dataset, self.size, settings.activation)
        initialise(model, arm.init, arm.head_gain)
        self.model = model.to(self.device)
        build = find_optimizer(settings.optimizer)
        self.optimizer = build(list(self.model.parameters()), arm.lr)
        self.subject = Subject(self.model, self.optimizer, self.steps_per_epoch, self._trial_step)
        self._own_step = self.subject.take_step
        self.order = torch.Generator().manual_seed(seed)
        self.draws = separate_draws(seed)
        self.epoch_start = self.order.get_state()
        self.step = 0
        self.train_seconds = self.teleport_seconds = 0.0

    def state(self) -> dict[str, Any] | None:
        """Everything the rest of the run depends on, as tensors and plain values.

        None while a control drives the steps its own way, whose state is not ours to save: such a
        run goes on from its last state before that. None, too, with an optimizer whose state is
        more than tensors and plain values: such a run starts over.
        """
        if self.subject.take_step is not self._own_step or not self._restorable:
            return None
        gpu = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        # After an epoch's last step the next order is drawn from where the generator is now.
        between = self.step % self.steps_per_epoch == 0
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch_start": self.order.get_state() if between else self.epoch_start,
            "draws": self.draws.get_state(),
            "random": torch.get_rng_state(),
            "random_gpu": gpu,
            "step": self.step,
            "train_seconds": self.train_seconds,
            "teleport_seconds": self.teleport_seconds,
            "record_bytes": self.writer.sync(),
        }

    @cached_property
    def _restorable(self) -> bool:
        return is_plain(self.optimizer.state_dict())

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go back to a state from a checkpoint; RunError if it is not one of such a run."""
        try:
            self._restore(state)
        except (MemoryError, torch.OutOfMemoryError):
            raise  # the state may be the right one
        except Exception as error:  # PyTorch raises errors of many kinds for states that do not fit
            lines = str(error).splitlines() or [type(error).__name__]
            raise foreign(path, lines[0]) from error

    def _restore(self, state: dict[str, Any]) -> None:
        wanted = [set(group) for group in self.optimizer.param_groups]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for names, group in zip(wanted, self.optimizer.param_groups, strict=True):
            if names - group.keys():  # of another optimizer with as many parameters
                raise ValueError(f"its optimizer has no {', '.join(sorted(names - group.keys()))}")
        self.order.set_state(state["epoch_start"])
        self.draws.set_state(state["draws"])
        torch.set_rng_state(state["random"])
        if state["random_gpu"] is not None:
            torch.cuda.set_rng_state(state["random_gpu"], self.device)
        self.step = int(state["step"])
        self.train_seconds = float(state["train_seconds"])
        self.teleport_seconds = float(state["teleport_seconds"])

    def run(self, writer: RecordWriter, after_step: Callable[[], None]) -> None:
        """Train to the end; the record tells how it ended, whatever ends it.

        ``after_step`` is called after every training step and its evaluation.
        """
        self.writer = writer
        try:
            self._train(after_step)
        except NonFiniteLossError as error:
            self.writer.write("end", status="diverged", step=self.step, reason=str(error))
        except KeyboardInterrupt:
            self.writer.write("end", status="interrupted", step=self.step)
            raise
        else:
            self.writer.write("end", status="finished", step=self.step)

    def _train(self, after_step: Callable[[], None]) -> None:
        due = self._due()
        if self.step == 0:
            self._evaluate()
        for inputs, targets in self._stream():
            if self.step in due:
                self._teleport()
            self._take_step(inputs, targets)
            if self.step % self.size.evaluate_every == 0 or self.step == self.steps:
                self._evaluate()
            after_step()

    def _take_step(self, inputs: Tensor, targets: Tensor) -> None:
        started = self._now()
        self._compute_gradients(inputs, targets)
        with within_range():
            self.subject.take_step()
        self.train_seconds += self._now() - started
        self.step += 1

    def advance(self, steps: int, stepped: Callable[[], None] = lambda: None) -> None:
        """So many steps, or those that are left, without a record and without a teleport."""
        for inputs, targets in islice(self._stream(), steps):
            self._take_step(inputs, targets)
            stepped()
        self.optimizer.zero_grad()

    def _stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from the current step on; the order of an epoch is drawn at its start."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        for _ in range(epoch, self.size.epochs):
            self.epoch_start = self.order.get_state()
            size = self.settings.batch()
            yield from islice(batches(self.inputs, self.targets, size, self.order), done, None)
            done = 0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return now()

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.dataset.loss(self.model(self.dataset.prepare(inputs)), targets)

    def _compute_gradients(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        self._loss(inputs, targets).backward()

    def _trial_step(self, number: int) -> None:
        """A training step on a batch of its own, the same for every trial of that number."""
        draw = separate_draws(self.seed + number, use=2)
        chosen = torch.randint(len(self.inputs), (self.settings.batch(),), generator=draw)
        self._compute_gradients(*self._examples(chosen))
        with within_range():
            self.optimizer.step()

    def _due(self) -> frozenset[int]:
        if not self.arm.teleport:
            return frozenset()
        return self.settings.teleport.schedule.due_steps(self.steps_per_epoch)

    def _evaluate(self) -> None:
        """One row; BatchNorm uses its statistics, and nothing of the training changes."""
        self.model.eval()
        try:
            train, _ = self._look(*self.seen)
            test, accuracy = self._look(*self.unseen)
            if not math.isfinite(train):
                raise NonFiniteLossError(f"the train loss is {train} after {self.step} steps")
            x, y = (part[: self.settings.teleport.batch_size] for part in self.seen)
            _, norm = grad_norm(lambda: self._loss(x, y), trainable(self.model))
        finally:
            self.model.train()
        self.writer.write(
            "evaluation",
            step=self.step,
            epoch=self.step * self.settings.batch() / len(self.inputs),
            train_seconds=self.train_seconds,
            teleport_seconds=self.teleport_seconds,
            train_loss=train,
            test_loss=test,
            test_accuracy=accuracy,
            grad_norm=norm,
        )

    def _look(self, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
        size = self.settings.teleport.batch_size
        return look(self.model, self.dataset, inputs, targets, size)

    def _teleport(self) -> None:
        options = self.settings.teleport
        teleporter = options.teleporter(self.model)
        for _ in range(options.schedule.batches):
            batch, held_out = self.draw()
            if self.arm.rival:
                report = intervene(
                    self.arm.rival,
                    self.subject,
                    batch,
                    held_out=held_out,
                    growth=options.growth,
                    seed=self.seed,
                )
            else:
                report = teleporter.step(batch, held_out=held_out)
            self.teleport_seconds += report.seconds
            self.writer.write("teleport", step=self.step, **report.to_dict())

    def draw(self) -> tuple[Closure, Closure]:
        """The losses of the next teleport batch and of the held-out examples beside it."""
        size, held_out = self.settings.teleport.batch_size, self.settings.teleport.held_out_size
        chosen = torch.randperm(len(self.inputs), generator=self.draws)[: size + held_out]
        return self._closure(chosen[:size]), self._closure(chosen[size:])

    def _closure(self, chosen: Tensor) -> Closure:
        x, y = self._examples(chosen)
        return lambda: self._loss(x, y)

    def _examples(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        rows = chosen.to(self.device)
        return take(self.inputs, rows), take(self.targets, rows)
