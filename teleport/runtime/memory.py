"""How large matrices lie in memory, and what becomes of it when it is freed."""

import torch
from torch import Tensor

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


def empty_rows(like: Tensor, *shape: int) -> Tensor:
    """A matrix of the dtype of another, each row of which begins at a multiple of eight numbers.

    A product of a width such as 1,025, inputs and a bias, takes up to half as long again to write
    where rows begin anywhere.
    """
    *rows, width = shape
    return like.new_empty(*rows, -(-width // 8) * 8)[..., :width]


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, in `empty_rows` where that is possible: no gradient is asked for."""
    width = right.shape[-1]
    if width % 8 == 0 or left.requires_grad or right.requires_grad:
        return left @ right
    return torch.matmul(left, right, out=empty_rows(left, *left.shape[:-1], width))
