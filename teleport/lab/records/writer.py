"""Writing the record of a run: JSON lines that survive a kill."""

import json
import math
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teleport.errors import RunError, os_errors_as
from teleport.runtime.clock import clock_name


class RecordWriter:
    """Appends rows to a record, each written whole.

    Args:
        path: of a new file, or of a record to go on with.
        keep: bytes of that record to keep, what follows them being dropped; None for a new file.
        also: told every row that was written, as its type and its values.

    Raises:
        RunError: if a new record's file exists already, or if it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        keep: int | None = None,
        also: Callable[[str, dict[str, Any]], None] = lambda kind, row: None,
    ) -> None:
        self.path, self._also = path, also
        self.length = keep or 0
        with os_errors_as(RunError, f"cannot write the record {path}"):
            self._file = path.open("xb" if keep is None else "r+b", buffering=0)
            self._file.seek(self.length)
            self._file.truncate()

    def write(self, kind: str, **row: Any) -> None:
        """Write one row; numbers that are not finite become null, as JSON has no name for them.

        Raises:
            RunError: if it cannot be written, a full disk for one; all rows before it are there.
        """
        line = json.dumps({"type": kind, **_finite(row)}, allow_nan=False) + "\n"
        rest = memoryview(line.encode())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(self.length)
            raise RunError(
                f"cannot write the record {self.path}: {error.strerror}; what is before is "
                "complete. Make room, then run the same command again, `teleport run` with --resume"
            ) from error
        self.length += len(line.encode())
        self._also(kind, row)

    def sync(self) -> int:
        """Wait until all rows are on the disk, else RunError; return their bytes."""
        with os_errors_as(RunError, f"cannot write the record {self.path}"):
            os.fsync(self._file.fileno())
        return self.length

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *ended: object) -> None:
        self._file.close()


def environment() -> dict[str, Any]:
    """Versions and hardware, for the configuration line."""
    return {
        "versions": {
            "teleport": version("nullspace-teleport"),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
            "clock": clock_name(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
