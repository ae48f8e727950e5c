"""A matrix of runs: what is done, what is left alone, what fails, and what the report says."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from teleport import cli
from teleport.errors import RunError
from teleport.lab.analysis.outcomes import blocks, matrix_markdown
from teleport.lab.experiments import executors, sweep
from teleport.lab.experiments.arms import control_arms, default_arms
from teleport.lab.experiments.executors import Processes, run_jobs
from teleport.lab.experiments.sweep import Plan, run_job, total_steps
from teleport.lab.records.checkpoint import locked
from teleport.lab.records.compare import summarise
from teleport.lab.records.runs import read_run, read_runs
from tests.support.waiting import HANG

pytestmark = pytest.mark.slow

TABLE = """
[small]
title = "a small network"
data.paper = "mnist-sample"
network.kind.paper = "mlp"
network.hidden.paper = [40, 40]
batch_size.paper = 32
teleport.lr.ours = 0.2
teleport.cap.ours = 3.0
teleport.warmup_steps.ours = 2
teleport.n.ours = 25
teleport.held_out.ours = 20
presets.tiny.ours = { epochs = 3, train_size = 640, evaluate_every = 10, evaluate_size = 50 }
tuning.sgd.ours = { low = 0.05, tuned = 0.2, gain_lr = 0.2, init = "he", head_gain = 2.0 }
tuning.adam.ours = { low = 0.001, tuned = 0.01, gain_lr = 0.01, init = "he", head_gain = 2.0 }
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("table") / "t.toml"
    path.write_text(TABLE)
    return f"{path}:small"


@pytest.fixture(scope="module")
def swept(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of two optimizers, one with controls; done in this process."""
    out = tmp_path_factory.mktemp("sweep")
    for job in plan(small, optimizers=("sgd", "adam")).jobs(out):
        run_job(job)
    for job in plan(small, controls=True, seeds=1).jobs(out):
        run_job(job)
    return out


def plan(name: str, **options: object) -> Plan:
    return Plan((name,), **{"preset": "tiny", "seeds": 2, **options})  # type: ignore[arg-type]


def trajectories(folder: Path) -> dict[str, list[tuple[float, float]]]:
    found = [run for path in {p.parent for p in folder.rglob("*.jsonl")} for run in read_runs(path)]
    assert {run.status for run in found} == {"finished"}
    return {
        str(run.path.relative_to(folder)): [(r["step"], r["train_loss"]) for r in run.evaluations]
        for run in found
    }


def test_a_sweep_is_the_product_of_its_parts(small: str, tmp_path: Path) -> None:
    jobs = plan(small, optimizers=("sgd", "adam"), controls=True).jobs(tmp_path)
    assert len(jobs) == 2 * 2 * len(control_arms(small, "sgd"))
    assert len({job.folder / job.cell.record for job in jobs}) == len(jobs)
    assert total_steps(jobs) == len(jobs) * 3 * (640 // 32)
    first = jobs[: len(control_arms(small, "sgd"))]
    assert {job.cell.seed for job in first} == {0}, "every arm has its first seed early"
    other = plan(small, schedule="paper").jobs(tmp_path)
    assert {job.folder for job in other}.isdisjoint({job.folder for job in jobs})


def test_processes_do_what_one_process_does_and_done_cells_are_left(
    small: str, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["sweep", small, "--preset", "tiny", "--seeds", "1", "--jobs", "2"]
    assert cli.main([*options, "--out", str(tmp_path)]) == 0
    mine, theirs = trajectories(tmp_path), trajectories(swept)
    assert len(mine) == len(default_arms(small, "sgd"))
    assert all(theirs[name] == rows for name, rows in mine.items())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    broken = sorted(before)[3]
    broken.unlink()
    assert cli.main([*options, "--out", str(tmp_path)]) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    assert {path for path in before if before[path] != after[path]} == {broken}
    assert f"{len(mine)} of {len(mine)} cells" in capsys.readouterr().out
    config = json.loads(broken.read_text().splitlines()[0])
    assert config["command"] == shlex.join(["teleport", *options, "--out", str(tmp_path)])


def test_a_cell_that_fails_or_dies_is_listed_and_the_others_finish(
    small: str, tmp_path: Path
) -> None:
    jobs = plan(small, seeds=1, epochs=6).jobs(tmp_path)
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / jobs[0].cell.record).write_text('{"type": "config", "seed": 7}\n')
    ended: list[sweep.Job] = []
    killed: list[int] = []

    def stepped(count: int) -> None:
        if ended and not killed and children():  # one is at work
            killed.extend(children())
            os.kill(killed[0], signal.SIGKILL)

    with Processes(1) as executor:
        failures = run_jobs(jobs, executor, stepped=stepped, ended=ended.append)
    assert ended == jobs
    damaged, died = failures
    assert damaged.job == jobs[0]
    assert "another" in damaged.reason
    assert "exit code -9" in died.reason
    for job in jobs[1:]:
        if job != died.job:
            assert read_run(job.folder / job.cell.record).status == "finished"
    # The same again: what was killed goes on, what is damaged fails again.
    with Processes(1) as executor:
        assert [failure.job for failure in run_jobs(jobs, executor)] == jobs[:1]


def children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    found = [int(pid) for task in tasks for pid in task.read_text().split()]
    return [pid for pid in found if "spawn_main" in command_of(pid)]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nope"], "mnist-sample"),
        (["mnist-sample", "--optimizers", "sgd,adamm"], "adamm"),
        (["mnist-sample", "--optimizers", "rmsprop"], "give --lr"),
        (["mnist-sample", "--schedule", "never"], "default"),
        (["mnist-sample", "--preset", "huge"], "tiny"),
        (["mnist-sample", "--device", "no-such-device"], "not available"),
    ],
)
def test_a_sweep_checks_its_names_before_anything_runs(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sweep", *options, "--out", str(tmp_path / "s")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_file_stands_for_all_its_experiments(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.toml"
    table.write_text(TABLE + '[other]\nlike = "small"\n')
    names = [str(table), f"{table}:small"]
    options = ["--preset", "tiny", "--epochs", "1", "--seeds", "1", "--optimizers", "sgd, sgd"]
    assert cli.main(["sweep", *names, *options, "--out", str(tmp_path / "s")]) == 0
    assert "12 of 12 cells" in capsys.readouterr().out
    assert cli.main(["sweep", small, *options[:-1], "sgd,", "--out", str(tmp_path / "t")]) == 1
    assert "unknown optimizer ''" in capsys.readouterr().err


def test_a_diverging_cell_is_said(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.toml"
    table.write_text(TABLE.replace("low = 0.05", "low = 1e6"))
    options = ["--preset", "tiny", "--seeds", "1", "--out", str(tmp_path / "s")]
    assert cli.main(["sweep", f"{table}:small", *options]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line[:8] == "diverged"]
    assert len(said) == 2
    assert all("the train loss is nan" in line for line in said)


def test_two_sweeps_never_share_a_folder(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path / ".lock", str(tmp_path)):
        assert cli.main(["sweep", small, "--preset", "tiny", "--out", str(tmp_path)]) == 1
    assert "in use by another process" in capsys.readouterr().err


def test_the_report_holds_every_arm_with_the_numbers_of_its_records(
    small: str, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures"
    assert cli.main(["report", str(swept), "--figures", str(figures)]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == matrix_markdown(blocks(swept)).strip()
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:5] == "| lr "]
    assert len(rows) == len(control_arms(small, "sgd")) + len(default_arms(small, "adam"))
    for block in blocks(swept):
        for summary in summarise(read_runs(swept / block.folder)):
            note = " (best baseline)" if summary.arm == block.best else ""
            assert [summary.arm + note] in [row[:1] for row in rows]
    (adam, sgd) = blocks(swept)
    assert (adam.optimizer, sgd.optimizer) == ("adam", "sgd")
    moved = next(s for s in sgd.summaries if s.arm == "lr 0.2 + teleport")
    line = next(row for row in rows if row[0] == "lr 0.2 + teleport")
    assert moved.to_own is not None
    assert line[6].startswith(f"{moved.to_own.log_loss:+.3f} ± ")
    share = moved.teleport_seconds / (moved.teleport_seconds + moved.train_seconds)
    assert line[-1].strip() == f"{share:.0%}"
    assert sum("(best baseline)" in row[0] for row in rows) == 2
    (figure,) = figures.iterdir()
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_folder_with_nothing_to_compare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="teleport sweep"):
        blocks(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "bench.jsonl").write_text('{"type": "config", "benchmark": "step"}\n')
    with pytest.raises(RunError, match="teleport sweep"):
        blocks(tmp_path)
    (tmp_path / "a" / "bad.jsonl").write_text("not json\n")
    with pytest.raises(RunError, match=r"bad\.jsonl, line 1"):
        blocks(tmp_path)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_folder_in_the_middle_of_a_sweep_is_reported(
    optimizer: str, swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records that were killed at any moment: before the first row, after it, a loss missing."""
    source = next(path for path in swept.rglob(optimizer) if path.is_dir())
    folder = tmp_path / "half"
    shutil.copytree(source, folder)
    paths = sorted(folder.glob("*.jsonl"))
    for path, rows in zip(paths, (0, 1, 2), strict=False):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))
    broken = paths[3].read_text().replace('"test_loss": 2', '"test_loss": null, "was": 2')
    paths[3].write_text(broken)
    assert "null" in broken
    for command in (["report", str(tmp_path), "--figures", str(tmp_path)], ["figure", str(folder)]):
        assert cli.main(command) == 0
        assert "unfinished" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert cli.main(["report", str(tmp_path), "--figures", str(tmp_path / "file")]) == 1
    assert "cannot write figures to" in capsys.readouterr().err
    for path in paths:
        path.write_text(path.read_text().partition("\n")[0] + "\n" * (path != paths[0]))
    assert cli.main(["figure", str(folder)]) == 0


@contextmanager
def cluster(
    workers: int, folder: Path | None = None
) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A scheduler and then workers, each a process of its own on this machine, in a folder."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    with socket_free() as port:
        address = f"tcp://127.0.0.1:{port}"
    scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    options = ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
    started = [subprocess.Popen([*scheduler, *options], **quiet)]  # type: ignore[call-overload]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1"]
    worker += ["--no-dashboard", "--no-nanny", "--host", "127.0.0.1"]
    for _ in range(workers):
        started.append(subprocess.Popen(worker, **quiet))  # type: ignore[call-overload]
    try:
        yield address, started
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


@contextmanager
def socket_free() -> Iterator[int]:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    yield port


def wait_for_workers(address: str, count: int) -> None:
    from distributed import Client

    with Client(address, timeout=HANG) as client:
        client.wait_for_workers(count, timeout=HANG)


@pytest.mark.extra("distributed")
def test_a_cluster_does_what_one_process_does_though_a_worker_is_killed(
    small: str, swept: Path, tmp_path: Path
) -> None:
    jobs = plan(small, seeds=1).jobs(tmp_path, checkpoint_seconds=0.0)
    with cluster(2) as (address, (_, *workers)):
        wait_for_workers(address, 2)
        ended: list[sweep.Job] = []

        def kill_one(job: sweep.Job) -> None:
            ended.append(job)
            if len(ended) == 2:
                workers[0].kill()

        with executors.cluster(address) as executor:
            failures = run_jobs(jobs, executor, ended=kill_one)
    assert failures == []
    assert len(ended) == len(jobs)
    mine, theirs = trajectories(tmp_path), trajectories(swept)
    assert len(mine) == len(jobs)
    assert all(theirs[name] == rows for name, rows in mine.items())


def test_cells_that_a_dead_scheduler_took_along_are_listed_and_go_on(
    small: str, swept: Path, tmp_path: Path
) -> None:
    jobs = plan(small, seeds=1).jobs(tmp_path, checkpoint_seconds=0.0)
    ended: list[sweep.Job] = []
    with cluster(1) as (address, (scheduler, _)):
        wait_for_workers(address, 1)

        def kill_it(job: sweep.Job) -> None:
            ended.append(job)
            if len(ended) == 2:
                scheduler.kill()

        with executors.cluster(address) as executor:
            failures = run_jobs(jobs, executor, ended=kill_it)
    assert sorted(map(str, ended), key=str) == sorted(map(str, jobs), key=str)
    failed = [failure.job for failure in failures]
    # A worker may have ended its cell after nobody was there to be told.
    assert all(sweep.is_done(job) for job in jobs if job not in failed)
    assert len(failed) >= 2
    assert all("scheduler" in failure.reason for failure in failures)
    with Processes(1) as executor:
        assert run_jobs(jobs, executor) == []
    mine, theirs = trajectories(tmp_path), trajectories(swept)
    assert all(theirs[name] == rows for name, rows in mine.items())


def test_workers_elsewhere_need_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    (here / "mine.toml").write_text(TABLE)
    (there / "mine.toml").write_text(TABLE.replace("[40, 40]", "[9]"))  # theirs, of the same name
    monkeypatch.chdir(here)
    command = ["sweep", "mine.toml:small", "--preset", "tiny", "--seeds", "1", "--out", "out"]
    with cluster(1, there) as (address, _):
        wait_for_workers(address, 1)
        assert cli.main([*command, "--scheduler", address]) == 0
    assert "6 of 6 cells" in capsys.readouterr().out
    for record in Path("out").rglob("*.jsonl"):
        config = read_run(record).config
        assert config["experiment"] == "mine.toml:small"
        assert config["network"]["hidden"] == [40, 40]


def test_the_device_is_the_workers(
    small: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the device would be there")
    command = ["sweep", small, "--preset", "tiny", "--seeds", "1", "--out", str(tmp_path / "out")]
    with cluster(1) as (address, _):
        wait_for_workers(address, 1)
        assert cli.main([*command, "--scheduler", address, "--device", "cuda"]) == 1
    told = capsys.readouterr()
    assert "0 of 6 cells" in told.out
    assert told.err.count("device 'cuda' is not available here") == 6
    assert cli.main([*command, "--scheduler", address, "--device", "gpu"]) == 1
    assert "device 'gpu' is not available" in capsys.readouterr().err


class Elsewhere(ThreadPoolExecutor):
    """Says that it has run a cell to its end, and has not done it here."""

    def submit(self, *_: object) -> "Future[str]":  # type: ignore[override]
        return super().submit(str)


def test_a_record_that_is_on_another_machine_is_missed(small: str, tmp_path: Path) -> None:
    (job, *_) = plan(small, seeds=1).jobs(tmp_path)
    with Elsewhere() as executor:
        (failure,) = run_jobs([job], executor)
    assert "under the same path" in failure.reason


def test_a_record_that_is_not_the_one_wanted_fails_its_cell_only(
    small: str, tmp_path: Path
) -> None:
    """A worker whose data differ from those here, say, writes what is another record here."""
    jobs = plan(small, seeds=1).jobs(tmp_path)[:2]

    class Other(ThreadPoolExecutor):
        def submit(self, function: Callable[..., str], job: sweep.Job) -> "Future[str]":  # type: ignore[override]
            return super().submit(self.run, job)

        def run(self, job: sweep.Job) -> str:
            record = run_job(job)
            if job == jobs[0]:
                record.write_text(
                    record.read_text().replace('"checksum": "', '"checksum": "not ', 1)
                )
            return ""

    with Other(1) as executor:
        (failure,) = run_jobs(jobs, executor)
    assert failure.job == jobs[0]
    assert "data.checksum" in failure.reason


def test_the_threads_of_a_worker_do_what_one_does(small: str, swept: Path, tmp_path: Path) -> None:
    """A Dask worker has as many as its machine has cores, unless told otherwise."""
    jobs = plan(small).jobs(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run_job, jobs))
    mine, theirs = trajectories(tmp_path), trajectories(swept)
    assert len(mine) == len(jobs)
    assert all(theirs[name] == rows for name, rows in mine.items())


@pytest.mark.extra("distributed")
@pytest.mark.parametrize("protocol", ["tcp", "tls", "ucx", "nonsense"])
def test_a_scheduler_that_does_not_answer_is_named(
    protocol: str,
) -> None:
    with (
        socket_free() as port,
        pytest.raises(RunError, match="does not answer"),
        executors.cluster(f"{protocol}://127.0.0.1:{port}", timeout=1.0),
    ):
        pass
