"""The method on one page of chapter 3: the very code of its cells, held against the library."""

import ast
import copy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import teleport
from teleport.book.notebook_form import joined, load_notebook

CHAPTER = Path(__file__).parents[2] / "chapters" / "03_mlp.ipynb"
CELLS = [
    joined(cell["source"])
    for cell in load_notebook(CHAPTER)["cells"]
    if "one-page" in cell["metadata"].get("tags", [])
]
PAGE = "\n\n".join(CELLS)
BENDS = (nn.Tanh, nn.GELU, nn.LeakyReLU)


def page(source: str = PAGE) -> SimpleNamespace:
    """The functions of the page."""
    names = {"torch": torch, "nn": nn}
    exec(source, names)
    return SimpleNamespace(**names)


def perceptron(widths, bend, seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, bend())][:-1]).double()


def difference(source, model, x, growth):
    """The largest difference between the weights after the page's teleport and the library's.

    In the largest weight, or in 1: a move far out is rounded as it is long.
    """
    target = torch.randn(model(x).shape, dtype=torch.float64)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)

    def loss(outputs):
        return (outputs - target).square().mean()

    page(source).one_page(ours, x, loss, growth)
    report = teleport.Teleporter(theirs, growth=growth).step(lambda: loss(theirs(x)))
    assert report.growth == pytest.approx(growth)
    one, other = (nn.utils.parameters_to_vector(m.parameters()) for m in (ours, theirs))
    return float((one - other).detach().abs().max() / other.detach().abs().max().clamp(min=1.0))


def test_it_is_a_page_and_needs_nothing_of_the_package():
    lines = [line for line in PAGE.splitlines() if line.strip()]
    assert 50 <= len(lines) <= 65
    assert max(len(cell.splitlines()) for cell in CELLS) <= 12
    imported = [n.module for n in ast.walk(ast.parse(PAGE)) if isinstance(n, ast.ImportFrom)]
    assert imported == ["torch.func"]
    assert "teleport" not in PAGE


@settings(max_examples=20)
@given(
    hidden=st.lists(st.integers(6, 9), min_size=1, max_size=3),
    shape=st.sampled_from([(3,), (1,), (2, 2)]),
    bend=st.sampled_from(BENDS),
    growth=st.sampled_from([1.5, 2.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_it_moves_every_weight_as_the_library_does(hidden, shape, bend, growth, seed):
    model = perceptron([5, *hidden, 2], bend, seed)
    x = torch.randn(*shape, 5, dtype=torch.float64)
    assert difference(PAGE, model, x, growth) < 1e-12


BROKEN = {
    "the span is kept": ("matrix - matrix @ basis", "matrix @ basis"),
    "the bias reads nothing": ("full_like(flat[:, :1], one)", "zeros_like(flat[:, :1])"),
    "the 1 has a velocity": ("rows(velocity[layer], one=0.0)", "rows(velocity[layer])"),
    "growth of T": ("growth**2", "growth"),
    "the bias stays": ("layer.bias += step", "layer.bias += 0"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_mistake_on_the_page_is_seen(mistake):
    right, wrong = BROKEN[mistake]
    assert right in PAGE
    model = perceptron([5, 8, 7, 2], nn.Tanh, seed=0)
    x = torch.randn(3, 5, dtype=torch.float64)
    assert difference(PAGE, model, x, 2.0) < 1e-12
    assert difference(PAGE.replace(right, wrong), model, x, 2.0) > 1e-6
