"""Records of one folder belong together: nothing else is resumed, removed or compared there."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teleport import cli, data
from teleport.errors import RunError
from teleport.lab.experiments.arms import Arm, RunSettings
from teleport.lab.experiments.run import Cell, configuration, run_arms
from teleport.lab.experiments.sweep import Plan, check_folders
from teleport.lab.experiments.table import _read_once
from teleport.lab.keeping.training import SequenceRun, Strategy, run_strategies
from teleport.lab.paper.input_energy import write_spectra
from teleport.lab.paper.threshold import write_trajectories
from teleport.lab.records.checkpoint import locked
from teleport.lab.records.folders import open_folder
from teleport.lab.records.record_folder import RecordFolder
from teleport.lab.records.runs import first_row, read_runs
from teleport.lab.records.sameness import ADDED, SHARED, check_alike, check_folder, is_complete
from teleport.lab.records.schema import made_by
from teleport.lab.records.study import record_paths
from tests.support.results import RESULTS
from tests.support.tables import SMALL, small

ROWS = RunSettings("sample-rows", "tiny")
OPTIONS = ["sample-rows", "--preset", "tiny"]


def state(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def first() -> dict[str, Any]:
    """The first row of a run's record, as it is read."""
    config = configuration(Cell(ROWS, Arm(0.1), 0, 0), data.load("mnist-sample-rows"))
    return dict(json.loads(json.dumps({"type": "config", **config})))


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [path]
    return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]


def other_than(value: Any) -> Any:
    if value is None or isinstance(value, (int, float)):
        return (value or 0) + 1
    return f"another {value}" if isinstance(value, str) else [value, "other"]


@given(st.data())
def test_one_other_setting_makes_a_record_another_one(
    tmp_path_factory: pytest.TempPathFactory, first: dict[str, Any], draw: st.DataObject
) -> None:
    *keys, last = draw.draw(st.sampled_from(leaves({key: first[key] for key in SHARED})))
    changed = deepcopy(first)
    table = changed
    for key in keys:
        table = table[key]
    table[last] = other_than(table[last])
    folder = tmp_path_factory.mktemp("runs")
    (folder / "00-a-seed0.jsonl").write_text(json.dumps(first) + "\n")
    shared = {key: first[key] for key in SHARED}
    check_folder(folder, "run", shared, ADDED)
    where = ".".join([*keys, last])
    with pytest.raises(RunError, match=rf"00-a-seed0\.jsonl is a record with another {where} \("):
        check_folder(folder, "run", {key: changed[key] for key in SHARED}, ADDED)
    with pytest.raises(RunError, match=rf"another {where} \("):
        is_complete(folder / "00-a-seed0.jsonl", {key: changed[key] for key in SHARED}, ADDED)
    (folder / "01-b-seed0.jsonl").write_text(json.dumps({**changed, "order": 1, "arm": "b"}) + "\n")
    with pytest.raises(RunError, match=rf"cannot be compared.*another {where} \("):
        check_alike(read_runs(folder))


def test_a_record_without_a_key_that_came_later_is_accepted(
    tmp_path: Path, first: dict[str, Any]
) -> None:
    old = {key: value for key, value in first.items() if key not in ADDED}
    assert old != first
    (tmp_path / "00-a-seed0.jsonl").write_text(json.dumps(old) + "\n")
    (tmp_path / "01-b-seed0.jsonl").write_text(json.dumps({**first, "order": 1, "arm": "b"}) + "\n")
    check_folder(tmp_path, "run", {key: first[key] for key in SHARED}, ADDED)
    check_alike(read_runs(tmp_path))
    check_alike(read_runs(tmp_path)[::-1])


RESUMED = {
    "run": ["run", *OPTIONS, "--lr", "0.2"],
    "continual": ["continual", "digits", "--preset", "tiny", "--seeds", "1"],
    "spectrum": ["spectrum", "sample-rows", "--preset", "tiny", "--trained", "1"],
    "tau": ["tau", "sample-rows", "--preset", "tiny", "--trained", "1", "--steps", "1"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of every command that can go on."""
    below = tmp_path_factory.mktemp("folders")
    made = {command: below / command for command in (*RESUMED, "product")}
    for folder in made.values():
        folder.mkdir()
    run_arms(ROWS, [Arm(0.1)], [0], made["run"])
    run_strategies(SequenceRun("digits", "tiny"), [Strategy("plain", 0.1)], [0], made["continual"])
    write_spectra(["mnist-sample"], RecordFolder(made["spectrum"]), preset="tiny", steps=[1])
    write_trajectories(
        "mnist-sample", RecordFolder(made["tau"]), preset="tiny", trained=1, teleport_steps=1
    )
    made["product"].rmdir()
    options = ["--preset", "tiny", "--trained", "0", "--rows", "2", "--out", str(made["product"])]
    assert cli.main(["product", small(below), *options]) == 0
    return made


def test_the_maker_of_a_record_is_told_by_its_first_row(folders: dict[str, Path]) -> None:
    for command in RESUMED:
        (path,) = folders[command].glob("*.jsonl")
        assert made_by(first_row(path)) == command
    bench = record_paths(RESULTS / "bench" / "before")
    assert {made_by(first_row(path)) for path in bench} == {"bench"}
    assert made_by({"type": "config", "seed": 0}) == ""


@pytest.mark.slow
@pytest.mark.parametrize("command", RESUMED)
@pytest.mark.parametrize("there", [*RESUMED, "product"])
def test_no_command_goes_on_in_the_folder_of_another(
    command: str,
    there: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folders[there], out)
    before = state(out)
    ended = cli.main([*RESUMED[command], "--out", str(out), "--resume"])
    if command == there != "tau":  # another rate, method or experiment is compared, but not by tau
        assert ended == 0
        assert before.items() <= state(out).items()
        return
    assert ended == 1
    error = capsys.readouterr().err
    assert (f"of `teleport {there}`" if command != there else "another experiment") in error
    assert state(out) == before


@pytest.mark.parametrize(
    "changes",
    [
        ["--optimizer", "adam"],
        ["--epochs", "2"],
        ["--tau", "0.9"],
        ["--batches", "2"],
        ["--schedule", "paper"],
    ],
)
def test_runs_with_other_settings_do_not_go_beside_those_that_are_there(
    changes: list[str],
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folders["run"], out)
    before = state(out)
    command = ["run", *OPTIONS, "--lr", "0.3", *changes, "--out", str(out), "--resume"]
    assert cli.main(command) == 1
    assert "give another --out" in capsys.readouterr().err
    assert state(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "sweep"])
def test_a_table_that_was_edited_is_not_gone_on_with(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "t.toml", tmp_path / "out"
    options = [command, f"{table}:small", "--preset", "tiny", "--seeds", "1", "--out", str(out)]
    options += ["--resume"] * (command == "run")
    ends = []
    for batch in (32, 16):
        table.write_text(SMALL.replace("= 32", f"= {batch}"))
        _read_once.cache_clear()  # as in a new process
        ends.append(cli.main(options))
        if batch == 32:
            before = state(out)
            capsys.readouterr()
    assert ends == [0, 1]
    assert "another batch_size (32, not 16)" in capsys.readouterr().err
    assert state(out) == before


def test_the_same_run_is_not_kept_twice(tmp_path: Path) -> None:
    run_arms(ROWS, [Arm(0.1)], [0], tmp_path)
    before = state(tmp_path)
    with pytest.raises(RunError, match=r"holds lr 0.1 \(seed 0\) already"):
        run_arms(ROWS, [Arm(0.2), Arm(0.1)], [0], tmp_path, resume=True)
    assert state(tmp_path) == before
    run_arms(ROWS, [Arm(0.2)], [0], tmp_path, resume=True)
    run_arms(ROWS, [Arm(0.1)], [0, 1], tmp_path, resume=True)
    found = sorted((run.arm, run.seed) for run in read_runs(tmp_path))
    assert found == [("lr 0.1", 0), ("lr 0.1", 1), ("lr 0.2", 0)]


def test_a_sweep_checks_all_folders_before_it_runs(tmp_path: Path) -> None:
    jobs = Plan(("sample-rows",), ("sgd", "adam"), 1, "tiny").jobs(tmp_path)
    check_folders(jobs)
    jobs[-1].folder.mkdir(parents=True)
    other = replace(jobs[-1].cell.settings, epochs=2)
    run_arms(other, [jobs[-1].cell.arm], [0], jobs[-1].folder)
    with pytest.raises(RunError, match=r"another settings\.epochs"):
        check_folders(jobs)
    check_folders([job for job in jobs if job.cell.settings.optimizer == "sgd"])


def test_a_folder_that_mixes_runs_is_not_reported(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(folders["run"], out)
    other.mkdir()
    run_arms(replace(ROWS, optimizer="adam"), [Arm(0.2)], [0], other)
    (record,) = other.glob("*.jsonl")
    shutil.copy(record, out)
    for command in ("figure", "report"):
        assert cli.main([command, str(out)]) == 1
        error = capsys.readouterr().err
        assert "cannot be compared" in error
        assert "settings.optimizer ('adam', not 'sgd')" in error


WRITERS: dict[str, Callable[[Path], object]] = {
    "run": lambda out: run_arms(ROWS, [Arm(0.1)], [0], out, resume=True),
    "continual": lambda out: run_strategies(
        SequenceRun("digits", "tiny"), [Strategy("plain", 0.1)], [0], RecordFolder(out, resume=True)
    ),
    "spectrum": lambda out: write_spectra(
        ["mnist-sample"], RecordFolder(out, resume=True), preset="tiny", steps=[1]
    ),
    "tau": lambda out: write_trajectories(
        "mnist-sample", RecordFolder(out, resume=True), preset="tiny", trained=1, teleport_steps=1
    ),
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_record_that_another_process_writes_is_not_taken_for_a_broken_one(
    command: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folders[command], out)
    (record,) = out.glob("*.jsonl")
    record.write_text("".join(record.read_text().splitlines(keepends=True)[:-1]))
    before = record.read_bytes()
    with locked(out / ".lock", str(out)), pytest.raises(RunError, match="in use by another"):
        WRITERS[command](out)
    assert record.read_bytes() == before
    WRITERS[command](out)
    assert record.read_bytes() != before


@pytest.mark.slow
@pytest.mark.parametrize(
    "foreign",
    ["notes.jsonl", "00-mine-seed0.jsonl", "07-spectrum-seed3.jsonl", "08-damaged-seed3.jsonl"],
)
def test_force_removes_nothing_where_other_records_are(
    foreign: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["run", *OPTIONS, "--lr", "0.1", "--no-teleport", "--out", str(out)]
    assert cli.main(command) == 0
    lines = {"07": '{"type": "config", "figure": "spectrum"}\n', "08": "{damaged}\n"}
    (out / foreign).write_text(lines.get(foreign[:2], '{"type": "mine", "value": 1}\n'))
    before = state(out)
    assert cli.main([*command, "--force"]) == 1
    assert foreign in capsys.readouterr().err
    assert state(out) == before


def test_force_removes_nothing_of_a_sweep_that_is_at_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep locks its own folder, and of the folders in it only the record it writes."""
    run_arms(ROWS, [Arm(0.1)], [0, 1], tmp_path)
    record = max(tmp_path.glob("*.jsonl"))
    with locked(record.with_suffix(".lock"), str(record)):
        before = state(tmp_path)
        assert cli.main(["run", *OPTIONS, "--force", "--out", str(tmp_path)]) == 1
        assert f"{record} is in use by another process" in capsys.readouterr().err
        assert state(tmp_path) == before
    open_folder("run", tmp_path, force=True)
    assert state(tmp_path) == {}


def test_force_keeps_a_table_and_a_figure_where_no_run_was(tmp_path: Path) -> None:
    mine = {"table.txt": b"mine", "figure.png": b"mine", "weights.checkpoint": b"mine"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    open_folder("run", tmp_path, force=True)
    assert state(tmp_path) == mine


def test_force_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    for name in ("00-lr-0.1-seed0.jsonl", "01-b-seed0.checkpoint", "01-b-seed0.checkpoint.new"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "figure.png").write_bytes(b"")
    open_folder("run", tmp_path, force=True)
    assert state(tmp_path) == {}
