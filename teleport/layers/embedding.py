"""Embeddings: linear layers with one-hot inputs, looked up instead of multiplied."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from teleport.layers.one_hot import AxisSpace
from teleport.layers.part import LinearMap, ParameterSlice, Pieces
from teleport.layers.rule import Apply, LayerRule, register
from teleport.subspace import Space


class EmbeddingMap(LinearMap):
    """``z = W e_token``: the matrix is the transposed table, ``[width, vocabulary]``.

    Lookups of ``padding`` are constants, as they are for autograd: they take no gradient and carry
    no tangent. What the row holds must not change all the same, so it is among the rows.
    """

    orientation = "transposed"
    gram_pays = False

    def __init__(self, name: str, weight: ParameterSlice, padding: int | None) -> None:
        super().__init__(name, weight, None)
        self.size, self.width = weight.parameter.shape
        self.padding = padding

    def compute(self, x: Tensor) -> Tensor:
        return functional.embedding(x, self.weight.parameter)

    def rows(self, x: Tensor, bias_input: float = 1.0) -> Tensor:
        return functional.one_hot(x.reshape(-1), self.size).to(self.weight.parameter.dtype)

    def space(self) -> Space:
        return AxisSpace(self.size)

    def collect(self, space: Any, x: Tensor) -> None:
        space.add(x)

    def out_norms(self, pieces: Pieces) -> Tensor:
        return torch.linalg.vector_norm(pieces[0], dim=0)  # type: ignore[no-any-return]

    def collect_none(self, space: Any) -> None:
        space.add(torch.empty(0, dtype=torch.long, device=self.weight.parameter.device))

    def row_norms(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x.reshape(-1), dtype=self.weight.parameter.dtype)  # copies: exact

    def out_rows(self, z: Tensor) -> Tensor:
        return z.reshape(-1, self.width)

    def from_out_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(like.shape)

    @cached_property
    def matrix_shape(self) -> torch.Size:
        vocabulary, d_out = self.weight.of(self.weight.parameter).shape
        return torch.Size((d_out, vocabulary))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].T.clone()

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return (matrix.T,)

    def push(self, x: Tensor, weight: Tensor) -> Tensor:
        looked = functional.embedding(x, weight)
        return looked if self.padding is None else looked * (x != self.padding)[..., None]

    def weight_gradient(self, x: Tensor, delta: Tensor, bias_input: float = 1.0) -> Tensor:
        delta = self.out_rows(delta)
        table = delta.new_zeros(self.size, self.width).index_add_(0, x.reshape(-1), delta)
        if self.padding is not None:
            table[self.padding] = 0.0
        return table.T

    @property
    def key(self) -> tuple[Any, ...]:
        return (*super().key, self.padding)


@register(nn.Embedding)
class EmbeddingRule(LayerRule[Any]):
    """``z = W e_token``; the rows of tokens that are not in the batch are the null space.

    It never moves in a teleport of its own, for its inputs depend on no parameter (``thm-fixed``);
    it is free in `teleport.null_space`, and in a teleport where a head shares its weight.
    """

    kind = "Embedding"

    def parts(self, module: Any) -> Sequence[LinearMap]:
        return [EmbeddingMap("", ParameterSlice(module, "weight"), module.padding_idx)]

    def obstacle(self, module: Any) -> str:
        if module.max_norm is not None:
            return "max_norm rewrites its weight in the forward pass"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq makes its gradient another one than the loss's"
        return ""


@register(nn.EmbeddingBag)
class EmbeddingBagRule(EmbeddingRule):
    """Sum, mean or largest of the embeddings of a bag of tokens: lookups, then arithmetic."""

    kind = "EmbeddingBag"

    def forward(
        self,
        module: nn.EmbeddingBag,
        apply: Apply,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        looked = apply("", input.reshape(-1))
        if per_sample_weights is not None:
            looked = looked * per_sample_weights.reshape(-1, 1)
        place, inside = _bags(module, input, offsets)
        bags = looked.new_zeros(inside.numel(), looked.shape[-1])
        bags = bags.index_copy(0, place, looked[: len(place)]).unflatten(0, inside.shape)
        if module.padding_idx is not None:
            real = torch.zeros_like(inside).flatten()
            real[place] = input.reshape(-1)[: len(place)] != module.padding_idx
            inside = inside & real.view_as(inside)
        return _reduced(module.mode, bags, inside)


def _bags(module: nn.EmbeddingBag, tokens: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where in a rectangle of bags each token goes, and which places of it hold one."""
    if tokens.dim() == 2:
        inside = torch.ones_like(tokens, dtype=torch.bool)
        return torch.arange(tokens.numel(), device=tokens.device), inside
    if offsets is None:
        raise ValueError("offsets are needed for one-dimensional input of an EmbeddingBag")
    ends = (
        offsets
        if module.include_last_offset
        else torch.cat([offsets, offsets.new_tensor([len(tokens)])])
    )
    sizes = ends.diff()
    width = int(sizes.max()) if len(sizes) else 0
    inside = torch.arange(width, device=tokens.device) < sizes[:, None]
    return inside.flatten().nonzero()[:, 0], inside


def _reduced(mode: str, bags: Tensor, inside: Tensor) -> Tensor:
    """``[bags, places, width]`` to ``[bags, width]``; 0 for an empty bag."""
    mask = inside[..., None]
    if mode == "max":
        if not bags.shape[1]:
            return bags.sum(1)
        largest = bags.masked_fill(~mask, -torch.inf).max(dim=1).values
        return largest.masked_fill(~mask.any(1), 0.0)
    total = (bags * mask).sum(1)
    return total if mode == "sum" else total / inside.sum(1).clamp(min=1)[:, None]
