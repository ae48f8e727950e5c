"""Whether a teleport leads to another solution: the loss on the line between two trained networks.

Linear mode connectivity (Frankle et al. 2020): two networks are connected if the loss does not rise
on the straight line between their weights. All trainings of a seed share their first steps. Then
one goes on as it is, others after a teleport, and one with other batches: how far two trainings
part for no reason at all is the yardstick.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from teleport.data import Dataset, load
from teleport.errors import RunError
from teleport.lab.analysis.sensitivity import design_settings
from teleport.lab.experiments.arms import Arm, RunSettings, tuning
from teleport.lab.experiments.training import Training, check_fits, look, separate_draws
from teleport.lab.records.folders import slug
from teleport.lab.records.record_folder import RecordFolder, read_records
from teleport.lab.records.runs import SPLITS, FloatArray, Split, read_rows
from teleport.lab.records.writer import RecordWriter, environment

GROWTHS = (1.5,)
"""Factors on the gradient norm, a teleported training for each."""

OTHER_BATCHES = "other batches"
"""Name of the yardstick."""


@dataclass(frozen=True)
class LinePoint:
    """A place on the line from the plain network to another one.

    Attributes:
        to: which: `OTHER_BATCHES`, or ``"growth 1.5"``.
        share: of the way, 0 at the plain network and 1 at the other.
        train_loss, test_loss: there, on the examples that evaluations of the training look at.
    """

    to: str
    share: float
    train_loss: float
    test_loss: float


def barrier(losses: FloatArray) -> float:
    """How far losses ``[points]``, equidistant, get above what lies straight between the ends."""
    return float(excess(losses).max())


def excess(losses: FloatArray) -> FloatArray:
    """Losses ``[..., points]`` minus what lies straight between the first and the last."""
    shares = np.linspace(0.0, 1.0, losses.shape[-1])
    return losses - (losses[..., :1] * (1.0 - shares) + losses[..., -1:] * shares)


def interval(values: FloatArray) -> tuple[float, float]:
    """Mean over seeds and half its 95 % interval by Student's t, ``[seeds]``; at least two."""
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean()), float(half)


def between(first: nn.Module, second: nn.Module, share: float) -> nn.Module:
    """A network on the straight line between two of the same make, which stay as they are.

    Raises:
        RunError: if they have buffers, such as the statistics of BatchNorm: those on the line are
            not on the line between those of the ends, and would have to be collected again.
    """
    if names := [name for name, _ in first.named_buffers()]:
        raise RunError(
            f"the network has buffers ({names[0]}, {len(names)} in all), as of BatchNorm, which no "
            "line between weights gives; take a network without any"
        )
    model = deepcopy(first)
    ends = zip(model.parameters(), first.parameters(), second.parameters(), strict=True)
    with torch.no_grad():
        for mixed, start, end in ends:
            mixed.copy_(torch.lerp(start, end, share))
    return model


def forked(
    settings: RunSettings,
    lr: float,
    seed: int,
    dataset: Dataset,
    growths: Sequence[float],
    progress: Callable[[int], None] = lambda steps: None,
) -> Iterator[tuple[str, Training, list[dict[str, Any]]]]:
    """Train on from one moment in several ways, each to the end of the training.

    The moment is when the teleport of the settings' schedule is due.

    Yields:
        What is new after that moment, ``"plain"`` first; the training; the reports of its
        teleports.

    Raises:
        RunError: if a training diverges, or ends before that moment.
    """
    moment: dict[str, Any] = {}
    at = settings.teleport.schedule.warmup_steps
    plain = Training(settings, Arm(lr), seed, dataset)
    if plain.steps <= at:
        raise RunError(f"{settings.experiment} trains for {plain.steps} steps, no more than {at}")

    def keep() -> None:
        if plain.step == at:
            moment.update(deepcopy(plain.state() or {}))
        progress(1)

    yield "plain", plain, _trained(plain, keep)
    for growth in growths:
        grown = replace(settings, teleport=replace(settings.teleport, growth=growth))
        training = Training(grown, Arm(lr, True), seed, dataset)
        if at:
            training.restore(moment, Path("moment"))
        yield f"growth {growth:g}", training, _trained(training, lambda: progress(1))
    training = Training(settings, Arm(lr), seed, dataset)
    others = separate_draws(seed, use=3)  # orders the rest of the epoch
    if at:
        training.restore({**moment, "epoch_start": others.get_state()}, Path("moment"))
    else:
        training.order.set_state(others.get_state())
    yield OTHER_BATCHES, training, _trained(training, lambda: progress(1))


def _trained(training: Training, after_step: Callable[[], None]) -> list[dict[str, Any]]:
    """Train to the end; return the reports of the teleports."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        with RecordWriter(path) as writer:
            writer.write("config")
            training.run(writer, after_step)
        rows = read_rows(path)
    if rows[-1]["status"] != "finished":
        raise RunError(f"{training.arm.name} (seed {training.seed}): {rows[-1]['reason']}")
    return [row for row in rows if row["type"] == "teleport"]


def points_on_line(to: str, first: Training, second: Training, count: int) -> Iterator[LinePoint]:
    """The losses of ``count`` points between two networks, on what their evaluations look at."""
    for share in np.linspace(0.0, 1.0, count).tolist():
        model = between(first.model, second.model, share).eval()
        size = first.settings.teleport.batch_size
        train, _ = look(model, first.dataset, *first.seen, size)
        test, _ = look(model, first.dataset, *first.unseen, size)
        yield LinePoint(to, share, train, test)


def check_connectivity(name: str, preset: str = "cpu", epochs: int | None = None) -> int:
    """Training steps of one seed; refuses, before anything is written, what would be later.

    Raises:
        ValueError: as `design_settings`, or for an experiment whose rate is not known.
        RunError: as `check_fits` and `between`, or if the training is too short.
        DataError: if the data cannot be had.
    """
    settings, lr = design_settings(name, preset, epochs), tuning(name, "sgd").tuned
    dataset = load(settings.recipe().data)
    check_fits(settings, dataset)
    model = settings.recipe().build(dataset, settings.size())
    between(model, model, 0.5)
    training, at = Training(settings, Arm(lr), 0, dataset), settings.teleport.schedule.warmup_steps
    if training.steps <= at:
        raise RunError(
            f"{name} trains for {training.steps} steps with the preset {preset}, and the teleport "
            f"is due after {at}; take a larger preset or more --epochs"
        )
    return training.steps + (1 + len(GROWTHS)) * (training.steps - at)


def write_lines(
    names: Sequence[str],
    out: RecordFolder,
    *,
    preset: str = "cpu",
    epochs: int | None = None,
    seeds: int = 5,
    points: int = 11,
) -> None:
    """Record the lines between the trainings of named experiments, one file for every seed.

    There are ``points`` >= 3 on every line, its ends included. Errors as of `check_connectivity`
    and `RecordFolder`; RunError, too, if a training diverges.
    """
    asked = {"preset": preset, "epochs": epochs, "points": points, "growths": list(GROWTHS)}
    with out.held("connectivity", asked):
        for seed in range(seeds):
            for order, name in enumerate(names):
                own = {"experiment": name, "seed": seed}
                path = out.missing(f"{order:02d}-{slug(name)}-seed{seed}", own)
                told = partial(out.progress, f"{name} (seed {seed})")
                if path is None:
                    told(check_connectivity(name, preset, epochs))
                    continue
                settings, lr = design_settings(name, preset, epochs), tuning(name, "sgd").tuned
                dataset = load(settings.recipe().data)
                shared = {"command": out.command, "order": order, "figure": "connectivity", **asked}
                about = _about(settings, lr, dataset)
                with RecordWriter(path) as writer:
                    writer.write("config", **shared, **own, **about, **environment())
                    told(0)
                    forks = forked(settings, lr, seed, dataset, GROWTHS, told)
                    _, plain, _ = next(forks)
                    for to, training, reports in forks:
                        for report in reports:
                            row = {key: value for key, value in report.items() if key != "type"}
                            writer.write("teleport", to=to, **row)
                        for point in points_on_line(to, plain, training, points):
                            writer.write("point", **asdict(point))
                    writer.write("end", status="finished", step=plain.steps)


def _about(settings: RunSettings, lr: float, dataset: Dataset) -> dict[str, Any]:
    """What a record says of the training."""
    return {
        "title": settings.recipe().title,
        "trained": settings.teleport.schedule.warmup_steps,
        "optimizer": settings.optimizer,
        "lr": lr,
        "teleport": asdict(settings.teleport),
        "size": asdict(settings.size()),
        "data": {"name": dataset.name, "checksum": dataset.checksum, "source": dataset.source},
    }


@dataclass(frozen=True)
class Lines:
    """The records of one experiment over its seeds.

    Attributes:
        shares: of the way, ``[points]``.
        losses: by the other network and the split, ``[seeds, points]``.
        growths: what the teleports reached, by the other network, ``[seeds]``.
    """

    config: dict[str, Any]
    shares: FloatArray
    losses: dict[tuple[str, Split], FloatArray]
    growths: dict[str, FloatArray]

    @property
    def others(self) -> list[str]:
        """The other networks, teleported ones first."""
        return list(dict.fromkeys(to for to, _ in self.losses))

    def barriers(self, to: str, split: Split = "train") -> FloatArray:
        """The barrier to another network, ``[seeds]``."""
        return np.array([barrier(losses) for losses in self.losses[to, split]])


def read_lines(folder: Path) -> list[Lines]:
    """The lines that a folder holds, experiment by experiment in the order they were asked for.

    RunError as of `read_records`, or if the lines of a record are not those of the others.
    """
    found: dict[tuple[int, str], list[Record]] = {}
    for path, config, rows in read_records(folder, "connectivity", "lines"):
        key = config["order"], config["experiment"]
        found.setdefault(key, []).append((path, [config, *rows]))
    return [_of_seeds(records) for _, records in sorted(found.items(), key=lambda item: item[0])]


Record = tuple[Path, list[dict[str, Any]]]


def _of_seeds(records: list[Record]) -> Lines:
    by_seed = [_points(*record) for record in records]
    others = by_seed[0]
    shares = [point["share"] for point in next(iter(others.values()))]
    for (path, _), lines in zip(records, by_seed, strict=True):
        found = {to: [point["share"] for point in line] for to, line in lines.items()}
        if found != dict.fromkeys(others, shares):
            raise RunError(
                f"{path} has lines to {', '.join(found)} with {list(map(len, found.values()))} "
                f"points, and others than {records[0][0]}; make its record again"
            )
    losses = {
        (to, split): np.array(
            [[point[f"{split}_loss"] for point in lines[to]] for lines in by_seed]
        )
        for to in others
        for split in SPLITS
    }
    growths: dict[str, list[float]] = {}
    for row in (row for _, rows in records for row in rows if row["type"] == "teleport"):
        grown = row["grad_norm_after"] / row["grad_norm_before"]
        growths.setdefault(row["to"], []).append(grown)
    reached = {to: np.array(values) for to, values in growths.items()}
    return Lines(records[0][1][0], np.array(shares), losses, reached)


def _points(path: Path, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The points of every line of one record, which go from one end to the other evenly."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if row["type"] == "point"):
        lines.setdefault(row["to"], []).append(row)
    even = np.linspace(0.0, 1.0, rows[0]["points"]).tolist()
    if not lines or any([point["share"] for point in line] != even for line in lines.values()):
        raise RunError(
            f"{path} does not have {len(even)} evenly placed points on every line; make its record "
            "again"
        )
    return lines
