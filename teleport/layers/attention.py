"""``nn.MultiheadAttention`` written with its four projections as parts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from teleport.layers.part import DenseMap, LinearMap, ParameterSlice, optional_slice
from teleport.layers.rule import Apply, LayerRule, register


@register(nn.MultiheadAttention)
class MultiheadAttentionRule(LayerRule[nn.MultiheadAttention]):
    """Parts ``q``, ``k``, ``v`` and ``out``; the rows of each are its input tokens, equation (10).

    Packed and separate projections, key and value widths of their own, masks, ``bias_k`` and
    ``bias_v`` (which stay frozen), ``add_zero_attn``, batch first or not, batched or not. Dropout
    on the attention weights is off, as everywhere inside a teleport.
    """

    kind = "MultiheadAttention"

    def parts(self, module: nn.MultiheadAttention) -> Sequence[LinearMap]:
        width = module.embed_dim
        parts: list[LinearMap] = []
        for i, name in enumerate("qkv"):
            rows = slice(i * width, (i + 1) * width)
            own = optional_slice(module, f"{name}_proj_weight")
            weight = ParameterSlice(module, "in_proj_weight", rows) if own is None else own
            parts.append(DenseMap(name, weight, optional_slice(module, "in_proj_bias", rows)))
        out = module.out_proj
        return [*parts, DenseMap("out", ParameterSlice(out, "weight"), optional_slice(out, "bias"))]

    def forward(
        self,
        module: nn.MultiheadAttention,
        apply: Apply,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The documented forward pass; ``is_causal`` is a hint, the mask that it needs counts."""
        batched = query.dim() == 3
        first = module.batch_first or not batched
        inputs = [t if batched else t[None] for t in (query, key, value)]
        q, k, v = (
            apply(name, t if first else t.transpose(0, 1))
            for name, t in zip("qkv", inputs, strict=True)
        )
        k, v, extra = _with_biases(module, k, v)
        q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        if module.add_zero_attn:
            k, v = (functional.pad(t, (0, 0, 0, 1)) for t in (k, v))
            extra += 1
        mask = _mask(attn_mask, key_padding_mask, q, extra)
        heads, weights = _attend(q, k, v, mask, need_weights)
        out = apply("out", heads.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if first else out.transpose(0, 1), weights


def _with_biases(module: nn.MultiheadAttention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """One more key and value for every sample, if the module has them."""
    if module.bias_k is None or module.bias_v is None:
        return k, v, 0
    shape = (len(k), 1, k.shape[-1])
    k = torch.cat([k, module.bias_k.expand(shape)], dim=1)
    return k, torch.cat([v, module.bias_v.expand(shape)], dim=1), 1


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, extra: int
) -> Tensor | None:
    """Both masks as one to add to the scores, ``[samples | 1, heads | 1, queries, keys]``."""
    masks = []
    if attn_mask is not None:
        full = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (len(q), -1))
        masks.append(_additive(full, q))
    if key_padding_mask is not None:
        masks.append(_additive(key_padding_mask.reshape(len(q), 1, 1, -1), q))
    if not masks:
        return None
    mask = masks[0] if len(masks) == 1 else masks[0] + masks[1]
    return functional.pad(mask, (0, extra))


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Heads, and weights if they are asked for, by products of the samples' heads as one batch.

    A query that sees no key gets zeros, as from PyTorch's fused attention, if nobody asks for its
    weights; else NaN, as from PyTorch.
    """
    samples = q.shape[:2]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    # Not by `/`, which loads PyTorch's compiler, a second, when it first meets a tangent.
    q = torch.ops.aten.mul.Scalar(q, 1.0 / math.sqrt(q.shape[-1]))
    scores = torch.bmm(q, k.mT).unflatten(0, samples)
    blind = None
    if mask is not None:
        unseen = (mask == -math.inf).all(-1, keepdim=True)
        if not need_weights and bool(unseen.any()):
            blind, mask = unseen, mask.masked_fill(unseen, 0.0)  # the derivative at NaN is NaN
        scores = scores + mask
    weights = scores.softmax(-1)
    heads = torch.bmm(weights.flatten(0, 1), v).unflatten(0, samples)
    if blind is not None:  # not of the weights, which would be there twice
        heads = heads.masked_fill(blind, 0.0)
    return heads, weights if need_weights else None
