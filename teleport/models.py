"""The networks of the experiments, as plain ``nn.Module``s."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

INITS = ("default", "he")
ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh}


def mlp(
    d_in: int,
    classes: int,
    hidden: Sequence[int] = (1024, 1024),
    init: str = "default",
    head_gain: float = 1.0,
    activation: str = "relu",
) -> nn.Sequential:
    """The paper's multi-layer perceptron: linear layers with ReLU between them (section 4.1).

    Args:
        d_in: input width.
        classes: output width.
        hidden: widths of the hidden layers.
        init: ``"default"`` is PyTorch's (uniform, variance 1 / (3 d)); ``"he"`` is He et al. 2015
            (normal, variance 2 / d) with zero biases.
        head_gain: factor on the initial weights of the last layer. Together with ``init`` this is
            the initial gain that a fair baseline has to tune.
        activation: one of `ACTIVATIONS`; the paper's is ReLU, which symmetry teleportation cannot
            act through.

    Returns:
        The network; it maps ``[..., d_in]`` to ``[..., classes]``.

    Raises:
        ValueError: for an unknown ``init`` or ``activation``.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {INITS}, got {init!r}")
    layers = [nn.Linear(a, b) for a, b in pairwise([d_in, *hidden, classes])]
    for layer in layers:
        if init == "he":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    layers[-1].weight.data.mul_(head_gain)
    modules: list[nn.Module] = []
    for layer in layers:
        modules += [layer, ACTIVATIONS[activation]()]
    return nn.Sequential(*modules[:-1])
