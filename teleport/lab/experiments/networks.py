"""From the entry of an experiment to its network."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from teleport.data import Dataset
from teleport.lab.experiments.models import Transformer, cnn, mlp
from teleport.lab.experiments.residual import ResidualNetwork, ResNet18
from teleport.lab.experiments.sequence import Mamba, SequenceNetwork, TTTLinear


def _transformer(dataset: Dataset, sizes: dict[str, Any]) -> nn.Module:
    tokens = dataset.kind == "tokens"
    length = dataset.input_shape[0]
    return Transformer(
        dataset.width, dataset.outputs, length, tokens=tokens, causal=tokens, **sizes
    )


def _sequence(
    block: type[nn.Module], size: str, dataset: Dataset, sizes: dict[str, Any]
) -> nn.Module:
    inner = {size: sizes.pop(size)}
    return SequenceNetwork(dataset.width, dataset.outputs, partial(block, **inner), **sizes)


MAKERS: dict[str, Callable[[Dataset, dict[str, Any]], nn.Module]] = {
    "mlp": lambda d, s: mlp(d.width, d.outputs, **s),
    "cnn": lambda d, s: cnn(image=d.input_shape[-1], classes=d.outputs, **s),
    "residual": lambda d, s: ResidualNetwork(classes=d.outputs, **s),
    "resnet18": lambda d, s: ResNet18(d.outputs, **s),
    "transformer": _transformer,
    "mamba": partial(_sequence, Mamba, "state"),
    "ttt": partial(_sequence, TTTLinear, "inner_batch"),
}
"""How a network of each kind of `teleport.lab.experiments.entry.SIZES` is made for a data set."""
