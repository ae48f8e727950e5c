"""The scaling problem behind equi-normalisation and path conditioning.

Both choose one number y > 0 per hidden neuron, by which what enters the neuron is multiplied and
what leaves it divided, and minimise a function that is convex in log y. A neuron's minimum, with
all others fixed, is the positive root of a quadratic, and the neurons of one layer do not see each
other: so the layers take turns, as rows and columns do in the algorithm of Sinkhorn and Knopp
(1967). What turns are slow at is a factor that all neurons of a layer share; those few numbers are
found by Newton's method before each sweep, which leaves a handful of sweeps even in deep networks.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from teleport.rivals.climb import Move
from teleport.rivals.rescaling import ROUNDING, Couplings, Rescaling
from teleport.rivals.rival import Rival

NEWTON_STEPS = 50
HALVINGS = 40

Factors = list[Tensor]
"""For each hidden layer, one number per neuron."""


@dataclass(frozen=True)
class Balance:
    """Where the layers' turns ended.

    Attributes:
        y: for each hidden layer, one number per neuron.
        sweeps: turns of all layers.
        converged: whether the last sweep changed no log y by more than the tolerance.
    """

    y: Factors
    sweeps: int
    converged: bool


class BalancedRescaling(Rival):
    """A rival that rescales neurons by powers of a `Balance`.

    Attributes:
        tolerance: turns over the layers end when no log y changes by more; by default a little more
            than single precision resolves.
        sweeps: or after so many turns.

    Args:
        model: the network.
        method: who rescales, for the errors.

    Raises:
        UnsupportedModelError: as `Rescaling`.
    """

    tolerance = 1e-6
    sweeps = 1000

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__(model, ROUNDING)
        self._rescaling = Rescaling(model, self.coverage, method)

    def _settle(self, found: Balance, power: float) -> Move:
        """Rescale by y to a power, unless that is 1 for all neurons."""
        if all(float(each.log().abs().max()) <= self.tolerance for each in found.y):
            return Move((), "no neuron has to be rescaled")
        self._rescaling.apply([each**power for each in found.y])
        how = "" if found.converged else ", not yet at rest"
        return Move((1.0,), f"rescaled after {found.sweeps} sweeps over the layers{how}")


def least_sum(terms: Couplings, tolerance: float, sweeps: int) -> Balance:
    """Minimise E(y): each neuron's incoming and outgoing sums become equal.

    What lies on no path through the network could be made as small as one likes. It counts nothing,
    and a neuron on no path keeps y = 1.
    """
    return _minimise(
        terms.on_paths(), 1.0, [0.0 * each for each in terms.alone[:-1]], tolerance, sweeps
    )


def most_even(terms: Couplings, counts: Couplings, tolerance: float, sweeps: int) -> Balance:
    """Bring all terms as near to one common value as rescaling allows.

    Minimises n log E(y) - Σ log(terms), which is, but for a constant, the least Bregman (Burg)
    divergence of α times the terms from ones over α > 0. At the minimum a neuron has its share of
    E: incoming less outgoing sum over E is incoming less outgoing count over n. The ``terms`` are
    sums, and ``counts`` says how many terms, none of them 0, are in each.
    """
    ones = [torch.ones_like(each) for each in terms.alone[:-1]]
    surplus = [counts.incoming(n, ones) - counts.outgoing(n, ones) for n in range(len(ones))]
    return _minimise(terms, counts.total(ones), surplus, tolerance, sweeps)


def _minimise(
    terms: Couplings, number: float, surplus: Factors, tolerance: float, sweeps: int
) -> Balance:
    """Minimise ``number`` log E(y) - Σ ``surplus`` log y."""
    y = [torch.ones_like(each) for each in surplus]
    whole = torch.stack([each.sum() for each in surplus])
    for sweep in range(1, sweeps + 1):
        shared, total = _shared_factors(terms, y, number, whole)
        change = float(shared.log().abs().max())
        y = [factor * each for factor, each in zip(shared, y, strict=True)]
        for layer, before in enumerate(y):
            into, out = terms.incoming(layer, y), terms.outgoing(layer, y)
            y[layer] = after = _root(into, out, surplus[layer] * total / number)
            total += float((into * (after - before) + out * (1.0 / after - 1.0 / before)).sum())
            change = max(change, float((after / before).log().abs().max()))
        if change <= tolerance:
            return Balance(y, sweep, True)
    return Balance(y, sweeps, False)


def _root(into: Tensor, out: Tensor, k: Tensor) -> Tensor:
    """The positive y with ``into`` y - ``out`` / y = k; 1 where there is nothing to balance."""
    root = (k * k + 4.0 * into * out).sqrt()
    found = torch.where(k > 0.0, (root + k) / (2.0 * into), 2.0 * out / (root - k))
    return torch.where((into > 0.0) | (out > 0.0), found, 1.0)


def _shared_factors(
    terms: Couplings, y: Factors, number: float, surplus: Tensor
) -> tuple[Tensor, float]:
    """One factor on the y of each layer, and E with them: the same problem, a neuron per layer."""
    layers = len(y)
    every = [*y, torch.ones_like(terms.alone[-1])]
    alone = torch.stack([each @ own for each, own in zip(every, terms.alone, strict=True)])
    between = [
        after @ (each @ (1.0 / before))
        for (before, after), each in zip(pairwise(every), terms.between, strict=True)
    ]
    logs = torch.cat([alone, torch.stack(between)]).log()
    # A row per sum of terms: the power of each layer's factor in it.
    own = torch.eye(layers + 1, layers).to(logs)
    powers = torch.cat([own, own[1:] - own[:-1]])

    def value(s: Tensor) -> Tensor:
        return number * (logs + powers @ s).logsumexp(0) - surplus @ s

    s = torch.zeros(layers).to(logs)
    for _ in range(NEWTON_STEPS):
        share = (logs + powers @ s).softmax(0)
        mean = powers.T @ share
        slope = number * mean - surplus
        curvature = number * (powers.T @ (share[:, None] * powers) - torch.outer(mean, mean))
        step = -torch.linalg.pinv(curvature, hermitian=True) @ slope
        here = value(s)
        for _ in range(HALVINGS):
            if value(s + step) <= here:
                break
            step = 0.5 * step
        else:
            break  # nothing lower in floating point
        s = s + step
        if float(step.abs().max()) <= 1e-12:
            break
    return s.exp(), float((logs + powers @ s).logsumexp(0).exp())
