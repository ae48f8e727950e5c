"""Benchmarks: what teleporting costs, in gradients of the same model and batch.

Each benchmark is a list of jobs; a job measures one network or one point and gives rows for the
record. Everything is a ratio to one ordinary gradient (forward and backward pass) in the same
process; `teleport.lab.bench.timing` says how.

PyTorch runs on one thread unless asked otherwise: with two threads on two cores, any other program
that wants one of them makes both wait, and ratios then measure that program. With one thread what
is counted is CPU time: that of the wall clock on an idle machine, and the same on a busy one.

The costs depend on shapes, not on values, so inputs are standard normal and no data is read; only
the comparison with the rivals also tells what they gain and break, on embedded images.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from teleport.direction import Direction
from teleport.errors import RunError
from teleport.lab.bench import null_spaces, ranks
from teleport.lab.bench.rivals import (
    GRADIENT_BUDGET,
    same_batch_table,
    same_budget_table,
    symmetry_timings,
)
from teleport.lab.bench.timing import (
    Measurement,
    Stopwatch,
    TimedTask,
    interleaved,
    peak_bytes,
    stopwatch_for,
)
from teleport.lab.experiments.choices import NOT_IN_ALL
from teleport.lab.experiments.entry import one_of
from teleport.lab.experiments.models import ACTIVATIONS, Transformer, cnn, mlp
from teleport.lab.experiments.residual import ResNet18
from teleport.lab.records.writer import RecordWriter, environment
from teleport.landscape import Landscape
from teleport.layers.support import WeightMatrix, cover
from teleport.objective import trainable
from teleport.recording import Tape
from teleport.report import TeleportReport
from teleport.rivals import SymmetryTeleporter
from teleport.runtime.cores import check_threads
from teleport.runtime.threads import using_threads
from teleport.runtime.toml import packaged_table
from teleport.runtime.transaction import _unfused
from teleport.subspace import Projector
from teleport.teleporter import Teleporter

BenchmarkJob = tuple[str, Callable[[], list[Measurement]]]


@dataclass(frozen=True)
class Workload:
    """A network with a batch.

    Attributes:
        shape: what its widths and its batch are, for the reader.
        batches: inputs and classes; most benchmarks use the first.
    """

    name: str
    shape: str
    model: nn.Module
    batches: tuple[tuple[Tensor, Tensor], ...]

    def closure(self) -> Tensor:
        """Loss of the first batch."""
        return self.closures()[0]()

    def closures(self) -> list[Callable[[], Tensor]]:
        """Loss of every batch."""
        return [partial(_loss, self.model, x, y) for x, y in self.batches]

    def copy(self) -> "Workload":
        """The same with a model of its own, to be moved."""
        return replace(self, model=deepcopy(self.model))


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x).flatten(0, -2), y.flatten())  # one answer, or one per position


# How the library does what is timed: the only lines that know its inner parts.


def ordinary_gradient(case: Workload) -> tuple[Tensor, ...]:
    """One ordinary gradient: what everything is compared with."""
    return torch.autograd.grad(case.closure(), trainable(case.model))


def recorded(case: Workload) -> Landscape:
    """The first recording of a teleport: forward and backward pass with everything captured."""
    return Landscape(case.model, cover(case.model).sites, [case.closure], frozen=True)


def kept_tape(landscape: Landscape) -> Tape:
    """The tape of a landscape of `recorded`."""
    assert landscape.tape is not None
    return landscape.tape


def candidates(landscape: Landscape) -> list[WeightMatrix]:
    """The blocks that a teleport makes bases for."""
    return [block for block in landscape.blocks if block not in landscape.fixed]


def gram_bytes(landscape: Landscape) -> int:
    """Size of the float64 Gram matrices behind the bases, each on its smaller side."""
    total = 0
    for block in candidates(landscape):
        *groups, _, d_in = block.part.matrix_shape
        total += 8 * math.prod(groups) * min(kept_tape(landscape).row_count(block), d_in) ** 2
    return total


def sequential_bases(
    landscape: Landscape, blocks: Sequence[WeightMatrix]
) -> dict[WeightMatrix, Projector]:
    """Bases one after the other, each with all threads."""
    return {block: landscape.bases([block], 1.0)[block] for block in blocks}


def parallel_bases(landscape: Landscape) -> dict[WeightMatrix, Projector]:
    """Bases at the same time, a thread to each, whether that pays or not."""
    return landscape.bases(candidates(landscape), 1.0, parallel=True)


def with_room(bases: dict[WeightMatrix, Projector]) -> dict[WeightMatrix, Projector]:
    """Those that leave something to move in."""
    return {block: basis for block, basis in bases.items() if basis.null_dim > 0}


def deltas(landscape: Landscape) -> None:
    """One backward pass on the frozen activations, wherever the last look was."""
    landscape._look_at(landscape.position)


def tangent_step(landscape: Landscape, bases: dict[WeightMatrix, Projector]) -> Direction:
    """One step's direction: the backward pass, the tangent pass, the projection."""
    deltas(landscape)
    return landscape.tangent_direction(bases)


def teleporter(model: nn.Module, steps: int | None, method: str) -> Teleporter:
    """The default, or with ``steps`` so many small steps of fixed size that nothing ends early."""
    if steps is None:
        return Teleporter(model, method=method)
    return Teleporter(model, method=method, steps=steps, lr=1e-6, cap=1e9)


# Sizes.


@dataclass(frozen=True)
class ScalingPoint:
    """One setting of the scaling benchmark.

    Attributes:
        t: steps per batch.
        d: width of the input and of every hidden layer.
        n: samples in a batch.
        l: layers.
        b: batches.
    """

    t: int
    d: int
    n: int
    l: int  # noqa: E741 (the paper's letter)
    b: int


@dataclass(frozen=True, kw_only=True)
class BenchmarkSize:
    """How much is measured.

    Attributes:
        small: networks of a few units, to see that everything runs.
        rounds: repeats at most.
        seconds: after which a job begins no further round.
        base: the point the scaling benchmark varies.
        axes: values of each letter.
        depths: numbers of layers for the layer-parallel benchmark, and their width and samples.
        limit: a method slower than this at a point is not run at larger values of that letter.
        rival_seconds: the same of the jobs whose rounds are long: the rivals', and keeping's.
        deep: blocks of the deep transformers.
    """

    small: bool = False
    rounds: int
    seconds: float
    base: ScalingPoint
    axes: dict[str, tuple[int, ...]]
    depths: tuple[int, ...] = (2, 4, 8, 16, 32)
    layer_size: tuple[int, int]
    limit: float = 5.0
    rival_seconds: float
    deep: tuple[int, ...]

    def points(self) -> list[tuple[str, ScalingPoint]]:
        """Points with the letter they vary; the base comes first and only once."""
        varied = [
            (letter, replace(self.base, **{letter: value}))
            for letter, values in self.axes.items()
            for value in values
        ]
        return [("", self.base), *((a, point) for a, point in varied if point != self.base)]


@dataclass(frozen=True)
class Setting:
    """How much is measured, and where; the threads are of PyTorch's operations on a CPU."""

    preset: BenchmarkSize
    device: torch.device
    threads: int


def _size(entry: dict[str, Any]) -> BenchmarkSize:
    given: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()
    }
    given["base"] = ScalingPoint(**entry["base"])
    given["axes"] = {letter: tuple(values) for letter, values in entry["axes"].items()}
    return BenchmarkSize(**given)


PRESETS = {
    name: _size(entry)
    for name, entry in packaged_table("teleport.lab.bench", "presets.toml").items()
}
"""By name, from ``presets.toml`` beside this module."""


def networks(small: bool, device: torch.device) -> list[Workload]:
    """The three networks of the speed budgets, or the same kinds with a few units."""
    if small:
        cases = [
            _case("MLP", mlp(20, 4, (32, 32)), "20-32-32-4, n = 8", (8, 20), 4, device),
            _case("CNN", cnn((3, 4, 8), 8, 4), "3-4-8, 8 x 8, n = 4", (4, 3, 8, 8), 4, device),
        ]
        reader, shape = Transformer(3, 4, 4, 16, blocks=1), "1 block, d = 16, T = 4, n = 2"
        return [*cases, _case("transformer", reader, shape, (2, 4, 3), 4, device)]
    cases = [
        _case("MLP", mlp(784, 10), "784-1024-1024-10, n = 200", (200, 784), 10, device),
        _case("CNN", cnn(), "3-16-32-64, 32 x 32, n = 128", (128, 3, 32, 32), 10, device),
    ]
    reader, shape = Transformer(28, 10, 64), "2 blocks, d = 128, T = 64, n = 32"
    return [*cases, _case("transformer", reader, shape, (32, 64, 28), 10, device)]


def _case(
    name: str,
    model: nn.Module,
    shape: str,
    inputs: tuple[int, ...],
    classes: int,
    device: torch.device,
    batches: int = 1,
) -> Workload:
    drawn = tuple(
        (torch.randn(inputs).to(device), torch.randint(classes, inputs[:1]).to(device))
        for _ in range(batches)
    )
    return Workload(name, shape, model.to(device), drawn)


def gpt(small: bool, blocks: int, device: torch.device) -> Workload:
    """A language model with the widths of GPT-2 and a small vocabulary."""
    width, length, samples, vocabulary = (16, 4, 2, 20) if small else (768, 64, 8, 1000)
    model = Transformer(
        vocabulary, vocabulary, length, width, max(1, width // 64), blocks,
        readout="all", tokens=True, causal=True,
    )  # fmt: skip
    tokens, later = torch.randint(vocabulary, (2, samples, length)).to(device)
    shape = f"{blocks} blocks, d = {width}, T = {length}, n = {samples}"
    return Workload("GPT-2-like", shape, model.to(device), ((tokens, later),))


def resnet(small: bool, training: bool, device: torch.device) -> Workload:
    """ResNet-18 in training mode, or in evaluation mode with the statistics of its batch."""
    width, pixels, samples = (2, 8, 4) if small else (64, 32, 128 if training else 64)
    shape = f"width {width}, {pixels} x {pixels}, n = {samples}"
    model = ResNet18(width=width)
    case = _case("ResNet-18", model, shape, (samples, 3, pixels, pixels), 10, device)
    if training:
        return replace(case, name="ResNet-18, training")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # an average, of one batch
    with torch.no_grad():
        model(case.batches[0][0])
    model.eval()
    return case


def _mlp_at(point: ScalingPoint, device: torch.device) -> Workload:
    """A perceptron with LeakyReLU: symmetry teleportation needs an invertible activation."""
    modules = mlp(point.d, 10, (point.d,) * (point.l - 1))
    model = nn.Sequential(*(nn.LeakyReLU(0.1) if isinstance(m, nn.ReLU) else m for m in modules))
    return _case("MLP", model, "", (point.n, point.d), 10, device, point.b)


# Benchmarks.


def step_jobs(setting: Setting) -> list[BenchmarkJob]:
    """The phases of a teleport and all of it, per network."""

    def job(case: Workload) -> list[Measurement]:
        with _unfused():
            landscape = recorded(case)
            bases = with_room(sequential_bases(landscape, candidates(landscape)))
            along = tangent_step(landscape, bases)
        part, backward = partial(TimedTask, within=_unfused), partial(deltas, landscape)
        own = {
            "tangent step": part(lambda _: tangent_step(landscape, bases)),
            "of it: deltas": part(lambda _: backward()),
            "of it: tangents, projection": part(
                lambda _: landscape.tangent_direction(bases), backward
            ),
            "double backward direction": part(lambda _: landscape.double_backward_direction(bases)),
            "one look of the line search": part(lambda _: landscape.norm_squared_at(along, 1e-3)),
            "first recording": part(lambda _: recorded(case)),
            "default teleport, all in": _teleport_task(case, None, "tangent"),
        }
        floor, projected = floors(kept_tape(landscape), bases)
        rows = _timed(setting, case, own)
        for row in rows:
            if row["operation"] == "tangent step":
                row.update(floor=floor, floor_with_projection=projected)
        return rows

    return _for_each_network(setting, job)


def floors(tape: Tape, bases: dict[WeightMatrix, Projector]) -> tuple[float, float]:
    """Multiplications of one tangent step over those of one gradient; and with the projection.

    A product of a layer's inputs, weights or cotangents counts rows x d_in x d_out. A gradient
    takes one forward, one for the weights and one for the inputs where these depend on parameters.
    A step on frozen activations takes: the cotangents of such inputs; up to the last moved layer
    the tangent of the outputs, through the inputs and through the layer's own gradient (by the
    rows' Gram matrix, which is frozen, or by forming the gradient, whichever is cheaper); and
    the direction of each moved layer. Attention scores, element-wise work and bases are left out.
    """
    blocks = tape.blocks
    last = max((i for i, block in enumerate(blocks) if block in bases), default=-1)
    ordinary = step = projection = 0
    for i, block in enumerate(blocks):
        (*axes, d_out, d_in), rows = block.part.matrix_shape, tape.row_count(block)
        groups = math.prod(axes)
        product = groups * rows * d_in * d_out
        depends = int(tape.depends_on_parameters(block))
        ordinary += (2 + depends) * product
        step += depends * product
        if i < last:
            step += depends * product + min(groups * rows**2 * d_out, 2 * product)
        if block in bases:
            step += product
            projection += 2 * min(rows, d_out) * d_in * bases[block].rank
    return step / ordinary, (step + projection) / ordinary


def basis_jobs(setting: Setting) -> list[BenchmarkJob]:
    """The bases of one teleport batch: all of a network, and each."""

    def job(case: Workload) -> list[Measurement]:
        with _unfused():
            landscape = recorded(case)
            made = sequential_bases(landscape, candidates(landscape))

        def some(chosen: slice, landscape: Landscape) -> object:
            """As a teleport makes them: shared where inputs are, at once if that pays."""
            return landscape.bases(candidates(landscape)[chosen], 1.0)

        # Every run gets a fresh landscape: rows and Gram matrices are kept once they are formed.
        fresh = partial(recorded, case)
        tasks = {"all bases": TimedTask(partial(some, slice(None)), fresh, _unfused)}
        notes = {}
        for i, (block, basis) in enumerate(made.items()):
            tasks[block.name] = TimedTask(partial(some, slice(i, i + 1)), fresh, _unfused)
            rows = kept_tape(landscape).row_count(block)
            notes[block.name] = {"rows": rows, "rank": basis.rank, "null_dim": basis.null_dim}
        timed = _timed(setting, case, tasks)
        return [{**row, **notes.get(row["operation"], {})} for row in timed]

    return _for_each_network(setting, job)


def scaling_jobs(setting: Setting) -> list[BenchmarkJob]:
    """Seconds of a whole teleport at every point, per method, for `measure.power_law`."""
    too_slow: set[tuple[str, str]] = set()

    def job(letter: str, point: ScalingPoint) -> list[Measurement]:
        case = _seeded(_mlp_at, point, setting.device)
        tasks = {
            "paper (double backward)": _teleport_task(case, point.t, "double_backward"),
            "tangent": _teleport_task(case, point.t, "tangent"),
            "symmetry teleportation": _symmetry_task(case, point.t),
        }
        tasks = {name: task for name, task in tasks.items() if (letter, name) not in too_slow}
        rows = _timed(setting, case, tasks)
        for row in rows:
            row.update(asdict(point), method=row.pop("operation"))
            if min(row["seconds"]) > setting.preset.limit:
                # The base has no letter and stops none: it is larger than many of their points.
                too_slow.add((letter, row["method"]))
        return rows

    return [
        (", ".join(f"{k} = {v}" for k, v in asdict(point).items()), partial(job, letter, point))
        for letter, point in setting.preset.points()
    ]


def memory_jobs(setting: Setting) -> list[BenchmarkJob]:
    """Peak bytes of a default teleport and of one gradient, beyond the model and its batch."""

    def job(case: Workload) -> list[Measurement]:
        with _unfused():
            grams = gram_bytes(recorded(case))
        held = [*case.model.parameters(), *case.model.buffers()]
        row: Measurement = {
            "network": case.name,
            "shape": case.shape,
            "model": sum(p.numel() * p.element_size() for p in held),
            "gradient": peak_bytes(lambda: ordinary_gradient(case), setting.device),
            "grams": grams,
        }
        for method in ("tangent", "double_backward"):
            task = _teleport_task(case, None, method)
            row[method] = peak_bytes(partial(task.run, task.prepare()), setting.device)
        return [row]

    return _for_each_network(setting, job)


def layers_jobs(setting: Setting) -> list[BenchmarkJob]:
    """Bases of l layers, one after the other with all threads, and at once with a thread each."""
    width, samples = setting.preset.layer_size

    def job(depth: int) -> list[Measurement]:
        # The first layer is a fixed point and needs no basis, so one more than the depth.
        case = _seeded(_mlp_at, ScalingPoint(1, width, samples, depth + 1, 1), setting.device)
        fresh = partial(recorded, case)
        every = partial(using_threads, os.cpu_count() or 1)
        tasks = {
            "sequential": TimedTask(lambda w: sequential_bases(w, candidates(w)), fresh, every),
            "parallel": TimedTask(parallel_bases, fresh, every),
        }
        # By the wall clock, as it is: CPU time adds up what runs at the same time.
        rows = _timed(setting, case, tasks, stopwatch_for(setting.device, threads=None))
        return [{**row, "layers": depth, "d": width, "n": samples} for row in rows]

    return [(f"l = {depth}", partial(job, depth)) for depth in setting.preset.depths]


def rivals_jobs(setting: Setting) -> list[BenchmarkJob]:
    """Every way to teleport on the same images, once and for the same time.

    And seconds against symmetry teleportation. All at the sizes of the scaling benchmark's base.
    """
    base, preset = setting.preset.base, setting.preset
    where: dict[str, Any] = {"threads": setting.threads, "device": setting.device}
    spent = {**where, "repeats": preset.rounds, "seconds": preset.rival_seconds}

    def same_batch() -> list[Measurement]:
        table = same_batch_table(hidden=(base.d, base.d), samples=base.n, **spent)
        rows = [{"part": "same batch", **asdict(row), **row.timing.row} for row in table]
        for row in rows:
            del row["timing"]
        return rows

    def same_budget() -> list[Measurement]:
        """Every round on its own: how many steps fit depends on the machine."""
        rows: list[Measurement] = []
        started = time.perf_counter()
        for number in range(preset.rounds):
            if number and time.perf_counter() - started > preset.rival_seconds:
                break
            table = same_budget_table(hidden=(base.d, base.d), samples=base.n, **where)
            note = {"part": "same budget", "gradients": GRADIENT_BUDGET, "round": number}
            rows += [{**note, **asdict(row)} for row in table]
        return rows

    def speed(activation: str) -> list[Measurement]:
        found = symmetry_timings(
            base.d, base.n, base.l, base.t, batches=base.b, activation=activation, **spent
        )
        note = {"part": "speed", "activation": ACTIVATIONS[activation].__name__}
        return [{**note, "way": way, **timing.row} for way, timing in found.items()]

    jobs: list[BenchmarkJob] = [("same batch", same_batch), ("same budget", same_budget)]
    kinds = ("leaky_relu", "tanh")
    return jobs + [(f"speed, {ACTIVATIONS[k].__name__}", partial(speed, k)) for k in kinds]


def ranks_jobs(setting: Setting) -> list[BenchmarkJob]:
    """Bytes that ranks send during a teleport, counted and by formula, and their memory."""

    def job(case: ranks.Traffic, count: int) -> list[Measurement]:
        return [ranks.measured(case, count)]

    return [
        (f"{case.rows} rows, {count} ranks", partial(job, case, count))
        for case in ranks.cases(setting.preset.small)
        for count in ranks.COUNTS
    ]


def deep_jobs(setting: Setting) -> list[BenchmarkJob]:
    """A default teleport of deep and wide networks, its time and its peak of bytes."""
    small, device = setting.preset.small, setting.device
    networks = {f"{n} blocks": partial(gpt, small, n, device) for n in setting.preset.deep}
    networks["ResNet-18"] = partial(resnet, small, False, device)
    if setting.preset.deep[2:]:
        networks["ResNet-18, training"] = partial(resnet, small, True, device)

    def job(make: Callable[[], Workload]) -> list[Measurement]:
        case = _seeded(make)
        task = _teleport_task(case, None, "tangent")
        peaks: Measurement = {  # which is the round that comes first and is not kept, too
            "gradient": peak_bytes(lambda: ordinary_gradient(case), device),
            "tangent": peak_bytes(partial(task.run, task.prepare()), device),
        }
        (row,) = _timed(setting, case, {"default teleport, all in": task}, warm_up=False)
        return [{**row, **peaks}]

    return [(name, partial(job, make)) for name, make in networks.items()]


def keeping_jobs(setting: Setting) -> list[BenchmarkJob]:
    """The null space as a tool, beside a forward pass and beside plain steps."""
    return null_spaces.comparisons(
        setting.preset.small,
        setting.device,
        rounds=setting.preset.rounds,
        seconds=setting.preset.rival_seconds,
        stopwatch=stopwatch_for(setting.device, setting.threads),
    )


BENCHMARKS: dict[str, Callable[[Setting], list[BenchmarkJob]]] = {
    "step": step_jobs,
    "basis": basis_jobs,
    "scaling": scaling_jobs,
    "memory": memory_jobs,
    "layers": layers_jobs,
    "rivals": rivals_jobs,
    "ranks": ranks_jobs,
    "deep": deep_jobs,
    "keeping": keeping_jobs,
}


def chosen(what: str, preset: str) -> tuple[list[str], BenchmarkSize]:
    """Names of the benchmarks meant, and the preset of that name; ValueError for an unknown one."""
    one_of("benchmark", what, dict.fromkeys((*BENCHMARKS, "all")))
    every = [name for name in BENCHMARKS if name not in NOT_IN_ALL]
    return (every if what == "all" else [what]), one_of("preset", preset, PRESETS)


def run_benchmarks(
    names: Sequence[str],
    preset: str,
    device: torch.device,
    folder: Path,
    *,
    threads: int = 1,
    command: str = "",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> None:
    """Run some of `BENCHMARKS`; each leaves the record ``<name>.jsonl`` in the folder.

    The folder exists, and holds none of these records yet. ``progress`` is told the name of a job,
    how many ended since the last call, and how many there are: when a job begins and when it has
    ended. ValueError for less than one of the ``threads``; RunError if a teleport did not do what
    was to be timed.
    """
    check_threads(threads)
    setting = Setting(PRESETS[preset], device, threads)
    with using_threads(threads):
        jobs = {name: BENCHMARKS[name](setting) for name in names}
        total = sum(len(each) for each in jobs.values())
        for name, each in jobs.items():
            with RecordWriter(folder / f"{name}.jsonl") as writer:
                writer.write(
                    "config",
                    benchmark=name,
                    preset=preset,
                    size=asdict(setting.preset),
                    device=str(device),
                    load=_load(),
                    cpus=os.cpu_count(),
                    command=command,
                    **environment(),
                )
                _run_jobs(name, each, writer, lambda what, done: progress(what, done, total))


def _run_jobs(
    name: str,
    jobs: Sequence[BenchmarkJob],
    writer: RecordWriter,
    progress: Callable[[str, int], None],
) -> None:
    started, status = time.perf_counter(), "interrupted"
    try:
        for what, job in jobs:
            progress(f"{name}: {what}", 0)
            for row in job():
                writer.write("measurement", **row)
            progress(f"{name}: {what}", 1)
        status = "finished"
    finally:
        writer.write("end", status=status, load=_load(), seconds=time.perf_counter() - started)


def _timed(
    setting: Setting,
    case: Workload,
    tasks: dict[str, TimedTask],
    stopwatch: Stopwatch | None = None,
    warm_up: bool = True,
) -> list[Measurement]:
    """Time tasks against the gradient of a case; one row each, all repeats in it."""
    timings = interleaved(
        TimedTask(lambda _: ordinary_gradient(case)),
        tasks,
        rounds=setting.preset.rounds,
        seconds=setting.preset.seconds,
        stopwatch=stopwatch or stopwatch_for(setting.device, setting.threads),
        warm_up=warm_up,
    )
    what = {"network": case.name, "shape": case.shape}
    return [{**what, "operation": name, **timing.row} for name, timing in timings.items()]


def _teleport_task(case: Workload, steps: int | None, method: str) -> TimedTask:
    """Teleports as of `teleporter`."""
    return _task_of(case, steps or 1, lambda model: teleporter(model, steps, method))


def _symmetry_task(case: Workload, steps: int) -> TimedTask:
    """With the pseudo-inverse of its authors: deep layers' inputs are singular in float32."""
    rival = partial(SymmetryTeleporter, steps=steps, lr=1e-6, pseudo_inverse="svd")
    return _task_of(case, steps, rival)


def _task_of(case: Workload, steps: int, made: Callable[[nn.Module], Any]) -> TimedTask:
    """A teleport of a copy of the model on every batch of the case."""

    def prepare() -> tuple[Workload, Any]:
        own = case.copy()
        return own, made(own.model)

    def teleports(prepared: tuple[Workload, Any]) -> None:
        own, mover = prepared
        for closure in own.closures():
            _as_asked(mover.step(closure), steps)

    return TimedTask(teleports, prepare)


def _as_asked(report: TeleportReport, steps: int) -> None:
    """A teleport that did less than it was asked for was not worth timing."""
    if report.rolled_back or report.steps != steps:
        raise RunError(
            f"a teleport to be timed took {report.steps} of {steps} steps ({report.reason}); "
            "its time would mean nothing"
        )


def _for_each_network(
    setting: Setting, job: Callable[[Workload], list[Measurement]]
) -> list[BenchmarkJob]:
    """A job for each of `networks`, made afresh when it begins."""
    make = partial(_seeded, networks, setting.preset.small, setting.device)
    return [(case.name, partial(lambda i: job(make()[i]), i)) for i, case in enumerate(make())]


def _seeded(make: Callable[..., Any], *arguments: Any) -> Any:
    """Call with a fixed random state, and put the state back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*arguments)


def _load() -> list[float] | None:
    """How busy the machine is: runnable processes over 1, 5 and 15 minutes; None if unknown."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None
