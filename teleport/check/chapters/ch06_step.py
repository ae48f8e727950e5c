"""Chapter 6: T along a ray, the step to a wanted growth, and other geometries."""

import math
from typing import Any

import torch
from torch import Tensor

from teleport.check.answers import alike
from teleport.check.engine import Case, Check, Property

polynomial_degree = Check(
    name="polynomial_degree",
    takes={"moved": "list of True or False, first layer first"},
    gives="whole number",
    cases=lambda draw: {
        "moved": [draw.choice(False, True) for _ in range(draw.choice(2, 1, 3, 4))]
    },
    answer=lambda moved: 2 * sum(moved[1:]),
    properties={
        "Along a ray of the null spaces of an MLP the degree of T is twice the number of moved "
        "layers that the backward pass goes through: "
        "all but the first.": Property("thm-polynomial")
    },
    mistakes=lambda m: {
        "The backward pass does not go through the first layer: its weights are in no δ.": lambda: (
            2 * sum(m)
        ),
        "T is a *square* of the gradient: twice the degree of δ.": lambda: sum(m[1:]),
        "Only layers that move count.": lambda: 2 * (len(m) - 1),
        "It is the first layer that the backward pass leaves out, not the last.": lambda: (
            2 * sum(m[:-1])
        ),
        "The degrees of the layers add up, as each enters δ once as a factor.": lambda: (
            2 ** sum(m[1:])
        ),
    },
)
"""The degree of T along a ray in the null spaces of a multi-layer perceptron."""


def _growth_step(coefficients: Tensor, growth: float) -> float:
    c0, c1, c2 = map(float, coefficients)
    missing = (growth**2 - 1) * c0
    # The stable form of the positive root: c2 may be 0.
    return 2 * missing / (c1 + math.sqrt(c1**2 + 4 * c2 * missing))


def _reaches(case: Case, got: Any) -> bool:
    c0, c1, c2 = case["coefficients"].tolist()
    s = float(got)
    return alike(c0 + c1 * s + c2 * s * s, case["growth"] ** 2 * c0)


growth_step = Check(
    name="growth_step",
    takes={"coefficients": "[3]: T(s) = c0 + c1 s + c2 s², c0, c1 > 0, c2 >= 0", "growth": "> 1"},
    gives="number",
    cases=lambda draw: {
        "coefficients": torch.cat([draw.positive(2), draw.matrix(1, low=0)]),
        "growth": draw.choice(2.0, 1.5, 3.0),
    },
    answer=_growth_step,
    properties={
        "After the step the gradient *norm* is `growth` times as long: "
        "T(s) = growth² T(0).": Property("thm-polynomial", _reaches),
        "The step goes along the direction, s > 0.": Property(
            "thm-polynomial", lambda case, got: float(got) > 0
        ),
    },
    mistakes=lambda c, growth: {
        "T is half the *square* of the norm: it has to grow by growth².": lambda: _growth_step(
            c, growth**0.5
        ),
        "c2 is left out: the step of the linear model is too long.": lambda: float(
            (growth**2 - 1) * c[0] / c[1]
        ),
        "That is the other root, on the ray *against* the direction.": lambda: float(
            (-c[1] - (c[1] ** 2 + 4 * c[2] * (growth**2 - 1) * c[0]).sqrt()) / (2 * c[2])
        ),
        "T(0) is there already: only the missing (growth² - 1) T(0) has to come.": lambda: (
            _growth_step(c, math.sqrt(growth**2 + 1))
        ),
    },
)
"""The step that makes the gradient a wanted factor longer."""


adam_direction = Check(
    name="adam_direction",
    takes={"gradient": "[d]", "second_moment": "[d], >= 0", "eps": "> 0"},
    gives="[d]",
    cases=lambda draw: {
        "gradient": draw.matrix(size := draw.choice(2, 1, 3)),
        "second_moment": draw.matrix(size, low=0) ** 2,
        "eps": draw.choice(1.0, 0.5),
    },
    answer=lambda g, v, eps: g / (v.sqrt() + eps),
    properties={
        "For Adam M = diag(√v + ε), and the tangent direction is M⁻¹ g.": Property("thm-geometry")
    },
    mistakes=lambda g, v, e: {
        "The direction is M⁻¹ g, and you multiply by M.": lambda: g * (v.sqrt() + e),
        "The root of v is missing.": lambda: g / (v + e),
        "ε is added outside the root: √v + ε.": lambda: g / (v + e).sqrt(),
        "This is g itself, the direction of SGD with M = I.": lambda: g,
        "M⁻¹ acts once: this is M⁻² g.": lambda: g / (v.sqrt() + e) ** 2,
        "That is the root of M⁻¹: the direction has M⁻¹ whole.": lambda: g / (v.sqrt() + e).sqrt(),
        "The length of g is lost: divide by √v + ε, not by |g|.": lambda: g.sign(),
    },
)
"""The direction in which the input of a layer moves when T is measured as Adam sees it."""


path_degree = Check(
    name="path_degree",
    takes={"blocks": "list of lists: moved layers on each branch of a block, 0 for a skip"},
    gives="whole number",
    cases=lambda draw: {
        "blocks": [
            [draw.integer(0, 3) for _ in range(draw.choice(2, 1, 3))]
            for _ in range(draw.choice(1, 2, 0, 3))
        ]
    },
    answer=lambda blocks: 2 * (1 + sum(map(max, blocks))),
    properties={
        "The degree of T is twice the number of moved layers on the longest path of an error, from "
        "the loss through the head and every block to the embedding.": Property("thm-polynomial")
    },
    mistakes=lambda b: {
        "Branches stand side by side: a path takes one of them, "
        "so take the longest and not their sum.": lambda: 2 * (1 + sum(map(sum, b))),
        "The error passes the head, too: its weights are in every δ before it.": lambda: (
            2 * sum(map(max, b))
        ),
        "T is a *square* of the gradient: twice the degree of δ.": lambda: 1 + sum(map(max, b)),
        "The path ends at the embedding's output: "
        "the embedding is reached and not passed.": lambda: 2 * (2 + sum(map(max, b))),
        "The longest path counts, not the shortest: T has the highest power that occurs.": lambda: (
            2 * (1 + sum(map(min, b)))
        ),
        "Blocks follow one another: the path goes through all, so add them up.": lambda: (
            2 * (1 + max(map(max, b), default=0))
        ),
    },
)
"""The degree of T for a network of blocks with branches side by side."""
