"""Named experiments: train with and without teleportation from the same start, and keep records.

An experiment is a data set and a network; an arm is one way to train it. All arms of a seed share
the initial random state and the order of the data, so they differ in nothing but what their name
says. The default arms put beside each teleport its own baseline (the same learning rate) and two it
has to beat to be of use: the tuned learning rate, and the tuned learning rate and initial gain.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from teleport.data import Dataset, batches, load
from teleport.errors import NonFiniteLossError, RunError
from teleport.interventions import INTERVENTIONS, Subject, intervene
from teleport.models import ACTIVATIONS, mlp
from teleport.objective import grad_norm, trainable
from teleport.records import RecordWriter, environment
from teleport.schedule import SCHEDULES, Schedule
from teleport.teleporter import Teleporter


@dataclass(frozen=True)
class Preset:
    """The size of an experiment.

    Attributes:
        epochs: passes over the training data.
        train_size: training images used, the first ones; None for all.
        evaluate_every: training steps between evaluations.
        evaluate_size: images of each split an evaluation looks at, the first ones.
    """

    epochs: int
    train_size: int | None
    evaluate_every: int
    evaluate_size: int


@dataclass(frozen=True)
class Experiment:
    """A data set, the paper's MLP on it, and sizes."""

    name: str
    title: str
    data: str
    presets: dict[str, Preset]


EXPERIMENTS = {
    e.name: e
    for e in (
        Experiment(
            "mnist-sample",
            "MLP 784-1024-1024-10, 8,000 embedded MNIST images",
            "mnist-sample",
            {
                "tiny": Preset(1, 2560, 20, 200),
                "cpu": Preset(3, None, 50, 2000),
                "paper": Preset(40, None, 250, 2000),
            },
        ),
        Experiment(
            "mnist-mlp",
            "MLP 784-1024-1024-10, MNIST, 60,000 images",
            "mnist",
            {
                "tiny": Preset(1, 2560, 20, 200),
                "cpu": Preset(4, None, 125, 5000),
                "paper": Preset(40, None, 1875, 10000),
            },
        ),
        Experiment(
            "fashion-mlp",
            "MLP 784-1024-1024-10, Fashion-MNIST, 60,000 images",
            "fashion-mnist",
            {
                "tiny": Preset(1, 2560, 20, 200),
                "cpu": Preset(4, None, 125, 5000),
                "paper": Preset(40, None, 1875, 10000),
            },
        ),
    )
}

OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter], float], torch.optim.Optimizer]] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adagrad": lambda parameters, lr: torch.optim.Adagrad(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
}


@dataclass(frozen=True)
class Tuning:
    """Learning rates and initial gain of the default arms for one optimizer.

    Attributes:
        low: a learning rate of the paper's kind, well below the best (its Table 1 is lost).
        tuned: the best constant learning rate with PyTorch's initialisation.
        gain_lr, init, head_gain: the best learning rate and initial gain together.
    """

    low: float
    tuned: float
    gain_lr: float
    init: str
    head_gain: float


TUNED: dict[tuple[str, str], Tuning] = {
    ("mnist-sample", "sgd"): Tuning(0.05, 0.3, gain_lr=0.2, init="he", head_gain=3.0),
    ("mnist-sample", "momentum"): Tuning(0.005, 0.05, gain_lr=0.02, init="he", head_gain=3.0),
    ("mnist-sample", "adagrad"): Tuning(0.001, 0.02, gain_lr=0.01, init="he", head_gain=3.0),
    ("mnist-sample", "adam"): Tuning(0.0001, 0.001, gain_lr=0.0003, init="he", head_gain=3.0),
    ("mnist-mlp", "sgd"): Tuning(0.05, 0.2, gain_lr=0.2, init="he", head_gain=3.0),
    ("fashion-mlp", "sgd"): Tuning(0.05, 0.3, gain_lr=0.05, init="he", head_gain=3.0),
}
"""Per experiment and optimizer, by final train loss of the ``cpu`` preset.

The sweeps are in ``chapters/results/tuning``. What is absent has the values of ``mnist-sample``.
"""


def tuning(experiment: str, optimizer: str) -> Tuning:
    """The tuned values for an experiment, or those of ``mnist-sample``."""
    return TUNED.get((experiment, optimizer), TUNED["mnist-sample", optimizer])


@dataclass(frozen=True)
class TeleportSettings:
    """How an arm teleports: the arguments of `Teleporter` and `Schedule`.

    Attributes:
        batch_size: images per teleport batch, the paper's n.
        held_out_size: images, of the training split, on which the held-out drift is measured.
    """

    schedule: Schedule = SCHEDULES["default"]
    tau: float = 1.0
    growth: float | None = None
    cap: float | None = None
    lr: float | None = None
    steps: int | None = None
    batch_size: int = 200
    held_out_size: int = 1000

    def check(self) -> None:
        """Raise ValueError now, rather than at the first teleport, for a value out of range."""
        self.teleporter(nn.Linear(1, 1))

    def teleporter(self, model: nn.Module) -> Teleporter:
        """A `Teleporter` with these settings around ``model``."""
        return Teleporter(
            model, tau=self.tau, growth=self.growth, cap=self.cap, lr=self.lr, steps=self.steps
        )


PAPER_TELEPORT = TeleportSettings(schedule=SCHEDULES["paper"], lr=0.2, steps=8, cap=3.0)
"""Section 4.1 and appendix A.2 of the paper for MLPs; its CAP is lost, 3 is ours."""


@dataclass(frozen=True)
class Arm:
    """One way to train: everything in which two runs of a seed may differ.

    Attributes:
        teleport: whether anything is done when a teleport is due.
        rival: what is done then; empty for a null-space teleport.
    """

    lr: float
    teleport: bool = False
    init: str = "default"
    head_gain: float = 1.0
    rival: str = ""

    @property
    def name(self) -> str:
        """What the tables and figures call it."""
        gain = "" if self.head_gain == 1.0 else f" head x{self.head_gain:g}"
        start = "" if self.init == "default" and not gain else f", {self.init} init{gain}"
        return f"lr {self.lr:g}{start}" + (f" + {self.rival or 'teleport'}" * self.teleport)

    @property
    def baseline(self) -> "Arm":
        """The same arm without teleportation."""
        return replace(self, teleport=False, rival="")


def default_arms(experiment: str, optimizer: str) -> list[Arm]:
    """Low and tuned learning rate with and without teleport, and the tuned initial gain."""
    best = tuning(experiment, optimizer)
    pairs = [Arm(lr, teleport) for lr in (best.low, best.tuned) for teleport in (False, True)]
    return [*pairs, Arm(best.gain_lr, False, best.init, best.head_gain)]


def rival_arms(experiment: str, optimizer: str) -> list[Arm]:
    """The default arms, and every rival and control at the low and at the tuned learning rate.

    A reset of the optimizer is left out for plain SGD, which has no state to forget.
    """
    best = tuning(experiment, optimizer)
    names = [n for n in INTERVENTIONS if optimizer != "sgd" or n != "optimizer reset"]
    rivals = [Arm(lr, True, rival=name) for lr in (best.low, best.tuned) for name in names]
    return [*default_arms(experiment, optimizer), *rivals]


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on but its arm and seed."""

    experiment: str = "mnist-sample"
    preset: str = "cpu"
    optimizer: str = "sgd"
    epochs: int | None = None
    batch_size: int = 32
    device: str = "cpu"
    activation: str = "relu"
    teleport: TeleportSettings = TeleportSettings()

    def size(self) -> Preset:
        """The preset, with ``epochs`` replaced if given.

        Raises:
            ValueError: for an unknown experiment, preset or optimizer, or epochs < 1.
        """
        experiment: Experiment = one_of("experiment", self.experiment, EXPERIMENTS)
        preset: Preset = one_of("preset", self.preset, experiment.presets)
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("activation", self.activation, ACTIVATIONS)
        if self.epochs is None:
            return preset
        if self.epochs < 1:
            raise ValueError(f"epochs must be an integer >= 1, got {self.epochs}")
        return replace(preset, epochs=self.epochs)


Progress = Callable[[str, int], None]
"""Called with what is being run and the training steps done since the last call."""


def steps_per_run(settings: Settings, dataset: Dataset) -> int:
    """Training steps of one run."""
    size = settings.size()
    images = _train_size(size, dataset)
    return size.epochs * (images // settings.batch_size)


def run_arms(
    settings: Settings,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    out: Path,
    *,
    command: str = "",
    progress: Progress = lambda what, steps: None,
) -> list[Path]:
    """Train every arm with every seed; one record file each.

    Args:
        settings: what all runs share.
        arms: the ways to train.
        seeds: each gives an initialisation and an order of the data, the same for all arms.
        out: an existing folder for the records.
        command: the command line, for the record.
        progress: told about every few steps.

    Returns:
        The records' paths, in the order of the runs.

    Raises:
        RunError: if the device is not available or a record cannot be written.
        DataError: if the data cannot be had.
    """
    size = settings.size()
    dataset = load(EXPERIMENTS[settings.experiment].data)
    device = device_of(settings.device)
    _warm_up(settings.optimizer, device)
    paths = []
    for seed in seeds:
        for order, arm in enumerate(arms):
            path = out / f"{order:02d}-{slug(arm.name)}-seed{seed}.jsonl"
            with RecordWriter(path) as writer:
                _write_config(writer, settings, arm, seed, order, dataset, command)
                training = _Training(settings, size, arm, seed, dataset, device, writer)
                training.run(partial(progress, f"{arm.name} (seed {seed})"))
            paths.append(path)
    return paths


def new_folder(name: str, out: Path | None) -> Path:
    """Make the folder of a new run: ``out``, or ``runs/<date>-<name>`` with a number if taken.

    Raises:
        RunError: if the folder exists already, or cannot be made or written to.
    """
    if out is not None:
        return _make_folder(out)
    base = Path("runs") / f"{date.today().isoformat()}-{name}"
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 1000))
    return _make_folder(next(folder for folder in candidates if not folder.exists()))


class _Training:
    """One run: an arm, a seed, a record."""

    def __init__(
        self,
        settings: Settings,
        size: Preset,
        arm: Arm,
        seed: int,
        dataset: Dataset,
        device: torch.device,
        writer: RecordWriter,
    ) -> None:
        self.settings, self.size, self.arm, self.writer = settings, size, arm, writer
        torch.manual_seed(seed)
        self.model = mlp(
            dataset.width,
            dataset.classes,
            init=arm.init,
            head_gain=arm.head_gain,
            activation=settings.activation,
        ).to(device)
        self.optimizer = OPTIMIZERS[settings.optimizer](list(self.model.parameters()), arm.lr)
        images = _train_size(size, dataset)
        period = images // settings.batch_size
        self.subject = Subject(self.model, self.optimizer, period, self._trial_step)
        self.seed = seed
        self.inputs = dataset.train_inputs[:images].to(device)
        self.targets = dataset.train_targets[:images].to(device)
        look = size.evaluate_size
        self.seen = (self.inputs[:look], self.targets[:look])
        self.unseen = (
            dataset.test_inputs[:look].to(device),
            dataset.test_targets[:look].to(device),
        )
        # Two generators: drawing teleport batches must not change the order of the training data.
        self.order = torch.Generator().manual_seed(seed)
        self.draws = torch.Generator().manual_seed(seed + 1_000_003)
        self.step = 0
        self.train_seconds = self.teleport_seconds = 0.0

    def run(self, progress: Callable[[int], None]) -> None:
        """Train to the end; the record tells how it ended, whatever ends it."""
        try:
            self._train(progress)
        except NonFiniteLossError:
            self.writer.write("end", status="diverged", step=self.step)
        except KeyboardInterrupt:
            self.writer.write("end", status="interrupted", step=self.step)
            raise
        else:
            self.writer.write("end", status="finished", step=self.step)

    def _train(self, progress: Callable[[int], None]) -> None:
        due = self._due()
        self._evaluate()
        for inputs, targets in self._stream():
            if self.step in due:
                self._teleport()
            started = time.perf_counter()
            self._compute_gradients(inputs, targets)
            self.subject.take_step()
            self.train_seconds += time.perf_counter() - started
            self.step += 1
            progress(1)
            if self.step % self.size.evaluate_every == 0:
                self._evaluate()

    def _compute_gradients(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.model(inputs), targets).backward()

    def _trial_step(self, number: int) -> None:
        """A training step on a batch of its own, the same for every trial of that number."""
        draw = torch.Generator().manual_seed(self.seed + 2_000_003 + number)
        chosen = torch.randint(len(self.inputs), (self.settings.batch_size,), generator=draw)
        chosen = chosen.to(self.inputs.device)
        self._compute_gradients(self.inputs[chosen], self.targets[chosen])
        self.optimizer.step()

    def _due(self) -> frozenset[int]:
        if not self.arm.teleport:
            return frozenset()
        schedule = self.settings.teleport.schedule
        return schedule.due_steps(len(self.inputs) // self.settings.batch_size)

    def _stream(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.size.epochs):
            yield from batches(self.inputs, self.targets, self.settings.batch_size, self.order)

    def _evaluate(self) -> None:
        with torch.no_grad():
            train = cross_entropy(self.model(self.seen[0]), self.seen[1])
            guesses = self.model(self.unseen[0])
            test = cross_entropy(guesses, self.unseen[1])
            hits = (guesses.argmax(1) == self.unseen[1]).double().mean()
        if not train.isfinite():
            raise NonFiniteLossError(f"the train loss is {train.item()} after {self.step} steps")
        x, y = (part[: self.settings.teleport.batch_size] for part in self.seen)
        _, norm = grad_norm(lambda: cross_entropy(self.model(x), y), trainable(self.model))
        self.writer.write(
            "evaluation",
            step=self.step,
            epoch=self.step * self.settings.batch_size / len(self.inputs),
            train_seconds=self.train_seconds,
            teleport_seconds=self.teleport_seconds,
            train_loss=float(train),
            test_loss=float(test),
            test_accuracy=float(hits),
            grad_norm=norm,
        )

    def _teleport(self) -> None:
        options = self.settings.teleport
        teleporter = options.teleporter(self.model)
        size = options.batch_size
        for _ in range(options.schedule.batches):
            chosen = torch.randperm(len(self.inputs), generator=self.draws)
            chosen = chosen[: size + options.held_out_size].to(self.inputs.device)
            held_out = self._closure(chosen[size:])
            batch = self._closure(chosen[:size])
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

    def _closure(self, chosen: Tensor) -> Callable[[], Tensor]:
        x, y = self.inputs[chosen], self.targets[chosen]
        return lambda: cross_entropy(self.model(x), y)


def _warm_up(optimizer: str, device: torch.device) -> None:
    """One step and one teleport nobody times: first calls load what later calls find loaded."""
    state = torch.get_rng_state()
    model = mlp(4, 2, hidden=(16, 16)).to(device)
    x, y = torch.rand(8, 4, device=device), torch.zeros(8, dtype=torch.long, device=device)
    cross_entropy(model(x), y).backward()
    OPTIMIZERS[optimizer](list(model.parameters()), 0.01).step()
    Teleporter(model).step(lambda: cross_entropy(model(x), y))
    torch.set_rng_state(state)


def _write_config(
    writer: RecordWriter,
    settings: Settings,
    arm: Arm,
    seed: int,
    order: int,
    dataset: Dataset,
    command: str,
) -> None:
    writer.write(
        "config",
        experiment=settings.experiment,
        preset=settings.preset,
        arm=arm.name,
        baseline=arm.baseline.name,
        order=order,
        seed=seed,
        training=asdict(arm),
        settings=asdict(settings),
        size=asdict(settings.size()),
        data={"name": dataset.name, "checksum": dataset.checksum, "source": dataset.source},
        command=command,
        **environment(),
    )


def _train_size(size: Preset, dataset: Dataset) -> int:
    return min(size.train_size or len(dataset.train_inputs), len(dataset.train_inputs))


def one_of(what: str, name: str, known: dict[str, Any]) -> Any:
    """The entry of this name.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; there are: {', '.join(known)}")
    return known[name]


def device_of(name: str) -> torch.device:
    """The device of this name, if it can be used here.

    Raises:
        RunError: if it cannot.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"device {name!r} is not available here ({error}); use cpu") from error
    return device


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except FileExistsError as error:
        raise RunError(
            f"{folder} exists already and runs never share a folder; give another --out"
        ) from error
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error.strerror}; choose a folder with --out"
        ) from error
    return folder


def slug(name: str) -> str:
    """A name as part of a file's."""
    kept = "".join(c if c.isalnum() or c == "." else "-" for c in name)
    return "-".join(part for part in kept.split("-") if part)
