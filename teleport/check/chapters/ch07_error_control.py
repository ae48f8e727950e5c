"""Chapter 7: how far the outputs drift, on the batch below τ = 1 and on other data."""

import math

import torch
from torch import Tensor

from teleport import reference
from teleport.check.draw import Draw
from teleport.check.engine import Case, Check, Property

DRIFT_TAUS = (0.75, 0.9, 0.96)


def _axis_rows(draw: Draw, size: int) -> Tensor:
    """Rows along the axes: one long, so that every τ leaves room; no energy share is a τ."""
    rows = torch.zeros(size, size, dtype=torch.float64)
    for place, column in enumerate(draw.order(size)):
        rows[place, column] = (8.0, 1.0, 2.0)[place]
    return rows


def _outside(matrix: Tensor, rows: Tensor, tau: float) -> Tensor:
    return reference.equation_11(matrix, reference.significant_basis(rows.T, tau))


def _spectral(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def _move_case(draw: Draw) -> Case:
    size, tau = draw.choice(2, 3), draw.choice(*DRIFT_TAUS)
    rows = _axis_rows(draw, size)
    # Projected with coordinate axes: the entries stay whole numbers.
    move = _outside(draw.matrix(draw.choice(1, 2), size), rows, tau).round()
    return {"move": move + 0.0, "rows": rows, "tau": tau}


drift_bound = Check(
    name="drift_bound",
    takes={"move": "[d_out, d_in], projected at tau", "rows": "[n, d_in]", "tau": "in (0, 1)"},
    gives="number",
    cases=_move_case,
    answer=lambda m, r, tau: _spectral(m) * math.sqrt(1 - tau) * float(r.norm()),
    properties={
        "The outputs drift by no more than the bound says: ‖ΔW R‖_F is below it.": Property(
            "thm-drift",
            lambda case, got: float((case["rows"] @ case["move"].T).norm()) <= float(got) + 1e-9,
        ),
        "The bound is ‖ΔW‖₂ √(1 - τ) ‖R‖_F.": Property("thm-drift"),
    },
    mistakes=lambda m, r, tau: {
        "What is left out is a share 1 - τ of the *energy*, a square: take its root.": lambda: (
            _spectral(m) * (1 - tau) * float(r.norm())
        ),
        "The bound has the share that is left out, 1 - τ, not the share that is kept.": lambda: (
            _spectral(m) * math.sqrt(tau) * float(r.norm())
        ),
        "The norm of ΔW is the spectral norm; with the Frobenius norm the bound is true but "
        "looser than it need be.": lambda: float(m.norm()) * math.sqrt(1 - tau) * float(r.norm()),
        "The norm of R is the Frobenius norm: the outputs of all samples together drift.": lambda: (
            _spectral(m) * math.sqrt(1 - tau) * _spectral(r)
        ),
        "τ is not used: this bounds any move.": lambda: _spectral(m) * float(r.norm()),
        "That is the drift itself. The bound uses only norms and τ.": lambda: float(
            (r @ m.T).norm()
        ),
    },
)
"""The bound on the drift of one layer for τ < 1."""


def _mean_drift(move: Tensor, rows: Tensor) -> float:
    return float((rows @ move.T).square().sum()) / len(rows)


held_out_drift = Check(
    name="held_out_drift",
    takes={"move": "[d_out, d_in]", "rows": "[n, d_in], of other data"},
    gives="number",
    cases=lambda draw: {
        "move": draw.matrix(draw.choice(1, 2), size := draw.choice(2, 1, 3)),
        "rows": draw.matrix(draw.choice(2, 1, 3), size),
    },
    answer=_mean_drift,
    properties={
        "The outputs move by tr(ΔW C ΔWᵀ) in the mean square, C = Σ x xᵀ / n.": Property(
            "thm-batch"
        )
    },
    mistakes=lambda m, r: {
        "C is the *mean* of x xᵀ: divide by the number of rows.": lambda: float(
            (r @ m.T).square().sum()
        ),
        "C is the second moment, not the covariance: do not subtract the mean.": lambda: (
            _mean_drift(m, r - r.mean(0))
        ),
        "The mean is over the samples; the outputs of one sample are summed.": lambda: float(
            (r @ m.T).square().mean()
        ),
        "That is the root of the mean square.": lambda: math.sqrt(_mean_drift(m, r)),
        "That is the drift of the mean input, not the mean drift.": lambda: float(
            (m @ r.mean(0)).square().sum()
        ),
        "The data are missing: ‖ΔW‖² is the drift for inputs of unit variance only.": lambda: float(
            m.square().sum()
        ),
    },
)
"""How far a move drives the outputs on data that were not in the batch."""


def _total(gradients: list[Tensor], rows: list[Tensor], tau: float) -> Tensor:
    moves = [_outside(g, r, tau) for g, r in zip(gradients, rows, strict=True)]
    return torch.stack(moves).sum(0)


def _steps_case(draw: Draw) -> Case:
    size, out, steps = draw.choice(2, 3), draw.choice(1, 2), draw.choice(2, 1, 3)
    return {
        "gradients": [draw.matrix(out, size) for _ in range(steps)],
        "rows": [_axis_rows(draw, size) for _ in range(steps)],
        "tau": draw.choice(*DRIFT_TAUS),
    }


total_move = Check(
    name="total_move",
    takes={
        "gradients": "list of [d_out, d_in], one for each step",
        "rows": "list of [n, d_in], the inputs at each step",
        "tau": "in (0, 1)",
    },
    gives="[d_out, d_in]",
    cases=_steps_case,
    answer=_total,
    properties={
        "Below τ = 1 the inputs drift: every step is projected with "
        "the basis of the inputs as they are then.": Property("thm-drift")
    },
    mistakes=lambda g, r, tau: {
        "The basis of the first step is reused. At τ = 1 it stays valid (thm-invariance); below τ "
        "= 1 the inputs drift with every step, "
        "and each step needs a basis of its own.": lambda: _total(g, [r[0]] * len(g), tau),
        "The last basis is used for all steps; "
        "each step is projected with the rows it has.": lambda: _total(g, [r[-1]] * len(g), tau),
        "Only the last step is there: add the moves of all.": lambda: _outside(g[-1], r[-1], tau),
        "τ is not used: at τ = 1 these rows leave no room at all.": lambda: _total(g, r, 1.0),
        "One basis of all steps together keeps more fixed than each step asks for.": lambda: (
            _outside(torch.stack(g).sum(0), torch.cat(r), tau)
        ),
        "You projected *onto* the span of the inputs instead of out of it.": lambda: (
            torch.stack(g).sum(0) - _total(g, r, tau)
        ),
        "Nothing is projected.": lambda: torch.stack(g).sum(0),
    },
)
"""Several steps below τ = 1, each with a basis of its own."""
