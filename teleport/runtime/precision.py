"""Autocast: on while a closure runs, off while the package computes.

Under ``torch.autocast`` every product is done in half precision, whatever the dtype of its
factors. The user wants that of the model; a basis or a projection would be destroyed by it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""From the finest to the coarsest."""

_DEVICES = ("cpu", "cuda", "mps", "xpu")


class Autocast:
    """The autocast state in which it is made, to leave and to come back to.

    Autocast keeps the cast copy of a weight until its region ends. Here weights change inside a
    region, so every way in and out forgets the copies.
    """

    def __init__(self) -> None:
        self._dtypes = {
            device: torch.get_autocast_dtype(device)
            for device in _DEVICES
            if torch.is_autocast_enabled(device)
        }

    @contextmanager
    def off(self) -> Iterator[None]:
        """No autocast for a while."""
        with ExitStack() as stack:
            stack.callback(torch.clear_autocast_cache)
            for device in self._dtypes:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield

    @contextmanager
    def on(self) -> Iterator[None]:
        """As it was, for a while."""
        torch.clear_autocast_cache()
        with ExitStack() as stack:
            stack.callback(torch.clear_autocast_cache)
            for device, dtype in self._dtypes.items():
                stack.enter_context(torch.autocast(device, dtype))
            yield


@contextmanager
def uncached_casts() -> Iterator[None]:
    """Cast weights anew: a copy made without gradients must not serve where they count.

    Older versions of torch reuse it (https://github.com/pytorch/pytorch/issues/112583).
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def as_computed(x: Tensor, z: Tensor) -> Tensor:
    """An input in the dtype of the product it went into, which autocast may have lowered."""
    return x.to(z.dtype) if x.is_floating_point() else x


def rounding_unit(dtype: torch.dtype, terms: int) -> float:
    """Relative rounding of a sum of products: half precision rounds once, after summing in float32.

    Args:
        dtype: of the factors and of the result.
        terms: bounds the number of terms.
    """
    eps = torch.finfo(dtype).eps
    return 2 * eps if is_half(dtype) else terms * eps


def sum_rounding(dtype: torch.dtype, terms: int) -> float:
    """Rounding of an output ``w · x`` as a share of ``‖w‖ ‖x‖``: ``√terms · eps``.

    Rounding errors have random signs: a sum of ``terms`` products is wrong by at most λ/2 times
    this with probability 1 - 2 exp(-λ²/2) (Higham and Mary 2019). Products of half precision are
    summed in float32.

    Args:
        dtype: of the factors.
        terms: number of terms of the sum.
    """
    summed_in = torch.float32 if is_half(dtype) else dtype
    return math.sqrt(terms) * torch.finfo(summed_in).eps


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype with the largest rounding."""
    return max(dtypes, key=PRECISIONS.index)


def unit_scale(norm_squared: Callable[[], float], dtype: torch.dtype) -> float:
    """The power of two that brings a norm near one before it meets float16, whose range is short.

    A loss scaled up for float16 has gradients near the end of that range; derivatives along them
    would leave it. Other formats have room, and need no scale: there it is 1.
    """
    if dtype != torch.float16 or not 0.0 < (squared := norm_squared()) < math.inf:
        return 1.0
    return 2.0 ** -round(math.log2(squared) / 2)


def sum_of_squares(rows: Tensor) -> float:
    """The sum of squares of a matrix whose squares may leave the range of its precision.

    It is scaled by a power of two before.
    """
    largest = float(torch.linalg.vector_norm(rows, ord=math.inf)) if rows.numel() else 0.0
    if not 0.0 < largest < math.inf:
        return largest**2
    scale = 2.0 ** min(-math.frexp(largest)[1], 120)  # a larger power would be infinite itself
    norms = torch.linalg.vector_norm(scale * rows, dim=1).double() / scale
    return float(norms.square().sum())


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """``scale * tensor``, and no copy where nothing changes."""
    return tensor if scale == 1.0 else scale * tensor


def is_half(dtype: torch.dtype) -> bool:
    """Whether a dtype is one of the 16-bit formats."""
    return dtype in (torch.float16, torch.bfloat16)


def at_least_single(tensor: Tensor) -> Tensor:
    """Half precision as float32, in which its products are exact; anything else as it is.

    A layer in eight bits never moves; the gradient of what is not used there is 0 all the same.
    """
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
