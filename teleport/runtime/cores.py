"""The cores that are ours, and how threads wait for each other.

Nothing here needs PyTorch: how its threads wait is read once, when it is loaded.
"""

import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

MOST_THREADS = 1024
"""More are refused: a machine that has not the memory for them ends the process without a word."""

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_NUMBER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def wait_without_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait for others sleep, unless the user has said how they are to wait.

    By default OpenMP's threads spin: they keep a core busy that the thread they wait for may need.
    Beside two busy processes on two cores that made training forty times slower. It must be called
    before PyTorch is loaded.
    """
    if not any(name in environment for name in _WAITING):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def number_is_given() -> bool:
    """Whether the user's environment says how many threads PyTorch has."""
    return any(name in os.environ for name in _NUMBER)


def check_threads(threads: int) -> None:
    """Refuse a number of threads that is none.

    Raises:
        ValueError: if it is less than 1, or more than `MOST_THREADS`.
    """
    if threads < 1:
        raise ValueError(f"threads must be >= 1, got {threads}")
    if threads > MOST_THREADS:
        raise ValueError(f"threads must be <= {MOST_THREADS}, got {threads}")


def cores(system: Path = Path("/")) -> int:
    """How many cores this process may keep busy.

    Those it is bound to, and no more than its control group, as of a container, has time for.

    Args:
        system: where ``proc`` and ``sys`` are.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, math.ceil(min([float(bound or 1), *_quotas(system)])))


def _quotas(system: Path) -> Iterator[float]:
    """Cores' worth of time that the control groups of this process have, the outer ones as well."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, group = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        mount = system / "sys/fs/cgroup" / ("cpu" if controllers else "")
        inner = mount / group.lstrip("/")
        for folder in (inner, *inner.parents):
            yield from _quota(folder)
            if folder == mount:
                break


def _quota(folder: Path) -> Iterator[float]:
    """The quota that a control group's files name, of version 2 or 1, if it has one."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        if quota != "max" and int(quota) > 0:
            yield int(quota) / int(period)
    except (OSError, ValueError):
        return  # a group without a quota
