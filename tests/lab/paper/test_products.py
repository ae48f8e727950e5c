"""A layer as products of matrices: the numbers behind the paper's Figure 7."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from teleport import cli
from teleport.errors import RunError
from teleport.lab.paper.plots import product_figure
from teleport.lab.paper.products import Product, product_of, read_product
from teleport.lab.paper.snapshot import moment
from tests.support.networks import task
from tests.support.tables import small


@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.booleans(),
    st.integers(1, 200),
)
@settings(max_examples=20)
def test_a_convolution_is_the_product_of_its_matrices(
    seed: int, kernel: int, stride: int, padding: int, bias: bool, rows: int
) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(2, 3, kernel, stride, padding, bias=bias).double()
    x, weights = torch.randn(2, 2, 5, 4).double(), torch.randn(3).double()
    with torch.no_grad():
        z = conv(x)

    def closure() -> torch.Tensor:
        return (conv(x).tanh() * weights[:, None, None]).sum()

    found = product_of(nn.Sequential(conv), lambda: closure(), rows=rows)
    by_position = z.permute(0, 2, 3, 1).reshape(-1, 3)
    assert found.count == len(by_position)
    assert found.bias == bias
    np.testing.assert_allclose(found.outputs, by_position[:rows], atol=1e-12)
    np.testing.assert_allclose(found.outputs, found.rows @ found.weight.T, atol=1e-12)
    delta = ((1 - z.tanh().square()) * weights[:, None, None]).permute(0, 2, 3, 1).reshape(-1, 3)
    np.testing.assert_allclose(found.deltas, delta[:rows], atol=1e-12)
    closure().backward()
    gradient = [p.grad.reshape(3, -1) for p in conv.parameters()]
    np.testing.assert_allclose(found.gradient, torch.cat(gradient, dim=1), atol=1e-10)
    if rows >= found.count:
        np.testing.assert_allclose(found.gradient, found.deltas.T @ found.rows, atol=1e-10)


def test_a_table_of_tokens_is_shown_only_if_asked_for_or_alone() -> None:
    model, tokens = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 3)), torch.arange(6)

    def closure() -> torch.Tensor:
        return model(tokens).square().mean()

    assert product_of(model, closure).layer == "1"
    assert product_of(model, closure, "0").rows.shape == (6, 50)
    alone = nn.Sequential(model[0])
    assert product_of(alone, lambda: alone(tokens).square().mean()).layer == "0"


@given(st.integers(0, 2**31))
@settings(max_examples=5)
def test_of_a_grouped_layer_the_first_group_is_shown(seed: int) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv1d(4, 6, 2, groups=2).double()
    x = torch.randn(3, 4, 5).double()
    found = product_of(nn.Sequential(conv), lambda: conv(x).square().sum())
    alone = functional.conv1d(x[:, :2], conv.weight[:3], conv.bias[:3]).detach()
    assert found.weight.shape == (3, 5)
    np.testing.assert_allclose(found.outputs, alone.transpose(1, 2).reshape(-1, 3), atol=1e-12)


def test_layers_are_chosen_by_name_and_rows_cut() -> None:
    t = task("plain", 0)
    names = [n for n, m in t.model.named_modules() if isinstance(m, nn.Linear)]
    assert product_of(t.model, t.closure).layer == names[0]
    found = product_of(t.model, t.closure, names[1], rows=2)
    assert (found.layer, len(found.rows), len(found.outputs), len(found.deltas)) == (
        names[1],
        2,
        2,
        2,
    )
    with pytest.raises(ValueError, match=f"'nope'.*{names[0]}"):
        product_of(t.model, t.closure, "nope")
    with pytest.raises(ValueError, match=">= 1"):
        product_of(t.model, t.closure, rows=0)


def test_a_tied_weight_has_rows_of_two_kinds_and_is_not_shown() -> None:
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    words = torch.tensor([[0, 1], [2, 4]])
    with pytest.raises(ValueError, match="there are: none"):
        product_of(model, lambda: model(words).square().sum())


def test_the_figure_says_how_many_rows_there_are_and_how_many_it_shows() -> None:
    matrix = np.ones((2, 3))
    whole = Product("conv", 2, matrix, matrix, matrix, matrix, matrix, bias=False)
    first = Product("conv", 9, matrix, matrix, matrix, matrix, matrix, bias=True)
    assert product_figure(whole).axes[0].get_ylabel() == "2 rows"
    assert product_figure(first).axes[0].get_ylabel() == "9 rows, the first 2"
    assert "bias" in product_figure(first).axes[0].get_xlabel()


@pytest.mark.slow
def test_the_product_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "product"
    name = small(tmp_path)
    chosen = ["--preset", "tiny", "--trained", "2", "--layer", "2", "--rows", "5"]
    assert cli.main(["product", name, *chosen, "--out", str(out)]) == 0
    first = capsys.readouterr().out
    assert "25 x 5" in first  # examples of a batch; hidden units and a bias
    at = moment(name, "tiny", 2)
    expected = product_of(at.model, at.closure, "2", rows=5)
    config, found = read_product(out)
    assert config["trained"] == 2
    assert f"product {name}" in config["command"]
    for field in ("rows", "weight", "outputs", "deltas", "gradient"):
        np.testing.assert_allclose(getattr(found, field), getattr(expected, field), rtol=1e-5)
    (out / "figure.png").unlink()
    assert cli.main(["figure", str(out)]) == 0
    assert capsys.readouterr().out == first
    assert (out / "figure.png").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["nope"], "mnist-sample"), (["mnist-sample", "--layer", "nope"], "'nope'")],
)
def test_bad_input_makes_no_folder(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [*arguments, "--preset", "tiny", "--trained", "1"]
    assert cli.main(["product", *chosen, "--out", str(tmp_path / "new")]) == 1
    assert word in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_without_products_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="teleport product"):
        read_product(tmp_path)
