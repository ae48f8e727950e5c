"""The errors of the package: one small tree, every message says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class TeleportError(Exception):
    """Base class of every error this package raises on purpose."""


class ClosureError(TeleportError):
    """The closure does not return a usable loss of the teleported model."""


class NonFiniteLossError(ClosureError):
    """The closure returned NaN or an infinite loss."""


class NonFiniteInputError(ClosureError):
    """The inputs of a layer are NaN or infinite, so that they span no known space."""

    def __init__(self, layer: str = "") -> None:
        super().__init__(
            f"the input of layer {layer!r} is NaN or infinite: the space of such inputs is not "
            "known. Check the data, and the weights of the layers before"
        )


class UnsupportedModelError(TeleportError):
    """The model has no layer that teleportation could move, or one that no bound is known for."""


class GroupElementError(TeleportError):
    """A group element cannot act: it is singular, or leads out of an activation's range."""


class OptimizerStateError(TeleportError):
    """The state of an optimizer does not give a preconditioner, or not yet."""


class NullSpaceError(TeleportError):
    """A null space does not fit the model, or its file cannot be read."""


class DataError(TeleportError):
    """A data set is missing, cannot be fetched, or is not what its checksum says."""


class RunError(TeleportError):
    """An experiment cannot be run, or its records cannot be written or read."""


class BookError(TeleportError):
    """The book cannot be built: a wrong ``book.toml``, a failing cell, a warning, a broken link."""


class CheckError(TeleportError):
    """A file of exercises cannot be read, or what checking needs is not installed."""


def is_between(value: object, low: float, high: float) -> bool:
    """Whether a value is a number in the open interval; texts and NaN are in none."""
    return hasattr(value, "__float__") and low < float(value) < high


def require(name: str, value: object, valid: bool, allowed: str) -> None:
    """Raise ValueError for an argument out of range, with its value and the range."""
    if not valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@contextmanager
def os_errors_as(kind: type[TeleportError], failed: str, advice: str = "") -> Iterator[None]:
    """Say what failed where the operating system refuses something, its reason and what to do."""
    try:
        yield
    except OSError as error:
        raise kind(f"{failed}: {error.strerror or error}{advice}") from error
