"""The line between two trained networks: forks of one training, and how high the loss rises."""

import json
import shlex
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from teleport import cli
from teleport.data import load
from teleport.errors import RunError
from teleport.lab.analysis.connectivity import (
    OTHER_BATCHES,
    barrier,
    between,
    excess,
    forked,
    interval,
    points_on_line,
    read_lines,
)
from teleport.lab.analysis.curves import connectivity_figure
from teleport.lab.experiments.arms import Arm, RunSettings, TeleportSettings
from teleport.lab.experiments.run import Cell, run_cell
from teleport.lab.experiments.training import Training, look
from teleport.lab.records.runs import read_run
from teleport.schedule import Schedule
from tests.support.tables import SMALL

lines = arrays.arrays(np.float64, st.integers(3, 12), elements=st.floats(0.0, 9.0))


@given(lines, st.floats(-5.0, 5.0), st.floats(-5.0, 5.0))
def test_a_barrier_is_what_rises_above_the_straight_line(
    losses: np.ndarray, offset: float, slope: float
) -> None:
    shares = np.linspace(0.0, 1.0, len(losses))
    above = excess(losses)
    np.testing.assert_allclose(above[[0, -1]], 0.0, atol=1e-12)
    assert barrier(losses) >= -1e-12
    np.testing.assert_allclose(excess(losses + offset + slope * shares), above, atol=1e-12)
    convex = (shares - offset / 5.0) ** 2
    assert barrier(convex) == pytest.approx(0.0, abs=1e-12)
    assert barrier(-convex) == pytest.approx(float((shares * (1.0 - shares)).max()))


def test_an_interval_is_that_of_student() -> None:
    middle, half = interval(np.array([1.0, 2.0, 3.0]))
    assert (middle, half) == pytest.approx((2.0, 4.302653 / np.sqrt(3.0)), rel=1e-6)


@given(st.integers(0, 2**31), st.floats(0.0, 1.0))
def test_on_the_line_every_weight_is_mixed_and_the_ends_stay(seed: int, share: float) -> None:
    torch.manual_seed(seed)
    first, second = (nn.Linear(3, 2).double() for _ in range(2))
    ends = [[p.clone() for p in model.parameters()] for model in (first, second)]
    x = torch.randn(5, 3).double()
    mixed = between(first, second, share)(x)
    torch.testing.assert_close(mixed, (1 - share) * first(x) + share * second(x))
    for model, kept in zip((first, second), ends, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), kept, strict=True))


def test_networks_with_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(RunError, match=r"1\.running_mean.*BatchNorm"):
        between(model, model, 0.5)


def early(after: int, growth: float | None = None) -> RunSettings:
    teleport = TeleportSettings(
        Schedule(epochs=1, batches=1, warmup_steps=after),
        growth=growth,
        batch_size=64,
        held_out_size=64,
    )
    return RunSettings("sample-rows", "tiny", "sgd", teleport=teleport)


@pytest.fixture(scope="module")
def forks() -> dict[str, tuple[Training, list[dict[str, Any]]]]:
    found = forked(early(3), 0.05, 1, load("mnist-sample-rows"), [1.2])
    return {name: (training, reports) for name, training, reports in found}


@pytest.mark.parametrize(("name", "growth"), [("plain", None), ("growth 1.2", 1.2)])
def test_a_fork_is_the_run_of_the_same_seed(
    name: str, growth: float | None, forks: dict[str, Any], tmp_path: Path
) -> None:
    dataset = load("mnist-sample-rows")
    cell = Cell(early(3, growth), Arm(0.05, growth is not None), 1, 0)
    run = read_run(run_cell(cell, dataset, tmp_path))
    training, reports = forks[name]
    for split, part in (("train", training.seen), ("test", training.unseen)):
        loss, _ = look(training.model.eval(), dataset, *part, 64)
        assert loss == run.evaluations[-1][f"{split}_loss"]
    assert [report["step_sizes"] for report in reports] == [t["step_sizes"] for t in run.teleports]


def distance(first: Training, second: Training) -> float:
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    return float(sum((p - q).square().sum() for p, q in pairs).detach()) ** 0.5


def test_other_batches_begin_at_the_moment_of_the_teleport(forks: dict[str, Any]) -> None:
    last = forked(early(39), 0.05, 1, load("mnist-sample-rows"), [])
    late = {name: training for name, training, _ in last}
    assert late["plain"].steps == 40
    one_step = distance(late["plain"], late[OTHER_BATCHES])
    assert 0.0 < one_step < distance(forks["plain"][0], forks[OTHER_BATCHES][0]) / 2
    assert distance(late["plain"], forks["plain"][0]) == 0.0


def test_a_fork_before_the_first_step_has_other_batches_too(tmp_path: Path) -> None:
    dataset = load("mnist-sample-rows")
    found = {name: training for name, training, _ in forked(early(0), 0.05, 1, dataset, [1.2])}
    run = read_run(run_cell(Cell(early(0, 1.2), Arm(0.05, True), 1, 0), dataset, tmp_path))
    moved = found["growth 1.2"]
    loss, _ = look(moved.model.eval(), dataset, *moved.seen, 64)
    assert loss == run.evaluations[-1]["train_loss"]
    assert distance(found["plain"], found[OTHER_BATCHES]) > 0.0


def test_the_ends_of_a_line_are_the_networks(forks: dict[str, Any]) -> None:
    (plain, _), (other, _) = forks["plain"], forks[OTHER_BATCHES]
    points = list(points_on_line("x", plain, other, 3))
    assert [point.share for point in points] == [0.0, 0.5, 1.0]
    for point, training in ((points[0], plain), (points[-1], other)):
        loss, _ = look(training.model, training.dataset, *training.unseen, 64)
        assert point.test_loss == pytest.approx(loss, rel=1e-6)
    middle, _ = look(between(plain.model, other.model, 0.5), plain.dataset, *plain.seen, 64)
    assert points[1].train_loss == pytest.approx(middle, rel=1e-6)


def test_what_cannot_be_compared_is_refused() -> None:
    dataset = load("mnist-sample-rows")
    with pytest.raises(RunError, match="trains for 40 steps, no more than 40"):
        next(forked(early(40), 0.05, 0, dataset, []))
    with pytest.raises(RunError, match=r"lr 1e\+30 \(seed 0\).*loss"):
        next(forked(early(3), 1e30, 0, dataset, []))


TABLE = SMALL + (
    '[longer]\nlike = "small"\n'
    "network.hidden.ours = [64]\n"  # wider than the teleport batch, so that the head can move
    "presets.tiny.ours = { epochs = 27, train_size = 64, evaluate_every = 9, evaluate_size = 10 }\n"
)


@pytest.fixture
def made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """A command whose runs of 54 steps take no time, with its folder "lines"."""
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text(TABLE)
    chosen = ["--preset", "tiny", "--seeds", "2", "--points", "5", "--out", "lines"]
    command = ["connectivity", "t.toml:longer", *chosen]
    assert cli.main(command) == 0
    return command


def test_the_connectivity_command(made: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first = capsys.readouterr().out
    (found,) = read_lines(Path("lines"))
    assert found.others == ["growth 1.5", OTHER_BATCHES]
    assert found.config["command"] == shlex.join(["teleport", *made])
    assert found.config["lr"] == 0.2
    for losses in found.losses.values():
        assert losses.shape == (2, 5)
    ends = [found.losses[to, "train"][:, 0] for to in found.others]
    np.testing.assert_array_equal(*ends)
    np.testing.assert_allclose(found.growths["growth 1.5"], 1.5, rtol=1e-3)
    middle, half = interval(found.barriers(OTHER_BATCHES, "test"))
    assert f"{middle:.4f} ± {half:.4f}" in first
    figure = connectivity_figure(
        [found, replace(found, config={**found.config, "experiment": "b"})]
    )
    assert [axes.get_title() for axes in figure.axes] == ["t.toml:longer", "b"]
    figure.savefig(BytesIO())
    Path("lines/figure.png").unlink()
    assert cli.main(["figure", "lines"]) == 0
    assert capsys.readouterr().out == first
    assert Path("lines/figure.png").exists()


def test_complete_records_stay_and_broken_ones_are_made_again(made: list[str]) -> None:
    kept, broken = sorted(Path("lines").glob("*.jsonl"))
    before = {path: path.read_bytes() for path in (kept, broken)}
    rows = broken.read_text().splitlines(keepends=True)
    broken.write_text("".join(rows[:-3]))
    stamp = kept.stat().st_mtime_ns
    assert cli.main([*made, "--resume"]) == 0
    assert kept.stat().st_mtime_ns == stamp

    def points(text: str) -> list[dict[str, Any]]:
        return [row for row in map(json.loads, text.splitlines()) if row["type"] == "point"]

    assert points(broken.read_text()) == points(before[broken].decode())
    assert cli.main([*made, "--resume", "--points", "6"]) == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nope"], "mnist-sample"),
        (["t.toml:small"], "trains for 2 steps with the preset tiny"),
        (["cifar10-resnet18", "--preset", "huge"], "huge"),
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
    assert cli.main(["connectivity", "--preset", "tiny", "--out", "new", *arguments]) == 1
    assert word in capsys.readouterr().err
    assert not Path("new").exists()


@pytest.mark.parametrize("change", ["to", "drop", "share"])
def test_a_record_whose_lines_do_not_match_is_named(made: list[str], change: str) -> None:
    path = max(Path("lines").glob("*.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    number = next(n for n, row in enumerate(rows) if row["type"] == "point") + 1
    if change == "drop":
        del rows[number]
    else:
        rows[number][change] = {"to": "elsewhere", "share": 0.9}[change]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunError, match=path.name):
        read_lines(Path("lines"))


def test_a_folder_without_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="teleport connectivity"):
        read_lines(tmp_path)
