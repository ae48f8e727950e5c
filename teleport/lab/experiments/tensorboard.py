"""Runs in TensorBoard: what the record says, as it is written."""

import importlib
import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from teleport.errors import RunError, os_errors_as

SCALARS = ("train_loss", "test_loss", "test_accuracy", "grad_norm")
"""Columns of an evaluation that become curves, but for NaN, as of the accuracy in a regression."""


def check_tensorboard(folder: Path) -> None:
    """Make the folder, before anything runs.

    RunError if it cannot be made, or, with how to get it, if TensorBoard is not installed.
    """
    _event_writer()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"--tensorboard {folder} is no folder and cannot be made one ({error.strerror}); "
            "name a folder in which you may write"
        ) from error


class Board:
    """Event files of one run: curves against training steps, and a text for every teleport.

    To be used as a context. Entering it raises a RunError if TensorBoard is not installed, or if
    its file cannot be written.

    Args:
        folder: of the run, below the one that TensorBoard is given; made if missing.
        step: from which the run goes on; what an earlier try wrote from there on is not shown any
            more.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._folder, self._step = folder, step
        self._open = ExitStack()

    def write(self, kind: str, row: dict[str, Any]) -> None:
        """Take in a row of the record; RunError if it cannot be written, a full disk for one."""
        with self._told():
            self._write(kind, row)

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        if kind == "evaluation":
            for name in SCALARS:
                if row[name] is not None and not math.isnan(row[name]):
                    self._events.add_scalar(name, row[name], row["step"])
        elif kind == "teleport":
            for name in ("grad_norm_before", "grad_norm_after", "loss_before", "loss_after"):
                self._events.add_scalar(f"teleport/{name}", row[name], row["step"])
            text = f"{row['steps']} steps: {row['reason']}"
            self._events.add_text("teleport", text, row["step"])

    def __enter__(self) -> "Board":
        with ExitStack() as stack:
            stack.enter_context(_thread_errors_told_once())  # before the writer's thread begins
            with self._told():
                self._events = _event_writer()(str(self._folder), purge_step=self._step)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            with self._open, self._told():
                self._events.close()
        except RunError:
            if error is None:  # else that one tells what happened first
                raise

    def _told(self) -> AbstractContextManager[None]:
        advice = (
            "; the records so far are complete. Make room, then run the same command with --resume"
        )
        return os_errors_as(
            RunError, f"cannot write the TensorBoard files in {self._folder}", advice
        )


@contextmanager
def _thread_errors_told_once() -> Iterator[None]:
    """No traceback of a thread that keeps its error for the next write, as TensorBoard's does."""
    before = threading.excepthook

    def hook(ended: threading.ExceptHookArgs) -> None:
        kept = getattr(ended.thread, "exception", None)
        if kept is None or kept is not ended.exc_value:
            before(ended)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _event_writer() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise RunError(
            "--tensorboard needs the package tensorboard; install it with "
            f"pip install 'nullspace-teleport[tensorboard]' ({error})"
        ) from error
