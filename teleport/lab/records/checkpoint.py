"""Files that survive a kill: checkpoints replaced at once, locks that end with their process."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from pickle import PicklingError, UnpicklingError
from typing import Any

import torch
from filelock import FileLock, Timeout

from teleport.errors import RunError


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a state to disk so that at every moment the old or the new one is there, whole.

    Raises:
        RunError: if it cannot be written; the old one stays.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        with fresh.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except (OSError, RuntimeError) as error:  # torch reports a short write as RuntimeError
        fresh.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(
            f"cannot write the checkpoint {path}: {reason}. Make room, then run the same command "
            "again, with --resume if it has that"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, else RunError; no code in the file is run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:  # it may be whole: nobody should delete it for that
        raise RunError(
            f"cannot read the checkpoint {path}: {error.strerror or error}; mend that, or if the "
            "file is damaged, delete it to start its run over"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # PyTorch raises errors of many kinds for files that are damaged
        raise RunError(
            f"cannot read the checkpoint {path}: it is damaged; delete it to start its run over"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise foreign(path, f"it holds a {type(state).__name__}, not values by name")
    return state


def foreign(path: Path, why: str) -> RunError:
    """The error for a checkpoint that is not one of the run it is to be used for."""
    return RunError(f"{path} is no checkpoint of its run ({why}); delete it to start the run over")


def is_plain(state: dict[str, Any]) -> bool:
    """Whether `load_checkpoint` would bring a state back: it holds tensors and plain values only.

    Some optimizers keep objects of their own, which only code in the file could restore.
    """
    file = BytesIO()
    try:
        torch.save(state, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, PicklingError, AttributeError, TypeError):
        return False
    return True


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file; the operating system frees it when the process ends, however it ends.

    The file is removed afterwards. RunError, with what it guards, if another process holds it, or
    it cannot be made.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RunError(
            f"{what} is in use by another process; wait for it, or give another --out"
        ) from error
    except OSError as error:
        raise RunError(f"cannot lock {what}: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: no other can hold it by this name
        lock.release()


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file of `locked`.

    To see that, a file that is left over is locked for a moment; one that was made just now counts
    as held, so that the process that makes it finds it free.
    """
    try:
        if time.time() - path.stat().st_mtime < 2.0:  # seconds
            return True
        with FileLock(path).acquire(blocking=False):
            return False
    except FileNotFoundError:
        return False
    except Timeout:
        return True
