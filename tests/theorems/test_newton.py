"""On a level set the gradient is Newton's direction exactly where its norm is stationary."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sympy import Matrix, Rational, diag, eye
from torch import Tensor
from torch.func import hessian

from teleport.rivals import BOOTH, ROSENBROCK, PlanarFunction
from tests.support.examples import examples

entries = st.integers(-4, 4)
general = st.lists(entries, min_size=3, max_size=3)
on_one_axis = st.tuples(entries.filter(bool), st.integers(0, 2)).map(
    lambda drawn: [drawn[0] if axis == drawn[1] else 0 for axis in range(3)]
)
curvatures = st.lists(st.integers(1, 9), min_size=3, max_size=3, unique=True).map(sorted)


def orthogonal(a: int, b: int, c: int) -> Matrix:
    """A rational orthogonal matrix, by Cayley's transform of a skew one."""
    skew = Matrix([[0, a, b], [-a, 0, c], [-b, -c, 0]])
    return (eye(3) - skew) * (eye(3) + skew).inv()


@pytest.mark.verifies("thm-newton")
@given(curvatures, entries, entries, entries, st.one_of(general, on_one_axis))
def test_the_axis_of_largest_curvature_bounds_the_gradient_exactly(
    eigenvalues: list[int], a: int, b: int, c: int, coefficients: list[int]
) -> None:
    turn = orthogonal(a, b, c)
    quadratic = turn * diag(*eigenvalues) * turn.T
    z = turn * Matrix(coefficients)  # p - m
    g = quadratic * z
    twice_level = (z.T * quadratic * z)[0]
    lowest, *_, largest = eigenvalues
    assert lowest * twice_level <= g.dot(g) <= largest * twice_level
    on_axis = coefficients[0] == coefficients[1] == 0
    assert (g.dot(g) == largest * twice_level) == on_axis
    newton = quadratic.inv() * g
    parallel = newton.cross(g).is_zero_matrix
    assert newton == z
    # stationary: ∇T = Hg has no part along the tangents of the level set
    assert parallel == (quadratic * g).cross(g).is_zero_matrix
    assert parallel == (sum(x != 0 for x in coefficients) <= 1)
    if on_axis:
        assert (z - g * Rational(1, largest)).is_zero_matrix


def sine(one: Tensor, other: Tensor) -> float:
    cross = one[0] * other[1] - one[1] * other[0]
    return float(cross / (one.norm() * other.norm()))


def newton_sine(function: PlanarFunction, point: Tensor) -> float:
    """Sine of the angle between the gradient and Newton's direction."""
    g = function.gradient(point)
    return sine(g, torch.linalg.solve(hessian(function)(point), g))


@pytest.mark.verifies("thm-newton")
@pytest.mark.parametrize("function", [BOOTH, ROSENBROCK], ids=lambda f: f.name)
@examples(25)
@given(radius=st.floats(0.5, 6.0), start=st.floats(0.0, 2 * math.pi))
def test_at_every_peak_of_the_gradient_norm_newton_agrees(
    function: PlanarFunction, radius: float, start: float
) -> None:
    at = function.from_uv(radius * torch.tensor([math.cos(start), math.sin(start)]).double())

    def norm(angle: float) -> float:
        return float(function.gradient(function.rotate(at, angle)).norm())

    grid = [2 * math.pi * k / 90 for k in range(90)]
    values = [norm(angle) for angle in grid]
    for k, value in enumerate(values):
        if value >= max(values[k - 1], values[(k + 1) % 90]):
            bracket = (grid[k] - grid[1], grid[k] + grid[1])
            found = minimize_scalar(
                lambda a: -norm(a), bounds=bracket, method="bounded", options={"xatol": 1e-9}
            )
            assert abs(newton_sine(function, function.rotate(at, found.x))) < 1e-4


@pytest.mark.verifies("thm-newton")
@pytest.mark.parametrize("function", [BOOTH, ROSENBROCK], ids=lambda f: f.name)
@given(x=st.floats(-2.0, 2.0), y=st.floats(-2.0, 2.0))
def test_where_the_norm_changes_along_the_level_set_newton_differs(
    function: PlanarFunction, x: float, y: float
) -> None:
    point = torch.tensor([x, y], dtype=torch.float64)
    g = function.gradient(point)
    if float(g.norm()) < 1e-3:
        return
    curvature = hessian(function)(point)
    tangent = torch.stack([-g[1], g[0]]) / g.norm()
    step = 1e-5
    sides = [function.gradient(point + s * step * tangent).square().sum() / 2 for s in (1, -1)]
    slope = float(sides[0] - sides[1]) / (2 * step)
    # in the plane Hg × g = det(H) (g × H⁻¹g): one vanishes with the other, if H is invertible
    newton = torch.linalg.solve(curvature, g)
    cross = float(g[0] * newton[1] - g[1] * newton[0])
    wanted = float(torch.linalg.det(curvature)) * cross / float(g.norm())
    scale = float((curvature @ g).norm())
    assert slope == pytest.approx(-wanted, abs=1e-4 * scale)
