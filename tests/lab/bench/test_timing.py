import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teleport.lab.bench.timing import (
    Spread,
    TimedTask,
    Timing,
    interleaved,
    peak_bytes,
    power_law,
    stopwatch_for,
)

CPU = torch.device("cpu")


class Clock:
    """Time that passes only where a test says so; ``speed`` is how slow the machine is just now."""

    def __init__(self) -> None:
        self.now, self.speed = 0.0, 1.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def spend(self, name: str, seconds: float) -> None:
        self.log.append(name)
        self.now += seconds * self.speed

    def stopwatch(self, work: Callable[[], object]) -> float:
        started = self.now
        work()
        return self.now - started

    def task(self, name: str, seconds: float) -> TimedTask:
        return TimedTask(lambda _: self.spend(name, seconds))


def measured(
    clock: Clock, reference: TimedTask, tasks: dict[str, TimedTask], **options: float
) -> dict:
    settings = {"rounds": 3, "seconds": 1e9, **options}
    return interleaved(reference, tasks, stopwatch=clock.stopwatch, clock=clock, **settings)


def test_every_task_runs_right_after_the_reference_and_the_first_round_is_not_kept() -> None:
    clock = Clock()
    tasks = {name: clock.task(name, 2.0) for name in "ab"}
    timings = measured(clock, clock.task("r", 1.0), tasks, rounds=2)
    assert clock.log == ["r", *"rarb"] * 3
    assert {name: len(t.seconds) for name, t in timings.items()} == {"a": 2, "b": 2}
    assert timings["a"] == Timing((2.0, 2.0), (1.0, 1.0))


def test_preparation_and_surroundings_are_not_timed_and_surround_every_run() -> None:
    clock = Clock()

    @contextmanager
    def within() -> Iterator[None]:
        clock.spend("in", 100.0)
        yield
        clock.spend("out", 100.0)

    def prepare() -> str:
        clock.spend("prepare", 100.0)
        return "made"

    task = TimedTask(lambda made: clock.spend(f"run on {made}", 3.0), prepare, within)
    timing = measured(clock, clock.task("r", 1.0), {"a": task}, rounds=1)["a"]
    assert timing.seconds == (3.0,)
    assert clock.log[-4:] == ["in", "prepare", "run on made", "out"]


@given(
    ratio=st.floats(0.01, 100.0),
    speeds=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=8),
)
def test_a_machine_that_changes_its_speed_between_rounds_does_not_change_a_ratio(
    ratio: float, speeds: list[float]
) -> None:
    clock = Clock()
    left = iter([1.0, *speeds])

    def reference(_: object) -> None:
        if clock.log.count("r") % 2 == 0:  # the reference that opens a round
            clock.speed = next(left)
        clock.spend("r", 1.0)

    tasks = {"a": clock.task("a", ratio)}
    timing = measured(clock, TimedTask(reference), tasks, rounds=len(speeds))["a"]
    assert timing.reference == pytest.approx(speeds)
    spread = timing.ratio
    for value in (spread.low, spread.median, spread.high):
        assert value == pytest.approx(ratio, rel=1e-6)


@given(values=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=9), outlier=st.floats(1e3, 1e6))
def test_spread_is_median_and_quartiles_and_one_outlier_moves_it_no_further_than_a_neighbour(
    values: list[float], outlier: float
) -> None:
    spread = Spread.of(values)
    assert spread.median == pytest.approx(statistics.median(values))
    assert min(values) <= spread.low <= spread.median <= spread.high <= max(values)
    if len(values) > 1:
        assert Spread.of([*values, outlier]).median <= max(values) * (1 + 1e-12)


def test_quartiles_of_known_numbers() -> None:
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Timing((2.0, 9.0, 8.0), (1.0, 3.0, 4.0)).ratio == Spread(2.0, 2.0, 2.5)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 1), (14.9, 2), (1e9, 10)])
def test_no_round_begins_after_the_time_is_up_but_one_is_kept(seconds: float, rounds: int) -> None:
    clock = Clock()
    tasks = {"a": clock.task("a", 3.0)}  # a round takes 5: the reference twice and the task
    timing = measured(clock, clock.task("r", 1.0), tasks, rounds=10, seconds=seconds)["a"]
    assert len(timing.seconds) == rounds


def test_collection_of_garbage_waits_and_is_as_before_after_an_error() -> None:
    seen = []

    def fails(_: object) -> None:
        seen.append(gc.isenabled())
        raise KeyError

    clock = Clock()
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    with pytest.raises(KeyError):
        measured(clock, clock.task("r", 1.0), {"a": TimedTask(fails)})
    assert seen == [False]
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_nothing_to_measure_is_refused() -> None:
    clock = Clock()
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        measured(clock, clock.task("r", 1.0), {}, rounds=0)
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


def test_one_thread_is_timed_by_its_own_work_and_several_by_the_wall_clock() -> None:
    def sleep() -> None:
        time.sleep(0.05)

    assert stopwatch_for(CPU, 1)(sleep) < 0.05
    assert stopwatch_for(CPU, 2)(sleep) >= 0.05
    assert stopwatch_for(CPU, None)(sleep) >= 0.05

    def work() -> None:
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass

    assert stopwatch_for(CPU, 1)(work) >= 0.02


def test_a_gpu_is_timed_by_events_around_the_work_and_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: "Event") -> float:
            log.append("asked")
            return 1500.0

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        log.append(str(device))
        yield

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    seconds = stopwatch_for(torch.device("cuda:1"), 1)(lambda: log.append("work"))
    assert seconds == 1.5
    assert log == ["cuda:1", "wait", "event", "work", "event", "wait", "asked"]


@given(
    power=st.floats(-1.0, 4.0),
    factor=st.floats(1e-6, 1e3),
    sizes=st.lists(st.integers(0, 20).map(lambda k: 1.5**k), min_size=3, max_size=8, unique=True),
)
def test_a_power_law_is_recovered_exactly(power: float, factor: float, sizes: list[float]) -> None:
    fit = power_law(sizes, [factor * size**power for size in sizes])
    assert fit.value == pytest.approx(power, abs=1e-6)
    assert fit.error == pytest.approx(0.0, abs=1e-5)


@given(seed=st.integers(0, 2**32 - 1), power=st.floats(-1.0, 3.0), noise=st.floats(0.01, 0.5))
def test_slope_and_standard_error_are_those_of_least_squares(
    seed: int, power: float, noise: float
) -> None:
    rng = np.random.default_rng(seed)
    x = np.log(2.0) * np.arange(1, 7)
    y = power * x + rng.normal(0.0, noise, 6)
    fit = power_law(list(np.exp(x)), list(np.exp(y)))
    design = np.stack([x, np.ones(6)], axis=1)
    solution, residual, *_ = np.linalg.lstsq(design, y, rcond=None)
    covariance = residual[0] / (6 - 2) * np.linalg.inv(design.T @ design)
    assert fit.value == pytest.approx(solution[0], abs=1e-9)
    assert fit.error == pytest.approx(covariance[0, 0] ** 0.5, abs=1e-9)


@pytest.mark.parametrize(
    ("sizes", "seconds", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0], "three sizes"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], "one time for each"),
        ([1.0, 2.0, 1.0], [1.0, 2.0, 1.0], "2 different sizes"),
        ([1.0, 2.0, 3.0], [1.0, 0.0, 2.0], "must be > 0"),
        ([0.0, 2.0, 3.0], [1.0, 1.0, 2.0], "must be > 0"),
    ],
)
def test_an_exponent_needs_points_it_can_be_fitted_to(
    sizes: list[float], seconds: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        power_law(sizes, seconds)


@given(
    steps=st.lists(st.tuples(st.integers(1, 100_000), st.integers(0, 3)), min_size=1, max_size=8)
)
def test_peak_memory_is_that_of_the_tensors_alive_together(steps: list[tuple[int, int]]) -> None:
    """Each step allocates some bytes and then drops the oldest few tensors."""
    held = torch.empty(1000, dtype=torch.uint8)  # alive before: not counted

    def work() -> None:
        alive = [held]
        for size, drops in steps:
            alive.append(torch.empty(size, dtype=torch.uint8))
            del alive[:drops]

    sizes: list[int] = [0]  # the held one, which costs nothing
    peak = 0
    for size, drops in steps:
        sizes.append(size)
        peak = max(peak, sum(sizes))
        del sizes[:drops]
    assert peak_bytes(work, CPU) == peak


def test_peak_memory_sees_what_lives_inside_an_operation_and_in_a_backward_pass() -> None:
    x = torch.randn(100, 200, requires_grad=True)

    def backward() -> None:
        torch.autograd.grad(torch.tanh(x).square().sum(), x)

    # tanh, its square, and in the backward pass at least the cotangents of both
    assert peak_bytes(backward, CPU) >= 3 * 100 * 200 * 4

    def pinv() -> None:
        torch.linalg.pinv(x.detach())

    assert peak_bytes(pinv, CPU) > 200 * 100 * 4  # the result alone
