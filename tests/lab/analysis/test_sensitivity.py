"""The design over all settings of a teleport: strata, effects that are known, records."""

import json
import math
import shlex
import shutil
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teleport import cli
from teleport.data import load
from teleport.errors import RunError
from teleport.lab.analysis import sensitivity
from teleport.lab.analysis.curves import effects_figure
from teleport.lab.analysis.sensitivity import (
    FIXED_STEP,
    NAMES,
    SIZE_FACTORS,
    WANTED_GROWTH,
    effects,
    latin_hypercube,
    read_outcomes,
    values_at,
    write_design,
)
from teleport.lab.experiments.arms import Arm, RunSettings, teleport_settings
from teleport.lab.experiments.run import Cell, run_cell
from teleport.lab.records.compare import compare
from teleport.lab.records.record_folder import RecordFolder
from teleport.lab.records.runs import read_run
from teleport.schedule import Schedule
from tests.support.tables import SMALL

shares = st.floats(0.0, 1.0)


@pytest.mark.slow
@given(st.integers(10, 80), st.integers(0, 2**31))
@settings(max_examples=6)
def test_a_latin_hypercube_has_one_point_in_every_stratum(count: int, seed: int) -> None:
    at = latin_hypercube(count, seed)
    assert at.shape == (count, len(NAMES))
    strata = np.floor(at * count).astype(int)
    for factor in strata.T:
        assert sorted(factor) == list(range(count))
    np.testing.assert_array_equal(latin_hypercube(count, seed), at)


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="points must be an integer >= 10, got 9"):
        latin_hypercube(9)


@given(st.lists(shares, min_size=5, max_size=5), st.integers(1, 10_000))
def test_places_are_settings_within_the_ranges(place: list[float], steps: int) -> None:
    at = values_at(place, steps)
    assert 1.1 <= at.growth <= 3.0 + 1e-9
    assert 0.02 <= at.step <= 0.5 + 1e-9
    assert 1e-4 <= at.open <= 0.1 + 1e-9
    assert 32 <= at.n <= 512
    assert 0 <= at.after <= 0.8 * steps
    assert 0.05 <= at.lr <= 0.4 + 1e-9


def test_the_middle_of_a_range_is_its_geometric_mean() -> None:
    at = values_at([0.5] * 5, 100)
    geometric = [math.sqrt(a * b) for a, b in ((1.1, 3.0), (0.02, 0.5), (1e-4, 0.1), (0.05, 0.4))]
    assert [at.growth, at.step, at.open, at.lr] == pytest.approx(geometric)
    assert (at.n, at.after) == (128, 40)


coefficients = st.lists(st.floats(-3.0, 3.0), min_size=8, max_size=8)


def known(at: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A response of which the effects are known."""
    x = at - 0.5
    rest = [x[:, 0] ** 2 - 1.0 / 12.0, x[:, 0] * x[:, -1]]
    return np.column_stack([np.ones(len(x)), x, *rest]) @ weights


@pytest.mark.slow
@given(coefficients, st.integers(12, 60), st.integers(0, 1000), st.sampled_from(list(SIZE_FACTORS)))
@settings(max_examples=8)
def test_effects_of_a_known_response_are_found(
    weights: list[float], count: int, seed: int, design: str
) -> None:
    at, wanted = latin_hypercube(count, seed), np.array(weights)
    response = known(at, wanted)
    found = effects(design, at, response)
    np.testing.assert_allclose(found.values, wanted, atol=1e-9)
    np.testing.assert_allclose(found.half_widths, 0.0, atol=1e-9)
    size = SIZE_FACTORS[design]
    assert found.names[:2] == ("mean", size)
    assert found.names[2:] == (*NAMES[1:], f"{size}, curvature", f"{size} x lr")
    # what the words of `Effects` say, by the response itself
    at = np.full((3, len(NAMES)), 0.5)
    at[:, 0] = 0.0, 0.5, 1.0
    low, middle, high = known(at, wanted)
    assert found.values[1] == pytest.approx(high - low, abs=1e-9)
    assert found.values[-2] == pytest.approx(4.0 * ((low + high) / 2.0 - middle), abs=1e-9)
    response[[0, 3]] = np.nan, np.inf  # diverged before there was anything to compare
    if count >= 14:
        without = effects(design, latin_hypercube(count, seed), response)
        assert without.points == count - 2
        np.testing.assert_allclose(without.values, wanted, atol=1e-9)


def test_intervals_hold_what_they_promise_where_the_spread_is_that_of_the_rate() -> None:
    draws, at = np.random.default_rng(0), latin_hypercube(40)
    wanted = np.array([-0.1, -0.3, 0.0, 0.0, 0.1, 0.2, 0.0, 0.1])
    spread = 0.05 * np.exp(3.0 * at[:, -1])
    held, resolved = np.zeros(8), np.zeros(8)
    for _ in range(400):
        found = effects(
            WANTED_GROWTH, at, known(at, wanted) + spread * draws.standard_normal(len(at))
        )
        held += abs(found.values - wanted) <= found.half_widths
        resolved += found.resolved
    assert (held / 400 > 0.92).all()
    assert (held / 400 < 0.995).all()
    assert resolved[2] < 0.08 * 400  # no effect
    assert resolved[1] > 3 * resolved[2]


def test_too_few_outcomes_are_refused() -> None:
    at = latin_hypercube(12)
    response = np.full(12, np.nan)
    response[:8] = 0.1
    with pytest.raises(ValueError, match="8 terms need more points than that, got 8"):
        effects(WANTED_GROWTH, at, response)


TABLE = SMALL + (
    '[even]\nlike = "small"\nnetwork.hidden.ours = [16, 16]\n'
    "presets.tiny.ours = { epochs = 1, train_size = 640, evaluate_every = 5, evaluate_size = 64 }\n"
)


COMMAND = ["sensitivity", "t.toml:even", "--preset", "tiny", "--points", "10", "--out", "design"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, what `COMMAND` made of it in runs of 20 steps, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "t.toml").write_text(TABLE)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.chdir(folder)
        assert cli.main(COMMAND) == 0
    (folder / "printed.txt").write_text(printed.getvalue(), encoding="utf-8")
    return folder


@pytest.fixture
def made(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command, in a copy of its folder."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return COMMAND


@pytest.mark.slow
def test_the_sensitivity_command(made: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first = Path("printed.txt").read_text(encoding="utf-8")
    found = read_outcomes(Path("design"))
    assert [outcomes.design for outcomes in found] == [WANTED_GROWTH, FIXED_STEP]
    assert found[0].config["command"] == shlex.join(["teleport", *made])
    for outcomes in found:
        np.testing.assert_array_equal(outcomes.places, latin_hypercube(10))
        answer = outcomes.effects
        for value, half in zip(answer.values, answer.half_widths, strict=True):
            assert f"{value:+.4f} ± {half:.4f}" in first
        still = outcomes.growth == 1.0
        assert still.sum() >= outcomes.rolled_back
        np.testing.assert_array_equal(outcomes.log_loss[still], 0.0)
        assert (outcomes.log_loss[~still] != 0.0).any()
    figure = effects_figure([outcomes.effects for outcomes in found], "a title")
    assert [axes.get_title() for axes in figure.axes] == [f"{d}, 10 points" for d in SIZE_FACTORS]
    figure.savefig(BytesIO())
    Path("design/figure.png").unlink()
    assert cli.main(["figure", "design"]) == 0
    assert capsys.readouterr().out == first
    assert Path("design/figure.png").exists()


@pytest.mark.slow
def test_an_outcome_is_that_of_two_runs(made: list[str], tmp_path: Path) -> None:
    path = sorted(Path("design").glob("*.jsonl"))[4]
    config, *rows = (json.loads(line) for line in path.read_text().splitlines())
    at, dataset = values_at(config["place"], 20), load("mnist-sample")
    assert config["values"]["lr"] == at.lr
    own = {
        WANTED_GROWTH: {"growth": at.growth},
        FIXED_STEP: {"lr": at.step, "steps": 8, "cap": 3.0},
    }
    for design, options in own.items():
        teleport = teleport_settings("t.toml:even", tau=1.0 - at.open, after=at.after, **options)
        object.__setattr__(teleport, "batch_size", at.n)
        runs = []
        for number, moves in enumerate((False, True)):
            folder = tmp_path / f"{design}{number}"
            folder.mkdir()
            chosen = RunSettings("t.toml:even", "tiny", teleport=teleport)
            cell = Cell(chosen, Arm(at.lr, moves), config["seed"], 0)
            runs.append(read_run(run_cell(cell, dataset, folder)))
        plain, moved = runs
        assert teleport.schedule == Schedule(1, 1, at.after)
        (row,) = (row for row in rows if row.get("design") == design)
        assert row["log_loss"] == compare([moved], [plain]).log_loss
        assert row["rolled_back"] == moved.teleports[0]["rolled_back"]


@pytest.mark.slow
def test_complete_points_stay_and_broken_ones_are_made_again(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (*kept, broken) = sorted(Path("design").glob("*.jsonl"))
    was = broken.read_text()
    broken.write_text("".join(was.splitlines(keepends=True)[:-2]))
    with pytest.raises(RunError, match="holds 9 of 10 points"):
        read_outcomes(Path("design"))
    stamps = [path.stat().st_mtime_ns for path in kept]
    told: list[int] = []
    write_design(
        "t.toml:even",
        RecordFolder(Path("design"), resume=True, progress=lambda what, steps: told.append(steps)),
        preset="tiny",
        points=10,
    )
    assert sum(told) == 10 * 3 * 20
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    assert json.loads(broken.read_text().splitlines()[1]) == json.loads(was.splitlines()[1])
    assert cli.main([*made, "--resume", "--points", "11"]) == 1
    monkeypatch.setattr(sensitivity, "LR_RANGE", (0.1, 0.2))
    assert cli.main([*made, "--resume"]) == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nope"], "mnist-sample"),
        (["mnist-sample", "--points", "3"], "points must be an integer >= 10, got 3"),
        (["t.toml:small"], "held-out data need 532 examples"),
        (["mnist-sample", "--epochs", "0"], "epochs must be an integer >= 1"),
    ],
)
def test_bad_input_makes_no_folder(
    arguments: list[str],
    word: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text(TABLE)
    assert cli.main(["sensitivity", "--preset", "tiny", "--out", "new", *arguments]) == 1
    assert word in capsys.readouterr().err
    assert not Path("new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["place", "design", "order"])
def test_a_record_of_something_else_is_named(made: list[str], change: str) -> None:
    path = max(Path("design").glob("*.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1 if change == "design" else 0][change] = {"place": [0.5], "design": "x", "order": 3}[
        change
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunError, match=path.name):
        read_outcomes(Path("design"))


def test_a_folder_without_designs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="teleport sensitivity"):
        read_outcomes(tmp_path)
