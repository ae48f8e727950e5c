"""The action of GL(d) on a hidden layer's pre-activations that keeps a batch's outputs.

Between two consecutive layers of a perceptron, ``h = σ(V x + b)`` and ``z = U h + c``, an
invertible matrix ``g`` acts by

    V → g V,   b → g b,   [U, c] → such that U' σ(g (V x + b)) + c' = z on every sample,

for the samples of the batch. Here it is the second layer that has to be solved for, not the first
as in `group_action`: no inverse of σ is needed and none of ``g``, so any elementwise activation
will do, and no value can leave its range. With the new activations as rows ``R' = [h', 1]`` a
solution exists if they are linearly independent; we take the one of least change,

    [U', c'] = [U, c] + (R'⁺ (h - h') Uᵀ)ᵀ,

so that ``g = I`` is the identity on every input. The published form, ``U' = U h h'⁺`` without bias,
acts on the batch in the same way, but projects U on the span of the batch's activations even at
``g = I``: with fewer samples than neurons the outputs on all other inputs change.

Source: Zhao, Gower, Walters and Yu 2023 (arXiv 2305.13404), in the form of their public code
(``group_action``, with ``g = I + T``); the least change and the bias are ours.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teleport.errors import UnsupportedModelError
from teleport.rivals.group_action import Elementwise, only_activation, pseudo_inverse_of

ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh,
    nn.Hardsigmoid, nn.Hardswish,
)  # fmt: skip
"""Activations without parameters that act on every neuron by itself."""


def preactivation_action(
    matrices: Sequence[Float[Tensor, "_ _"]],
    rows: Float[Tensor, "n d_in"],
    elements: Sequence[Float[Tensor, "_ _"]],
    activations: Sequence[Elementwise],
    *,
    pseudo_inverse: str = "qr",
) -> list[Tensor]:
    """Let one group element act between every two consecutive layers, first to last.

    Matrices, rows, elements and what is returned are as of `group_action`.

    Args:
        matrices: ``[d_out, d_in]`` per layer.
        rows: ``[n, d_in]``.
        elements: ``[d, d]`` per hidden layer.
        activations: σ per hidden layer.
        pseudo_inverse: ``"qr"``, for independent activations; ``"svd"`` also solves in the
            least-squares sense where they are not, and then the outputs move.

    Raises:
        ClosureError: if the new activations of a layer are not independent (``"qr"`` only).
    """
    new = list(matrices)
    for layer, (element, activation) in enumerate(zip(elements, activations, strict=True)):
        before = rows @ new[layer].mT
        new[layer] = element @ new[layer]
        width = len(element)
        hidden, moved = activation(before), activation(before @ element.mT)
        following = new[layer + 1]
        ones = moved.new_ones(len(moved), following.shape[1] - width)
        rows = torch.cat([moved, ones], dim=1)
        solve = pseudo_inverse_of(rows.detach(), layer + 1, pseudo_inverse)
        new[layer + 1] = following + (solve @ ((hidden - moved) @ following[:, :width].mT)).mT
    return new


def elementwise_of(after: Sequence[tuple[str, nn.Module]]) -> Elementwise:
    """The activation between two linear layers.

    UnsupportedModelError if there are several, or it is not in `ELEMENTWISE`.
    """
    name, module = only_activation(after)
    if type(module) not in ELEMENTWISE:
        raise UnsupportedModelError(
            f"symmetry teleportation of pre-activations needs an elementwise activation, and "
            f"{name!r} is {type(module).__name__}. Possible are "
            f"{', '.join(kind.__name__ for kind in ELEMENTWISE)}"
        )
    return module
