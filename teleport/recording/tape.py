"""What was recorded of a closure: its layer calls, and what the loss makes of each.

A `Tape` holds the graph of one run of the closure in which covered layers are replaced by relays
(see `capture`). The graph between two relays holds no weight of a covered layer, so it serves any
weights: `Tape.backward` propagates cotangents through those that the model has then.

That is exact wherever the layer outputs do not change with the weights, which is what a move in the
joint null space guarantees (theorem ``thm-invariance``): the forward pass is frozen, only the
backward pass is repeated.

The graph is most of what there is in memory. Where one direction alone is asked for, it goes with
the backward pass before that (`Tape.use_once`): the forward-mode pass needs the outputs of the
layers, and of these a run of the closure makes the graph again for the looks that follow.
"""

import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from teleport.layers.part import LinearMap, Pieces
from teleport.layers.support import CoveredModule, WeightMatrix
from teleport.objective import EUCLIDEAN, Metric, Shares, squared_norm
from teleport.runtime.closures import refuse_freed
from teleport.runtime.precision import at_least_single, coarsest, is_half, scaled
from teleport.subspace import Projector, RowSpace, Space, products_of_rows

Formed = dict[WeightMatrix | nn.Parameter, Tensor]
"""What is formed of a gradient: of blocks, each as its matrix, and of other parameters."""


CANCELLED = 1e-6
"""Rounding, as a share, above which a squared norm by Gram matrices is taken in float64 throughout:
near a minimum the products of a batch's cotangents are many times as large as what remains."""

LEFT = 0.02
"""Length of a gradient, as a share of those of its rows in quadrature, down to which it is that of
the tape. Nearer to a minimum another rounding of the activations is another gradient."""


@dataclass(eq=False)
class Call:
    """One call of a layer: what went in and came out, and what `Tape` finds out about it.

    Attributes:
        block: whose matrix was applied.
        part: of it, that applied the matrix.
        x, z: input and output as the product saw them; autocast may have lowered their dtype. The
            memory of ``z`` is the model's, which may overwrite it in place.
        constant: made without gradients, as in a frozen backbone: ``z`` is a number to the loss.
        depends: whether ``x`` depends on a trainable parameter; still known when ``x`` has gone.
        delta: dL/dz at the last `Tape.backward`; None if the loss ignores ``z``.
        x_dot: tangent of ``x`` from the last `push_tangents`; None if ``x`` does not depend on
            trainable parameters (theorem ``thm-fixed``).
    """

    block: WeightMatrix
    part: LinearMap
    x: Tensor
    z: Tensor
    constant: bool = False
    delta: Tensor | None = None
    x_dot: Tensor | None = None

    def __post_init__(self) -> None:
        if self.constant:  # nothing tells whether its memory is overwritten afterwards
            self.x, self.z = self.x.clone(), self.z.clone()
        self.depends = self.x.requires_grad
        self.version = None if self.z.is_inference() else self.z._version

    @property
    def intact(self) -> bool:
        """Whether ``z`` is still what it was."""
        return self.constant or (self.version is not None and self.z._version == self.version)

    def output(self) -> Tensor:
        """What ``z`` was; computed again if it was freed or an in-place activation overwrote it.

        Whoever overwrites this will find it computed again, too.
        """
        if self.constant:
            return self.z.clone()
        if self.intact:
            return self.z
        return self.part.compute(self.x.detach()).to(self.z.dtype)

    def free_output(self) -> None:
        """Keep of ``z`` what it looked like; the model may hold its memory still."""
        if not self.constant:
            self.z, self.version = torch.empty_like(self.z, device="meta"), -1

    def free_input(self) -> None:
        """Keep of ``x`` what it looked like, and with it nothing of the graph."""
        self.x = torch.empty_like(self.x, device="meta", requires_grad=False)

    def weight_gradient(self, x: Tensor | None, bias_input: float) -> Tensor | None:
        """``δ xᵀ`` of some input in the shape of the block's matrix, for the last `backward`."""
        if self.delta is None or x is None:
            return None
        gradient = self.part.weight_gradient(x, self.delta, bias_input)
        return self.block.gradient_from(self.part, gradient)


@dataclass(eq=False)
class Relays:
    """What the calls of one recording leave in its graph, and who may differentiate them.

    Attributes:
        called: the blocks so far.
        ended: whether the loss is known. A derivative before is one that the closure takes.
        asked: whether the tape asks. It takes gradients of weights from the calls: anybody else,
            with a loss that was kept, would find none.
    """

    called: set[WeightMatrix] = field(default_factory=set)
    ended: bool = False
    asked: bool = False


@dataclass(eq=False)
class Tape:
    """A recorded closure: its loss, its layer calls in order of execution, its graph.

    Attributes:
        loss: scalar, still attached to the graph.
        calls: one entry per product with a covered matrix.
        sites: the modules that were covered.
        others: trainable parameters that no covered layer holds (or that leak out of one).
        anchor: behind every relay, and older.
        relays: of its calls.
        left_out: blocks that were called and cannot be recorded, and why.
        other_gradients: dL/dp of ``others`` from the last `backward`.
        precision: the coarsest that anything was computed in.
    """

    loss: Float[Tensor, ""]
    calls: list[Call]
    sites: list[CoveredModule]
    others: list[nn.Parameter]
    anchor: Tensor
    relays: Relays
    left_out: dict[WeightMatrix, str] = field(default_factory=dict)
    other_gradients: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._calls: dict[WeightMatrix, list[Call]] = {}
        for call in self.calls:
            self._calls.setdefault(call.block, []).append(call)
        self._counts = {
            b: sum(call.part.row_count(call.z) for call in calls)
            for b, calls in self._calls.items()
        }
        self._dtypes = {
            b: coarsest(call.z.dtype for call in calls) for b, calls in self._calls.items()
        }
        self.precision = coarsest([self.loss.dtype, *self._dtypes.values()])
        self._half = is_half(self.precision)
        self._forgotten = False
        self._again: Callable[[Tape], None] | None = None
        self._once = False
        self._grams: dict[Any, Tensor] = {}  # by blocks and by the keys of their rows
        self._gradients: dict[WeightMatrix, Tensor] = {}
        self._driven: dict[WeightMatrix, Tensor] = {}  # K δ, as far as a norm was taken by it
        self._shares: dict[Metric, Shares] = {}

    @property
    def blocks(self) -> list[WeightMatrix]:
        """Blocks that were called, in order of their first call."""
        return list(self._calls)

    def calls_of(self, block: WeightMatrix) -> list[Call]:
        """The calls of one block, in order of execution."""
        return self._calls.get(block, [])

    def depends_on_parameters(self, block: WeightMatrix) -> bool:
        """Whether any input of the block depends on a trainable parameter."""
        return any(call.depends for call in self.calls_of(block))

    def computed_in(self, block: WeightMatrix) -> torch.dtype:
        """The coarsest precision a block's products were computed in."""
        return self._dtypes[block]

    # ---- inputs: the rows a block's matrix acts on

    def rows(self, block: WeightMatrix) -> Float[Tensor, "*groups rows d_in"]:
        """Input rows of all calls of a block, one below the other: the transpose of R_l (8).

        Not for tied blocks, whose calls have rows of two kinds.
        """
        return _below([call.part.rows(call.x.detach()) for call in self.calls_of(block)])

    def row_count(self, block: WeightMatrix) -> int:
        """Number of input rows, without forming them."""
        return self._counts.get(block, 0)

    def rows_key(self, block: WeightMatrix) -> Any:
        """Equal for two blocks only if the rows of all their calls are the same."""
        keys = tuple(call.part.rows_key(call.x.detach()) for call in self.calls_of(block))
        return block if None in keys or block.other is not None else keys

    def row_gram(self, block: WeightMatrix) -> Float[Tensor, "*groups rows rows"]:
        """Inner products of all pairs of input rows, float64: a basis is made of them, too.

        Blocks whose rows are the same, as queries, keys and values, have one.
        """
        if block not in self._grams:
            key = self.rows_key(block)
            if key not in self._grams:
                self._grams[key] = products_of_rows(self.rows(block))
            self._grams[block] = self._grams[key]
        return self._grams[block]

    def _single(self, rows: Tensor) -> Tensor:
        return at_least_single(rows) if self._half else rows

    def collect(self, block: WeightMatrix, space: Space) -> None:
        """Add the inputs of all calls of a block to what ``block.space()`` returned."""
        for call in self.calls_of(block):
            block.collect(space, call.part, call.x.detach())

    # ---- cotangents: one backward pass

    def backward(self) -> None:
        """Carry dL/dz to every call; fill ``delta`` and ``other_gradients``."""
        self.differentiate([])

    def differentiate(self, suspects: Sequence[nn.Parameter]) -> set[nn.Parameter]:
        """`backward`; the ``others`` and ``suspects`` it reaches, not counting calls."""
        if self._again is not None and self.is_spent:
            again, self._again = self._again, None
            again(self)
        kept = self._again is None
        self.forget()
        self._shares, self._forgotten = {}, False
        asked = [self.anchor, *self.others, *suspects]
        self.relays.asked = True
        try:
            _, *grads = torch.autograd.grad(self.loss, asked, retain_graph=kept, allow_unused=True)
        except RuntimeError as error:
            refuse_freed(error)
            raise
        finally:
            self.relays.asked = False
        if not kept:
            self.loss = self.loss.detach()
            for call in self.calls:
                call.x = call.x.detach()
        self.other_gradients = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(self.others, grads, strict=False)
        ]
        pairs = zip([*self.others, *suspects], grads, strict=True)
        return {parameter for parameter, grad in pairs if grad is not None}

    def spare(self, bases: AbstractSet[WeightMatrix], metric: Metric = EUCLIDEAN) -> None:
        """Free the cotangents that a direction in the given blocks does not need.

        Nor, where the graph has gone, the inputs: `drive` takes what is formed of them here.
        """
        for block in self._calls:
            if self._prefers_gram(block, metric):
                self.row_gram(block)
            elif block not in bases:
                self.weight_gradient(block)
                self.free(block)
            elif self.is_spent:
                self.weight_gradient(block)

    def use_once(self, again: Callable[["Tape"], None]) -> None:
        """The next derivative takes the graph with it, and another one makes it again.

        Not if an output was overwritten, which would have to be computed again.

        Args:
            again: makes the graph, from the outputs; see `record_again`.
        """
        if all(call.intact for call in self.calls):
            self._once, self._again = True, again

    @property
    def is_spent(self) -> bool:
        """Whether the graph has gone, so that the outputs have to make it again."""
        return not self.loss.requires_grad

    def free_inputs(self) -> None:
        """Free, when the graph has gone, what a forward-mode pass finds again."""
        self._grams = {b: gram for b, gram in self._grams.items() if b in self._calls}
        for call in self.calls:
            call.free_input()

    def forget(self) -> None:
        """Free what the last `backward` and forward-mode pass left, but for known shares."""
        self._gradients, self._driven = {}, {}
        for block in self._calls:
            self.free(block)

    def free(self, block: WeightMatrix) -> None:
        """Free the cotangents and tangents of one block."""
        for call in self._calls[block]:
            call.delta = call.x_dot = None
        self._forgotten = True

    def remember(self) -> None:
        """`backward` again, if anything was forgotten."""
        if self._forgotten:
            self.backward()

    def deltas(self, block: WeightMatrix) -> Float[Tensor, "*groups rows d_out"]:
        """Cotangents of a block's outputs in the order of `rows`; 0 where the loss ignores them."""
        calls, device = self.calls_of(block), block.part.weight.parameter.device
        deltas = (
            torch.zeros_like(c.z, device=device) if c.delta is None else c.delta for c in calls
        )
        return _below([block.part.out_rows(delta) for delta in deltas])

    def weight_gradient(self, block: WeightMatrix) -> Float[Tensor, "*groups d_out d_in"]:
        """``Σ δ xᵀ`` over all calls (theorem ``thm-span``)."""
        if block not in self._gradients:
            terms = (call.weight_gradient(call.x.detach(), 1.0) for call in self.calls_of(block))
            self._gradients[block] = self._sum(block, terms)
        return self._gradients[block]

    def shares(self, metric: Metric = EUCLIDEAN) -> Shares:
        """What every block and every other trainable parameter has of ``gᵀ M⁻¹ g``."""
        if metric not in self._shares:
            self.remember()
            others = zip(self.others, self.other_gradients, strict=True)
            shares: Shares = {p: metric.squared_norm(p, g) for p, g in others}
            shares |= {block: self._norm_squared(block, metric) for block in self._calls}
            self._shares[metric] = shares
        return self._shares[metric]

    def norm_squared(self, metric: Metric = EUCLIDEAN) -> float:
        """``gᵀ M⁻¹ g`` over all trainable parameters, for the last `backward`."""
        return sum(self.shares(metric).values())

    def _norm_squared(self, block: WeightMatrix, metric: Metric) -> float:
        """``‖Σ δ xᵀ‖²``, or by Gram matrices ``Σ (δδᵀ)∘(xxᵀ)``; where more follow, of the drive."""
        if not self._prefers_gram(block, metric):
            share = metric.squared_norm(block, self.weight_gradient(block))
            if not self._has_gram(block, metric):
                return share
            rounded = torch.finfo(self._dtypes[block]).eps ** 2 * self._row_squares(block)
            if rounded <= CANCELLED**2 * share:
                return share
        deltas, inputs = self._single(self.deltas(block)), self.row_gram(block)
        if not self._once and self._prefers_gram(block, metric):
            by_drive = self._norm_squared_by_drive(block, deltas, inputs)
            if by_drive is not None:
                return by_drive
        squares = deltas @ deltas.mT
        products, kind = squares * inputs, torch.finfo(deltas.dtype)
        largest = float(squares.diagonal(dim1=-2, dim2=-1).amax()) if squares.numel() else 0.0
        in_range = kind.tiny / kind.eps < largest < math.inf
        rounded = kind.eps * float(products.norm())
        if not in_range or rounded > CANCELLED * abs(float(products.sum())):
            products = (deltas.double() @ deltas.double().mT) * inputs
        return max(float(products.sum()), 0.0)

    def _norm_squared_by_drive(
        self, block: WeightMatrix, deltas: Tensor, inputs: Tensor
    ) -> float | None:
        """``Σ δ∘(K δ)``, for which `drive` is spared its product; None if it may round too much."""
        products, kind = inputs.to(deltas.dtype), torch.finfo(deltas.dtype)
        driven = self._driven[block] = products @ deltas
        share = float(torch.linalg.vecdot(driven, deltas).sum(dtype=torch.float64))
        lengths = torch.linalg.vector_norm(deltas, dim=-1)
        longest, largest = float(lengths.amax()), float(inputs.diagonal(dim1=-2, dim2=-1).amax())
        together, least = longest * longest * largest, kind.tiny / kind.eps
        if min(longest * longest, largest, together * together) <= least:
            return None
        terms = products * lengths[..., None] * lengths[..., None, :]
        rounded = kind.eps * float(torch.linalg.vector_norm(terms))
        return share if rounded <= CANCELLED * share < math.inf else None

    def cancels(self) -> bool:
        """Whether little is left of the gradients of single rows in their sum, at the last call.

        There the rounding of the forward pass changes the gradient: see `LEFT`. All rows are taken
        to be as long as they are on the average.
        """
        self.remember()
        block = self.calls[-1].block
        known = self._shares.get(EUCLIDEAN)
        share = known[block] if known else self._norm_squared(block, EUCLIDEAN)
        return LEFT * LEFT * self._row_squares(block) > share

    def _row_squares(self, block: WeightMatrix) -> float:
        """Squared norms of the gradients of single rows, summed, if rows are of the same length."""
        squares = 0.0
        for call in self.calls_of(block):
            if call.delta is not None and call.x.is_floating_point():
                delta, x = self._single(call.delta), self._single(call.x.detach())
                row = float(x.norm()) ** 2 / x.numel() * call.part.matrix_shape[-1]
                squares += float(delta.norm()) ** 2 * row
        return squares

    def formed(self) -> Formed:
        """The gradient as far as it is formed: of ``others``, and of blocks that need it."""
        formed: Formed = dict(zip(self.others, self.other_gradients, strict=True))
        return formed | self._gradients

    def distances(
        self, first: Formed, moving: Container[WeightMatrix], metric: Metric = EUCLIDEAN
    ) -> Shares | None:
        """What each part has of ``‖h - g‖²``, between an earlier gradient and the present one.

        None if one was not formed that may have changed: of a block after which some block of
        ``moving`` was called.

        Args:
            first: the earlier one, from `formed`.
            moving: the blocks that have moved since.
            metric: of the norm.
        """
        last = max(n for n, call in enumerate(self.calls) if call.block in moving)
        others = zip(self.others, self.other_gradients, strict=True)
        found: Shares = {p: metric.squared_norm(p, g - first[p]) for p, g in others if p in first}
        for block, calls in self._calls.items():
            if block in first:
                between = self.weight_gradient(block) - first[block]
                found[block] = metric.squared_norm(block, between)
            elif self.calls.index(calls[0]) >= last:
                found[block] = 0.0  # nothing behind it has moved
            else:
                return None
        return found

    def _prefers_gram(self, block: WeightMatrix, metric: Metric) -> bool:
        """Whether no gradient is formed: its Gram matrices take less time and no more memory."""
        *_, d_out, d_in = block.part.matrix_shape
        small = 2 * self.row_count(block) ** 2 <= d_in * d_out  # in float64
        return small and self._has_gram(block, metric)

    def _has_gram(self, block: WeightMatrix, metric: Metric) -> bool:
        """Whether Gram matrices serve; a preconditioner takes a gradient entry by entry."""
        if metric.inverse is not None or block.other is not None or not block.part.gram_pays:
            return False
        return self.row_count(block) < block.part.matrix_shape[-1]

    # ---- tangents: one forward-mode pass, see `replay`

    def drive(self, block: WeightMatrix, metric: Metric, scale: float) -> Iterator[Tensor]:
        """(M⁻¹ G) x, scaled, for every call: the tangents due to the block's own weights."""
        if not self._prefers_gram(block, metric):
            self.weight_gradient(block)
            velocity = metric.velocity(block, self._gradients.pop(block), scale)
            self._forgotten = True  # the inputs to form it again may be gone
            yield from self.drive_of(block, block.part.split(velocity))
            return
        calls, products = self.calls_of(block), self._driven.pop(block, None)
        if products is None:
            deltas = self._single(self.deltas(block))
            products = self.row_gram(block).to(deltas.dtype) @ deltas
        counts = [call.part.row_count(call.z) for call in calls]
        for call, rows in zip(calls, scaled(products, scale).split(counts, dim=-2), strict=True):
            yield call.part.from_out_rows(rows, call.z)

    def drive_of(self, block: WeightMatrix, velocity: Pieces) -> Iterator[Tensor]:
        """Ẇ x for every call of a block, in the shape of the outputs; each when it is asked for."""
        for call in self.calls_of(block):
            pieces = velocity[: len(call.part.slots)]
            same = tuple(piece.to(call.z.dtype) for piece in pieces)
            yield call.part.push_affine(call.x.detach(), same, call.z)

    def tangents(self, block: WeightMatrix) -> Float[Tensor, "*groups rows d_in"] | None:
        """Tangents of a block's input rows, bias column 0; None if no call has one."""
        calls = self.calls_of(block)
        if all(call.x_dot is None for call in calls):
            return None
        device = block.part.weight.parameter.device
        dots = (torch.zeros_like(c.x, device=device) if c.x_dot is None else c.x_dot for c in calls)
        return _below([block.part.rows(x_dot, bias_input=0.0) for x_dot in dots])

    def survivor(self, block: WeightMatrix) -> Float[Tensor, "*groups d_out d_in"]:
        """``Σ δ ẋᵀ`` over all calls, not projected (theorem ``thm-survivor``)."""
        terms = (call.weight_gradient(call.x_dot, 0.0) for call in self.calls_of(block))
        return self._sum(block, terms)

    def _sum(self, block: WeightMatrix, terms: Iterable[Tensor | None]) -> Tensor:
        dtype = block.part.weight.parameter.dtype
        given = [term.to(dtype) for term in terms if term is not None]
        return sum(given[1:], given[0]) if given else block.part.matrix().zero_()


def _below(tensors: list[Tensor]) -> Tensor:
    """One below the other; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=-2)


def recorded_basis(tape: Tape, block: WeightMatrix, tau: float) -> Projector:
    """The basis of the inputs that a block had, for a share ``tau`` of their energy."""
    with block.named_in_errors():
        space = block.space()
        if tau == 1.0 and isinstance(space, RowSpace):
            return _basis_of_rows(tape, block, space)
        tape.collect(block, space)
        return block.basis(space, tau)


def _basis_of_rows(tape: Tape, block: WeightMatrix, space: RowSpace) -> Projector:
    """The basis at τ = 1; no more rows are read once they span everything."""
    calls, d_in = tape.calls_of(block), block.part.matrix_shape[-1]
    count = tape.row_count(block)
    if count < d_in:
        tape.collect(block, space)
        rounded = torch.promote_types(block.part.weight.parameter.dtype, torch.float32)
        return space.basis_if_independent(tape._grams.get(block), rounded) or space.basis()
    norms = (call.part.row_norms(at_least_single(call.x.detach())) for call in calls)
    energy = sum(map(squared_norm, norms))

    def live() -> Tensor:
        return reduce(torch.logical_or, [call.part.live(call.x.detach()) for call in calls])

    enough = d_in + max(32, d_in // 4)
    for call in calls:
        for some in call.part.chunks(call.x.detach(), rows=max(512, enough)):
            space.add(call.part.rows(some))
            if space.count >= min(enough, count):
                if (full := space.basis_if_full(energy, live)) is not None:
                    return full
                enough = 4 * space.count
    return space.basis()


def multiplications(block: WeightMatrix, rows: int) -> float:
    """What a basis takes at least: the smaller Gram matrix, or as much again to decompose it.

    None on a device that is not the CPU, whose own threads are not ours to start, and none to speak
    of where inputs are tokens that are only counted.
    """
    on_cpu = block.part.weight.parameter.device.type == "cpu"
    if not on_cpu or not block.part.gram_pays:
        return 0.0
    *groups, _, d_in = block.part.matrix_shape
    return float(math.prod(groups) * min(rows, d_in) ** 2 * d_in)
