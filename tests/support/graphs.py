"""Computation graphs over the rational numbers: the definition of chapters/proofs in Python.

A graph is a list of steps on a memory, a column of numbers. It is written literally, shares no code
with the package, and can be written down for Coq.
"""

from dataclasses import dataclass
from fractions import Fraction

from hypothesis import strategies as st

Column = list[Fraction]
Rows = list[Column]


@dataclass(frozen=True)
class LayerCall:
    """``v + B W A v``: reads the layer's inputs ``A v`` and adds ``B z`` of its outputs."""

    layer: int
    read: Rows
    write: Rows


@dataclass(frozen=True)
class Product:
    """Adds the product of two places of the memory to a third."""

    first: int
    second: int
    place: int


@dataclass(frozen=True)
class PositivePart:
    """Adds the positive part of a place, ReLU, to another."""

    origin: int
    place: int


Step = LayerCall | Product | PositivePart


@dataclass(frozen=True)
class Graph:
    weights: list[Rows]
    start: Column
    steps: list[Step]


def apply(matrix: Rows, column: Column) -> Column:
    return [sum((a * x for a, x in zip(row, column, strict=True)), Fraction(0)) for row in matrix]


def after(weights: list[Rows], memory: Column, step: Step) -> Column:
    match step:
        case LayerCall(layer, read, write):
            outputs = apply(weights[layer], apply(read, memory))
            return [v + b for v, b in zip(memory, apply(write, outputs), strict=True)]
        case Product(first, second, place):
            return added(memory, place, memory[first] * memory[second])
        case PositivePart(origin, place):
            return added(memory, place, max(memory[origin], Fraction(0)))


def added(memory: Column, place: int, number: Fraction) -> Column:
    return [v + number if i == place else v for i, v in enumerate(memory)]


def run(graph: Graph) -> Column:
    memory = graph.start
    for step in graph.steps:
        memory = after(graph.weights, memory, step)
    return memory


# For Coq: numbers stay small, because its integers here are counted in ones.

numbers = st.sampled_from([Fraction(n, 2) for n in (-2, -1, 0, 1, 2)])


def matrices(height: int, width: int) -> st.SearchStrategy[Rows]:
    row = st.lists(numbers, min_size=width, max_size=width)
    return st.lists(row, min_size=height, max_size=height)


def places(row_count: int, size: int) -> st.SearchStrategy[Rows]:
    """Rows that each pick one place."""
    unit = st.integers(0, size - 1).map(lambda p: [Fraction(int(i == p)) for i in range(size)])
    return st.lists(unit, min_size=row_count, max_size=row_count)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Up to 4 steps on 1 to 4 places, with 2 layers, each called as often as comes."""
    size = draw(st.integers(1, 4))
    widths = [(draw(st.integers(1, 3)), draw(st.integers(1, 3))) for _ in range(2)]
    place = st.integers(0, size - 1)
    steps: list[Step] = []
    for _ in range(draw(st.integers(0, 4))):
        layer = draw(st.integers(0, 1))
        d_out, d_in = widths[layer]
        columns = draw(places(d_out, size))
        call = LayerCall(
            layer, draw(places(d_in, size)), [list(row) for row in zip(*columns, strict=True)]
        )
        other = st.builds(Product, place, place, place) | st.builds(PositivePart, place, place)
        steps.append(draw(st.just(call) | other))
    weights = [draw(matrices(*shape)) for shape in widths]
    start = draw(st.lists(numbers, min_size=size, max_size=size))
    return Graph(weights, start, steps)


def coq_number(number: Fraction) -> str:
    return f"(ratio {coq_integer(number.numerator)} {number.denominator})"


def coq_integer(number: int) -> str:
    return f"(Posz {number})" if number >= 0 else f"(Negz {-number - 1})"


def coq_list(parts: list[str]) -> str:
    return f"[:: {'; '.join(parts)}]" if parts else "[::]"


def coq_rows(matrix: Rows) -> str:
    return coq_list([coq_list([coq_number(a) for a in row]) for row in matrix])


def coq_step(step: Step) -> str:
    match step:
        case LayerCall(layer, read, write):
            return f"ListCall (R := rat_comRing) {layer} {coq_rows(read)} {coq_rows(write)}"
        case Product(first, second, place):
            return f"product_step {first} {second} {place}"
        case PositivePart(origin, place):
            return f"relu_step {origin} {place}"


def coq_agreement(graph: Graph, memory: Column) -> str:
    """The claim that Coq's definition makes this memory of the graph, as a truth value."""
    weights = coq_list([coq_rows(matrix) for matrix in graph.weights])
    start = coq_list([coq_number(number) for number in graph.start])
    steps = coq_list([coq_step(step) for step in graph.steps])
    pairs = [f"({coq_integer(n.numerator)}, Posz {n.denominator})" for n in memory]
    return f"(ratios (list_run {weights} {start} {steps}) == {coq_list(pairs)})"
