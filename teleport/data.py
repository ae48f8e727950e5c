"""MNIST and Fashion-MNIST as tensors in memory, checked against their official checksums.

Three sets are known. ``mnist-sample`` is embedded in the package and needs no network.
``mnist`` and ``fashion-mnist`` live in a data folder as gzipped IDX files and are downloaded
when they are absent. Every file is checked each time it is read, so that an experiment never
runs on damaged data.
"""

import difflib
import gzip
import hashlib
import math
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teleport.errors import DataError

ROOT_VARIABLE = "TELEPORT_DATA"
CACHE_NAME = "nullspace-teleport"
SAMPLE_NAME = "mnist-sample"
UNSIGNED_BYTE = 0x08  # the only element type that MNIST and Fashion-MNIST use


@dataclass(frozen=True)
class SourceFile:
    """One gzipped IDX file of a data set.

    Attributes:
        name: File name, the same on disk and on every mirror.
        shape: Shape of the array in the file; the first entry counts the images.
        archive_md5: MD5 of the official ``.gz``, checked on download.
        content_md5: MD5 of the decompressed content, checked at every use.
    """

    name: str
    shape: tuple[int, ...]
    archive_md5: str
    content_md5: str


@dataclass(frozen=True)
class Source:
    """Where a data set comes from and how it is split.

    Attributes:
        urls: Folders on the web that hold the files, in the order in which they are tried.
            Empty for a set that is embedded in the package.
        files: The files, images and labels in turn; their concatenation is the whole set.
        train: Number of leading images that form the training split.
        classes: Number of classes.
    """

    urls: tuple[str, ...]
    files: tuple[SourceFile, ...]
    train: int
    classes: int = 10

    @property
    def embedded(self) -> bool:
        """Whether the files are part of the package."""
        return not self.urls

    @property
    def images(self) -> int:
        """Number of images in both splits."""
        return sum(file.shape[0] for file in self.files[0::2])


_MNIST_TRAIN = (
    SourceFile(
        "train-images-idx3-ubyte.gz",
        (60_000, 28, 28),
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "6bbc9ace898e44ae57da46a324031adb",
    ),
    SourceFile(
        "train-labels-idx1-ubyte.gz",
        (60_000,),
        "d53e105ee54ea40749a09fcbcd1e9432",
        "a25bea736e30d166cdddb491f175f624",
    ),
)
_MNIST_TEST = (
    SourceFile(
        "t10k-images-idx3-ubyte.gz",
        (10_000, 28, 28),
        "9fb629c4189551a2d022fa330f9573f3",
        "2646ac647ad5339dbf082846283269ea",
    ),
    SourceFile(
        "t10k-labels-idx1-ubyte.gz",
        (10_000,),
        "ec29112dd5afa0611ce80d1b7f02629c",
        "27ae3e4e09519cfbb04c329615203637",
    ),
)
_FASHION = (
    SourceFile(
        "train-images-idx3-ubyte.gz",
        (60_000, 28, 28),
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    ),
    SourceFile(
        "train-labels-idx1-ubyte.gz",
        (60_000,),
        "25c81989df183df01b3e8a0aad5dffbe",
        "9018921c3c673c538a1fc5bad174d6f9",
    ),
    SourceFile(
        "t10k-images-idx3-ubyte.gz",
        (10_000, 28, 28),
        "bef4ecab320f06d8554ea6380940ec79",
        "8181f5470baa50b63fa0f6fddb340f0a",
    ),
    SourceFile(
        "t10k-labels-idx1-ubyte.gz",
        (10_000,),
        "bb300cfdad3c16e7a12a480ee83cd310",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
)

SOURCES: dict[str, Source] = {
    SAMPLE_NAME: Source(urls=(), files=_MNIST_TEST, train=8_000),
    "mnist": Source(
        urls=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        files=_MNIST_TRAIN + _MNIST_TEST,
        train=60_000,
    ),
    "fashion-mnist": Source(
        urls=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        files=_FASHION,
        train=60_000,
    ),
}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, one flattened image per row.

    Attributes:
        name: Name it was loaded by.
        train_inputs: float32 ``[n, width]``, pixels divided by 255, in [0, 1].
        train_targets: int64 ``[n]``, class of each row.
        test_inputs: float32 ``[m, width]``, as ``train_inputs``.
        test_targets: int64 ``[m]``.
        classes: Number of classes.
        checksum: Short hex digest of the file contents and the split.
        source: Where the content officially comes from.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int
    checksum: str
    source: str

    @property
    def width(self) -> int:
        """Number of input features: the pixels of one image."""
        return self.train_inputs.shape[1]


@dataclass(frozen=True)
class SetInfo:
    """One line of the list of data sets.

    Attributes:
        name: Name to load it by.
        images: Number of images in both splits.
        where: ``"embedded"``, the folder that holds the files, or ``"not fetched"``.
    """

    name: str
    images: int
    where: str


@dataclass(frozen=True)
class FileStatus:
    """Result of checking one file.

    Attributes:
        path: The file.
        state: ``"ok"``, ``"missing"`` or ``"damaged"``.
        detail: What is wrong and what to do; empty when the file is ok.
    """

    path: Path
    state: Literal["ok", "missing", "damaged"]
    detail: str = ""


def load(name: str, root: str | Path | None = None) -> Dataset:
    """Load a data set, downloading the files that are absent.

    Args:
        name: ``"mnist-sample"``, ``"mnist"`` or ``"fashion-mnist"``.
        root: Data folder. Default: ``$TELEPORT_DATA``, else the user cache directory. The
            embedded ``mnist-sample`` does not use it.

    Returns:
        The data set: inputs float32 ``[n, 784]`` in [0, 1], targets int64 ``[n]``.

    Raises:
        ValueError: The name is unknown.
        DataError: A file is damaged, or is missing and cannot be fetched.
    """
    source = _source(name)
    folder = _fetch_missing(name, root)
    arrays = [_read_checked(folder / file.name, file, _remedy(name)) for file in source.files]
    inputs = _as_inputs(np.concatenate(arrays[0::2]))
    targets = torch.from_numpy(np.concatenate(arrays[1::2]).astype(np.int64))
    return Dataset(
        name=name,
        train_inputs=inputs[: source.train],
        train_targets=targets[: source.train],
        test_inputs=inputs[source.train :],
        test_targets=targets[source.train :],
        classes=source.classes,
        checksum=_checksum(source),
        source="embedded MNIST test images" if source.embedded else source.urls[0],
    )


def batches(
    inputs: Tensor, targets: Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Make one shuffled pass over tensors in memory.

    The permutation is drawn when this function is called. The last short batch is dropped, so
    that an epoch always has ``n // size`` steps.

    Args:
        inputs: Tensor ``[n, ...]``.
        targets: Tensor ``[n, ...]`` on the same device.
        size: Rows per batch.
        generator: Source of the shuffle; it may live on another device than the tensors.

    Returns:
        An iterator of pairs ``(inputs [size, ...], targets [size, ...])``.

    Raises:
        ValueError: ``size`` is not between 1 and n, or the lengths of the tensors differ.
    """
    n = len(inputs)
    if len(targets) != n:
        raise ValueError(f"inputs and targets differ in length: {n} and {len(targets)}")
    if not 1 <= size <= n:
        raise ValueError(f"batch size {size} is outside the allowed range 1 to {n}")
    order = torch.randperm(n, generator=generator, device=generator.device)
    kept = order[: n - n % size].to(inputs.device)
    return (
        (inputs.index_select(0, rows), targets.index_select(0, rows))
        for rows in torch.split(kept, size)
    )


def available(root: str | Path | None = None) -> list[SetInfo]:
    """List the known data sets.

    Args:
        root: Data folder, as in `load`.

    Returns:
        One entry per set, with the place of its files. The files are not checked.
    """
    return [SetInfo(name, source.images, _where(name, root)) for name, source in SOURCES.items()]


def fetch(name: str, root: str | Path | None = None) -> Path:
    """Download the files of a set that are absent, and check all of them.

    Args:
        name: Name of the set.
        root: Data folder, as in `load`.

    Returns:
        The folder that holds the files.

    Raises:
        ValueError: The name is unknown.
        DataError: A file is damaged, or is missing and cannot be fetched. The folder is then
            as it was before.
    """
    folder = _fetch_missing(name, root)
    for file in _source(name).files:
        _read_checked(folder / file.name, file, _remedy(name))
    return folder


def verify(name: str, root: str | Path | None = None) -> list[FileStatus]:
    """Check every file of a set without downloading anything.

    Args:
        name: Name of the set.
        root: Data folder, as in `load`.

    Returns:
        The status of each file, in the order of the set. Damage is reported, not raised.

    Raises:
        ValueError: The name is unknown.
    """
    folder = _folder(name, root)
    return [_status(folder / file.name, file, _remedy(name)) for file in _source(name).files]


def read_idx(source: str | Path | bytes) -> npt.NDArray[np.uint8]:
    """Read an array of unsigned bytes in the IDX format.

    An IDX file is four magic bytes (0, 0, element type, number of dimensions), one big-endian
    32-bit length per dimension, then the elements in row-major order.

    Args:
        source: Path of a file, gzipped if its name ends in ``.gz``, or the content itself.

    Returns:
        A uint8 array with the shape that the header states.

    Raises:
        DataError: The file cannot be read or decompressed, or its content is not a complete
            IDX array of unsigned bytes. The message gives the file and the offset.
    """
    if isinstance(source, bytes):
        return _parse_idx(source, "<bytes>")
    return _parse_idx(_content(Path(source)), str(source))


def _parse_idx(content: bytes, where: str) -> npt.NDArray[np.uint8]:
    shape = _idx_shape(content, where)
    start = 4 + 4 * len(shape)
    expected, found = math.prod(shape), len(content) - start
    if found != expected:
        raise DataError(
            f"{where}: expected {expected} bytes of data from offset {start} for shape {shape}, "
            f"found {found}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


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
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected a complete readable file, found: {error}") from error


def _read_checked(path: Path, file: SourceFile, remedy: str) -> npt.NDArray[np.uint8]:
    try:
        content = _content(path)
        _check("content MD5", file.content_md5, _md5(content), path)
        array = _parse_idx(content, str(path))
        _check("shape", file.shape, array.shape, path)
    except DataError as error:
        raise DataError(f"{error}. {remedy}") from error
    return array


def _check(what: str, expected: object, found: object, path: Path) -> None:
    if found != expected:
        raise DataError(f"{path}: expected {what} {expected}, found {found}")


def _status(path: Path, file: SourceFile, remedy: str) -> FileStatus:
    if not path.exists():
        return FileStatus(path, "missing", f"{path}: no such file")
    try:
        _read_checked(path, file, remedy)
    except DataError as error:
        return FileStatus(path, "damaged", str(error))
    return FileStatus(path, "ok")


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _checksum(source: Source) -> str:
    # Reading has just compared every content with its expected digest, so these stand for it.
    parts = [file.content_md5 for file in source.files] + [str(source.train)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _as_inputs(images: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32)).div_(255)


def _source(name: str) -> Source:
    if name not in SOURCES:
        close = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown data set {name!r}; known sets: {', '.join(SOURCES)}.{hint}")
    return SOURCES[name]


def _remedy(name: str) -> str:
    if _source(name).embedded:
        return "The file is part of the package: install the package again."
    return f"The file is not used. Delete it and run `teleport data fetch {name}`."


def _folder(name: str, root: str | Path | None) -> Path:
    if _source(name).embedded:
        return Path(str(resources.files("teleport") / "sample"))
    chosen = root or os.environ.get(ROOT_VARIABLE) or _cache()
    return Path(chosen).expanduser() / name


def _cache() -> Path:
    import pooch  # late: it loads widgets, which warn in a notebook that has none

    return Path(pooch.os_cache(CACHE_NAME))


def _where(name: str, root: str | Path | None) -> str:
    if _source(name).embedded:
        return "embedded"
    return "not fetched" if _missing(name, root) else str(_folder(name, root))


def _missing(name: str, root: str | Path | None) -> list[SourceFile]:
    folder = _folder(name, root)
    return [file for file in _source(name).files if not (folder / file.name).exists()]


def _fetch_missing(name: str, root: str | Path | None) -> Path:
    source, folder, missing = _source(name), _folder(name, root), _missing(name, root)
    if missing and source.embedded:
        raise DataError(f"{folder / missing[0].name}: no such file. {_remedy(name)}")
    if missing:
        try:
            _download_all(source, missing, folder)
        except (DataError, OSError) as error:
            raise DataError(_cannot_fetch(name, folder, missing, error)) from error
    return folder


def _download_all(source: Source, files: list[SourceFile], folder: Path) -> None:
    with _staging(folder) as staging:
        for file in files:
            _download(source, file, staging)
        for file in files:
            os.replace(staging / file.name, folder / file.name)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Give a temporary folder inside `folder`; on failure, also remove the folders made for it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as staging:
            yield Path(staging)
    finally:
        for path in made:
            # Another process may have put its files there meanwhile.
            if path.exists() and not any(path.iterdir()):
                path.rmdir()


def _download(source: Source, file: SourceFile, folder: Path) -> None:
    import pooch

    # Without this header some servers unpack the .gz on the way, which changes its checksum.
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        chunk_size=1 << 16,
        headers={"Accept-Encoding": "identity"},
    )
    failures = []
    for url in source.urls:
        try:
            pooch.retrieve(
                url + file.name, f"md5:{file.archive_md5}", file.name, folder, downloader=downloader
            )
        except (OSError, ValueError) as error:
            failures.append(f"  {url}{file.name}: {_reason(error)}")
        else:
            return
    raise DataError("\n".join(failures))


def _reason(error: BaseException) -> str:
    """Shorten a download error to what its innermost cause says."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return str(error).split(" for url")[0].split(". ")[0] or type(error).__name__


def _cannot_fetch(name: str, folder: Path, missing: list[SourceFile], error: Exception) -> str:
    return (
        f"cannot fetch {name}:\n{error}\n"
        f"Place {', '.join(file.name for file in missing)} in {folder}, or set {ROOT_VARIABLE} "
        f"to a folder that holds {name}/ with these files, or use the embedded {SAMPLE_NAME!r}."
    )
