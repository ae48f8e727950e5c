"""Which weights take part in what a model computes other than through their layers.

``x @ embedding.weight.T`` at the end of a model, an attention function that is handed a layer's
weight, the native path of a packed LSTM: outputs depend on a weight whose inputs no layer has seen.
Every operation of PyTorch passes here, with or without gradients, and whatever the closure returns.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from teleport.layers.support import WeightMatrix, extent


class WeightUses(TorchDispatchMode):
    """Context in which uses of some blocks' weights are noted, but for the expected ones.

    Attributes:
        found: the blocks with such a use.

    Args:
        blocks: whose weights to look for.
    """

    def __init__(self, blocks: Sequence[WeightMatrix]) -> None:
        super().__init__()
        self.found: dict[WeightMatrix, None] = {}
        self._expected = False
        memory = {
            extent(slot.of(slot.parameter)): block for block in blocks for slot in block.part.slots
        }
        self._extents = sorted(memory)  # weights do not overlap
        self._blocks = [memory[extent] for extent in self._extents]

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Uses in here are the layers' own."""
        before, self._expected = self._expected, True
        try:
            yield
        finally:
            self._expected = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not (self._expected or func.is_view):  # what a view is used for will be seen
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor):
                    self.look_at(leaf)
        return func(*args, **kwargs)

    def look_at(self, tensor: Tensor) -> None:
        """Note whose weight this is, or a view of, if anyone's."""
        if tensor.layout != torch.strided or tensor.numel() == 0:
            return
        start, end = extent(tensor)
        place = bisect_left(self._extents, (end, 0))
        while place and start < self._extents[place - 1][1]:
            place -= 1
            self.found[self._blocks[place]] = None
