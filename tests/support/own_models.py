"""Models that people write themselves, small: recurrent, U-shaped, depthwise, with inner learning.

Token models take ``[samples, length]`` and give logits per position; image models take ``[samples,
3, size, size]``.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH, CLASSES = 100, 32, 5


class LSTMLanguageModel(nn.Module):
    """Embedding, two recurrent layers, head; the head may be the embedding's matrix."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.body = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens))[0])


class TTTLinear(nn.Module):
    """A sequence layer whose hidden state is a weight matrix that learns while it reads.

    Sun et al. 2024, "Learning to (Learn at Test Time)", TTT-Linear with batches of one token, less
    its inner normalisation. The state takes one gradient step per token on the loss ``‖W k - v‖²``
    of reconstructing v from k,

        W_t = W_{t-1} - 2 η (W_{t-1} k_t - v_t) k_tᵀ,        z_t = W_t q_t,

    written out, so that the outer loss differentiates through it. W_0 is learned.
    """

    def __init__(self, width: int, rate: float = 0.05) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.start = nn.Parameter(torch.randn(width, width) / width)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        state = self.start.expand(len(x), -1, -1)
        read = []
        for q, k, v in zip(*(f(x).unbind(1) for f in (self.q, self.k, self.v)), strict=True):
            error = torch.einsum("noi,ni->no", state, k) - v
            state = state - 2 * self.rate * torch.einsum("no,ni->noi", error, k)
            read.append(torch.einsum("noi,ni->no", state, q))
        return self.out(torch.stack(read, dim=1))


class TTTLanguageModel(nn.Module):
    """Two blocks of a TTT layer and a perceptron, normalised before, with residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), TTTLinear(WIDTH)) for _ in range(2)
        )
        self.perceptrons = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for mixer, perceptron in zip(self.mixers, self.perceptrons, strict=True):
            x = x + mixer(x)
            x = x + perceptron(x)
        return self.head(self.norm(x))


class UNet(nn.Module):
    """Ronneberger et al. 2015: down, up, and the finer image handed across; classes per pixel."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()

        def block(before: int, after: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1, bias=False), norm(after), nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1, bias=False), norm(after), nn.ReLU(),
            )  # fmt: skip

        self.down = nn.ModuleList([block(3, 4), block(4, 8)])
        self.bottom = block(8, 16)
        self.grow = nn.ModuleList(
            [nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ConvTranspose2d(8, 4, 2, stride=2)]
        )
        self.up = nn.ModuleList([block(16, 8), block(8, 4)])
        self.head = nn.Conv2d(4, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        x, across = images, []
        for block in self.down:
            across.append(block(x))
            x = functional.max_pool2d(across[-1], 2)
        x = self.bottom(x)
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([across.pop(), grow(x)], dim=1))
        return self.head(x)


def batch_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def separable() -> nn.Sequential:
    """MobileNet (Howard et al. 2017): a filter per channel, then a mix of channels."""

    def block(before: int, after: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(before, before, 3, stride, padding=1, groups=before, bias=False),
            nn.BatchNorm2d(before), nn.ReLU6(),
            nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU6(),
        ]  # fmt: skip

    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        *block(8, 16, 1), *block(16, 32, 2), *block(32, 32, 1), *block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES),
    )  # fmt: skip


TOKENS: dict[str, Callable[[], nn.Module]] = {
    "LSTM language model": lambda: LSTMLanguageModel(tied=False),
    "LSTM language model, tied": lambda: LSTMLanguageModel(tied=True),
    "TTT-Linear": TTTLanguageModel,
}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "U-Net, BatchNorm": lambda: UNet(batch_norm),
    "U-Net, GroupNorm": lambda: UNet(group_norm),
    "depthwise separable": separable,
}
