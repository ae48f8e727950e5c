"""Everything a teleport could disturb in a model, and how it is put back.

Inside a `Transaction` the model is in the state teleportation needs: dropout off, nothing compiled
or fused, everything else in the user's mode. Afterwards only the moved weights may differ, and
only if the move was kept.
"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd

_WITH_DROPOUT = (_DropoutNd, nn.MultiheadAttention, nn.RNNBase)
"""What uses its ``training`` flag for dropout and for nothing else."""


class Transaction:
    """Context manager over one teleport: on leaving it the model is as before, but for commits.

    Kept bit for bit: buffers (BatchNorm statistics), ``.grad``, train and eval modes, the random
    states of torch (CPU and GPU), NumPy and Python; and the parameters, unless `commit` was called.
    An exception never commits.

    Costs one copy of the parameters, buffers and gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._committed = False

    def __enter__(self) -> "Transaction":
        self._random = _random_state()
        self._parameters = [(p, p.detach().clone()) for p in self.model.parameters()]
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._grads = [(p, p.grad, _copy(p.grad)) for p in self.model.parameters()]
        self._modes = [(m, m.training) for m in self.model.modules()]
        # Only now is anything changed: a copy that finds no memory must leave no trace.
        self._stack = ExitStack()
        self._stack.enter_context(_unfused())
        for module in self.model.modules():
            if isinstance(module, _WITH_DROPOUT):
                module.training = False
        return self

    def commit(self) -> None:
        """Keep the parameters as they are now."""
        self._committed = True

    def rewind_random(self) -> None:
        """Back to the random state at entry, so that every call of a closure draws the same."""
        _set_random_state(self._random)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        with torch.no_grad():
            if not self._committed or kind is not None:
                for parameter, copy in self._parameters:
                    parameter.copy_(copy)
            for module, name, buffer, copy in self._buffers:
                module._buffers[name] = buffer.detach_().copy_(copy)
            for parameter, grad, values in self._grads:
                parameter.grad = grad
                if grad is not None and values is not None:
                    grad.copy_(values)
        for module, training in self._modes:
            module.training = training
        _set_random_state(self._random)


@contextmanager
def _unfused() -> Iterator[None]:
    """Every layer runs as it is written in Python.

    Compiled graphs and the fast path of evaluated transformer layers would run past the replaced
    forwards, and fused attention has neither a forward-mode nor a second derivative.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _random_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": np.random.get_state(),  # noqa: NPY002 (the global state is what closures use)
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
