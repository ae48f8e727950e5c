"""The networks of the experiments, as plain ``nn.Module``s."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

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


def cnn(
    channels: Sequence[int] = (3, 16, 32, 64), image: int = 32, classes: int = 10
) -> nn.Sequential:
    """The paper's CIFAR network: 3 x 3 convolutions, each with ReLU and 2 x 2 max pooling (4.2).

    Args:
        channels: of the input, then of every convolution's output.
        image: height and width of the input.
        classes: output width.

    Returns:
        The network; it maps ``[batch, channels[0], image, image]`` to ``[batch, classes]``.

    Raises:
        ValueError: if poolings leave nothing of the image.
    """
    side = image >> (len(channels) - 1)
    if side < 1:
        raise ValueError(
            f"image must be at least {1 << (len(channels) - 1)} wide for {len(channels) - 1} "
            f"poolings, got {image}"
        )
    modules: list[nn.Module] = []
    for before, after in pairwise(channels):
        modules += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(channels[-1] * side**2, classes))


class Transformer(nn.Module):
    """Linear embedding with learned positions, encoder blocks, average pooling, linear head.

    Args:
        d_in: width of one position of the input.
        classes: output width.
        length: positions.
        width: of the residual stream; the paper's is 64 per head.
        heads: attention heads.
        blocks: encoder blocks.
        feedforward: width of the hidden layer of each block; default four times ``width``.
        norm_first: LayerNorm before attention and feed-forward layer, with one more at the end
            (pre-norm), rather than after them. The paper does not say which; ``thm-layernorm``
            needs layers that read normalised rows, and pre-norm has more of those.
        pool: average over positions before the head; else the head answers at every position.
    """

    def __init__(
        self,
        d_in: int,
        classes: int,
        length: int,
        width: int = 128,
        heads: int = 2,
        blocks: int = 2,
        feedforward: int | None = None,
        norm_first: bool = True,
        pool: bool = True,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(d_in, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width,
                    heads,
                    feedforward or 4 * width,
                    dropout=0.0,
                    batch_first=True,
                    norm_first=norm_first,
                )
                for _ in range(blocks)
            )
        )
        self.norm = nn.LayerNorm(width) if norm_first else nn.Identity()
        self.head = nn.Linear(width, classes)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, length, d_in]`` to ``[batch, classes]``, or one row per position."""
        h = self.norm(self.blocks(self.embed(x) + self.position))
        out: Tensor = self.head(h.mean(dim=1) if self.pool else h)
        return out
