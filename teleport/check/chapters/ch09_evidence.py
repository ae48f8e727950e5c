"""Chapters 9 to 11: what the seeds of a comparison say, and those of many comparisons."""

import math
from collections.abc import Callable, Iterable

import torch
from scipy.special import stdtrit
from torch import Tensor

from teleport.check.draw import Draw
from teleport.check.engine import Case, Check, Property

LEVEL = 0.05
"""Share of comparisons without a difference that may be called resolved."""


log_loss = Check(
    name="log_loss",
    takes={"losses": "[t], at every evaluation", "baseline": "[t], of the same seed"},
    gives="number",
    cases=lambda draw: {
        "losses": draw.positive(count := draw.choice(2, 1, 3)),
        "baseline": draw.positive(count),
    },
    answer=lambda losses, baseline: float((losses / baseline).log().mean()),
    properties={"The mean over the evaluations of log(L / L₀).": Property("eq-exp-resolved")},
    mistakes=lambda x, b: {
        "The logarithm comes first, then the mean: one large loss is not to decide.": lambda: (
            math.log(float(x.mean() / b.mean()))
        ),
        "The logarithm comes first, then the mean: "
        "log of the mean ratio is another number.": lambda: math.log(float((x / b).mean())),
        "The logarithms are missing: losses that fall by decades cannot be subtracted.": lambda: (
            float((x - b).mean())
        ),
        "That is the end of the run only.": lambda: math.log(float(x[-1] / b[-1])),
        "Divide by the number of evaluations.": lambda: float((x / b).log().sum()),
    },
)
"""How much lower a run's loss lies than that of its baseline, over the whole run."""


def _half_width(gaps: Tensor, quantile: float = 1 - LEVEL / 2, correction: int = 1) -> float:
    n = gaps.shape[-1]
    spread = float(gaps.std(correction=correction))
    return float(stdtrit(n - 1, quantile)) * spread / math.sqrt(n)


FAR = torch.tensor([4.0], dtype=torch.float64)
"""Beyond the gaps that are drawn."""


half_width = Check(
    name="half_width",
    takes={"gaps": "[n], log losses of n seeds, n > 1"},
    gives="number",
    # Not all of them equal: some ways to an interval have none without a spread.
    cases=lambda draw: {"gaps": torch.cat([draw.matrix(draw.choice(1, 2, 3)), FAR])},
    answer=_half_width,
    properties={
        "Half the 95 % interval of the mean is t s / √n, n - 1 in t.": Property("eq-exp-resolved")
    },
    mistakes=lambda x: {
        "1.96 is the quantile of the normal distribution. The spread is an estimate, of few seeds "
        "a poor "
        "one: take Student's t.": lambda: 1.959963984540054 * float(x.std()) / math.sqrt(len(x)),
        "The quantile is that of .975: 2.5 % are left out on either side.": lambda: _half_width(
            x, 1 - LEVEL
        ),
        "The spread of a sample has n - 1 below, not n.": lambda: _half_width(x, correction=0),
        "That is the interval for a further seed; "
        "the mean of n is known √n times better.": lambda: _half_width(x) * math.sqrt(len(x)),
        "Of n seeds t has n - 1 degrees of freedom.": lambda: (
            float(stdtrit(len(x), 0.975) * x.std()) / math.sqrt(len(x))
        ),
        "The spread of a mean of n is s / √n, not s / n.": lambda: (
            _half_width(x) / math.sqrt(len(x))
        ),
    },
)
"""Half the 95 % interval of a mean over seeds."""


def _sort(gaps: Tensor) -> tuple[int, int, int, int]:
    """Of one comparison, 1 at its place: lower, higher, diverged, unresolved."""
    mean = float(gaps.mean())
    if not math.isfinite(mean):
        return 0, 0, 1, 0
    if abs(mean) <= _half_width(gaps):
        return 0, 0, 0, 1
    return int(mean < 0), int(mean > 0), 0, 0


def _tally(gaps: Iterable[Tensor]) -> list[int]:
    return [sum(column) for column in zip(*map(_sort, gaps), strict=True)]


def _gaps_case(draw: Draw) -> Case:
    count = draw.choice(1, 2, 3)
    rows = [torch.cat([draw.matrix(2), FAR]) + draw.choice(-20, 0, 20) for _ in range(count)]
    for row in rows:
        if draw.choice(False, False, True):
            row[draw.integer(0, 2)] = math.inf
    return {"gaps": torch.stack(rows)}


def _moved(gaps: Tensor, source: int, target: int) -> list[int]:
    counts = _tally(gaps)
    counts[target] += counts[source]
    counts[source] = 0
    return counts


tally = Check(
    name="tally",
    takes={"gaps": "[comparisons, 3], log losses of three seeds, inf where a run diverged"},
    gives="list of 4 counts: lower, higher, diverged, unresolved",
    cases=_gaps_case,
    answer=_tally,
    properties={
        "Every comparison counts once.": Property(
            "eq-exp-resolved", lambda case, got: sum(map(int, got)) == len(case["gaps"])
        ),
        "Lower or higher where the interval leaves 0 out, "
        "diverged where a seed is, else unresolved.": Property("eq-exp-resolved"),
    },
    mistakes=lambda x: {
        "Comparisons with a diverged seed are judged by the seeds that survived. The arm is "
        "dangerous, and the table says it is fine: "
        "count them as diverged.": lambda: _tally([row[row.isfinite()] for row in x]),
        "inf > NaN is False, so diverged comparisons have slipped into the unresolved.": lambda: (
            _moved(x, 2, 3)
        ),
        "A loss that ended the training is no *resolved* one.": lambda: _moved(x, 2, 1),
        "The sign of the mean is not enough: ask whether the seeds resolve it.": lambda: [
            sum(bool(row.mean() < 0) for row in x),
            sum(bool(row.mean() > 0) and bool(row.isfinite().all()) for row in x),
            sum(not row.isfinite().all() for row in x),
            sum(bool(row.mean() == 0) for row in x),
        ],
        "A negative log loss is a *lower* loss.": lambda: [_tally(x)[i] for i in (1, 0, 2, 3)],
    },
)
"""How the tables of the book count many comparisons."""


def _decided(p_values: Tensor, rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What a rule says of the p-values in order, with how many are left at each, itself counted."""
    ordered, places = p_values.sort()
    kept = rule(ordered, torch.arange(len(p_values), 0, -1))
    return torch.zeros_like(kept).scatter(0, places, kept)


def _holm(p_values: Tensor) -> Tensor:
    return _decided(p_values, lambda p, left: (p * left <= LEVEL).cumprod(0).bool())


def _up_to_last(small: Tensor) -> Tensor:
    return small.flip(0).cummax(0).values.flip(0)


def _p_values_case(draw: Draw) -> Case:
    values = [draw.choice(0.2, 0.004, 0.011, 0.02, 0.03, 0.3) for _ in range(draw.choice(3, 2, 4))]
    return {"p_values": torch.tensor(values, dtype=torch.float64)}


holm = Check(
    name="holm",
    takes={"p_values": "[m], in any order"},
    gives="[m], True for those that stay resolved at the level .05",
    cases=_p_values_case,
    answer=_holm,
    properties={
        "p₍ᵢ₎ (m - i + 1) ≤ .05 for this one and for all that are smaller.": Property(
            "eq-true-holm"
        )
    },
    mistakes=lambda p: {
        "Nothing is corrected: of 20 without a difference one stays.": lambda: p <= 0.05,
        "That is Bonferroni: true, but every comparison pays for all. "
        "Those that are left are fewer with each that stays.": lambda: p * len(p) <= LEVEL,
        "The first that fails ends it, whatever comes behind.": lambda: _decided(
            p, lambda ordered, left: ordered * left <= LEVEL
        ),
        "You went from the largest p-value down (Hochberg). That asks for independence; "
        "Holm goes from the smallest up and stops.": lambda: _decided(
            p, lambda ordered, left: _up_to_last(ordered * left <= LEVEL)
        ),
        "That is Benjamini and Hochberg: it bounds the share of false ones among those that stay, "
        "not the probability of any.": lambda: _decided(
            p, lambda ordered, left: _up_to_last(ordered * len(p) <= LEVEL * left.flip(0))
        ),
        "The answers are in the order of the sorted p-values; "
        "put them back in their places.": lambda: _holm(p.sort().values),
    },
)
"""Holm's correction for the number of comparisons."""
