"""Networks that read a sequence with a state: a selective state space (Mamba) and TTT-Linear.

Both are written so that every weight matrix is a plain layer that is applied once to each token, or
to each view of it. The library needs no rule for them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu, softplus

from teleport.lab.experiments.choices import READOUTS


def selective_scan(x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The recurrence of a selective state space, token by token.

    For every channel ``d`` and state ``s``, with ``h_0 = 0``,

        h_t = exp(step_t a) h_{t-1} + step_t b_t x_t,        y_t = Σ_s c_t h_t

    (Gu and Dao 2023, equation 2 with the discretisation of section 3.6: exact for ``a``, Euler's
    for ``b``).

    Args:
        x: ``[samples, tokens, channels]``.
        step: the time steps Δ, in the same shape.
        a: ``[channels, states]``, below 0.
        b: ``[samples, tokens, states]``: what is written.
        c: in the same shape: what is read.

    Returns:
        ``[samples, tokens, channels]``.
    """
    decay = (step[..., None] * a).exp()
    drive = (step * x)[..., None] * b[..., None, :]
    state, states = torch.zeros_like(drive[:, 0]), []
    for keep, write in zip(decay.unbind(1), drive.unbind(1), strict=True):
        state = keep * state + write
        states.append(state)
    return torch.einsum("ntds,nts->ntd", torch.stack(states, dim=1), c)


class Mamba(nn.Module):
    """The block of Gu and Dao (2023, section 3.4): a selective state space between two projections.

    ``in_proj`` gives ``x`` and the gate ``z``; ``x`` passes a causal convolution, a filter for each
    channel, and makes its own time steps Δ and what is written and read. Unlike the paper's, the
    two outer projections have biases: with them the direction that a LayerNorm before the block
    leaves free stays free in training (``thm-layernorm``).

    Args:
        width: of a token.
        state: states per channel.
        kernel: tokens that the convolution sees.
    """

    def __init__(self, width: int, state: int = 16, kernel: int = 4) -> None:
        super().__init__()
        channels, self.rank, self.state = 2 * width, math.ceil(width / 16), state
        self.in_proj = nn.Linear(width, 2 * channels)
        self.conv = nn.Conv1d(channels, channels, kernel, groups=channels, padding=kernel - 1)
        self.x_proj = nn.Linear(channels, self.rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(self.rank, channels)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(channels, 1))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = nn.Linear(channels, width)
        with torch.no_grad():  # time steps from 0.001 to 0.1, softplus inverted
            steps = torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_proj.bias.copy_(steps + (-torch.expm1(-steps)).log())

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[samples, tokens, width]`` to the same shape; no token sees a later one."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)
        x = silu(self.conv(x.mT)[..., : x.shape[1]].mT)
        dt, b, c = self.x_proj(x).split([self.rank, self.state, self.state], dim=-1)
        y = selective_scan(x, softplus(self.dt_proj(dt)), -self.A_log.exp(), b, c)
        out: Tensor = self.out_proj((y + self.D * x) * silu(z))
        return out


class TTTLinear(nn.Module):
    """TTT-Linear of Sun et al. (2024): its state is a matrix that learns while it reads.

    From the matrix ``W_0`` on, a linear model takes one gradient step for every ``inner_batch``
    tokens, on the mean of ``‖W k_s - v_s‖²`` over them, and a token reads what it and those before
    it have taught:

        W_t = W' - Σ_{s ≤ t} η_s (W' k_s - v_s) k_sᵀ,        z_t = W_t q_t,

    ``W'`` being the matrix at the end of the batch before. Queries, keys and values are learned
    views of the token, and so is its rate ``η_s``, at most 2 divided by the size of the batch. Keys
    and queries have norm 1, so that no step overshoots; the paper's normalises within the model.

    What is carried on is ``W_t - W_0``. So ``W_0`` is a layer that is applied to queries and keys
    and to nothing else (``thm-fast-weights``).

    Args:
        width: of a token.
        inner_batch: tokens of one step.
    """

    def __init__(self, width: int, inner_batch: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.start = nn.Linear(width, width, bias=False)
        self.rate = nn.Linear(width, 1)
        self.inner_batch = inner_batch

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[samples, tokens, width]`` to the same shape; no token sees a later one."""
        q, k = normalize(self.q(tokens), dim=-1), normalize(self.k(tokens), dim=-1)
        rate = 2 / self.inner_batch * self.rate(tokens).sigmoid()
        views = (q, k, rate, self.start(q), self.start(k) - self.v(tokens))
        learned, read = torch.zeros_like(q.mT @ k), []  # (W' - W_0)ᵀ
        for q, k, rate, answer, error in zip(
            *(view.split(self.inner_batch, dim=1) for view in views), strict=True
        ):
            step = rate * (error + k @ learned)
            read.append(answer + q @ learned - (q @ k.mT).tril() @ step)
            learned = learned - k.mT @ step
        out: Tensor = self.out(torch.cat(read, dim=1))
        return out


class SequenceNetwork(nn.Module):
    """Embedding, blocks that mix tokens, each behind a LayerNorm and added to its input, head.

    Args:
        d_in: width of one position of the input.
        classes: output width.
        block: makes a block for a width, such as `Mamba` and `TTTLinear`.
        width: of the residual stream.
        blocks: how many.
        readout: what the head reads: ``"mean"`` over the positions, the ``"last"`` position, or
            ``"all"`` of them, one answer each.

    Raises:
        ValueError: for an unknown ``readout``.
    """

    def __init__(
        self,
        d_in: int,
        classes: int,
        block: Callable[[int], nn.Module],
        width: int = 64,
        blocks: int = 2,
        readout: str = "mean",
    ) -> None:
        super().__init__()
        if readout not in READOUTS:
            raise ValueError(f"readout must be one of {READOUTS}, got {readout!r}")
        self.embed = nn.Linear(d_in, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), block(width)) for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.readout = readout

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, length, d_in]`` to outputs.

        Returns:
            ``[batch, classes]``, or ``[batch, length, classes]`` for the readout ``"all"``.
        """
        h: Tensor = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        h = self.norm(h)
        if self.readout != "all":
            h = h.mean(dim=1) if self.readout == "mean" else h[:, -1]
        out: Tensor = self.head(h)
        return out
