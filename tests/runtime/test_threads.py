"""How many threads compute, how they wait, and what records say of it."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from teleport import cli, data
from teleport.errors import RunError
from teleport.lab.experiments.arms import Arm, RunSettings
from teleport.lab.experiments.run import Cell, run_cell
from teleport.runtime.cores import cores, wait_without_spinning
from teleport.runtime.threads import BY_ONE, factorised, threads_for, using_threads
from teleport.subspace import RowSpace
from tests.support.tables import small

CELL = Cell(RunSettings("mnist-sample", "tiny", epochs=1), Arm(0.1), 0, 0)


def group(system: Path, line: str, files: dict[str, str]) -> Path:
    (system / "proc/self").mkdir(parents=True)
    (system / "proc/self/cgroup").write_text(line + "\n")
    for name, content in files.items():
        path = system / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return system


@pytest.mark.parametrize(
    ("line", "files", "wanted"),
    [
        ("0::/", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/", {"cpu.max": "max 100000\n"}, 8),
        ("0::/a/b", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/a/b", {}, 8),
        (
            "3:cpu,cpuacct:/a",
            {"cpu/a/cpu.cfs_quota_us": "400000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("3:memory:/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cores_are_those_of_the_process_and_of_its_group(
    line: str, files: dict[str, str], wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert cores(group(tmp_path, line, files)) == wanted
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {5})
    assert cores(tmp_path) == 1
    assert cores(tmp_path / "no such system") == 1


def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise() -> None:
    fresh: dict[str, str] = {}
    wait_without_spinning(fresh)
    assert fresh == {"OMP_WAIT_POLICY": "PASSIVE"}
    for name, value in {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "9"}.items():
        given = {name: value}
        wait_without_spinning(given)
        assert given == {name: value}


def test_threads_are_as_asked_or_as_the_environment_says_or_leave_two_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr("teleport.runtime.threads.cores", lambda: 4)
    assert threads_for(3) == 3
    assert threads_for(None) == 6  # tests run with OMP_NUM_THREADS
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    assert threads_for(None) == 2
    monkeypatch.setattr("teleport.runtime.threads.cores", lambda: 2)
    assert threads_for(None) == 1
    monkeypatch.setattr("teleport.runtime.threads.cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert threads_for(None) == 1


def test_small_matrices_are_factorised_by_one_thread() -> None:
    def threads(matrix: torch.Tensor, fail: bool = False) -> int:
        if fail:
            raise KilledError
        return torch.get_num_threads()

    with using_threads(3):
        assert factorised(threads, torch.empty(BY_ONE - 1, BY_ONE)) == 1
        assert factorised(threads, torch.empty(2, BY_ONE, BY_ONE)) == 3
        assert factorised(threads, torch.empty(5, 5, device="meta")) == 3
        with pytest.raises(KilledError):
            factorised(threads, torch.empty(5, 5), fail=True)
        assert torch.get_num_threads() == 3


def test_an_interrupt_while_the_number_is_set_puts_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python tells of Ctrl-C when the function of PyTorch's has returned."""
    real, interrupts = torch.set_num_threads, iter([True])

    def set_num_threads(number: int) -> None:
        real(number)
        if next(interrupts, False):
            raise KeyboardInterrupt

    with using_threads(3):
        monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
        with pytest.raises(KeyboardInterrupt):
            factorised(torch.linalg.eigvalsh, torch.eye(2))
        assert torch.get_num_threads() == 3


def test_factorising_in_two_threads_leaves_the_number_of_later_ones() -> None:
    """PyTorch gives a new thread the number that was set last, by whichever thread."""

    def threads(matrix: torch.Tensor) -> int:
        return torch.get_num_threads()

    def in_a_thread(work: Callable[[], int]) -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    with using_threads(3), ThreadPoolExecutor(1) as pool:

        def meanwhile(matrix: torch.Tensor) -> None:
            pool.submit(torch.get_num_threads).result()  # it has one thread from then on

        factorised(meanwhile, torch.empty(5, 5))
        assert pool.submit(factorised, threads, torch.empty(5, 5)).result() == 1
        assert in_a_thread(torch.get_num_threads) == 3


@pytest.mark.parametrize("make", ["rows", "few rows", "double"])
def test_a_basis_is_decomposed_by_one_thread(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way: of a Gram matrix, of a few rows, of rows in double precision."""
    count, dtype = {"rows": (40, torch.float32), "few rows": (5, torch.float32)}.get(
        make, (40, torch.float64)
    )
    seen = []

    def watched(how: Any, *args: Any, **options: Any) -> Any:
        seen.append(torch.get_num_threads())
        return how(*args, **options)

    for name in ("eigh", "svd", "qr", "cholesky_ex", "cholesky"):
        monkeypatch.setattr(torch.linalg, name, partial(watched, getattr(torch.linalg, name)))
    space = RowSpace()
    space.add(torch.randn(count, 12, dtype=dtype))
    with using_threads(3):
        space.basis()
        space.basis_if_independent()
    assert seen
    assert set(seen) == {1}


def recorded(path: Path) -> list[int]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["hardware"]["threads"] for row in rows if "hardware" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["run", "SMALL", "--lr", "0.1", "--no-teleport"],
        ["sweep", "SMALL", "--seeds", "1", "--jobs", "2"],
        ["continual", "--methods", "plain", "--seeds", "1"],
        ["spectrum", "SMALL", "--trained", "0"],
        ["tau", "SMALL", "--trained", "1", "--steps", "1"],
        ["moves", "narrow-mlp", "--trained", "1", "--seeds", "1"],
        ["product", "SMALL", "--trained", "1"],
    ],
    ids=lambda command: command[0],
)
def test_records_name_the_threads_asked_for(command: list[str], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    out, name = tmp_path / "out", small(tmp_path)
    command = [name if word == "SMALL" else word for word in command]
    assert cli.main([*command, "--preset", "tiny", "--threads", "2", "--out", str(out)]) == 0
    found = [recorded(path) for path in out.rglob("*.jsonl")]
    assert found
    assert all(threads == [2] for threads in found)
    assert torch.get_num_threads() == before


class KilledError(Exception):
    pass


def test_a_run_goes_on_with_the_threads_it_began_with(tmp_path: Path) -> None:
    dataset, told = data.load("mnist-sample"), 0

    def progress(steps: int) -> None:
        nonlocal told
        told += steps
        if told >= 5:
            raise KilledError

    with pytest.raises(KilledError):
        run_cell(CELL, dataset, tmp_path, checkpoint_seconds=0.0, threads=2, progress=progress)
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RunError, match=r"began with 2 threads.* with 3.*give --threads 2"):
        run_cell(CELL, dataset, tmp_path, resume=True, threads=3)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files
    assert torch.get_num_threads() == 1
    path = run_cell(CELL, dataset, tmp_path, resume=True)
    assert recorded(path) == [2, 2]
    assert torch.get_num_threads() == 1
