"""Waiting for other threads and processes: until something happens, not for a while."""

import time
from collections.abc import Callable

HANG = 600.0
"""Seconds after which what is waited for is taken to hang, however busy the machine is."""


def wait_for(condition: Callable[[], object]) -> None:
    """Until the condition holds."""
    end = time.monotonic() + HANG
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"nothing happened for {HANG:g} s")
        time.sleep(0.01)
