"""Ctrl-C while modules are imported."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Around imports: Ctrl-C ends the process at once, with 130 and without a word.

    There is nothing to put in order yet, and an exception may come out of an import as another one:
    NumPy, broken off, ends in a RecursionError.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # it is ignored, or whoever calls us has his own
        yield
        return
    try:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    except ValueError:  # in another thread, where Ctrl-C does not arrive
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
