"""What a model is wrapped in: names and ranks without DistributedDataParallel and torch.compile."""

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from teleport.errors import UnsupportedModelError


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by name, without the wrappers of DistributedDataParallel and torch.compile."""
    parallel = parallel_part(model)
    for name, module in (model if parallel is None else parallel.module).named_modules():
        if type(module).__name__ != "OptimizedModule":  # importing its type takes seconds
            yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def holder_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """The module that holds a parameter, by its name in `Coverage`; the first of several."""
    holders: dict[nn.Parameter, str] = {}
    for name, module in named_modules(model):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, name)
    return holders


def parallel_part(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper, if the model is in `DistributedDataParallel`; names leave it out.

    Raises:
        UnsupportedModelError: for other ways to spread a model, with what to do.
    """
    whole = getattr(model, "_orig_mod", model)  # compiled, after it was wrapped
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, DistributedDataParallel) and module is not whole:
            raise UnsupportedModelError(
                "a part of the model is in DistributedDataParallel; wrap the whole model"
            )
        if isinstance(module, nn.DataParallel):
            raise UnsupportedModelError(
                "nn.DataParallel runs copies of the layers; teleport model.module and call that "
                "in the closure, or use DistributedDataParallel"
            )
        if kind == "FullyShardedDataParallel" or any(
            type(p).__name__ in ("DTensor", "FlatParameter")
            for p in module.parameters(recurse=False)
        ):
            raise UnsupportedModelError(
                "the model's parameters are sharded (FSDP or DTensor): no rank holds a whole "
                "weight matrix. Use DistributedDataParallel, or gather the parameters into a "
                "plain copy of the model, teleport that, and load its state_dict back"
            )
    return whole if isinstance(whole, DistributedDataParallel) else None
