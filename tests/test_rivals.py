"""The comparison on the same batch: all rivals are there, and the numbers are what they say."""

import math

import pytest
import torch
from torch import nn

from teleport import RunError, Teleporter, rivals
from teleport.rivals import same_batch_table, speed_ways, symmetry_speed_ratio, ways


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


def test_the_speed_ratio_is_that_of_the_seconds() -> None:
    speed = symmetry_speed_ratio(d=24, n=8, layers=3, steps=2, repeats=3, activation=nn.LeakyReLU)
    assert list(speed.timings) == list(speed_ways(2))
    for program, timing in speed.timings.items():
        pairs = zip(timing.seconds, speed.timings["null space"].seconds, strict=True)
        assert speed.ratio(program).median == sorted(theirs / ours for theirs, ours in pairs)[1]
    assert speed.ratio("null space").median == 1.0


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


def test_sizes_out_of_range_are_refused() -> None:
    for wrong in ({"n": 9, "d": 8}, {"layers": 1}, {"steps": 0}, {"repeats": 0}):
        with pytest.raises(ValueError, match="sizes"):
            symmetry_speed_ratio(**{"d": 8, "n": 4, **wrong})
