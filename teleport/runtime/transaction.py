"""Everything a teleport could disturb in a model, and how it is put back.

Inside a `Transaction` the model is in the state teleportation needs: dropout off, nothing compiled
or fused, everything else in the user's mode. Afterwards only the moved weights may differ, and
only if the move was kept.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Lock
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd

from teleport.runtime.randomness import (
    DrewError,
    Quiet,
    RandomState,
    drawing_modules,
    is_drawn_from,
    names_of_drawing,
)

_Result = TypeVar("_Result")

_WITH_DROPOUT = (_DropoutNd, nn.MultiheadAttention, nn.RNNBase)
"""What uses its ``training`` flag for dropout and for nothing else."""


class Transaction:
    """Context manager over one teleport: on leaving it the model is as before, but for commits.

    Kept bit for bit: buffers (BatchNorm statistics), ``.grad``, train and eval modes, what requires
    a gradient, the random states of torch (CPU and GPU), NumPy, Python and of the model's own
    generators; and the parameters, unless `commit` was called. An exception never commits, not even
    one on the way out, and does not keep the rest from being put back.

    Costs one copy of the parameters, buffers and gradients, until it is left.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._committed = False
        self._listens = False  # whether to, at every module, for which of them draws
        self._noisy: dict[str, None] = {}

    def __enter__(self) -> "Transaction":
        modules = list(self.model.modules())
        self._random = RandomState(self.model)
        parameters = list(self.model.parameters())
        self._parameters = [_Kept(p) for p in parameters]
        grads = [(p, None if p.grad is None else _Kept(p.grad)) for p in parameters]
        moving = {_memory(p) for p in parameters}  # a buffer in there moves with the parameter
        buffers = {
            buffer: _Kept(buffer)
            for module in modules
            for buffer in _present(module._buffers).values()
            if _memory(buffer) not in moving
        }
        tables: list[tuple[dict[str, Any], dict[str, Tensor]]] = [
            (table, _present(table))
            for module in modules
            for table in (module._parameters, module._buffers)
            if isinstance(table, dict)  # in TorchScript nothing can be replaced
        ]
        modes = [(module, module.training) for module in modules]
        # Only now is anything changed: a copy that finds no memory must leave no trace.
        self._stack = ExitStack()
        # Undone from the last to the first, each whatever becomes of the others.
        self._stack.push(self._undo_unless_committed)
        self._stack.callback(self._random.restore)
        for module, training in modes:
            self._stack.callback(setattr, module, "training", training)
        for table, before in tables:
            self._stack.callback(_restore_table, table, before, buffers)
        for parameter, grad in grads:
            self._stack.callback(_restore_grad, parameter, grad)
            self._stack.callback(_restore_flag, parameter, parameter.requires_grad)
        self._stack.enter_context(_unfused())
        self.quiet = Quiet(self.model, (m for m in modules if isinstance(m, _WITH_DROPOUT)))
        self.quiet.enforce()
        return self

    @property
    def kept(self) -> dict[nn.Parameter, Tensor]:
        """The values of the parameters at entry, not to be written to."""
        own = [kept for kept in self._parameters if kept.values.shape == kept.tensor.shape]
        return {kept.tensor: kept.values for kept in own}  # type: ignore[misc]

    def commit(self) -> None:
        """Keep the parameters as they are now; graphs recorded before refuse those that moved."""
        moved = [kept.tensor for kept in self._parameters if kept.moved()]
        self._committed = True  # an error from here on still undoes everything
        for parameter in moved:
            torch.autograd.graph.increment_version(parameter)

    def rewind_random(self) -> None:
        """Back to the random state at entry, so that every call of a closure draws the same."""
        self._random.restore()

    def repeatable(self, closure: Callable[[], _Result]) -> Callable[[], _Result]:
        """The closure, drawing the same random numbers at every call.

        Modules that draw in train mode are put into evaluation mode, as dropout is.

        Raises:
            DrewError: from a call that found any such module, or drew and has yet to be asked
                where; `until_quiet` begins again.
        """
        heard = False

        def call() -> _Result:
            nonlocal heard
            self.rewind_random()
            self.quiet.enforce()
            _unfused.stay_eager()
            if heard:
                return closure()
            results: list[_Result] = []
            if not self._listens:
                self._listens = is_drawn_from(
                    self.model, lambda: results.append(closure()), self._random
                )
                if self._listens:
                    raise DrewError("random numbers were drawn, by whom is yet to be seen")
                heard = True
                return results.pop()
            drawing = drawing_modules(self.model, lambda: results.append(closure()))
            if self.quiet.add(drawing):
                raise DrewError("modules of the model drew random numbers")
            heard = True
            self._noisy |= dict.fromkeys(names_of_drawing(self.model, drawing))
            return results.pop()

        return call

    def until_quiet(self, work: Callable[[], _Result]) -> tuple[_Result, str]:
        """Do work with repeatable closures, from the start for as long as modules draw in it.

        Returns:
            What it returns, and a note on the modules that are random in evaluation mode, too.
        """
        while True:
            try:
                result = work()
            except DrewError:
                for parameter in self._parameters:
                    parameter.restore()
            else:
                names = ", ".join(self._noisy)
                return result, f" (for the random numbers that {names} drew)" if names else ""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
        finally:
            self._parameters = []  # the copy goes, whoever holds on to this

    def _undo_unless_committed(self, kind: type[BaseException] | None, *_: Any) -> None:
        if not self._committed or kind is not None:
            with ExitStack() as stack:
                for parameter in self._parameters:
                    stack.callback(parameter.restore)


class _Kept:
    """A tensor as it was: its memory, how it looks at that, and what stood there."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.alias = tensor.detach()
        self.requires_grad = tensor.requires_grad
        plain = not tensor.is_meta and not tensor.is_quantized
        self.strided = tensor.layout == torch.strided and plain
        if self.strided:
            self.values = _once(self.alias).clone()
            self.size = self.alias.untyped_storage().nbytes()
        else:
            self.values, self.version = self.alias.clone(), tensor._version

    def moved(self) -> bool:
        """Whether something else stands where a trainable tensor stood."""
        if not (self.strided and self.requires_grad):
            return False
        there = self.alias.untyped_storage().nbytes() == self.size
        if not there or _place(self.tensor) != _place(self.alias):
            return True
        return not _same_bits(_once(self.alias), self.values)

    def restore(self) -> Tensor:
        """Make the tensor what it was, writing only what has changed.

        Returns:
            The tensor; or if it has become part of a graph that it cannot leave, as a view cannot,
            another one with the same memory.
        """
        tensor = self.tensor
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            if not self.strided:
                if tensor._version != self.version:
                    tensor.copy_(self.values)
                return tensor
            if self.alias.untyped_storage().nbytes() != self.size:
                self.alias.untyped_storage().resize_(self.size)
            if _place(tensor) != _place(self.alias):
                tensor.data = self.alias
            if not _same_bits(_once(self.alias), self.values):
                # Unnoticed by graphs recorded before: they find what they saw.
                _once(self.alias.data).copy_(self.values)
            if tensor.requires_grad == self.requires_grad:
                return tensor
            if tensor.is_leaf:
                return tensor.requires_grad_(self.requires_grad)
            return self.alias if tensor._is_view() else tensor.detach_()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _memory(tensor: Tensor) -> int | Tensor:
    """The same for two tensors in the same memory."""
    strided = tensor.layout == torch.strided and tensor.numel() > 0 and not tensor.is_meta
    return tensor.untyped_storage().data_ptr() if strided else tensor


def _once(tensor: Tensor) -> Tensor:
    """A view of every entry once: the axes that `Tensor.expand` repeats are cut to length one."""
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where in memory a tensor lies, and how it is laid out there."""
    memory = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return tensor.dtype, tensor.device, memory, tensor.shape, tensor.stride()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same bits: NaN equals itself, -0 is not 0."""

    def bits(tensor: Tensor) -> Tensor:
        flat = tensor.resolve_conj().resolve_neg().reshape(-1)
        if flat.stride(0) != 1:
            flat = flat.clone(memory_format=torch.contiguous_format)
        return flat.view(_INTEGERS.get(flat.element_size(), torch.int64))

    return torch.equal(bits(a), bits(b))


def _present(table: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in table.items() if tensor is not None}


def _restore_table(
    table: dict[str, Any], before: dict[str, Tensor], kept: Mapping[Tensor, _Kept]
) -> None:
    """Put a module's tensors back under their names; what has come to it since may stay."""

    def restore(name: str) -> None:
        table[name] = kept[before[name]].restore()

    table.update(before)
    with ExitStack() as stack:  # all of them, whatever becomes of one
        for name, tensor in before.items():
            if tensor in kept:
                stack.callback(restore, name)


def _restore_flag(parameter: nn.Parameter, requires_grad: bool) -> None:
    if parameter.requires_grad != requires_grad:
        parameter.requires_grad_(requires_grad)


def _restore_grad(parameter: nn.Parameter, kept: _Kept | None) -> None:
    parameter.grad = None if kept is None else kept.tensor
    if kept is not None:
        kept.restore()


def compiler_loaded() -> bool:
    """Whether this process has what compiled functions need; loading it takes two seconds."""
    return "torch._dynamo" in sys.modules


class _Unfused:
    """Every layer runs as it is written in Python.

    Compiled graphs and the fast path of evaluated transformer layers would run past the replaced
    forwards, and fused attention has neither a forward-mode nor a second derivative.

    PyTorch has one such setting for all threads. So it is made by the first who needs it and undone
    by the last: in threads that teleport at the same time, each would take the other's for the
    user's.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._eager = Lock(), set[object](), False
        self._stack = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        user = object()
        try:
            with self._lock:
                self._users.add(user)
                if len(self._users) == 1:
                    self._begin()
            yield
        finally:
            with self._lock:
                self._users.discard(user)
                if not self._users:
                    self._eager = False
                    self._stack.close()

    def stay_eager(self) -> None:
        """A closure may have been the first in this process to compile something."""
        if not self._eager and compiler_loaded():
            with self._lock:
                self._stop_compiled()

    def _begin(self) -> None:
        fast = torch.backends.mha.get_fastpath_enabled()
        self._stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        self._stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        self._stop_compiled()

    def _stop_compiled(self) -> None:
        if not self._eager and compiler_loaded():
            self._eager = True
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))


_unfused = _Unfused()
