"""Files of the data sets on disk: where they lie, whether they are right, what is made of them."""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import platformdirs
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from teleport.data.archive import gunzip
from teleport.data.download import SourceFile, digest, download
from teleport.errors import DataError, os_errors_as

ROOT_VARIABLE = "TELEPORT_DATA"
CACHE_NAME = "nullspace-teleport"
LOCK_NAME = ".fetch.lock"


@dataclass(frozen=True)
class Checked:
    """A file whose digest is right.

    Attributes:
        content: Its content, decompressed unless it is an archive.
        digest: The digest that was compared, without the name of the algorithm.
    """

    path: Path
    content: bytes
    digest: str


@dataclass(frozen=True)
class Decoded:
    """What decoding the files of a set gives."""

    arrays: dict[str, npt.NDArray]
    names: tuple[str, ...] = ()


def root_folder(root: str | Path | None) -> Path:
    """The folder of all data: the argument, else ``$TELEPORT_DATA``, else the user's cache."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or cache_folder()).expanduser()


def cache_folder() -> Path:
    """The folder for what can be made again; on Linux it follows ``$XDG_CACHE_HOME``."""
    return Path(platformdirs.user_cache_dir(CACHE_NAME))


def locate(folder: Path, file: SourceFile) -> Path | None:
    """Where a file lies in the folder of its set, gzipped or not if its content has a digest."""
    names = [file.name]
    if file.content:
        other = file.name.removesuffix(".gz")
        names.append(other if other != file.name else f"{file.name}.gz")
    # Unlike the method of a path, this takes a folder that may not be looked into for an empty one.
    return next((folder / name for name in names if os.path.exists(folder / name)), None)


def read_checked(path: Path, file: SourceFile) -> Checked:
    """Read a file and compare its digest; ``.gz`` files are decompressed, archives are not.

    DataError if it cannot be read or is not what its digest says.
    """
    with os_errors_as(DataError, f"{path}: expected a readable file, found"):
        content = path.read_bytes()
    if not file.content:
        _check(path, f"digest of its {len(content):,} bytes", file.download, content)
    if path.suffix == ".gz" and not path.name.endswith(".tar.gz"):
        content = gunzip(content, str(path))
    if file.content:
        _check(path, "digest of the content", file.content, content)
    return Checked(path, content, (file.content or file.download).split(":")[1])


def _check(path: Path, what: str, expected: str, content: bytes) -> None:
    found = digest(expected, content)
    if found != expected:
        raise DataError(f"{path}: expected {what} {expected}, found {found}")


def fetch_missing(folder: Path, files: Sequence[SourceFile]) -> None:
    """Download the files that are absent; only one process at a time does so.

    A file that is complete stays; one that is not stays as ``.part``, from which the next call goes
    on. The folder of the set is made if needed and stays, too: another process may be waiting for
    the lock in it.

    Raises:
        DataError: A file cannot be had from any mirror.
        OSError: The folder cannot be made or written to.
    """
    from filelock import FileLock  # late: it is slow to load and mostly not needed

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK_NAME):
        for file in files:
            if locate(folder, file) is None:  # another process may have fetched it meanwhile
                download(file, folder)


def decoded_once(key: str, files: Sequence[Checked], decode: Callable[[], Decoded]) -> Decoded:
    """Decode the files of a set, or read what an earlier call decoded from the same contents.

    The result is kept in the user's cache folder, not beside the data, which may be shared or
    read-only. Its name holds ``key``, which changes when the way of decoding does, and the digests
    of the files, its header a digest of the arrays; a file that is damaged is made again.
    """
    name = sha256("\n".join([key, *(file.digest for file in files)]).encode()).hexdigest()[:16]
    path = cache_folder() / "decoded" / f"{key}-{name}.safetensors"
    found = _read_decoded(path)
    if found is None:
        found = decode()
        try:
            _write_decoded(path, found)
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"cannot keep the decoded {key} in {path}: {error}; it is decoded at every use",
                stacklevel=2,
            )
    return found


def _read_decoded(path: Path) -> Decoded | None:
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None  # absent, cut short by a crash of the machine, or damaged: it is made again
    if header.get("digest") != _digest(arrays):
        return None
    return Decoded(arrays, tuple(json.loads(header["names"])))


def _write_decoded(path: Path, decoded: Decoded) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"names": json.dumps(decoded.names), "digest": _digest(decoded.arrays)}
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as staging:
        save_file(decoded.arrays, Path(staging) / path.name, metadata=header)
        os.replace(Path(staging) / path.name, path)


def _digest(arrays: dict[str, npt.NDArray]) -> str:
    total = sha256()
    for name in sorted(arrays):
        total.update(name.encode())
        total.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return total.hexdigest()
