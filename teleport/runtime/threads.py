"""Threads: how many, and layers in parallel, whose bases do not depend on each other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from teleport.runtime.cores import cores, number_is_given

Item = TypeVar("Item")
_Result = TypeVar("_Result")


WORTH_THREADS = 1.2e8
"""Multiplications beside the largest job from which on threads pay; see `worth_threads`."""


def worth_threads(multiplications: Iterable[float]) -> bool:
    """Whether jobs of so many multiplications each are better done at the same time.

    What the other threads can take over is all but the largest job. Against that stands the start
    of the threads, which wait for cores on which PyTorch's own still spin. Measured with two
    threads for layers of width 512 and 128 samples, 8.4 million multiplications each
    (``chapters/results/bench/layers``): 1.7 times the time at 4 layers, 1.3 times at 8, and .9
    times at 16, which is where this says yes.
    """
    costs = list(multiplications)
    return sum(costs) - max(costs, default=0.0) >= WORTH_THREADS


def in_parallel(
    work: Callable[[Item], _Result], items: Sequence[Item], parallel: bool = True
) -> list[_Result]:
    """``[work(item) for item in items]``, with as many items at a time as torch has threads.

    Every item gets one thread, and the caller's number of threads is put back. Without
    ``parallel`` the items are done in turn, each with all threads.
    """
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1 or not parallel:
        return [work(item) for item in items]
    with (
        using_threads(torch.get_num_threads()),  # a worker's setting reaches the caller's
        ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        return list(pool.map(work, items))


BY_ONE = 1024
"""Below this order a matrix is factorised by one thread; see `factorising_threads`."""


def factorising_threads(matrix: Tensor) -> int:
    """How many threads a factorisation of a matrix as of `torch.linalg` is worth.

    They meet after every few columns. On cores that do nothing else a second one saves less than
    half of the time below `BY_ONE`; where threads share cores with other programs, or sleep while
    they wait, it makes small factorisations several times slower.
    """
    threads = torch.get_num_threads()
    return threads if matrix.device.type != "cpu" or min(matrix.shape[-2:]) >= BY_ONE else 1


def factorised(how: Callable[..., _Result], matrix: Tensor, **options: Any) -> _Result:
    """``how(matrix)``, a factorisation, by as many threads as it is worth.

    PyTorch gives a thread that first uses it the number that was set last, by whichever thread: one
    that does meanwhile begins with one. So nothing is set, and put back, where it is so already.
    """
    threads = factorising_threads(matrix)
    if threads == torch.get_num_threads():
        return how(matrix, **options)
    with using_threads(threads):
        return how(matrix, **options)


LEFT_FREE = 2
"""Cores left to other programs. Threads that share cores with them wait for each other: measured on
two cores beside other work, two threads took 1.7 times as long as one even if they did not spin."""


def threads_for(asked: int | None) -> int:
    """How many threads a command computes with: as asked, else a core each, but for `LEFT_FREE`.

    The user's environment is left in charge, and so is a caller who has set PyTorch's number lower.
    """
    if asked is not None:
        return asked
    given = torch.get_num_threads()
    return given if number_is_given() else min(given, max(1, cores() - LEFT_FREE))


@contextmanager
def using_threads(number: int) -> Iterator[None]:
    """So many threads for PyTorch's operations for a while; then as many as before."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number)  # an interrupt meanwhile is told when it has returned
        yield
    finally:
        torch.set_num_threads(before)
