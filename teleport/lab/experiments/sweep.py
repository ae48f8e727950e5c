"""A matrix of experiments and its cells; `executors`, beside this module, runs them.

A cell is one run: experiment, optimizer, arm, seed. Cells that are finished are left alone, and
broken ones go on from their checkpoint.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

from teleport.data import Dataset, load
from teleport.errors import TeleportError
from teleport.lab.experiments.arms import (
    RunSettings,
    control_arms,
    default_arms,
    lent_tuning,
    teleport_settings,
)
from teleport.lab.experiments.choices import CHECKPOINT_SECONDS
from teleport.lab.experiments.entry import Experiment
from teleport.lab.experiments.run import (
    Cell,
    check_beside,
    configuration,
    device_of,
    run_cell,
    steps_per_run,
)
from teleport.lab.experiments.table import find_experiment, give
from teleport.lab.experiments.training import check_fits, late_teleport
from teleport.lab.records.folders import slug
from teleport.lab.records.sameness import ADDED, is_complete
from teleport.lab.records.study import refuse_packed


@dataclass(frozen=True)
class Job:
    """A cell and where its record goes.

    Attributes:
        experiment: what the name in the cell's settings stands for where the job was made.
    """

    cell: Cell
    folder: Path
    experiment: Experiment
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    command: str = ""
    threads: int | None = None


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish, and why."""

    job: Job
    reason: str


@dataclass(frozen=True)
class Plan:
    """A matrix: experiments x optimizers x arms x seeds.

    Attributes:
        optimizers: every experiment is run with every one of them.
        seeds: how many, counted from 0.
        controls: add the controls that act on any network, at both learning rates.
    """

    names: tuple[str, ...]
    optimizers: tuple[str, ...] = ("sgd",)
    seeds: int = 3
    preset: str = "cpu"
    schedule: str = "default"
    epochs: int | None = None
    controls: bool = False
    device: str = "cpu"

    def jobs(
        self,
        out: Path,
        *,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        command: str = "",
        threads: int | None = None,
    ) -> list[Job]:
        """All cells, seed by seed, so that every arm has its first seed early.

        ValueError for an unknown name, or an optimizer that was not tuned for an experiment.
        """
        arms = control_arms if self.controls else default_arms
        jobs = []
        for name in self.names:
            options, experiment = teleport_settings(name, self.schedule), find_experiment(name)
            for optimizer in self.optimizers:
                settings = RunSettings(
                    name, self.preset, optimizer, self.epochs, device=self.device, teleport=options
                )
                settings.size()
                ending = "" if self.schedule == "default" else f"-{self.schedule}"
                folder = out / slug(name) / f"{slug(optimizer)}{ending}"
                shared = folder, experiment, checkpoint_seconds, command, threads
                jobs += [
                    Job(Cell(settings, arm, seed, order), *shared)
                    for seed in range(self.seeds)
                    for order, arm in enumerate(arms(name, optimizer))
                ]
        return jobs


def check_jobs(jobs: Sequence[Job]) -> list[str]:
    """What to tell the user: of cells that never teleport, or with another experiment's rates.

    Refuses, before anything is written, cells that every try would break off with; errors as of
    `load` and `check_fits`.
    """
    notes = []
    for settings in dict.fromkeys(job.cell.settings for job in jobs):
        dataset = _data(settings.recipe().data, "cpu")
        check_fits(settings, dataset)
        notes.append(late_teleport(settings, dataset))
        notes.append(lent_tuning(settings.experiment, settings.optimizer))
    return [note for note in notes if note]


def check_folders(jobs: Sequence[Job]) -> None:
    """Refuse folders that hold records of something else, as `check_beside` does."""
    for folder in dict.fromkeys(job.folder for job in jobs):
        refuse_packed(folder)
    for folder in dict.fromkeys(job.folder for job in jobs if job.folder.is_dir()):
        cells = [job.cell for job in jobs if job.folder == folder]
        check_beside(cells, _data(cells[0].settings.recipe().data, "cpu"), folder)


def total_steps(jobs: Sequence[Job]) -> int:
    """Training steps of all cells together."""
    return sum(_steps(job.cell.settings) for job in jobs)


@lru_cache
def _steps(settings: RunSettings) -> int:
    return steps_per_run(settings, _data(settings.recipe().data, "cpu"))


def is_done(job: Job) -> bool:
    """Whether its record is there and complete; RunError if the one there is of another run."""
    settings = job.cell.settings
    dataset = _data(settings.recipe().data, "cpu")
    return is_complete(job.folder / job.cell.record, configuration(job.cell, dataset), ADDED)


@lru_cache(maxsize=2)
def _data(name: str, device: str) -> Dataset:
    return load(name).to(device_of(device))


_ALONE = Lock()
"""Held while a cell runs: a Dask worker has many threads, but one random state for all of them."""


def run_job(job: Job, progress: Callable[[int], None] = lambda steps: None) -> Path:
    """One cell, from wherever its record is; what a process or a Dask worker calls.

    Cells of one process wait for each other.
    """
    settings = job.cell.settings
    with _ALONE:
        give(settings.experiment, job.experiment)
        job.folder.mkdir(parents=True, exist_ok=True)
        return run_cell(
            job.cell,
            _data(settings.recipe().data, settings.device),
            job.folder,
            resume=True,
            checkpoint_seconds=job.checkpoint_seconds,
            command=job.command,
            threads=job.threads,
            progress=progress,
        )


def reason_of(error: BaseException) -> str:
    """What a failed cell is listed with."""
    return str(error) if isinstance(error, TeleportError) else f"{type(error).__name__}: {error}"
