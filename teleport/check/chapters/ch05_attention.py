"""Chapter 5: whose rows each projection reads, and the direction that LayerNorm leaves free."""

from collections.abc import Callable

import torch
from torch import Tensor

from teleport.check.answers import alike, vanishes
from teleport.check.chapters.ch03_mlp import rows_with_one
from teleport.check.draw import Draw
from teleport.check.engine import Case, Check, Property


def _tokens_case(draw: Draw) -> Case:
    samples, width = draw.choice(1, 2), draw.choice(1, 2)
    return {
        "queries": draw.matrix(samples, draw.choice(1, 2), width),
        "context": draw.matrix(samples, draw.choice(2, 1, 3), width),
    }


def _rows_of(
    *tokens: Tensor, make: Callable[[Tensor], Tensor] = rows_with_one
) -> tuple[Tensor, ...]:
    return tuple(map(make, tokens))


attention_rows = Check(
    name="attention_rows",
    takes={"queries": "[n, T, D]", "context": "[n, S, D]"},
    gives="(R_q, R_k, R_v) as rows",
    cases=_tokens_case,
    answer=lambda q, c: _rows_of(q, c, c),
    properties={
        "q reads the tokens of the queries; k and v read those of the context: "
        "one row for each token of each sample, with a 1 for the bias.": Property("thm-span")
    },
    mistakes=lambda q, c: {
        "The bias column is forgotten: append a 1 to every row.": lambda: _rows_of(
            q, c, c, make=lambda x: x.reshape(-1, x.shape[-1])
        ),
        "Keys and values read the context, not the queries.": lambda: _rows_of(q, q, q),
        "Only keys and values read the context; queries have rows of their own.": lambda: _rows_of(
            c, c, c
        ),
        "Queries and context are swapped.": lambda: _rows_of(c, q, q),
        "Values are made from the context like keys; only their weights differ.": lambda: _rows_of(
            q, c, q
        ),
        "The mean over the tokens loses rows: every token of every sample counts.": lambda: (
            _rows_of(q.mean(1), c.mean(1), c.mean(1))
        ),
        "Only the first sample is there: join the tokens of all samples.": lambda: _rows_of(
            q[:1], c[:1], c[:1]
        ),
        "These are the tokens as columns; here they are wanted as rows.": lambda: _rows_of(
            q, c, c, make=lambda x: rows_with_one(x).T
        ),
        "Samples and tokens stay two axes: flatten them into one.": lambda: _rows_of(
            q, c, c, make=lambda x: torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
        ),
    },
)
"""The input rows of the projections of (cross-)attention."""


def _direction(gamma: Tensor, beta: Tensor) -> Tensor:
    return torch.cat([1 / gamma, -(beta / gamma).sum()[None]])


def _norm_case(draw: Draw) -> Case:
    size = draw.choice(2, 3, 4)
    signs = torch.tensor([draw.choice(1.0, -1.0) for _ in range(size)], dtype=torch.float64)
    powers = torch.tensor([draw.choice(1.0, 2.0, 4.0) for _ in range(size)], dtype=torch.float64)
    return {"gamma": signs * powers, "beta": draw.matrix(size)}


def _normed(case: Case) -> Tensor:
    """Rows behind the LayerNorm: one for each pair of coordinates, so that they span all."""
    gamma, beta = case["gamma"], case["beta"]
    centred = torch.eye(len(gamma), dtype=torch.float64) - 1 / len(gamma)
    return torch.cat([gamma * centred + beta, centred.new_ones(len(gamma), 1)], dim=1)


layernorm_direction = Check(
    name="layernorm_direction",
    takes={"gamma": "[d], no 0", "beta": "[d]"},
    gives="[d + 1], any length but 0",
    cases=_norm_case,
    answer=_direction,
    properties={
        "The direction is orthogonal to every row behind the LayerNorm, its 1 included.": Property(
            "thm-layernorm", lambda case, got: vanishes(_normed(case) @ got)
        ),
        "The direction is not 0.": Property(
            "thm-layernorm", lambda case, got: bool(got.norm() > 1e-9)
        ),
    },
    mistakes=lambda g, b: {
        "The rows are (h - β)/γ with sum 0: the weights are divided by γ, "
        "not multiplied.": lambda: torch.cat([g, -(b * g).sum()[None]]),
        "The bias entry has the wrong sign: it takes away what β contributes.": lambda: torch.cat(
            [1 / g, (b / g).sum()[None]]
        ),
        "The bias entry is missing: with β the rows do not sum to 0 without it.": lambda: torch.cat(
            [1 / g, g.new_zeros(1)]
        ),
        "β is divided by γ, too, before it is summed.": lambda: torch.cat([1 / g, -b.sum()[None]]),
        "All entries equal would be right for γ = 1 only: divide by γ.": lambda: torch.cat(
            [torch.ones_like(g), -b.sum()[None]]
        ),
        "The bias is the last entry, not the first.": lambda: _direction(g, b).roll(1),
    },
)
"""The direction of a map behind a LayerNorm that no data can see."""


causal_tokens = Check(
    name="causal_tokens",
    takes={"tokens": "T", "read": "position the loss reads, from 0"},
    gives="[T], True or False",
    cases=lambda draw: {
        "tokens": (tokens := draw.integer(1, 4)),
        "read": draw.integer(0, tokens - 1),
    },
    answer=lambda tokens, read: torch.arange(tokens) <= read,
    properties={
        "Under a causal mask a loss that reads one position depends on the tokens up to it, "
        "itself included: only their keys and values have to stay.": Property("thm-invariance")
    },
    mistakes=lambda t, at: {
        "The position that is read sees itself, too.": lambda: torch.arange(t) < at,
        "Causal means that a position sees those *before* it, not behind it.": lambda: (
            torch.arange(t) >= at
        ),
        "These are all tokens: the mask hides those behind the position.": lambda: torch.ones(
            t, dtype=torch.bool
        ),
        "The position that is read alone is not enough: its query sees the earlier keys.": lambda: (
            torch.arange(t) == at
        ),
        "You marked the tokens that do *not* count.": lambda: torch.arange(t) > at,
    },
)
"""Which tokens count under a causal mask."""

ELEMENTS = (
    [[1.0, 1.0], [0.0, 1.0]],
    [[2.0, 1.0], [1.0, 1.0]],
    [[0.0, -1.0], [1.0, 0.0]],
    [[2.0, 0.0], [0.0, 0.5]],
    [[2.0]],
    [[-0.5]],
)
"""Invertible, and their inverses have no rounding."""


def _move_case(draw: Draw) -> Case:
    element = torch.tensor(draw.choice(*ELEMENTS), dtype=torch.float64)
    width = draw.choice(2, 1, 3)
    return {
        "query": draw.matrix(len(element), width),
        "key": draw.matrix(len(element), width),
        "element": element,
    }


qk_move = Check(
    name="qk_move",
    takes={"query": "[h, d]", "key": "[h, d]", "element": "[h, h], invertible"},
    gives="(query [h, d], key [h, d])",
    cases=_move_case,
    answer=lambda q, k, a: (a @ q, torch.linalg.inv(a).T @ k),
    properties={
        "Every score qᵀk is as before, for any two tokens: W_qᵀ W_k stays the same.": Property(
            "eq-att-head", lambda case, got: alike(got[0].T @ got[1], case["query"].T @ case["key"])
        ),
        "The queries are multiplied by the element.": Property("eq-att-head"),
    },
    mistakes=lambda q, k, a: {
        "The inverse is there, its transpose is missing: qᵀ Aᵀ meets A⁻ᵀ k.": lambda: (
            a @ q,
            torch.linalg.inv(a) @ k,
        ),
        "The keys have to undo what the queries do: A⁻ᵀ, not A again.": lambda: (a @ q, a @ k),
        "Only the queries are moved. The scores change unless the keys undo it.": lambda: (
            a @ q,
            k,
        ),
        "Transposing is not inverting; it is enough for rotations only.": lambda: (a @ q, a.T @ k),
        "The scores are as before, but it is the keys that you multiply by A.": lambda: (
            torch.linalg.inv(a).T @ q,
            a @ k,
        ),
        "Nothing has moved.": lambda: (q, k),
    },
)
"""A move of queries and keys that no data notices, and no null space holds."""
