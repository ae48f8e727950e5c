"""What the teleports of many records did, and what they cost: tables, their heads first."""

from collections.abc import Sequence

import numpy as np

from teleport.lab.analysis.counts import arms_of, gap, schedule_name, teleporting
from teleport.lab.analysis.outcomes import FolderOutcome, range_text, ratio_text
from teleport.lab.records.compare import ArmSummary
from teleport.lab.records.runs import Run, by_arm


def worse_than_the_start(run: Run) -> bool:
    """Whether a training exploded: it diverged, or ended above the loss it began with."""
    losses = run.column("train_loss")
    return run.status == "diverged" or not losses[-1] <= losses[0]


def exploded(found: Sequence[FolderOutcome]) -> list[str]:
    """A line for every arm of which a run was `worse_than_the_start`, with or without a teleport.

    Controls are left out.
    """
    lines = []
    for block in found:
        for arm, runs in by_arm(block.runs).items():
            gone = sum(map(worse_than_the_start, runs))
            if gone and not runs[0].config["training"].get("rival"):
                lines.append(f"{block.folder}, {arm}: {gone} of {len(runs)} runs")
    return lines


def last_looks(found: Sequence[FolderOutcome]) -> list[str]:
    """A line for every folder whose last evaluation came before the end of the training."""
    lines = []
    for block in found:
        early = [(at, end) for at, end in block.last_looks if at != end]
        lines += [f"{block.folder}: after {at} of {end} steps" for at, end in early]
    return lines


def by_the_usual_cut(found: Sequence[FolderOutcome]) -> list[str]:
    """The folders whose teleports were made before `thm-rank` decided what is free.

    No record names its rank rule. Those made by it have a teleport from the tuned initial gain too,
    where an experiment has one.
    """
    return [str(block.folder) for block in found if not teleporting(block, gained=True)]


def schedule_rows(found: Sequence[FolderOutcome]) -> list[list[str]]:
    """How often and how far every arm teleported, the time it took, and what became of the loss.

    *Growth of one*: mean factor of a teleport on the gradient norm; *of all*: from before the first
    to after the last, training in between included; *moved*: the share of the teleports that took a
    step; *time*: the teleports' part of the whole.
    """
    head = ["experiment", "optimizer", "rate", "schedule", "cap", "teleports", "moved"]
    head += ["growth of one", "of all", "time", "seconds", "final train loss"]
    rows = [_schedule(block, arm) for block, arm in arms_of(found)]
    return [[*head, "log loss, same rate"], *sorted(rows)]


def _schedule(block: FolderOutcome, arm: ArmSummary) -> list[str]:
    runs = [run for run in block.runs if run.arm == arm.arm]
    cap = runs[0].config["settings"]["teleport"]["cap"]
    reports = [report for run in runs for report in run.teleports]
    moved = np.mean([report["grad_norm_after"] != report["grad_norm_before"] for report in reports])
    of_all = np.mean(
        [r.teleports[-1]["grad_norm_after"] / r.teleports[0]["grad_norm_before"] for r in runs]
    )
    share = arm.teleport_seconds / (arm.teleport_seconds + arm.train_seconds)
    plain = next(other for other in block.summaries if other.arm == arm.baseline)
    return [
        *(block.experiment, block.optimizer, arm.baseline, schedule_name(block)),
        "-" if cap is None else f"{cap:g}",
        f"{len(reports) / len(runs):.0f}",
        *(f"{moved:.0%}", f"{arm.growth:.4g}", f"{of_all:.2f}", f"{share:.0%}"),
        ratio_text(arm.to_own, "seconds"),
        f"{plain.train_loss:.3f} → {arm.train_loss:.3f}",
        gap(arm.to_own),
    ]


def time_rows(found: Sequence[FolderOutcome]) -> list[list[str]]:
    """What part of a training its teleports take, by network and schedule, and why.

    Medians over the runs, with quartiles for one teleport and the range for the share of time.
    """
    kinds: dict[tuple[str, str], list[Run]] = {}
    for block in found:
        kind = block.experiment, schedule_name(block)
        own = {arm.arm for _, arm in arms_of([block])}
        kinds.setdefault(kind, []).extend(
            run for run in block.runs if run.arm in own and run.teleports and run.evaluations
        )
    head = ["network", "schedule", "runs", "training steps", "teleports"]
    head += ["one teleport, in training steps", "images / training batch", "share of time"]
    return [head, *([*kind, *_time(runs)] for kind, runs in sorted(kinds.items()) if runs)]


def _time(runs: Sequence[Run]) -> list[str]:
    rows = [run.evaluations[-1] for run in runs]
    times = [len(run.teleports) for run in runs]
    part = [r["teleport_seconds"] / (r["teleport_seconds"] + r["train_seconds"]) for r in rows]
    each = [
        row["teleport_seconds"] / row["train_seconds"] * row["step"] / many
        for row, many in zip(rows, times, strict=True)
    ]
    low, middle, high = np.percentile(each, [25, 50, 75])
    config = runs[0].config  # older records do not name the training batch: it was 32
    batch = config["settings"]["teleport"]["batch_size"] / config.get("batch_size", 32)
    return [
        *(f"{len(runs)}", range_text([row["step"] for row in rows]), range_text(times)),
        *(f"{middle:.0f} ({low:.0f} to {high:.0f})", f"{batch:.2g}"),
        f"{np.median(part):.0%} ({min(part):.0%} to {max(part):.0%})",
    ]
