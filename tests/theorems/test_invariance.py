"""T2 in floating point: a joint null-space move of any size keeps everything; others do not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from teleport.subspace import Basis, RowSpace
from tests.support.strategies import (
    Case,
    Problem,
    add_matrices,
    cases,
    layer_rows,
    seeds,
)

CLEAR = Case((4, 9, 10, 9, 3), (True,) * 4, "Tanh", "cross_entropy", samples=5, rank=4, seed=7)
"""Hidden layers with 5 to 6 free directions; in the first there is none."""


def bases_of(problem: Problem) -> list[Basis]:
    found = []
    for rows in layer_rows(problem):
        space = RowSpace()
        space.add(rows)
        found.append(space.basis())
    return found


def noise(problem: Problem, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(m.out_features, m.in_features + (m.bias is not None)) for m in problem.linears]
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def drift_bounds(case: Case, problem: Problem, moved: Problem) -> list[float]:
    """How far the outputs of each layer may move by rounding, in Frobenius norm.

    Let R be a layer's input rows, V and W the weights after and before, Δ = V − W, u = eps, and
    m = max(rows, d_in). Then, with ‖Δ‖ ≤ ‖V‖ + ‖W‖ =: S,

    - the rank rule leaves of R outside the basis at most √m · m u ‖R‖, on which Δ acts;
    - Δ was projected, and V = W + Δ was rounded, with entries wrong by a few u S;
    - the two products R Wᵀ and R Vᵀ are sums of d_in terms: at most m u S ‖R‖ each;
    - an input that moved by E before moves the output by ‖V‖ E.

    Together E' ≤ ‖V‖ E + C m^{3/2} u S ‖R‖ with C = 8; the activation multiplies by its Lipschitz
    constant, and rounds.
    """
    eps, error, bounds = torch.finfo(case.dtype).eps, 0.0, []
    layers = zip(layer_rows(problem), problem.linears, moved.linears, strict=True)
    for rows, before, after in layers:
        old, new = (
            sum(float(p.detach().norm()) for p in layer.parameters()) for layer in (before, after)
        )
        error = new * error + 8 * max(rows.shape) ** 1.5 * eps * (old + new) * float(rows.norm())
        bounds.append(error)
        error = case.bend.lipschitz * error + 4 * eps * bounds[-1]
    return bounds


def outputs(problem: Problem) -> list[Tensor]:
    """What each layer puts out."""
    found: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda _, __, z: found.append(z)) for m in problem.linears]
    problem.model(problem.x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.verifies("thm-invariance")
@given(cases(), seeds, st.integers(0, 6))
def test_null_moves_of_any_size_keep_all_activations(case: Case, seed: int, power: int) -> None:
    problem, moved = case.build(), case.build()
    pairs = zip(bases_of(problem), noise(problem, seed), strict=True)
    add_matrices(moved, [basis.project(move) for basis, move in pairs], 10.0**power)
    changes = [(a - b).norm() for a, b in zip(outputs(moved), outputs(problem), strict=True)]
    bounds = drift_bounds(case, problem, moved)
    assert all(change <= bound for change, bound in zip(changes, bounds, strict=True))


@pytest.mark.verifies("thm-invariance")
@given(cases(), seeds)
def test_null_moves_keep_the_loss(case: Case, seed: int) -> None:
    """To first order the loss moves by ‖∂L/∂out‖ times the output's bound; at most 4 of them."""
    problem, moved = case.build(), case.build()
    pairs = zip(bases_of(problem), noise(problem, seed), strict=True)
    add_matrices(moved, [basis.project(move) for basis, move in pairs])
    out = problem.model(problem.x).detach().requires_grad_()
    loss = problem.loss(out.flatten(0, -2))
    (slope,) = torch.autograd.grad(loss, out)
    bound = drift_bounds(case, problem, moved)[-1]
    allowed = 4 * (float(slope.norm()) + bound) * bound + 64 * torch.finfo(case.dtype).eps * loss
    assert abs(moved.closure() - problem.closure()) <= allowed + torch.finfo(case.dtype).eps


@pytest.mark.verifies("thm-invariance")
@given(cases(depths=(3, 4), roomy=True, activations=("LeakyReLU", "Tanh")), seeds)
def test_the_drift_bound_is_not_vacuous(case: Case, seed: int) -> None:
    """Moves as large as the weights: the bound stays twelve orders below the activations."""
    problem, moved = case.build(), case.build()
    pairs = zip(bases_of(problem), noise(problem, seed), strict=True)
    add_matrices(moved, [basis.project(move) for basis, move in pairs], 0.1)
    assert drift_bounds(case, problem, moved)[-1] <= 1e-7


def changes(moves: list[Tensor]) -> tuple[float, float]:
    """How far the loss and the outputs move."""
    problem = CLEAR.build()
    loss, out = problem.closure(), problem.model(problem.x)
    add_matrices(problem, moves)
    return float(abs(problem.closure() - loss)), float((problem.model(problem.x) - out).norm())


def seen(moves: list[Tensor]) -> bool:
    """Far above rounding, which is 1e-15 here; a loss may change little by coincidence."""
    loss, out = changes(moves)
    return loss > 1e-8 and out > 0.01


def projected(bases: list[Basis], seed: int) -> list[Tensor]:
    problem = CLEAR.build()
    return [b.project(m) for b, m in zip(bases, noise(problem, seed), strict=True)]


@pytest.mark.verifies("thm-invariance")
@given(seeds)
def test_control_right_bases_keep_the_loss(seed: int) -> None:
    assert max(changes(projected(bases_of(CLEAR.build()), seed))) <= 1e-12


@pytest.mark.verifies("thm-invariance")
@given(seeds)
def test_control_projection_on_the_wrong_side_is_seen(seed: int) -> None:
    """The 9 × 10 layer has a basis of 10-vectors: B on the left of its 10 × 10 neighbour fits."""
    bases, moves = bases_of(CLEAR.build()), noise(CLEAR.build(), seed)
    wrong = [b.project(m) for b, m in zip(bases, moves, strict=True)]
    side = bases[1].vectors
    wrong[1] = moves[1] - side @ (side.T @ moves[1])
    assert seen(wrong)


@pytest.mark.verifies("thm-invariance")
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@given(seed=seeds)
def test_control_an_omitted_basis_is_seen(layer: int, seed: int) -> None:
    bases, moves = bases_of(CLEAR.build()), noise(CLEAR.build(), seed)
    wrong = [b.project(m) for b, m in zip(bases, moves, strict=True)]
    wrong[layer] = moves[layer]
    assert seen(wrong)


@pytest.mark.verifies("thm-invariance")
@given(seeds)
def test_control_the_basis_of_another_layer_is_seen(seed: int) -> None:
    """Layers 1 and 3 have inputs of the same width."""
    bases = bases_of(CLEAR.build())
    bases[1], bases[3] = bases[3], bases[1]
    assert seen(projected(bases, seed))


@pytest.mark.verifies("thm-invariance")
@given(seeds)
def test_control_a_basis_without_the_bias_is_seen(seed: int) -> None:
    bases = bases_of(CLEAR.build())
    space = RowSpace()
    space.add(torch.nn.functional.pad(layer_rows(CLEAR.build())[1][:, :-1], (0, 1)))
    bases[1] = space.basis()
    assert seen(projected(bases, seed))


@pytest.mark.verifies("thm-invariance")
@given(seeds)
def test_control_one_direction_too_few_is_seen(seed: int) -> None:
    bases = bases_of(CLEAR.build())
    bases[2] = replace(bases[2], vectors=bases[2].vectors[:, 1:], ranks=bases[2].ranks - 1)
    assert seen(projected(bases, seed))
