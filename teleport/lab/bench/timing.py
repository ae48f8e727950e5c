"""Measuring: seconds as ratios to a reference, bytes at their peak, exponents of growth.

A machine's speed changes while one measures (its clock, other programs). So nothing is compared
over time: in every round each task is timed right after the reference, and what counts is the
ratio of the two, its median and its quartiles over the rounds. Neither a slow minute nor a single
disturbed run moves these much.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

Measurement = dict[str, Any]
"""One row of a benchmark's record."""

Stopwatch = Callable[[Callable[[], object]], float]
"""Runs something and returns how many seconds it took."""


@dataclass(frozen=True)
class TimedTask:
    """Something to be timed.

    Attributes:
        run: what is timed; receives what ``prepare`` returned.
        prepare: makes what ``run`` uses up, before each run; not timed.
        within: context around ``prepare`` and ``run``; entering and leaving it is not timed.
    """

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    within: Callable[[], AbstractContextManager[Any]] = nullcontext

    def seconds(self, stopwatch: Stopwatch) -> float:
        """Prepare, and time one run."""
        with self.within():
            prepared = self.prepare()
            return stopwatch(lambda: self.run(prepared))


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of values; ValueError if there is none."""
        if not values:
            raise ValueError("no values were given: a median needs at least one")
        low, median, high = (float(q) for q in np.percentile(values, [25, 50, 75]))
        return cls(median, low, high)


@dataclass(frozen=True)
class Timing:
    """All repeats of one task, each with the run of the reference before it, in seconds."""

    seconds: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def ratio(self) -> Spread:
        """Seconds over the reference's, repeat by repeat."""
        return Spread.of([s / r for s, r in zip(self.seconds, self.reference, strict=True)])

    @property
    def row(self) -> Measurement:
        """As a record holds them."""
        return {"seconds": list(self.seconds), "gradient_seconds": list(self.reference)}


def interleaved(
    reference: TimedTask,
    tasks: Mapping[str, TimedTask],
    *,
    rounds: int,
    seconds: float,
    stopwatch: Stopwatch,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Time tasks in turn, each right after the reference, again and again.

    One more round than ``rounds`` >= 1 comes first and is not kept, because first calls load and
    allocate what later ones find there: not with ``warm_up`` off, for callers that have run all
    before. No round is begun after ``seconds`` of the clock, but one is always kept. ValueError for
    fewer ``rounds``.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    kept: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    started = clock()
    with _collector_off():
        for number in range(0 if warm_up else 1, rounds + 1):
            if number > 1 and clock() - started > seconds:
                break
            reference.seconds(stopwatch)  # after a collection, memory and caches are cold
            for name, task in tasks.items():
                before = reference.seconds(stopwatch)
                pair = task.seconds(stopwatch), before
                if number > 0:
                    kept[name].append(pair)
            gc.collect()
    return {
        name: Timing(tuple(s for s, _ in pairs), tuple(r for _, r in pairs))
        for name, pairs in kept.items()
    }


def stopwatch_for(device: torch.device, threads: int | None) -> Stopwatch:
    """How to time on a device.

    A GPU works on after a call returns, so events in its queue are timed. On a CPU one thread is
    timed by the process's CPU time, which other programs do not add to, and several, or where it
    is not known how many (None), by the wall clock.
    """
    if device.type == "cuda":
        return partial(_event_seconds, device)
    return partial(_seconds_by, time.process_time if threads == 1 else time.perf_counter)


def _seconds_by(clock: Callable[[], float], work: Callable[[], object]) -> float:
    started = clock()
    work()
    return clock() - started


def _event_seconds(device: torch.device, work: Callable[[], object]) -> float:
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000.0


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors alive at one time during ``work``, beyond those alive before.

    Both ways ask the allocator: on a GPU its own counter, on a CPU the allocations and releases
    that torch's profiler notes. That is exact and the same at every run. The peak of the
    process's resident memory is neither: it holds what the allocator keeps for later and, first of
    all, the libraries. Counting the tensors that Python sees misses those that live inside one
    operation. What a library takes past torch's allocator (MKL's and oneDNN's buffers) is in
    neither count.
    """
    with _collector_off():
        return _peak_on_gpu(work, device) if device.type == "cuda" else _peak_on_cpu(work)


def _peak_on_gpu(work: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def _peak_on_cpu(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events: list[Any] = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), int(e.nbytes())) for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(accumulate((size for _, size in changes), initial=0))


@dataclass(frozen=True)
class Exponent:
    """The slope of log seconds over log size, with its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class ScalingCurve:
    """Seconds against a size.

    Attributes:
        sizes: ascending.
        seconds: at each.
        exponent: of the medians; None with fewer than three sizes.
    """

    sizes: tuple[float, ...]
    seconds: tuple[Spread, ...]
    exponent: Exponent | None


def power_law(sizes: Sequence[float], seconds: Sequence[float]) -> Exponent:
    """Fit ``seconds = c size^p`` by least squares on the logarithms.

    Raises:
        ValueError: with fewer than three sizes (two leave no error to estimate), or values that
            have no logarithm.
    """
    if len(sizes) != len(seconds) or len(set(sizes)) < 3:
        raise ValueError(
            "an exponent with its error needs three sizes or more and one time for each; got "
            f"{len(set(sizes))} different sizes and {len(seconds)} times"
        )
    if min(*sizes, *seconds) <= 0:
        raise ValueError(f"sizes and times must be > 0, got {list(sizes)} and {list(seconds)}")
    solution, covariance = np.polyfit(np.log(sizes), np.log(seconds), deg=1, cov=True)
    return Exponent(float(solution[0]), float(covariance[0, 0]) ** 0.5)


@contextmanager
def _collector_off() -> Iterator[None]:
    """No garbage collection but where asked for, and that only of what is made inside: fast."""
    was_on = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
