"""One weight matrix of a layer: rows, matrix, outputs, in the one shape convention of `rule`.

`LinearMap` is what all kinds have in common, `DenseMap` the plain one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from teleport.subspace import RowSpace, Space, aligned_mm, empty_aligned

PIECES = 8
"""Into which cotangents are cut where something of their own size is made of them."""

CHUNK = 4096
"""Rows decomposed at a time: enough for fast products, few enough to stay in the cache."""


Pieces = tuple[Tensor, ...]
"""A value for each slot of a part, in the slots' shapes: its weight, and its bias if that moves."""


@dataclass(frozen=True, eq=False)
class ParameterSlice:
    """A parameter of a module, or some of its rows, that is one piece of a part's matrix.

    Attributes:
        module: holds the parameter.
        name: of the parameter in the module.
        rows: which rows.
    """

    module: nn.Module
    name: str
    rows: slice = field(default_factory=lambda: slice(None))

    @property
    def parameter(self) -> Any:
        """What the module holds now: its parameter, or in a forward-mode pass a dual tensor."""
        return getattr(self.module, self.name)

    def of(self, tensor: Tensor) -> Tensor:
        """The same piece of a tensor in the parameter's shape (a view)."""
        return tensor if self.rows == slice(None) else tensor[self.rows]

    @property
    def key(self) -> tuple[int, range]:
        """Equal for two slots exactly if they are the same piece."""
        return id(self.parameter), self._range()

    def overlaps(self, other: "ParameterSlice") -> bool:
        """Whether two pieces of one parameter have rows in common."""
        return bool(set(self._range()) & set(other._range()))

    def _range(self) -> range:
        return range(*self.rows.indices(len(self.parameter)))


class LinearMap(ABC):
    """One weight matrix of a module. Only `put` and `write` change the parameters.

    Attributes:
        name: distinguishes the parts of a module; empty if there is one.
        slots: the pieces of parameters the matrix is made of, weight first. A bias that does not
            require a gradient is a constant: it has no slot, no column, and does not move.
        parameters: those of the slots, as they were when the part was made.
        has_bias_column: whether the bias moves with the weights.
        orientation: ``"upright"`` if a two-dimensional weight is stored as the matrix,
            ``"transposed"`` if as its transpose, else empty. One of each can share a weight.
        gram_pays: whether inner products of rows are cheaper than the matrix if rows < d_in.
    """

    orientation: str = ""
    gram_pays: bool = True

    def __init__(self, name: str, weight: ParameterSlice, bias: ParameterSlice | None) -> None:
        self.name = name
        self.weight = weight
        self.bias = bias
        moves = bias is not None and bias.parameter.requires_grad
        self.slots = (weight, bias) if bias is not None and moves else (weight,)
        self.parameters = tuple(slot.parameter for slot in self.slots)
        self.has_bias_column = len(self.slots) == 2
        self._own = [(s, s.parameter) for s in (weight, bias) if s is not None]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two parts exactly if one matrix with one set of rows can stand for both."""
        return (type(self), *(slot.key for slot in self.slots))

    @cached_property
    def matrix_shape(self) -> torch.Size:
        """``[*groups, d_out, d_in]``."""
        return self.join([torch.empty_like(p, device="meta") for p in self.pieces()]).shape

    def bypassed(self) -> str:
        """Why a call of the layer now is none of this matrix on plain inputs; empty if it is."""
        if any(slot.parameter is not own for slot, own in self._own):
            return "called with other weights than its own"
        if torch._C._functorch.maybe_current_level() is not None:
            return "called inside a torch.func transform, such as vmap"
        return ""

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """``W x + b`` with the present parameters, as the module computes it."""

    @abstractmethod
    def rows(self, x: Tensor, bias_input: float = 1.0) -> Float[Tensor, "*groups rows d_in"]:
        """Inputs as rows; ``bias_input`` is 1 for inputs and 0 for their tangents."""

    def space(self) -> Space:
        """An empty collector for `collect`."""
        return RowSpace()

    def collect(self, space: Any, x: Tensor) -> None:
        """Add the rows of an input to what `space` returned."""
        for some in self.chunks(x):
            space.add(self.rows(some), keep=self.has_bias_column)  # which has made a copy

    def chunks(self, x: Tensor, rows: int = CHUNK) -> Sequence[Tensor]:
        """The input cut into pieces with about so many rows each, where it can be."""
        return [x]

    def live(self, x: Tensor) -> Bool[Tensor, "*groups d_in"]:
        """Which columns of the rows of an input are anything but 0."""
        found = [(self.rows(some) != 0).any(dim=-2) for some in self.chunks(x)]
        return torch.stack(found).any(dim=0)

    def rows_key(self, x: Tensor) -> Any:
        """Equal for two inputs, both alive, only if their rows are the same; or None."""
        return None

    def collect_none(self, space: Any) -> None:
        """Make a space that may be empty that of no inputs at all: of rank 0."""
        *groups, _, d_in = self.matrix_shape
        space.add(self.weight.parameter.new_zeros(*groups, 1, d_in).detach())

    def row_norms(self, x: Tensor) -> Float[Tensor, "*groups rows"]:
        """Norms of the rows that take part in products, which round."""
        norms: Tensor = torch.linalg.vector_norm(self.rows(x), dim=-1)
        return norms

    def out_norms(self, pieces: Pieces) -> Float[Tensor, "*groups d_out"]:
        """Norms of the rows of the matrix of these pieces."""
        norms: Tensor = torch.linalg.vector_norm(self.join(pieces), dim=-1)
        return norms

    def weighted_norms(
        self, z: Tensor, weights: Float[Tensor, "*groups d_out"]
    ) -> Float[Tensor, "*groups rows"]:
        """Norms of the rows of `out_rows` with a weight for every output."""
        pieces = self.out_rows(z).tensor_split(PIECES, dim=-2)
        norms = [torch.linalg.vector_norm(some * weights[..., None, :], dim=-1) for some in pieces]
        return torch.cat(norms, dim=-1)

    @abstractmethod
    def out_rows(self, z: Tensor) -> Float[Tensor, "*groups rows d_out"]:
        """Outputs, or cotangents of outputs, as rows in the order of `rows`."""

    def row_count(self, z: Tensor) -> int:
        """How many rows an output has, without forming them."""
        return z.numel() // math.prod(self.matrix_shape[:-1])

    @abstractmethod
    def from_out_rows(self, rows: Float[Tensor, "*groups rows d_out"], like: Tensor) -> Tensor:
        """Rows in the shape of the output ``like``: undoes `out_rows`."""

    @abstractmethod
    def join(self, tensors: Sequence[Tensor]) -> Float[Tensor, "*groups d_out d_in"]:
        """Tensors in the shapes (and order) of `slots` as one new matrix."""

    @abstractmethod
    def split(self, matrix: Float[Tensor, "*groups d_out d_in"]) -> tuple[Tensor, ...]:
        """A matrix as tensors in the shapes (and order) of `slots`: undoes `join`."""

    @abstractmethod
    def push(self, x: Tensor, weight: Tensor) -> Tensor:
        """``W x`` without the bias, for a weight in the parameter's shape.

        Carries a tangent of the inputs to the outputs.
        """

    def push_onto(self, z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """`push` added to ``z``, in place."""
        return z.add_(self.push(x, weight))

    def push_affine(self, x: Tensor, pieces: Pieces, like: Tensor) -> Tensor:
        """``W x + b`` for given pieces, in the shape of the output ``like``."""
        z = self.push(x, pieces[0])
        if not self.has_bias_column:
            return z
        bias = self.join(pieces)[..., None, :, -1]
        rows = bias.expand(*bias.shape[:-2], self.out_rows(like).shape[-2], -1)
        return z + self.from_out_rows(rows, like)

    def pull(self, delta: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """``Wᵀ δ``: carries a cotangent of the outputs to the inputs, in the shape of ``x``."""
        return carried_back(lambda x: self.push(x, weight), x)[1](delta)

    def weight_gradient(
        self, x: Tensor, delta: Tensor, bias_input: float = 1.0
    ) -> Float[Tensor, "*groups d_out d_in"]:
        """``Σ δ xᵀ`` over the rows."""
        return aligned_mm(self.out_rows(delta).mT, self.rows(x, bias_input))

    def of(self, tensors: Mapping[nn.Parameter, Tensor]) -> Float[Tensor, "*groups d_out d_in"]:
        """The part's matrix of a value per parameter, for example of a gradient."""
        return self.join(self.pieces_of(tensors))

    def pieces_of(self, tensors: Mapping[nn.Parameter, Tensor]) -> Pieces:
        """The part's share of a value per parameter."""
        return tuple(slot.of(tensors[slot.parameter]) for slot in self.slots)

    def pieces(self) -> Pieces:
        """The present weights: views of the parameters."""
        return tuple(slot.of(slot.parameter.detach()) for slot in self.slots)

    def matrix(self) -> Float[Tensor, "*groups d_out d_in"]:
        """The present weights, copied."""
        return self.join(self.pieces())

    def put(
        self, pieces: Pieces, changes: Sequence[tuple[Pieces, float]] = (), noticed: bool = True
    ) -> None:
        """Put values into the parameters, in place, with changes added, each times its factor.

        A graph that holds the parameters for its backward pass refuses them from then on, unless
        the change is not to be ``noticed``.
        """
        for number, slot in enumerate(self.slots):
            parameter = slot.parameter.detach() if noticed else slot.parameter.data
            place, value = slot.of(parameter), pieces[number]
            with torch.no_grad():  # whatever the values were made from
                for change, factor in changes:
                    value = torch.add(value, change[number], alpha=factor, out=place)
                if value is not place:
                    place.copy_(value)

    def write(self, matrix: Float[Tensor, "*groups d_out d_in"]) -> None:
        """Put a matrix into the parameters, in place."""
        self.put(self.split(matrix))


class DenseMap(LinearMap):
    """``z = W x + b`` over any leading axes: ``x [..., features]`` gives one row per position.

    ``W`` is ``[out, in]``, or with ``transposed`` ``[in, out]`` as GPT-2 stores it; axes of the
    weight after the first count as one.
    """

    def __init__(
        self,
        name: str,
        weight: ParameterSlice,
        bias: ParameterSlice | None,
        transposed: bool = False,
    ) -> None:
        super().__init__(name, weight, bias)
        self.transposed = transposed
        if weight.parameter.dim() == 2:
            self.orientation = "transposed" if transposed else "upright"
        self.shape = weight.of(weight.parameter).shape
        self.d_out, self.features = self._upright(weight.of(weight.parameter)).shape

    @cached_property
    def matrix_shape(self) -> torch.Size:
        return torch.Size((self.d_out, self.features + self.has_bias_column))

    def compute(self, x: Tensor) -> Tensor:
        weight = self._upright(self.weight.of(self.weight.parameter))
        bias = None if self.bias is None else self.bias.of(self.bias.parameter)
        return functional.linear(x, weight, bias)

    def rows(self, x: Tensor, bias_input: float = 1.0) -> Tensor:
        return with_bias_column(x.reshape(-1, self.features), bias_input, self.has_bias_column)

    def out_rows(self, z: Tensor) -> Tensor:
        return z.reshape(-1, self.d_out)

    def from_out_rows(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(like.shape)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([self._upright(tensors[0]), *(t[:, None] for t in tensors[1:])], dim=1)

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        weight = matrix[:, : self.features]
        weight = (weight.T if self.transposed else weight).reshape(self.shape)
        return (weight, matrix[:, self.features]) if self.has_bias_column else (weight,)

    def push(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ self._upright(weight).T

    def push_onto(self, z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, self.features)
        z.view(-1, self.d_out).addmm_(rows, self._upright(weight).T)  # no second output
        return z

    def push_affine(self, x: Tensor, pieces: Pieces, like: Tensor) -> Tensor:
        bias = [piece.contiguous() for piece in pieces[1:]]  # else it is added in a second pass
        return functional.linear(x, self._upright(pieces[0]), *bias)

    def pull(self, delta: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return delta @ self._upright(weight)

    def weight_gradient(self, x: Tensor, delta: Tensor, bias_input: float = 1.0) -> Tensor:
        delta, x = self.out_rows(delta), x.reshape(-1, self.features)
        if not self.has_bias_column:
            return aligned_mm(delta.T, x)
        gradient = empty_aligned(delta, self.d_out, self.features + 1)
        torch.mm(delta.T, x, out=gradient[:, :-1])  # no copy of the rows with their column of 1
        gradient[:, -1] = delta.sum(0) * bias_input if bias_input else 0.0
        return gradient

    def chunks(self, x: Tensor, rows: int = CHUNK) -> Sequence[Tensor]:
        return torch.split(x.reshape(-1, self.features), rows)

    def rows_key(self, x: Tensor) -> Any:
        flat = x.reshape(-1, self.features)
        place = (x.data_ptr(), x.shape, x.stride()) if x.numel() else None
        return (DenseMap, flat.shape, self.has_bias_column, place)

    def row_norms(self, x: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(x.reshape(-1, self.features), dim=-1)
        return norms.square().add(1.0).sqrt() if self.has_bias_column else norms

    def out_norms(self, pieces: Pieces) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self._upright(pieces[0]), dim=-1)
        return torch.hypot(norms, pieces[1]) if len(pieces) == 2 else norms

    @property
    def key(self) -> tuple[Any, ...]:
        return (*super().key, self.transposed)

    def _upright(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight.flatten(1)


def carried_back(
    function: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The value of a function, and what carries cotangents of it to its argument.

    As ``torch.func.vjp``, which loads PyTorch's compiler: two seconds in the first step; cotangents
    as an argument of ``grad`` load a quarter of a second's.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = function(x)

    def carry(delta: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad((value * delta).sum(), x)[0]

    return value.detach(), carry


def optional_slice(
    module: nn.Module, name: str, rows: slice | None = None
) -> ParameterSlice | None:
    """A slot for a parameter that may be absent, as biases may."""
    if getattr(module, name, None) is None:
        return None
    return ParameterSlice(module, name, slice(None) if rows is None else rows)


def with_bias_column(rows: Tensor, bias_input: float, wanted: bool) -> Tensor:
    """Rows with the bias as one more input, if it moves."""
    if not wanted:
        return rows
    return torch.cat([rows, rows.new_full((*rows.shape[:-1], 1), bias_input)], dim=-1)
