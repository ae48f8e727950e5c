"""How many steps a teleport should save, arm by arm of the matrix: ``thm-saving`` as a prediction.

Every arm is trained up to its first teleport, where the step of its optimizer is tried before and
after a teleport. What the whole runs saved is in the records of `teleport sweep`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teleport.bounds.saving import FIRST_POWER, TriedStep, best_growth, try_step
from teleport.data import load
from teleport.lab.experiments.arms import Arm, RunSettings, default_arms, teleport_settings
from teleport.lab.experiments.training import Training, check_fits
from teleport.lab.records.folders import slug
from teleport.lab.records.record_folder import RecordFolder, read_records
from teleport.lab.records.writer import environment
from teleport.runtime.clock import now
from teleport.runtime.ranks import ALONE
from teleport.runtime.transaction import Transaction
from teleport.teleporter import Teleporter

NO_DESCENT = 1e6
"""Written for the stride of a step that does not lower the loss at all, which is infinite."""


def write_savings(
    names: Sequence[str],
    optimizers: Sequence[str],
    out: RecordFolder,
    *,
    preset: str = "cpu",
    seeds: int = 2,
) -> None:
    """Record what teleports should save, one file for each experiment, optimizer and seed.

    Of the optimizers those are taken that an experiment was tuned for. The seeds, from 0, are those
    of `teleport sweep`. Errors as of `tuned_settings`, `load` and `RecordFolder`.
    """
    with out.held("saving", {"preset": preset}):
        for settings in tuned_settings(names, optimizers, preset):
            name, optimizer, recipe = settings.experiment, settings.optimizer, settings.recipe()
            dataset, order = load(recipe.data), names.index(name)
            for seed in range(seeds):
                own = {"experiment": name, "optimizer": optimizer, "seed": seed}
                path = out.missing(f"{order:02d}-{slug(name)}-{optimizer}-seed{seed}", own)
                if path is None:
                    continue
                shared = {"figure": "saving", "order": order, "preset": preset}
                title = recipe.title
                with out.writing(path, **shared, title=title, **own, **environment()) as writer:
                    for arm in plain_arms(settings):
                        out.progress(f"{name}, {optimizer}, seed {seed}: {arm.name}")
                        row = measure(Training(settings, arm, seed, dataset))
                        writer.write("saving", arm=arm.name, **row)


def tuned_settings(
    names: Sequence[str], optimizers: Sequence[str], preset: str
) -> list[RunSettings]:
    """How experiments are trained with those of the optimizers that they were tuned for.

    ValueError for an unknown name.
    """
    every = [
        RunSettings(name, preset, optimizer, teleport=teleport_settings(name))
        for name in names
        for optimizer in optimizers
    ]
    for settings in every:
        settings.size()
    return [settings for settings in every if settings.optimizer in settings.recipe().tuning]


def check_savings(names: Sequence[str], optimizers: Sequence[str], preset: str) -> int:
    """Arms of every seed; refuses, before anything is written, what `write_savings` would."""
    found = tuned_settings(names, optimizers, preset)
    for settings in found:
        check_fits(settings, load(settings.recipe().data))
    if not found:
        raise ValueError(
            f"none of {', '.join(names)} was tuned for any of {', '.join(optimizers)}; see "
            "`teleport list`"
        )
    return sum(len(plain_arms(settings)) for settings in dict.fromkeys(found))


def plain_arms(settings: RunSettings) -> list[Arm]:
    """The default arms without a teleport, each once."""
    arms = default_arms(settings.experiment, settings.optimizer)
    return list(dict.fromkeys(arm.baseline for arm in arms))


def measure(training: Training) -> dict[str, Any]:
    """The row of one arm. The training is advanced to its first teleport, which is not kept."""
    options = training.settings.teleport
    warm = min(options.schedule.warmup_steps, training.steps)
    training.advance(warm // 2)
    started = now()
    training.advance(warm - warm // 2)
    step_seconds = (now() - started) / max(1, warm - warm // 2)
    batch, held_out = training.draw()

    def tried() -> TriedStep:
        with Transaction(training.model) as transaction:
            closure = transaction.repeatable(batch)
            return transaction.until_quiet(
                lambda: try_step([closure], training.model, training.optimizer, ALONE)
            )[0]

    before = tried()
    report = Teleporter(training.model, growth=options.growth).step(batch, held_out=held_out)
    after = tried()
    cost = report.seconds / step_seconds
    return {
        "lr": training.arm.lr,
        "steps": training.steps,
        "fall": before.fall,
        "stride": min(before.stride, NO_DESCENT),
        "growth": report.growth,
        "stride_after": min(after.stride, NO_DESCENT),
        "cost": cost,
        "held_out_drift": report.held_out_drift,
        "step_seconds": step_seconds,
        "teleport_seconds": report.seconds,
    }


@dataclass(frozen=True)
class Saving:
    """What a teleport should save in one arm; means over the seeds.

    Attributes:
        key: experiment, optimizer and arm.
        stride, stride_after: k before and after the teleport.
    """

    key: tuple[str, str, str]
    steps: float
    stride: float
    stride_after: float
    growth: float
    cost: float
    seeds: int

    @property
    def saved(self) -> float:
        """Steps that the teleport should have saved (``thm-saving``)."""
        return (self.growth**2 - 1.0) / self.stride_after

    @property
    def expected(self) -> float:
        """Steps that ``growth="auto"`` expects to save, by a growth of its own."""
        return TriedStep(math.nan, math.nan, math.nan, self.stride).saved(
            best_growth(FIRST_POWER), FIRST_POWER
        )

    @property
    def pays(self) -> bool:
        """Whether ``growth="auto"`` would teleport, given room in the budget."""
        after = self.stride * best_growth(FIRST_POWER) ** FIRST_POWER
        return self.expected > self.cost and after <= 1.0


def read_savings(folder: Path) -> list[Saving]:
    """What teleports should save in the arms of a folder; errors as of `read_records`."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for _, config, rows in read_records(folder, "saving", "savings", row="saving"):
        for row in (row for row in rows if row["type"] == "saving"):
            key = config["experiment"], config["optimizer"], row["arm"]
            found.setdefault(key, []).append(row)

    def mean(rows: list[dict[str, Any]], name: str) -> float:
        return float(sum(row[name] for row in rows) / len(rows))

    names = ("steps", "stride", "stride_after", "growth", "cost")
    return [
        Saving(key, **{name: mean(rows, name) for name in names}, seeds=len(rows))
        for key, rows in found.items()
    ]
