"""Rescaling of neurons: which networks allow it, and how a factor is applied.

If φ(c z) = c φ(z) for all c > 0, multiplying the incoming weights and the bias of a neuron by c and
dividing its outgoing weights by c leaves the function of the network unchanged, on all inputs
(theorem ``thm-change-of-basis``). In a convolution a neuron is a channel; pooling and flattening
keep its factor. The rivals differ only in how they choose the factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teleport.errors import UnsupportedModelError
from teleport.layers.support import Coverage
from teleport.rivals.chain import Stage, chain

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


class Rescaling:
    """The hidden neurons of a network, one factor each.

    Attributes:
        stages: weight layers in order of execution.
        widths: neurons, or channels, of each hidden layer.

    Args:
        model: an ``nn.Sequential`` of ``nn.Linear`` and convolutions with activations in
            `HOMOGENEOUS` and `POOLING`, ``nn.Flatten`` and dropout between them.
        coverage: of the model.
        method: who rescales, for the errors.

    Raises:
        UnsupportedModelError: for another model, or an activation that is not homogeneous.
    """

    def __init__(self, model: nn.Module, coverage: Coverage, method: str) -> None:
        self.stages = chain(model, coverage, (nn.Linear, *CONVOLUTIONS), method)
        self._repeats = [
            _repeat(a, b, method) for a, b in zip(self.stages, self.stages[1:], strict=False)
        ]
        self.widths = [_width(stage) for stage in self.stages[:-1]]

    @torch.no_grad()
    def apply(self, factors: Sequence[Tensor]) -> None:
        """Multiply what goes into each hidden neuron by its factor, divide what leaves it."""
        for stage, factor in zip(self.stages, factors, strict=False):
            for parameter in stage.module.parameters():
                parameter.mul_(_along(factor, parameter))
        later = zip(self.stages[1:], factors, self._repeats, strict=True)
        for stage, factor, (count, channels_first) in later:
            wide = factor.repeat_interleave(count) if channels_first else factor.repeat(count)
            _divide_inputs(stage.module, wide)

    def couplings(self, values: Sequence[Mapping[str, Tensor]]) -> "Couplings":
        """Sum a value of each parameter over all that change by the same factors.

        Args:
            values: for each stage, by the parameter's name in its layer, a tensor of its shape; a
                parameter without one counts nothing.
        """
        first, *rest = (value["weight"] for value in values)
        alone = [first.flatten(1).sum(1), *(weight.new_zeros(len(weight)) for weight in rest)]
        for own, value in zip(alone, values, strict=True):
            if "bias" in value:
                own += value["bias"]
        later = zip(self.stages[1:], rest, self.widths, self._repeats, strict=True)
        between = [_between(stage.module, w, width, *how) for stage, w, width, how in later]
        return Couplings(between, alone)


@dataclass(frozen=True)
class Couplings:
    """Sums over parameters, by the neurons that they join.

    With a number y per hidden neuron, the parameters' sum is
    E(y) = Σ_l (Σ_ij ``between[l - 1][i, j]`` y_i / y_j + Σ_i ``alone[l][i]`` y_i), where i counts
    the neurons of layer l, j those of the layer before, and y = 1 for outputs.

    Attributes:
        between: for each layer but the first, over the weights from neuron j to neuron i.
        alone: for each layer, over what no factor before it reaches: biases, weights on inputs.
    """

    between: Sequence[Tensor]
    alone: Sequence[Tensor]

    def incoming(self, layer: int, y: Sequence[Tensor]) -> Tensor:
        """Sum of what goes into each neuron of a layer, without its own y."""
        before = self.between[layer - 1] @ (1.0 / y[layer - 1]) if layer else 0.0
        sums: Tensor = self.alone[layer] + before
        return sums

    def outgoing(self, layer: int, y: Sequence[Tensor]) -> Tensor:
        """Sum of what leaves each neuron of a hidden layer, without its own y."""
        after = y[layer + 1] if layer + 1 < len(y) else torch.ones_like(self.alone[-1])
        sums: Tensor = after @ self.between[layer]
        return sums

    def on_paths(self) -> "Couplings":
        """The same, with 0 for all that no path leads through from ``alone`` to an output."""
        reached, reaching = [self.alone[0] > 0.0], [torch.ones_like(self.alone[-1]) > 0.0]
        for own, between in zip(self.alone[1:], self.between, strict=True):
            reached.append((own > 0.0) | (between @ reached[-1].to(between) > 0.0))
        for between in reversed(self.between):
            reaching.insert(0, reaching[0].to(between) @ between > 0.0)
        pairs = zip(reaching[1:], self.between, reached, strict=False)
        return Couplings(
            [to[:, None] * between * fro for to, between, fro in pairs],
            [to * own for to, own in zip(reaching, self.alone, strict=True)],
        )

    def total(self, y: Sequence[Tensor]) -> float:
        """E(y)."""
        inside = sum(float(each @ self.incoming(layer, y)) for layer, each in enumerate(y))
        return inside + float(self.incoming(len(y), y).sum())


def _between(
    module: nn.Module, weight: Tensor, width: int, count: int, channels_first: bool
) -> Tensor:
    """Sums over the weights between two layers' neurons, (neurons, neurons of the layer before)."""
    if isinstance(module, nn.Linear):
        if channels_first:
            return weight.view(len(weight), width, count).sum(2)
        return weight.view(len(weight), count, width).sum(1)
    flat = weight.flatten(2).sum(2)
    dense: Tensor = torch.block_diag(*flat.chunk(getattr(module, "groups", 1)))
    return dense


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


def _repeat(stage: Stage, following: Stage, method: str) -> tuple[int, bool]:
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
                f"{method} needs φ(c z) = c φ(z), and {name!r} is "
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
            f"{method} cannot follow neurons from {stage.name!r} into the convolution "
            f"{following.name!r}"
        )
    return 1, True
