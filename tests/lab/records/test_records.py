import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from teleport.cli import main
from teleport.errors import RunError
from teleport.lab.analysis.outcomes import blocks
from teleport.lab.experiments.arms import Arm, RunSettings
from teleport.lab.experiments.run import run_arms
from teleport.lab.paper.input_energy import read_spectra
from teleport.lab.records.compare import best_baseline, compare, summarise
from teleport.lab.records.runs import Run, by_arm, check_no_copies, read_run, read_runs
from teleport.lab.records.writer import RecordWriter
from tests.support.results import RESULTS, copy_records


def make_run(
    losses: list[float], arm: str = "a", teleport: bool = False, seed: int = 0, pace: float = 1.0
) -> Run:
    """A run with one evaluation every 10 steps, each step taking ``pace`` seconds."""
    rows: list[dict[str, Any]] = [
        {
            "step": 10 * i,
            "train_seconds": 10 * i * pace,
            "teleport_seconds": 0.0,
            "train_loss": loss,
            "test_loss": loss,
            "test_accuracy": 0.5,
        }
        for i, loss in enumerate(losses)
    ]
    config = {
        "arm": arm,
        "seed": seed,
        "order": int(teleport),
        "baseline": "a",
        "training": {"teleport": teleport},
    }
    return Run(Path(f"{arm}.jsonl"), config, rows, [], "finished")


CONFIG = {
    "type": "config",
    "experiment": "mine",
    "arm": "a",
    "baseline": "a",
    "order": 0,
    "seed": 0,
    "training": {"lr": 0.1, "teleport": False},
    "settings": {"optimizer": "sgd", "preset": "tiny"},
}
"""As little as the first row of a run says."""

LOSSES = {"train_loss": 1.0, "test_loss": 1.0, "test_accuracy": None}
EVALUATION = {"step": 0, "train_seconds": 0.0, "teleport_seconds": 0.0, **LOSSES}


losses = st.lists(st.floats(1e-3, 10), min_size=2, max_size=8)
thousandths = st.integers(-1000, 1000).map(lambda number: number / 1000)  # spreads above rounding


@given(losses)
def test_a_run_compared_with_itself_is_at_ratio_one_and_gap_zero(values: list[float]) -> None:
    run = make_run(values)
    result = compare([run], [run])
    assert result.steps == result.seconds == 1.0 or math.isnan(result.steps)
    assert result.log_loss == 0.0


@given(losses, st.floats(0.5, 0.99))
def test_a_lower_loss_gives_the_log_of_the_factor(values: list[float], factor: float) -> None:
    lower = make_run([values[0], *(factor * v for v in values[1:])], teleport=True)
    gap = compare([lower], [make_run(values)]).log_loss
    assert gap == pytest.approx(math.log(factor), rel=1e-9)


@given(st.lists(thousandths, min_size=2, max_size=8, unique=True), thousandths)
def test_resolved_is_what_students_t_test_says(spread: list[float], shift: float) -> None:
    gaps = [value + shift for value in spread]
    arm = [make_run([1.0, math.exp(gap)], seed=seed) for seed, gap in enumerate(gaps)]
    plain = [make_run([1.0, 1.0], seed=seed) for seed in range(len(gaps) + 1)]
    result = compare(arm, plain)
    assert result.seeds == len(gaps)
    p_value = ttest_1samp(gaps, 0.0).pvalue
    assume(abs(p_value - 0.05) > 1e-6)
    assert result.resolved == (p_value < 0.05)


@given(losses, losses, losses, losses)
def test_the_test_loss_is_compared_as_the_train_loss_is(
    one: list[float], two: list[float], base_one: list[float], base_two: list[float]
) -> None:
    def both(train: list[float], test: list[float]) -> Run:
        run = make_run(train)
        for row, loss in zip(run.evaluations, test, strict=False):
            row["test_loss"] = loss
        return run

    count = min(map(len, (one, two, base_one, base_two)))
    one, two, base_one, base_two = (v[:count] for v in (one, two, base_one, base_two))
    found = compare([both(two, one)], [both(base_two, base_one)], "test")
    expected = compare([make_run(one)], [make_run(base_one)])
    assert repr(found) == repr(expected)  # NaN equals NaN


def test_one_seed_resolves_nothing() -> None:
    result = compare([make_run([1.0, 0.1])], [make_run([1.0, 1.0])])
    assert result.seeds == 1
    assert not result.resolved


def test_a_run_that_diverged_at_once_has_no_gap() -> None:
    gone, base = make_run([2.0], teleport=True), make_run([2.0, 1.0])
    assert math.isnan(compare([gone], [base]).log_loss)
    assert not compare([gone], [base]).resolved


def test_the_way_to_a_loss_is_interpolated_in_log_loss() -> None:
    run = make_run([4.0, 1.0])
    assert run.first_below(2.0, run.column("step")) == pytest.approx(5.0)


def test_a_loss_that_is_never_reached_gives_nan() -> None:
    run = make_run([4.0, 3.0])
    assert math.isnan(run.first_below(1.0, run.column("step")))


@given(losses, st.floats(0.1, 10.0), st.floats(0.1, 10.0), st.floats(0.0, 100.0), st.data())
def test_seconds_are_counted_in_the_run_s_own_steps(
    values: list[float], pace: float, base_pace: float, teleport: float, data: st.DataObject
) -> None:
    """A machine that is slower in one of the two runs changes nothing; a teleport's time counts."""
    at = data.draw(st.integers(1, len(values) - 1))
    moved, base = make_run(values, teleport=True, pace=pace), make_run(values, pace=base_pace)
    for row in moved.evaluations[at:]:
        row["teleport_seconds"] = teleport * pace
    result = compare([moved], [base])
    way = base.first_below(values[-1], base.column("step"))
    assume(way > 0)
    own = moved.column("step") + np.where(np.arange(len(values)) >= at, teleport, 0.0)
    expected = moved.first_below(values[-1], own) / way
    assert result.steps == 1.0
    assert result.seconds == pytest.approx(expected, rel=1e-9)
    assert result.seconds >= 1.0 - 1e-12


@given(st.lists(st.one_of(st.none(), st.integers(1, 9)), min_size=1, max_size=7))
def test_the_way_is_the_median_and_never_is_the_longest(reached: list[int | None]) -> None:
    """``reached``: at which evaluation of ten each seed is at the baseline's final loss."""
    base = [make_run([4.0] * 9 + [2.0], seed=seed) for seed in range(len(reached))]
    ways = [
        make_run([4.0] * (10 if k is None else k) + [2.0] * (0 if k is None else 10 - k), seed=seed)
        for seed, k in enumerate(reached)
    ]
    found = compare(ways, base).steps
    ratios = sorted(math.inf if k is None else k / 9 for k in reached)
    middle = (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2
    assert math.isnan(found) if math.isinf(middle) else found == pytest.approx(middle)


@given(st.lists(thousandths, min_size=2, max_size=8, unique=True), thousandths)
def test_the_p_value_is_that_of_students_t_test(spread: list[float], shift: float) -> None:
    gaps = [value + shift for value in spread]
    arm = [make_run([1.0, math.exp(gap)], seed=seed) for seed, gap in enumerate(gaps)]
    result = compare(arm, [make_run([1.0, 1.0], seed=seed) for seed in range(len(gaps))])
    assert result.p_value == pytest.approx(ttest_1samp(gaps, 0.0).pvalue, rel=1e-5, abs=1e-9)


def test_the_best_baseline_is_the_lowest_finished_one_without_teleport() -> None:
    runs = [
        make_run([4.0, 2.0], "a"),
        make_run([4.0, 1.0], "b"),
        make_run([4.0, 0.5], "c", teleport=True),
    ]
    assert best_baseline(by_arm(runs)) == "b"
    lines = {line.arm: line for line in summarise(runs)}
    assert lines["b"].to_best is None
    assert lines["c"].to_own is not None
    assert lines["c"].to_own.log_loss == pytest.approx(math.log(0.25))


with_zeros = st.lists(st.just(0.0) | st.floats(1e-3, 10), min_size=2, max_size=8)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@given(st.lists(with_zeros, min_size=2, max_size=4), with_zeros)
def test_a_loss_of_exactly_zero_is_lower_than_any_other(
    moved: list[list[float]], plain: list[float]
) -> None:
    base = [make_run(plain, seed=seed) for seed in range(len(moved))]
    runs = [make_run(losses, "b", True, seed) for seed, losses in enumerate(moved)]
    summary = summarise([*base, *runs])[1]
    assert best_baseline(by_arm([*base, *runs])) == "a"
    for run in (*base, *runs):
        assert compare([run], [run]).log_loss == 0.0
        pairs = list(zip(run.column("train_loss")[1:], plain[1:], strict=False))
        infinite = {one < two for one, two in pairs if one != two and 0.0 in (one, two)}
        found = compare([run], base).log_loss
        assert math.isfinite(found) == (not infinite)
        if len(infinite) == 1:  # of infinities with both signs there is no mean
            assert found == (-math.inf if infinite == {True} else math.inf)
    assert summary.to_own is not None
    for number in (summary.to_own.steps, summary.to_own.seconds, summary.to_own.p_value):
        assert number >= 0.0 or math.isnan(number)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=3), st.integers(1, 3))
def test_the_best_of_baselines_is_one_at_zero(losses: list[float], seeds: int) -> None:
    others = [make_run([4.0, loss], "b", seed=seed) for seed, loss in enumerate(losses)]
    best = [make_run([4.0, 0.0], "a", seed=seed) for seed in range(seeds)]
    assert best_baseline(by_arm([*others, *best])) == "a"


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_loss_that_falls_to_zero_is_reached_when_it_is_seen() -> None:
    run = make_run([4.0, 1.0, 0.0, 0.0])
    assert [run.first_below(loss, run.column("step")) for loss in (0.5, 0.0)] == [20.0, 20.0]
    assert run.first_below(2.0, run.column("step")) == pytest.approx(5.0)


def test_a_gradient_of_zero_has_not_grown() -> None:
    row = {"loss_before": 0.0, "loss_after": 0.0, "held_out_before": 0.0, "held_out_after": 0.0}
    norms = [(0.0, 0.0), (2.0, 6.0)]
    rows = [row | {"grad_norm_before": old, "grad_norm_after": new} for old, new in norms]
    run = replace(make_run([1.0, 0.0], teleport=True), teleports=rows)
    (summary,) = summarise([run])
    assert summary.growth == 2.0


def test_what_is_written_is_read_back_and_not_finite_becomes_missing(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "r.jsonl") as writer:
        writer.write("config", **{**CONFIG, "seed": 3})
        writer.write("evaluation", **{**EVALUATION, "train_loss": math.nan, "test_loss": 1.5})
        writer.write("end", status="diverged")
    run = read_run(tmp_path / "r.jsonl")
    assert (run.arm, run.seed, run.status) == ("a", 3, "diverged")
    assert np.isnan(run.column("train_loss")).all()
    assert run.column("test_loss").tolist() == [1.5]


def test_a_torn_last_line_loses_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    rows = [CONFIG, {"type": "evaluation", **EVALUATION}]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"type": "evalu')
    run = read_run(path)
    assert len(run.evaluations) == 1
    assert run.status == "unfinished"


def test_damage_elsewhere_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f'{json.dumps(CONFIG)}\nnot json\n{{"type": "end"}}\n')
    with pytest.raises(RunError, match=r"r\.jsonl, line 2"):
        read_run(path)


@pytest.mark.parametrize(
    "line",
    [
        *(b"5", b"[]", b"{}", b"\xff\x00", b"[" * 100_000),
        *(b'{"step": 1}', b'{"type": 1}', b'{"type": "evaluation"}'),
        b'{"type": "evaluation", "step": ' + b"9" * 5000 + b"}",
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_a_line_of_another_kind_is_named(tmp_path: Path, line: bytes, number: int) -> None:
    path = tmp_path / "r.jsonl"
    lines = [json.dumps(CONFIG).encode(), b'{"type": "end", "status": "finished"}']
    path.write_bytes(b"\n".join([*lines[: number - 1], line, *lines[number - 1 :]]) + b"\n")
    with pytest.raises(RunError, match=rf"r\.jsonl, line {number}"):
        read_runs(tmp_path)


def test_a_record_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"type": "config", "order": 0, "seed": 0}\n')
    with pytest.raises(RunError, match=r"r\.jsonl is not the record of a run"):
        read_runs(tmp_path)


@pytest.mark.parametrize("left", [b"", b'{"type": "conf', b"\0\0\0"])
def test_a_record_that_has_not_begun_is_left_out(tmp_path: Path, left: bytes) -> None:
    """What a kill or a full disk leaves before the first row."""
    (tmp_path / "a.jsonl").write_text(json.dumps(CONFIG) + "\n")
    (tmp_path / "b.jsonl").write_bytes(left)
    assert [run.path.name for run in read_runs(tmp_path)] == ["a.jsonl"]
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(RunError, match="holds no records"):
        read_runs(tmp_path)


@pytest.mark.filterwarnings("error")
def test_runs_without_an_evaluation_are_compared_with_nothing() -> None:
    base, gone = make_run([4.0, 2.0]), make_run([], teleport=True)
    for arm, baseline in (([gone], [base]), ([base], [gone]), ([], [base])):
        result = compare(arm, baseline)
        assert np.isnan([result.steps, result.seconds, result.log_loss]).all()
        assert result.seeds == 0
    other = make_run([4.0, 1.0], teleport=True, seed=1)
    (plain, moved) = summarise([base, replace(gone, config={**gone.config, "arm": "b"})])
    assert (plain.train_loss, moved.runs) == (2.0, 1)
    assert np.isnan(moved.train_loss)
    assert math.isnan(compare([other], [base]).log_loss)


def test_a_record_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("kept")
    with pytest.raises(RunError, match="cannot write the record"):
        RecordWriter(path)
    assert path.read_text() == "kept"


@pytest.mark.parametrize("make", [False, True])
def test_a_folder_without_records_is_refused(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "f"
    if make:
        folder.mkdir()
    with pytest.raises(RunError, match="teleport run"):
        read_runs(folder)


# One run counts once.


def edited(text: str, **changes: Any) -> str:
    """A record whose first row says something else."""
    first, rest = text.split("\n", 1)
    return json.dumps({**json.loads(first), **changes}) + "\n" + rest


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two arms and two seeds."""
    folder = tmp_path_factory.mktemp("recorded")
    run_arms(RunSettings("sample-rows", "tiny"), [Arm(0.1), Arm(0.1, True)], [0, 1], folder)
    return folder


TWICE = {
    "copied by a file manager": ("01-lr-0.1-teleport-seed0 (1).jsonl", lambda text: text),
    "copied as a backup": ("old.jsonl", lambda text: text),
    "copied in the name of another seed": ("01-lr-0.1-teleport-seed7.jsonl", lambda text: text),
    "copied, with another seed in it": (
        "01-lr-0.1-teleport-seed7.jsonl",
        lambda text: edited(text, seed=7),
    ),
    "copied while it ran": ("copy.jsonl", lambda text: "\n".join(text.split("\n")[:3]) + "\n"),
    "copied by an editor that ends lines otherwise": (
        "copy.jsonl",
        lambda text: text.replace("\n", "\r\n"),
    ),
    "recorded again": (
        "again.jsonl",
        lambda text: text.replace('"train_seconds": 0.', '"train_seconds": 1.'),
    ),
    "recorded again as another place in the table": (
        "07-lr-0.1-teleport-seed0.jsonl",
        lambda text: edited(text, order=7),
    ),
}
"""The name of the second record of a run, and what it holds."""


@pytest.mark.slow
@pytest.mark.parametrize("how", TWICE)
@pytest.mark.parametrize("command", ["figure", "report"])
def test_a_run_that_is_recorded_twice_is_refused_by_name(
    how: str, command: str, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(recorded, out)
    name, change = TWICE[how]
    original = out / "01-lr-0.1-teleport-seed0.jsonl"
    (out / name).write_bytes(change(original.read_text()).encode())
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert main([command, str(out)]) == 1
    error = capsys.readouterr().err
    assert str(original) in error
    assert str(out / name) in error
    assert "counts once" in error
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (out / name).unlink()
    assert main([command, str(out)]) == 0


@pytest.mark.parametrize("inside", ["copy", "copy/of a copy"])
def test_a_folder_that_is_copied_into_itself_is_not_reported(
    inside: str, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(recorded, out)
    shutil.copytree(recorded, out / inside)
    assert main(["report", str(out)]) == 1
    error = capsys.readouterr().err
    assert str(out / "00-lr-0.1-seed0.jsonl") in error
    assert str(out / inside / "00-lr-0.1-seed0.jsonl") in error


def test_runs_recorded_again_in_another_folder_are_reported(tmp_path: Path) -> None:
    for name in ("first", "again"):
        (tmp_path / name).mkdir()
        arms = [Arm(0.1), Arm(0.1, True)]
        run_arms(RunSettings("sample-rows", "tiny"), arms, [0], tmp_path / name)
    assert len(blocks(tmp_path)) == 2


def test_a_folder_with_a_run_twice_is_not_gone_on_with(recorded: Path, tmp_path: Path) -> None:
    """Also where the copied run is none of those that are asked for: nothing is trained first."""
    out = tmp_path / "out"
    shutil.copytree(recorded, out)
    shutil.copy(out / "01-lr-0.1-teleport-seed1.jsonl", out / "copy.jsonl")
    before = sorted(out.iterdir())
    with pytest.raises(RunError, match=r"seed1\.jsonl and .*copy\.jsonl are both records of"):
        run_arms(RunSettings("sample-rows", "tiny"), [Arm(0.2)], [0], out, resume=True)
    assert sorted(out.iterdir()) == before


def test_a_seed_twice_is_no_comparison() -> None:
    once, moved = make_run([2.0, 1.0]), make_run([2.0, 0.5], "b", True)
    for arm, base in (([moved, moved], [once]), ([moved], [once, once])):
        with pytest.raises(RunError, match=r"\.jsonl are both records of [ab] \(seed 0\)"):
            compare(arm, base)
        with pytest.raises(RunError, match="counts once"):
            by_arm([*arm, *base])
        with pytest.raises(RunError, match="counts once"):
            summarise([*arm, *base])


def test_runs_that_say_too_little_are_no_copies_of_each_other() -> None:
    check_no_copies([make_run([1.0], seed=seed) for seed in range(3)])
    check_no_copies([make_run([], seed=seed) for seed in range(3)])
    check_no_copies([make_run([1.0, 0.5], arm) for arm in "ab"])
    with pytest.raises(RunError, match="the same losses after the same seconds"):
        check_no_copies([make_run([1.0, 0.5], seed=seed) for seed in range(2)])


def test_a_copied_spectrum_is_refused(tmp_path: Path) -> None:
    copied = copy_records(RESULTS / "paper" / "spectrum", tmp_path)
    assert len(read_spectra(tmp_path)) == len(copied)
    shutil.copy(tmp_path / "05-etth1.jsonl", tmp_path / "05-etth1 (1).jsonl")
    with pytest.raises(RunError, match=r"05-etth1 \(1\)\.jsonl and .*05-etth1\.jsonl are both"):
        read_spectra(tmp_path)
