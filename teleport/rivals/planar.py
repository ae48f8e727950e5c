"""Functions of two variables whose level sets are circles after a change of variables.

Both test functions are ``u² + v²`` in variables (u, v), so rotating (u, v) keeps their value: an
action of SO(2). Teleportation turns by the angle that ascends the gradient norm. Source: Zhao,
Dehmamy, Walters and Yu 2022 (arXiv 2205.10637), whose test functions these are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

PlanePoint = Float[Tensor, "2"]


@dataclass(frozen=True)
class PlanarFunction:
    """``f = u² + v²`` and the change of variables.

    Attributes:
        to_uv: (x, y) → (u, v).
        from_uv: its inverse.
        minimum: (x, y) of ``u = v = 0``.
    """

    name: str
    to_uv: Callable[[PlanePoint], PlanePoint]
    from_uv: Callable[[PlanePoint], PlanePoint]
    minimum: tuple[float, float]

    def __call__(self, point: PlanePoint) -> Float[Tensor, ""]:
        """The value at (x, y)."""
        return self.to_uv(point).square().sum()

    def rotate(self, point: PlanePoint, angle: float | Tensor) -> PlanePoint:
        """The point with (u, v) turned by an angle in radians: another point of the level set."""
        u, v = self.to_uv(point)
        turn = torch.as_tensor(angle, dtype=point.dtype)
        c, s = turn.cos(), turn.sin()
        return self.from_uv(torch.stack([c * u - s * v, s * u + c * v]))

    def gradient(self, point: PlanePoint, create_graph: bool = False) -> PlanePoint:
        """∇f at (x, y)."""
        with torch.enable_grad():
            there = point if point.requires_grad else point.detach().requires_grad_()
            (grad,) = torch.autograd.grad(self(there), there, create_graph=create_graph)
        return grad


def _booth(p: PlanePoint) -> PlanePoint:
    x, y = p
    return torch.stack([x + 2 * y - 7, 2 * x + y - 5])


def _booth_back(q: PlanePoint) -> PlanePoint:
    u, v = q
    return torch.stack([(2 * (v + 5) - (u + 7)) / 3, (2 * (u + 7) - (v + 5)) / 3])


def _rosenbrock(p: PlanePoint) -> PlanePoint:
    x, y = p
    return torch.stack([10 * (x**2 - y), x - 1])


def _rosenbrock_back(q: PlanePoint) -> PlanePoint:
    u, v = q
    return torch.stack([v + 1, (v + 1) ** 2 - u / 10])


BOOTH = PlanarFunction("Booth", _booth, _booth_back, (1.0, 3.0))
ROSENBROCK = PlanarFunction("Rosenbrock", _rosenbrock, _rosenbrock_back, (1.0, 1.0))


def so2_teleport(
    function: PlanarFunction,
    point: PlanePoint,
    steps: int = 10,
    lr: float = 1e-3,
    angle: float = 0.0,
) -> PlanePoint:
    """Gradient ascent on the angle for ½‖∇f‖² at the turned point.

    The published script starts at a random angle; here it is an argument, 0 by default.

    Args:
        function: `BOOTH`, `ROSENBROCK` or another.
        point: (x, y).
        steps: ascent steps on the angle.
        lr: step size on the angle.
        angle: where to start, in radians.

    Returns:
        The teleported point, on the same level set.

    Raises:
        ValueError: if the angle is not finite any more; take a smaller ``lr``.
    """
    turn = torch.tensor(angle, dtype=point.dtype)
    for _ in range(steps):
        with torch.enable_grad():
            live = turn.detach().requires_grad_()
            grad = function.gradient(function.rotate(point.detach(), live), create_graph=True)
            (slope,) = torch.autograd.grad(grad.square().sum() / 2, live)
        turn = turn + lr * slope
    if not math.isfinite(float(turn)):
        raise ValueError(f"the angle became {float(turn)}: lr={lr} is too large here")
    return function.rotate(point.detach(), turn)
