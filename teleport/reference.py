"""The paper's equations for a multi-layer perceptron, literal and slow, one function per equation.

Nothing here is fast, nothing is shared with the rest of the package (it is imported from nowhere
and imports nothing of it): the chapters show these functions, and the tests hold the library
against them.

Conventions. A network is a list of matrices ``W_l [d_l, d_{l-1} + 1]``, the bias being the last
column. A batch is a list of ``n`` vectors; ``x_{l-1}`` is the input of layer ``l`` with a 1
appended. An activation is a triple of functions (value, first derivative, second derivative); it
acts after every layer but the last. ``loss`` takes the outputs ``[n, d_L]`` to one number.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Network = list[Tensor]


@dataclass(frozen=True)
class Activation:
    """An activation function with its first and second derivative."""

    value: Function
    first: Function
    second: Function


RELU = Activation(torch.relu, lambda z: (z > 0).to(z), torch.zeros_like)
TANH = Activation(
    torch.tanh,
    lambda z: 1 - torch.tanh(z) ** 2,
    lambda z: -2 * torch.tanh(z) * (1 - torch.tanh(z) ** 2),
)
IDENTITY = Activation(lambda z: z, torch.ones_like, torch.zeros_like)


@dataclass(frozen=True)
class Pass:
    """What a forward and backward pass leaves behind.

    Attributes:
        inputs: ``inputs[l][i]`` is x of sample i at layer l, ``[d_{l-1} + 1]``.
        outputs: ``outputs[l][i]`` is z = W x, ``[d_l]``.
        deltas: ``deltas[l][i]`` is dL/dz, ``[d_l]``.
    """

    inputs: list[list[Tensor]]
    outputs: list[list[Tensor]]
    deltas: list[list[Tensor]]


def with_one(x: Tensor) -> Tensor:
    """The vector with a 1 appended, so that the bias is a column of the weights (section 3.1.1)."""
    return torch.cat([x, x.new_ones(1)])


def forward(network: Network, batch: Iterable[Tensor], activation: Activation) -> Pass:
    """Section 3.1.1, ``x_l = σ(W_l x_{l-1})``, sample by sample; ``deltas`` stay empty."""
    inputs: list[list[Tensor]] = [[] for _ in network]
    outputs: list[list[Tensor]] = [[] for _ in network]
    for x in batch:
        for layer, weight in enumerate(network):
            inputs[layer].append(with_one(x))
            z = weight @ inputs[layer][-1]
            outputs[layer].append(z)
            x = activation.value(z)
    return Pass(inputs, outputs, [])


def backward(network: Network, batch: list[Tensor], activation: Activation, loss: Function) -> Pass:
    """δ_L = dL/dz_L, then ``δ_l = σ'(z_l) ∘ (W_{l+1}ᵀ δ_{l+1})`` without the bias entry."""
    seen = forward(network, batch, activation)
    last = torch.func.grad(loss)(torch.stack(seen.outputs[-1]))
    deltas = [list(last)]
    for layer in reversed(range(len(network) - 1)):
        deltas.insert(0, [])
        for z, delta in zip(seen.outputs[layer], deltas[1], strict=True):
            deltas[0].append(activation.first(z) * (network[layer + 1].T @ delta)[:-1])
    return Pass(seen.inputs, seen.outputs, deltas)


def primary_gradient(
    network: Network, batch: list[Tensor], activation: Activation, loss: Function
) -> Network:
    """Theorem T1: ``∇_{W_l} L = Σ_i δ_{l,i} x_{l-1,i}ᵀ``."""
    seen = backward(network, batch, activation, loss)
    return [_sum_of_outer(d, x) for d, x in zip(seen.deltas, seen.inputs, strict=True)]


def equation_4(
    network: Network, batch: list[Tensor], activation: Activation, loss: Function
) -> Tensor:
    """The teleport objective, ``½ ‖∇_W L‖²`` over all layers."""
    gradient = primary_gradient(network, batch, activation, loss)
    return torch.stack([(g**2).sum() for g in gradient]).sum() / 2


def teleport_gradient(
    network: Network, batch: list[Tensor], activation: Activation, loss: Function
) -> Network:
    """∇T by differentiating equation 4, and with it the gradient, once more."""
    leaves = [w.detach().clone().requires_grad_() for w in network]
    objective = equation_4(leaves, batch, activation, loss)
    return list(torch.autograd.grad(objective, leaves, materialize_grads=True))


def killed_and_survivor(
    network: Network, batch: list[Tensor], activation: Activation, loss: Function
) -> tuple[Network, Network]:
    """Theorem T4: ∇T = Hg in two terms per layer, ``Σ δ̇_i x_iᵀ`` and ``Σ δ_i ẋ_iᵀ``.

    Dots are derivatives along ω + s·g at s = 0. The rows of the first term lie in the span of the
    inputs, so a projection out of that span kills it; the paper overlooks the second.
    """
    seen = backward(network, batch, activation, loss)
    gradient = [_sum_of_outer(d, x) for d, x in zip(seen.deltas, seen.inputs, strict=True)]
    x_dots, z_dots = _forward_dots(network, gradient, seen, activation)
    delta_dots = _backward_dots(network, gradient, seen, z_dots, activation, loss)
    killed = [_sum_of_outer(d, x) for d, x in zip(delta_dots, seen.inputs, strict=True)]
    survivor = [_sum_of_outer(d, x) for d, x in zip(seen.deltas, x_dots, strict=True)]
    return killed, survivor


def equation_8(inputs: list[Tensor]) -> Tensor:
    """Representation matrix ``R = [x_1, …, x_n]`` of one layer, ``[d, n]``, one column a sample."""
    return torch.stack(inputs, dim=1)


def patches(image: Tensor, size: int, stride: int = 1, padding: int = 0) -> Tensor:
    """Section 3.1.2: ``X [h_o w_o, C_i k k]`` of an image ``[C_i, h, w]``, position by position.

    Zero padding; the row of a position lists its patch channel by channel, each row by row.
    """
    channels, height, width = image.shape
    padded = image.new_zeros(channels, height + 2 * padding, width + 2 * padding)
    padded[:, padding : padding + height, padding : padding + width] = image
    rows = []
    for top in range(0, padded.shape[1] - size + 1, stride):
        for left in range(0, padded.shape[2] - size + 1, stride):
            patch = [
                padded[channel, top + i, left + j]
                for channel in range(channels)
                for i in range(size)
                for j in range(size)
            ]
            rows.append(torch.stack(patch))
    return torch.stack(rows)


def equation_9(images: list[Tensor], size: int, stride: int = 1, padding: int = 0) -> Tensor:
    """Representation matrix of a convolution, ``[X_1ᵀ, …, X_nᵀ]``, ``[C_i k k, h_o w_o n]``."""
    return torch.cat([patches(image, size, stride, padding).T for image in images], dim=1)


def equation_10(sequences: list[Tensor]) -> Tensor:
    """Representation matrix of an attention projection, ``[X_1ᵀ, …, X_nᵀ]``, ``[D_i, T n]``."""
    return torch.cat([sequence.T for sequence in sequences], dim=1)


def equation_3(representation: Tensor, tau: float) -> int:
    """Smallest k with ``‖A_k‖_F² >= τ ‖A‖_F²``; for τ = 1 the numerical rank (theorem T9).

    That is the number of singular values above ``√d ε ‖A‖_F``, but never of one below
    ``4 ε ‖A‖_F`` with the ε of double precision, in which they are computed.
    """
    values = torch.linalg.svdvals(representation.double())
    eps, resolved = (torch.finfo(t).eps for t in (representation.dtype, torch.float64))
    cut = max(len(representation) ** 0.5 * eps, 4 * resolved) * (values**2).sum() ** 0.5
    rank = int((values > cut).sum())
    if tau == 1.0:
        return rank
    for k in range(rank):
        if (values[:k] ** 2).sum() >= tau * (values**2).sum():
            return k
    return rank


def significant_basis(representation: Tensor, tau: float) -> Tensor:
    """Step 2: ``B_l = [u_1, …, u_k]``, the leading left singular vectors of R, ``[d, k]``."""
    left: Tensor = torch.linalg.svd(representation, full_matrices=False).U
    return left[:, : equation_3(representation, tau)]


def equation_11(gradient: Tensor, basis: Tensor) -> Tensor:
    """``π_l(G) = G - G B Bᵀ``: what is left outside the space of significant representation."""
    return gradient - gradient @ basis @ basis.T


def equation_12(gradient: Tensor, basis: Tensor) -> Tensor:
    """``π_l(G) = G - B Bᵀ G`` for weights stored ``[C_i k k, C_o]``: equation 11 transposed."""
    return gradient - basis @ basis.T @ gradient


def equation_13(gradient: Tensor, basis: Tensor) -> Tensor:
    """``π_l(G) = G - B Bᵀ G`` for projections stored ``[D_i, D_k]``: the same as equation 12."""
    return equation_12(gradient, basis)


def equation_5(network: Network, projected: Network, eta: float) -> Network:
    """``W_{l,t+1} = W_{l,t} + η π_l(∇T)``, all layers together."""
    return [w + eta * p for w, p in zip(network, projected, strict=True)]


def bases_of_batch(
    network: Network, batch: list[Tensor], activation: Activation, tau: float
) -> list[Tensor]:
    """Steps 1 and 2 for every layer."""
    inputs = forward(network, batch, activation).inputs
    return [significant_basis(equation_8(layer), tau) for layer in inputs]


def algorithm_1_teleport(
    network: Network,
    batches: list[list[Tensor]],
    losses: list[Function],
    activation: Activation,
    eta: float,
    steps: int,
    tau: float = 1.0,
    cap: float = float("inf"),
) -> Network:
    """The teleport of Algorithm 1: for each batch one SVD per layer, then ``steps`` of equation 5.

    The steps of a batch end when the gradient norm is above ``cap``.
    """
    for batch, loss in zip(batches, losses, strict=True):
        bases = bases_of_batch(network, batch, activation, tau)
        for _ in range(steps):
            if (2 * equation_4(network, batch, activation, loss)) ** 0.5 > cap:
                break
            ascent = teleport_gradient(network, batch, activation, loss)
            projected = [equation_11(g, b) for g, b in zip(ascent, bases, strict=True)]
            network = equation_5(network, projected, eta)
    return network


def algorithm_1(
    network: Network,
    train_epoch: Callable[[Network], Network],
    teleport: Callable[[Network], Network],
    epochs: int,
    schedule: set[int],
) -> Network:
    """Algorithm 1: before each epoch in the schedule teleport, then train an epoch."""
    for epoch in range(epochs):
        if epoch in schedule:
            network = teleport(network)
        network = train_epoch(network)
    return network


def _sum_of_outer(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return torch.stack([torch.outer(a, b) for a, b in zip(left, right, strict=True)]).sum(0)


def _forward_dots(
    network: Network, velocity: Network, seen: Pass, activation: Activation
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """``ż_l = Ẇ_l x_{l-1} + W_l ẋ_{l-1}`` and ``ẋ_l = σ'(z_l) ∘ ż_l``; the 1 has tangent 0."""
    x_dots: list[list[Tensor]] = [[] for _ in network]
    z_dots: list[list[Tensor]] = [[] for _ in network]
    for i in range(len(seen.inputs[0])):
        x_dot = torch.zeros_like(seen.inputs[0][i])
        for layer, weight in enumerate(network):
            x_dots[layer].append(x_dot)
            z_dots[layer].append(velocity[layer] @ seen.inputs[layer][i] + weight @ x_dot)
            slope = activation.first(seen.outputs[layer][i])
            x_dot = torch.cat([slope * z_dots[layer][i], slope.new_zeros(1)])
    return x_dots, z_dots


def _backward_dots(
    network: Network,
    velocity: Network,
    seen: Pass,
    z_dots: list[list[Tensor]],
    activation: Activation,
    loss: Function,
) -> list[list[Tensor]]:
    """δ̇ by the product rule on ``δ_l = σ'(z_l) ∘ (W_{l+1}ᵀ δ_{l+1})``."""
    last = torch.stack(seen.outputs[-1])
    # The Hessian of the loss in the outputs is symmetric, so its transpose times ż_L will do.
    last_dot = torch.func.vjp(torch.func.grad(loss), last)[1](torch.stack(z_dots[-1]))[0]
    dots = [list(last_dot)]
    for layer in reversed(range(len(network) - 1)):
        weight, weight_dot = network[layer + 1], velocity[layer + 1]
        dots.insert(0, [])
        for i, z in enumerate(seen.outputs[layer]):
            delta = seen.deltas[layer + 1][i]
            pulled = (weight.T @ delta)[:-1]
            pulled_dot = (weight_dot.T @ delta + weight.T @ dots[1][i])[:-1]
            bend = activation.second(z) * z_dots[layer][i] * pulled
            dots[0].append(bend + activation.first(z) * pulled_dot)
    return dots
