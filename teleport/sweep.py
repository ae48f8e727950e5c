"""Every cell of a matrix of experiments, by processes of this machine; see `teleport.cluster`.

A cell is one run: experiment, optimizer, arm, seed. Cells that are finished are left alone, broken
ones go on from their checkpoint, a failing one does not keep the others from finishing, and a
process that dies is replaced.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from teleport.data import Dataset, load
from teleport.errors import RunError, TeleportError
from teleport.experiment import Settings, control_arms, default_arms, teleport_settings
from teleport.run import (
    CHECKPOINT_SECONDS,
    Cell,
    configuration,
    device_of,
    is_finished,
    run_cell,
    slug,
    steps_per_run,
)

REPORT_SECONDS = 0.5
"""Between two messages of a process about its steps."""


@dataclass(frozen=True)
class Job:
    """A cell and where its record goes.

    Attributes:
        checkpoint_seconds: between checkpoints.
        command: the command line, for the record.
    """

    cell: Cell
    folder: Path
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    command: str = ""


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish, and why."""

    job: Job
    reason: str


@dataclass(frozen=True)
class Plan:
    """A matrix: experiments x optimizers x arms x seeds.

    Attributes:
        names: experiments.
        optimizers: every experiment is run with every one of them.
        seeds: how many, counted from 0.
        preset: size.
        schedule: when teleports are due.
        epochs: instead of the preset's.
        controls: add the controls that act on any network, at both learning rates.
        device: where to train.
    """

    names: tuple[str, ...]
    optimizers: tuple[str, ...] = ("sgd",)
    seeds: int = 3
    preset: str = "cpu"
    schedule: str = "default"
    epochs: int | None = None
    controls: bool = False
    device: str = "cpu"

    def jobs(
        self, out: Path, *, checkpoint_seconds: float = CHECKPOINT_SECONDS, command: str = ""
    ) -> list[Job]:
        """All cells, seed by seed, so that every arm has its first seed early.

        Raises:
            ValueError: for an unknown name, or an optimizer that was not tuned for an experiment.
        """
        arms = control_arms if self.controls else default_arms
        jobs = []
        for name in self.names:
            options = teleport_settings(name, self.schedule)
            for optimizer in self.optimizers:
                settings = Settings(
                    name,
                    self.preset,
                    optimizer,
                    self.epochs,
                    device=self.device,
                    teleport=options,
                )
                settings.size()
                ending = "" if self.schedule == "default" else f"-{self.schedule}"
                folder = out / slug(name) / f"{slug(optimizer)}{ending}"
                jobs += [
                    Job(Cell(settings, arm, seed, order), folder, checkpoint_seconds, command)
                    for seed in range(self.seeds)
                    for order, arm in enumerate(arms(name, optimizer))
                ]
        return jobs


def total_steps(jobs: Sequence[Job]) -> int:
    """Training steps of all cells together."""
    return sum(_steps(job.cell.settings) for job in jobs)


@lru_cache
def _steps(settings: Settings) -> int:
    return steps_per_run(settings, _data(settings.recipe().data, "cpu"))


def _is_done(job: Job) -> bool:
    settings = job.cell.settings
    dataset = _data(settings.recipe().data, "cpu")
    return is_finished(job.folder / job.cell.record, configuration(job.cell, dataset))


@lru_cache(maxsize=2)
def _data(name: str, device: str) -> Dataset:
    return load(name).to(device_of(device))


def run_job(job: Job, progress: Callable[[int], None] = lambda steps: None) -> Path:
    """One cell, from wherever its record is; what a process or a Dask worker calls."""
    job.folder.mkdir(parents=True, exist_ok=True)
    settings = job.cell.settings
    return run_cell(
        job.cell,
        _data(settings.recipe().data, settings.device),
        job.folder,
        resume=True,
        checkpoint_seconds=job.checkpoint_seconds,
        command=job.command,
        progress=progress,
    )


def reason_of(error: BaseException) -> str:
    """What a failed cell is listed with."""
    return str(error) if isinstance(error, TeleportError) else f"{type(error).__name__}: {error}"


def run_local(
    jobs: Sequence[Job],
    processes: int,
    *,
    stepped: Callable[[int], None] = lambda steps: None,
    ended: Callable[[Job], None] = lambda job: None,
) -> list[Failure]:
    """All cells, by so many processes of this machine.

    Args:
        jobs: the cells.
        processes: how many at a time; the cores are shared out evenly among them.
        stepped: told about training steps as they are done.
        ended: told about every cell that has come to an end.

    Returns:
        The cells that failed, with why.

    Raises:
        ValueError: for less than one process.
    """
    if processes < 1:
        raise ValueError(f"jobs must be >= 1, got {processes}")
    waiting, failures = list[Job](), list[Failure]()
    for job in reversed(jobs):  # what is done, or is another run's, needs no process
        try:
            done = _is_done(job)
        except RunError as error:
            failures.append(Failure(job, reason_of(error)))
            done = True
        if done:
            stepped(_steps(job.cell.settings))
            ended(job)
        else:
            waiting.append(job)
    threads = max(1, torch.get_num_threads() // processes)
    with _pool(min(processes, len(waiting)), threads) as pool:
        busy = {worker.pipe: (worker, worker.take(waiting.pop())) for worker in pool}
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker, job = busy[pipe]
                kind, value = worker.hear()
                if kind == "steps":
                    stepped(value)
                    continue
                if kind != "done":
                    failures.append(Failure(job, value))
                ended(job)
                del busy[pipe]
                if waiting:
                    alive = worker if kind != "died" else _add(pool, threads)
                    busy[alive.pipe] = (alive, alive.take(waiting.pop()))
    return failures


class _Worker:
    """A process that runs one cell after the other, and the pipe to it."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.pipe, end = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(end, threads))
        self.process.start()
        end.close()

    def take(self, job: Job) -> Job:
        self.pipe.send(job)
        return job

    def hear(self) -> tuple[str, Any]:
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return "died", f"its process died (exit code {self.process.exitcode})"
        return kind, value


def _add(pool: list[_Worker], threads: int) -> _Worker:
    pool.append(_Worker(threads))
    return pool[-1]


@contextmanager
def _pool(count: int, threads: int) -> Iterator[list[_Worker]]:
    pool = list[_Worker]()
    try:
        for _ in range(count):
            _add(pool, threads)
        yield pool
    finally:
        for worker in pool:
            worker.process.terminate()
            worker.process.join()
            worker.pipe.close()


def _work(pipe: Connection, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    torch.set_num_threads(threads)
    parent = os.getppid()
    told = [time.monotonic(), 0.0]

    def progress(steps: int) -> None:
        told[1] += steps
        if time.monotonic() - told[0] > REPORT_SECONDS:
            pipe.send(("steps", int(told[1])))
            told[:] = time.monotonic(), 0.0

    while os.getppid() == parent:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            run_job(job, progress)
        except Exception as error:  # whatever it is: the other cells go on
            pipe.send(("failed", reason_of(error)))
        else:
            pipe.send(("steps", int(told[1])))
            pipe.send(("done", None))
        told[:] = time.monotonic(), 0.0
