"""How far to go: the exact line search on frozen activations.

Along a direction in the joint null space T is a polynomial in the step (``thm-polynomial``), and
each evaluation costs one backward pass: `step_to_norm` finds where it reaches a wanted value.
"""

import math
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any
from weakref import proxy


def load_search() -> None:
    """Load what `step_to_norm` needs, a third of a second, before a clock is started.

    ``import teleport`` leaves that to those who search.
    """
    for name in ("scipy.interpolate", "scipy.optimize"):
        import_module(name)


def step_to_norm(
    norm_squared: Callable[[float], float],
    start: float,
    slope: float,
    target: float,
    rtol: float,
    degree: int | None = None,
    *,
    exact_slope: bool = True,
    unseen: float = 0.0,
    mixed: float = 1.0,
) -> float | None:
    """The step at which the squared gradient norm along a ray reaches ``target``.

    Brackets by doubling from the step the slope suggests, then finds the root of the polynomial
    through all that was seen, with that slope at 0; of a slope that is only a guess, by bracketing
    alone.

    Args:
        norm_squared: squared gradient norm at a step; one backward pass per evaluation.
        start: its value at step 0.
        slope: its derivative at step 0, > 0.
        target: the value wanted, > ``start``.
        rtol: relative accuracy wanted of the norm.
        degree: of the squared norm as a polynomial in the step, at most (``thm-polynomial``). A
            step found from as many values as that takes is not looked at again.
        exact_slope: whether ``slope`` is the derivative, and no guess of its size.
        unseen: a step at which the squared norm is this near ``target``, as a share and by a
            careful estimate, is not looked at; at least ``rtol``.
        mixed: what the slope owes, as a share, to others than one block along which alone the
            squared norm is a parabola.

    Returns:
        The step, or None if none reaches the target within a hundred doublings or halvings. Where
        the norm is not known to be a polynomial it may saturate: then `DOUBLINGS` are the most.
    """
    seen = {0.0: start / target - 1.0}

    def excess(step: float) -> float:
        if step not in seen:
            ratio = norm_squared(step) / target - 1.0
            ratio = math.inf if math.isnan(ratio) else ratio  # inf - inf: far beyond
            seen[step] = 0.0 if abs(ratio) <= rtol else ratio
        return seen[step]

    # Exact where the norm itself grows linearly, as with one moved layer below a fixed one.
    guess = 2.0 * start / slope * (math.sqrt(target / start) - 1.0)
    low, high, ceiling = 0.0, guess, math.inf
    farthest = guess * 2.0**DOUBLINGS if degree is None and exact_slope else math.inf
    for _ in range(100):
        if not math.isfinite(excess(high)):
            ceiling, high = high, (low + high) / 2
        elif excess(high) >= 0.0:
            if not exact_slope:
                return _bracketed(excess, low, high)
            near = max(rtol, unseen)
            return _root(excess, seen, slope / target, near, mixed, degree, low, high)
        elif high >= farthest:
            return None
        else:
            low, high = high, min(2.0 * high, (high + ceiling) / 2)
    return None


DOUBLINGS = 20
"""Of the step that the slope suggests: a growth of a million is reached after ten."""

# To the last digit, however many powers of ten the bracket spans: it is halved every three rounds.
SEARCH: dict[str, Any] = {"xtol": 1e-300, "rtol": 1e-15, "maxiter": 4000}


def _root(
    excess: Callable[[float], float],
    seen: dict[float, float],
    slope: float,
    unseen: float,
    mixed: float,
    degree: int | None,
    low: float,
    high: float,
) -> float:
    """A zero of ``excess`` in a bracket.

    The polynomial through all that was seen, and with the known slope at 0, is T itself as soon as
    it has the degree of T, and nears its root long before. Where it does not end in a few looks, a
    bracketing method takes over.
    """
    for _ in range(8):
        finite = [(s, e) for s, e in seen.items() if math.isfinite(e)]
        if len({s / high for s, _ in finite}) < len(finite):
            break  # steps that cannot be told apart determine no polynomial
        step = _polynomial_root(finite, slope, low, high)
        if step is None or not low < step < high:
            break
        # With the slope there is one value more than looks; far values drown the near ones.
        known = degree is not None and len(finite) >= degree
        if known and max(abs(e) for _, e in finite) < 10.0:
            return step
        if _expected_miss(finite, slope, step, mixed) <= unseen:
            return step
        value = excess(step)
        if value == 0.0:
            return step
        low, high = (step, high) if value < 0.0 else (low, step)
    return _bracketed(excess, low, high)


def _bracketed(excess: Callable[[float], float], low: float, high: float) -> float:
    """A zero in a bracket by comparing values; what is beyond all numbers counts as huge."""
    from scipy.optimize import toms748  # late: see `load_search`

    weak = proxy(excess)  # SciPy leaves its function in a cycle, which must not keep a tape
    return float(toms748(lambda step: min(weak(float(step)), 1e150), low, high, **SEARCH))


def _polynomial_root(
    points: list[tuple[float, float]], slope: float, low: float, high: float
) -> float | None:
    """The root in the bracket of the polynomial through ``points`` with this slope at step 0."""
    from scipy.optimize import brentq  # late: see `load_search`; its loop is compiled

    polynomial = _polynomial(points, slope, high)
    if not polynomial(low / high) < 0.0 < polynomial(1.0):  # or it is NaN, having overflown
        return None
    return high * float(brentq(polynomial, low / high, 1.0, **SEARCH))


def _polynomial(
    points: list[tuple[float, float]], slope: float, unit: float
) -> Callable[[float], float]:
    """Through all points, step 0 first, with a slope there; its argument is in units of a step."""
    from scipy.interpolate import KroghInterpolator  # late: see `load_search`

    nodes = [0.0, *(s / unit for s, _ in points)]  # step 0 twice: its value and its slope
    values = [points[0][1], slope * unit, *(e for _, e in points[1:])]
    *coefficients, highest = KroghInterpolator(nodes, values).c[: len(nodes), 0].tolist()

    def polynomial(x: float) -> float:  # SciPy's own takes arrays, forty times as long
        value: float = highest
        for coefficient, node in zip(reversed(coefficients), reversed(nodes[:-1]), strict=True):
            value = coefficient + (x - node) * value
        return value

    return polynomial


def _expected_miss(
    points: list[tuple[float, float]], slope: float, step: float, mixed: float
) -> float:
    """About how far from zero the value at a root of the polynomial is, ten times over.

    The last point changed the polynomial there by as much as its predecessor missed; it misses
    less by how near that point is (the next term of Newton's form).

    One look gives a parabola. What there is beside, by ``thm-polynomial``, is of third order and
    owed to two blocks or more. It grows out of the share of the slope that is owed to all but the
    largest, as the norm does out of the slope, unless that rises steeply on the way.
    """
    last = points[-1][0]
    near = abs(last - step) / step
    if len(points) < 3:
        start = points[0][1]
        return 10.0 * near * mixed * -start / (1.0 + start) if near <= 1.0 else math.inf
    change = abs(float(_polynomial(points[:-1], slope, last)(step / last)))
    rounding = sys.float_info.epsilon * max(abs(value) for _, value in points)
    return 10.0 * (change * near + rounding)
