"""A layer as the products of matrices that it is, forward and backward (paper Figure 7).

A convolution lays one kernel over every position of an image. Written with one row per position it
is a plain product, ``Z = X Wᵀ``, and its weight gradient another one, ``g = D X``: theorem
``thm-span`` is read off the second. The same holds for every covered layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from teleport.errors import RunError
from teleport.lab.paper.snapshot import moment
from teleport.lab.records.folders import slug
from teleport.lab.records.runs import FloatArray, read_rows
from teleport.lab.records.study import record_paths
from teleport.lab.records.writer import RecordWriter
from teleport.layers.support import cover
from teleport.recording import record
from teleport.runtime.closures import Closure


@dataclass(frozen=True)
class Product:
    """The matrices of one layer on one batch, positions below each other.

    Attributes:
        layer: its name; the first group of a grouped layer.
        count: rows that the batch has.
        rows: ``[r, d_in]``, the first ``r`` of the ``count`` input rows X, bias column last.
        weight: ``[d_out, d_in]``, W.
        outputs: ``[r, d_out]``, the first rows of Z = X Wᵀ.
        deltas: ``[r, d_out]``, the first rows of Dᵀ: dL/dz.
        gradient: ``[d_out, d_in]``, g = D X over all rows.
        bias: whether the last column is that of the bias.
    """

    layer: str
    count: int
    rows: FloatArray
    weight: FloatArray
    outputs: FloatArray
    deltas: FloatArray
    gradient: FloatArray
    bias: bool


def product_of(
    model: nn.Module, closure: Closure, layer: str | None = None, rows: int = 48
) -> Product:
    """The products of one layer of a model, with the first rows of X, Z and Dᵀ.

    By default the layer is the first that can be shown and is no table of tokens, whose inputs, one
    column for each token, are all 0 but for a 1.

    Raises:
        ValueError: if there is no such layer, or ``rows`` is not >= 1.
        UnsupportedModelError: if the model has no covered layer.
        ClosureError: if the closure does not return a loss, or calls no layer.
    """
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}")
    tape = record(model, cover(model, at_least_one=True).sites, closure)
    # The rows of a tied weight are of two kinds: there is no one X.
    blocks = {block.name: block for block in tape.blocks if block.other is None}
    if layer is None:
        dense = (name for name, block in blocks.items() if block.part.gram_pays)
        layer = next(dense, next(iter(blocks), None))
    if layer is None or layer not in blocks:
        raise ValueError(f"no layer {layer!r} to show; there are: {', '.join(blocks) or 'none'}")
    block = blocks[layer]
    x, weight = _first_group(tape.rows(block)), _first_group(block.part.matrix())
    deltas, gradient = _first_group(tape.deltas(block)), _first_group(tape.weight_gradient(block))
    shown = x[:rows]
    return Product(
        layer,
        len(x),
        _array(shown),
        _array(weight),
        _array(shown @ weight.T.to(shown.dtype)),
        _array(deltas[:rows]),
        _array(gradient),
        block.part.has_bias_column,
    )


def _first_group(matrix: Tensor) -> Tensor:
    return matrix.detach() if matrix.dim() == 2 else matrix[0].detach()


def _array(matrix: Tensor) -> FloatArray:
    return np.asarray(matrix.double().cpu().numpy())


_MATRICES = ("rows", "weight", "outputs", "deltas", "gradient")


def product_at(
    name: str,
    *,
    layer: str | None = None,
    rows: int = 48,
    preset: str = "cpu",
    trained: int = 50,
    seed: int = 0,
    progress: Callable[[str, int], None] = lambda what, done: None,
) -> tuple[dict[str, Any], Product]:
    """What `product_of` finds in a named experiment, and before it everything it depends on.

    ``progress`` is told the training steps done since the last call.

    Raises:
        ValueError: for an unknown name or layer, or a value out of range.
    """
    at = moment(name, preset, trained, seed, stepped=lambda: progress(f"{name}: training", 1))
    return {"trained": trained, **at.config}, product_of(at.model, at.closure, layer, rows)


def write_product(folder: Path, config: dict[str, Any], found: Product) -> None:
    """Record the products of a layer, to six digits; RunError if that cannot be written."""
    with RecordWriter(folder / f"00-{slug(found.layer)}.jsonl") as writer:
        writer.write("config", order=0, figure="product", **config)
        numbers = {
            field: [[float(f"{value:.6g}") for value in row] for row in getattr(found, field)]
            for field in _MATRICES
        }
        writer.write("product", layer=found.layer, count=found.count, bias=found.bias, **numbers)
        writer.write("end", status="finished")


def read_product(folder: Path) -> tuple[dict[str, Any], Product]:
    """Configuration and matrices of a folder that `write_product` has written.

    Raises:
        RunError: if there is no record, or it is damaged or of something else.
    """
    for path in record_paths(folder):
        config, *others = read_rows(path)
        found = [row for row in others if row["type"] == "product"]
        if config.get("figure") == "product" and found:
            row = found[0]
            matrices = {field: np.array(row[field], dtype=np.float64) for field in _MATRICES}
            return config, Product(row["layer"], row["count"], bias=row["bias"], **matrices)
    raise RunError(f"{folder} holds no products; give a folder `teleport product` has written")
