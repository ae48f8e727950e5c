"""Chapter 2: what rank means in floating point, and bases for a share of the energy."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from teleport import reference
from teleport.check.answers import alike, misfit
from teleport.check.draw import Draw
from teleport.check.engine import Case, Check, Property

RANK_TAUS = (0.9, 0.5, 0.99)


def _cut_at(matrix: Tensor, share: float, of: Any = torch.linalg.matrix_norm) -> int:
    return int((torch.linalg.svdvals(matrix.double()) > share * of(matrix.double())).sum())


def _eps(matrix: Tensor) -> float:
    eps: float = torch.finfo(matrix.dtype).eps
    return eps


def _root(matrix: Tensor) -> float:
    return math.sqrt(matrix.shape[1])


_largest = partial(torch.linalg.matrix_norm, ord=2)


def _cumulated(matrix: Tensor) -> int:
    energy = torch.linalg.svdvals(matrix).square()
    reached = energy.cumsum(0) >= energy.sum()
    return int((~reached).sum()) + 1


def _rank_case(draw: Draw) -> Case:
    """No value is between the cut of the rule and what double precision resolves."""
    dtype = draw.choice(torch.float32, torch.float64)
    rows, columns = draw.choice((32, 2), (3, 3), (4, 4), (32, 3), (2, 4))
    eps = torch.finfo(dtype).eps
    single = dtype == torch.float32
    near, fine = (2.0, 2.5) if single else (20.0, 20.0)
    matrix = torch.zeros(rows, columns, dtype=dtype)
    matrix[0, 0] = largest = draw.choice(1.0, 1024.0, 4.0, 0.0)
    for place in range(1, min(rows, columns)):
        others = (1.25 * eps, 2.0**-30, 0.0) if place > 1 or columns == 2 else ()
        share = draw.choice(1.0, near * eps, fine * eps, 20.0 * eps, *others)
        matrix[place, place] = largest * share
    return {"matrix": matrix}


rank = Check(
    name="rank",
    takes={"matrix": "[n, d]"},
    gives="whole number",
    cases=_rank_case,
    answer=lambda m: _cut_at(m, _root(m) * _eps(m)),
    properties={
        "The rank is the number of singular values strictly above √d · eps · ‖matrix‖_F.": Property(
            "thm-rank"
        )
    },
    mistakes=lambda m: {
        "Rounding is never exactly 0: "
        "count the singular values above a cut, not above 0.": lambda: _cut_at(m, 0.0),
        "The cut is that of float64, whatever the dtype of the matrix: "
        "take eps of its dtype.": lambda: _cut_at(m, _root(m) * torch.finfo(torch.float64).eps),
        "The cut is that of float32, whatever the dtype of the matrix: "
        "take eps of its dtype.": lambda: _cut_at(m, _root(m) * torch.finfo(torch.float32).eps),
        "The factor √d is missing in the cut.": lambda: _cut_at(m, _eps(m)),
        "max(n, d) · largest is another rule: its cut grows with the samples, and a batch "
        "that is repeated has another rank.": lambda: _cut_at(m, max(m.shape) * _eps(m), _largest),
        "The factor is the *root* of d: rounding errors have random signs.": lambda: _cut_at(
            m, m.shape[1] * _eps(m)
        ),
        "d is the number of inputs, the columns; the number of samples does not count.": lambda: (
            _cut_at(m, len(m) ** 0.5 * _eps(m))
        ),
        "The cut is a share of the Frobenius norm, not of the largest singular value: the "
        "layer rounds with all of its inputs.": lambda: _cut_at(m, _root(m) * _eps(m), _largest),
        "The comparison must be strict (>): in a zero matrix every value equals the cut.": lambda: (
            int((torch.linalg.svdvals(m) >= _root(m) * _eps(m) * m.norm()).sum())
        ),
        "The cut is relative: it is a share of the norm of the matrix.": lambda: _cut_at(
            m, _root(m) * _eps(m), lambda _: 1.0
        ),
        "A cumulated sum that reaches its total is no rank: small values vanish beside large ones, "
        "and rounding can miss the total.": lambda: _cumulated(m),
    },
)
"""The numerical rank, τ = 1."""


def _energy_rank(values: Tensor, tau: float) -> int:
    energy = values.square().cumsum(0)
    return int((energy < tau * energy[-1]).sum()) + 1


def _spectrum(draw: Draw) -> Tensor:
    """Distinct singular values whose energy shares are never a τ of ours."""
    count = draw.choice(2, 3, 4, 1)
    chosen = sorted((2.0**k for k in draw.order(4)[:count]), reverse=True)
    return torch.tensor(chosen, dtype=torch.float64)


energy_rank = Check(
    name="energy_rank",
    takes={"values": "[v], largest first", "tau": "in (0, 1)"},
    gives="whole number",
    cases=lambda draw: {"values": _spectrum(draw), "tau": draw.choice(*RANK_TAUS)},
    answer=_energy_rank,
    properties={
        "k is the smallest number of directions whose squared "
        "singular values reach τ of their sum.": Property("thm-rank")
    },
    mistakes=lambda v, tau: {
        "Energy is the sum of *squares*: square the singular values.": lambda: _energy_rank(
            v.sqrt(), tau
        ),
        "k is one short: count the direction that reaches τ, too.": lambda: (
            _energy_rank(v, tau) - 1
        ),
        "k is one too large.": lambda: _energy_rank(v, tau) + 1,
        "You count the values above a share of the largest; "
        "τ is a share of the total energy.": lambda: int((v > (1 - tau) * v[0]).sum()),
        "You count the values that are a share τ on their own; "
        "add them up from the largest.": lambda: int((v.square() >= tau * v.square().sum()).sum()),
        "τ is the share to keep; you kept a share 1 - τ.": lambda: _energy_rank(v, 1 - tau),
    },
)
"""How many directions a share τ of the energy needs."""


def _axes_rows(draw: Draw) -> Tensor:
    """Rows with known, distinct singular values; some repeated, some 0, sometimes turned."""
    values = _spectrum(draw)
    size = len(values) + draw.choice(1, 0, 2)
    rows = torch.zeros(len(values), size, dtype=torch.float64)
    for place, column in enumerate(draw.order(size)[: len(values)]):
        rows[place, column] = values[place]
    if size > 1 and draw.choice(False, True):
        turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
        rows[:, :2] = rows[:, :2] @ turn
    if draw.choice(False, True):
        rows = torch.cat([rows, torch.zeros(1, size, dtype=torch.float64)])
    return rows


def _basis(rows: Tensor, tau: float) -> Tensor:
    return reference.significant_basis(rows.T, tau)


def _count(rows: Tensor, tau: float) -> int:
    return reference.equation_3(rows.T, tau)


def _leading(rows: Tensor, count: int) -> Tensor:
    vectors: Tensor = torch.linalg.svd(rows, full_matrices=True).Vh.T
    return vectors[:, :count]


def basis_misfit(case: Case, answer: Any, right: Tensor) -> tuple[str, str] | None:
    """Like `misfit`, but the number of columns is a property, not a shape."""
    found = misfit(answer, right)
    free = isinstance(answer, Tensor) and answer.ndim == 2 and len(answer) == len(right)
    return None if free and answer.dtype == right.dtype else found


def projector(answer: Any) -> Any:
    """``B Bᵀ``, which is the same for every basis of a space."""
    return answer @ answer.T


def orthonormal(case: Case, answer: Tensor) -> bool:
    """Whether the columns are."""
    return alike(answer.T @ answer, torch.eye(answer.shape[1], dtype=answer.dtype))


_ORTHONORMAL = {
    "The columns of the basis are orthonormal: Bᵀ B = I.": Property("thm-layerwise", orthonormal)
}


basis = Check(
    name="basis",
    takes={"rows": "[n, d_in]", "tau": "in (0, 1]"},
    gives="[d_in, k]",
    cases=lambda draw: {"rows": _axes_rows(draw), "tau": draw.choice(1.0, *RANK_TAUS)},
    answer=_basis,
    properties={
        **_ORTHONORMAL,
        "k is the smallest number of directions that hold a share τ of the energy; "
        "at τ = 1 the numerical rank.": Property(
            "thm-rank", lambda case, got: got.shape[1] == _count(case["rows"], case["tau"])
        ),
        "The columns span the leading directions of the input rows.": Property(
            "thm-span",
            lambda case, got: alike(projector(got), projector(_basis(case["rows"], case["tau"]))),
        ),
    },
    mistakes=lambda r, tau: {
        "k is one short: the direction that reaches the share τ is kept, too.": lambda: _leading(
            r, _count(r, tau) - 1
        ),
        "k is one too large: nothing is left of the "
        "null space that this direction was in.": lambda: _leading(r, _count(r, tau) + 1),
        "τ is not used: this is the basis for τ = 1.": lambda: _leading(r, _count(r, 1.0)),
        "All singular vectors are kept, also those whose singular value is 0.": lambda: _leading(
            r, min(r.shape)
        ),
        "Energy is the sum of *squares*: square the singular values.": lambda: _leading(
            r, _energy_rank(torch.linalg.svdvals(r).sqrt(), tau) if tau < 1 else _count(r, tau)
        ),
        "These are the singular vectors of the wrong side: the directions of the *samples*. With "
        "samples as rows the inputs' directions are "
        "the rows of Vh.": lambda: torch.linalg.svd(r, full_matrices=False).U[:, : _count(r, tau)],
        "torch.linalg.svd returns Vh, the transposed of V: its *rows* are the vectors.": lambda: (
            torch.linalg.svd(r, full_matrices=True).Vh[:, : _count(r, tau)]
        ),
        "You return the directions that are *not* kept, the null space.": lambda: _leading(
            r, r.shape[1]
        )[:, _count(r, tau) :],
    },
    fits=basis_misfit,
    view=projector,
)
"""The basis of what a layer's inputs keep fixed."""


def _batches_case(draw: Draw) -> Case:
    size = draw.choice(3, 2, 4)
    count = draw.choice(2, 1, 3)
    return {"batches": [draw.matrix(draw.choice(1, 2), size) for _ in range(count)]}


def _merged(batches: list[Tensor]) -> Tensor:
    return _basis(torch.cat(batches), 1.0)


merged_basis = Check(
    name="merged_basis",
    takes={"batches": "list of [n, d_in]"},
    gives="[d_in, k]",
    cases=_batches_case,
    answer=_merged,
    properties={
        **_ORTHONORMAL,
        "Every row of every batch lies in the span of the basis, and nothing else does.": Property(
            "thm-batch",
            lambda case, got: alike(projector(got), projector(_merged(case["batches"]))),
        ),
    },
    mistakes=lambda batches: {
        "Only the last batch is kept fixed: the earlier ones will drift.": lambda: _basis(
            batches[-1], 1.0
        ),
        "Only the first batch is kept fixed: the later ones will drift.": lambda: _basis(
            batches[0], 1.0
        ),
        "The bases of the batches side by side are not orthonormal: "
        "decompose them together.": lambda: torch.cat([_basis(b, 1.0) for b in batches], dim=1),
        "The mean of the batches is one batch; what has to stay are all their rows.": lambda: (
            _basis(torch.stack([b.mean(0) for b in batches]), 1.0)
        ),
        "The rows were centred: a null space is about the rows themselves, not their deviation "
        "from the mean.": lambda: _basis(torch.cat(batches) - torch.cat(batches).mean(0), 1.0),
    },
    fits=basis_misfit,
    view=projector,
)
"""One basis for several batches, τ = 1."""
