"""Layer rules: how a layer that is linear in its weights becomes ``z = W x`` on rows.

One shape convention for the whole package. A layer call is turned into

- ``rows``   ``[rows, d_in]``   one row per position the weights act on, with the bias as an extra
  input that is 1 (so ``d_in`` counts the bias column);
- ``matrix`` ``[d_out, d_in]``  the weights, bias included as the last column;
- outputs and their cotangents as ``[rows, d_out]``.

After that ``z = rows @ matrix.T``, and the weight gradient is ``delta.T @ rows`` (theorem
``thm-span``). Gram matrix, basis and projection never ask what the layer was.

`RULES` is the support matrix; `register` adds a line to it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class LayerRule(ABC, Generic[M]):
    """What the package must know about one layer type. All methods are pure."""

    kind: str

    @abstractmethod
    def parameters(self, module: M) -> tuple[nn.Parameter, ...]:
        """The parameters that make up the matrix; the ones that move."""

    @abstractmethod
    def rows(
        self, module: M, x: Float[Tensor, "..."], bias_input: float = 1.0
    ) -> Float[Tensor, "rows d_in"]:
        """Inputs ``x`` as rows; ``bias_input`` is 1 for inputs and 0 for their tangents."""

    @abstractmethod
    def out_rows(self, module: M, z: Float[Tensor, "..."]) -> Float[Tensor, "rows d_out"]:
        """Outputs, or cotangents of outputs, as rows in the order of `rows`."""

    @abstractmethod
    def from_out_rows(
        self, module: M, rows: Float[Tensor, "rows d_out"], like: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Rows in the shape of the output ``like``: undoes `out_rows`."""

    @abstractmethod
    def join(
        self, module: M, tensors: Sequence[Float[Tensor, "..."]]
    ) -> Float[Tensor, "d_out d_in"]:
        """Tensors in the shapes (and order) of `parameters` as one new matrix."""

    @abstractmethod
    def split(
        self, module: M, matrix: Float[Tensor, "d_out d_in"]
    ) -> tuple[Float[Tensor, "..."], ...]:
        """A matrix as tensors in the shapes (and order) of `parameters`: undoes `join`."""

    @abstractmethod
    def push(
        self, module: M, x: Float[Tensor, "..."], matrix: Float[Tensor, "d_out d_in"]
    ) -> Float[Tensor, "..."]:
        """``W x`` without the bias: carries a tangent of the inputs to the outputs."""

    @abstractmethod
    def pull(
        self, module: M, delta: Float[Tensor, "..."], matrix: Float[Tensor, "d_out d_in"]
    ) -> Float[Tensor, "..."]:
        """``Wᵀ δ``: carries a cotangent of the outputs to the inputs."""


RULES: dict[type[nn.Module], LayerRule[Any]] = {}

_Rule = TypeVar("_Rule", bound=type[LayerRule[Any]])


def register(*module_types: type[nn.Module]) -> Callable[[_Rule], _Rule]:
    """Class decorator: use the decorated `LayerRule` for these module types.

    The match is on the exact type: a subclass may compute something else.

    Args:
        *module_types: the ``nn.Module`` classes the rule describes.

    Returns:
        The decorator; it returns the class unchanged.

    Raises:
        TypeError: if an argument is not a subclass of ``nn.Module``.
    """
    for module_type in module_types:
        if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
            raise TypeError(
                f"register() takes subclasses of torch.nn.Module, got {module_type!r}; "
                "write @register(MyLayer) above the rule"
            )

    def add(rule: _Rule) -> _Rule:
        RULES.update(dict.fromkeys(module_types, rule()))
        return rule

    return add


def rule_for(module: nn.Module) -> LayerRule[Any] | None:
    """The rule of this module's exact type, or None."""
    return RULES.get(type(module))


@register(nn.Linear)
class LinearRule(LayerRule[nn.Linear]):
    """``z = W x + b`` over any leading axes: ``x [..., features]`` gives one row per position.

    A bias that does not require a gradient is a constant: it gets no column and does not move.
    """

    kind = "Linear"

    def parameters(self, module: nn.Linear) -> tuple[nn.Parameter, ...]:
        moving = (module.weight, module.bias) if _bias_moves(module) else (module.weight,)
        return cast(tuple[nn.Parameter, ...], moving)

    def rows(self, module: nn.Linear, x: Tensor, bias_input: float = 1.0) -> Tensor:
        rows = x.reshape(-1, module.in_features)
        if not _bias_moves(module):
            return rows
        return torch.cat([rows, rows.new_full((len(rows), 1), bias_input)], dim=1)

    def out_rows(self, module: nn.Linear, z: Tensor) -> Tensor:
        return z.reshape(-1, module.out_features)

    def from_out_rows(self, module: nn.Linear, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(like.shape)

    def join(self, module: nn.Linear, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.reshape(module.out_features, -1) for t in tensors], dim=1)

    def split(self, module: nn.Linear, matrix: Tensor) -> tuple[Tensor, ...]:
        weight = matrix[:, : module.in_features]
        return (weight, matrix[:, module.in_features]) if _bias_moves(module) else (weight,)

    def push(self, module: nn.Linear, x: Tensor, matrix: Tensor) -> Tensor:
        return x @ matrix[:, : module.in_features].T

    def pull(self, module: nn.Linear, delta: Tensor, matrix: Tensor) -> Tensor:
        return delta @ matrix[:, : module.in_features]


def _bias_moves(module: nn.Linear) -> bool:
    bias: Tensor | None = module.bias
    return bias is not None and bias.requires_grad
