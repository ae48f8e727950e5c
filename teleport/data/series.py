"""Multivariate time series: a table of numbers, split by time, normalised, cut into windows.

No information flows back in time. The parts are three runs of time steps, one after the other; each
window with its target lies inside one part; mean and deviation come from the training part alone.
"""

from io import BytesIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teleport.data.dataset import Pair, Parts
from teleport.errors import DataError

WEEK = 7 * 24  # steps in a window: a week of hours (paper, section 4.3)
DAY = 24  # steps from the last input to the target: a day of hours
SPLIT_SHARES = (0.6, 0.2, 0.2)  # of the time steps, for training, validation and test


def read_table(
    content: bytes, where: str, variables: int, *, header: bool = False, skip: int = 0
) -> tuple[npt.NDArray[np.float64], tuple[str, ...]]:
    """Read comma-separated numbers, one time step per line.

    With ``header`` the first line names the columns; ``skip`` leading ones, such as a date, are not
    read.

    Returns:
        float64 ``[time, variables]`` and the names of the columns, empty without a header.

    Raises:
        DataError: A line has too few or too many columns, or a field is no finite number. The
            message gives the file and the line, and the column where there is one.
    """
    first, _, rest = content.partition(b"\n") if header else (b"", b"", content)
    names = tuple(first.decode("ascii", "replace").strip().split(",")[skip:]) if header else ()
    _check_columns(rest, where, variables + skip, first_line=1 + header)
    columns = range(skip, skip + variables)
    try:
        table = np.loadtxt(BytesIO(rest), delimiter=",", usecols=columns, ndmin=2, comments=None)
    except ValueError as error:
        lines = " (rows count from 0 after the header)" if header else " (rows count from 0)"
        raise DataError(f"{where}: {error}{lines}") from error
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        row, column = bad[0]
        raise DataError(
            f"{where}: expected a finite number on line {row + 1 + header}, "
            f"column {column + 1 + skip}, found {table[row, column]}"
        )
    return table, names


def _check_columns(content: bytes, where: str, expected: int, first_line: int) -> None:
    """Count the columns: the reader of numbers would pass over surplus columns and empty lines."""
    lines = content.splitlines()
    if not lines:
        raise DataError(f"{where}: expected lines of {expected} columns, found none")
    for number, line in enumerate(lines, first_line):
        found = line.count(b",") + 1
        if found != expected:
            raise DataError(f"{where}: expected {expected} columns on line {number}, found {found}")


def split_windows(
    table: npt.NDArray[np.float64],
    names: tuple[str, ...] = (),
    length: int = WEEK,
    horizon: int = DAY,
) -> Parts:
    """Split a series ``[time, d]`` by time, normalise it and cut each part into `windows`.

    Returns:
        Training, validation and test parts with 60, 20 and 20 % of the time steps. Every variable
        has mean 0 and deviation 1 over the training part; one that is constant there has mean 0.

    Raises:
        ValueError: A part is too short for a single window.
    """
    first, second, _ = (round(len(table) * share) for share in np.cumsum(SPLIT_SHARES))
    train = table[:first]
    mean, deviation = train.mean(0), train.std(0)
    # A constant column has no deviation but the rounding of its mean.
    deviation[np.ptp(train, axis=0) == 0] = 1.0
    whole = torch.from_numpy(((table - mean) / deviation).astype(np.float32))
    return Parts(
        train=windows(whole[:first], length, horizon),
        valid=windows(whole[first:second], length, horizon),
        test=windows(whole[second:], length, horizon),
        names=names,
    )


def windows(series: Tensor, length: int = WEEK, horizon: int = DAY) -> Pair:
    """Cut a series ``[time, d]`` into all its windows, without copying it.

    Window i holds the steps i to ``i + length - 1``; its target is the step ``horizon`` after the
    last of them.

    Returns:
        Inputs ``[n, length, d]`` and targets ``[n, d]`` with n = time - length - horizon + 1; both
        are views of ``series``.

    Raises:
        ValueError: The series is too short for a single window, or a number is not positive.
    """
    if length < 1 or horizon < 1:
        raise ValueError(f"length and horizon must be at least 1, got {length} and {horizon}")
    n = len(series) - length - horizon + 1
    if n < 1:
        raise ValueError(
            f"{len(series)} time steps are too few for one window of {length} with the target "
            f"{horizon} later; at least {length + horizon} are needed in each part"
        )
    inputs = series.unfold(0, length, 1).transpose(1, 2)[:n]
    return inputs, series[length + horizon - 1 :]
