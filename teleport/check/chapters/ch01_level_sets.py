"""Chapter 1: level sets that one can draw."""

import math

import torch
from torch import Tensor

from teleport.check.answers import alike
from teleport.check.draw import Draw
from teleport.check.engine import Case, Check, Property

BOOTH_MATRIX = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
BOOTH_SHIFT = torch.tensor([7.0, 5.0], dtype=torch.float64)


def booth(point: Tensor) -> Tensor:
    """``‖J p - s‖²``, Booth's function."""
    return (BOOTH_MATRIX @ point - BOOTH_SHIFT).square().sum()


def _turn(vector: Tensor, angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64) @ vector


def _rotated(point: Tensor, angle: float) -> Tensor:
    turned: Tensor = torch.linalg.solve(
        BOOTH_MATRIX, _turn(BOOTH_MATRIX @ point - BOOTH_SHIFT, angle) + BOOTH_SHIFT
    )
    return turned


def _rotation_case(draw: Draw) -> Case:
    angle = draw.choice(math.pi / 2, math.pi, 0.0, -math.pi / 2, 0.5)
    return {"point": draw.matrix(2), "angle": angle}


rotation = Check(
    name="rotation",
    takes={"point": "[2]", "angle": "in radians"},
    gives="[2]",
    cases=_rotation_case,
    answer=_rotated,
    properties={
        "Booth's function has the same value at the new point.": Property(
            "eq-level-functions", lambda case, got: alike(booth(got), booth(case["point"]))
        ),
        "q = J p - (7, 5) is turned by the angle, against the clock.": Property(
            "eq-level-functions"
        ),
    },
    mistakes=lambda p, a: {
        "You turned the point itself. Turn q = J p - (7, 5): "
        "its length squared is the value.": lambda: _turn(p, a),
        "You turned the other way: the matrix is [[cos, -sin], [sin, cos]].": lambda: _rotated(
            p, -a
        ),
        "You return the turned q. Solve J p = q + (7, 5) for the point.": lambda: _turn(
            BOOTH_MATRIX @ p - BOOTH_SHIFT, a
        ),
        "You forgot to add (7, 5) again before you solve for the point.": lambda: (
            torch.linalg.solve(BOOTH_MATRIX, _turn(BOOTH_MATRIX @ p - BOOTH_SHIFT, a))
        ),
        "The angle is in radians, not in degrees.": lambda: _rotated(p, math.radians(a)),
    },
)
"""A teleport on a level set of Booth's function, by an angle."""


def _largest(hessian: Tensor, value: float) -> float:
    return math.sqrt(2 * value * float(torch.linalg.eigvalsh(hessian)[-1]))


def _quadratic_case(draw: Draw) -> Case:
    size = draw.choice(2, 3, 1)
    axes = draw.orthonormal(size, size)
    hessian = axes @ torch.diag(draw.positive(size)) @ axes.T
    return {"hessian": (hessian + hessian.T) / 2, "value": float(draw.integer(1, 4))}


largest_gradient = Check(
    name="largest_gradient",
    takes={"hessian": "[d, d], positive definite", "value": "> 0"},
    gives="number",
    cases=_quadratic_case,
    answer=_largest,
    properties={
        "On the level set of a quadratic function with this value the gradient is at most √(2 c λ) "
        "long, λ the largest eigenvalue of the Hessian.": Property("thm-newton")
    },
    mistakes=lambda h, c: {
        "That is the shortest gradient: take the largest eigenvalue.": lambda: math.sqrt(
            2 * c * float(torch.linalg.eigvalsh(h)[0])
        ),
        "That is the square of the norm: take the root.": lambda: _largest(h, c) ** 2,
        "The factor 2 is missing: the value is half of (p - m)ᵀ A (p - m).": lambda: _largest(
            h, c / 2
        ),
        "The value is a factor under the root as well: √(2 c λ).": lambda: _largest(h, 0.5),
        "You took the trace, the sum of all eigenvalues, for the largest one.": lambda: math.sqrt(
            2 * c * float(h.trace())
        ),
    },
)
"""The longest gradient on a level set of a quadratic function."""


def _stationary(gradient: Tensor, hessian: Tensor) -> bool:
    image = hessian @ gradient
    return alike(image * (gradient @ gradient), gradient * (gradient @ image))


def _stationary_case(draw: Draw) -> Case:
    size = draw.choice(2, 3)
    hessian = torch.diag(draw.positive(size))
    hessian[0, 1] = hessian[1, 0] = float(draw.integer(0, 3))
    kind = draw.choice("any", "eigenvector")
    gradient = draw.positive(size, high=3)
    gradient[1] *= draw.choice(1.0, -1.0)
    if kind == "eigenvector":  # as long as the third entry is 0
        hessian[1, 1] = hessian[0, 0]
        gradient[1] = gradient[0] * gradient[1].sign()
        gradient[2:] *= float(draw.integer(0, 1))
    return {"gradient": gradient, "hessian": hessian}


stationary = Check(
    name="stationary",
    takes={"gradient": "[d], not 0", "hessian": "[d, d]"},
    gives="True or False",
    cases=_stationary_case,
    answer=_stationary,
    properties={
        "The gradient norm is stationary along the level set exactly if the "
        "gradient is an eigenvector of the Hessian.": Property("thm-newton")
    },
    mistakes=lambda g, h: {
        "Stationary along the level set, not everywhere: H g need only be parallel to g.": lambda: (
            not bool((h @ g).any())
        ),
        "Just the other way round.": lambda: not _stationary(g, h),
        "You compare H g with g: any eigenvalue will do, not only 1.": lambda: alike(h @ g, g),
    },
)
"""Whether a point is a peak, a trough or a turning point of the gradient norm on its level set."""


def _linearised(gradient: Tensor, ascent: Tensor, eta: float, drift: float) -> Tensor:
    square = gradient @ gradient
    return eta * (ascent - (gradient @ ascent) / square * gradient) - drift / square * gradient


def _level_case(draw: Draw) -> Case:
    size = draw.choice(2, 3)
    gradient = draw.matrix(size)
    gradient[draw.integer(0, size - 1)] = float(draw.integer(1, 3))
    return {
        "gradient": gradient,
        "ascent": draw.matrix(size),
        "eta": draw.choice(1.0, 0.5, 0.25),
        "drift": float(draw.integer(-2, 2)),
    }


level_set_step = Check(
    name="level_set_step",
    takes={"gradient": "[d], not 0", "ascent": "[d], Hg", "eta": "> 0", "drift": "L(ω) - L(ω₀)"},
    gives="[d]",
    cases=_level_case,
    answer=_linearised,
    properties={
        "To first order the step undoes the drift and changes the loss by nothing else: "
        "⟨g, d⟩ = -(L(ω) - L(ω₀)).": Property(
            "thm-linearised", lambda case, got: alike(case["gradient"] @ got, -case["drift"])
        ),
        "d = η (Hg - λ g) - c g.": Property("thm-linearised"),
    },
    mistakes=lambda g, a, eta, drift: {
        "The way back is missing: subtract drift / ‖g‖² times g.": lambda: _linearised(
            g, a, eta, 0.0
        ),
        "You walk away from the level instead of back to it: the drift is subtracted.": lambda: (
            _linearised(g, a, eta, -drift)
        ),
        "The part of Hg along g is still in the step; "
        "it changes the loss at first order.": lambda: eta * a - drift / (g @ g) * g,
        "λ and c divide by ‖g‖², not by ‖g‖.": lambda: (
            eta * (a - (g @ a) / g.norm() * g) - drift / g.norm() * g
        ),
        "That is the part of Hg *along* g; what is wanted is the part orthogonal to it.": lambda: (
            eta * (g @ a) / (g @ g) * g - drift / (g @ g) * g
        ),
        "The way back is a whole step, not η of one.": lambda: _linearised(g, a, eta, eta * drift),
    },
)
"""One step of the linearised level set, with the way back."""
