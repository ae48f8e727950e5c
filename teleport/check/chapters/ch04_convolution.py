"""Chapter 4: patches as rows, and one null space for each group."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from teleport import reference
from teleport.check.answers import alike
from teleport.check.draw import Draw
from teleport.check.engine import Case, Check, Mistake, Property


def _ones(patches: Tensor) -> Tensor:
    return torch.cat([patches, patches.new_ones(len(patches), 1)], dim=1)


def _rows(images: Tensor, size: int, stride: int, padding: int) -> Tensor:
    return _ones(reference.equation_9(list(images), size, stride, padding).T)


def _unfolded(images: Tensor, size: int, stride: int, padding: int) -> Tensor:
    return functional.unfold(images, size, stride=stride, padding=padding)


def _images_case(draw: Draw) -> Case:
    size = draw.choice(2, 1)
    shape = draw.choice(1, 2), draw.choice(1, 2), draw.choice(2, 3), draw.choice(2, 3)
    return {
        "images": draw.matrix(*shape),
        "size": size,
        "stride": draw.choice(1, 2),
        "padding": draw.choice(0, 1),
    }


def _places_last(images: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """Channel innermost: what permuting the patches without care gives."""
    rows = _rows(images, size, stride, padding)[:, :-1]
    return _ones(rows.reshape(len(rows), images.shape[1], -1).mT.flatten(1))


conv_rows = Check(
    name="conv_rows",
    takes={"images": "[n, C, h, w]", "size": "k", "stride": "number", "padding": "number"},
    gives="[n * positions, C * k * k + 1]",
    cases=_images_case,
    answer=_rows,
    properties=[
        Property(
            "thm-span",
            "One row for each position of each image: its patch, channel by channel and row by "
            "row as in the kernel, then a 1 for the bias.",
        )
    ],
    mistakes=[
        Mistake(
            "The bias column is forgotten: append a 1 to every row.",
            lambda *case: _rows(*case)[:, :-1],
        ),
        Mistake(
            "These are the patches as columns; here they are wanted as rows.",
            lambda *case: _rows(*case).T,
        ),
        Mistake(
            "torch's unfold gives [n, C k k, positions]: swap its last two axes before you "
            "flatten, or the numbers of different patches mix.",
            lambda *case: _ones(_unfolded(*case).reshape(-1, _unfolded(*case).shape[1])),
        ),
        Mistake(
            "The stride is not used.",
            lambda images, size, stride, padding: _rows(images, size, 1, padding),
        ),
        Mistake(
            "The padding is not used.",
            lambda images, size, stride, padding: _rows(images, size, stride, 0),
        ),
        Mistake(
            "Only the first image is unfolded.",
            lambda images, *rest: _rows(images[:1], *rest),
        ),
        Mistake(
            "The channel runs slowest within a row, as in weight.flatten(1); here it runs fastest.",
            _places_last,
        ),
        Mistake(
            "The 1 comes last, as the bias is the last column of the weights.",
            lambda *case: _rows(*case).roll(1, dims=1),
        ),
    ],
)
"""The patches of a convolution as rows."""


def _grouped(gradient: Tensor, bases: Tensor) -> Tensor:
    groups = gradient.unflatten(0, (len(bases), -1))
    left: Tensor = (groups - groups @ bases @ bases.mT).flatten(0, 1)
    return left


def _group_case(draw: Draw) -> Case:
    groups, size = draw.choice(2, 1, 3), draw.choice(2, 3)
    count = draw.choice(1, 2)
    bases = torch.stack([draw.orthonormal(size, count) for _ in range(groups)])
    return {"gradient": draw.matrix(groups * draw.choice(1, 2), size), "bases": bases}


def _in_group(case: Case, got: Tensor) -> bool:
    groups = got.unflatten(0, (len(case["bases"]), -1))
    product = groups @ case["bases"]
    return alike(product, torch.zeros_like(product))


def _interleaved(gradient: Tensor, bases: Tensor) -> Tensor:
    each = [
        reference.equation_11(row[None], bases[place % len(bases)])
        for place, row in enumerate(gradient)
    ]
    return torch.cat(each)


def _out_of_all(gradient: Tensor, bases: Tensor) -> Any:
    joined = torch.cat(list(bases), dim=1)
    return reference.equation_11(gradient, reference.significant_basis(joined, 1.0))


grouped_projection = Check(
    name="grouped_projection",
    takes={"gradient": "[C_out, d]", "bases": "[groups, d, k]"},
    gives="[C_out, d]",
    cases=_group_case,
    answer=_grouped,
    properties=[
        Property(
            "thm-invariance",
            "The output channels of each group must not act on the inputs of their own group.",
            _in_group,
        ),
        Property("thm-layerwise", "Nothing but the part in the group's own span is removed."),
    ],
    mistakes=[
        Mistake(
            "The groups are mixed: the first group's basis is used for all.",
            lambda g, b: reference.equation_11(g, b[0]),
        ),
        Mistake(
            "The groups are mixed: a group is a block of *consecutive* output channels, not every "
            "groups-th one.",
            _interleaved,
        ),
        Mistake(
            "The groups are mixed: each is projected out of the inputs of all. That keeps the "
            "loss and wastes null space.",
            _out_of_all,
        ),
        Mistake(
            "The groups are mixed: their order is reversed.",
            lambda g, b: _grouped(g, b.flip(0)),
        ),
        Mistake(
            "You projected *onto* the span of the inputs instead of out of it.",
            lambda g, b: g - _grouped(g, b),
        ),
        Mistake("Nothing is projected: this is the gradient itself.", lambda g, b: g),
    ],
)
"""The projection of a grouped convolution."""
