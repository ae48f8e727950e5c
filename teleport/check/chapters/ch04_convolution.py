"""Chapter 4: patches as rows, and one null space for each group."""

import torch
from torch import Tensor
from torch.nn import functional

from teleport import reference
from teleport.check.answers import vanishes
from teleport.check.draw import Draw
from teleport.check.engine import Case, Check, Property


def _ones(patches: Tensor, one: float = 1.0) -> Tensor:
    return torch.cat([patches, patches.new_full((len(patches), 1), one)], dim=1)


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
    properties={
        "One row for each position of each image: its patch, channel by channel and row by row "
        "as in the kernel, then a 1 for the bias.": Property("thm-span")
    },
    mistakes=lambda x, k, s, p: {
        "The bias column is forgotten: append a 1 to every row.": lambda: _rows(x, k, s, p)[:, :-1],
        "These are the patches as columns; here they are wanted as rows.": lambda: (
            _rows(x, k, s, p).T
        ),
        "torch's unfold gives [n, C k k, positions]: swap its last two axes before you flatten, or "
        "the numbers of different "
        "patches mix.": lambda: _ones(_unfolded(x, k, s, p).reshape(-1, x.shape[1] * k * k)),
        "The stride is not used.": lambda: _rows(x, k, 1, p),
        "The padding is not used.": lambda: _rows(x, k, s, 0),
        "Only the first image is unfolded.": lambda: _rows(x[:1], k, s, p),
        "The channel runs slowest within a row, "
        "as in weight.flatten(1); here it runs fastest.": lambda: _places_last(x, k, s, p),
        "The 1 comes last, as the bias is the last column of the weights.": lambda: _rows(
            x, k, s, p
        ).roll(1, dims=1),
    },
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
    return vanishes(groups @ case["bases"])


def _interleaved(gradient: Tensor, bases: Tensor) -> Tensor:
    each = [
        reference.equation_11(row[None], bases[place % len(bases)])
        for place, row in enumerate(gradient)
    ]
    return torch.cat(each)


grouped_projection = Check(
    name="grouped_projection",
    takes={"gradient": "[C_out, d]", "bases": "[groups, d, k]"},
    gives="[C_out, d]",
    cases=_group_case,
    answer=_grouped,
    properties={
        "The output channels of each group must "
        "not act on the inputs of their own group.": Property("thm-invariance", _in_group),
        "Nothing but the part in the group's own span is removed.": Property("thm-layerwise"),
    },
    mistakes=lambda g, b: {
        "The groups are mixed: the first group's basis is used for all.": lambda: (
            reference.equation_11(g, b[0])
        ),
        "The groups are mixed: a group is a block of *consecutive* output channels, "
        "not every groups-th one.": lambda: _interleaved(g, b),
        "The groups are mixed: each is projected out of the inputs of all. "
        "That keeps the loss and wastes null space.": lambda: reference.equation_11(
            g, reference.significant_basis(torch.cat(list(b), dim=1), 1.0)
        ),
        "The groups are mixed: their order is reversed.": lambda: _grouped(g, b.flip(0)),
        "You projected *onto* the span of the inputs instead of out of it.": lambda: (
            g - _grouped(g, b)
        ),
        "Nothing is projected: this is the gradient itself.": lambda: g,
    },
)
"""The projection of a grouped convolution."""


def _clear(values: Tensor, tau: float) -> bool:
    """Whether the smallest k with the share tau of the energy, and its span, are beyond doubt."""
    energy = values.square().cumsum(0) / values.square().sum()
    if bool(((energy - tau).abs() < 1e-6).any()):
        return False
    k = int((energy < tau).sum()) + 1
    return k == len(values) or bool(values[k - 1] - values[k] > 1e-3 * values[0])


def _layer_case(draw: Draw) -> Case:
    groups, width, count = draw.choice(2, 1), draw.choice(2, 1, 3), draw.choice(2, 3, 1)
    inputs = draw.matrix(groups, count, width)
    values = [torch.linalg.svdvals(_ones(own)) for own in inputs]
    allowed = [t for t in (0.9, 0.5, 0.75, 0.99) if all(_clear(own, t) for own in values)]
    return {
        "gradient": draw.matrix(groups * draw.choice(1, 2), width + 1),
        "inputs": inputs,
        # With all of the energy the span is that of the inputs, however equal the values are.
        "tau": draw.choice(*allowed) if allowed else 1.0,
    }


def _kept(matrix: Tensor, tau: float, power: int = 2) -> Tensor:
    _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
    energy = (values**power).cumsum(0) / (values**power).sum()
    k = int((values > 1e-9 * values[0]).sum()) if tau == 1 else int((energy < tau).sum()) + 1
    basis: Tensor = vectors[:k].T
    return basis


def _layer(
    gradient: Tensor, inputs: Tensor, tau: float, one: float = 1.0, power: int = 2
) -> Tensor:
    blocks = gradient.unflatten(0, (len(inputs), -1))
    bases = [_kept(_ones(own, one), tau, power) for own in inputs]
    parts = [reference.equation_11(g, b) for g, b in zip(blocks, bases, strict=True)]
    return torch.cat(parts)


def _left(gradient: Tensor, inputs: Tensor, tau: float) -> Tensor:
    """On the side of the outputs: no answer unless there are as many of them as inputs."""
    blocks = gradient.unflatten(0, (len(inputs), -1))
    pairs = zip(blocks, inputs, strict=True)
    return torch.cat([reference.equation_12(g, _kept(_ones(own), tau)) for g, own in pairs])


def _of_gradient(gradient: Tensor, inputs: Tensor, tau: float) -> Tensor:
    blocks = gradient.unflatten(0, (len(inputs), -1))
    return torch.cat([reference.equation_11(block, _kept(block, tau)) for block in blocks])


layer_projection = Check(
    name="layer_projection",
    takes={"gradient": "[C_out, d + 1]", "inputs": "[groups, n, d]", "tau": "in (0, 1]"},
    gives="[C_out, d + 1]",
    cases=_layer_case,
    answer=_layer,
    properties={
        "Each group's rows, a 1 appended, keep the smallest k with the share tau of the sum of "
        "*squared* singular values; the gradient of its output channels is projected out "
        "of these k directions, from the right.": Property("thm-rank")
    },
    mistakes=lambda g, x, tau: {
        "One bug is left, the groups: the basis of the first group is used for all.": lambda: (
            reference.equation_11(g, _kept(_ones(x[0]), tau))
        ),
        "One bug is left, the bias: the rows need a 1 as their last entry.": lambda: _layer(
            g, x, tau, one=0.0
        ),
        "One bug is left, τ: energy is the sum of *squares* of the singular values.": lambda: (
            _layer(g, x, tau, power=1)
        ),
        "One bug is left, the basis: "
        "it is that of the layer's inputs, not of the gradient.": lambda: _of_gradient(g, x, tau),
        "One bug is left, the side: what acts on the inputs is removed from "
        "the *right* of a gradient [C_out, d + 1].": lambda: _left(g, x, tau),
        "Nothing is projected: this is the gradient itself.": lambda: g,
        "You projected *onto* what is kept instead of out of it.": lambda: g - _layer(g, x, tau),
    },
)
"""All of a layer's projection: rows, basis for τ, groups, side."""
