"""Linear layers, and others of the same form: transposed and bilinear ones."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from teleport.layers.part import DenseMap, LinearMap, ParameterSlice, optional_slice
from teleport.layers.rule import BY_NAME, Apply, LayerRule, register


@register(nn.Linear)
class LinearRule(LayerRule[Any]):
    """``z = W x + b``; representation matrix as in the paper's equation (8)."""

    kind = "Linear"

    def parts(self, module: Any) -> Sequence[LinearMap]:
        return [DenseMap("", ParameterSlice(module, "weight"), optional_slice(module, "bias"))]


@register(nn.Bilinear)
class BilinearRule(LinearRule):
    """``z_k = x1ᵀ A_k x2 + b_k``: linear in A, with the outer product of x1 and x2 as the row."""

    kind = "Bilinear"

    def forward(self, module: nn.Bilinear, apply: Apply, x1: Tensor, x2: Tensor) -> Tensor:
        return apply("", (x1[..., :, None] * x2[..., None, :]).flatten(-2))


class TransposedLinearRule(LayerRule[Any]):
    """Hugging Face's ``Conv1D`` (GPT-2): a linear layer that stores its weight as ``[in, out]``."""

    kind = "Conv1D"

    def parts(self, module: Any) -> Sequence[LinearMap]:
        weight, bias = ParameterSlice(module, "weight"), optional_slice(module, "bias")
        return [DenseMap("", weight, bias, transposed=True)]


BY_NAME["transformers.pytorch_utils.Conv1D"] = TransposedLinearRule()
