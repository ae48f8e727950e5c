"""A run that is killed, at any moment, goes on to the numbers it would have had."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teleport import cli, data
from teleport.errors import RunError
from teleport.lab.experiments.arms import Arm, RunSettings, TeleportSettings
from teleport.lab.experiments.interventions import ON_THE_OPTIMIZER
from teleport.lab.experiments.run import Cell, run_arms, run_cell
from teleport.lab.records.checkpoint import load_checkpoint, locked, save_checkpoint
from teleport.lab.records.runs import read_run, read_runs
from teleport.schedule import Schedule
from tests.support.disk import full_disk
from tests.support.waiting import HANG, wait_for

pytestmark = pytest.mark.slow

TWICE = TeleportSettings(Schedule(epochs=2, batches=2, warmup_steps=3), batch_size=64)
TINY = RunSettings(
    "sample-rows", "tiny", "adam", epochs=2, teleport=replace(TWICE, held_out_size=64)
)
PLAIN = Arm(0.002)
MOVED = Arm(0.002, teleport=True)


class KilledError(Exception):
    """Stands for a kill: nothing of the run is told about it."""


def trajectory(path: Path) -> list[dict[str, Any]]:
    """All rows but the first and those of resuming, without anything measured in seconds."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["type"] == "config"
    return [
        {key: value for key, value in row.items() if "seconds" not in key}
        for row in rows[1:]
        if row["type"] != "resumed"
    ]


def killed_after(steps: int) -> Callable[[int], None]:
    left = [steps]

    def progress(done: int) -> None:
        left[0] -= done
        if left[0] <= 0:
            raise KilledError

    return progress


def resumed(cell: Cell, folder: Path, kills: list[int], seconds: float) -> Path:
    """Run a cell, killed after so many steps each time."""
    dataset = data.load(cell.settings.recipe().data)
    for steps in kills:
        with pytest.raises(KilledError):
            run_cell(
                cell,
                dataset,
                folder,
                resume=True,
                checkpoint_seconds=seconds,
                progress=killed_after(steps),
            )
    return run_cell(cell, dataset, folder, resume=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What runs look like that nobody disturbs."""
    dataset = data.load("mnist-sample-rows")
    folder = tmp_path_factory.mktemp("whole")
    return {
        arm.name: trajectory(run_cell(Cell(TINY, arm, 0, 0), dataset, folder))
        for arm in (PLAIN, MOVED)
    }


@given(
    kills=st.lists(st.integers(1, 75), min_size=1, max_size=3, unique=True),
    arm=st.sampled_from([PLAIN, MOVED]),
    always=st.booleans(),
)
@settings(max_examples=6, deadline=None)
def test_a_run_broken_off_anywhere_goes_on_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    whole: dict[str, list[dict[str, Any]]],
    kills: list[int],
    arm: Arm,
    always: bool,
) -> None:
    folder = tmp_path_factory.mktemp("killed")
    cell = Cell(TINY, arm, 0, 0)
    # Each try comes further than the one before, from the checkpoints of every step or from none.
    path = resumed(cell, folder, sorted(kills), 0.0 if always else 1e9)
    assert trajectory(path) == whole[arm.name]
    assert sorted(file.name for file in folder.iterdir()) == [path.name]


@pytest.mark.parametrize("arm", [PLAIN, MOVED], ids=lambda arm: arm.name)
@pytest.mark.parametrize("steps", [39, 40, 41])
def test_a_run_broken_off_between_two_epochs_draws_the_next_order(
    tmp_path: Path, whole: dict[str, list[dict[str, Any]]], steps: int, arm: Arm
) -> None:
    cell = Cell(TINY, arm, 0, 0)
    steps_of_all = TINY.size().train_size // TINY.batch() * TINY.size().epochs  # type: ignore[operator]
    assert steps_of_all == 80, "an epoch ends at step 40"
    assert trajectory(resumed(cell, tmp_path, [steps], 0.0)) == whole[arm.name]


@pytest.mark.parametrize("optimizer", ["momentum", "adagrad", "adamw", "rmsprop", "NAdam"])
def test_the_state_of_every_optimizer_is_kept(optimizer: str, tmp_path: Path) -> None:
    check_optimizer(optimizer, tmp_path)


@pytest.mark.extra("pytorch_optimizer")
@pytest.mark.parametrize("optimizer", ["AdamP", "diffGrad", "Lion"])
def test_the_state_of_optimizers_of_the_extra_package_is_kept(
    optimizer: str, tmp_path: Path
) -> None:
    check_optimizer(optimizer, tmp_path)


@pytest.mark.extra("pytorch_optimizer")
@pytest.mark.parametrize("optimizer", ["AdaShift", "Scion"])
def test_an_optimizer_that_keeps_objects_of_its_own_starts_over(
    optimizer: str, tmp_path: Path
) -> None:
    check_optimizer(optimizer, tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    assert '"resumed"' not in path.read_text()


def check_optimizer(optimizer: str, folder: Path) -> None:
    one = replace(TINY, optimizer=optimizer, epochs=1)
    (folder / "whole").mkdir()
    whole = run_cell(Cell(one, PLAIN, 1, 0), data.load("mnist-sample-rows"), folder / "whole")
    path = resumed(Cell(one, PLAIN, 1, 0), folder, [17], 0.0)
    assert trajectory(path) == trajectory(whole)
    losses = read_run(path).column("train_loss")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("control", "optimizer"),
    list(zip(ON_THE_OPTIMIZER, ("adam", "sgd", "momentum", "adam"), strict=True)),
)
def test_a_control_on_the_optimizer_goes_on_bit_for_bit(
    control: str, optimizer: str, tmp_path: Path
) -> None:
    """Those that drive the steps go on from before them: their own state is not saved."""
    settings_ = RunSettings(
        "mnist-sample",
        "tiny",
        optimizer,
        activation="leaky_relu",
        teleport=TeleportSettings(Schedule(warmup_steps=10), batch_size=64, held_out_size=64),
    )
    cell = Cell(settings_, Arm(0.05, True, rival=control), 0, 0)
    (tmp_path / "whole").mkdir()
    whole = run_cell(cell, data.load("mnist-sample"), tmp_path / "whole")
    path = resumed(cell, tmp_path, [30], 0.0)
    assert trajectory(path) == trajectory(whole)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    began = [row["step"] for row in rows if row["type"] == "resumed"]
    assert began == ([29] if control == "optimizer reset" else [10])


def written(folder: Path) -> int:
    """Bytes of all records."""
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    """The real thing, by the command line: two arms, killed again and again."""
    options = ["run", "sample-rows", "--preset", "tiny", "--lr", "0.1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli.main([*options, "--out", str(whole)]) == 0
    command = [sys.executable, "-m", "teleport", *options, "--checkpoint", "0", "--resume"]
    draw = random.Random(6)
    ends = []
    for number in range(6):
        process = subprocess.Popen(
            [*command, "--out", str(broken)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if number < 2:
            before = written(broken)
            wait_for(lambda p=process, b=before: p.poll() is not None or written(broken) > b)
            time.sleep(draw.uniform(0.0, 0.3))
            process.send_signal(signal.SIGKILL)
        ends.append(process.wait(timeout=HANG))
        if ends[-1] == 0:
            break
    assert ends[-1] == 0
    assert -signal.SIGKILL in ends
    for path in sorted(whole.glob("*.jsonl")):
        assert trajectory(broken / path.name) == trajectory(path)
    assert sorted(f.name for f in broken.iterdir()) == sorted(f.name for f in whole.iterdir())


@pytest.mark.parametrize(
    ("what", "limit", "seconds"),
    [("record", 3_000, "1000"), ("checkpoint", 12_000, "0"), ("figure", 12_000, "1000")],
)
def test_a_full_disk_ends_with_a_message_and_complete_records(
    what: str, limit: int, seconds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["run", "sample-rows", "--preset", "tiny", "--lr", "0.1", "--no-teleport"]
    options += ["--epochs", "2", "--out", str(tmp_path / "run"), "--checkpoint", seconds]
    with full_disk(limit):
        assert cli.main(options) == 1
    message = capsys.readouterr().err
    assert "cannot write" in message
    assert what in message
    assert ("teleport figure" if what == "figure" else "--resume") in message
    (path,) = (tmp_path / "run").glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["type"] == "config"
    assert (rows[-1]["type"] == "end") == (what == "figure")
    assert not list((tmp_path / "run").glob("*.checkpoint*"))
    assert cli.main([*options, "--resume"]) == 0
    (run,) = read_runs(tmp_path / "run")
    assert run.status == "finished"


def test_a_loss_that_is_not_finite_ends_the_run_and_says_so(tmp_path: Path) -> None:
    run_arms(replace(TINY, optimizer="sgd"), [Arm(1e9)], [0], tmp_path)
    (run,) = read_runs(tmp_path)
    assert run.status == "diverged"
    rows = [json.loads(line) for line in run.path.read_text().splitlines()]
    assert "train loss is" in rows[-1]["reason"]
    # Resuming does not try again what can only end in the same way.
    before = run.path.stat()
    run_arms(replace(TINY, optimizer="sgd"), [Arm(1e9)], [0], tmp_path, resume=True)
    assert run.path.stat() == before


def test_resuming_another_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run_arms(TINY, [PLAIN], [0], tmp_path)
    (path,) = tmp_path.glob("*.jsonl")
    before = path.read_bytes()
    with pytest.raises(RunError, match="another"):
        run_arms(replace(TINY, epochs=1), [PLAIN], [0], tmp_path, resume=True)
    with pytest.raises(RunError, match="cannot write the record"):
        run_arms(TINY, [PLAIN], [0], tmp_path)
    assert path.read_bytes() == before


def test_two_processes_never_write_into_one_folder(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock", str(tmp_path)):
        code = (
            "import sys; from pathlib import Path\n"
            "from teleport.lab.records.checkpoint import locked\n"
            "with locked(Path(sys.argv[1]) / '.lock', sys.argv[1]): print('in')"
        )
        other = [sys.executable, "-c", code, str(tmp_path)]
        refused = subprocess.run(other, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "in use by another process" in refused.stderr
    assert subprocess.run(other, capture_output=True, text=True).stdout == "in\n"
    assert list(tmp_path.iterdir()) == []


def test_force_starts_over_and_only_removes_what_runs_leave(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["run", "sample-rows", "--preset", "tiny", "--no-teleport", "--out", str(out)]
    assert cli.main([*options, "--lr", "0.1"]) == 0
    (out / "notes.txt").write_text("mine")
    assert cli.main([*options, "--lr", "0.2"]) == 1
    assert cli.main([*options, "--lr", "0.2", "--force"]) == 0
    assert [run.arm for run in read_runs(out)] == ["lr 0.2"]
    assert (out / "notes.txt").read_text() == "mine"


@given(values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=5), step=st.integers(0))
def test_a_checkpoint_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], step: int
) -> None:
    path = tmp_path_factory.mktemp("c") / "a.checkpoint"
    save_checkpoint(path, {"x": torch.tensor(values, dtype=torch.float64), "step": step})
    state = load_checkpoint(path)
    assert state["x"].tolist() == values
    assert state["step"] == step


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.checkpoint"
    save_checkpoint(path, {"step": 1})
    with full_disk(10_000), pytest.raises(RunError, match="Make room"):
        save_checkpoint(path, {"step": 2, "x": torch.zeros(10_000)})
    assert load_checkpoint(path) == {"step": 1}
    assert os.listdir(tmp_path) == [path.name]


def test_a_checkpoint_that_may_be_whole_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.checkpoint"
    save_checkpoint(path, {"step": 1})

    def fails_with(error: Exception) -> None:
        def load(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(torch, "load", load)

    fails_with(PermissionError(13, "Permission denied"))
    with pytest.raises(RunError, match=r"a\.checkpoint: Permission denied; mend that"):
        load_checkpoint(path)
    fails_with(MemoryError())
    with pytest.raises(MemoryError):
        load_checkpoint(path)


def test_a_damaged_checkpoint_is_named_and_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "a.checkpoint"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(RunError, match=r"a\.checkpoint.*delete it"):
        load_checkpoint(path)
    torch.save({"x": Path("/")}, path)  # an object, which only pickle could bring back
    with pytest.raises(RunError, match="delete it"):
        load_checkpoint(path)


@given(data=st.data())
def test_a_checkpoint_with_any_damage_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("c") / "a.checkpoint"
    save_checkpoint(path, {"x": torch.ones(2), "step": 1})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.none() | st.integers(0, len(content)))])
    try:
        state = load_checkpoint(path)
    except RunError as error:
        assert f"{path}" in str(error)  # noqa: PT017
    else:
        assert isinstance(state, dict)


def other_model(state: dict[str, Any]) -> Any:
    return {**state, "model": torch.nn.Linear(2, 3).state_dict()}


def other_optimizer(state: dict[str, Any]) -> Any:
    parameters = [torch.nn.Parameter(tensor) for tensor in state["model"].values()]
    return {**state, "optimizer": torch.optim.SGD(parameters).state_dict()}


FOREIGN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda state: [1, 2], "it holds a list"),
    "a tensor": (lambda state: torch.zeros(2), "it holds a Tensor"),
    "numbered": (lambda state: {1: 2}, "it holds a dict"),
    "weights only": (lambda state: state["model"], "it has no model, optimizer"),
    "no draws": (lambda state: {k: v for k, v in state.items() if k != "draws"}, "it has no draws"),
    "another model": (other_model, "Error(s) in loading state_dict"),
    "another optimizer": (other_optimizer, "its optimizer has no"),
    "no bytes": (lambda state: {**state, "record_bytes": None}, "its record_bytes is None"),
    "bytes as text": (lambda state: {**state, "record_bytes": "10"}, "its record_bytes is '10'"),
    "a step before the first": (lambda state: {**state, "step": -1}, "its step is -1"),
    "seconds as text": (lambda state: {**state, "train_seconds": "long"}, "'long'"),
    "another order": (lambda state: {**state, "epoch_start": torch.zeros(3)}, "RNG state"),
    "no random state": (lambda state: {**state, "random": 5}, "int"),
    "a model that is none": (lambda state: {**state, "model": [1]}, "list"),
}


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after a checkpoint, and what it said after that."""
    folder = tmp_path_factory.mktemp("broken-off")
    with pytest.raises(KilledError):
        run_cell(
            Cell(TINY, MOVED, 0, 0),
            data.load("mnist-sample-rows"),
            folder,
            checkpoint_seconds=0.0,
            progress=killed_after(12),
        )
    return folder


@pytest.mark.parametrize("of", FOREIGN)
def test_a_checkpoint_of_something_else_is_named_and_nothing_is_changed(
    of: str, broken_off: Path, whole: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    for file in broken_off.iterdir():
        shutil.copy(file, tmp_path)
    (checkpoint,) = tmp_path.glob("*.checkpoint")
    make, message = FOREIGN[of]
    torch.save(make(load_checkpoint(checkpoint)), checkpoint)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    cell, dataset = Cell(TINY, MOVED, 0, 0), data.load("mnist-sample-rows")
    with pytest.raises(RunError) as refused:
        run_cell(cell, dataset, tmp_path, resume=True)
    said = str(refused.value)
    assert said.startswith(f"{checkpoint} is no checkpoint of its run (")
    assert message in said
    assert said.endswith("delete it to start the run over")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    checkpoint.unlink()
    assert trajectory(run_cell(cell, dataset, tmp_path, resume=True)) == whole[MOVED.name]
