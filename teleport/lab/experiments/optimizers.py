"""Optimizers by name: ours, those of ``torch.optim`` and of the package pytorch-optimizer."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import nn

from teleport.errors import NonFiniteLossError

Build = Callable[[Sequence[nn.Parameter], float], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Build] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adagrad": lambda parameters, lr: torch.optim.Adagrad(parameters, lr=lr),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr),
}
"""Those with a name of our own; every other name is that of a class, in any case of letters."""

EXTRA = "pytorch_optimizer"


def find_optimizer(name: str) -> Build:
    """The optimizer of this name, as a function of parameters and learning rate.

    It is one of `OPTIMIZERS`, or a class of ``torch.optim`` or of ``pytorch_optimizer`` (extra
    ``optimizers``), such as ``rmsprop``, ``AdamP``, ``diffgrad`` or ``lion``.

    Raises:
        ValueError: for a name that neither knows, and for an optimizer that needs more than
            parameters, a learning rate and one gradient per step.
    """
    lower = name.lower()
    if lower in OPTIMIZERS:
        return OPTIMIZERS[lower]
    known = _classes(torch.optim)
    extra = _of_extra()
    if lower not in known and lower not in extra:
        near = difflib.get_close_matches(lower, {*OPTIMIZERS, *known, *extra}, n=3)
        raise ValueError(
            f"unknown optimizer {name!r}; there are: {', '.join(OPTIMIZERS)}, and every class of "
            "torch.optim and of the package pytorch-optimizer "
            f"({'installed' if extra else 'not installed: pip install pytorch-optimizer'})"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    chosen = known[lower] if lower in known else extra[lower]

    def build(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = chosen(parameters, lr=lr)
        return optimizer

    _try_out(name, build)
    return build


@contextmanager
def within_range() -> Iterator[None]:
    """Around a step of an optimizer: a step too long for the parameters' type is a divergence.

    NonFiniteLossError for a number of the step beyond the range of its type, which PyTorch and
    Python report as errors of other kinds.
    """
    try:
        yield
    except (RuntimeError, OverflowError) as error:
        if isinstance(error, RuntimeError) and "without overflow" not in str(error):
            raise
        raise NonFiniteLossError(
            f"a step of the optimizer is beyond the range of its numbers ({error}); "
            "give a lower learning rate"
        ) from error


def _classes(package: ModuleType) -> dict[str, Any]:
    classes = [c for c in vars(package).values() if isinstance(c, type)]
    found = [c for c in classes if issubclass(c, torch.optim.Optimizer)]
    return {c.__name__.lower(): c for c in found if c is not torch.optim.Optimizer}


def _of_extra() -> dict[str, Any]:
    """Its classes, those that need more than one gradient per step included, and its other names.

    Names of optimizers whose own requirements are missing stand for what says so when called.
    """
    if not find_spec(EXTRA):
        return {}
    import pytorch_optimizer

    named = {
        name: partial(_load_of_extra, name) for name in pytorch_optimizer.get_supported_optimizers()
    }
    return {**_classes(pytorch_optimizer), **named}


def _load_of_extra(name: str, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import load_optimizer

    optimizer: torch.optim.Optimizer = load_optimizer(name)(*arguments, **options)
    return optimizer


@torch.random.fork_rng(devices=[])
def _try_out(name: str, build: Build) -> None:
    """Two steps on a small layer, so that an optimizer that cannot be used is refused by name."""
    layer = nn.Linear(3, 2)
    try:
        optimizer = build(list(layer.parameters()), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.ones(4, 3)).square().mean().backward()
            optimizer.step()
    except Exception as error:
        raise ValueError(
            f"optimizer {name!r} needs more than parameters, a learning rate and one gradient per "
            f"step: {type(error).__name__}: {error}"
        ) from error
