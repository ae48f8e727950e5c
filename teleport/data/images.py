"""Images stored as raw bytes: the IDX format of MNIST and the binary format of CIFAR."""

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from teleport.data.archive import gunzip
from teleport.errors import DataError, os_errors_as

Bytes = npt.NDArray[np.uint8]

UNSIGNED_BYTE = 0x08  # the only element type that MNIST and Fashion-MNIST use
CIFAR_SHAPE = (3, 32, 32)


def read_idx(source: str | Path | bytes, where: str = "<bytes>") -> Bytes:
    """Read an array of unsigned bytes in the IDX format.

    An IDX file is four magic bytes (0, 0, element type, number of dimensions), one big-endian
    32-bit length per dimension, then the elements in row-major order.

    Args:
        source: Path of a file, gzipped if its name ends in ``.gz``, or the content itself.
        where: Name of the file for messages, if the content is given.

    Returns:
        A uint8 array with the shape that the header states.

    Raises:
        DataError: The file cannot be read or decompressed, or its content is not a complete
            IDX array of unsigned bytes. The message gives the file and the offset.
    """
    if not isinstance(source, bytes):
        return read_idx(_content(Path(source)), str(source))
    shape = _idx_shape(source, where)
    start = 4 + 4 * len(shape)
    expected, found = math.prod(shape), len(source) - start
    if found != expected:
        raise DataError(
            f"{where}: expected {expected} bytes of data from offset {start} for shape {shape}, "
            f"found {found}"
        )
    return np.frombuffer(source, np.uint8, offset=start).reshape(shape).copy()


def read_cifar(
    content: bytes, where: str, classes: int, label_bytes: int = 1
) -> tuple[Bytes, Bytes]:
    """Read records of the binary distribution of CIFAR-10 or CIFAR-100.

    A record is one label (CIFAR-10) or a coarse and a fine label (CIFAR-100), then the red, green
    and blue planes of a 32 x 32 image, row by row. The last label is used, one of ``classes``.

    Returns:
        Images uint8 ``[n, 3, 32, 32]`` and labels uint8 ``[n]``.

    Raises:
        DataError: The size is not a whole number of records, or a label is no class. The message
            gives the file, ``where``, and the offset.
    """
    size = label_bytes + math.prod(CIFAR_SHAPE)
    if not content or len(content) % size:
        raise DataError(
            f"{where}: expected whole records of {size} bytes, found {len(content)} bytes: the "
            f"record at offset {len(content) - len(content) % size} is incomplete"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    labels = records[:, label_bytes - 1].copy()
    check_labels(labels, where, classes, start=label_bytes - 1, step=size)
    return records[:, label_bytes:].reshape(-1, *CIFAR_SHAPE).copy(), labels


def check_labels(labels: Bytes, where: str, classes: int, start: int, step: int = 1) -> None:
    """Refuse labels, uint8 ``[n]``, that are no class.

    The first is at the offset ``start`` of its file, and each ``step`` bytes behind the one before.

    Raises:
        DataError: A label is no class. The message gives the file, ``where``, and the offset.
    """
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise DataError(
            f"{where}: expected a label below {classes} at offset {start + int(wrong[0]) * step}, "
            f"found {labels[wrong[0]]}"
        )


def _idx_shape(content: bytes, where: str) -> tuple[int, ...]:
    magic = content[:4]
    if len(magic) < 4 or magic[:3] != bytes([0, 0, UNSIGNED_BYTE]) or magic[3] == 0:
        raise DataError(
            f"{where}: expected the IDX magic 00 00 08 and a number of dimensions at offset 0, "
            f"found {magic.hex(' ') or 'nothing'}"
        )
    return tuple(_idx_length(content, 4 + 4 * axis, where) for axis in range(magic[3]))


def _idx_length(content: bytes, offset: int, where: str) -> int:
    field = content[offset : offset + 4]
    # A zero length would let some damaged headers pass the count of bytes.
    if len(field) < 4 or not any(field):
        raise DataError(
            f"{where}: expected a positive 4-byte dimension at offset {offset}, "
            f"found {field.hex(' ') or 'the end of the file'}"
        )
    return int.from_bytes(field, "big")


def _content(path: Path) -> bytes:
    with os_errors_as(DataError, f"{path}: expected a readable file, found"):
        raw = path.read_bytes()
    return gunzip(raw, str(path)) if path.suffix == ".gz" else raw
