"""The clock of reports and records."""

import time

import torch


def clock_name() -> str:
    """``"process"``: CPU seconds of the process, or ``"wall"``: see `now`."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return "process" if alone else "wall"


def now() -> float:
    """Seconds, whose differences are durations.

    With one thread and no GPU it is the CPU time of the process, to which other programs on the
    same machine do not add; else the wall clock, since threads add up and a GPU works on its own.
    """
    return time.process_time() if clock_name() == "process" else time.perf_counter()
