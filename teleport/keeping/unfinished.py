"""A survey of old data that was interrupted and goes on: what it has taken in so far, in a file."""

import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teleport.errors import NullSpaceError
from teleport.keeping.file import replacing
from teleport.keeping.survey import OF_ANOTHER_MODEL, Survey
from teleport.layers.one_hot import AxisSpace
from teleport.layers.shared_weight import TiedSpace
from teleport.runtime.ranks import Ranks
from teleport.subspace import RowSpace

BETWEEN = 60.0
"""Seconds between two writings, for a file may hold gigabytes."""


class Unfinished:
    """The file of a survey. A rank has its own, for it has closures of its own.

    Args:
        path: where; None for a survey that cannot be interrupted.
        model: whose inputs are surveyed; the file is of its present weights and buffers alone.
        survey: filled from the file, if there is one.
        ranks: who takes part.

    Raises:
        NullSpaceError: for a file of something else, which stays, or a path that cannot be one.
    """

    def __init__(
        self, path: str | Path | None, model: nn.Module, survey: Survey, ranks: Ranks
    ) -> None:
        self._survey, self._done, self._path = survey, 0, None
        if path is None:
            return
        rank = f".{torch.distributed.get_rank()}" if ranks.size > 1 else ""
        self._path, self._of = Path(f"{path}{rank}"), _digest(model)
        try:
            if not self._path.parent.is_dir():
                raise NullSpaceError(f"{self._path.parent} is no folder: make it before the survey")
            self._path.stat()
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:  # a name that is too long, or that none can be
            raise _unwritten(self._path, error) from error
        self._read(self._path)

    def rest(self, closures: Iterable[Callable[[], Any]]) -> Iterator[Callable[[], Any]]:
        """The closures that have not been taken in; they must be before the next is asked for."""
        count, written = 0, time.monotonic()
        for count, closure in enumerate(closures, 1):
            if count > self._done:
                yield closure
                if self._path is not None and time.monotonic() - written >= BETWEEN:
                    self._write(self._path, count)
                    written = time.monotonic()
        if count < self._done:
            raise NullSpaceError(
                f"{self._path} has taken in {self._done} closures, of which {count} were given: it "
                "is of other data. Delete it, or give another file"
            )

    def unlink(self) -> None:
        """Delete the file: the survey is finished."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write(self, path: Path, done: int) -> None:
        state = {"of": self._of, "done": done, "survey": self._survey.state()}
        try:
            with replacing(path) as part:
                torch.save(state, part)
        except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError
            raise _unwritten(path, error) from error

    def _read(self, path: Path) -> None:
        try:
            with torch.serialization.safe_globals([RowSpace, AxisSpace, TiedSpace]):
                found = torch.load(path, weights_only=True)
            of, done, state = found["of"], found["done"], found["survey"]
        except OSError as error:  # it may be whole: nobody should delete it for that
            raise NullSpaceError(
                f"{path} holds no unfinished survey, or cannot be read now: "
                f"{error.strerror or error}. Mend that, or if the file is damaged, delete it"
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # PyTorch raises errors of many kinds for files that are damaged
            raise NullSpaceError(
                f"{path} holds no unfinished survey: it is cut short, or of something else. Delete "
                "it, or give another file"
            ) from error
        if why := OF_ANOTHER_MODEL if of != self._of else self._survey.restore(state):
            raise NullSpaceError(f"{path} is {why}. Delete it, or give another file")
        self._done = done


def _unwritten(path: Path, why: Exception) -> NullSpaceError:
    return NullSpaceError(
        f"the unfinished survey cannot be written to {path}: {why}. Give a file in a folder that "
        "may be written to and has room"
    )


def _digest(model: nn.Module) -> dict[str, int]:
    """A number for each parameter and buffer, and one for what each module is, by name."""
    numbers = {name: _number(tensor) for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        numbers[f"({name})"] = zlib.crc32(f"{type(module).__name__} {module.training}".encode())
    return numbers


def _number(tensor: Any) -> int:
    if not isinstance(tensor, Tensor) or tensor.is_meta:  # or what a module adds to its state
        return 0
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().tobytes())
