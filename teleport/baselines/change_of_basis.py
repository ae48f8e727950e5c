"""Change of basis: rescale every neuron by a positive number; no input notices.

If φ(c z) = c φ(z) for all c > 0, multiplying the incoming weights and the bias of a neuron by c and
dividing its outgoing weights by c leaves the function of the network unchanged, on all inputs. In a
convolution a neuron is a channel; pooling and flattening keep its factor.

Source: Armenta, Judge, Painchaud, Skandarani, Lemaire, Gibeau-Sanchez, Spino and Jodoin 2023,
"Neural teleportation" (arXiv 2012.01118): factors drawn uniformly from [1 - spread, 1 + spread].
They also treat activations that are not homogeneous, by changing the activation of each neuron;
that is another network, and not done here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from teleport.baselines.batch import Batch, require
from teleport.baselines.chain import Stage, chain
from teleport.baselines.climb import Move
from teleport.baselines.rival import Rival
from teleport.errors import UnsupportedModelError

HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity)
"""Activations with φ(c z) = c φ(z) for all c > 0."""

POOLING = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
"""What works channel by channel and is homogeneous."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ROUNDING = 1e-3
"""Relative loss change that is allowed: rounding of the rescaled weights, generously."""


class ChangeOfBasisTeleporter(Rival):
    """Random change of basis, or the best of several (see the module for source and derivation).

    The identity on all inputs, so the held-out loss stays too. Uses no gradient to find where to
    go. Cost: two gradients; with ``draws`` > 1 one gradient for each draw.

    Limits: an ``nn.Sequential`` of ``nn.Linear`` and convolutions with activations in `HOMOGENEOUS`
    and `POOLING`, ``nn.Flatten`` and dropout between them.

    Args:
        model: the network.
        draws: 1 takes a random change of basis as it comes; more keep that with the largest
            gradient norm, or the start if none exceeds it.
        spread: factors are uniform in [1 - spread, 1 + spread], in (0, 1).
        seed: of the draws; successive steps draw on.

    Raises:
        UnsupportedModelError: for another model, or an activation that is not homogeneous.
        ValueError: for an argument out of range.
    """

    def __init__(
        self, model: nn.Module, draws: int = 1, spread: float = 0.5, *, seed: int = 0
    ) -> None:
        super().__init__(model, ROUNDING)
        require("draws", draws, isinstance(draws, int) and draws >= 1, "an integer >= 1")
        require("spread", spread, 0.0 < spread < 1.0, "in (0, 1), so that factors are positive")
        self.draws, self.spread = draws, spread
        self._generator = torch.Generator().manual_seed(seed)
        kinds = (nn.Linear, *CONVOLUTIONS)
        self._stages = chain(model, self.coverage, kinds, "a change of basis")
        self._repeats = [
            _repeat(a, b) for a, b in zip(self._stages, self._stages[1:], strict=False)
        ]

    def _move(self, batch: Batch, loss: float, norm: float) -> Move:
        start = [stage.block.part.matrix() for stage in self._stages]
        best, best_norm = start, norm
        for _ in range(self.draws):
            for stage, matrix in zip(self._stages, start, strict=True):
                stage.block.part.write(matrix)
            self._rescale([self._draw(_width(stage)) for stage in self._stages[:-1]])
            if self.draws == 1:
                return Move((1.0,), "one random change of basis")
            _, drawn_norm = batch.measure()
            if drawn_norm > best_norm:
                best, best_norm = [s.block.part.matrix() for s in self._stages], drawn_norm
        for stage, matrix in zip(self._stages, best, strict=True):
            stage.block.part.write(matrix)
        if best is start:
            return Move((), f"none of {self.draws} changes of basis enlarges the gradient")
        return Move((1.0,), f"the best of {self.draws} changes of basis")

    def _draw(self, width: int) -> Tensor:
        uniform = torch.rand(width, generator=self._generator, dtype=torch.float64)
        return 1.0 + self.spread * (2.0 * uniform - 1.0)

    @torch.no_grad()
    def _rescale(self, factors: Sequence[Tensor]) -> None:
        for stage, factor in zip(self._stages, factors, strict=False):
            for parameter in stage.module.parameters():
                parameter.mul_(_along(factor, parameter))
        later = zip(self._stages[1:], factors, self._repeats, strict=True)
        for stage, factor, (count, channels_first) in later:
            wide = factor.repeat_interleave(count) if channels_first else factor.repeat(count)
            _divide_inputs(stage.module, wide)


def _width(stage: Stage) -> int:
    """Number of neurons, or of channels."""
    return len(stage.module.weight)  # type: ignore[arg-type]


def _along(factor: Tensor, parameter: Tensor) -> Tensor:
    """A factor per neuron in the shape to multiply its weights or its bias by."""
    return factor.to(parameter).reshape(-1, *[1] * (parameter.dim() - 1))


def _divide_inputs(module: nn.Module, factor: Tensor) -> None:
    """Divide the weights on every input channel; in groups, each sees its own inputs."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    groups = getattr(module, "groups", 1)
    by_group = weight.view(groups, -1, *weight.shape[1:])
    shape = (groups, 1, weight.shape[1], *([1] * (weight.dim() - 2)))
    by_group.div_(factor.to(weight).reshape(shape))


def _repeat(stage: Stage, following: Stage) -> tuple[int, bool]:
    """How a neuron's factor is spread over the inputs of the next layer: count and order.

    Raises:
        UnsupportedModelError: if what is between the two layers is not homogeneous.
    """
    from_channels = isinstance(stage.module, CONVOLUTIONS)
    flattened = False
    for name, module in stage.after:
        if isinstance(module, nn.Flatten) and module.start_dim == 1:
            flattened = True
        elif type(module) not in (*HOMOGENEOUS, *POOLING):
            allowed = ", ".join(t.__name__ for t in HOMOGENEOUS)
            raise UnsupportedModelError(
                f"a change of basis needs φ(c z) = c φ(z), and {name!r} is "
                f"{type(module).__name__}. Possible are {allowed}, pooling and Flatten()"
            )
        elif isinstance(module, POOLING) and not from_channels:
            raise UnsupportedModelError(
                f"pooling {name!r} after a linear layer would mix neurons of different factors"
            )
    width = _width(stage)
    if isinstance(following.module, nn.Linear):
        count, rest = divmod(following.module.in_features, width)
        if rest or (from_channels and not flattened):
            raise UnsupportedModelError(
                f"layers {stage.name!r} and {following.name!r} do not fit: {width} channels lead "
                f"to {following.module.in_features} inputs"
            )
        return count, from_channels
    if not from_channels or flattened:
        raise UnsupportedModelError(
            f"a change of basis cannot follow neurons from {stage.name!r} into the convolution "
            f"{following.name!r}"
        )
    return 1, True
