"""The whole matrix of a folder of records, as Markdown: what teleporting is worth, cell by cell."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teleport.errors import RunError
from teleport.lab.experiments.arms import PAPER_STEPS
from teleport.lab.records.compare import ArmSummary, Comparison, best_baseline, summarise
from teleport.lab.records.runs import Run, by_arm, check_no_copies, first_row, has_begun, read_runs
from teleport.lab.records.sameness import check_alike
from teleport.lab.records.schema import made_by
from teleport.lab.records.study import record_folders, record_paths
from teleport.teleporter import DEFAULT_GROWTH


@dataclass(frozen=True)
class FolderOutcome:
    """One folder of records: an experiment with one optimizer and one way to teleport.

    Attributes:
        folder: relative to the folder of the report.
        summaries: one per arm.
    """

    folder: Path
    runs: list[Run]
    summaries: list[ArmSummary]
    best: str | None

    @property
    def experiment(self) -> str:
        """Name of the experiment."""
        return str(self.runs[0].config["experiment"])

    @property
    def optimizer(self) -> str:
        """Name of the optimizer."""
        return str(self.runs[0].config["settings"]["optimizer"])

    @property
    def title(self) -> str:
        """What the block compares."""
        config = self.runs[0].config
        options = config["settings"]
        activation = options.get("activation", "relu")  # older records name none
        network = "" if activation == "relu" else f", {activation}"
        parts = [f"preset {options['preset']}{smaller(config)}{network}"]
        if "size" in config:  # older records name neither size, data nor settings of the teleport
            parts.append(length(config) + self._looked_before_the_end())
        if "data" in config:
            parts.append(f"data {config['data']['name']}")
        teleports = f"; {how(options['teleport'])}" if "teleport" in options else ""
        return f"{self.experiment}, {self.optimizer}: {', '.join(parts)}{teleports}"

    @property
    def last_looks(self) -> set[tuple[int, int | None]]:
        """The steps of finished runs at their last evaluation, and those of the whole training."""
        ended = [run for run in self.runs if run.status == "finished" and run.evaluations]
        return {(int(run.column("step")[-1]), run.steps) for run in ended}

    def _looked_before_the_end(self) -> str:
        """Of runs of a version that did not evaluate after the last step, where they did last."""
        if len(looks := self.last_looks) != 1:
            return ""
        ((last, all_steps),) = looks
        return "" if last == all_steps else f", the last time after {last} of {all_steps} steps"


def how(options: dict[str, Any]) -> str:
    """When and how the runs of a record teleport, from the settings in it."""
    when = options["schedule"]
    times = "once" if when["epochs"] == 1 else f"in each of the first {when['epochs']} epochs"
    if when["epochs"] == 1 or when["warmup_steps"]:
        times += f", after {when['warmup_steps']} steps"
    parts = [f"{when['batches']} x {options['batch_size']} examples"]
    steps, lr, growth, cap = (options[key] for key in ("steps", "lr", "growth", "cap"))
    if growth is None and (lr is None or cap is None):
        growth = DEFAULT_GROWTH
    if lr is not None:
        parts.append(f"{steps or PAPER_STEPS} steps of {lr:g}")
    elif steps is not None:
        parts.append(f"{steps} steps")
    tau = None if options["tau"] == 1.0 else options["tau"]
    bounds = {"growth": growth, "cap": cap, "tau": tau}
    parts += [f"{name} {value:g}" for name, value in bounds.items() if value is not None]
    return f"teleport {times}, {', '.join(parts)}"


def length(config: dict[str, Any]) -> str:
    """How long the runs of a record train, on what part of the data, and what losses are taken."""
    size = config["size"]
    epochs = f"{size['epochs']} epoch{'s' * (size['epochs'] != 1)}"
    part = f" of {size['train_size']:,} examples" if size.get("train_size") else ""
    return f"{epochs}{part}, losses of the first {size['evaluate_size']:,}"


def smaller(config: dict[str, Any]) -> str:
    """In which sizes the network of a run differs from that of its experiment."""
    sizes = config.get("size", {}).get("network") or {}  # older records name no sizes
    return f" ({', '.join(f'{key} {value}' for key, value in sizes.items())})" if sizes else ""


def blocks(
    folder: Path, progress: Callable[[int, int], None] = lambda done, of: None
) -> list[FolderOutcome]:
    """Every folder below with runs that teleport and their baselines.

    The same runs may be in several folders, recorded again each time, but not copied. RunError if
    there is none, or as of `folder_outcomes`.
    """
    found = folder_outcomes(folder, progress)
    compared = [b for b in found if any(s.to_own is not None for s in b.summaries)]
    if not compared:
        raise RunError(
            f"{folder} holds no records of runs with and without teleport; give a folder that "
            "`teleport run` or `teleport sweep` has written"
        )
    return sorted(compared, key=lambda b: (b.experiment, b.folder))


def folder_outcomes(
    folder: Path, progress: Callable[[int, int], None] = lambda done, of: None
) -> list[FolderOutcome]:
    """Every folder with records of runs, this one and those below, compared or not.

    ``progress`` is told how many folders were read since, and how many there are. RunError if a
    record is damaged or copied.
    """
    places, found = record_folders(folder), dict[Path, list[Run]]()
    for path in places:
        progress(1, len(places))
        records = [record for record in record_paths(path) if has_begun(record)]
        if any(made_by(first_row(record)) == "run" for record in records):
            found[path] = read_runs(path)
            check_alike(found[path])
    check_no_copies(run for runs in found.values() for run in runs)
    return [
        FolderOutcome(path.relative_to(folder), runs, summarise(runs), best_baseline(by_arm(runs)))
        for path, runs in found.items()
    ]


_Cell = Callable[[FolderOutcome, ArmSummary], str]
_COLUMNS: dict[str, _Cell] = {
    "arm": lambda b, s: s.arm + (" (best baseline)" if s.arm == b.best else ""),
    "seeds": lambda b, s: str(s.runs),
    "train loss": lambda b, s: number_text(s.train_loss, "{:.4f}") + _end(s),
    "test loss": lambda b, s: number_text(s.test_loss, "{:.4f}"),
    "same lr: steps": lambda b, s: ratio_text(s.to_own, "steps"),
    "same lr: seconds": lambda b, s: ratio_text(s.to_own, "seconds"),
    "same lr: log loss": lambda b, s: gap_text(s.to_own),
    "best: steps": lambda b, s: ratio_text(s.to_best, "steps"),
    "best: seconds": lambda b, s: ratio_text(s.to_best, "seconds"),
    "best: log loss": lambda b, s: gap_text(s.to_best),
    "growth": lambda b, s: "" if s.to_own is None else number_text(s.growth, "{:.4g}"),
    "drift": lambda b, s: number_text(s.drift, "{:.0e}"),
    "drift elsewhere": lambda b, s: number_text(s.held_out_drift, "{:+.3f}"),
    "teleport share of time": lambda b, s: _share(s),
}

LEGEND = """\
Every row is a way to train, mean over seeds. *Same lr*: against the same training without the
intervention; *best*: against the arm without any that ended with the lowest train loss, learning
rate and initial gain tuned. *Steps* and *seconds* (teleporting included, counted in training steps
of the same process) are ratios of the way to the baseline's final train loss, median over seeds,
below 1 is faster; "-": the median never got there, which also happens to a training that is only
repeated, for it ends a little above or below. *Log loss*: mean difference of the log train loss
over the run, with its standard deviation over seeds; -0.1 is 10 % lower. *Growth*: factor of one
teleport on the gradient norm, those that did not move included; *drift*: change of the loss on its
batch; *elsewhere*: on other training examples.
"""


def matrix_markdown(found: Sequence[FolderOutcome]) -> str:
    """The matrix: one table per block, good and bad alike."""
    parts = [LEGEND]
    for block in found:
        table = "\n".join(markdown(matrix_rows(block)))
        parts.append(f"### {block.title}\n\n{table}\n\nRecords: `{block.folder}`\n")
    return "\n".join(parts)


def matrix_rows(block: FolderOutcome) -> list[list[str]]:
    """The table of one block, its head first: a row for every arm."""
    rows = [[cell(block, s) for cell in _COLUMNS.values()] for s in block.summaries]
    return [list(_COLUMNS), *rows]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is its head."""
    rule = ["---"] * len(rows[0])
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def without_controls(block: FolderOutcome) -> list[Run]:
    """The runs a figure of trajectories shows: with and without teleport, but no control."""
    return [run for run in block.runs if not run.config["training"].get("rival")]


def _end(summary: ArmSummary) -> str:
    return "" if summary.status == "finished" else f" ({summary.status})"


def number_text(value: float, form: str = "{:.2f}") -> str:
    """A number, or a dash for none."""
    return "-" if math.isnan(value) else form.format(value)


def range_text(counts: Sequence[int]) -> str:
    """From the least to the largest of some counts, or the one that they all are."""
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def ratio_text(comparison: Comparison | None, axis: str, form: str = "{:.2f}") -> str:
    """The ratio of steps or seconds; empty without a comparison."""
    return "" if comparison is None else number_text(getattr(comparison, axis), form)


def gap_text(comparison: Comparison | None) -> str:
    """The log loss with its spread; a dash if a run diverged at once, empty for no comparison."""
    if comparison is None:
        return ""
    spread = comparison.log_loss_spread
    behind = "" if math.isnan(spread) else f" ± {spread:.3f}"
    return number_text(comparison.log_loss, "{:+.3f}" + behind)


def _share(summary: ArmSummary) -> str:
    whole = summary.train_seconds + summary.teleport_seconds
    return "" if not summary.teleport_seconds else f"{summary.teleport_seconds / whole:.0%}"
