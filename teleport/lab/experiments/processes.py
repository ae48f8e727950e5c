"""The cells of a sweep by processes of this machine.

A failing cell does not keep the others from finishing, and a process that dies is replaced.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from teleport.errors import RunError
from teleport.lab.experiments.sweep import Failure, Job, is_done, reason_of, run_job, total_steps

REPORT_SECONDS = 0.5
"""Between two messages of a process about its steps."""


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
            done = is_done(job)
        except RunError as error:
            failures.append(Failure(job, reason_of(error)))
            done = True
        if done:
            stepped(total_steps([job]))
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
        with _without_ctrl_c():
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


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """A process that is started here does not see Ctrl-C, not even while it imports."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
