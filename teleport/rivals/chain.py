"""A network as a chain of weight layers, for the rivals that need to know what follows what."""

from dataclasses import dataclass

from torch import nn

from teleport.errors import UnsupportedModelError
from teleport.layers.support import Coverage, WeightMatrix
from teleport.runtime.wrappers import opened

PASSES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
"""What changes nothing inside a teleport, where dropout is off."""


@dataclass(frozen=True)
class Stage:
    """A weight layer and what is between it and the next one.

    Attributes:
        name: in the model.
        block: its weight matrix with the bias as last column.
        module: the layer.
        after: names and modules up to the next weight layer, without `PASSES`.
    """

    name: str
    block: WeightMatrix
    module: nn.Module
    after: tuple[tuple[str, nn.Module], ...]


def chain(
    model: nn.Module, coverage: Coverage, kinds: tuple[type[nn.Module], ...], method: str
) -> list[Stage]:
    """Take an ``nn.Sequential`` (nested ones are opened) apart at its weight layers.

    Args:
        model: the network.
        coverage: of the model.
        kinds: types of weight layers that ``method`` can act on.
        method: name of the method, for the errors.

    Returns:
        At least two stages, in order of execution.

    Raises:
        UnsupportedModelError: if the order of the layers cannot be known, a layer with parameters
            is of another type, is used twice, shares parameters, or is partly frozen.
    """
    if type(model) is not nn.Sequential:
        raise UnsupportedModelError(
            f"{method} has to know the order of the layers, and reads it from nn.Sequential; got "
            f"{type(model).__name__}. Pass the nn.Sequential inside it, if there is one"
        )
    leaves = list(opened(model))
    blocks = {site.module: block for site in coverage.sites for block in site.blocks}
    stages: list[Stage] = []
    for place, (name, module) in enumerate(leaves):
        if not isinstance(module, kinds):
            if any(True for _ in module.parameters()) and not isinstance(module, nn.PReLU):
                allowed = ", ".join(kind.__name__ for kind in kinds)
                raise UnsupportedModelError(
                    f"{method} cannot act through layer {name!r}, a {type(module).__name__} with "
                    f"parameters; weight layers may be {allowed}"
                )
            continue
        if module not in blocks:
            raise UnsupportedModelError(f"layer {name!r} cannot move: {coverage.frozen.get(name)}")
        bias = getattr(module, "bias", None)
        if bias is not None and not bias.requires_grad:
            raise UnsupportedModelError(
                f"layer {name!r} cannot move: its bias does not require a gradient and would have "
                "to change with its weight"
            )
        after = []
        for later_name, later in leaves[place + 1 :]:
            if isinstance(later, kinds):
                break
            if not isinstance(later, PASSES):
                after.append((later_name, later))
        stages.append(Stage(name, blocks[module], module, tuple(after)))
    if len({stage.block for stage in stages}) < len(stages):
        raise UnsupportedModelError(
            f"{method} moves every layer on its own, and here a layer is used twice or two layers "
            "share a weight"
        )
    if len(stages) < 2:
        raise UnsupportedModelError(
            f"{method} acts between two consecutive weight layers; the model has {len(stages)}"
        )
    return stages
