"""Everything a teleport could disturb, as one value that compares bit by bit."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """State of a model and of the random generators; two of them are equal or pytest says where.

    Not Python's generator: the run-time type checks of the tests draw from it between any two
    lines.
    """
    return {
        "weights": weights(model),
        "identity": _parameter_slots(model),
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "grads": {n: _bits(p.grad) for n, p in model.named_parameters()},
        "grad identity": {n: id(p.grad) for n, p in model.named_parameters()},
        "buffers": {n: _bits(b) for n, b in model.named_buffers()},
        "buffer identity": {n: id(b) for n, b in model.named_buffers()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: _hooks(m) for n, m in model.named_modules()},
        "parameter hooks": {n: len(p._backward_hooks or ()) for n, p in model.named_parameters()},
        "forward": {n: m.__dict__.get("forward") for n, m in model.named_modules()},
        "random": (torch.get_rng_state().numpy().tobytes(), _numpy_state()),
    }


def weights(model: nn.Module) -> dict[str, bytes | None]:
    return {n: _bits(p) for n, p in model.named_parameters()}


def all_but_weights(model: nn.Module) -> dict[str, Any]:
    state = fingerprint(model)
    del state["weights"]
    return state


def _bits(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().numpy().tobytes()


def _parameter_slots(model: nn.Module) -> dict[str, dict[str, int]]:
    return {
        name: {slot: id(p) for slot, p in module._parameters.items()}
        for name, module in model.named_modules()
    }


def _hooks(module: nn.Module) -> list[int]:
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return [id(hook) for hooks in kinds for hook in hooks.values()]


def _numpy_state() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global state is the subject)
    return (name, keys.tobytes(), *rest)
