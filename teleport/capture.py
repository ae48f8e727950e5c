"""Capture: one closure becomes a `Tape` of layer calls that can be differentiated again and again.

While a closure runs, the ``forward`` of every covered layer is replaced. The replacement computes
the layer as before, notes inputs and outputs, and puts a relay into the autograd graph in place of
the layer. The graph between two relays holds no weight of a covered layer, so the same graph serves
any weights: `Tape.backward` propagates cotangents through the matrices in `Tape.matrices`.

That is exact wherever the layer outputs do not change with the weights, which is what a move in the
joint null space guarantees (theorem ``thm-invariance``): the forward pass is frozen, only the
backward pass is repeated.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from teleport.errors import ClosureError, NonFiniteLossError
from teleport.layers import LayerRule, rule_for

Closure = Callable[[], Tensor]


@dataclass(eq=False, frozen=True)
class Block:
    """One weight matrix of the model: a layer and the rule that reads it."""

    name: str
    module: nn.Module
    rule: LayerRule[Any]

    def rows(self, x: Tensor, bias_input: float = 1.0) -> Float[Tensor, "rows d_in"]:
        """See `LayerRule.rows`."""
        return self.rule.rows(self.module, x, bias_input)

    def out_rows(self, z: Tensor) -> Float[Tensor, "rows d_out"]:
        """See `LayerRule.out_rows`."""
        return self.rule.out_rows(self.module, z)

    def join(self, tensors: Sequence[Tensor]) -> Float[Tensor, "d_out d_in"]:
        """See `LayerRule.join`."""
        return self.rule.join(self.module, tensors)

    def matrix(self) -> Float[Tensor, "d_out d_in"]:
        """The present weights, copied."""
        return self.join([p.detach() for p in self.parameters()])

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """See `LayerRule.parameters`."""
        return self.rule.parameters(self.module)

    def split(self, matrix: Float[Tensor, "d_out d_in"]) -> tuple[Tensor, ...]:
        """See `LayerRule.split`."""
        return self.rule.split(self.module, matrix)


@dataclass(eq=False)
class Call:
    """One use of a block: what went in and came out, and what `Tape` finds out about it.

    Attributes:
        x, z: input and output as the layer saw them.
        delta: dL/dz for the matrices of the last `Tape.backward`; None if the loss ignores ``z``.
        x_dot: tangent of ``x`` from the last `Tape.push_tangents`; None if ``x`` does not depend
            on trainable parameters (theorem ``thm-fixed``).
    """

    block: Block
    x: Tensor
    z: Tensor
    delta: Tensor | None = None
    x_dot: Tensor | None = None


@dataclass(eq=False)
class Tape:
    """A recorded closure: its loss, its layer calls in order of execution, its graph.

    Attributes:
        loss: scalar, still attached to the graph.
        calls: one entry per use of a covered layer.
        others: trainable parameters that no covered layer holds (or that leak out of one).
        matrices: the weights `backward` uses, ``[d_out, d_in]`` per block; may be replaced.
        other_gradients: dL/dp of ``others`` from the last `backward`.
    """

    loss: Float[Tensor, ""]
    calls: list[Call]
    others: list[nn.Parameter]
    matrices: dict[Block, Tensor]
    anchor: Tensor
    other_gradients: list[Tensor] = field(default_factory=list)
    _rows: dict[Block, Tensor] = field(default_factory=dict)
    _grams: dict[Block, Tensor] = field(default_factory=dict)

    @property
    def blocks(self) -> list[Block]:
        """Blocks that were called, in order of their first call."""
        return list(dict.fromkeys(call.block for call in self.calls))

    def calls_of(self, block: Block) -> list[Call]:
        """The calls of one block, in order of execution."""
        return [call for call in self.calls if call.block is block]

    def rows(self, block: Block) -> Float[Tensor, "rows d_in"]:
        """Input rows of all calls of a block, one below the other: the transpose of R_l (8)."""
        if block not in self._rows:
            calls = self.calls_of(block)
            self._rows[block] = torch.cat([block.rows(call.x.detach()) for call in calls])
        return self._rows[block]

    def row_gram(self, block: Block) -> Float[Tensor, "rows rows"]:
        """Inner products of all pairs of input rows."""
        if block not in self._grams:
            rows = self.rows(block)
            self._grams[block] = rows @ rows.T
        return self._grams[block]

    def deltas(self, block: Block) -> Float[Tensor, "rows d_out"]:
        """Cotangents of a block's outputs in the order of `rows`; 0 where the loss ignores them."""
        calls = self.calls_of(block)
        deltas = (torch.zeros_like(c.z) if c.delta is None else c.delta for c in calls)
        return torch.cat([block.out_rows(delta) for delta in deltas])

    def tangents(self, block: Block) -> Float[Tensor, "rows d_in"] | None:
        """Tangents of a block's input rows, bias column 0; None if no call has one."""
        calls = self.calls_of(block)
        if all(call.x_dot is None for call in calls):
            return None
        dots = (torch.zeros_like(c.x) if c.x_dot is None else c.x_dot for c in calls)
        return torch.cat([block.rows(x_dot, bias_input=0.0) for x_dot in dots])

    def depends_on_parameters(self, block: Block) -> bool:
        """Whether any input of the block depends on a trainable parameter."""
        return any(call.x.requires_grad for call in self.calls_of(block))

    def backward(self) -> None:
        """Carry dL/dz to every call through ``matrices``; fill ``delta``, ``other_gradients``."""
        self._differentiate([])

    def _differentiate(self, suspects: Sequence[nn.Parameter]) -> set[nn.Parameter]:
        """Backward pass; which of the ``suspects`` the loss reaches other than through a call."""
        asked = [self.anchor, *self.others, *suspects]
        _, *grads = torch.autograd.grad(self.loss, asked, retain_graph=True, allow_unused=True)
        self.other_gradients = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self.others, grads, strict=False)
        ]
        reached = zip(suspects, grads[len(self.others) :], strict=True)
        return {p for p, g in reached if g is not None}

    def push_tangents(
        self, model: nn.Module, closure: Closure, drive: dict[Block, Float[Tensor, "rows d_out"]]
    ) -> None:
        """One forward-mode pass: fill ``x_dot`` of every call.

        The closure runs again, but a covered layer returns its recorded output with the tangent
        ``W ẋ + drive``: no matrix product of the forward pass is repeated. The pass ends at the
        last call; what the closure does after it (the loss) needs no tangent.

        Args:
            model: the model of the closure.
            closure: the closure this tape was recorded from.
            drive: ``[rows, d_out]`` per block, the part of the output's tangent due to the
                velocity of the block's own weights. ``others`` move with ``other_gradients``.

        Raises:
            ClosureError: if the closure calls other layers than when it was recorded.
        """
        replay = _Replay(self, drive)
        with (
            torch.no_grad(),
            forward_ad.dual_level(),
            _dual_parameters(model, dict(zip(self.others, self.other_gradients, strict=True))),
            _replaced_forwards(self.blocks, replay.forward_of),
        ):
            try:
                closure()
            except _LastCallReached:
                return
        raise _changed(f"{len(self.calls)} layer calls became {replay.position}")


def record(model: nn.Module, blocks: Sequence[Block], closure: Closure) -> Tape:
    """Run a closure once and record every call of the given blocks.

    Args:
        model: the model whose parameters the gradient is taken in.
        blocks: the layers to cover. A block whose parameters also reach the loss by another way
            is left out of the tape, and its parameters join ``others``.
        closure: returns the scalar loss; must not call ``backward``.

    Returns:
        The tape, with ``backward`` done once for the present weights.

    Raises:
        ClosureError: if the closure calls ``backward`` or does not return one finite number that
            depends on the model, or if a layer receives an empty batch.
    """
    tape = _record(model, blocks, closure)
    leaking = tape._differentiate([p for block in tape.blocks for p in block.parameters()])
    if leaking:
        sound = [b for b in blocks if leaking.isdisjoint(b.parameters())]
        tape = _record(model, sound, closure)
        tape.backward()
    return tape


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


def _record(model: nn.Module, blocks: Sequence[Block], closure: Closure) -> Tape:
    calls: list[Call] = []
    matrices: dict[Block, Tensor] = {}
    anchor = torch.zeros((), requires_grad=True)

    def forward_of(block: Block, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            (x,) = (*args, *kwargs.values())
            if x.numel() == 0:
                raise ClosureError(
                    f"layer {block.name!r} received an empty batch of shape {tuple(x.shape)}"
                )
            with torch.no_grad():
                z = original(x)
            call = Call(block, x, z)
            calls.append(call)
            output: Tensor = _Relay.apply(x, anchor, call, matrices)
            return output

        return forward

    with (
        torch.enable_grad(),
        _backward_forbidden(model),
        _replaced_forwards(blocks, forward_of),
    ):
        loss = evaluate(closure)
    if not _depends_on(loss, model, calls):
        raise ClosureError(
            "the loss does not depend on this model's parameters: the closure must call the model "
            "that was given to the Teleporter, with gradients enabled"
        )
    matrices.update({call.block: call.block.matrix() for call in calls})
    covered = {p for block in matrices for p in block.parameters()}
    others = [p for p in model.parameters() if p.requires_grad and p not in covered]
    return Tape(loss, calls, others, matrices, anchor)


def _depends_on(loss: Tensor, model: nn.Module, calls: list[Call]) -> bool:
    if calls or not loss.requires_grad:
        return loss.requires_grad
    trainable = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, trainable, retain_graph=True, allow_unused=True)
    return any(g is not None for g in grads)


class _Relay(torch.autograd.Function):
    """Stands for ``z = W x`` in the graph, with the ``W`` of the moment it is differentiated.

    ``anchor`` is a leaf that needs a gradient, so that autograd reaches every relay even where no
    parameter lies behind it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, call: Call, matrices: dict) -> Tensor:
        ctx.call, ctx.matrices, ctx.anchor_shape = call, matrices, anchor
        return call.z.clone()  # the copy keeps z intact under in-place activations

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        block = ctx.call.block
        if block not in ctx.matrices:
            raise ClosureError(_BACKWARD_CALLED)
        ctx.call.delta = delta
        grad = None
        if ctx.needs_input_grad[0]:
            grad = block.rule.pull(block.module, delta, ctx.matrices[block])
        return grad, torch.zeros_like(ctx.anchor_shape), None, None


class _Replay:
    """Answers the layer calls of a second run with recorded outputs and new tangents."""

    def __init__(self, tape: Tape, drive: dict[Block, Tensor]) -> None:
        self.tape = tape
        self.position = 0
        self._pieces = {
            block: list(rows.split([len(block.out_rows(c.z)) for c in tape.calls_of(block)]))
            for block, rows in drive.items()
        }

    def forward_of(self, block: Block, _: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            (x,) = (*args, *kwargs.values())
            call = self._next(block, x)
            call.x_dot = forward_ad.unpack_dual(x).tangent
            if self.position == len(self.tape.calls):
                raise _LastCallReached
            dual: Tensor = forward_ad.make_dual(call.z.clone(), self._output_tangent(call))
            return dual

        return forward

    def _next(self, block: Block, x: Tensor) -> Call:
        calls = self.tape.calls
        call = calls[self.position] if self.position < len(calls) else None
        if call is None or call.block is not block or call.x.shape != x.shape:
            raise _changed(f"call {self.position + 1} is now {block.name!r} on {tuple(x.shape)}")
        self.position += 1
        return call

    def _output_tangent(self, call: Call) -> Tensor:
        rule, module = call.block.rule, call.block.module
        own = rule.from_out_rows(module, self._pieces[call.block].pop(0), call.z)
        if call.x_dot is None:
            return own
        return own + rule.push(module, call.x_dot, self.tape.matrices[call.block])


class _LastCallReached(BaseException):
    """Leaves a replayed closure early; a BaseException so that no user handler swallows it."""


_BACKWARD_CALLED = (
    "the closure calls backward(). It must only compute and return the loss; "
    "teleportation takes the derivatives itself and leaves .grad alone"
)


def _changed(what: str) -> ClosureError:
    return ClosureError(
        f"the closure is not deterministic: {what}. It must compute the same loss at every call; "
        "draw the batch before the closure, not inside it"
    )


@contextmanager
def _replaced_forwards(
    blocks: Sequence[Block],
    forward_of: Callable[[Block, Callable[..., Tensor]], Callable[..., Tensor]],
) -> Iterator[None]:
    """Replace the ``forward`` of each block's module; put everything back in any case.

    Replacing ``forward`` rather than hooking it lets the user's own hooks run as always, before
    and after the layer.
    """
    before = {block.module: block.module.__dict__.get("forward") for block in blocks}
    try:
        for block in blocks:
            block.module.__dict__["forward"] = forward_of(block, block.module.forward)
        yield
    finally:
        for module, own in before.items():
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own


@contextmanager
def _backward_forbidden(model: nn.Module) -> Iterator[None]:
    """Raise if a gradient arrives at a parameter, before it is accumulated."""

    def refuse(_: Tensor) -> None:
        raise ClosureError(_BACKWARD_CALLED)

    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                handle: RemovableHandle = parameter.register_hook(refuse)
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


def find_blocks(model: nn.Module) -> tuple[list[Block], dict[str, str]]:
    """The layers teleportation can cover, and why it leaves the others alone.

    Args:
        model: any module.

    Returns:
        The blocks in the order of ``named_modules``, and for every other module that holds
        parameters of its own its name and the reason it stays frozen.
    """
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    blocks, frozen = [], {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        rule = rule_for(module)
        if rule is None:
            frozen[name] = f"no rule for {type(module).__name__}"
        elif shared := [o for p in own for o in owners[p] if o != name]:
            frozen[name] = f"shares a parameter with {shared[0]!r}"
        elif not rule.parameters(module)[0].requires_grad:
            frozen[name] = "its weight does not require a gradient"
        else:
            blocks.append(Block(name, module, rule))
    return blocks, frozen
