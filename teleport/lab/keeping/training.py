"""Learn tasks one after the other and record what is left of the old ones.

The null space of the old tasks' inputs keeps the old function while a new one is learned
(``thm-keep``). All strategies of a seed learn the first task together, so they go on from the same
network, and see the same batches; they are run one after the other within the seed, so that their
seconds, taken on a machine that may be busy, compare.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from teleport.data import Dataset, batches, load
from teleport.errors import NonFiniteLossError
from teleport.lab.experiments.entry import one_of
from teleport.lab.experiments.models import mlp
from teleport.lab.experiments.optimizers import within_range
from teleport.lab.experiments.training import separate_draws
from teleport.lab.keeping.methods import LEARNING_METHODS, Plain
from teleport.lab.keeping.tasks import SEQUENCES, Size, Task, TaskSequence
from teleport.lab.records.folders import slug
from teleport.lab.records.record_folder import RecordFolder
from teleport.lab.records.writer import RecordWriter, environment
from teleport.runtime.clock import now


@dataclass(frozen=True)
class Strategy:
    """A method with its settings: everything in which two runs of a seed may differ."""

    method: str
    lr: float
    tau: float | None = None

    @property
    def name(self) -> str:
        """What the tables and figures call it."""
        tau = "" if self.tau is None else f" tau {self.tau:g}"
        return f"{self.method}{tau}, lr {self.lr:g}"

    def record(self, order: int, seed: int) -> str:
        """Name of its record, as one of several that are compared."""
        return f"{order:02d}-{slug(self.name)}-seed{seed}.jsonl"


TUNED = {
    "digits": {"plain": 0.2, "projected": 0.4, "lazy": 0.2, "replay": 0.4, "random": 0.4},
    "mnist-fashion": {"plain": 0.2, "projected": 0.4, "lazy": 0.2, "replay": 0.2, "random": 0.2},
    "permuted-mnist": {"plain": 0.1, "projected": 0.2, "lazy": 0.2, "replay": 0.1, "random": 0.2},
    "gpm-mnist": {
        **dict.fromkeys(("plain", "gpm", "gpm-lazy", "gpm-growing", "two-sided"), 0.01),
        "gpm-adam": 0.0003,
    },
}
"""Learning rates by sequence and method, by the new tasks' validation loss.

The sweeps, at the tau of the sequence, are in ``chapters/results/keeping/tuning``; ``gpm-mnist``
has the rate of its protocol, and of Adam one that nobody tuned. What is absent has `DEFAULT_LR`.
"""

DEFAULT_LR = 0.05
LR_GRID = (0.05, 0.1, 0.2, 0.4)
TUNING_SEED = 1000
"""The first seed of tuning runs, which no other run has."""


def default_strategies(
    sequence: str,
    methods: Sequence[str] | None = None,
    taus: Sequence[float] | None = None,
    lrs: Sequence[float] | None = None,
) -> list[Strategy]:
    """The strategies of a sequence: its methods, its tau and their tuned rates, unless given.

    ValueError for an unknown name, a tau outside (0, 1], or a learning rate not > 0.
    """
    known = one_of("sequence", sequence, SEQUENCES)
    strategies = []
    for method in known.methods if methods is None else methods:
        kind = one_of("method", method, LEARNING_METHODS)
        for tau in (taus or (known.tau,)) if kind.uses_tau else (None,):
            rates = lrs or [TUNED[sequence].get(method, DEFAULT_LR)]
            strategies += [Strategy(method, lr, tau) for lr in rates]
    for strategy in strategies:
        _check(strategy)
    return strategies


def _check(strategy: Strategy) -> None:
    if strategy.tau is not None and not 0.0 < strategy.tau <= 1.0:
        raise ValueError(f"tau must be in (0, 1], got {strategy.tau}; 1 keeps the whole space")
    if not 0.0 < strategy.lr < float("inf"):
        raise ValueError(f"lr must be > 0 and finite, got {strategy.lr}")


@dataclass(frozen=True)
class SequenceRun:
    """Everything a run depends on but its strategy and seed.

    Attributes:
        sequence, preset: names.
        split: what evaluations look at: ``"test"``, or ``"validation"`` to tune on.
    """

    sequence: str
    preset: str = "cpu"
    split: str = "test"

    def size(self) -> Size:
        """The preset; ValueError for an unknown sequence, preset or split."""
        one_of("split", self.split, {"test": 0, "validation": 0})
        return one_of("preset", self.preset, self._known().presets)

    def sets(self) -> list[Dataset]:
        """The data sets."""
        return [load(name) for name in self.size().data]

    def tasks(self, sets: Sequence[Dataset], seed: int) -> list[Task]:
        """The tasks of a seed."""
        size = self.size()
        return [
            replace(task, validation=size.validation, normalised=size.normalised)
            for task in self._known().tasks(sets, seed)
        ]

    def steps(self, sets: Sequence[Dataset]) -> int:
        """Training steps of one run after the first task."""
        return self.size().steps * (len(self.tasks(sets, 0)) - 1)

    def _known(self) -> TaskSequence:
        return one_of("sequence", self.sequence, SEQUENCES)


def run_strategies(
    course: SequenceRun,
    strategies: Sequence[Strategy],
    seeds: Sequence[int],
    out: Path | RecordFolder,
) -> list[Path]:
    """Learn the sequence with every strategy and every seed; return the paths of their records.

    A seed gives an initialisation, an order of the data and, where the tasks have one, an order of
    the pixels. Errors as of `RecordFolder` and `load`.
    """
    sets, folder = course.sets(), RecordFolder(out) if isinstance(out, Path) else out
    _try_out(strategies)
    if not (strategies and seeds):
        return []
    shared = {
        **asdict(course),
        "tasks": len(course.tasks(sets, seeds[0])),
        "size": asdict(course.size()),
        "data": [{"name": d.name, "checksum": d.checksum, "source": d.source} for d in sets],
    }
    names = {
        (strategy.name, seed): strategy.record(order, seed)
        for order, strategy in enumerate(strategies)
        for seed in seeds
    }
    with folder.held("continual", shared, names=names):
        for seed in seeds:
            _run_seed(course, strategies, seed, folder, sets, shared)
    return [folder.path / names[s.name, seed] for seed in seeds for s in strategies]


def _run_seed(
    course: SequenceRun,
    strategies: Sequence[Strategy],
    seed: int,
    out: RecordFolder,
    sets: Sequence[Dataset],
    shared: dict[str, Any],
) -> None:
    tasks = course.tasks(sets, seed)
    first: _Learning | None = None
    for order, strategy in enumerate(strategies):
        told = partial(out.progress, f"{strategy.name} (seed {seed})")
        own = {"arm": strategy.name, "order": order, "seed": seed, "strategy": asdict(strategy)}
        config = {**shared, **own}
        path = out.missing(Path(strategy.record(order, seed)).stem, config)
        if path is None:
            told(course.steps(sets))
            continue
        if first is None:
            first = _Learning(course.size(), tasks, seed, course.split)
            first.learn(0, first.size.first_steps, lambda steps: None)
        with RecordWriter(path) as writer:
            writer.write("config", command=out.command, **config, **environment())
            first.continued(strategy, writer).run(told)


class _Learning:
    """One network on its way through the tasks."""

    def __init__(self, size: Size, tasks: list[Task], seed: int, split: str) -> None:
        self.size, self.tasks, self.seed = size, tasks, seed
        torch.manual_seed(seed)
        dataset = tasks[0].dataset
        self.model: nn.Module = mlp(
            dataset.width, dataset.classes, hidden=size.hidden, bias=size.bias
        )
        self.unseen = [task.unseen(split, size.evaluate_size) for task in tasks]
        self.method = Plain(1.0, torch.Generator())
        self.lr = size.first_lr
        self.step = 0
        self.train_seconds = self.space_seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        self.writer: RecordWriter | None = None

    def continued(self, strategy: Strategy, writer: RecordWriter) -> "_Learning":
        """A copy that goes on with a strategy and writes what was learned so far."""
        branch = copy(self)
        branch.model = deepcopy(self.model)
        draws = separate_draws(self.seed)
        branch.method = LEARNING_METHODS[strategy.method](strategy.tau or 1.0, draws)
        branch.lr, branch.writer, branch.rows = strategy.lr, writer, []
        for row in self.rows:
            branch._write(row)
        return branch

    def run(self, progress: Callable[[int], None]) -> None:
        """Learn all tasks but the first; the record tells how it ended, whatever ends it."""
        assert self.writer is not None
        try:
            for old, new in pairwise(range(len(self.tasks))):
                self._keep(old)
                self.learn(new, self.size.steps, progress)
        except NonFiniteLossError:
            self.writer.write("end", status="diverged", step=self.step)
        except KeyboardInterrupt:
            self.writer.write("end", status="interrupted", step=self.step)
            raise
        else:
            self.writer.write("end", status="finished", step=self.step)

    def learn(self, number: int, steps: int, progress: Callable[[int], None]) -> None:
        """Train on a task, evaluating at the start, every few steps and at the end."""
        optimizer = self.method.optimizer(self.model.parameters(), lr=self.lr)  # type: ignore[call-arg]
        self._timed(lambda: self.method.begins(self.model, optimizer))
        stream = self._stream(self.tasks[number], number)
        self._evaluate(number, 0)
        for done in range(1, steps + 1):
            self._step(optimizer, *next(stream))
            progress(1)
            if done == steps:
                self._timed(self.method.ended)
            if done == steps or done % self.size.evaluate_every == 0:
                self._evaluate(number, done)

    def _step(self, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> None:
        started, spent = now(), self.space_seconds
        inputs, targets = self.method.batch(inputs, targets)
        optimizer.zero_grad()
        cross_entropy(self.method.outputs(self.model, inputs), targets).backward()
        self._timed(lambda: self.method.before_step(self.model))
        with within_range():
            optimizer.step()
        self._timed(lambda: self.method.after_step(self.model))
        self.step += 1
        # What the method spent on its spaces is inside this stretch, and counted there already.
        self.train_seconds += now() - started - (self.space_seconds - spent)

    def _timed(self, part: Callable[[], None]) -> None:
        started = now()
        part()
        self.space_seconds += now() - started

    def _keep(self, number: int) -> None:
        task = self.tasks[number]
        inputs, targets = task.training()
        count = len(inputs) if self.method.sees_all else self.size.memory
        rows = torch.randperm(len(inputs), generator=self._generator(number, 1))[:count]
        images = task.images(inputs[rows])
        self._timed(lambda: self.method.learned(self.model, images, targets[rows]))

    def _stream(self, task: Task, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._generator(number, 0)
        inputs, targets = task.training()
        inputs = task.images(inputs)
        started = now()
        inputs = self.method.prepared(inputs)
        self.space_seconds += now() - started
        while True:
            yield from batches(inputs, targets, self.size.batch_size, order)

    def _generator(self, number: int, use: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + 10 * number + use)

    def _evaluate(self, number: int, task_step: int) -> None:
        """Loss and accuracy on unseen images of every task up to this one."""
        with torch.no_grad():
            outputs = [self.model(x) for x, _ in self.unseen[: number + 1]]
        pairs = [(z, y) for z, (_, y) in zip(outputs, self.unseen, strict=False)]
        losses = [float(cross_entropy(z, y)) for z, y in pairs]
        if not torch.tensor(losses).isfinite().all():
            raise NonFiniteLossError(f"a loss is not finite after {self.step} steps")
        stored_bytes, stored_labels = self.method.stored()
        row = {
            "task": number,
            "task_step": task_step,
            "step": self.step,
            "train_seconds": self.train_seconds,
            "space_seconds": self.space_seconds,
            "stored_bytes": stored_bytes,
            "stored_labels": stored_labels,
            "losses": losses,
            "accuracies": [float((z.argmax(1) == y).double().mean()) for z, y in pairs],
        }
        self._write(row)

    def _write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.writer is not None:
            self.writer.write("evaluation", **row)


@torch.random.fork_rng(devices=[])
def _try_out(strategies: Sequence[Strategy]) -> None:
    """A few steps nobody times: first calls load what later calls find loaded."""
    model: nn.Module = mlp(4, 2, hidden=(8,))
    x, y = torch.rand(8, 4), torch.zeros(8, dtype=torch.long)
    for strategy in strategies:
        method = LEARNING_METHODS[strategy.method](strategy.tau or 1.0, torch.Generator())
        method.learned(model, x, y)
        inputs, targets = method.batch(x, y)
        cross_entropy(model(inputs), targets).backward()
        method.before_step(model)
        method.after_step(model)
        method.ended()
