"""Linear layers, and others of the same form: transposed and bilinear ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from teleport.layers.part import (
    CHUNK,
    LinearMap,
    ParameterSlice,
    Pieces,
    optional_slice,
    with_bias_column,
)
from teleport.layers.rule import BY_NAME, Apply, LayerRule, register


class DenseMap(LinearMap):
    """``z = W x + b`` over any leading axes: ``x [..., features]`` gives one row per position.

    ``W`` is ``[out, in]``, or with ``transposed`` ``[in, out]`` as GPT-2 stores it; axes of the
    weight after the first count as one.
    """

    def __init__(
        self,
        name: str,
        weight: ParameterSlice,
        bias: ParameterSlice | None,
        transposed: bool = False,
    ) -> None:
        super().__init__(name, weight, bias)
        self.transposed = transposed
        if weight.parameter.dim() == 2:
            self.orientation = "transposed" if transposed else "upright"
        self.shape = weight.of(weight.parameter).shape
        self.d_out, self.features = self._upright(weight.of(weight.parameter)).shape

    def compute(self, x: Tensor) -> Tensor:
        weight = self._upright(self.weight.of(self.weight.parameter))
        bias = None if self.bias is None else self.bias.of(self.bias.parameter)
        return functional.linear(x, weight, bias)

    def rows(self, x: Tensor, bias_input: float = 1.0) -> Tensor:
        return with_bias_column(x.reshape(-1, self.features), bias_input, self.has_bias_column)

    def out_rows(self, z: Tensor) -> Tensor:
        return z.reshape(-1, self.d_out)

    def from_out_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(like.shape)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([self._upright(tensors[0]), *(t[:, None] for t in tensors[1:])], dim=1)

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        weight = matrix[:, : self.features]
        weight = (weight.T if self.transposed else weight).reshape(self.shape)
        return (weight, matrix[:, self.features]) if self.has_bias_column else (weight,)

    def push(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ self._upright(weight).T

    def push_affine(self, x: Tensor, pieces: Pieces, like: Tensor) -> Tensor:
        return functional.linear(x, self._upright(pieces[0]), *pieces[1:])

    def pull(self, delta: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return delta @ self._upright(weight)

    def weight_gradient(self, x: Tensor, delta: Tensor, bias_input: float = 1.0) -> Tensor:
        delta, x = self.out_rows(delta), x.reshape(-1, self.features)
        if not self.has_bias_column:
            return delta.T @ x
        gradient = delta.new_empty(self.d_out, self.features + 1)
        torch.mm(delta.T, x, out=gradient[:, :-1])  # no copy of the rows with their column of 1
        gradient[:, -1] = delta.sum(0) * bias_input
        return gradient

    def chunks(self, x: Tensor, rows: int = CHUNK) -> Sequence[Tensor]:
        return torch.split(x.reshape(-1, self.features), rows)

    def rows_key(self, x: Tensor) -> Any:
        flat = x.reshape(-1, self.features)
        place = (x.data_ptr(), x.shape, x.stride()) if x.numel() else None
        return (DenseMap, flat.shape, self.has_bias_column, place)

    def row_norms(self, x: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(x.reshape(-1, self.features), dim=-1)
        return norms.square().add(1.0).sqrt() if self.has_bias_column else norms

    def out_norms(self, pieces: Pieces) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self._upright(pieces[0]), dim=-1)
        return torch.hypot(norms, pieces[1]) if len(pieces) == 2 else norms

    @property
    def key(self) -> tuple[Any, ...]:
        return (*super().key, self.transposed)

    def _upright(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight.flatten(1)


@register(nn.Linear)
class LinearRule(LayerRule[nn.Linear]):
    """``z = W x + b``; representation matrix as in the paper's equation (8)."""

    kind = "Linear"

    def parts(self, module: nn.Linear) -> Sequence[LinearMap]:
        return [DenseMap("", ParameterSlice(module, "weight"), optional_slice(module, "bias"))]


@register(nn.Bilinear)
class BilinearRule(LayerRule[nn.Bilinear]):
    """``z_k = x1ᵀ A_k x2 + b_k``: linear in A, with the outer product of x1 and x2 as the row."""

    kind = "Bilinear"

    def parts(self, module: nn.Bilinear) -> Sequence[LinearMap]:
        return [DenseMap("", ParameterSlice(module, "weight"), optional_slice(module, "bias"))]

    def forward(self, module: nn.Bilinear, apply: Apply, x1: Tensor, x2: Tensor) -> Tensor:
        return apply("", (x1[..., :, None] * x2[..., None, :]).flatten(-2))


class TransposedLinearRule(LayerRule[Any]):
    """Hugging Face's ``Conv1D`` (GPT-2): a linear layer that stores its weight as ``[in, out]``."""

    kind = "Conv1D"

    def parts(self, module: Any) -> Sequence[LinearMap]:
        return [
            DenseMap(
                "",
                ParameterSlice(module, "weight"),
                optional_slice(module, "bias"),
                transposed=True,
            )
        ]


BY_NAME["transformers.pytorch_utils.Conv1D"] = TransposedLinearRule()
