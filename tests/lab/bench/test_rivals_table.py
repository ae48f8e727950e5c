"""The comparison on the same batch: all rivals are there, and the numbers are what they say."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from teleport import RunError, Teleporter
from teleport.lab.bench import rivals
from teleport.lab.bench.rivals import (
    repeated_ways,
    same_batch_table,
    same_budget_table,
    speed_ways,
    symmetry_timings,
)
from teleport.rivals.ways import ways


def test_every_way_is_in_the_table_once_with_what_it_promises() -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    rows = same_batch_table(hidden=(40, 40), samples=16, growth=1.2, warmup_steps=5, repeats=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert [row.way for row in rows] == list(ways(1.2))
    by_name = {row.way: row for row in rows}
    for name, row in by_name.items():
        assert all(math.isfinite(v) for v in (row.growth, row.held_out_drift, row.move))
        assert len(row.timing.seconds) == 1
        assert min(row.timing.seconds + row.timing.reference) > 0.0
        assert row.move > 0.0
        if "level" not in name and "noise" not in name and "rescaled" not in name:
            assert row.drift < 1e-4, name
        if any(word in name for word in ("null space", "symmetry", "level", "same growth")):
            assert row.growth == pytest.approx(1.2, rel=2e-3), name
    ours = by_name["null space"]
    for name in ("noise, same norm", "random null direction, same norm"):
        assert by_name[name].move == pytest.approx(ours.move, rel=1e-5)
    assert by_name["change of basis"].held_out_drift < 1e-5


def test_every_way_has_the_same_time_and_tells_what_came_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that gives a gradient one second and a step two: three steps fit into six."""

    def stopwatch(run: Callable[[], object]) -> float:
        return 2.0 if isinstance(run(), type(None)) else 1.0

    monkeypatch.setattr(rivals, "stopwatch_for", lambda device, threads: stopwatch)
    state = torch.get_rng_state()
    how = {"hidden": (40, 40), "samples": 16, "growth": 1.2, "warmup_steps": 5}
    rows = same_budget_table(gradients=6.0, **how)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row.way for row in rows] == list(repeated_ways(1.2))
    assert not any("8 steps" in row.way or "first-order" in row.way for row in rows)
    once = {row.way: row for row in same_budget_table(gradients=1.0, **how)}
    for row in rows:
        first = once[row.way]
        assert (first.steps, first.seconds, first.gradient_seconds) == (1, 2.0, 1.0)
        if row.way in ("layers rescaled", "change of basis, best of 20"):
            continue  # ends when it has nowhere to go
        assert (row.steps, row.seconds) == (3, 6.0), row
        if any(word in row.way for word in ("null space", "symmetry", "level", "same growth")):
            assert row.growth == pytest.approx(1.2**3, rel=5e-3), row.way
            assert first.growth == pytest.approx(1.2, rel=2e-3)
        if any(word in row.way for word in ("null", "symmetry", "basis")):
            assert row.drift < 1e-4, row.way
    by_name = {row.way: row for row in rows}
    assert by_name["change of basis"].held_out_drift < 1e-5
    assert by_name["noise, same norm"].drift > 1e-4
    rescaled = by_name["layers rescaled"]
    assert rescaled.steps == 1
    assert rescaled.note == "every layer has the wanted norm already"


@pytest.mark.parametrize("gradients", [0.0, -1.0, math.inf, math.nan])
def test_a_budget_out_of_range_is_refused(gradients: float) -> None:
    with pytest.raises(ValueError, match="gradients must be > 0 and finite"):
        same_budget_table(gradients=gradients)


def test_every_program_is_timed_so_often() -> None:
    timings = symmetry_timings(d=24, n=8, layers=3, steps=2, repeats=3, activation="leaky_relu")
    assert list(timings) == list(speed_ways(2))
    for timing in timings.values():
        assert len(timing.seconds) == len(timing.reference) == 3
        assert min(timing.seconds + timing.reference) > 0.0


def test_every_program_takes_the_steps_it_is_timed_for() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 12), torch.randint(10, (6,))
    for name, way in speed_ways(3).items():
        model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10))
        report = way(model).step(lambda net=model: nn.functional.cross_entropy(net(x), y))
        assert (report.steps, report.rolled_back) == (3, False), name


def test_a_teleport_that_did_not_move_is_not_timed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    x, y = torch.randn(9, 2), torch.randint(2, (9,))  # more samples than inputs: no null space

    def closure() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    with pytest.raises(RunError, match="did not move: nothing can move"):
        rivals._move((Teleporter(model), [closure]))


def test_threads_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def ours(model: nn.Sequential) -> Teleporter:
        seen.append(torch.get_num_threads())
        return Teleporter(model, steps=1, lr=1e-6, cap=1e9)

    monkeypatch.setattr(rivals, "speed_ways", lambda steps: {"null space": ours})
    before = torch.get_num_threads()
    symmetry_timings(d=12, n=4, steps=1, repeats=1, threads=before + 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_sizes_out_of_range_are_refused() -> None:
    for wrong in ({"n": 9, "d": 8}, {"layers": 1}, {"steps": 0}, {"repeats": 0}):
        with pytest.raises(ValueError, match="sizes"):
            symmetry_timings(**{"d": 8, "n": 4, **wrong})
