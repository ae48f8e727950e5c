"""A model of FSDP2 (``fully_shard``) as a plain one, for the time of a teleport.

Every rank holds some rows of every weight. A null space needs whole rows only, but a forward pass
needs whole weights: they are gathered once, each rank teleports with its own part of the batch as
under ``DistributedDataParallel``, and takes its rows of the result. Until the teleport has ended
nobody writes to the shards, so that a failure leaves them as they are. Memory meanwhile is that of
``DistributedDataParallel``: the whole model on every rank, and one copy of it.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from teleport.errors import UnsupportedModelError
from teleport.runtime.ranks import Group, Ranks, ranks_of, refuse_talking_layers
from teleport.runtime.wrappers import is_fully_sharded

_Places = list[tuple[dict[str, Any], str, Any]]
"""Where parameters stand: the table of a module, the name in it, and the parameter."""


@contextmanager
def gathered(model: nn.Module) -> Iterator[Ranks]:
    """Who teleports together; meanwhile a model of FSDP2 is a plain one on each of them.

    If the context ends without an error each rank takes its rows of what has become of the weights.

    Raises:
        UnsupportedModelError: for a model that cannot be gathered, or is spread in other ways.
    """
    if not is_fully_sharded(model):
        yield ranks_of(model)
        return
    places = _places(model)
    mesh = _checked_mesh(model, places)
    refuse_talking_layers(model)
    sharded = dict.fromkeys(parameter for _, _, parameter in places)
    whole = {p: _plain(p, p.full_tensor().detach().clone()) for p in sharded}
    with _plainly(model, places, whole):
        yield Group(mesh.get_group(), next(iter(whole.values())).device)
    with torch.no_grad():
        for parameter, values in whole.items():
            _take_rows(parameter, values)


@contextmanager
def without_values(model: nn.Module) -> Iterator[None]:
    """A model of FSDP2 as a plain one without values, to see of which layers it is made."""
    if not is_fully_sharded(model):
        yield
        return
    places = _places(model)
    _checked_mesh(model, places)
    sharded = dict.fromkeys(parameter for _, _, parameter in places)
    empty = {p: _plain(p, torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in sharded}
    with _plainly(model, places, empty):
        yield


def _places(model: nn.Module) -> _Places:
    modules: list[Any] = list(model.modules())
    for module in modules:
        if is_fully_sharded(module, itself=True):
            module.reshard()  # after a forward pass the outermost one may stand there whole
    return [
        (module._parameters, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _checked_mesh(model: nn.Module, places: _Places) -> Any:
    """The one row of devices that all parameters are spread over, or UnsupportedModelError."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    meshes: dict[Any, str] = {}
    for _, _, parameter in places:
        mesh, name = getattr(parameter, "device_mesh", None), names[parameter]
        if mesh is None:
            raise UnsupportedModelError(
                f"parameter {name!r} is not sharded while others are, so nobody knows whether it "
                "is the same on all ranks; call fully_shard on the whole model, last"
            )
        if mesh.ndim != 1 or parameter.device.type != mesh.device_type:
            raise UnsupportedModelError(
                f"parameter {name!r} is on a mesh of {mesh.ndim} dimensions (HSDP, or FSDP2 with "
                "tensor parallelism) or offloaded; a teleport gathers from one dimension of ranks, "
                "on their own devices. Teleport before fully_shard"
            )
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UnsupportedModelError(
                f"parameter {name!r} has a gradient hook and is sharded by FSDP2; remove the hook "
                "around the teleport"
            )
        meshes.setdefault(mesh, name)
    if len(meshes) != 1:
        raise UnsupportedModelError(
            f"parameters {list(meshes.values())[:2]} are sharded over different ranks; teleport "
            "before fully_shard"
        )
    for name, module in model.named_modules():
        policy = getattr(_state(module), "_mp_policy", None)
        if any(getattr(policy, kind, None) for kind in ("param_dtype", "output_dtype")):
            raise UnsupportedModelError(
                f"{name or 'the model'} has a MixedPrecisionPolicy of FSDP2, which a teleport "
                "would leave out; use torch.autocast in the closure instead"
            )
    return next(iter(meshes))


def _state(module: Any) -> Any:
    return module._get_fsdp_state() if is_fully_sharded(module, itself=True) else None


def _plain(parameter: Tensor, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


@contextmanager
def _plainly(model: nn.Module, places: _Places, plain: dict[Any, nn.Parameter]) -> Iterator[None]:
    """The model with other parameters, and without what FSDP2 has done to its modules."""
    with ExitStack() as stack:  # undone whatever happens
        for module in model.modules():
            kind = type(module)
            if is_fully_sharded(module, itself=True):
                stack.callback(setattr, module, "__class__", kind)
                module.__class__ = kind.__mro__[2]  # [FSDPLinear, FSDPModule, Linear, ...]
            for kept in ("_forward_pre_hooks", "_forward_hooks"):
                hooks = getattr(module, kept)
                stack.callback(setattr, module, kept, hooks)
                others = [(key, hook) for key, hook in hooks.items() if not _of_fsdp(hook)]
                setattr(module, kept, OrderedDict(others))
        for table, name, parameter in places:
            stack.callback(table.__setitem__, name, parameter)
            table[name] = plain[parameter]
        yield


def _of_fsdp(hook: Callable[..., Any]) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def _take_rows(parameter: Any, whole: Tensor) -> None:
    """Write this rank's part of a tensor into its shard, unless it stands there."""
    from torch.distributed.tensor import distribute_tensor  # takes a second

    mesh, placements = parameter.device_mesh, parameter.placements
    mine = distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None).to_local()
    if not torch.equal(mine, parameter.to_local()):
        parameter.to_local().copy_(mine)
