"""From arms and seeds to records, resuming what is broken off."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from teleport.data import Dataset, load
from teleport.errors import RunError
from teleport.lab.experiments.arms import Arm, RunSettings
from teleport.lab.experiments.choices import CHECKPOINT_SECONDS
from teleport.lab.experiments.models import mlp
from teleport.lab.experiments.optimizers import find_optimizer
from teleport.lab.experiments.tensorboard import Board
from teleport.lab.experiments.training import Training, read_state, train_size
from teleport.lab.records.checkpoint import locked, save_checkpoint
from teleport.lab.records.folders import slug
from teleport.lab.records.runs import first_row, read_run
from teleport.lab.records.sameness import ADDED, SHARED, check_folder, is_complete
from teleport.lab.records.writer import RecordWriter, environment
from teleport.runtime.threads import using_threads
from teleport.teleporter import Teleporter

Progress = Callable[[str, int], None]
"""Called with what is being run and the training steps done since the last call."""


@dataclass(frozen=True)
class Cell:
    """One run of a matrix: everything that decides what its record says.

    Attributes:
        order: its arm's place among the arms, for the name of the record and the tables.
    """

    settings: RunSettings
    arm: Arm
    seed: int
    order: int

    @property
    def record(self) -> str:
        """Name of its record."""
        return f"{self.order:02d}-{slug(self.arm.name)}-seed{self.seed}.jsonl"

    def __str__(self) -> str:
        s = self.settings
        return f"{s.experiment} {s.optimizer} {self.arm.name} (seed {self.seed})"


def steps_per_run(settings: RunSettings, dataset: Dataset) -> int:
    """Training steps of one run."""
    size = settings.size()
    return size.epochs * (train_size(size, dataset) // settings.batch())


def run_arms(
    settings: RunSettings,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    out: Path,
    *,
    resume: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    command: str = "",
    tensorboard: Path | None = None,
    threads: int | None = None,
    progress: Progress = lambda what, steps: None,
) -> list[Path]:
    """Train every arm with every seed; return the paths of their records, in this order.

    Args:
        settings: what all runs share.
        arms: the ways to train.
        seeds: each gives an initialisation and an order of the data, the same for all arms.
        out: an existing folder for the records, which no other process uses.
        resume: leave finished runs as they are and go on with broken ones.
        checkpoint_seconds: between checkpoints.
        command: the command line, for the record.
        tensorboard: folder for TensorBoard, a folder of event files in it for every run.
        threads: PyTorch's; default as many as it has, and for a broken run as many as it began
            with, since other numbers of threads round otherwise.
        progress: told about every few steps.

    Raises:
        RunError: if the device is not available, the folder is in use or holds other records
            than runs with these settings, a broken run began with other threads than are asked
            for, a record cannot be written, or TensorBoard is wanted and not installed.
        DataError: if the data cannot be had.
    """
    device = device_of(settings.device)
    dataset = load(settings.recipe().data).to(device)
    cells = [Cell(settings, arm, seed, i) for seed in seeds for i, arm in enumerate(arms)]
    with locked(out / ".lock", str(out)):
        check_beside(cells, dataset, out)
        return [
            run_cell(
                cell,
                dataset,
                out,
                resume=resume,
                checkpoint_seconds=checkpoint_seconds,
                command=command,
                tensorboard=tensorboard,
                threads=threads,
                progress=partial(progress, f"{cell.arm.name} (seed {cell.seed})"),
            )
            for cell in cells
        ]


def run_cell(
    cell: Cell,
    dataset: Dataset,
    out: Path,
    *,
    resume: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    command: str = "",
    tensorboard: Path | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> Path:
    """One run to its end; with ``resume`` from where it broke off, on CPU bit for bit.

    Returns the record's path; the arguments are those of `run_arms`.

    Raises:
        RunError: if the record is in use, is another run's, began with other threads than are
            asked for, or cannot be written.
    """
    path = out / cell.record
    checkpoint = path.with_suffix(".checkpoint")
    config = configuration(cell, dataset)
    with locked(path.with_suffix(".lock"), str(path)):
        if resume and is_complete(path, config, ADDED):
            checkpoint.unlink(missing_ok=True)
            progress(steps_per_run(cell.settings, dataset))
            return path
        state = read_state(checkpoint) if resume and checkpoint.exists() else None
        if state is not None and (not path.exists() or path.stat().st_size < state["record_bytes"]):
            state = None  # the record was lost, or never reached the disk
        if state is not None:
            threads = _begun_with(path, threads)
        with ExitStack() as stack:
            stack.enter_context(using_threads(threads or torch.get_num_threads()))
            _warm_up(cell.settings)
            training = Training(cell.settings, cell.arm, cell.seed, dataset)
            if state is not None:
                training.restore(state, checkpoint)  # before the record is cut to what it knows
            elif resume:
                path.unlink(missing_ok=True)
            keep = None if state is None else state["record_bytes"]
            also = {}
            if tensorboard is not None:
                board = stack.enter_context(Board(tensorboard / path.stem, training.step))
                if state is not None:
                    _show_again(board, path, training.step)
                also["also"] = board.write
            writer = stack.enter_context(RecordWriter(path, keep, **also))
            if state is None:
                writer.write("config", **config, command=command, **environment())
            else:
                writer.write("resumed", step=training.step, **environment())
            progress(training.step)
            training.run(writer, _saving(training, checkpoint, checkpoint_seconds, progress))
        checkpoint.unlink(missing_ok=True)
    return path


def _begun_with(record: Path, asked: int | None) -> int | None:
    """The threads a run has to go on with, if its record names any; RunError for others."""
    hardware = first_row(record).get("hardware", {})
    begun: int | None = hardware.get("threads", asked)  # records of other programs name none
    if asked is not None and asked != begun:
        raise RunError(
            f"{record} began with {begun} threads, and would go on otherwise with {asked}, if only "
            f"in the last digits; give --threads {begun}, or none to keep to that"
        )
    return begun


def _show_again(board: Board, record: Path, step: int) -> None:
    """The evaluation at a checkpoint's step, from which on TensorBoard shows nothing any more."""
    for row in read_run(record).evaluations:
        if row["step"] == step:
            board.write("evaluation", row)


def _saving(
    training: Training, path: Path, seconds: float, progress: Callable[[int], None]
) -> Callable[[], None]:
    """What is done after every training step: a checkpoint when one is due, and progress."""
    saved = time.monotonic()

    def after_step() -> None:
        nonlocal saved
        progress(1)
        if time.monotonic() - saved >= seconds:
            if (state := training.state()) is not None:
                save_checkpoint(path, state)
            saved = time.monotonic()

    return after_step


def configuration(cell: Cell, dataset: Dataset) -> dict[str, Any]:
    """The first row of a run's record, but for the command line and the machine."""
    return {
        "experiment": cell.settings.experiment,
        "preset": cell.settings.preset,
        "arm": cell.arm.name,
        "baseline": cell.arm.baseline.name,
        "order": cell.order,
        "seed": cell.seed,
        "training": asdict(cell.arm),
        "settings": asdict(cell.settings),
        "size": asdict(cell.settings.size()),
        "network": cell.settings.recipe().network,
        "batch_size": cell.settings.batch(),
        "data": {key: getattr(dataset, key) for key in ("name", "checksum", "source", "note")},
    }


def check_beside(cells: Sequence[Cell], dataset: Dataset, folder: Path) -> None:
    """Refuse, as `check_folder` does, a folder where records of cells do not belong."""
    if not cells:
        return
    config = configuration(cells[0], dataset)
    shared = {key: config[key] for key in SHARED}
    names = {(cell.arm.name, cell.seed): cell.record for cell in cells}
    check_folder(folder, "run", shared, ADDED, names)


def device_of(name: str) -> torch.device:
    """The device of this name; RunError if it cannot be used here."""
    device = device_named(name)
    try:
        float(torch.zeros((), device=device))  # which "meta", for one, does not have
    except (RuntimeError, AssertionError) as error:
        raise _unavailable(name, error) from error
    return device


def device_named(name: str) -> torch.device:
    """The device of this name, wherever it is; RunError if no device can have it."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise _unavailable(name, error) from error


def _unavailable(name: str, error: Exception) -> RunError:
    reason = str(error).splitlines()[0].partition(". ")[0]
    return RunError(f"device {name!r} is not available here ({reason}); use cpu")


@torch.random.fork_rng(devices=[])
def _warm_up(settings: RunSettings) -> None:
    """One step and one teleport nobody times: first calls load what later calls find loaded."""
    device = device_of(settings.device)
    model = mlp(4, 2, hidden=(16, 16)).to(device)
    x, y = torch.rand(8, 4, device=device), torch.zeros(8, dtype=torch.long, device=device)
    cross_entropy(model(x), y).backward()
    find_optimizer(settings.optimizer)(list(model.parameters()), 0.01).step()
    Teleporter(model).step(lambda: cross_entropy(model(x), y))
