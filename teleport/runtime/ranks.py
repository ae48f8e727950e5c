"""Teleporting a model in ``DistributedDataParallel``: every rank with its own shard, all as one.

The loss is the mean of the ranks' losses, as the gradient of ``DistributedDataParallel`` is the
mean of theirs: with unequal shards the samples of a smaller one count for more. Sums are taken in
the order of the ranks, so that all of a teleport is, to the last bit, that of one process with the
ranks' closures in a list; on the joined batch it is the same to rounding.

What a rank takes in, with P trainable numbers in the model, layers of d_out x d_in that move, r
ranks and n input rows in all of them together, (r - 1)/r left out: once, the row spaces (8 n d_in
bytes a layer while n <= d_in; beyond, twice a Gram matrix of 8 d_in²; for float64 inputs one
triangular factor of that size from every rank) and their bases (8 d_in rank bytes); for every look
at a gradient norm, twice 4 P bytes, like one backward pass; for every direction, three times
4 d_out d_in bytes a layer. Losses, counts and errors are a few bytes each. Nothing
is decided on one rank alone: what ranks compute for themselves, they take from the first, so that
parameters stay bit for bit equal, and before every exchange each says whether it is still well, so
that an error on one ends the teleport on all.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from teleport.errors import ClosureError, NonFiniteLossError, TeleportError, UnsupportedModelError
from teleport.runtime.precision import at_least_single
from teleport.runtime.randomness import DrewError
from teleport.runtime.wrappers import parallel_part


class Ranks:
    """The processes that teleport as one; this class is for one alone, who has no need to talk.

    Every method is called by all ranks in the same order.
    """

    size = 1
    device = torch.device("cpu")
    """On which tensors travel."""

    def together(self) -> AbstractContextManager[None]:
        """Around work that may raise: if it raises on one rank, all raise."""
        return nullcontext()

    def require_same(self, what: str) -> None:
        """Raise on all ranks unless ``what`` is the same text on all."""

    def mean(self, value: float) -> float:
        """The mean of a number over the ranks."""
        return value

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Put the means over the ranks into tensors of the same shapes on all, in place."""

    def most(self, values: Sequence[int]) -> list[int]:
        """The largest of each number over the ranks."""
        return list(values)

    def of_first(self, value: float) -> float:
        """The first rank's number."""
        return value

    def of_first_(self, tensors: Sequence[Tensor]) -> None:
        """Put the first rank's values into tensors of the same shapes on all, in place."""

    def sum_(self, tensor: Tensor) -> None:
        """Put the sum over the ranks into a tensor of the same shape on all, in place."""

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have the same shape."""
        return [tensor]


ALONE = Ranks()

_FINE, _UNKNOWN = 0, 6
_ERRORS: dict[int, type[Exception]] = {
    1: DrewError,  # all look which modules drew, and begin again
    2: NotImplementedError,  # no forward-mode derivative: all take the other way
    3: NonFiniteLossError,
    4: ClosureError,
    5: TeleportError,
}
"""By how much of the teleport they end; among several, the worst is raised everywhere."""

_MESSAGE = 600


class Group(Ranks):
    """The ranks of a process group.

    Args:
        group: the process group.
        device: on which tensors travel.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.size = distributed.get_world_size(group)
        self._group, self.device = group, device
        self._first = distributed.get_global_rank(group, 0)
        self._raised: BaseException | None = None

    @contextmanager
    def together(self) -> Iterator[None]:  # noqa: D102
        try:
            yield
        except BaseException as error:
            if error is not self._raised:  # else all know
                self._compare(error)
            raise
        self._compare(None)

    def require_same(self, what: str) -> None:  # noqa: D102
        here = zlib.crc32(what.encode())
        least, most = self.most([-here, here])
        if -least != most:
            raise TeleportError(
                "the ranks do not ask for the same teleport: arguments, layers and held_out must "
                f"be the same on all. Here: {what}"
            )

    def mean(self, value: float) -> float:  # noqa: D102
        here = torch.tensor(value, dtype=torch.float64, device=self.device)
        return sum(map(float, self.gather(here))) / self.size

    def mean_(self, tensors: Sequence[Tensor]) -> None:  # noqa: D102
        self._compare(None)
        for same in _by_dtype(tensors):
            flat = torch.cat([at_least_single(t).reshape(-1) for t in same])
            _unpack_(same, self._sum(flat.mul_(1.0 / self.size)))

    def most(self, values: Sequence[int]) -> list[int]:  # noqa: D102
        self._compare(None)
        largest = torch.tensor(values, dtype=torch.int64, device=self.device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self._group)
        return cast("list[int]", largest.tolist())

    def of_first(self, value: float) -> float:  # noqa: D102
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        self.of_first_([held])
        return float(held)

    def of_first_(self, tensors: Sequence[Tensor]) -> None:  # noqa: D102
        self._compare(None)
        for same in _by_dtype(tensors):
            flat = torch.cat([t.reshape(-1) for t in same])
            distributed.broadcast(flat, self._first, group=self._group)
            _unpack_(same, flat)

    def sum_(self, tensor: Tensor) -> None:  # noqa: D102
        self._compare(None)
        tensor.copy_(self._sum(tensor.reshape(-1)).view_as(tensor))

    def gather(self, tensor: Tensor) -> list[Tensor]:  # noqa: D102
        self._compare(None)
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(gathered, tensor, group=self._group)
        return gathered

    def _sum(self, flat: Tensor) -> Tensor:
        """The sum over the ranks in their order; ``all_reduce`` has an order of its backend's own.

        Each rank adds up one share of the numbers, so that as much travels as in a ring. What is
        given may be overwritten.
        """
        missing = -flat.numel() % self.size
        padded = nn.functional.pad(flat, (0, missing)) if missing else flat
        share = padded.numel() // self.size
        pieces = torch.empty_like(padded)
        distributed.all_to_all_single(pieces, padded, group=self._group)
        total, *others = pieces.split(share)
        for piece in others:
            total += piece
        distributed.all_gather(list(padded.split(share)), total, group=self._group)
        return padded[: flat.numel()]

    def _compare(self, error: BaseException | None) -> None:
        """Tell the others how this rank is; raise the worst of all errors, if there is one."""
        code = _FINE if error is None else _code(error)
        worst = torch.tensor([code], dtype=torch.int64, device=self.device)
        distributed.all_reduce(worst, distributed.ReduceOp.MAX, group=self._group)
        if int(worst) == _FINE:
            return
        text = f"{type(error).__name__}: {error}" if int(worst) == _UNKNOWN else str(error)
        message = text.encode()[:_MESSAGE].ljust(_MESSAGE)
        mine = torch.tensor([code, *message], dtype=torch.int64, device=self.device)
        told = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(told, mine, group=self._group)
        if error is not None and code == int(worst):
            self._raised = error
            raise error
        rank = next(i for i, each in enumerate(told) if int(each[0]) == int(worst))
        said = bytes(told[rank][1:].tolist()).decode(errors="replace").strip()
        kind = _ERRORS.get(int(worst), TeleportError)
        self._raised = kind(f"on rank {rank}: {said}. The teleport has ended on all ranks")
        raise self._raised from error


def ranks_of(model: nn.Module) -> Ranks:
    """Who teleports with this process: the ranks of its `DistributedDataParallel`, or nobody.

    Raises:
        UnsupportedModelError: for what does not run rank by rank inside a teleport.
    """
    parallel = parallel_part(model)
    if parallel is None or distributed.get_world_size(parallel.process_group) == 1:
        return ALONE
    if parallel.mixed_precision is not None:
        raise UnsupportedModelError(
            "DistributedDataParallel with mixed_precision= cannot teleport; use torch.autocast "
            "in the closure instead"
        )
    refuse_talking_layers(parallel.module)
    return Group(parallel.process_group, next(parallel.parameters()).device)


def refuse_talking_layers(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a layer that talks to other ranks inside the model."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            raise UnsupportedModelError(
                f"layer {name!r} (SyncBatchNorm in train mode) talks to the other ranks inside the "
                "model; put it into evaluation mode around the teleport"
            )


@contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """The wrapper passes its inputs on to the model and does nothing else.

    Its own forward pass would broadcast buffers and prepare to reduce gradients that
    ``torch.autograd.grad`` never delivers.
    """
    parallel = parallel_part(model)
    if parallel is None:
        yield
        return
    wrapper: DistributedDataParallel = parallel
    device = (
        torch.device(wrapper.device_type, wrapper.device_ids[0]) if wrapper.device_ids else None
    )

    def forward(*args: Any, **kwargs: Any) -> Any:
        if device is not None:
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
        return wrapper.module(*args, **kwargs)

    own = wrapper.__dict__.get("forward")
    wrapper.__dict__["forward"] = forward
    try:
        yield
    finally:
        wrapper.__dict__.pop("forward")
        if own is not None:
            wrapper.__dict__["forward"] = own


def _code(error: BaseException) -> int:
    codes = (code for code, kind in _ERRORS.items() if isinstance(error, kind))
    return next(codes, _UNKNOWN)


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    return [
        [tensor for tensor in tensors if tensor.dtype == dtype]
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors)
    ]


def _unpack_(tensors: Sequence[Tensor], flat: Tensor) -> None:
    pieces = flat.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view_as(tensor))
