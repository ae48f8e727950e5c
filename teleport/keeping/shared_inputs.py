"""One space for layers that share their inputs: q, k and v of attention, gate and up of an MLP.

They would have the same Gram matrix, the same decomposition and the same basis. Which do is not
asked of the model but seen: all layers of one input width begin in one group, and a group parts
where the inputs of its members do.
"""

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from teleport.layers.part import LinearMap
from teleport.layers.support import WeightMatrix
from teleport.runtime.ranks import Ranks
from teleport.subspace import RowSpace, Space


class SharedSpaces:
    """The spaces of the inputs of blocks.

    Args:
        blocks: whose inputs to collect.
        exact: those for which products in float32 are not enough.
    """

    def __init__(self, blocks: Iterable[WeightMatrix], exact: Collection[WeightMatrix]) -> None:
        by_kind: dict[Any, list[WeightMatrix]] = {}
        for block in blocks:
            by_kind.setdefault((_kind(block), block in exact), []).append(block)
        groups = [_Group(m, _empty(m[0], m[0] not in exact)) for m in by_kind.values()]
        self._group = {block: group for group in groups for block in group.members}

    def see(self, block: WeightMatrix, part: LinearMap, x: Tensor) -> None:
        """Take in an input of a block."""
        group = self._group[block]
        if len(group.members) == 1:
            block.collect(group.space, part, x)
        elif not group.takes(block, part, x):
            self._part(group)
            self.see(block, part, x)

    def settle(self) -> None:
        """The closure has ended: whoever has not had an input that others had is of another group.

        Until this is called, `spaces` need not hold the last inputs.
        """
        for group in set(self._group.values()):
            self._part(group)

    def spaces(
        self, blocks: Sequence[WeightMatrix], ranks: Ranks
    ) -> list[tuple[list[WeightMatrix], Space]]:
        """Who shares inputs on all ranks, in the order of the blocks, and the space of them."""
        number: dict[_Group, int] = {}
        labels = [number.setdefault(self._group[b], len(number)) for b in blocks]
        here = torch.tensor(labels, dtype=torch.int64, device=ranks.device)
        everywhere = torch.stack(ranks.gather(here), dim=1).tolist()
        together: dict[tuple[int, ...], list[WeightMatrix]] = {}
        for block, label in zip(blocks, everywhere, strict=True):
            together.setdefault(tuple(label), []).append(block)
        return [
            (members, self._group[members[0]].space.joined(ranks, members[0].part.matrix_shape))
            for members in together.values()
        ]

    def state(self) -> list[tuple[list[str], Any]]:
        """Who shares inputs, and their space, after `settle`."""
        groups = dict.fromkeys(self._group.values())
        return [([block.name for block in group.members], group.space) for group in groups]

    def restore(self, groups: Iterable[tuple[Sequence[WeightMatrix], Any]]) -> None:
        """Take what `state` told."""
        for members, space in groups:
            self._group |= dict.fromkeys(members, _Group(members, space))

    def _part(self, group: "_Group") -> None:
        """Add the input that is waiting; those that have not had it leave it to the others."""
        if not group.done:
            return
        leaving = group.parted()
        self._group |= dict.fromkeys(leaving.members, leaving)


class _Group:
    """Blocks that have had the same inputs so far.

    Attributes:
        members: the blocks.
        space: of their inputs, but for one that not all of them have had.
        done: those who have had that one.
    """

    def __init__(self, members: Collection[WeightMatrix], space: Any) -> None:
        self.members, self.space = dict.fromkeys(members), space
        self.done: dict[WeightMatrix, None] = {}
        self._waiting: Any = None
        self._key: Any = None

    def takes(self, block: WeightMatrix, part: LinearMap, x: Tensor) -> bool:
        """Take an input of a member, if it is the one that is waiting or if none is."""
        key = _key(part, x)
        if not self.done:
            # The tensor stays, so that no other takes its place in memory; what stands in it may
            # be overwritten before it is clear who has had it.
            self._waiting, self._key = (part, x, x.clone()), key
        elif key is None or key != self._key or block in self.done:
            return False
        self.done[block] = None
        if len(self.done) == len(self.members):
            self._collect(self.space)
        return True

    def parted(self) -> "_Group":
        """The group of those that have had the waiting input; the others stay."""
        leaving = _Group(self.done, copy.deepcopy(self.space))
        for block in self.done:
            del self.members[block]
        self._collect(leaving.space)
        return leaving

    def _collect(self, space: Any) -> None:
        part, _, x = self._waiting
        next(iter(self.done)).collect(space, part, x)
        self.done, self._waiting, self._key = {}, None, None


def _empty(block: WeightMatrix, single: bool) -> Space:
    space = block.space()
    if isinstance(space, RowSpace):
        space.single = single
    return space


def _kind(block: WeightMatrix) -> Any:
    """The same for two blocks whose inputs may be the same."""
    part = block.part
    if block.other is not None or type(part).rows_key is LinearMap.rows_key:
        return block
    *groups, _, d_in = part.matrix_shape
    return (*groups, d_in, part.has_bias_column, part.weight.parameter.device)


def _key(part: LinearMap, x: Tensor) -> Any:
    """Equal for two inputs, the first still alive, only if their rows are; None if not known."""
    if x.is_inference():  # has no version: nobody knows whether it was written to meanwhile
        return None
    key = part.rows_key(x)
    return None if key is None else (key, x.dtype, x._version)
