"""The networks of the experiments, as plain modules of ``torch.nn``."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from teleport.lab.experiments.choices import INITS, READOUTS

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh}


def mlp(
    d_in: int,
    classes: int,
    hidden: Sequence[int] = (1024, 1024),
    init: str = "default",
    head_gain: float = 1.0,
    activation: str = "relu",
    bias: bool = True,
) -> nn.Sequential:
    """The paper's multi-layer perceptron: linear layers with ReLU between them (section 4.1).

    Args:
        d_in: input width.
        classes: output width.
        hidden: widths of the hidden layers.
        init: initial values; see `initialise`.
        head_gain: factor on the initial weights of the last layer.
        activation: one of `ACTIVATIONS`; the paper's is ReLU, which symmetry teleportation cannot
            act through.
        bias: whether the layers have biases.

    Returns:
        The network; it maps ``[..., d_in]`` to ``[..., classes]``.

    Raises:
        ValueError: for an unknown ``init`` or ``activation``.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    layers = [nn.Linear(a, b, bias) for a, b in pairwise([d_in, *hidden, classes])]
    modules: list[nn.Module] = []
    for layer in layers:
        modules += [layer, ACTIVATIONS[activation]()]
    network = nn.Sequential(*modules[:-1])
    initialise(network, init, head_gain)
    return network


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
    """Embedding with learned positions, encoder blocks, linear head.

    The paper's networks (4.3 and appendix A.2): 2 heads and 2 blocks with average pooling for
    sequential MNIST; 4 heads and 4 blocks without pooling for regression; the same with tokens,
    causal, with a head over the vocabulary, for language.

    Args:
        d_in: width of one position of the input, or the size of the vocabulary.
        classes: output width.
        length: positions, at most.
        width: of the residual stream; the paper's is 64 per head.
        heads: attention heads.
        blocks: encoder blocks.
        feedforward: width of the hidden layer of each block; default four times ``width``.
        norm_first: LayerNorm before attention and feed-forward layer, with one more at the end
            (pre-norm), rather than after them. The paper does not say which; ``thm-layernorm``
            needs layers that read normalised rows, and pre-norm has more of those.
        readout: what the head reads: ``"mean"`` over the positions, the ``"last"`` position, or
            ``"all"`` of them, one answer each.
        tokens: inputs are token numbers, embedded by a table rather than by a linear layer.
        causal: no position attends to a later one.

    Raises:
        ValueError: for an unknown ``readout``.
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
        readout: str = "mean",
        tokens: bool = False,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if readout not in READOUTS:
            raise ValueError(f"readout must be one of {READOUTS}, got {readout!r}")
        self.embed = nn.Embedding(d_in, width) if tokens else nn.Linear(d_in, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
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
        self.norm = nn.LayerNorm(width) if norm_first else nn.Identity()
        self.head = nn.Linear(width, classes)
        self.readout, self.causal = readout, causal

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, length, d_in]``, or tokens ``[batch, length]``, to outputs.

        Returns:
            ``[batch, classes]``, or ``[batch, length, classes]`` for the readout ``"all"``.
        """
        length = x.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        h: Tensor = self.embed(x) + self.position[:length]
        for block in self.blocks:
            h = block(h, src_mask=later) if self.causal else block(h)
        h = self.norm(h)
        if self.readout != "all":
            h = h.mean(dim=1) if self.readout == "mean" else h[:, -1]
        out: Tensor = self.head(h)
        return out


def initialise(model: nn.Module, init: str = "default", head_gain: float = 1.0) -> None:
    """Set the initial gain of a network, which a fair baseline has to tune.

    Args:
        model: freshly made; its weights are changed in place.
        init: ``"default"`` leaves PyTorch's values (uniform, variance 1 / (3 d)); ``"he"`` draws
            those of every linear and convolution layer from a normal distribution with variance
            2 / d, and makes their biases zero (He et al. 2015).
        head_gain: factor on the weights of the last linear layer.

    Raises:
        ValueError: for an unknown ``init``.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {INITS}, got {init!r}")
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for layer in layers if init == "he" else ():
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    layers[-1].weight.data.mul_(head_gain)
