"""Perceptrons over the rational numbers: integers in, ``==`` out, no rounding anywhere.

It shares no code with the package. Matrices are numpy arrays of ``Fraction``. A batch has one
column per sample, the bias is the last column of a weight, the loss is ``½ Σ (z - y)²``. What a
derivative is, is not taken from any formula of the book: `Dual` numbers compute it by definition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

Number = object
"""A ``Fraction``, or a `Dual` number of such."""

Matrix = np.ndarray
Weights = list[Matrix]


@dataclass(frozen=True)
class Dual:
    """``value + slope·ε`` with ``ε² = 0``: a polynomial at ``x + ε`` is ``f(x) + f'(x)·ε``.

    Value and slope may be dual numbers again, with an ε of their own: then the slope of the slope
    is the second derivative.
    """

    value: Number
    slope: Number

    def __add__(self, other: Number) -> "Dual":
        other = as_dual(other)
        return Dual(self.value + other.value, self.slope + other.slope)

    def __mul__(self, other: Number) -> "Dual":
        other = as_dual(other)
        return Dual(self.value * other.value, self.value * other.slope + self.slope * other.value)

    def __neg__(self) -> "Dual":
        return Dual(-self.value, -self.slope)

    def __sub__(self, other: Number) -> "Dual":
        return self + -as_dual(other)

    def __rsub__(self, other: Number) -> "Dual":
        return as_dual(other) - self

    __radd__, __rmul__ = __add__, __mul__


def as_dual(number: Number) -> Dual:
    return number if isinstance(number, Dual) else Dual(number, Fraction(0))


def plain(number: Number) -> Fraction:
    """The number at ε = 0."""
    return plain(number.value) if isinstance(number, Dual) else number


def matrix(rows: list[list[int]]) -> Matrix:
    return np.array([[Fraction(entry) for entry in row] for row in rows], dtype=object)


def zeros(rows: int, columns: int) -> Matrix:
    return np.full((rows, columns), Fraction(0), dtype=object)


def eye(size: int) -> Matrix:
    return zeros(size, size) + np.diag([Fraction(1)] * size)


# Networks.

BENDS: dict[str, Callable[[Number], Number]] = {
    "identity": lambda z: z,
    "relu": lambda z: z if plain(z) > 0 else z * 0,
    "square": lambda z: z * z,
}
SLOPES: dict[str, Callable[[Number], Number]] = {
    "identity": lambda _: Fraction(1),
    "relu": lambda z: Fraction(int(plain(z) > 0)),
    "square": lambda z: z + z,
}


def each(function: Callable[[Number], Number], entries: Matrix) -> Matrix:
    return np.array([[function(e) for e in row] for row in entries], dtype=object)


@dataclass(frozen=True)
class Net:
    """Integer weights, inputs and targets; ``bend`` is applied after all layers but the last."""

    weights: Weights
    batch: Matrix
    target: Matrix
    bend: str


def with_one(x: Matrix) -> Matrix:
    return np.vstack([x, np.full((1, x.shape[1]), Fraction(1), dtype=object)])


def inputs_and_outputs(net: Net, weights: Weights, batch: Matrix) -> tuple[Weights, Weights]:
    """R and Z of every layer: its inputs with the 1 for the bias, and ``Z = W R``."""
    inputs, outputs = [with_one(batch)], []
    for weight in weights:
        outputs.append(weight @ inputs[-1])
        inputs.append(with_one(each(BENDS[net.bend], outputs[-1])))
    return inputs[:-1], outputs


def loss(net: Net, weights: Weights) -> Number:
    _, outputs = inputs_and_outputs(net, weights, net.batch)
    residual = (outputs[-1] - net.target).ravel()
    return (residual * residual).sum() * Fraction(1, 2)


def cotangents(net: Net, weights: Weights) -> Weights:
    """D of every layer: the columns δ = ∂L/∂z, by the backward pass."""
    _, outputs = inputs_and_outputs(net, weights, net.batch)
    found = [outputs[-1] - net.target]
    for weight, z in zip(reversed(weights[1:]), reversed(outputs[:-1]), strict=True):
        found.insert(0, (weight.T @ found[0])[:-1] * each(SLOPES[net.bend], z))
    return found


def gradient(net: Net, weights: Weights) -> Weights:
    """∇L by the formula of theorem T1."""
    inputs, _ = inputs_and_outputs(net, weights, net.batch)
    return [d @ x.T for d, x in zip(cotangents(net, weights), inputs, strict=True)]


def objective(net: Net, weights: Weights) -> Number:
    """T = ½‖∇L‖²."""
    return inner(gradient(net, weights), gradient(net, weights)) * Fraction(1, 2)


def input_tangents(net: Net, weights: Weights, direction: Weights) -> Weights:
    """Ṙ of every layer: how its inputs change along a direction, by dual numbers."""
    inputs, _ = inputs_and_outputs(net, along(weights, direction), net.batch)
    return [each(lambda entry: as_dual(entry).slope, x) for x in inputs]


# Derivatives by definition.


def along(weights: Weights, direction: Weights) -> Weights:
    """``W + ε D`` with a new ε, also where the weights hold an ε already."""
    fresh = np.frompyfunc(Dual, 2, 1)
    return [fresh(w, d) for w, d in zip(weights, direction, strict=True)]


def derivative(
    function: Callable[[Weights], Number], weights: Weights, direction: Weights
) -> Number:
    return as_dual(function(along(weights, direction))).slope


def gradient_by_definition(function: Callable[[Weights], Number], weights: Weights) -> Weights:
    """Every partial derivative on its own."""
    slopes = iter([derivative(function, weights, unit) for unit in units(weights)])
    return [each(lambda _: next(slopes), w) for w in weights]


def hessian_times(function: Callable[[Weights], Number], weights: Weights, v: Weights) -> Weights:
    """H v: every partial derivative of the derivative along v."""
    return gradient_by_definition(lambda w: derivative(function, w, v), weights)


def units(weights: Weights) -> list[Weights]:
    """For every weight the direction in which it alone changes, by 1."""
    found = []
    for layer, weight in enumerate(weights):
        for place in np.ndindex(weight.shape):
            found.append([zeros(*w.shape) for w in weights])
            found[-1][layer][place] = Fraction(1)
    return found


# Linear algebra.


def inner(a: Weights, b: Weights) -> Number:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def equal(a: Weights, b: Weights) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def plus(a: Weights, step: Number, b: Weights) -> Weights:
    return [x + step * y for x, y in zip(a, b, strict=True)]


def eliminate(rows: Matrix) -> tuple[Matrix, list[int]]:
    """Reduced row echelon form by Gauss and Jordan, and the columns of its pivots."""
    rows, pivots = rows.copy(), []
    for column in range(rows.shape[1]):
        top = len(pivots)
        filled = [row for row in range(top, rows.shape[0]) if rows[row, column] != 0]
        if filled:
            rows[[top, filled[0]]] = rows[[filled[0], top]]
            rows[top] = rows[top] / rows[top, column]
            for other in set(range(rows.shape[0])) - {top}:
                rows[other] = rows[other] - rows[other, column] * rows[top]
            pivots.append(column)
    return rows, pivots


def rank(entries: Matrix) -> int:
    return len(eliminate(entries)[1])


def inverse(square: Matrix) -> Matrix:
    size = len(square)
    return eliminate(np.hstack([square, eye(size)]))[0][:, size:]


def null_projector(inputs: Matrix) -> Matrix:
    """``P = I - C (Cᵀ C)⁻¹ Cᵀ``, rational throughout; C: a largest set of independent columns."""
    columns = inputs[:, eliminate(inputs)[1]]
    if columns.shape[1] == 0:
        return eye(len(inputs))
    return eye(len(inputs)) - columns @ inverse(columns.T @ columns) @ columns.T


def null_projectors(net: Net) -> Weights:
    """P of every layer."""
    inputs, _ = inputs_and_outputs(net, net.weights, net.batch)
    return [null_projector(x) for x in inputs]


def projected(matrices: Weights, projectors: Weights) -> Weights:
    """π: every layer's matrix times its projector."""
    return [m @ p for m, p in zip(matrices, projectors, strict=True)]


# For the tests.


def as_tensor(entries: Matrix) -> Tensor:
    """Integers as small as here are exact in float64, and so are their sums and products."""
    return torch.tensor([[int(e) for e in row] for row in entries], dtype=torch.float64)


@st.composite
def matrices(draw: st.DrawFn, rows: int, columns: int) -> Matrix:
    row = st.lists(st.integers(-3, 3), min_size=columns, max_size=columns)
    return matrix(draw(st.lists(row, min_size=rows, max_size=rows)))


@st.composite
def directions(draw: st.DrawFn, like: Weights) -> Weights:
    """Integer matrices of the same shapes."""
    return [draw(matrices(*w.shape)) for w in like]


@st.composite
def nets(draw: st.DrawFn, deepest: int = 3, bends: tuple[str, ...] = tuple(BENDS)) -> Net:
    """Networks of 2 to ``deepest`` layers, 1 to 3 wide, with one sample or two."""
    widths = draw(st.lists(st.integers(1, 3), min_size=3, max_size=deepest + 1), label="widths")
    samples = draw(st.integers(1, 2), label="samples")
    weights = [draw(matrices(o, i + 1)) for i, o in pairwise(widths)]
    batch, target = draw(matrices(widths[0], samples)), draw(matrices(widths[-1], samples))
    return Net(weights, batch, target, draw(st.sampled_from(bends), label="bend"))
