"""Run a recorded closure again with tangents: one forward-mode pass, answered from the tape."""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from importlib import import_module
from threading import RLock

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from teleport.layers.part import LinearMap
from teleport.layers.support import WeightMatrix
from teleport.recording.capture import Order, replaced
from teleport.recording.tape import Call, Tape
from teleport.runtime.closures import Closure, without_gradients
from teleport.runtime.interception import dual_parameters
from teleport.runtime.precision import as_computed

_FORWARD_MODE = RLock()
"""PyTorch has one level of forward mode for all threads; one that is inside another raises."""


def load_tangents() -> None:
    """Load what PyTorch's forward mode needs, a third of a second, before it is asked for."""
    import_module("torch._decomp.decompositions_for_jvp")


def push_tangents(
    tape: Tape,
    model: nn.Module,
    closure: Closure,
    drive: Mapping[WeightMatrix, Callable[[], Iterable[Tensor]]],
    velocity: Mapping[nn.Parameter, Tensor],
    wanted: AbstractSet[WeightMatrix] | None = None,
    done: Callable[[WeightMatrix], None] = lambda block: None,
    last: bool = False,
) -> None:
    """One forward-mode pass: fill ``x_dot`` of the tape's calls of the blocks ``wanted``.

    The closure runs again, but a covered layer returns its recorded output with the tangent
    ``W ẋ + drive``: no matrix product of the forward pass is repeated. What the closure does
    after the last wanted call (other layers, the loss) needs no tangent.

    Args:
        tape: after `Tape.backward`.
        model: the model of the closure.
        closure: the closure the tape was recorded from.
        drive: per block gives, for call after call in the shape of the output, the part of
            its tangent due to the velocity of the block's own weights. Taken when it is needed:
            an iterator that computes it then saves memory.
        velocity: tangents of the parameters in ``tape.others``.
        wanted: blocks whose tangents are needed; all by default.
        done: told each block when its last call has its tangent, and its drive was taken.
        last: no other pass will follow. If the graph has gone, the inputs go, too; else outputs go
            as soon as they have served.

    Raises:
        ClosureError: if the closure calls other layers than when it was recorded.
        NotImplementedError: if some operation has no forward-mode derivative.
    """
    wanted = set(tape.blocks) if wanted is None else wanted

    begun = False

    def run() -> None:
        nonlocal begun
        if begun:  # without gradients, which the closure needs: it has used up cotangents
            tape.remember()
        begun = True
        if last and tape.is_spent:
            tape.free_inputs()
        replay = _Replay(tape, drive, wanted, done, last and not tape.is_spent)
        others = {p: velocity[p] for p in tape.others}
        with (
            _FORWARD_MODE,
            forward_ad.dual_level(),
            dual_parameters(model, others),
            replaced(tape.sites, replay.product),
        ):
            try:
                closure()
            except _LastCallReached:
                return
        replay.order.check_end()

    try:
        without_gradients(run)
    except (NotImplementedError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:  # it did run, when it was recorded
        raise NotImplementedError(f"the closure has no forward-mode pass: {error}") from error


class _Replay:
    """Answers the products of a second run with recorded outputs and new tangents."""

    def __init__(
        self,
        tape: Tape,
        drive: Mapping[WeightMatrix, Callable[[], Iterable[Tensor]]],
        wanted: AbstractSet[WeightMatrix],
        done: Callable[[WeightMatrix], None],
        frees: bool,
    ) -> None:
        self.tape, self._done, self._frees = tape, done, frees
        self.order = Order(tape)
        self._drive = {block: iter(tangents()) for block, tangents in drive.items()}
        self._wanted = wanted
        ends = [n for n, call in enumerate(tape.calls, 1) if call.block in wanted]
        self._last = max(ends, default=len(tape.calls))

    def product(self, block: WeightMatrix, part: LinearMap, x: Tensor) -> Tensor:
        if part.bypassed() or x.numel() == 0:
            return part.compute(x)
        call = self.order.next(block, part, x)
        primal, x_dot = forward_ad.unpack_dual(x)
        if dropped := call.x.is_meta:
            call.x = as_computed(primal.detach(), call.z)
        if x_dot is not None:
            x_dot = x_dot.detach().to(call.z.dtype)
        call.x_dot = x_dot if call.block in self._wanted else None
        end = self.order.position == self._last
        with torch.no_grad():
            output, tangent = (x, x) if end else (call.output(), self._tangent(call, x_dot))
            if dropped:
                call.free_input()
            if self._frees:
                call.free_output()
            if call is self.tape.calls_of(call.block)[-1]:
                self._drive.pop(call.block)  # and the gradient in it
                self._done(call.block)  # not before its drive, which takes cotangents
        if end:
            raise _LastCallReached
        if call.constant:
            return output
        if torch.is_grad_enabled():  # the closure wants to differentiate, or to hook what it gets
            output = output + self.tape.anchor
        dual: Tensor = forward_ad.make_dual(output, tangent)
        return dual

    def _tangent(self, call: Call, x_dot: Tensor | None) -> Tensor:
        own = next(self._drive[call.block]).to(call.z.dtype)
        if x_dot is None:
            return own
        return call.part.push_onto(own, x_dot, call.part.pieces()[0].to(x_dot.dtype))


class _LastCallReached(BaseException):
    """Leaves a replayed closure early; a BaseException so that no user handler swallows it."""
