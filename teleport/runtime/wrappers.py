"""What a model is wrapped in: names and ranks without DistributedDataParallel and torch.compile."""

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from teleport.errors import UnsupportedModelError


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by name, without the wrappers of DistributedDataParallel and torch.compile.

    Raises:
        TypeError: for what is no module, and UnsupportedModelError as `parallel_part` does.
    """
    if not isinstance(model, nn.Module):
        what = model.__name__ if isinstance(model, type) else type(model).__name__
        raise TypeError(f"a model is an object of torch.nn.Module, got {what}")
    parallel = parallel_part(model)
    for name, module in (model if parallel is None else parallel.module).named_modules():
        if type(module).__name__ != "OptimizedModule":  # importing its type takes seconds
            yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module


def opened(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """What an ``nn.Sequential`` runs, in its order and by name, nested ones opened, too."""
    if type(module) is not nn.Sequential:
        yield name, module
        return
    for own, child in module._modules.items():  # named_children() names a repeated one once
        if child is not None:
            yield from opened(child, f"{name}.{own}" if name else own)


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
    refuse_pipeline(model)
    whole = getattr(model, "_orig_mod", model)  # compiled, after it was wrapped
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel) and module is not whole:
            raise UnsupportedModelError(
                "a part of the model is in DistributedDataParallel; wrap the whole model"
            )
        if isinstance(module, nn.DataParallel):
            raise UnsupportedModelError(
                "nn.DataParallel runs copies of the layers; teleport model.module and call that "
                "in the closure, or use DistributedDataParallel"
            )
        _refuse_sharded(name, module)
    return whole if isinstance(whole, DistributedDataParallel) else None


def is_fully_sharded(model: nn.Module, *, itself: bool = False) -> bool:
    """Whether ``fully_shard`` (FSDP2) was called on the model or a module in it, or on itself."""
    modules = [model] if itself or not isinstance(model, nn.Module) else model.modules()
    return any(kind.__name__ == "FSDPModule" for m in modules for kind in type(m).__mro__)


def refuse_pipeline(model: object) -> None:
    """Raise UnsupportedModelError for what runs a part of a model only."""
    if type(model).__module__.startswith("torch.distributed.pipelining"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a part of a pipeline: no rank runs the whole model, and "
            "the loss of a stage is none. Teleport the whole model before it is split"
        )


def _refuse_sharded(name: str, module: nn.Module) -> None:
    """Raise UnsupportedModelError for a module whose weights are spread over ranks."""
    own = {type(p).__name__ for p in module.parameters(recurse=False)}
    if type(module).__name__ == "FullyShardedDataParallel" or "FlatParameter" in own:
        raise UnsupportedModelError(
            f"{name or 'the model'} is in FullyShardedDataParallel (FSDP1), which keeps weights as "
            "one flat row. Shard with fully_shard (FSDP2), which Teleporter gathers by itself, or "
            "use DistributedDataParallel"
        )
    if is_fully_sharded(module, itself=True):
        inner = (n for n, m in module.named_modules() if list(m.parameters(recurse=False)))
        name = ".".join(part for part in (name, next(inner, "")) if part) or "(model)"
        raise UnsupportedModelError(
            f"layer {name!r} is sharded by FSDP2 (fully_shard): no rank holds a whole weight. "
            "Teleporter gathers such a model for the time of a step; anything else has to be done "
            "before fully_shard, or on a plain copy of the model with the gathered state_dict"
        )
    if "DTensor" in own:
        raise UnsupportedModelError(
            f"the weights of layer {name or '(model)'!r} are DTensors (tensor parallelism, "
            "parallelize_module): no rank holds a whole one, and its inputs may be spread as well. "
            "Teleport, or make the null space, before parallelize_module, or on a plain copy of "
            "the model with the gathered state_dict"
        )
