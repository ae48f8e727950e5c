"""Networks with residual connections: the paper's, and ResNet-18 for small images."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class ResidualNetwork(nn.Module):
    """The paper's residual network for Tiny-ImageNet: strides instead of pooling (4.2).

    Every width is a stage of three 3 x 3 convolutions: the first halves height and width, the other
    two are bridged by a residual connection between channels of the same shape. With the paper's
    widths the channels are 3, 64, 64, 64, 128, 128, 128, 256, 256, 256, with three residual
    connections. The paper does not say where ReLU and strides stand, nor how the head reads the
    last feature map; here ReLU follows every convolution or sum, and the head reads its average.

    Args:
        widths: channels of each stage.
        classes: output width.
    """

    def __init__(self, widths: Sequence[int] = (64, 128, 256), classes: int = 200) -> None:
        super().__init__()
        pairs = pairwise([3, *widths])
        self.stages = nn.Sequential(*(_Stage(before, after) for before, after in pairs))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, 3, height, width]`` to ``[batch, classes]``."""
        out: Tensor = self.head(self.stages(x).mean(dim=(2, 3)))
        return out


class _Stage(nn.Module):
    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(before, width, 3, stride=2, padding=1)
        self.one = nn.Conv2d(width, width, 3, padding=1)
        self.two = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x).relu()
        out: Tensor = h + self.two(self.one(h).relu())
        return out.relu()


class ResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images (He et al. 2015), as in common use on CIFAR.

    The stem is a 3 x 3 convolution without pooling; four stages of two blocks follow. A block is
    two 3 x 3 convolutions with BatchNorm and a shortcut, a 1 x 1 convolution with BatchNorm where
    shapes differ.

    Args:
        classes: output width.
        width: channels of the first stage; each later stage has twice those before.
    """

    def __init__(self, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        widths = [width * factor for factor in (1, 1, 2, 4, 8)]
        blocks: list[nn.Module] = []
        for stage, (before, after) in enumerate(pairwise(widths)):
            stride = 1 if stage == 0 else 2
            blocks += [_Block(before, after, stride), _Block(after, after, 1)]
        self.stem = _normalised(3, width, 3, 1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, 3, height, width]`` to ``[batch, classes]``."""
        out: Tensor = self.head(self.blocks(self.stem(x).relu()).mean(dim=(2, 3)))
        return out


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.one = _normalised(before, after, 3, stride)
        self.two = _normalised(after, after, 3, 1)
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else _normalised(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x).relu()) + self.shortcut(x)
        return out.relu()


def _normalised(before: int, after: int, kernel: int, stride: int) -> nn.Sequential:
    """A convolution without bias, which the BatchNorm after it would undo."""
    convolution = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(after))
