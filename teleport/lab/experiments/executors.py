"""The cells of a sweep by an executor: processes of this machine, or workers of a Dask cluster.

Here the processes are the standard library's: a local Dask cluster took 3 s of CPU time and 64 MB
more for the same six small cells, and its packages another 35 MB of everybody's installation.

A Dask cluster's workers need this package, the data sets, and the folder of the sweep under the
same path; a table of one's own they are sent. The cell of a worker that dies is given to another
one, where it goes on from its checkpoint.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from ctypes import c_longlong
from threading import Lock, Thread, local
from typing import Any

import torch

from teleport.errors import RunError
from teleport.lab.experiments.sweep import Failure, Job, is_done, reason_of, run_job, total_steps

REPORT_SECONDS = 0.5
"""Between two looks at the steps that processes have done."""


def run_jobs(
    jobs: Sequence[Job],
    executor: Executor,
    *,
    stepped: Callable[[int], None] = lambda steps: None,
    ended: Callable[[Job], None] = lambda job: None,
) -> list[Failure]:
    """All cells; return those that failed, with why.

    One that fails, or whose process dies, does not keep the others from finishing.

    Args:
        jobs: the cells; for a cluster, their folders must be absolute.
        executor: a `Processes`, or what `cluster` gives.
        stepped: told about training steps as they are done; on a cluster, by whole cells.
        ended: told about every cell that has come to an end.
    """
    failures, told = list[Failure](), 0
    running: dict[Future[str], Job] = {}
    for job in jobs:  # what is done, or is another run's, needs no process
        try:
            if not is_done(job):
                running[executor.submit(reason_of_failure, job)] = job
                continue
        except RunError as error:
            failures.append(Failure(job, reason_of(error)))
        stepped(total_steps([job]))
        ended(job)
    while running:
        over = wait(running, REPORT_SECONDS, return_when=FIRST_COMPLETED).done
        if isinstance(executor, Processes) and (steps := executor.steps()) > told:
            stepped(steps - told)
            told = steps
        for future in [future for future in running if future in over]:
            job = running.pop(future)
            if not isinstance(executor, Processes):
                stepped(total_steps([job]))
            if reason := _why_not_done(future, job):
                failures.append(Failure(job, reason))
            ended(job)
    return failures


def _why_not_done(future: Future[str], job: Job) -> str:
    try:
        reason = future.result()
        if reason or is_done(job):
            return reason
    except CancelledError:
        return "the scheduler lost it, or went away itself; give the same sweep again to go on"
    except Exception as error:  # of the process; or is_done finds data that are not those here
        return reason_of(error)
    return (
        f"its worker finished it, but no complete record of it is in {job.folder}: the workers "
        "need that very folder, under the same path"
    )


def reason_of_failure(job: Job) -> str:
    """Run one cell, in another process; return why it failed, nothing if it did not."""
    try:
        run_job(job, _count_steps)
    except Exception as error:  # whatever it is: the other cells go on
        return reason_of(error)
    return ""


class Processes(Executor):
    """Runs functions in processes of this machine.

    A process that dies breaks the `ProcessPoolExecutor` it belongs to. So there is one for every
    process, with a thread here that waits for it, and starts another one if it is broken.

    Args:
        count: how many at a time; PyTorch's threads are shared out evenly among them.

    Raises:
        ValueError: for less than one process.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"jobs must be >= 1, got {count}")
        self._torch_threads = max(1, torch.get_num_threads() // count)
        self._waiting = ThreadPoolExecutor(count)
        self._own = local()
        self._starting = Lock()
        self._started = list[_Process]()

    def steps(self) -> int:
        """Training steps that all of them have done so far."""
        return sum(process.steps.value for process in self._started)

    def submit(self, *call: Any, **options: Any) -> Future[Any]:
        """As any executor's."""
        return self._waiting.submit(self._elsewhere, *call, **options)

    def _elsewhere(self, *call: Any, **options: Any) -> Any:
        process: _Process | None = getattr(self._own, "process", None)
        if process is None:
            with self._starting:
                process = self._own.process = _Process(self._torch_threads)
                self._started.append(process)
        try:
            return process.pool.submit(*call, **options).result()
        except BrokenProcessPool as error:
            self._own.process = None
            process.pool.shutdown()  # the exit code is there after that
            raise RunError(f"its process died (exit code {process.handle.exitcode})") from error

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As any executor's."""
        self._waiting.shutdown(wait, cancel_futures=cancel_futures)
        for process in self._started:
            process.pool.shutdown(wait)

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is not None:  # such as Ctrl-C: no cell is waited for
            self._waiting.shutdown(wait=False, cancel_futures=True)
            with self._starting:
                for process in self._started:
                    process.handle.terminate()
        self.shutdown()


class _Process:
    """One process: its pool, and the steps it has told; made in the thread that waits for it."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self.steps = context.RawValue(c_longlong)
        self.pool = ProcessPoolExecutor(1, context, _begin, (threads, self.steps))
        before = set(multiprocessing.active_children())
        if hasattr(signal, "pthread_sigmask"):  # nor is Ctrl-C seen by a process that still imports
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self.pool.submit(os.getpid)  # starts the process
        (self.handle,) = set(multiprocessing.active_children()) - before


_TOLD: Any = c_longlong()
"""The steps that this process has done, where the one that started it can read them."""


def _begin(threads: int, steps: Any) -> None:
    global _TOLD
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    torch.set_num_threads(threads)
    _TOLD = steps
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _count_steps(steps: int) -> None:
    _TOLD.value += steps


@contextmanager
def cluster(address: str, timeout: float = 30.0) -> Iterator[Executor]:
    """The workers of a Dask scheduler, such as ``tcp://10.0.0.1:8786``.

    A worker that dies does not make its cell fail before the scheduler's ``allowed-failures`` (3)
    are used up.

    Raises:
        RunError: if the extra ``dask`` is not installed, the scheduler does not answer for
            ``timeout`` seconds, or it has no workers.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise RunError(
            "--scheduler needs Dask; install it with: pip install 'nullspace-teleport[dask]'"
        ) from error
    try:
        client = Client(address, timeout=timeout)
    except (OSError, ValueError, TypeError) as error:  # TypeError: tls:// without certificates
        raise RunError(
            f"the Dask scheduler at {address} does not answer: {error}; give the address that "
            "`dask scheduler` prints, such as tcp://10.0.0.1:8786"
        ) from error
    with client:
        if not client.scheduler_info()["workers"]:
            raise RunError(f"the Dask scheduler at {address} has no workers; start some")
        yield client.get_executor()
