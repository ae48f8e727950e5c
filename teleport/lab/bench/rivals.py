"""Rivals on the same work: the same model, the same batch, the same clock.

`same_batch_table` lets every way to teleport, and every control, move the same perceptron on the
same images, and tells what it gained, what it broke, and what it cost; `same_budget_table` lets
each repeat its step for the same time instead. `symmetry_timings` times
a teleport of fixed steps against the null-space one (paper figure 5). All repeats start from the
same weights and are timed as `teleport.lab.bench.timing` says.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from teleport.data import SAMPLE_NAME, load
from teleport.errors import RunError
from teleport.lab.bench.timing import (
    Spread,
    Stopwatch,
    TimedTask,
    Timing,
    interleaved,
    stopwatch_for,
)
from teleport.lab.experiments.models import mlp
from teleport.objective import grad_norm, gradient, trainable
from teleport.report import TeleportReport
from teleport.rivals import Rehearsal, SymmetryTeleporter, rehearse
from teleport.rivals.rival import Rival
from teleport.rivals.ways import OURS, RESCALINGS, STEPS, Way, ways
from teleport.runtime.threads import using_threads
from teleport.teleporter import Teleporter

LabelledBatch = tuple[Tensor, Tensor]
"""Inputs and classes."""

Prepared = tuple[Teleporter | Rival, list[Callable[[], Tensor]]]
"""Something that moves a model of its own, and the closures of its batches."""

CPU = torch.device("cpu")

GRADIENT_BUDGET = 30.0
"""Gradients whose time a way may spend in `same_budget_table`."""

HELD_OUT = 1000
"""Images outside the batch whose loss is compared."""

SEED = 0
"""Of the initial weights, of the batches and of all random moves."""


@dataclass(frozen=True)
class WayRow:
    """One way to move, on the same batch as all others.

    Attributes:
        growth: factor on the gradient norm.
        drift: relative change of the batch loss.
        held_out_drift: relative change of the loss of other images.
        move: norm of the change of all weights together.
        timing: of all repeats, each right after one gradient of the batch.
    """

    way: str
    growth: float
    drift: float
    held_out_drift: float
    move: float
    timing: Timing
    note: str


def same_batch_table(
    *,
    hidden: Sequence[int] = (512, 512),
    samples: int = 128,
    growth: float = 1.5,
    warmup_steps: int = 50,
    repeats: int = 5,
    seconds: float = math.inf,
    threads: int = 1,
    device: torch.device = CPU,
) -> list[WayRow]:
    """Let each of the `ways` move the same perceptron on the same embedded images; a row for each.

    The widths ``hidden`` are at least ``samples``, the paper's n, for symmetry teleportation to be
    exact. Where a way can be asked for a growth of the gradient norm, it is. Training steps (SGD,
    learning rate 0.1, batch 32) come before. Of the timing there are ``repeats`` at most, each from
    the same weights, and none is begun after so many ``seconds``.
    """
    with _beginning(threads):
        model, batch, others = _work(hidden, samples, warmup_steps, device)
        rehearsal = rehearse(Teleporter(model, growth=growth), _closure(model, batch))
        movers = {
            name: partial(_prepared, model, way, [batch], rehearsal)
            for name, way in ways(growth, SEED).items()
        }
        looks = {name: _look(make, others) for name, make in movers.items()}
        timings = _timings(model, batch, movers, repeats, seconds, threads)
        return [_row(name, report, timings[name]) for name, report in looks.items()]


@contextmanager
def _beginning(threads: int) -> Iterator[None]:
    """The same threads and random numbers every time; afterwards they are what they were."""
    with using_threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def _work(
    hidden: Sequence[int], samples: int, warmup_steps: int, device: torch.device
) -> tuple[nn.Sequential, LabelledBatch, LabelledBatch]:
    """A perceptron after some training, a batch, and other images.

    LeakyReLU is the activation that all rivals can act through.
    """
    images = load(SAMPLE_NAME)
    model = mlp(images.width, images.classes, hidden, activation="leaky_relu")
    _train_a_little(model, images.train_inputs, images.train_targets, warmup_steps)
    chosen = torch.randperm(len(images.train_inputs))[: samples + HELD_OUT]
    batch, others = (
        (images.train_inputs[part].to(device), images.train_targets[part].to(device))
        for part in (chosen[:samples], chosen[samples:])
    )
    return model.to(device), batch, others


def _look(make: Callable[[], Prepared], others: LabelledBatch) -> TeleportReport:
    """What one way does, with the loss of other images; not timed."""
    mover, (closure,) = make()
    return mover.step(closure, held_out=_closure(mover.model, others))


def _row(name: str, report: TeleportReport, timing: Timing) -> WayRow:
    held = report.held_out_drift
    assert held is not None
    assert report.held_out_before is not None
    return WayRow(
        way=name,
        growth=report.growth,
        drift=report.drift / abs(report.loss_before),
        held_out_drift=held / abs(report.held_out_before),
        move=sum(layer.move_norm**2 for layer in report.layers) ** 0.5,
        timing=timing,
        note=report.reason,
    )


def repeated_ways(growth: float) -> dict[str, Way]:
    """The ways whose step takes one direction, to be repeated; and symmetry in its 2023 form.

    Without the two rescalings that are at their optimum after one step.
    """
    every = ways(growth, SEED)
    several = (f"{STEPS} steps", "double backward", "first-order inverse", *RESCALINGS)
    found = {name: way for name, way in every.items() if not name.endswith(several)}
    found["null space, double backward"] = lambda m, _: Teleporter(
        m, growth=growth, method="double_backward"
    )
    found["symmetry on pre-activations, 1 step"] = lambda m, _: SymmetryTeleporter(
        m, 1, growth=growth, action="preactivations"
    )
    return found


@dataclass(frozen=True)
class BudgetRow:
    """One way, repeated for as long as all others.

    Attributes:
        steps: kept within the budget; the last one may end after it.
        growth: factor on the gradient norm by all steps together.
        drift: relative change of the batch loss by them.
        held_out_drift: relative change of the loss of other images.
        gradient_seconds: of one gradient, the median of some just before.
    """

    way: str
    steps: int
    growth: float
    drift: float
    held_out_drift: float
    seconds: float
    gradient_seconds: float
    note: str


def same_budget_table(
    *,
    hidden: Sequence[int] = (512, 512),
    samples: int = 128,
    growth: float = 1.5,
    warmup_steps: int = 50,
    gradients: float = GRADIENT_BUDGET,
    threads: int = 1,
    device: torch.device = CPU,
) -> list[BudgetRow]:
    """Let each of the `repeated_ways` repeat its step until the same time is spent; a row for each.

    All start from the same weights. The time is that of ``gradients`` gradients of the batch; a
    step is begun as long as some of it is left, and finished. A way ends early when a step moves
    nothing or is rolled back. One step of every way comes first and is not timed. Controls of the
    same norm repeat the norm of the first teleport, whose rehearsal is not on their time.

    The budget is > 0 and finite, else a ValueError, and the growth that of one step; all else is as
    of `same_batch_table`.
    """
    if not 0.0 < gradients < math.inf:
        raise ValueError(f"gradients must be > 0 and finite, got {gradients}")
    with _beginning(threads):
        model, batch, others = _work(hidden, samples, warmup_steps, device)
        rehearsal = rehearse(Teleporter(model, growth=growth), _closure(model, batch))
        stopwatch = stopwatch_for(device, threads)
        rows = []
        for name, way in repeated_ways(growth).items():
            make = partial(_prepared, model, way, [batch], rehearsal)
            _move(make())
            rows.append(_spend(name, make(), others, gradients, stopwatch))
        return rows


def _spend(
    name: str, prepared: Prepared, others: LabelledBatch, gradients: float, stopwatch: Stopwatch
) -> BudgetRow:
    mover, (closure,) = prepared
    parameters, held_out = trainable(mover.model), _closure(mover.model, others)
    one = Spread.of([stopwatch(lambda: gradient(closure, parameters)) for _ in range(7)]).median
    (loss, norm), (other, _) = grad_norm(closure, parameters), grad_norm(held_out, parameters)
    spent, steps, report = 0.0, 0, list[TeleportReport]()
    while spent < gradients * one:
        spent += stopwatch(lambda: report.append(mover.step(closure)))
        if report[-1].rolled_back or not report[-1].steps:
            break
        steps += 1
    after, norm_after = grad_norm(closure, parameters)
    return BudgetRow(
        way=name,
        steps=steps,
        growth=norm_after / norm,
        drift=abs(after - loss) / abs(loss),
        held_out_drift=abs(grad_norm(held_out, parameters)[0] - other) / abs(other),
        seconds=spent,
        gradient_seconds=one,
        note=report[-1].reason,
    )


def symmetry_timings(
    d: int = 512,
    n: int = 128,
    layers: int = 3,
    steps: int = 8,
    *,
    batches: int = 1,
    activation: str = "tanh",
    repeats: int = 7,
    seconds: float = math.inf,
    threads: int = 1,
    device: torch.device = CPU,
) -> dict[str, Timing]:
    """Seconds of symmetry and of null-space teleportation, by program in turn.

    The reference is one gradient. All programs take ``steps`` small steps of fixed size on each
    batch of a perceptron with ``layers`` linear layers of width ``d`` (10 outputs), an activation
    named as of `mlp` and normal inputs, checks and reports included.

    Raises:
        ValueError: if a size is not positive, or ``n`` > ``d``, where symmetry is not exact.
    """
    if min(d, n, steps, batches, repeats) < 1 or layers < 2 or n > d:
        raise ValueError(
            f"sizes must be >= 1, layers >= 2 and n <= d; got d={d}, n={n}, layers={layers}, "
            f"steps={steps}, batches={batches}, repeats={repeats}"
        )
    with _beginning(threads):
        model = mlp(d, 10, [d] * (layers - 1), activation=activation).to(device)
        parts = [
            (torch.randn(n, d).to(device), torch.randint(10, (n,)).to(device))
            for _ in range(batches)
        ]
        movers = {
            name: partial(_prepared, model, way, parts) for name, way in speed_ways(steps).items()
        }
        return _timings(model, parts[0], movers, repeats, seconds, threads)


def speed_ways(steps: int) -> dict[str, Callable[[nn.Sequential], Teleporter | Rival]]:
    """The programs whose seconds are compared; steps so small that nothing ends early."""
    lr = 1e-6
    return {
        OURS: lambda m: Teleporter(m, steps=steps, lr=lr, cap=1e9),
        "null space, double backward": lambda m: Teleporter(
            m, steps=steps, lr=lr, cap=1e9, method="double_backward"
        ),
        "symmetry": lambda m: SymmetryTeleporter(m, steps, lr),
        "symmetry, SVD pseudo-inverse": lambda m: SymmetryTeleporter(
            m, steps, lr, pseudo_inverse="svd"
        ),
    }


def _prepared(
    model: nn.Sequential,
    way: Callable[..., Teleporter | Rival],
    parts: Sequence[LabelledBatch],
    *matched: Rehearsal,
) -> Prepared:
    """A copy of the model, ready to be moved."""
    own = deepcopy(model)
    return way(own, *matched), [_closure(own, part) for part in parts]


def _timings(
    model: nn.Module,
    batch: LabelledBatch,
    movers: Mapping[str, Callable[[], Prepared]],
    repeats: int,
    seconds: float,
    threads: int,
) -> dict[str, Timing]:
    reference, parameters = _closure(model, batch), trainable(model)
    return interleaved(
        TimedTask(lambda _: gradient(reference, parameters)),
        {name: TimedTask(_move, make) for name, make in movers.items()},
        rounds=repeats,
        seconds=seconds,
        stopwatch=stopwatch_for(batch[0].device, threads),
    )


def _move(prepared: Prepared) -> None:
    mover, closures = prepared
    for closure in closures:
        report = mover.step(closure)
        if report.rolled_back or not report.steps:
            raise RunError(f"a timed teleport did not move: {report.reason}")


def _train_a_little(model: nn.Module, inputs: Tensor, targets: Tensor, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (32,))
        optimizer.zero_grad()
        cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
    optimizer.zero_grad()


def _closure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    return lambda: cross_entropy(model(batch[0]), batch[1])
