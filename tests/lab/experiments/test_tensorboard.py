"""`teleport run --tensorboard`: the event files hold what the records hold."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from teleport import cli
from teleport.data import load
from teleport.errors import RunError
from teleport.lab.experiments.arms import Arm, RunSettings
from teleport.lab.experiments.run import Cell, run_cell
from teleport.lab.experiments.tensorboard import SCALARS, Board
from teleport.lab.records.runs import read_run, read_runs
from tests.support.disk import full_disk

TINY = ["run", "--preset", "tiny", "--lr", "0.1"]


def events(folder: Path) -> "object":
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


@pytest.mark.extra("tensorboard")
def test_event_files_hold_what_the_records_hold(tmp_path: Path) -> None:
    out, board = tmp_path / "job", tmp_path / "board"
    assert cli.main([*TINY, "--out", str(out), "--tensorboard", str(board)]) == 0
    runs = read_runs(out)
    assert [run.path.stem for run in runs] == sorted(folder.name for folder in board.iterdir())
    for run in runs:
        found = events(board / run.path.stem)
        for name in SCALARS:
            points = found.Scalars(name)  # type: ignore[attr-defined]
            assert [p.step for p in points] == [row["step"] for row in run.evaluations]
            np.testing.assert_allclose([p.value for p in points], run.column(name), rtol=1e-6)
        tags = found.Tags()["scalars"]  # type: ignore[attr-defined]
        assert ("teleport/grad_norm_after" in tags) == bool(run.teleports)
        for row in run.teleports:
            (point,) = found.Scalars("teleport/grad_norm_after")  # type: ignore[attr-defined]
            assert point.step == row["step"]
            assert point.value == pytest.approx(row["grad_norm_after"], rel=1e-6)
            (text,) = found.Tensors("teleport/text_summary")  # type: ignore[attr-defined]
            assert row["reason"].encode() in text.tensor_proto.string_val[0]


@pytest.mark.extra("tensorboard")
def test_accuracy_of_a_regression_is_left_out_and_later_steps_are_purged(tmp_path: Path) -> None:
    row = dict.fromkeys(SCALARS, 1.0) | {"test_accuracy": float("nan")}
    with Board(tmp_path) as board:
        for step in (0, 5, 10):
            board.write("evaluation", {**row, "step": step})
    with Board(tmp_path, step=6) as board:
        board.write("evaluation", {**row, "train_loss": 2.0, "step": 10})
    found = events(tmp_path)
    assert "test_accuracy" not in found.Tags()["scalars"]  # type: ignore[attr-defined]
    points = found.Scalars("train_loss")  # type: ignore[attr-defined]
    assert [(p.step, p.value) for p in points] == [(0, 1.0), (5, 1.0), (10, 2.0)]


@pytest.mark.extra("tensorboard")
def test_a_full_disk_ends_with_a_message_and_complete_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, board = tmp_path / "job", tmp_path / "board"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
        assert cli.main([*TINY, "--out", str(out), "--tensorboard", str(board)]) == 1
    assert "cannot write the TensorBoard files" in capsys.readouterr().err
    assert [run.status for run in read_runs(out)] == ["unfinished"]
    assert cli.main([*TINY, "--out", str(out), "--tensorboard", str(board), "--resume"]) == 0
    assert {run.status for run in read_runs(out)} == {"finished"}


@pytest.mark.extra("tensorboard")
def test_a_run_that_starts_over_shows_nothing_of_the_earlier_try(tmp_path: Path) -> None:
    out, board = tmp_path / "job", tmp_path / "board"
    command = [*TINY, "--out", str(out), "--tensorboard", str(board)]
    assert cli.main(command) == 0
    longer = [point.step for point in events(next(board.iterdir())).Scalars("train_loss")]  # type: ignore[attr-defined]
    assert cli.main([*command, "--force", "--after", "35"]) == 0
    for run in read_runs(out):
        found = events(board / run.path.stem)
        steps = [point.step for point in found.Scalars("train_loss")]  # type: ignore[attr-defined]
        assert steps == run.column("step").tolist() == longer
        teleports = [row["step"] for row in run.teleports]
        tag = "teleport/grad_norm_after"
        tags = found.Tags()["scalars"]  # type: ignore[attr-defined]
        shown = [p.step for p in found.Scalars(tag)] if tag in tags else []  # type: ignore[attr-defined]
        assert shown == teleports


@pytest.mark.extra("tensorboard")
def test_a_disk_that_fills_up_shows_no_traceback_of_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {**dict.fromkeys(SCALARS, 1.0), "step": 0}
    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    hook = threading.excepthook

    def fill() -> None:
        with Board(tmp_path) as board:
            for _ in range(10_000):
                board.write("evaluation", row)

    for limit in (0, 2_000):  # full from the beginning, or filling up
        with full_disk(limit), pytest.raises(RunError, match="cannot write the TensorBoard files"):
            fill()
        assert threading.excepthook == hook
        assert shown == []


@pytest.mark.extra("tensorboard")
def test_only_the_errors_of_the_board_s_own_thread_are_kept_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)

    def fail() -> None:
        raise OSError("mine")

    with Board(tmp_path):
        other = threading.Thread(target=fail)
        other.start()
        other.join()
    assert [str(ended.exc_value) for ended in shown] == ["mine"]


@pytest.mark.extra("tensorboard")
@pytest.mark.parametrize("step", [9, 10, 11])
def test_a_run_that_goes_on_shows_every_evaluation_once(step: int, tmp_path: Path) -> None:
    cell = Cell(RunSettings("sample-rows", "tiny"), Arm(0.1), 0, 0)
    dataset = load("mnist-sample-rows")
    left = [step + 1]  # an evaluation is due every ten steps; a checkpoint follows every step

    def progress(done: int) -> None:
        left[0] -= done
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cell(
            cell,
            dataset,
            tmp_path,
            tensorboard=tmp_path / "board",
            checkpoint_seconds=0.0,
            progress=progress,
        )
    path = run_cell(cell, dataset, tmp_path, tensorboard=tmp_path / "board", resume=True)
    assert '"resumed"' in path.read_text()
    points = events(tmp_path / "board" / path.stem).Scalars("train_loss")  # type: ignore[attr-defined]
    assert [point.step for point in points] == read_run(path).column("step").tolist()


def test_without_tensorboard_the_error_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = tmp_path / "job"
    assert cli.main([*TINY, "--out", str(out), "--tensorboard", str(tmp_path / "board")]) == 1
    assert "nullspace-teleport[tensorboard]" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.extra("tensorboard")
def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "job"
    board = tmp_path / "file" / "board"
    assert cli.main([*TINY, "--out", str(out), "--tensorboard", str(board)]) == 1
    assert "is no folder and cannot be made one" in capsys.readouterr().err
    assert not out.exists()
