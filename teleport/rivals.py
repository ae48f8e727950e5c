"""Rivals on the same work: the same model, the same batch, the same clock.

`same_batch_table` lets every way to teleport, and every control, move the same perceptron on the
same images, and tells what it gained, what it broke, and what it cost. `symmetry_speed_ratio` times
a teleport of fixed steps against the null-space one (paper figure 5). All repeats start from the
same weights and are interleaved, so that a slow minute of the machine meets all alike.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from teleport.baselines import (
    ChangeOfBasisTeleporter,
    LevelSetTeleporter,
    NoiseTeleporter,
    RandomNullDirection,
    Rehearsal,
    RescaleLayers,
    SymmetryTeleporter,
    rehearse,
)
from teleport.baselines.rival import Rival
from teleport.data import load
from teleport.objective import gradient, trainable
from teleport.report import TeleportReport
from teleport.teleporter import Teleporter

Way = Callable[[nn.Module, Rehearsal], Teleporter | Rival]
"""A way to move, made for a model; controls look at the rehearsal of the default teleport."""

STEPS = 8
"""Directions of the ways that take several: the paper's t."""


def ways(growth: float, seed: int = 0) -> dict[str, Way]:
    """Every rival and control, asked for the same growth where it can be asked."""
    return {
        "null space": lambda m, _: Teleporter(m, growth=growth),
        f"null space, {STEPS} steps": lambda m, _: Teleporter(m, growth=growth, steps=STEPS),
        "null space, double backward": lambda m, _: Teleporter(
            m, growth=growth, steps=STEPS, method="double_backward"
        ),
        "symmetry, 1 step": lambda m, _: SymmetryTeleporter(m, 1, growth=growth),
        f"symmetry, {STEPS} steps": lambda m, _: SymmetryTeleporter(m, STEPS, growth=growth),
        "symmetry, first-order inverse": lambda m, _: SymmetryTeleporter(
            m, STEPS, inverse="first_order", growth=growth, max_drift=None
        ),
        "level set, 1 step": lambda m, _: LevelSetTeleporter(m, 1, growth=growth, max_drift=None),
        f"level set, {STEPS} steps": lambda m, _: LevelSetTeleporter(
            m, STEPS, growth=growth, max_drift=None
        ),
        "change of basis": lambda m, _: ChangeOfBasisTeleporter(m, 1, 0.9, seed=seed),
        "change of basis, best of 20": lambda m, _: ChangeOfBasisTeleporter(m, 20, 0.9, seed=seed),
        "random null direction, same growth": lambda m, _: RandomNullDirection(
            m, growth=growth, seed=seed
        ),
        "random null direction, same norm": lambda m, r: RandomNullDirection(
            m, like=r.report, seed=seed
        ),
        "noise, same norm": lambda m, r: NoiseTeleporter(m, r.report, seed=seed),
        "layers rescaled": lambda m, r: RescaleLayers(m, r.norms),
    }


@dataclass(frozen=True)
class Row:
    """One way to move, on the same batch as all others.

    Attributes:
        way: its name.
        growth: factor on the gradient norm.
        drift: relative change of the batch loss.
        held_out_drift: relative change of the loss of other images.
        move: norm of the change of all weights together.
        seconds: median of the repeats.
        gradients: ``seconds`` in units of one gradient of the batch, median of the ratios.
        note: how it ended.
    """

    way: str
    growth: float
    drift: float
    held_out_drift: float
    move: float
    seconds: float
    gradients: float
    note: str


def same_batch_table(
    *,
    data: str = "mnist-sample",
    hidden: Sequence[int] = (512, 512),
    activation: type[nn.Module] = nn.LeakyReLU,
    samples: int = 128,
    growth: float = 1.5,
    warmup_steps: int = 50,
    seed: int = 0,
    repeats: int = 5,
    threads: int = 1,
) -> list[Row]:
    """Let every rival and control move the same perceptron on the same batch.

    Args:
        data: name of the data set; flat images.
        hidden: widths; at least ``samples``, for symmetry teleportation to be exact.
        activation: of the hidden layers; LeakyReLU is the one that all rivals can act through.
        samples: size of the batch, the paper's n.
        growth: wanted factor on the gradient norm, where a way can be asked for one.
        warmup_steps: training steps (SGD, learning rate 0.1, batch 32) before.
        seed: of the initial weights, of the batches and of all random moves.
        repeats: of the timing; each from the same weights.
        threads: of torch.

    Returns:
        One row per way, in the order of `ways`.
    """
    with _threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        images = load(data)
        model = _perceptron([images.width, *hidden, images.classes], activation)
        _warm_up(model, images.train_inputs, images.train_targets, warmup_steps)
        chosen = torch.randperm(len(images.train_inputs))[: samples + 1000]
        parts = [(images.train_inputs[i], images.train_targets[i]) for i in _cut(chosen, samples)]
        return _table(model, parts[0], parts[1], growth, seed, repeats)


def _table(
    model: nn.Sequential,
    batch: tuple[Tensor, Tensor],
    others: tuple[Tensor, Tensor],
    growth: float,
    seed: int,
    repeats: int,
) -> list[Row]:
    rehearsal = rehearse(Teleporter(model, growth=growth), _closure(model, batch))
    found: dict[str, list[tuple[TeleportReport, float]]] = {}
    for _ in range(repeats + 1):
        for name, way in ways(growth, seed).items():
            own = deepcopy(model)
            mover = way(own, rehearsal)
            unit = _one_gradient(own, _closure(own, batch))
            report = mover.step(_closure(own, batch), held_out=_closure(own, others))
            found.setdefault(name, []).append((report, report.seconds / unit))
    return [_row(name, runs[1:]) for name, runs in found.items()]  # the first warms up


def _row(name: str, runs: Sequence[tuple[TeleportReport, float]]) -> Row:
    report = runs[0][0]
    held = report.held_out_drift
    assert held is not None
    assert report.held_out_before is not None
    return Row(
        way=name,
        growth=report.growth,
        drift=report.drift / abs(report.loss_before),
        held_out_drift=held / abs(report.held_out_before),
        move=sum(layer.move_norm**2 for layer in report.layers) ** 0.5,
        seconds=statistics.median(r.seconds for r, _ in runs),
        gradients=statistics.median(ratio for _, ratio in runs),
        note=report.reason,
    )


@dataclass(frozen=True)
class Speed:
    """A teleport of fixed steps by three programs, medians of interleaved runs.

    Attributes:
        null_space: seconds of `Teleporter`, fast direction.
        double_backward: seconds of `Teleporter` with the paper's direction.
        symmetry: seconds of `SymmetryTeleporter`, pseudo-inverse by QR.
        symmetry_svd: the same with the pseudo-inverse by SVD, as in the published code.
        ratio, ratio_svd: medians of the symmetry's seconds over those of ``null_space``.
    """

    null_space: float
    double_backward: float
    symmetry: float
    symmetry_svd: float
    ratio: float
    ratio_svd: float


def symmetry_speed_ratio(
    d: int = 512,
    n: int = 128,
    layers: int = 3,
    steps: int = 8,
    *,
    batches: int = 1,
    activation: type[nn.Module] = nn.Tanh,
    repeats: int = 7,
    threads: int = 1,
    seed: int = 0,
) -> Speed:
    """Seconds of symmetry teleportation over seconds of null-space teleportation.

    Both take ``steps`` small steps of fixed size on each batch of a perceptron with ``layers``
    linear layers of width ``d`` (10 outputs) and normal inputs, checks and reports included.

    Raises:
        ValueError: if a size is not positive, or ``n`` > ``d``, where symmetry is not exact.
    """
    if min(d, n, steps, batches, repeats) < 1 or layers < 2 or n > d:
        raise ValueError(
            f"sizes must be >= 1, layers >= 2 and n <= d; got d={d}, n={n}, layers={layers}, "
            f"steps={steps}, batches={batches}, repeats={repeats}"
        )
    lr = 1e-6
    makers: dict[str, Callable[[nn.Module], Teleporter | Rival]] = {
        "null_space": lambda m: Teleporter(m, steps=steps, lr=lr, cap=1e9),
        "double_backward": lambda m: Teleporter(
            m, steps=steps, lr=lr, cap=1e9, method="double_backward"
        ),
        "symmetry": lambda m: SymmetryTeleporter(m, steps, lr),
        "symmetry_svd": lambda m: SymmetryTeleporter(m, steps, lr, pseudo_inverse="svd"),
    }
    with _threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _perceptron([*[d] * layers, 10], activation)
        data = [(torch.randn(n, d), torch.randint(10, (n,))) for _ in range(batches)]
        times: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(repeats + 1):
            for name, make in makers.items():
                own = deepcopy(model)
                times[name].append(_seconds(make(own), [_closure(own, part) for part in data]))
    kept = {name: seconds[1:] for name, seconds in times.items()}  # the first warms up
    medians = {name: statistics.median(seconds) for name, seconds in kept.items()}

    def ratio(name: str) -> float:
        pairs = zip(kept[name], kept["null_space"], strict=True)
        return statistics.median(a / b for a, b in pairs)

    return Speed(**medians, ratio=ratio("symmetry"), ratio_svd=ratio("symmetry_svd"))


def _seconds(mover: Teleporter | Rival, closures: Sequence[Callable[[], Tensor]]) -> float:
    started = time.perf_counter()
    reports = [mover.step(closure) for closure in closures]
    spent = time.perf_counter() - started
    for report in reports:
        if report.rolled_back or not report.steps:
            raise RuntimeError(f"a timed teleport did not move: {report.reason}")
    return spent


def _perceptron(widths: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), activation()]
    return nn.Sequential(*layers[:-1])


def _warm_up(model: nn.Module, inputs: Tensor, targets: Tensor, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (32,))
        optimizer.zero_grad()
        cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
    optimizer.zero_grad()


def _cut(chosen: Tensor, first: int) -> tuple[Tensor, Tensor]:
    return chosen[:first], chosen[first:]


def _closure(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    return lambda: cross_entropy(model(batch[0]), batch[1])


def _one_gradient(model: nn.Module, closure: Callable[[], Tensor]) -> float:
    """Seconds of one gradient, the middle of three."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        gradient(closure, trainable(model))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
