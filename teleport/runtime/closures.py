"""A user's closure: called, checked, and with gradients only where it needs them."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from teleport.errors import ClosureError, NonFiniteLossError

Closure = Callable[[], Tensor]
"""Returns the scalar loss of a batch."""

_Result = TypeVar("_Result")


def closures_of(given: Any) -> Iterable[Any]:
    """What a user gave as one closure or as an iterable of them; each is yet to be checked.

    Raises:
        TypeError: for something else.
    """
    if not isinstance(given, Iterable) or isinstance(given, Tensor):
        return [require_closure(given)]
    return [given] if callable(given) else given


def require_closure(given: Any) -> Callable[[], Any]:
    """The same, or TypeError if it is no function."""
    if not callable(given):
        raise TypeError(
            "a closure is a function without arguments that runs the model, as lambda: "
            f"model(inputs), got {type(given).__name__}"
        )
    found: Callable[[], Any] = given
    return found


def evaluate(closure: Closure) -> Float[Tensor, ""]:
    """Call the closure and check that it returned one finite number.

    Raises:
        ClosureError: otherwise, with what it returned.
    """
    loss = closure()
    if isinstance(loss, Tensor) and loss.is_meta:
        raise ClosureError(
            "the closure returned a tensor without values, on the device meta: load the model's "
            "weights first, as by model.to_empty(device=...) and model.load_state_dict(...)"
        )
    if not isinstance(loss, Tensor):
        raise ClosureError(f"the closure returned {type(loss).__name__}, not a loss tensor")
    if loss.numel() != 1:
        raise ClosureError(
            f"the closure returned a tensor of shape {tuple(loss.shape)}; it must return one "
            "number: reduce it with .mean() or .sum()"
        )
    if loss.is_complex():
        raise ClosureError(f"the closure returned {loss.dtype}: a loss is real; return loss.real")
    if not bool(loss.isfinite()):
        raise NonFiniteLossError(
            f"the closure returned {loss.item()}: from there no larger gradient can be sought. "
            "Check the batch (is it empty?) and the learning rate"
        )
    return loss.reshape(())


def refuse_freed(error: RuntimeError) -> None:
    """Say what is wrong where a loss is differentiated of which a part was computed before.

    Raises:
        ClosureError: if ``backward`` has freed that part; nothing but the text tells it.
    """
    if "backward through the graph a second time" in str(error):
        raise ClosureError(
            "a part of the loss was computed before the closure was called, and backward() has "
            "freed its graph. The closure must run the whole model itself, at every call"
        ) from error


def without_gradients(run: Callable[[], _Result]) -> _Result:
    """Run without gradients; with them if the forward pass itself needs them.

    It does where it registers hooks on activations, or takes a derivative, as of an energy. Then it
    is run a second time.
    """
    try:
        with torch.no_grad():
            return run()
    except (NotImplementedError, torch.OutOfMemoryError):
        raise
    except RuntimeError:
        with torch.enable_grad():
            return run()
