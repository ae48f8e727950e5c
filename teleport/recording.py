"""Capture: one closure becomes a `Tape` of layer calls that can be differentiated again and again.

While a closure runs, the ``forward`` of every covered layer is replaced. The replacement computes
the layer as before, notes inputs and outputs, and puts a relay into the autograd graph in place of
the layer. The graph between two relays holds no weight of a covered layer, so the same graph serves
any weights: `Tape.backward` propagates cotangents through the matrices in `Tape.matrices`.

That is exact wherever the layer outputs do not change with the weights, which is what a move in the
joint null space guarantees (theorem ``thm-invariance``): the forward pass is frozen, only the
backward pass is repeated.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle

from teleport.errors import ClosureError, NonFiniteLossError
from teleport.layers.part import Part, Pieces
from teleport.layers.support import Block, Site, Use
from teleport.layers.weight_uses import WeightUses
from teleport.runtime.precision import as_computed, at_least_single, coarsest, uncached_casts
from teleport.subspace import Space

Closure = Callable[[], Tensor]
Result = TypeVar("Result")


@dataclass(eq=False)
class Call:
    """One call of a layer: what went in and came out, and what `Tape` finds out about it.

    Attributes:
        use: the block, and the part of it that was called.
        x, z: input and output as the product saw them; autocast may have lowered their dtype. The
            memory of ``z`` is the model's, which may overwrite it in place.
        constant: made without gradients, as in a frozen backbone: ``z`` is a number to the loss.
        delta: dL/dz for the matrices of the last `Tape.backward`; None if the loss ignores ``z``.
        x_dot: tangent of ``x`` from the last `Tape.push_tangents`; None if ``x`` does not depend
            on trainable parameters (theorem ``thm-fixed``).
    """

    use: Use
    x: Tensor
    z: Tensor
    constant: bool = False
    delta: Tensor | None = None
    x_dot: Tensor | None = None

    def __post_init__(self) -> None:
        if self.constant:  # nothing tells whether its memory is overwritten afterwards
            self.x, self.z = self.x.clone(), self.z.clone()
        self.version = None if self.z.is_inference() else self.z._version

    @property
    def block(self) -> Block:
        """The block whose matrix was applied."""
        return self.use.block

    @property
    def part(self) -> Part:
        """The part that applied it."""
        return self.use.part

    def weight_gradient(self) -> Tensor | None:
        """``δ xᵀ`` in the shape of the block's matrix (theorem ``thm-span``)."""
        if self.delta is None:
            return None
        gradient = self.part.weight_gradient(self.x.detach(), self.delta)
        return self.block.gradient_from(self.part, gradient)

    def survivor(self) -> Tensor | None:
        """``δ ẋᵀ``, not projected (theorem ``thm-survivor``)."""
        if self.delta is None or self.x_dot is None:
            return None
        gradient = self.part.weight_gradient(self.x_dot, self.delta, bias_input=0.0)
        return self.block.gradient_from(self.part, gradient)


@dataclass(eq=False)
class Tape:
    """A recorded closure: its loss, its layer calls in order of execution, its graph.

    Attributes:
        loss: scalar, still attached to the graph.
        calls: one entry per use of a covered layer.
        others: trainable parameters that no covered layer holds (or that leak out of one).
        moved: weights for `backward` and `push_tangents` instead of the present ones, per block.
        other_gradients: dL/dp of ``others`` from the last `backward`.
        left_out: blocks that were called and cannot be recorded, and why.
    """

    loss: Float[Tensor, ""]
    calls: list[Call]
    sites: list[Site]
    others: list[nn.Parameter]
    anchor: Tensor
    moved: dict[Block, Pieces] = field(default_factory=dict)
    other_gradients: list[Tensor] = field(default_factory=list)
    left_out: dict[Block, str] = field(default_factory=dict)
    _rows: dict[Block, Tensor] = field(default_factory=dict)
    _grams: dict[Block, Tensor] = field(default_factory=dict)
    _gradients: dict[Block, Tensor] = field(default_factory=dict)

    def pieces(self, call: Call) -> Pieces:
        """The weights of a call: those of its block in ``moved``, or the present ones."""
        pieces = self.moved.get(call.block)
        return call.part.pieces() if pieces is None else pieces[: len(call.part.slots)]

    @property
    def blocks(self) -> list[Block]:
        """Blocks that were called, in order of their first call."""
        return list(dict.fromkeys(call.block for call in self.calls))

    def calls_of(self, block: Block) -> list[Call]:
        """The calls of one block, in order of execution."""
        return [call for call in self.calls if call.block is block]

    def rows(self, block: Block) -> Float[Tensor, "*groups rows d_in"]:
        """Input rows of all calls of a block, one below the other: the transpose of R_l (8).

        Not for tied blocks, whose calls have rows of two kinds.
        """
        if block not in self._rows:
            self._rows[block] = _below(
                [call.part.rows(call.x.detach()) for call in self.calls_of(block)]
            )
        return self._rows[block]

    def rows_key(self, block: Block) -> Any:
        """Equal for two blocks only if the rows of all their calls are the same."""
        keys = tuple(call.part.rows_key(call.x.detach()) for call in self.calls_of(block))
        return block if None in keys or block.other is not None else keys

    def row_gram(self, block: Block) -> Float[Tensor, "*groups rows rows"]:
        """Inner products of all pairs of input rows."""
        if block not in self._grams:
            rows = at_least_single(self.rows(block))
            self._grams[block] = rows @ rows.mT
        return self._grams[block]

    def row_count(self, block: Block) -> int:
        """Number of input rows, without forming them."""
        return sum(call.part.row_count(call.z) for call in self.calls_of(block))

    def collect(self, block: Block, space: Space) -> None:
        """Add the inputs of all calls of a block to what ``block.space()`` returned."""
        for call in self.calls_of(block):
            block.collect(space, call.part, call.x.detach())

    def weight_gradient(self, block: Block) -> Float[Tensor, "*groups d_out d_in"]:
        """``Σ δ xᵀ`` over all calls (theorem ``thm-span``)."""
        if block not in self._gradients:
            terms = (call.weight_gradient() for call in self.calls_of(block))
            self._gradients[block] = self._sum(block, terms)
        return self._gradients[block]

    def survivor(self, block: Block) -> Float[Tensor, "*groups d_out d_in"]:
        """``Σ δ ẋᵀ`` over all calls, not projected (theorem ``thm-survivor``)."""
        return self._sum(block, (call.survivor() for call in self.calls_of(block)))

    def _sum(self, block: Block, terms: Iterable[Tensor | None]) -> Tensor:
        dtype = block.part.weight.parameter.dtype
        given = [term.to(dtype) for term in terms if term is not None]
        return sum(given[1:], given[0]) if given else block.part.matrix().zero_()

    def deltas(self, block: Block) -> Float[Tensor, "*groups rows d_out"]:
        """Cotangents of a block's outputs in the order of `rows`; 0 where the loss ignores them."""
        calls = self.calls_of(block)
        deltas = (torch.zeros_like(c.z) if c.delta is None else c.delta for c in calls)
        return _below([block.part.out_rows(delta) for delta in deltas])

    def tangents(self, block: Block) -> Float[Tensor, "*groups rows d_in"] | None:
        """Tangents of a block's input rows, bias column 0; None if no call has one."""
        calls = self.calls_of(block)
        if all(call.x_dot is None for call in calls):
            return None
        dots = (torch.zeros_like(c.x) if c.x_dot is None else c.x_dot for c in calls)
        return _below([block.part.rows(x_dot, bias_input=0.0) for x_dot in dots])

    def depends_on_parameters(self, block: Block) -> bool:
        """Whether any input of the block depends on a trainable parameter."""
        return any(call.x.requires_grad for call in self.calls_of(block))

    def computed_in(self, block: Block) -> torch.dtype:
        """The coarsest precision a block's products were computed in."""
        return coarsest(call.z.dtype for call in self.calls_of(block))

    @property
    def precision(self) -> torch.dtype:
        """The coarsest precision anything on the tape was computed in."""
        return coarsest([self.loss.dtype, *(call.z.dtype for call in self.calls)])

    def backward(self) -> None:
        """Carry dL/dz to every call; fill ``delta`` and ``other_gradients``."""
        self._differentiate([])

    def _differentiate(self, suspects: Sequence[nn.Parameter]) -> set[nn.Parameter]:
        """Backward pass; the ``others`` and ``suspects`` it reaches, not counting calls."""
        self._gradients = {}
        asked = [self.anchor, *self.others, *suspects]
        _, *grads = torch.autograd.grad(self.loss, asked, retain_graph=True, allow_unused=True)
        self.other_gradients = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self.others, grads, strict=False)
        ]
        pairs = zip([*self.others, *suspects], grads, strict=True)
        return {parameter for parameter, grad in pairs if grad is not None}

    def push_tangents(
        self,
        model: nn.Module,
        closure: Closure,
        drive: Mapping[Block, Callable[[], Iterable[Tensor]]],
        velocity: Mapping[nn.Parameter, Tensor],
        wanted: AbstractSet[Block] | None = None,
    ) -> None:
        """One forward-mode pass: fill ``x_dot`` of the calls ``wanted``.

        The closure runs again, but a covered layer returns its recorded output with the tangent
        ``W ẋ + drive``: no matrix product of the forward pass is repeated. What the closure does
        after the last wanted call (other layers, the loss) needs no tangent.

        Args:
            model: the model of the closure.
            closure: the closure this tape was recorded from.
            drive: per block gives, for call after call in the shape of the output, the part of
                its tangent due to the velocity of the block's own weights. Taken when it is needed:
                an iterator that computes it then saves memory.
            velocity: tangents of the parameters in ``others``.
            wanted: blocks whose tangents are needed; all by default.

        Raises:
            ClosureError: if the closure calls other layers than when it was recorded.
            NotImplementedError: if some operation has no forward-mode derivative.
        """
        wanted = set(self.blocks) if wanted is None else wanted

        def run() -> None:
            replay = _Replay(self, drive, wanted)
            with (
                forward_ad.dual_level(),
                _dual_parameters(model, {p: velocity[p] for p in self.others}),
                _replaced_forwards(self.sites, replay.product),
            ):
                try:
                    closure()
                except _LastCallReached:
                    return
            raise _changed(f"{len(self.calls)} layer calls became {replay.position}")

        try:
            without_gradients(run)
        except (NotImplementedError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:  # it did run, when it was recorded
            raise NotImplementedError(f"the closure has no forward-mode pass: {error}") from error


def _below(tensors: list[Tensor]) -> Tensor:
    """One below the other; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=-2)


def record(model: nn.Module, sites: Sequence[Site], closure: Closure) -> Tape:
    """Run a closure once and record every product of the given sites.

    Args:
        model: the model whose parameters the gradient is taken in.
        sites: the layers to cover. A block whose parameters also reach the loss by another way
            is left out of the tape, and its parameters join ``others``.
        closure: returns the scalar loss; must not call ``backward``.

    Returns:
        The tape, with ``backward`` done once for the present weights.

    Raises:
        ClosureError: if the closure calls ``backward`` or does not return one finite number that
            depends on the model, or if a layer receives an empty batch.
    """
    left_out: dict[Block, str] = {}
    while True:
        kept = [site.without(left_out) for site in sites]
        try:
            tape = _record(model, kept, closure)
        except _DifferentiatedError as error:
            left_out |= dict.fromkeys(error.blocks, DIFFERENTIATED)
            continue
        called = tape.blocks
        reached = tape._differentiate([p for block in called for p in block.parameters])
        blocks = dict.fromkeys(block for site in kept for block in site.blocks)
        leaks = [block for block in blocks if not reached.isdisjoint(block.parameters)]
        if leaks_of_called := set(leaks).intersection(called):
            left_out |= dict.fromkeys(leaks_of_called, USED_OUTSIDE)
            continue
        passed_by = {b: why for b, why in tape.left_out.items() if b not in called}
        tape.left_out = left_out | dict.fromkeys(leaks, USED_OUTSIDE) | passed_by
        return tape


def watch(
    sites: Sequence[Site], closure: Callable[[], Any], see: Callable[[Use, Tensor], None]
) -> dict[Block, str]:
    """Run a closure and show every input of a covered product to ``see``.

    Returns:
        The blocks whose weights were also used in another way than by these products, and how:
        `see` has not been shown all that their weights act on.
    """
    uses = WeightUses([block for site in sites for block in site.blocks])

    def product(use: Use, x: Tensor) -> Tensor:
        if _passed_by(use, x):
            return use.part.compute(x)
        uses.look_at(x)  # another layer's weight, as in ``project(embedding.weight)``
        with uses.expected():
            z = use.part.compute(x)
            if x.numel():
                see(use, as_computed(x.detach(), z))
        return z

    with _replaced_forwards(sites, product), uses:
        closure()
    return dict.fromkeys(uses.found, USED_OUTSIDE)


def without_gradients(run: Callable[[], Result]) -> Result:
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


def evaluate(closure: Closure) -> Float[Tensor, ""]:
    """Call the closure and check that it returned one finite number.

    Raises:
        ClosureError: otherwise, with what it returned.
    """
    loss = closure()
    if not isinstance(loss, Tensor):
        raise ClosureError(f"the closure returned {type(loss).__name__}, not a loss tensor")
    if loss.numel() != 1:
        raise ClosureError(
            f"the closure returned a tensor of shape {tuple(loss.shape)}; it must return one "
            "number: reduce it with .mean() or .sum()"
        )
    if not bool(loss.isfinite()):
        raise NonFiniteLossError(
            f"the closure returned {loss.item()}: from there no larger gradient can be sought. "
            "Check the batch (is it empty?) and the learning rate"
        )
    return loss.reshape(())


def _record(model: nn.Module, sites: Sequence[Site], closure: Closure) -> Tape:
    calls: list[Call] = []
    called: set[Block] = set()
    tapes: list[weakref.ref[Tape]] = []  # for the relays: the tape is made once the loss is known
    anchor = torch.zeros((), requires_grad=True)
    empty: dict[str, torch.Size] = {}
    passed_by: dict[Block, str] = {}

    def product(use: Use, x: Tensor) -> Tensor:
        if why := _passed_by(use, x):
            passed_by[use.block] = f"frozen: {why}"
            return use.part.compute(x)
        if _in_checkpoint():
            raise ClosureError(_CHECKPOINT)
        with torch.no_grad(), uncached_casts():
            z = use.part.compute(x)
        if x.numel() == 0:  # as for an expert that gets no token: nothing acts on anything
            empty[use.block.name] = x.shape
            return z + anchor
        x = as_computed(x, z)
        call = Call(use, x, z.detach(), constant=not torch.is_grad_enabled())
        calls.append(call)
        called.add(use.block)
        output: Tensor = _Relay.apply(x, anchor, called, call, [z], tapes, *use.block.parameters)
        return output

    with torch.enable_grad(), _backward_forbidden(model), _replaced_forwards(sites, product):
        try:
            loss = evaluate(closure)
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
    tape = Tape(loss, calls, list(sites), others, anchor, left_out=passed_by)
    tapes.append(weakref.ref(tape))
    return tape


def _passed_by(use: Use, x: Tensor) -> str:
    """Why a call is not recorded; empty if it is. Tangents in here are the closure's own."""
    if why := use.part.bypassed():
        return why
    dual = forward_ad.unpack_dual(x).tangent is not None
    return "called with forward-mode tangents" if dual else ""


def _empty_batch(shapes: Mapping[str, torch.Size]) -> ClosureError:
    name, shape = next(iter(shapes.items()))
    return ClosureError(f"layer {name!r} received an empty batch of shape {tuple(shape)}")


def _in_checkpoint() -> bool:
    """Whether the caller's closure is in a part that activation checkpointing will run again."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == checkpoint.__file__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


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
    grads = torch.autograd.grad(loss, trainable, retain_graph=True, allow_unused=True)
    return any(g is not None for g in grads)


class _Relay(torch.autograd.Function):
    """Stands for ``z = W x`` in the graph, with the tape's ``W`` when it is differentiated.

    ``anchor`` is a leaf that needs a gradient, so that autograd reaches every relay even where no
    parameter lies behind it. The block's parameters are inputs, too, so that a closure that itself
    differentiates by them arrives here; the tape takes no gradient from them.

    A relay must hold no later call: that one's input leads back to the relay, and the garbage
    collector does not see a cycle that goes through the graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor,
        called: set[Block],
        call: Call,
        z: list[Tensor],
        tapes: list,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.called, ctx.call, ctx.tapes, ctx.anchor = called, call, tapes, anchor
        ctx.parameters = len(parameters)
        return z.pop()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        if not ctx.tapes:
            raise _DifferentiatedError(ctx.called)
        call.delta = delta
        grad = None
        if ctx.needs_input_grad[0]:
            weight = ctx.tapes[0]().pieces(call)[0].to(delta.dtype)
            grad = call.part.pull(delta, weight, call.x.detach())
        return grad, torch.zeros_like(ctx.anchor), *[None] * (4 + ctx.parameters)


class _Replay:
    """Answers the products of a second run with recorded outputs and new tangents."""

    def __init__(
        self,
        tape: Tape,
        drive: Mapping[Block, Callable[[], Iterable[Tensor]]],
        wanted: AbstractSet[Block],
    ) -> None:
        self.tape = tape
        self.position = 0
        self._drive = {block: iter(tangents()) for block, tangents in drive.items()}
        self._wanted = wanted
        last = [n for n, call in enumerate(tape.calls, 1) if call.block in wanted]
        self._last = max(last, default=len(tape.calls))

    def product(self, use: Use, x: Tensor) -> Tensor:
        if use.part.bypassed() or x.numel() == 0:
            return use.part.compute(x)
        call = self._next(use, x)
        x_dot = forward_ad.unpack_dual(x).tangent
        if x_dot is not None:
            x_dot = x_dot.detach().to(call.z.dtype)
        call.x_dot = x_dot if call.block in self._wanted else None
        if self.position == self._last:
            raise _LastCallReached
        with torch.no_grad():
            output, tangent = _recorded_output(call), self._tangent(call, x_dot)
        if call.constant:
            return output
        if torch.is_grad_enabled():  # the closure wants to differentiate, or to hook what it gets
            output = output + self.tape.anchor
        dual: Tensor = forward_ad.make_dual(output, tangent)
        return dual

    def _next(self, use: Use, x: Tensor) -> Call:
        calls = self.tape.calls
        call = calls[self.position] if self.position < len(calls) else None
        if call is None or call.use is not use or call.x.shape != x.shape:
            name, shape = use.block.name, tuple(x.shape)
            raise _changed(f"call {self.position + 1} is now {name!r} on {shape}")
        self.position += 1
        return call

    def _tangent(self, call: Call, x_dot: Tensor | None) -> Tensor:
        own = next(self._drive[call.block]).to(call.z.dtype)
        if x_dot is None:
            return own
        return own + call.part.push(x_dot, self.tape.pieces(call)[0].to(x_dot.dtype))


def _recorded_output(call: Call) -> Tensor:
    """A copy of the output; computed again if an in-place activation has overwritten it."""
    if call.constant or call.z._version == call.version:
        return call.z.clone()
    return call.part.compute(call.x.detach()).to(call.z.dtype)


class _LastCallReached(BaseException):
    """Leaves a replayed closure early; a BaseException so that no user handler swallows it."""


class _DifferentiatedError(BaseException):
    """The closure takes a derivative through recorded layers; no user handler swallows it."""

    def __init__(self, blocks: set[Block]) -> None:
        super().__init__()
        self.blocks = blocks


USED_OUTSIDE = "frozen: its weight is also used outside the layer"
DIFFERENTIATED = (
    "frozen: the closure takes a derivative through it, which a move with the same activations "
    "does not keep"
)


_BACKWARD_CALLED = (
    "the closure calls backward(). It must only compute and return the loss; "
    "teleportation takes the derivatives itself and leaves .grad alone"
)


_CHECKPOINT = (
    "the closure uses activation checkpointing, whose second forward pass runs past the recorded "
    "one. Switch checkpointing off while teleporting"
)


def _changed(what: str) -> ClosureError:
    return ClosureError(
        f"the closure is not deterministic: {what}. It must compute the same loss at every call; "
        "draw the batch before the closure, not inside it"
    )


@contextmanager
def _replaced_forwards(
    sites: Sequence[Site], product: Callable[[Use, Tensor], Tensor]
) -> Iterator[None]:
    """Replace the ``forward`` of each site's module; put everything back in any case.

    Replacing ``forward`` rather than hooking it lets the user's own hooks run as always, before
    and after the layer.
    """
    try:
        for site in sites:
            site.module.__dict__["forward"] = partial(site.forward, product)
        yield
    finally:
        for site in sites:
            site.module.__dict__.pop("forward", None)


@contextmanager
def _backward_forbidden(model: nn.Module) -> Iterator[None]:
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
def _dual_parameters(model: nn.Module, velocity: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Give parameters a tangent, by a dual tensor in the place of each, for a while."""
    slots = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in velocity
    ]
    try:
        for module, name, parameter in slots:
            dual = forward_ad.make_dual(parameter.detach(), velocity[parameter])
            module._parameters[name] = dual
        yield
    finally:
        for module, name, parameter in slots:
            module._parameters[name] = parameter
