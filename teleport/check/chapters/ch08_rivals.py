"""Chapter 8: symmetry teleportation and change of basis."""

from typing import Any

import torch
from torch import Tensor

from teleport.check.answers import alike
from teleport.check.chapters.ch03_mlp import rows_with_one
from teleport.check.draw import Draw
from teleport.check.engine import Case, Check, Property

WeightPair = tuple[Tensor, Tensor]


def sigma(z: Tensor) -> Tensor:
    """LeakyReLU of slope ½: invertible, and exact on small numbers."""
    return torch.where(z > 0, z, z / 2)


def undo(s: Tensor) -> Tensor:
    """Its inverse."""
    return torch.where(s > 0, s, 2 * s)


def outputs(first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
    """Outputs of the two layers, biases being last columns."""
    return rows_with_one(sigma(rows @ first.T)) @ second.T


def _bar(element: Tensor) -> Tensor:
    enlarged: Tensor = torch.block_diag(element, element.new_ones(1, 1))
    return enlarged


def _act(first: Tensor, second: Tensor, rows: Tensor, element: Tensor) -> WeightPair:
    before = rows @ first.T
    change = undo(sigma(before) @ element.T) - before
    new = first + (torch.linalg.pinv(rows) @ change).T
    return new, second @ torch.linalg.inv(_bar(element))


def _action_case(draw: Draw) -> Case:
    size, width = draw.choice(3, 4), draw.choice(2, 1)
    element = torch.eye(width, dtype=torch.float64)
    element[0] *= draw.choice(1.0, 2.0, -1.0)
    if width > 1:
        element[1, 0] = float(draw.integer(0, 2))
    return {
        "first": draw.matrix(width, size),
        "second": draw.matrix(1, width + 1),
        "rows": draw.independent(2, size, bias=True),
        "element": element,
    }


def _kept(case: Case, got: Any) -> bool:
    first, second = got
    before = outputs(case["first"], case["second"], case["rows"])
    return alike(outputs(first, second, case["rows"]), before)


def _moved(case: Case, got: Any) -> bool:
    wanted = sigma(case["rows"] @ case["first"].T) @ case["element"].T
    return alike(sigma(case["rows"] @ got[0].T), wanted)


def _whole(first: Tensor, second: Tensor, rows: Tensor, element: Tensor) -> WeightPair:
    wanted = undo(sigma(rows @ first.T) @ element.T)
    new = (torch.linalg.pinv(rows) @ wanted).T
    return new, second @ torch.linalg.inv(_bar(element))


group_action = Check(
    name="group_action",
    takes={
        "first": "[h, d + 1]",
        "second": "[o, h + 1]",
        "rows": "[n, d + 1], independent",
        "element": "[h, h]",
    },
    gives="(first, second); σ(z) = z for z > 0, else z/2",
    cases=_action_case,
    answer=_act,
    properties={
        "The outputs on the batch stay the same.": Property("thm-group-action", _kept),
        "On the batch the hidden activations are E times what they were.": Property(
            "thm-group-action", _moved
        ),
        "Only the *change* σ⁻¹(E S) - Z goes through the pseudo-inverse: "
        "what the layer does off the batch stays.": Property("thm-group-action"),
    },
    mistakes=lambda f, s, r, e: {
        "The whole right-hand side went through the pseudo-inverse. On the batch that is the same; "
        "off it, the layer forgets everything, even for E = I.": lambda: _whole(f, s, r, e),
        "The second layer has to undo E: multiply it by the inverse from the right.": lambda: (
            _act(f, s, r, e)[0],
            s,
        ),
        "The second layer is multiplied by E itself; it needs the inverse.": lambda: (
            _act(f, s, r, e)[0],
            s @ _bar(e),
        ),
        "I - M is the inverse of I + M to first order only; take the exact one.": lambda: (
            _act(f, s, r, e)[0],
            s @ _bar(2 * torch.eye(len(e), dtype=e.dtype) - e),
        ),
        "The first layer is multiplied by E. With an activation in between that is not enough: "
        "solve for weights that give σ⁻¹(E S).": lambda: (e @ f, s @ torch.linalg.inv(_bar(e))),
        "E is transposed: with samples as rows the activations become S Eᵀ.": lambda: _act(
            f, s, r, e.T
        ),
        "Inverse and element have changed places.": lambda: _act(f, s, r, torch.linalg.inv(e)),
    },
)
"""Symmetry teleportation: one group element between two layers."""


def _rescale(first: Tensor, second: Tensor, factors: Tensor) -> WeightPair:
    return factors[:, None] * first, second / torch.cat([factors, factors.new_ones(1)])


def _rescale_case(draw: Draw) -> Case:
    size, width = draw.choice(1, 2), draw.choice(2, 1, 3)
    powers = [draw.choice(2.0, 1.0, 0.5, 4.0) for _ in range(width)]
    return {
        "first": draw.matrix(width, size + 1),
        "second": draw.matrix(draw.choice(1, 2), width + 1),
        "factors": torch.tensor(powers, dtype=torch.float64),
    }


def _everywhere(case: Case, got: Any) -> bool:
    """Outputs on enough inputs, none of them special."""
    size = case["first"].shape[1] - 1
    grid = torch.cartesian_prod(*[torch.tensor([-2.0, -0.5, 1.0, 3.0]).double()] * size)
    rows = rows_with_one(grid.reshape(-1, size))
    first, second = got
    return alike(outputs(first, second, rows), outputs(case["first"], case["second"], rows))


_SAME_FUNCTION = {
    "The network computes the same function, on all inputs.": Property(
        "thm-change-of-basis", _everywhere
    )
}

change_of_basis = Check(
    name="change_of_basis",
    takes={"first": "[h, d + 1]", "second": "[o, h + 1]", "factors": "[h], > 0"},
    gives="(first, second)",
    cases=_rescale_case,
    answer=_rescale,
    properties={
        **_SAME_FUNCTION,
        "Neuron i: incoming weights and bias times c, outgoing weights divided by c.": Property(
            "thm-change-of-basis"
        ),
    },
    mistakes=lambda f, s, c: {
        "The bias of a neuron is an incoming weight: it is multiplied, too.": lambda: (
            torch.cat([c[:, None] * f[:, :-1], f[:, -1:]], dim=1),
            _rescale(f, s, c)[1],
        ),
        "Outgoing weights are *divided* by the factor.": lambda: (
            c[:, None] * f,
            s * torch.cat([c, c.new_ones(1)]),
        ),
        "The outgoing weights are not changed back.": lambda: (c[:, None] * f, s),
        "Incoming weights are multiplied and outgoing ones divided, "
        "not the other way round.": lambda: _rescale(f, s, 1 / c),
        "The bias of the second layer belongs to no hidden neuron: it stays.": lambda: (
            c[:, None] * f,
            s / torch.cat([c, c[-1:]]),
        ),
        "Nothing is rescaled.": lambda: (f, s),
    },
)
"""A positive factor for every hidden neuron of a network with ReLU or LeakyReLU."""


def _balance(first: Tensor, second: Tensor) -> WeightPair:
    factors = (second[:, :-1].norm(dim=0) / first.norm(dim=1)).sqrt()
    return _rescale(first, second, factors)


def _balance_case(draw: Draw) -> Case:
    width = draw.choice(1, 2, 3)
    first, second = draw.matrix(width, draw.choice(2, 3)), draw.matrix(draw.choice(1, 2), width + 1)
    first[:, 0] = draw.positive(width)  # no neuron without incoming or outgoing weights
    second[0, :-1] = draw.positive(width)
    return {"first": first, "second": second}


balanced = Check(
    name="balanced",
    takes={"first": "[h, d + 1]", "second": "[o, h + 1]"},
    gives="(first, second)",
    cases=_balance_case,
    answer=_balance,
    properties={
        **_SAME_FUNCTION,
        "Incoming weights (bias included) and outgoing "
        "weights of each neuron have the same norm.": Property(
            "thm-change-of-basis",
            lambda case, got: alike(got[0].norm(dim=1), got[1][:, :-1].norm(dim=0)),
        ),
    },
    mistakes=lambda f, s: {
        "The factor is √(b/a), b the outgoing norm: its root is missing.": lambda: _rescale(
            f, s, s[:, :-1].norm(dim=0) / f.norm(dim=1)
        ),
        "The factor is upside down: √(b/a) makes large incoming weights smaller.": lambda: _rescale(
            f, s, (f.norm(dim=1) / s[:, :-1].norm(dim=0)).sqrt()
        ),
        "The bias counts as an incoming weight, also in the norm.": lambda: _rescale(
            f, s, (s[:, :-1].norm(dim=0) / f[:, :-1].norm(dim=1)).sqrt()
        ),
        "Nothing is rescaled.": lambda: (f, s),
    },
)
"""The change of basis that balances every neuron."""
