"""What is put in the place of a model's own parts while a closure runs, and always taken out again.

Forward passes of layers, parameters with a tangent, and a guard against ``backward``.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle

from teleport.errors import ClosureError

_BACKWARD_CALLED = (
    "the closure calls backward(). It must only compute and return the loss; "
    "teleportation takes the derivatives itself and leaves .grad alone"
)


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the ``forward`` of each module; put everything back in any case.

    Replacing ``forward`` rather than hooking it lets the user's own hooks run as always, before
    and after the layer.
    """
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


@contextmanager
def backward_forbidden(model: nn.Module) -> Iterator[None]:
    """Raise if a gradient is accumulated in a parameter; `torch.autograd.grad` does not do that."""

    def refuse(_: Tensor) -> None:
        raise ClosureError(_BACKWARD_CALLED)

    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(refuse)
                stack.callback(handle.remove)
        yield


@contextmanager
def dual_parameters(model: nn.Module, velocity: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Give parameters a tangent, by a dual tensor in the place of each, for a while."""
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in velocity
    ]
    try:
        for module, name, parameter in places:
            dual = forward_ad.make_dual(parameter.detach(), velocity[parameter])
            module._parameters[name] = dual
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def in_checkpoint() -> bool:
    """Whether the caller's closure is in a part that activation checkpointing will run again."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
