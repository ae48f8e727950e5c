"""Record a closure: run it once with the covered layers replaced.

While a closure runs, the ``forward`` of every covered layer is replaced. The replacement computes
the layer as before, notes inputs and outputs, and puts a relay into the autograd graph in place of
the layer: `record` gives a `Tape`. `watch` only looks at the inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from teleport.errors import ClosureError, NonFiniteLossError
from teleport.layers.part import LinearMap
from teleport.layers.support import CoveredModule, CoveredProduct, WeightMatrix
from teleport.layers.weight_uses import WeightUses
from teleport.recording.tape import Call, Relays, Tape
from teleport.runtime.closures import Closure, evaluate, refuse_freed
from teleport.runtime.interception import backward_forbidden, in_checkpoint, replaced_forwards
from teleport.runtime.precision import as_computed, uncached_casts

USED_OUTSIDE = "frozen: its weight is also used outside the layer"

DIFFERENTIATED = (
    "frozen: the closure takes a derivative through it, which a move with the same activations "
    "does not keep"
)

_CHECKPOINT = (
    "the closure uses activation checkpointing, whose second forward pass runs past the recorded "
    "one. Switch checkpointing off while teleporting"
)

_LEAF = 2**64 - 1
"""The number that autograd gives to what adds to the ``.grad`` of a leaf."""

_KEPT = (
    "a loss that a closure computed during a teleport holds no gradient of the layers that the "
    "teleport covers. Call the closure again for one to train on"
)


def record(
    model: nn.Module, sites: Sequence[CoveredModule], closure: Closure, once: bool = False
) -> Tape:
    """Run a closure once and record every product of the given sites.

    Args:
        model: the model whose parameters the gradient is taken in.
        sites: the layers to cover. A block whose parameters also reach the loss by another way
            is left out of the tape, and its parameters join ``others``.
        closure: returns the scalar loss; must not call ``backward``.
        once: let the graph go with ``backward``, if nobody else can need it; the tape makes it
            again where it has to.

    Returns:
        The tape, with ``backward`` done once for the present weights.

    Raises:
        ClosureError: if the closure calls ``backward`` or does not return one finite number that
            depends on the model, or if a layer receives an empty batch.
    """
    left_out: dict[WeightMatrix, str] = {}
    while True:
        kept = [site.without(left_out) for site in sites]
        try:
            tape = _record(model, kept, closure)
        except _DifferentiatedError as error:
            left_out |= dict.fromkeys(error.blocks, DIFFERENTIATED)
            continue
        if once and _is_newer(tape.loss, tape.anchor):
            tape.use_once(partial(record_again, model, closure))
        called = tape.blocks
        reached = tape.differentiate([p for block in called for p in block.parameters])
        blocks = dict.fromkeys(block for site in kept for block in site.blocks)
        leaks = [block for block in blocks if not reached.isdisjoint(block.parameters)]
        if leaks_of_called := set(leaks).intersection(called):
            left_out |= dict.fromkeys(leaks_of_called, USED_OUTSIDE)
            continue
        passed_by = {b: why for b, why in tape.left_out.items() if b not in called}
        tape.left_out = left_out | dict.fromkeys(leaks, USED_OUTSIDE) | passed_by
        return tape


def record_again(model: nn.Module, closure: Closure, tape: Tape) -> None:
    """Make the graph of a tape again, which has dropped it: layers give the outputs that it kept.

    No product is repeated, and no output kept any longer.

    Raises:
        ClosureError: if the closure calls other layers than when it was recorded, or its loss has
            no gradient.
    """
    order, relays, anchor = Order(tape), Relays(), _anchor()

    def product(block: WeightMatrix, part: LinearMap, x: Tensor) -> Tensor:
        if _passed_by(part, x):
            return part.compute(x)
        if x.numel() == 0:
            with torch.no_grad():
                z = part.compute(x)
            return z + anchor
        call = order.next(block, part, x)
        call.x = as_computed(x, call.z)
        with torch.no_grad(), uncached_casts():
            z = call.output()
        call.free_output()
        return _Relay.put(call, z, anchor, relays)

    with torch.enable_grad(), backward_forbidden(model), replaced(tape.sites, product):
        loss = evaluate(partial(_guarded, closure, relays, anchor))
    order.check_end()
    if not loss.requires_grad:
        raise _changed("its loss has no gradient now")
    relays.ended = True
    tape.loss, tape.relays, tape.anchor = loss, relays, anchor


class Order:
    """The calls of a tape, one after the other, as another run of its closure has to make them.

    Attributes:
        position: how many were made.
    """

    def __init__(self, tape: Tape) -> None:
        self._calls, self.position = tape.calls, 0

    def next(self, block: WeightMatrix, part: LinearMap, x: Tensor) -> Call:
        """The call that this is; ClosureError if it is another."""
        call = self._calls[self.position] if self.position < len(self._calls) else None
        if call is None or call.part is not part or call.x.shape != x.shape:
            shape = tuple(x.shape)
            raise _changed(f"call {self.position + 1} is now {block.name!r} on {shape}")
        self.position += 1
        return call

    def check_end(self) -> None:
        """ClosureError if calls are missing."""
        if self.position < len(self._calls):
            raise _changed(f"{len(self._calls)} layer calls became {self.position}")


def _changed(what: str) -> ClosureError:
    return ClosureError(
        f"the closure is not deterministic: {what}. It must compute the same loss at every call; "
        "draw the batch before the closure, not inside it"
    )


def watch(
    sites: Sequence[CoveredModule],
    closure: Callable[[], Any],
    see: Callable[[WeightMatrix, LinearMap, Tensor], None],
) -> dict[WeightMatrix, str]:
    """Run a closure and show every input of a covered product to ``see``.

    Returns:
        The blocks whose weights were also used in another way than by these products, and how:
        `see` has not been shown all that their weights act on.
    """
    passed_by: dict[WeightMatrix, str] = {}
    uses = WeightUses([block for site in sites for block in site.blocks])

    def product(block: WeightMatrix, part: LinearMap, x: Tensor) -> Tensor:
        if why := _passed_by(part, x):
            passed_by[block] = f"frozen: {why}"
            return part.compute(x)
        uses.look_at(x)  # another layer's weight, as in ``project(embedding.weight)``
        with uses.expected():
            z = part.compute(x)
            if x.numel():
                see(block, part, as_computed(x.detach(), z))
        return z

    with replaced(sites, product), uses:
        closure()
    return {block: passed_by.get(block, USED_OUTSIDE) for block in uses.found}


def replaced(sites: Sequence[CoveredModule], product: CoveredProduct) -> Any:
    """A context in which every covered product is left to ``product(block, part, x)``."""
    return replaced_forwards({site.module: partial(site.forward, product) for site in sites})


def _record(model: nn.Module, sites: Sequence[CoveredModule], closure: Closure) -> Tape:
    calls: list[Call] = []
    relays, anchor = Relays(), _anchor()
    empty: dict[str, torch.Size] = {}
    passed_by: dict[WeightMatrix, str] = {}

    def product(block: WeightMatrix, part: LinearMap, x: Tensor) -> Tensor:
        if why := _passed_by(part, x):
            passed_by[block] = f"frozen: {why}"
            return part.compute(x)
        if in_checkpoint():
            raise ClosureError(_CHECKPOINT)
        with torch.no_grad(), uncached_casts():
            z = part.compute(x)
        if x.numel() == 0:  # as for an expert that gets no token: nothing acts on anything
            empty[block.name] = x.shape
            return z + anchor
        x = as_computed(x, z)
        call = Call(block, part, x, z.detach(), constant=not torch.is_grad_enabled())
        calls.append(call)
        relays.called.add(block)
        return _Relay.put(call, z, anchor, relays)

    with torch.enable_grad(), backward_forbidden(model), replaced(sites, product):
        try:
            loss = evaluate(partial(_guarded, closure, relays, anchor))
        except NonFiniteLossError as error:
            if empty and not calls:
                raise _empty_batch(empty) from None
            raise NonFiniteLossError(f"{error}{_first_not_finite(calls)}") from None
        except RuntimeError as error:
            if "nference tensor" not in str(error):  # no type of its own tells it from others
                raise
            raise ClosureError(f"the closure cannot be differentiated: {error}") from error
    if empty and not calls:
        raise _empty_batch(empty)
    if not _depends_on(loss, model, calls):
        raise ClosureError(
            "the loss does not depend on this model's parameters: the closure must call the model "
            "that was given to the Teleporter, with gradients enabled"
        )
    covered = {p for call in calls for p in call.block.parameters}
    others = [p for p in model.parameters() if p.requires_grad and p not in covered]
    relays.ended = True
    return Tape(loss, calls, list(sites), others, anchor, relays, left_out=passed_by)


def _anchor() -> Tensor:
    """Needs a gradient, so that autograd reaches every relay; the oldest node of its graph."""
    with torch.enable_grad():
        return torch.zeros((), device="cpu", requires_grad=True).clone()


def _is_newer(loss: Tensor, anchor: Tensor) -> bool:
    """Whether all nodes of a graph were made since its anchor: what is freed in it is of this run.

    Each thread counts its own: a node with a number yet to come is of another one, of any time.
    """
    first, last = _number(anchor.grad_fn), _number(_anchor().grad_fn)
    seen, waiting = set[Any](), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if not first <= _number(node) <= last and _number(node) != _LEAF:
            return False
        seen.add(node)
        waiting += [next_ for next_, _ in node.next_functions]
    return True


def _number(node: Any) -> int:
    number: int = node._sequence_nr()
    return number


def _guarded(closure: Closure, relays: Relays, anchor: Tensor) -> Tensor:
    """The loss of a closure, of which nobody but the tape may take a derivative.

    A loss that was there before, or a parameter, is not the closure's to guard.
    """

    def refuse(_: Tensor) -> None:
        if not relays.asked:
            raise ClosureError(_KEPT)

    loss = closure()
    made = loss.grad_fn if isinstance(loss, Tensor) else None
    if relays.called and made is not None and _number(anchor.grad_fn) < _number(made) < _LEAF:
        loss.register_hook(refuse)
    return loss


def _passed_by(part: LinearMap, x: Tensor) -> str:
    """Why a call is not recorded; empty if it is. Tangents in here are the closure's own."""
    if why := part.bypassed():
        return why
    if not isinstance(x, Tensor):
        raise TypeError(
            f"a layer was called with a {type(x).__name__}, not with a tensor. Batches are "
            "tensors, tuples of arguments or mappings: unpack the lists of a DataLoader"
        )
    if x.layout != torch.strided:
        return "called with a sparse or nested input"
    dual = forward_ad.unpack_dual(x).tangent is not None
    return "called with forward-mode tangents" if dual else ""


def _empty_batch(shapes: Mapping[str, torch.Size]) -> ClosureError:
    name, shape = next(iter(shapes.items()))
    return ClosureError(f"layer {name!r} received an empty batch of shape {tuple(shape)}")


def _first_not_finite(calls: list[Call]) -> str:
    """Which layer made the first NaN or infinity, as the end of a message."""
    for call in calls:
        if not bool(call.x.isfinite().all()):
            return f". The input of layer {call.block.name!r} is not finite"
        if not bool(call.z.isfinite().all()):
            return f". It begins in layer {call.block.name!r}: finite inputs, outputs that are not"
    return ""


def _depends_on(loss: Tensor, model: nn.Module, calls: list[Call]) -> bool:
    if calls or not loss.requires_grad:
        return loss.requires_grad
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        grads = torch.autograd.grad(loss, trainable, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        refuse_freed(error)
        raise
    return any(g is not None for g in grads)


class _Relay(torch.autograd.Function):
    """Stands for ``z = W x`` in the graph, with the ``W`` there is when it is differentiated.

    ``anchor`` is a leaf that needs a gradient, so that autograd reaches every relay even where no
    parameter lies behind it. The block's parameters are inputs, too, so that a closure that itself
    differentiates by them arrives here; the tape takes no gradient from them.

    A relay must hold no later call: that one's input leads back to the relay, and the garbage
    collector does not see a cycle that goes through the graph.
    """

    @classmethod
    def put(cls, call: Call, z: Tensor, anchor: Tensor, relays: Relays) -> Tensor:
        """``z`` with a relay before it."""
        made = _Output(z)
        output: Tensor = cls.apply(call.x, anchor, call, made, relays, *call.block.parameters)
        return output

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        call: Call,
        made: "_Output",
        relays: Relays,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.relays, ctx.call, ctx.anchor = relays, call, anchor
        ctx.parameters = len(parameters)
        return made.z

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        if not ctx.relays.ended:
            raise _DifferentiatedError(ctx.relays.called)
        if not ctx.relays.asked:
            raise ClosureError(_KEPT)
        call.delta = delta
        grad = None
        if ctx.needs_input_grad[0]:
            weight = call.part.pieces()[0].to(delta.dtype)
            grad = call.part.pull(delta, weight, call.x.detach())
        return grad, torch.zeros_like(ctx.anchor), *[None] * (3 + ctx.parameters)


@dataclass
class _Output:
    """A tensor that autograd does not see: as an argument it would be an input of the relay."""

    z: Tensor


class _DifferentiatedError(BaseException):
    """The closure takes a derivative through recorded layers; no user handler swallows it."""

    def __init__(self, blocks: set[WeightMatrix]) -> None:
        super().__init__()
        self.blocks = blocks
