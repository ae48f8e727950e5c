"""`teleport saving`: what a record says, and the command."""

import json
from pathlib import Path

import pytest

from teleport import cli
from teleport.data import load
from teleport.errors import RunError
from teleport.lab.experiments.arms import Arm
from teleport.lab.experiments.training import Training
from teleport.lab.paper.savings import (
    NO_DESCENT,
    measure,
    plain_arms,
    read_savings,
    tuned_settings,
)


@pytest.mark.slow
def test_the_command_and_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "saving"
    chosen = ["--preset", "tiny", "--seeds", "2", "--optimizers", "sgd", "--threads", "1"]
    command = ["saving", "mnist-sample", *chosen, "--out", str(out)]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert "what a teleport should save" in first
    found = read_savings(out)
    (settings,) = tuned_settings(["mnist-sample"], ["sgd"], "tiny")
    arms = [arm.name for arm in plain_arms(settings)]
    assert [s.key for s in found] == [("mnist-sample", "sgd", arm) for arm in arms]
    for saving in found:
        assert saving.seeds == 2
        assert saving.growth == pytest.approx(1.5, rel=1e-2)
        assert saving.stride_after > saving.stride > 0.0
    low, tuned, _ = found
    assert low.saved > tuned.saved
    assert low.expected > tuned.expected
    record = out / "00-mnist-sample-sgd-seed1.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert rows[0]["command"] == " ".join(["teleport", *command])
    record.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:2]))
    assert [saving.seeds for saving in read_savings(out)] == [1, 1, 1]
    assert cli.main(command) == 1
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    again = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row.get("stride") for row in again] == [row.get("stride") for row in rows]


def test_measuring_leaves_the_training_where_the_first_teleport_is_due() -> None:
    (settings,) = tuned_settings(["mnist-sample"], ["sgd", "lion"], "tiny")
    dataset = load("mnist-sample")
    one, two = (Training(settings, Arm(0.0), 0, dataset) for _ in range(2))
    row = measure(one)
    two.advance(min(settings.teleport.schedule.warmup_steps, two.steps))
    assert one.step == two.step
    assert row["stride"] == NO_DESCENT  # a rate of 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nope"], "mnist-sample"),
        (["mnist-sample", "--optimizers", "lion"], "mnist-sample was tuned for any of lion"),
    ],
)
def test_bad_input_makes_no_folder(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    assert cli.main(["saving", *arguments, "--preset", "tiny", "--out", str(out)]) == 1
    assert word in capsys.readouterr().err
    assert not out.exists()


def test_foreign_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no savings"):
        read_savings(tmp_path)
    (tmp_path / "00-a.jsonl").write_text('{"type": "config"}\n', encoding="utf-8")
    with pytest.raises(RunError, match="is not a record"):
        read_savings(tmp_path)
