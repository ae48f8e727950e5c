"""What the gain of a teleport depends on: all its settings changed at once, in one design.

A Latin hypercube (McKay, Beckman and Conover 1979) puts one point in each of as many strata of
every factor as there are points. At every point the same training runs without a teleport and with
one, and a regression of the difference on the factors tells the effect of each, the others being
spread over their whole ranges. Tables that change one setting at a time cannot tell that.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit
from scipy.stats import qmc

from teleport.data import Dataset, load
from teleport.errors import RunError
from teleport.lab.experiments.arms import PAPER_STEPS, Arm, RunSettings, teleport_settings
from teleport.lab.experiments.run import Cell, run_cell, steps_per_run
from teleport.lab.experiments.training import check_fits
from teleport.lab.records.compare import compare
from teleport.lab.records.folders import slug
from teleport.lab.records.record_folder import RecordFolder, read_records
from teleport.lab.records.runs import FloatArray, Run, read_run
from teleport.lab.records.writer import RecordWriter, environment
from teleport.report import growth
from teleport.schedule import Schedule

GROWTH_RANGE = (1.1, 3.0)
"""Of the gradient norm, on a logarithmic scale."""
STEP_RANGE = (0.02, 0.5)
"""Fixed teleport step sizes, the paper's η, on a logarithmic scale."""
OPEN_RANGE = (1e-4, 0.1)
"""Shares 1 - τ of the input energy, on a logarithmic scale; τ = 1 has no place on it."""
BATCH_RANGE = (32.0, 512.0)
"""Examples of a teleport batch, on a logarithmic scale."""
LR_RANGE = (0.05, 0.4)
"""Learning rates of SGD, on a logarithmic scale."""
LATEST = 0.8
"""The part of the training within which the teleport comes."""

NAMES = ("size", "1 - τ", "batch n", "time", "lr")
"""The factors, in the order of the places of a point."""

WANTED_GROWTH, FIXED_STEP = "wanted growth", "fixed step"
SIZE_FACTORS = {WANTED_GROWTH: "growth", FIXED_STEP: "step size"}
"""The designs: what sets how far a teleport goes, and the name of the factor ``size`` there."""


@dataclass(frozen=True)
class Values:
    """The settings at one point.

    Attributes:
        growth: wanted, in the design `WANTED_GROWTH`.
        step: fixed, in the design `FIXED_STEP`.
        open: 1 - τ.
        n: examples of the teleport batch.
        after: training steps before the teleport.
    """

    growth: float
    step: float
    open: float
    n: int
    after: int
    lr: float


def latin_hypercube(count: int, seed: int = 0) -> FloatArray:
    """A Latin hypercube ``[count, factors]`` in [0, 1): one point in each stratum of a factor.

    ValueError for fewer points than the regression has terms, and two more.
    """
    least = len(NAMES) + 5
    if count < least:
        raise ValueError(f"points must be an integer >= {least}, got {count}")
    sampler = qmc.LatinHypercube(len(NAMES), optimization="random-cd", seed=seed)
    return np.asarray(sampler.random(count), dtype=np.float64)


def values_at(place: Sequence[float], steps: int) -> Values:
    """The settings at a place of the hypercube, for a training of so many steps."""

    def between(ends: tuple[float, float], share: float) -> float:
        return float(ends[0] * (ends[1] / ends[0]) ** share)

    size, open_, batch, time, lr = place
    return Values(
        between(GROWTH_RANGE, size),
        between(STEP_RANGE, size),
        between(OPEN_RANGE, open_),
        round(between(BATCH_RANGE, batch)),
        int(LATEST * steps * time),
        between(LR_RANGE, lr),
    )


@dataclass(frozen=True)
class Effects:
    """What a regression says about one design.

    Attributes:
        design: `WANTED_GROWTH` or `FIXED_STEP`.
        names: of the terms: the mean over the design; each factor; the curvature of the size; and
            the size times the learning rate.
        values: of a factor, the change of the response from the low to the high end of its range.
            Of the curvature, four times how much the ends of the range lie above its middle. Of
            the product, how much the effect of the size differs between the ends of the learning
            rate's range.
        half_widths: of their 95 % intervals.
        points: of the design that have a response.
        explained: share of the variance of the response.
    """

    design: str
    names: tuple[str, ...]
    values: FloatArray
    half_widths: FloatArray
    points: int
    explained: float

    @property
    def resolved(self) -> list[bool]:
        """Of which terms the interval leaves 0 out."""
        pairs = zip(self.values, self.half_widths, strict=True)
        return [bool(abs(value) > half) for value, half in pairs]


def effects(design: str, at: FloatArray, response: FloatArray) -> Effects:
    """Least squares of a response on the factors, with intervals by Student's t.

    The spread of log losses grows with the learning rate; the intervals allow for a variance that
    differs from point to point (HC3, MacKinnon and White 1985; five lines here, where statsmodels
    has them in 85 MB with pandas).

    Args:
        design: its name.
        at: places ``[points, factors]``, in [0, 1].
        response: ``[points]``; points where it is not finite are left out.

    Raises:
        ValueError: if fewer points are left than terms, and one more.
    """
    size = SIZE_FACTORS[design]
    names = ("mean", size, *NAMES[1:], f"{size}, curvature", f"{size} x lr")
    kept = np.isfinite(response)
    x, y = at[kept] - 0.5, response[kept]
    bend, product = x[:, 0] ** 2 - 1.0 / 12.0, x[:, 0] * x[:, -1]
    terms = np.column_stack([np.ones(len(x)), x, bend, product])
    free = len(y) - len(names)
    if free < 1:
        raise ValueError(f"{len(names)} terms need more points than that, got {len(y)}")
    inverse = np.linalg.inv(terms.T @ terms)
    values = inverse @ (terms.T @ y)
    residuals = y - terms @ values
    leverage = np.einsum("ij,jk,ik->i", terms, inverse, terms)
    scaled = terms * (residuals / (1.0 - leverage))[:, None]
    variances = np.diag(inverse @ (scaled.T @ scaled) @ inverse)
    half_widths = stdtrit(free, 0.975) * np.sqrt(variances)
    spread = float(((y - y.mean()) ** 2).sum())
    explained = 1.0 - float((residuals**2).sum()) / spread if spread else 0.0
    return Effects(design, names, values, half_widths, len(y), explained)


def design_settings(name: str, preset: str = "cpu", epochs: int | None = None) -> RunSettings:
    """How an experiment is trained in these studies: with SGD, the preset's epochs unless given.

    ValueError for an unknown name or preset, or a count < 1.
    """
    settings = RunSettings(name, preset, "sgd", epochs, teleport=teleport_settings(name))
    settings.size()
    return settings


def check_sensitivity(name: str, preset: str = "cpu", epochs: int | None = None) -> int:
    """Training steps of one run; refuses, before anything is written, what every point would.

    Raises:
        ValueError: as `design_settings`.
        RunError: as `check_fits`.
        DataError: if the data cannot be had.
    """
    settings = design_settings(name, preset, epochs)
    dataset = load(settings.recipe().data)
    check_fits(_with(settings, values_at([1.0] * len(NAMES), 1), WANTED_GROWTH), dataset)
    return steps_per_run(settings, dataset)


def _with(settings: RunSettings, at: Values, design: str) -> RunSettings:
    """The same training with the teleport of a point."""
    shared = replace(
        settings.teleport,
        schedule=Schedule(epochs=1, batches=1, warmup_steps=at.after),
        tau=1.0 - at.open,
        batch_size=at.n,
    )
    if design == WANTED_GROWTH:
        return replace(settings, teleport=replace(shared, growth=at.growth))
    cap = settings.recipe().teleport.cap
    fixed = replace(shared, lr=at.step, steps=PAPER_STEPS, cap=cap)
    return replace(settings, teleport=fixed)


def write_design(
    name: str,
    out: RecordFolder,
    *,
    preset: str = "cpu",
    epochs: int | None = None,
    points: int = 48,
) -> None:
    """Record both designs of a named experiment, one file for every point.

    A point of one design is at the same place as that of the other, and shares its training without
    a teleport. Every point has a seed of its own, so that the spread between seeds is in the
    intervals. Errors as of `design_settings`, `latin_hypercube` and `RecordFolder`.
    """
    settings = design_settings(name, preset, epochs)
    dataset = load(settings.recipe().data)
    steps, digits = steps_per_run(settings, dataset), max(2, len(str(points - 1)))
    asked = {
        "experiment": name,
        "title": settings.recipe().title,
        "preset": preset,
        "size": asdict(settings.size()),
        "points": points,
        "optimizer": settings.optimizer,
        "data": {"name": dataset.name, "checksum": dataset.checksum, "source": dataset.source},
    }
    with out.held("sensitivity", asked):
        for order, place in enumerate(latin_hypercube(points).tolist()):
            at = values_at(place, steps)
            point = {"order": order, "seed": order, "place": place, "values": asdict(at)}
            path = out.missing(f"{order:0{digits}d}-{slug(name)}-seed{order}", point)
            told = partial(out.progress, f"point {order + 1} of {points}")
            if path is None:
                told(steps * (1 + len(SIZE_FACTORS)))
                continue
            config = {"figure": "sensitivity", **asked, **point, **environment()}
            with out.writing(path, **config) as writer:
                _measure(writer, settings, at, order, dataset, told)


def _measure(
    writer: RecordWriter,
    settings: RunSettings,
    at: Values,
    seed: int,
    dataset: Dataset,
    progress: Callable[[int], None],
) -> None:
    def trained(design: str, teleports: bool) -> Run:
        cell = Cell(_with(settings, at, design), Arm(at.lr, teleports), seed, 0)
        with tempfile.TemporaryDirectory() as folder:
            return read_run(run_cell(cell, dataset, Path(folder), progress=progress))

    plain = trained(WANTED_GROWTH, False)
    for design in SIZE_FACTORS:
        run = trained(design, True)
        report = run.teleports[0] if run.teleports else {}  # none if it diverged before
        grown = growth(report["grad_norm_before"], report["grad_norm_after"]) if report else 1.0
        writer.write(
            "outcome",
            design=design,
            log_loss=compare([run], [plain]).log_loss,
            growth=grown,
            rolled_back=bool(report.get("rolled_back", False)),
            steps=report.get("steps", 0),
            status=run.status,
            reason=report.get("reason", run.reason),
            train_loss=float(run.column("train_loss")[-1]),
            plain_train_loss=float(plain.column("train_loss")[-1]),
        )


@dataclass(frozen=True)
class Outcomes:
    """One design as read from its records.

    Attributes:
        places: ``[points, factors]``.
        log_loss: of the teleport against none, ``[points]``; NaN where there is nothing to compare.
        growth: reached, ``[points]``.
        rolled_back: how many teleports were undone because the drift was too large.
        diverged: how many trainings diverged after them.
    """

    config: dict[str, Any]
    design: str
    places: FloatArray
    log_loss: FloatArray
    growth: FloatArray
    rolled_back: int
    diverged: int

    @property
    def effects(self) -> Effects:
        """On the log loss."""
        return effects(self.design, self.places, self.log_loss)


def read_outcomes(folder: Path) -> list[Outcomes]:
    """The designs of a folder; RunError as of `read_records`, or if not all points are there."""
    found = read_records(folder, "sensitivity", "points of a design")
    points = [(config, _checked(path, config, rows)) for path, config, rows in found]
    wanted = points[0][0]["points"]
    if len(points) != wanted:
        raise RunError(
            f"{folder} holds {len(points)} of {wanted} points of a design; "
            "`teleport sensitivity` with --resume makes the others"
        )
    return [_outcomes(design, points) for design in SIZE_FACTORS]


def _checked(
    path: Path, config: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The outcome of one point for every design."""
    found = {row["design"]: row for row in rows if row["type"] == "outcome"}
    if config["order"] != config["seed"]:  # else a point could be there twice
        raise RunError(f"{path} is not the point of its seed; make its record again")
    if set(found) != set(SIZE_FACTORS) or len(config["place"]) != len(NAMES):
        raise RunError(
            f"{path} does not have an outcome for {' and '.join(SIZE_FACTORS)} at a place of "
            f"{len(NAMES)} factors; make its record again"
        )
    return found


def _outcomes(
    design: str, points: list[tuple[dict[str, Any], dict[str, dict[str, Any]]]]
) -> Outcomes:
    rows = [found[design] for _, found in points]
    losses = [np.nan if row["log_loss"] is None else row["log_loss"] for row in rows]
    return Outcomes(
        points[0][0],
        design,
        np.array([config["place"] for config, _ in points]),
        np.array(losses, dtype=np.float64),
        np.array([row["growth"] for row in rows]),
        sum(row["rolled_back"] for row in rows),
        sum(row["status"] == "diverged" for row in rows),
    )
