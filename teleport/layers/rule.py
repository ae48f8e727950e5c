"""Layer rules: how a layer that is linear in its weights becomes ``z = W x`` on rows.

One shape convention for the whole package. Every product of a weight matrix with inputs, a
`LinearMap` of a layer, is turned into

- ``rows``   ``[*groups, rows, d_in]``   one row per position the weights act on, with the bias as
  an extra input that is 1 (so ``d_in`` counts the bias column);
- ``matrix`` ``[*groups, d_out, d_in]``  the weights, bias included as the last column;
- outputs and their cotangents as ``[*groups, rows, d_out]``.

``*groups`` is empty but for grouped convolutions, where every group has inputs, weights and so a
null space of its own. Then ``z = rows @ matrix.mT``, and the weight gradient is ``delta.mT @ rows``
(theorem ``thm-span``). Gram matrix, basis and projection never ask what the layer was.

`RULES` is the support matrix; `register` adds a line to it. A rule names the parts of a module, and
writes its forward pass as a function of them: ``apply(part, x)`` in place of each product.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from teleport.layers.part import LinearMap

M = TypeVar("M", bound=nn.Module)


Apply = Callable[[str, Tensor], Tensor]
"""``apply(part name, x)``: the part's ``W x + b``, recorded."""


class LayerRule(ABC, Generic[M]):
    """What the package must know about one layer type."""

    kind: str

    @abstractmethod
    def parts(self, module: M) -> Sequence[LinearMap]:
        """The weight matrices of the module; called once per model."""

    def obstacle(self, module: M) -> str:
        """Why this module, of a supported type, must be left alone all the same; or empty."""
        return ""

    def forward(self, module: M, apply: Apply, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass with every product with a part's matrix left to ``apply``.

        This default is for a module that is nothing but its one part.
        """
        (x,) = (*args, *kwargs.values())
        return apply("", x)


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

    Example:
        >>> class Gated(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.eye(width))
        ...     def forward(self, x):
        ...         return torch.sigmoid(x) * (x @ self.weight.T)
        >>> @register(Gated)
        ... class GatedRule(LayerRule):
        ...     kind = "Gated"
        ...     def parts(self, module):
        ...         return [DenseMap("", ParameterSlice(module, "weight"), None)]
        ...     def forward(self, module, apply, x):
        ...         return torch.sigmoid(x) * apply("", x)
        >>> del RULES[Gated]
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


BY_NAME: dict[str, LayerRule[Any]] = {}
"""Rules for types of packages that need not be installed: ``module.qualified_name`` → rule."""


def rule_for(module: nn.Module) -> LayerRule[Any] | None:
    """The rule of this module's exact type, or None."""
    kind = type(module)
    return RULES.get(kind) or BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
