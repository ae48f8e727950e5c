"""The cells of a sweep on a Dask cluster: the same calls, sent elsewhere.

The cluster's workers need this package, the data sets, and the folder of the sweep under the same
path; a table of one's own they are sent. The cell of a worker that dies is given to another one,
where it goes on from its checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from teleport.errors import RunError
from teleport.lab.experiments.sweep import Failure, Job, is_done, reason_of, run_job


def run_on_cluster(
    jobs: Sequence[Job],
    address: str,
    *,
    ended: Callable[[Job], None] = lambda job: None,
    timeout: float = 30.0,
) -> list[Failure]:
    """All cells, by the workers of a Dask scheduler.

    Args:
        jobs: the cells; their folders must be absolute.
        address: of the scheduler, such as ``tcp://10.0.0.1:8786``.
        ended: told about every cell that has come to an end.
        timeout: seconds to wait for the scheduler.

    Returns:
        The cells that failed, with why; a worker that dies does not make its cell fail before the
        scheduler's ``allowed-failures`` (3) are used up.

    Raises:
        RunError: if the extra ``dask`` is not installed, the scheduler does not answer, or it has
            no workers.
    """
    with _connected(address, timeout) as client:
        from distributed import as_completed

        futures = {client.submit(run_job, job, pure=False): job for job in jobs}
        failures = []
        for future in as_completed(futures):
            job = futures[future]
            reason = _why_not_done(future, job)
            if reason:
                failures.append(Failure(job, reason))
            ended(job)
    return failures


def _why_not_done(future: Any, job: Job) -> str:
    raised = future.exception()
    if raised is not None:
        return reason_of(raised)
    if future.status != "finished":
        return (
            f"the scheduler lost it ({future.status}), or went away itself; give the same sweep "
            "again to go on"
        )
    try:
        done = is_done(job)
    except RunError as error:  # such as of a worker whose data are not those here
        return reason_of(error)
    if not done:
        return (
            f"its worker finished it, but no complete record of it is in {job.folder}: the workers "
            "need that very folder, under the same path"
        )
    return ""


def check_cluster(address: str, timeout: float = 30.0) -> None:
    """Raise, before anything is written, what `run_on_cluster` would."""
    with _connected(address, timeout):
        pass


@contextmanager
def _connected(address: str, timeout: float) -> Iterator[Any]:
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
        yield client
