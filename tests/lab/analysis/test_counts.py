"""Tables and counts over many comparisons, from records whose answer is known."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit

from teleport.lab.analysis.counts import (
    control_rows,
    controls,
    count,
    holm,
    low_and_tuned,
    outcome_rows,
    schedule_name,
    tally,
    teleporting,
)
from teleport.lab.analysis.outcomes import FolderOutcome
from teleport.lab.experiments.arms import CONTROLS
from teleport.lab.records.compare import Comparison, best_baseline, summarise
from teleport.lab.records.runs import Run, by_arm

SEEDS = (0, 1, 2)


def make_runs(lr: float, factor: float, rival: str | None, order: int) -> list[Run]:
    """Runs whose loss is ``factor`` times 1, 0.5, 0.25; ``rival`` None is a plain run."""
    baseline = f"lr {lr:g}"
    arm = baseline if rival is None else f"{baseline} + {rival or 'teleport'}"
    runs = []
    for seed in SEEDS:
        noise = 1 + 1e-3 * seed if rival is not None else 1.0
        rows: list[dict[str, Any]] = [
            {
                "step": 10 * i,
                "train_seconds": 10.0 * i,
                "teleport_seconds": 0.0,
                "train_loss": loss,
                "test_loss": loss,
                "test_accuracy": 0.5,
            }
            for i, loss in enumerate((1.0, 0.5 * factor * noise, 0.25 * factor * noise))
        ]
        config = {
            "experiment": "made-up",
            "settings": {"optimizer": "sgd", "teleport": {"lr": None}},
            "arm": arm,
            "baseline": baseline,
            "seed": seed,
            "order": order,
            "training": {"lr": lr, "teleport": rival is not None, "rival": rival or ""},
        }
        runs.append(Run(Path("a.jsonl"), config, rows, [], "finished"))
    return runs


def make_block(arms: list[tuple[float, float, str | None]]) -> FolderOutcome:
    runs = [run for order, arm in enumerate(arms) for run in make_runs(*arm, order)]
    return FolderOutcome(Path("made-up"), runs, summarise(runs), best_baseline(by_arm(runs)))


factors = st.floats(0.3, 0.9) | st.floats(1.1, 3.0)


@given(factors, factors)
def test_low_and_tuned_are_counted_apart(low: float, tuned: float) -> None:
    block = make_block([(0.3, 0.5, None), (0.3, 0.5 * tuned, ""), (0.1, 1, None), (0.1, low, "")])
    places = low_and_tuned([block, block])
    assert places["tuned rate and gain"] == []
    for name, factor in (("low rate", low), ("tuned rate", tuned)):
        found = places[name]
        assert len(found) == 2, name
        gaps = [arm.to_own.log_loss for _, arm in found if arm.to_own is not None]
        assert gaps == [pytest.approx(math.log(factor), abs=2e-3)] * 2
        counted = count([arm.to_own for _, arm in found])
        assert counted.startswith(f"lower loss in {2 * (factor < 1)}, higher in {2 * (factor > 1)}")
    assert "unresolved 0" in tally([block])


comparisons = st.builds(
    Comparison,
    steps=st.just(1.0),
    seconds=st.just(1.0),
    log_loss=st.floats(-1, 1),
    log_loss_spread=st.floats(1e-3, 1),
    seeds=st.integers(1, 8),
    diverged=st.integers(0, 1),
)


@given(st.lists(comparisons | st.none(), max_size=12))
def test_every_comparison_is_counted_once(found: list[Comparison | None]) -> None:
    numbers = [int(part.split()[-1]) for part in count(found).split(", ")]
    assert sum(numbers) == len(found)
    parts = dict(part.rsplit(" ", 1) for part in count(found).split(", "))
    of = [c for c in found if c is not None]
    assert int(parts.get("diverged", 0)) == sum(c.diverged > 0 for c in of)
    assert int(parts["higher in"]) == sum(
        c.resolved and c.log_loss > 0 and not c.diverged for c in of
    )


@given(
    st.lists(st.tuples(st.integers(1, 250), st.integers(2, 8)) | st.none(), max_size=12),
    st.sampled_from([0.01, 0.05, 0.2]),
)
def test_holm_s_procedure_is_that_of_the_adjusted_p_values(
    drawn: list[tuple[int, int] | None], level: float
) -> None:
    """Adjusted: the running maximum of the sorted p-values times those still to come."""
    found = [None if d is None else with_p_value((d[0] - 0.5) / 1000, d[1]) for d in drawn]
    family = sorted((d[0] - 0.5) / 1000 for d in drawn if d is not None)
    adjusted = [
        max(p * (len(family) - i) for i, p in enumerate(family[: k + 1]))
        for k in range(len(family))
    ]
    kept = holm(found, level)
    assert len(kept) == sum(p <= level for p in adjusted)
    if level == 0.05:
        assert all(c.resolved for c in kept)


def with_p_value(p_value: float, seeds: int) -> Comparison:
    quantile = -float(stdtrit(seeds - 1, p_value / 2))
    return Comparison(1.0, 1.0, 0.01 * quantile / math.sqrt(seeds), 0.01, seeds)


@given(factors, factors)
def test_a_teleport_against_its_control_is_the_ratio_of_their_losses(
    teleport: float, control: float
) -> None:
    block = make_block([(0.1, 1, None), (0.1, teleport, ""), (0.1, control, "some control")])
    (arm,) = teleporting(block)
    ((name, (own, against)),) = controls(block, arm).items()
    assert name == "some control"
    assert own.log_loss == pytest.approx(math.log(control), abs=2e-3)
    assert against.log_loss == pytest.approx(math.log(teleport / control), abs=2e-3)


def test_a_single_rate_counts_as_tuned() -> None:
    places = low_and_tuned([make_block([(0.1, 1, None), (0.1, 0.5, "")])])
    assert [len(found) for found in places.values()] == [0, 1, 0]


@pytest.mark.parametrize("start", [{"init": "he"}, {"head_gain": 3.0}])
def test_teleports_from_another_initial_gain_are_counted_apart(start: dict[str, Any]) -> None:
    low, tuned = [(0.1, 1.0, None), (0.1, 0.8, "")], [(0.3, 0.5, None), (0.3, 0.6, "")]
    block = make_block([*low, *tuned])
    for run in block.runs:
        if run.config["training"]["lr"] == 0.3:
            run.config["training"] |= start
    assert [arm.arm for arm in teleporting(block)] == ["lr 0.1 + teleport"]
    assert [arm.arm for arm in teleporting(block, gained=True)] == ["lr 0.3 + teleport"]
    places = low_and_tuned([block])
    assert [len(found) for found in places.values()] == [0, 1, 1]
    assert [row[3] for row in outcome_rows([block])[1:]] == ["lr 0.1", "lr 0.3"]


def test_tables_have_a_row_for_every_teleport_and_only_those_with_all_controls() -> None:
    some = [(0.1, 1.0, None), (0.1, 0.8, ""), (0.3, 1.0, None), (0.3, 1.2, "")]
    block = make_block([*some, *((0.3, 1.1, name) for name in CONTROLS), (0.1, 1, CONTROLS[0])])
    head, *rows = outcome_rows([block])
    assert [row[3] for row in rows] == ["lr 0.1", "lr 0.3"]
    assert all(len(row) == len(head) for row in rows)
    assert rows[0][-2].startswith("**-0.22")
    assert rows[1][head.index("steps")] == "-"
    head, row = control_rows([block])
    assert row[3] == "lr 0.3"
    assert len(row) == len(head)
    assert row[head.index(f"teleport against {CONTROLS[0]}")] == "**+0.087 ± 0.000**"


def test_the_paper_s_schedule_is_known_by_its_fixed_step() -> None:
    block = make_block([(0.1, 1, None), (0.1, 0.5, "")])
    assert schedule_name(block) == "default"
    block.runs[0].config["settings"]["teleport"]["lr"] = 0.2
    assert schedule_name(block) == "paper"
