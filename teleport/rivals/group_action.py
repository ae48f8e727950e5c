"""The action of GL(d) between consecutive layers of a perceptron that keeps a batch's outputs.

Between two consecutive layers of a perceptron, ``h = σ(V x + b)`` and ``z = U h + c``, an
invertible matrix ``g`` acts by

    h → g h,   U → U g⁻¹,   V → such that σ(V' x + b') = g h on every sample of the batch,

so ``z`` stays. With the samples as rows ``R = [x, 1]`` the new ``[V, b]`` has to solve
``R [V', b']ᵀ = σ⁻¹(h gᵀ)``, which is possible if the samples are linearly independent; we take the
solution of least change, ``[V', b'] = [V, b] + (R⁺ (σ⁻¹(h gᵀ) - σ⁻¹(h)))ᵀ``. Since it is the
change that is multiplied by the pseudo-inverse, and not the whole right-hand side, ``g = I`` is the
identity on every input, not only on the batch. The bias is a column of the same system; ``c``
stays, because ``g`` acts on ``h`` alone.

Source: Zhao, Dehmamy, Walters and Yu 2022 (arXiv 2205.10637), equation (8).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from teleport.errors import ClosureError, GroupElementError, UnsupportedModelError

INVERSE_KINDS = ("exact", "first_order")
PSEUDO_INVERSES = ("qr", "svd")
Elementwise = Callable[[Tensor], Tensor]


def _inverse_elu(module: nn.Module) -> Elementwise:
    alpha = float(module.alpha)  # type: ignore[arg-type]
    return lambda y: torch.where(y > 0, y, torch.log1p(torch.where(y > 0, 0.0, y) / alpha))


def _inverse_softplus(module: nn.Module) -> Elementwise:
    beta, threshold = float(module.beta), float(module.threshold)  # type: ignore[arg-type]

    def inverse(y: Tensor) -> Tensor:
        linear = y * beta > threshold
        curved = torch.where(linear, 1.0, y)
        return torch.where(linear, y, curved + torch.log(-torch.expm1(-beta * curved)) / beta)

    return inverse


def _inverse_leaky_relu(module: nn.Module) -> Elementwise:
    slope = float(module.negative_slope)  # type: ignore[arg-type]
    if slope <= 0.0:
        raise UnsupportedModelError(
            f"LeakyReLU with negative_slope={slope} is not invertible; it has to be > 0"
        )
    return lambda y: functional.leaky_relu(y, 1.0 / slope)


INVERSES: dict[type[nn.Module], Callable[[nn.Module], Elementwise]] = {
    nn.Identity: lambda module: lambda y: y,
    nn.LeakyReLU: _inverse_leaky_relu,
    nn.Tanh: lambda module: torch.atanh,
    nn.Sigmoid: lambda module: torch.logit,
    nn.ELU: _inverse_elu,
    nn.Softplus: _inverse_softplus,
}
"""Inverses of activations; outside the activation's range they give NaN or infinity."""


@dataclass(frozen=True)
class Bend:
    """An invertible activation.

    Attributes:
        forward: σ, elementwise.
        inverse: σ⁻¹; NaN or infinite outside the range of σ.
    """

    forward: Elementwise
    inverse: Elementwise


def group_action(
    matrices: Sequence[Float[Tensor, "_ _"]],
    rows: Float[Tensor, "n d_in"],
    elements: Sequence[Float[Tensor, "_ _"]],
    bends: Sequence[Bend],
    *,
    inverse: str = "exact",
    pseudo_inverse: str = "qr",
) -> list[Tensor]:
    """Let one group element act between every two consecutive layers, first to last.

    Args:
        matrices: ``[d_out, d_in]`` per layer; a bias is the last column.
        rows: inputs of the first layer, with a 1 for the bias if it has one.
        elements: ``g [d, d]`` per hidden layer.
        bends: activation per hidden layer.
        inverse: ``"exact"``, or ``"first_order"``: ``I - M`` for ``(I + M)⁻¹``, as in the published
            code, which loses the level set as ‖M‖².
        pseudo_inverse: ``"qr"``, for independent rows; ``"svd"`` also solves in the least-squares
            sense where the samples are not independent, and then the outputs move.

    Returns:
        New matrices. Differentiable in ``elements``, and right at the identity, where the change of
        the pseudo-inverse is multiplied by zero; elsewhere that term is left out.

    Raises:
        GroupElementError: if an element is singular, or leads out of an activation's range.
        ClosureError: if the rows of a layer are not independent (``"qr"`` only).
    """
    new = list(matrices)
    for layer, (element, bend) in enumerate(zip(elements, bends, strict=True)):
        width = len(element)
        hidden = bend.forward(rows @ new[layer].mT)
        change = _change(bend, hidden, element, layer)
        solve = pseudo_inverse_of(rows.detach(), layer, pseudo_inverse)
        new[layer] = new[layer] + (solve @ change).mT
        undone = new[layer + 1][:, :width] @ _inverse(element, layer, inverse)
        new[layer + 1] = torch.cat([undone, new[layer + 1][:, width:]], dim=1)
        rows = bend.forward(rows @ new[layer].mT)
        if new[layer + 1].shape[1] > width:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    return new


def _change(bend: Bend, hidden: Tensor, element: Tensor, layer: int) -> Tensor:
    """``σ⁻¹(h gᵀ) - σ⁻¹(h)``: how the layer's outputs have to change."""
    present = bend.inverse(hidden)
    if not bool(present.isfinite().all()):
        raise GroupElementError(
            f"activations of hidden layer {layer + 1} are saturated: they round to the bound of "
            "the activation's range, where it has no inverse"
        )
    wanted = bend.inverse(hidden @ element.mT)
    if not bool(wanted.isfinite().all()):
        raise GroupElementError(
            f"the group element of hidden layer {layer + 1} moves activations out of the "
            "activation's range; take a smaller step"
        )
    return wanted - present


def _inverse(element: Tensor, layer: int, kind: str) -> Tensor:
    eye = torch.eye(len(element), dtype=element.dtype, device=element.device)
    if kind == "first_order":
        opposite: Tensor = 2 * eye - element
        return opposite
    inverse: Tensor
    inverse, info = torch.linalg.inv_ex(element)
    condition = torch.linalg.matrix_norm(element, 1) * torch.linalg.matrix_norm(inverse, 1)
    if int(info) or not bool(condition * torch.finfo(element.dtype).eps < 1.0):
        raise GroupElementError(
            f"the group element of hidden layer {layer + 1} is not invertible (condition number "
            f"{float(condition):.1e}); take a smaller step"
        )
    return inverse


def pseudo_inverse_of(rows: Float[Tensor, "n d_in"], layer: int, kind: str) -> Tensor:
    """``R⁺ [d_in, n]`` of a layer's inputs.

    By QR it is ``Q L⁻ᵀ`` of ``Rᵀ = Q L``, for independent rows.

    Raises:
        ClosureError: if they are dependent, unless ``kind`` is ``"svd"``; layers count from 0.
    """
    solution: Tensor
    if kind == "svd":
        solution = torch.linalg.pinv(rows)
        return solution
    count, width = rows.shape
    if count > width:
        raise ClosureError(
            f"symmetry teleportation needs linearly independent samples, and the {count} samples "
            f"of the batch cannot be so in the {width} inputs (bias included) of layer "
            f"{layer + 1}: use a batch of at most {width}, or pseudo_inverse='svd', under which "
            "the outputs move"
        )
    q, upper = torch.linalg.qr(rows.mT)
    diagonal = upper.diagonal().abs()
    if bool(diagonal.min() <= max(rows.shape) * torch.finfo(rows.dtype).eps * diagonal.max()):
        raise ClosureError(
            f"the batch is singular: its samples are linearly dependent at the inputs of layer "
            f"{layer + 1} (are some repeated, or zero?), and no weights give them independent "
            "outputs. Remove the dependent samples, or use pseudo_inverse='svd'"
        )
    solution = torch.linalg.solve_triangular(upper.mT, q, upper=False, left=False)
    return solution


def only_activation(after: Sequence[tuple[str, nn.Module]]) -> tuple[str, nn.Module]:
    """Name and module of what is between two linear layers; the identity if nothing is.

    UnsupportedModelError if there are several.
    """
    if len(after) > 1:
        raise UnsupportedModelError(
            "symmetry teleportation needs at most one activation between two linear layers, got "
            + " and ".join(f"{name!r} ({type(m).__name__})" for name, m in after)
        )
    return after[0] if after else ("", nn.Identity())


def bend_of(after: Sequence[tuple[str, nn.Module]]) -> Bend:
    """The activation between two linear layers.

    UnsupportedModelError if there are several, or it has no inverse in `INVERSES`.
    """
    name, module = only_activation(after)
    if type(module) not in INVERSES:
        raise UnsupportedModelError(
            f"symmetry teleportation needs an invertible activation, and {name!r} is "
            f"{type(module).__name__}. Invertible ones: {', '.join(t.__name__ for t in INVERSES)}"
        )
    return Bend(module, INVERSES[type(module)](module))
