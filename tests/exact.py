"""Perceptrons over the rational numbers: integers in, ``==`` out, no rounding anywhere.

Written with SymPy matrices and sharing no code with the package. A batch is a matrix with one
column per sample, the bias is the last column of a weight, the loss is ``½ Σ (z - y)²``.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from sympy import Matrix, Poly, ones, symbols, zeros
from torch import Tensor


@dataclass(frozen=True)
class IntegerNet:
    """Integer weights, inputs and targets; ``relu`` bends all layers but the last."""

    weights: tuple[Matrix, ...]
    batch: Matrix
    target: Matrix
    relu: bool


@dataclass(frozen=True)
class Run:
    """Inputs (a 1 appended), outputs, slopes of the activations and cotangents of every layer."""

    inputs: list[Matrix]
    outputs: list[Matrix]
    slopes: list[Matrix]
    deltas: list[Matrix]


def run(net: IntegerNet, weights: list[Matrix], slopes: list[Matrix] | None = None) -> Run:
    """Forward and backward pass; with ``slopes`` given the activations are frozen at them."""
    inputs, outputs, seen = [], [], []
    x = net.batch
    for layer, weight in enumerate(weights):
        inputs.append(Matrix.vstack(x, ones(1, x.cols)))
        outputs.append(weight * inputs[-1])
        seen.append(_slopes(net, outputs[-1], layer) if slopes is None else slopes[layer])
        x = outputs[-1].multiply_elementwise(seen[-1])
    deltas = [outputs[-1] - net.target]
    for layer in reversed(range(len(weights) - 1)):
        pulled = (weights[layer + 1].T * deltas[0])[:-1, :]
        deltas.insert(0, pulled.multiply_elementwise(seen[layer]))
    return Run(inputs, outputs, seen, deltas)


def _slopes(net: IntegerNet, z: Matrix, layer: int) -> Matrix:
    bends = net.relu and layer < len(net.weights) - 1
    return z.applyfunc(lambda entry: 1 if entry > 0 else 0) if bends else ones(*z.shape)


def loss(net: IntegerNet, seen: Run) -> object:
    return sum(r**2 for r in seen.outputs[-1] - net.target) / 2


def gradient(seen: Run) -> list[Matrix]:
    """Theorem T1."""
    return [d * x.T for d, x in zip(seen.deltas, seen.inputs, strict=True)]


def objective(weights: list[Matrix], net: IntegerNet) -> object:
    """T = ½‖∇L‖²."""
    return sum(sum(e**2 for e in g) for g in gradient(run(net, weights))) / 2


def null_projector(inputs: Matrix) -> Matrix:
    """P, the orthogonal projector on what is perpendicular to all columns: rational throughout."""
    null = inputs.T.nullspace()
    if not null:
        return zeros(inputs.rows, inputs.rows)
    basis = Matrix.hstack(*null)
    return basis * (basis.T * basis).inv() * basis.T


def input_tangents(weights: list[Matrix], seen: Run) -> list[Matrix]:
    """ẋ of every layer along the gradient; the appended 1 has tangent 0."""
    found, x_dot = [], zeros(*seen.inputs[0].shape)
    for layer, (weight, own) in enumerate(zip(weights, gradient(seen), strict=True)):
        found.append(x_dot)
        z_dot = own * seen.inputs[layer] + weight * x_dot
        bent = z_dot.multiply_elementwise(seen.slopes[layer])
        x_dot = Matrix.vstack(bent, zeros(1, bent.cols))
    return found


def by_calculus(net: IntegerNet) -> tuple[list[Matrix], list[Matrix]]:
    """∇L and ∇T = H ∇L from the loss as a polynomial in the weights, differentiated by SymPy."""
    weights = list(net.weights)
    seen = run(net, weights)
    names = [Matrix(w.rows, w.cols, symbols(f"w{i}_:{len(w)}")) for i, w in enumerate(weights)]
    variables, point = [v for n in names for v in n], [e for w in weights for e in w]
    polynomial = Poly(loss(net, run(net, names, seen.slopes)), *variables)
    slopes = [polynomial.diff(v) for v in variables]
    first = [p(*point) for p in slopes]
    along = list(zip(variables, first, strict=True))
    second = [sum(p.diff(v)(*point) * g for v, g in along) for p in slopes]
    return _in_shape(first, weights), _in_shape(second, weights)


def _in_shape(entries: list[object], weights: list[Matrix]) -> list[Matrix]:
    rest = iter(entries)
    return [Matrix(w.rows, w.cols, [next(rest) for _ in w]) for w in weights]


def as_tensor(matrix: Matrix) -> Tensor:
    """Integers as small as here are exact in float64, and so are their sums and products."""
    return torch.tensor([[int(e) for e in row] for row in matrix.tolist()], dtype=torch.float64)


@st.composite
def integer_nets(draw: st.DrawFn, shapes: tuple[tuple[int, ...], ...]) -> IntegerNet:
    """Networks of one of these widths, with fewer samples than the widest layer has inputs."""
    widths = draw(st.sampled_from(shapes), label="widths")
    samples = draw(st.integers(1, 2), label="samples")
    entry = st.integers(-2, 2)

    def matrix(rows: int, columns: int) -> Matrix:
        entries = st.lists(entry, min_size=rows * columns, max_size=rows * columns)
        return Matrix(rows, columns, draw(entries))

    weights = tuple(matrix(o, i + 1) for i, o in pairwise(widths))
    batch, target = matrix(widths[0], samples), matrix(widths[-1], samples)
    return IntegerNet(weights, batch, target, draw(st.booleans(), label="relu"))
