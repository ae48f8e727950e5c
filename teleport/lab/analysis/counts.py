"""What the records of many comparisons say together: tables, and counts of what is resolved."""

from collections.abc import Iterator, Sequence

import numpy as np

from teleport.lab.analysis.outcomes import FolderOutcome, gap_text, ratio_text
from teleport.lab.experiments.arms import CONTROLS
from teleport.lab.records.compare import ArmSummary, Comparison, compare
from teleport.lab.records.runs import by_arm

Place = tuple[FolderOutcome, ArmSummary]
"""One arm with a teleport, and where it is found."""


def schedule_name(block: FolderOutcome) -> str:
    """``"paper"`` for steps of a fixed size, the paper's way, else ``"default"``."""
    return "paper" if block.runs[0].config["settings"]["teleport"]["lr"] else "default"


def teleporting(block: FolderOutcome, gained: bool = False) -> list[ArmSummary]:
    """The arms with a teleport, controls and rivals left out, the lowest learning rate first.

    Those that begin with PyTorch's initial gain, or with another, the tuned one.
    """
    training = {arm: runs[0].config["training"] for arm, runs in by_arm(block.runs).items()}

    def wanted(arm: ArmSummary) -> bool:
        own = training[arm.arm]
        moves = own["teleport"] and not own.get("rival") and arm.to_own is not None
        start = own.get("init", "default"), own.get("head_gain", 1.0)
        return moves and (start != ("default", 1.0)) is gained

    return sorted(filter(wanted, block.summaries), key=lambda arm: float(training[arm.arm]["lr"]))


def arms_of(found: Sequence[FolderOutcome]) -> Iterator[Place]:
    """Every arm with a teleport, that from another initial gain included."""
    for block in found:
        for arm in (*teleporting(block), *teleporting(block, gained=True)):
            yield block, arm


def low_and_tuned(found: Sequence[FolderOutcome]) -> dict[str, list[Place]]:
    """The arms with a teleport by how well their training was tuned before.

    At the lowest rate of their block, at the highest, the tuned, and at the tuned rate and initial
    gain together.
    """
    places: dict[str, list[Place]] = {"low rate": [], "tuned rate": [], "tuned rate and gain": []}
    for block in found:
        arms = teleporting(block)
        if len(arms) > 1:
            places["low rate"].append((block, arms[0]))
        places["tuned rate"] += [(block, arm) for arm in arms[-1:]]
        places["tuned rate and gain"] += [(block, arm) for arm in teleporting(block, gained=True)]
    return places


def controls(block: FolderOutcome, arm: ArmSummary) -> dict[str, tuple[Comparison, Comparison]]:
    """By control of an arm: the control against the baseline, and the teleport against the control.

    Only those that were run.
    """
    groups, front = by_arm(block.runs), f"{arm.baseline} + "
    rivals = [n for n in groups if n.startswith(front) and n != f"{front}teleport"]
    return {
        name.removeprefix(front): (
            compare(groups[name], groups[arm.baseline]),
            compare(groups[arm.arm], groups[name]),
        )
        for name in rivals
    }


def count(comparisons: Sequence[Comparison | None]) -> str:
    """In how many of them the seeds resolve a lower loss, a higher one, or nothing.

    A comparison of which a run diverged is counted as that and as nothing else.
    """
    gone = sum(c is not None and c.diverged > 0 for c in comparisons)
    clear = [c.log_loss for c in comparisons if c is not None and c.resolved and not c.diverged]
    lower, higher = sum(v < 0 for v in clear), sum(v > 0 for v in clear)
    parts = [f"lower loss in {lower}", f"higher in {higher}"]
    parts += [f"diverged {gone}"] if gone else []
    return ", ".join([*parts, f"unresolved {len(comparisons) - len(clear) - gone}"])


def holm(comparisons: Sequence[Comparison | None], level: float = 0.05) -> list[Comparison]:
    """Those of a family that stay resolved when it is taken into account how many there are.

    The step-down procedure of Holm (1979): at most a share ``level`` of such families of
    comparisons without any difference has one that stays. SciPy does not have it, and for these
    lines statsmodels would bring pandas along, 85 MB. Comparisons of one seed, or without a number,
    count as not resolved.
    """
    family = sorted(
        (c for c in comparisons if c is not None),
        key=lambda c: 1.0 if np.isnan(c.p_value) else c.p_value,
    )
    kept: list[Comparison] = []
    for left, comparison in zip(range(len(family), 0, -1), family, strict=True):
        if not comparison.p_value * left <= level:
            break
        kept.append(comparison)
    return kept


def tally(found: Sequence[FolderOutcome]) -> str:
    """The places of `low_and_tuned` against their baselines; and who was faster."""
    lines = []
    for name, places in low_and_tuned(found).items():
        arms = [arm for _, arm in places]
        faster = sum(arm.to_own is not None and arm.to_own.seconds < 1 for arm in arms)
        lines += [
            f"{name}, {len(arms)} comparisons",
            f"  against the same rate:      {count([arm.to_own for arm in arms])}",
            f"  against the best baseline:  {count([arm.to_best for arm in arms])}",
            f"  at the same rate's final loss in fewer seconds: {faster}",
        ]
    return "\n".join(lines)


def gap(comparison: Comparison | None) -> str:
    """The log loss with its spread, in bold where resolved; "-" where a run diverged at once."""
    text = gap_text(comparison)
    return f"**{text}**" if comparison is not None and comparison.resolved else text


def outcome_rows(found: Sequence[FolderOutcome]) -> list[list[str]]:
    """A row for every arm with a teleport, the head first: losses, ratios, log losses."""
    head = ["experiment", "optimizer", "schedule", "rate", "seeds", "train loss", "test loss"]
    head += ["steps", "seconds", "log loss, same rate", "log loss, best baseline"]
    return [head, *(_outcome(block, arm) for block, arm in arms_of(found))]


def _outcome(block: FolderOutcome, arm: ArmSummary) -> list[str]:
    plain = next(other for other in block.summaries if other.arm == arm.baseline)
    pairs = ((plain.train_loss, arm.train_loss), (plain.test_loss, arm.test_loss))
    losses = [f"{before:.3f} → {after:.3f}" for before, after in pairs]
    assert arm.to_own is not None
    ways = [ratio_text(arm.to_own, axis) for axis in ("steps", "seconds")]
    place = [block.experiment, block.optimizer, schedule_name(block), arm.baseline]
    return [*place, str(arm.runs), *losses, *ways, gap(arm.to_own), gap(arm.to_best)]


def control_rows(
    found: Sequence[FolderOutcome], names: Sequence[str] = CONTROLS
) -> list[list[str]]:
    """A row for every arm that has all these controls, the head first.

    The log losses of the teleport and of the controls against the same baseline, then of the
    teleport against each control.
    """
    head = ["experiment", "optimizer", "schedule", "rate", "seeds", "teleport", *names]
    rows = [[*head, *(f"teleport against {name}" for name in names)]]
    for block, arm in arms_of(found):
        tried = controls(block, arm)
        if set(names) <= set(tried):
            place = [block.experiment, block.optimizer, schedule_name(block), arm.baseline]
            pairs = [tried[name] for name in names]
            own, against = ([gap(pair[side]) for pair in pairs] for side in (0, 1))
            rows.append([*place, str(arm.runs), gap(arm.to_own), *own, *against])
    return rows
