"""What teleports did and cost, and differences along a training, from records of known answer."""

import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teleport.lab.analysis.curves import differences_figure, loss_differences
from teleport.lab.analysis.outcomes import FolderOutcome
from teleport.lab.analysis.teleports import (
    arms_of,
    by_the_usual_cut,
    exploded,
    last_looks,
    schedule_rows,
    time_rows,
)
from teleport.lab.records.compare import best_baseline, summarise
from teleport.lab.records.runs import Run, by_arm

STEPS = 10 * np.arange(6)
RATE = 0.02
"""Of the decay of a plain run's loss in a step; its logarithm is a straight line."""


def make_run(
    seed: int, factor: float | None, cost: float = 0.0, *, steps: int = 50, ends: str = "finished"
) -> Run:
    """A run of ``exp(-RATE step)``; with a ``factor`` times that after a teleport of ``cost`` s.

    A training step takes half a second, so a teleport costs ``2 cost`` steps.
    """
    rows: list[dict[str, Any]] = [
        {
            "step": int(step),
            "train_seconds": 0.5 * step,
            "teleport_seconds": cost if step else 0.0,
            "train_loss": math.exp(-RATE * step) * (1.0 if factor is None or not step else factor),
            "test_loss": 1.0,
            "test_accuracy": 0.5,
        }
        for step in STEPS
    ]
    report = {
        "step": 0,
        "grad_norm_before": 2.0,
        "grad_norm_after": 3.0,
        "loss_before": 1.0,
        "loss_after": 1.0,
        "held_out_before": 1.0,
        "held_out_after": 1.0,
    }
    config = {
        "experiment": "made-up",
        "settings": {"optimizer": "sgd", "teleport": {"lr": None, "cap": None, "batch_size": 64}},
        "arm": "lr 0.1" + (" + teleport" if factor is not None else ""),
        "baseline": "lr 0.1",
        "seed": seed,
        "order": factor is not None,
        "training": {"lr": 0.1, "teleport": factor is not None, "rival": ""},
    }
    teleports = [report] if factor is not None else []
    return Run(Path("a.jsonl"), config, rows, teleports, ends, steps=steps)


def make_block(runs: list[Run]) -> FolderOutcome:
    return FolderOutcome(Path("made-up"), runs, summarise(runs), best_baseline(by_arm(runs)))


def make_pair(factor: float, cost: float, **ending: Any) -> FolderOutcome:
    plain = [make_run(seed, None) for seed in (0, 1, 2)]
    return make_block([*plain, *(make_run(seed, factor, cost, **ending) for seed in (2, 1, 0))])


@given(st.floats(0.2, 5.0), st.floats(0.0, 20.0))
def test_differences_are_those_of_the_logarithms_at_equal_steps_and_at_equal_time(
    factor: float, cost: float
) -> None:
    """In equal time the baseline makes ``2 cost`` steps more, and each lowers its log loss."""
    groups = by_arm(make_pair(factor, cost).runs)
    arm, plain = groups["lr 0.1 + teleport"], groups["lr 0.1"]
    steps, values = loss_differences(arm, plain)
    assert np.array_equal(steps, STEPS)
    assert values == pytest.approx(np.broadcast_to([0, *[math.log(factor)] * 5], (3, 6)))
    times, later = loss_differences(arm, plain, "work")
    assert times[1:] == pytest.approx(STEPS[1 : len(times)] + 2 * cost)
    assert times[-1] <= 50 < times[-1] + 10 + (2 * cost if len(times) == 1 else 0)
    assert later[:, 1:] == pytest.approx(math.log(factor) + 2 * cost * RATE)


@pytest.mark.parametrize(("factor", "cost"), [(20.0, 5.0), (1.0, 0.0)])
def test_the_figure_has_a_panel_for_every_optimizer_and_place_and_one_legend(
    factor: float, cost: float
) -> None:
    block = make_pair(factor, cost)
    figure = differences_figure({"a": [block], "b": [block]}, ("step", "work"), most=0.4)
    figure.savefig(BytesIO())
    assert [axes.get_title() for axes in figure.axes] == ["a, sgd"] * 2 + ["b, sgd"] * 2
    assert len(figure.legends) == 1
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert -0.4 <= low == -high or factor == 1.0
        left = [line for line in axes.lines if line.get_marker() == "^"]
        assert len(left) == (factor > 2), "a curve that leaves is marked on the edge"


def test_trainings_that_explode_are_named_with_how_many_of_their_runs() -> None:
    assert exploded([make_pair(0.9, 0.0)]) == []
    above = math.exp(RATE * 50) * 1.01
    assert exploded([make_pair(above, 0.0)]) == ["made-up, lr 0.1 + teleport: 3 of 3 runs"]
    assert exploded([make_pair(0.9, 0.0, ends="diverged")]) == [
        "made-up, lr 0.1 + teleport: 3 of 3 runs"
    ]
    assert exploded([make_pair(math.nan, 0.0)]) == ["made-up, lr 0.1 + teleport: 3 of 3 runs"]


def test_a_last_evaluation_before_the_end_is_named() -> None:
    assert last_looks([make_pair(0.9, 0.0)]) == []
    assert last_looks([make_pair(0.9, 0.0, steps=58)]) == ["made-up: after 50 of 58 steps"]


def test_tables_of_schedules_and_times_say_growth_and_share() -> None:
    block = make_pair(0.9, 5.0)
    ((_, arm),) = arms_of([block])
    assert arm.arm == "lr 0.1 + teleport"
    head, row = schedule_rows([block])
    cells = dict(zip(head, row, strict=True))
    assert cells["teleports"] == "1"
    assert cells["moved"] == "100%"
    assert cells["growth of one"] == cells["of all"][:3] == "1.5"
    assert cells["time"] == f"{5 / 30:.0%}"
    head, row = time_rows([block])
    cells = dict(zip(head, row, strict=True))
    assert cells["one teleport, in training steps"] == "10 (10 to 10)"
    assert cells["images / training batch"] == "2"
    assert cells["share of time"] == "17% (17% to 17%)"


def test_records_without_a_teleport_from_the_tuned_gain_are_the_older_ones() -> None:
    block = make_pair(0.9, 0.0)
    assert by_the_usual_cut([block]) == ["made-up"]
    for run in block.runs:
        run.config["training"]["head_gain"] = 3.0
    assert by_the_usual_cut([block]) == []
