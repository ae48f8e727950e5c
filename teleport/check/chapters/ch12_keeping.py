"""Chapters 12 and 13: keeping a function while something new is learned."""

import torch
from torch import Tensor

from teleport.check.draw import Draw
from teleport.check.engine import Case, Check, Property


def _kept_weights(start: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    change = weights - start
    return weights - change @ basis @ basis.T


def _kept_case(draw: Draw) -> Case:
    size, out = draw.choice(2, 3), draw.choice(1, 2)
    return {
        "start": draw.matrix(out, size),
        "weights": draw.matrix(out, size),
        "basis": draw.orthonormal(size, draw.integer(1, size - 1)),
    }


kept_weights = Check(
    name="kept_weights",
    takes={"start": "[d_out, d_in]", "weights": "[d_out, d_in]", "basis": "[d_in, k], orthonormal"},
    gives="[d_out, d_in]",
    cases=_kept_case,
    answer=_kept_weights,
    properties={
        "Kept inputs meet what they met at the start: W B = W₀ B.": Property(
            "thm-keep",
            lambda case, got: bool(
                torch.allclose(got @ case["basis"], case["start"] @ case["basis"], atol=1e-9)
            ),
        ),
        "W₀ + (W - W₀) P: all of the rest stays learned.": Property("eq-keep-displacement"),
    },
    mistakes=lambda s, w, b: {
        "You projected the weights. What has to leave the kept "
        "space is their *change* since the start.": lambda: w - w @ b @ b.T,
        "That is the change alone: add it to the start.": lambda: _kept_weights(s, w, b) - s,
        "You kept the part of the change that has to go.": lambda: s + (w - s) @ b @ b.T,
        "The change goes on from the start, not from the end.": lambda: (
            w + (w - s) - (w - s) @ b @ b.T
        ),
        "That keeps all and learns nothing.": lambda: s,
    },
)
"""Weights after any optimizer, put back into the null space of old inputs."""


def _ranks(tasks: list[Tensor]) -> list[int]:
    return [int(torch.linalg.matrix_rank(rows)) for rows in tasks]


def _joint(tasks: list[Tensor]) -> list[Tensor]:
    return [torch.cat(tasks[: i + 1]) for i in range(len(tasks))]


def _running(tasks: list[Tensor], taken: list[int]) -> list[int]:
    size = tasks[0].shape[1]
    return [max(size - sum(taken[: i + 1]), 0) for i in range(len(tasks))]


def _tasks_case(draw: Draw) -> Case:
    size = draw.choice(3, 4)
    count = draw.choice(2, 1, 3)
    return {"tasks": [draw.matrix(draw.choice(1, 2), size, low=-1, high=1) for _ in range(count)]}


free_directions = Check(
    name="free_directions",
    takes={"tasks": "list of [n, d], the inputs of a layer on each task"},
    gives="list of whole numbers, one after each task",
    cases=_tasks_case,
    answer=lambda tasks: [tasks[0].shape[1] - rank for rank in _ranks(_joint(tasks))],
    properties={
        "After a task those directions are free that *no* input of a task so far has.": Property(
            "thm-keep"
        )
    },
    mistakes=lambda t: {
        "Ranks do not add up where tasks share directions: "
        "take the rank of all together.": lambda: _running(t, _ranks(t)),
        "A sample takes a direction only if it is independent of the others.": lambda: _running(
            t, [len(rows) for rows in t]
        ),
        "That is what each task leaves on its own. Earlier tasks are to be kept, too.": lambda: [
            t[0].shape[1] - rank for rank in _ranks(t)
        ],
        "Those are the directions that are taken.": lambda: _ranks(_joint(t)),
    },
)
"""How much room a sequence of tasks leaves in a layer."""


def _leak(change: Tensor, basis: Tensor) -> float:
    return float((change @ basis).norm() / change.norm())


def _leak_case(draw: Draw) -> Case:
    size = draw.choice(2, 3)
    change = draw.matrix(draw.choice(1, 2), size)
    change[0, 0] = 4.0  # no change has no share
    return {"change": change, "basis": draw.orthonormal(size, draw.integer(1, size - 1))}


leak = Check(
    name="leak",
    takes={"change": "[d_out, d_in], of the weights", "basis": "[d_in, k], orthonormal"},
    gives="number",
    cases=_leak_case,
    answer=_leak,
    properties={
        "The share of the change that kept inputs meet, ‖ΔW B‖ / ‖ΔW‖.": Property("thm-keep")
    },
    mistakes=lambda w, b: {
        "That is the share of the squares.": lambda: _leak(w, b) ** 2,
        "That is what leaks, not its share.": lambda: float((w @ b).norm()),
        "That is the share outside of the kept space, where a change may be.": lambda: float(
            (w - w @ b @ b.T).norm() / w.norm()
        ),
        "The norms are Frobenius norms: every row counts.": lambda: float(
            torch.linalg.matrix_norm(w @ b, 2) / torch.linalg.matrix_norm(w, 2)
        ),
    },
)
"""How much of a step lies in the space that was to be kept."""


def _nearest(queries: Tensor, index: Tensor, k: int) -> list[set[int]]:
    places = (queries @ index.T).topk(k, dim=1).indices
    return [set(row) for row in places.tolist()]


def _recall(before: Tensor, after: Tensor, index: Tensor, k: int) -> float:
    pairs = zip(_nearest(before, index, k), _nearest(after, index, k), strict=True)
    return sum(len(old & new) for old, new in pairs) / (k * len(before))


def _same_places(before: Tensor, after: Tensor, index: Tensor, k: int) -> float:
    old, new = ((q @ index.T).topk(k, dim=1).indices for q in (before, after))
    return float((old == new).double().mean())


def _queries_case(draw: Draw) -> Case:
    size, count = draw.choice(3, 4), draw.choice(1, 2)
    index = draw.orthonormal(size, size).T.contiguous()

    def queries() -> Tensor:  # their inner products with the index are whole numbers, all different
        return torch.tensor([draw.order(size) for _ in range(count)]).double() @ index

    return {"before": queries(), "after": queries(), "index": index, "k": draw.choice(2, 1)}


recall_at = Check(
    name="recall_at",
    takes={
        "before": "[q, d], queries as the old model sees them",
        "after": "[q, d], as the new one does",
        "index": "[m, d], made by the old model",
        "k": "whole number",
    },
    gives="number",
    cases=_queries_case,
    answer=_recall,
    properties={
        "The mean share of the k nearest in the index, "
        "by inner products, that are found again.": Property("eq-real-recall")
    },
    mistakes=lambda b, a, index, k: {
        "The order among the k does not count, only whether each is found.": lambda: _same_places(
            b, a, index, k
        ),
        "The nearest have the *largest* inner products.": lambda: _recall(-b, -a, index, k),
        "That is how many are found: divide by k.": lambda: _recall(b, a, index, k) * k,
        "Look at k neighbours, not at the first alone.": lambda: _recall(b, a, index, 1),
        "That is the sum over the queries: take their mean.": lambda: (
            _recall(b, a, index, k) * len(b)
        ),
    },
)
"""How much of an old index old queries still find with a new model."""
