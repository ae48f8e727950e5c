"""Random numbers: their generators, kept and put back, and the modules that draw from them.

Dropout is not always a module: attention calls it as a function, stochastic depth draws for itself.
What draws shows in the generators, whatever it is called.
"""

import random
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from teleport.errors import ClosureError
from teleport.runtime.wrappers import named_modules

OF_TORCH = {"PyTorch", "CUDA"}
GENERATORS = OF_TORCH | {"NumPy", "Python", "module"}
"""Whose they are; ``module`` for what the model's modules hold."""


class RandomState:
    """The state of all random generators a model may use, to look at and to come back to.

    Those of torch (CPU and GPU), NumPy and Python, and generators that the model's modules hold.

    Args:
        model: whose modules' own generators count, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = [(generator, generator.read()) for generator in _generators(model)]

    def restore(self) -> None:
        """Put every generator back."""
        for generator, state in self._kept:
            generator.write(state)

    def moved(self, only: Container[str] = GENERATORS) -> set[str]:
        """Whose generators something was drawn from since, of those with these names."""
        named = ((g, state) for g, state in self._kept if g.name in only)
        return {g.name for g, state in named if not _same(g.read(), state)}


def is_drawn_from(model: nn.Module, run: Callable[[], Any], state: RandomState) -> bool:
    """Whether generators differ from a state around the forward pass of any module, or at the end.

    A closure may put back at its end what its modules drew from, or seed it at its beginning.
    PyTorch's own modules draw from its generators alone, which are read much faster.
    """
    found = False

    def look(module: nn.Module, *_: Any) -> None:
        nonlocal found
        is_own = type(module).__module__.startswith("torch.nn.")
        found = found or bool(state.moved(OF_TORCH if is_own else GENERATORS))

    with _hooked(model, look, look):
        run()
    return found or bool(state.moved())


class DrewError(Exception):
    """A closure drew random numbers, and nobody has yet looked which modules did."""


def drawing_modules(model: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, set[str]]:
    """The modules in whose own forward pass random numbers are drawn, and from whose generators.

    Each is the innermost; what is drawn outside of all modules is no module's.

    Args:
        model: whose modules are watched.
        run: runs the model.
    """
    inside: list[nn.Module | None] = [None]
    found: dict[nn.Module, set[str]] = {}
    last = RandomState(model)

    def look() -> None:
        nonlocal last
        if moved := last.moved():
            if inside[-1] is not None:
                found.setdefault(inside[-1], set()).update(moved)
            last = RandomState(model)

    def enter(module: nn.Module, _: Any) -> None:
        look()
        inside.append(module)

    def leave(*_: Any) -> None:
        look()
        inside.pop()

    with _hooked(model, enter, leave):
        run()
    return found


@contextmanager
def _hooked(
    model: nn.Module, enter: Callable[..., None], leave: Callable[..., None]
) -> Iterator[None]:
    """Tell before the forward pass of a module begins, and when it has ended."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                continue
            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


class Quiet:
    """The modules that stay in evaluation mode while closures run.

    Args:
        model: what they are modules of.
        modules: the first of them.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self._model, self._modules = model, set(modules)

    def enforce(self) -> None:
        """Before each closure: the one before may have ended with ``model.train()``."""
        for module in self._modules:
            module.training = False

    def add(self, drawing: Mapping[nn.Module, set[str]]) -> bool:
        """Let modules that draw be quiet, too; whether any was not in evaluation mode.

        Raises:
            ClosureError: if the closure itself has put one of ours into training mode.
        """
        loud = {module for module in drawing if module.training}
        if again := loud & self._modules:
            names = [name or "(model)" for name, m in named_modules(self._model) if m in again]
            raise ClosureError(
                f"the closure puts {', '.join(names)} into training mode, where it draws random "
                "numbers. Call train() and eval() outside of the closure"
            )
        self._modules |= loud
        self.enforce()
        return bool(loud)


def names_of_drawing(model: nn.Module, drawing: Mapping[nn.Module, set[str]]) -> list[str]:
    """Names of the modules whose outputs are random in evaluation mode, too.

    Python's own generator does not count there: whoever asks it still draws, but does not use what
    comes; and checkers of types draw from it at every call.
    """
    noisy = [module for module, kinds in drawing.items() if kinds != {"Python"}]
    return [name or "(model)" for name, module in named_modules(model) if module in noisy]


class _Generator:
    """One random generator: whose it is, how to read its state, and how to write it."""

    def __init__(self, name: str, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        self.name, self.read, self.write = name, read, write


def _generators(model: nn.Module) -> Iterator[_Generator]:
    yield _Generator("PyTorch", torch.get_rng_state, torch.set_rng_state)
    if torch.cuda.is_initialized():
        yield _Generator("CUDA", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)
    yield _Generator("NumPy", np.random.get_state, np.random.set_state)
    yield _Generator("Python", random.getstate, random.setstate)
    for module in model.modules():
        for own in vars(module).values():
            if isinstance(own, torch.Generator):
                yield _Generator("module", own.get_state, own.set_state)
            elif isinstance(own, np.random.Generator):
                yield _of_numpy(own.bit_generator)
            elif isinstance(own, (random.Random, np.random.RandomState)):
                state, put = ("getstate", "setstate") if isinstance(own, random.Random) else (
                    "get_state", "set_state")  # fmt: skip
                yield _Generator("module", getattr(own, state), getattr(own, put))


def _of_numpy(bits: Any) -> _Generator:
    return _Generator("module", lambda: bits.state, lambda state: setattr(bits, "state", state))


def _same(a: Any, b: Any) -> bool:
    """Whether two states are equal, whatever a generator makes them of."""
    if isinstance(a, torch.Tensor):  # inside transforms of torch.func, too, where none has memory
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)) and any(isinstance(v, (torch.Tensor, np.ndarray)) for v in a):
        return all(map(_same, a, b))
    return bool(a == b)
