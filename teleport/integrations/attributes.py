"""What a training step writes down beside its loss, put back after steps that do not count.

A closure of a teleport runs the trainer's own training step many times. It may append to a list,
update a metric, count, or keep the state that the next step begins with: such things lie in
attributes, of which a transaction knows nothing.
"""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)

_LOOKED_INTO = 1000
"""Of larger containers, as data sets, what they hold is put back, and not what that holds."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"forward"}
"""Parameters, buffers, hooks and modes are the transaction's; a recording replaces forwards."""


@contextmanager
def undisturbed(objects: Iterable[Any]) -> Iterator[Callable[[], None]]:
    """Afterwards the attributes of some objects are as before, and whenever one asks.

    Which they are, what is in those that are lists, dictionaries, sets or deques, one in another,
    and the values of those that are tensors.

    Yields:
        Makes them as before: called ahead of each run, all runs see the same.
    """
    found = [_Attributes(each) for each in objects]

    def restore() -> None:
        for attributes in found:
            attributes.restore()

    with ExitStack() as stack:
        stack.callback(restore)
        yield restore


@contextmanager
def mute(objects: Iterable[Any]) -> Iterator[None]:
    """Meanwhile the method ``log`` of some objects says nothing."""
    tables = [vars(each) for each in objects]
    own = [table.get("log") for table in tables]
    for table in tables:
        table["log"] = lambda *_, **__: None
    try:
        yield
    finally:
        for table, before in zip(tables, own, strict=True):
            del table["log"]
            if before is not None:
                table["log"] = before


class _Attributes:
    """The attributes of one object as they are when this is made."""

    def __init__(self, holder: Any) -> None:
        self._table: dict[str, Any] = vars(holder)
        self._but = _OF_EVERY_MODULE if isinstance(holder, nn.Module) else frozenset()
        self._before = {n: value for n, value in self._table.items() if n not in self._but}
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._versions: list[int] = []
        for value in self._before.values():
            self._look_into(value)
            if isinstance(value, Tensor) and not value.is_inference():
                self._tensors.append((value, value.detach().clone()))
                self._versions.append(value._version)

    def _look_into(self, value: Any) -> None:
        if type(value) not in _CONTAINERS or id(value) in self._contents:
            return
        self._contents[id(value)] = value, copy(value)
        if len(value) <= _LOOKED_INTO:
            for inner in value.values() if isinstance(value, dict) else value:
                self._look_into(inner)

    def restore(self) -> None:
        for name in [n for n in self._table if n not in self._before and n not in self._but]:
            del self._table[name]
        self._table.update(self._before)
        for container, contents in self._contents.values():
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(
                contents
            )
        with torch.no_grad():
            for at, (tensor, value) in enumerate(self._tensors):
                if tensor._version != self._versions[at]:
                    tensor.copy_(value)
                    self._versions[at] = tensor._version  # a graph may hold it from now on
