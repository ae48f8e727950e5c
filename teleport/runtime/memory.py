"""What becomes of memory that was freed."""

import torch

_LARGEST = 2**25 - 2**17
"""Bytes; glibc learns from blocks of at most 32 MiB with all that stands beside them."""


def keep_freed_memory() -> None:
    """Let the C library keep what a teleport frees for the tensors that come next.

    By default glibc gives freed memory back to the system, which clears every page of it when it
    is taken anew: several times in a teleport. But it learns: a process that has freed a large
    block keeps twice as much from then on (mallopt(3), ``M_MMAP_THRESHOLD``). Nothing is written
    to that block, so it takes no memory itself. Other C libraries, and one that the user has given
    a ``MALLOC_TRIM_THRESHOLD_``, go on as before.
    """
    torch.UntypedStorage(_LARGEST, device="cpu")  # what `torch.empty` gives may be filled
