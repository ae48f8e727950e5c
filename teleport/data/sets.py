"""The data sets by name: load, fetch, verify and list them."""

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from teleport.data.catalogue import SAMPLE_NAME, SOURCES, Source
from teleport.data.dataset import DataKind, Dataset
from teleport.data.download import SourceFile
from teleport.data.store import (
    ROOT_VARIABLE,
    Checked,
    fetch_missing,
    locate,
    read_checked,
    root_folder,
)
from teleport.errors import DataError


@dataclass(frozen=True)
class SetInfo:
    """One line of the list of data sets.

    Attributes:
        where: ``"embedded"``, the folder that holds the files, or ``"not fetched"``.
        how: What to do to have it; empty where it is there.
    """

    name: str
    kind: DataKind
    what: str
    where: str
    how: str


@dataclass(frozen=True)
class FileStatus:
    """Result of checking one file.

    Attributes:
        state: ``"ok"``, ``"missing"`` or ``"damaged"``.
        detail: What is wrong and what to do; empty when the file is ok.
    """

    path: Path
    state: Literal["ok", "missing", "damaged"]
    detail: str = ""


def load(name: str, root: str | Path | None = None) -> Dataset:
    """Load a data set, downloading the files that are absent.

    Args:
        name: One of `SOURCES`, such as ``"mnist-sample"``, ``"cifar10"`` or ``"ptb"``.
        root: Data folder. Default: ``$TELEPORT_DATA``, else the user cache directory. The
            embedded ``mnist-sample`` does not use it.

    Returns:
        The data set, whole in memory.

    Raises:
        ValueError: The name is unknown.
        DataError: A file is damaged, or is missing and cannot be fetched.
    """
    source, files = _source(name), _checked(name, root)
    parts = source.build(files)
    valid = dict(zip(("valid_inputs", "valid_targets"), parts.valid or (), strict=False))
    return Dataset(
        name,
        *parts.train,
        *parts.test,
        classes=source.classes or (len(parts.names) if source.kind == "tokens" else 0),
        checksum=_checksum(files, source),
        source=source.origin,
        kind=source.kind,
        names=parts.names,
        resize=source.resize,
        note=source.note,
        **valid,
    )


def available(root: str | Path | None = None) -> list[SetInfo]:
    """The known data sets and where their files are, unchecked; ``root`` as in `load`."""
    found = []
    for name, source in SOURCES.items():
        folder = _folder(name, root)
        missing = [file for file in source.files if locate(folder, file) is None]
        where = "not fetched" if missing else str(folder) if source.folder else "embedded"
        how = _how(name, folder, missing)
        found.append(SetInfo(name, source.kind, source.what, where, how))
    return found


def fetch(name: str, root: str | Path | None = None) -> Path:
    """Download the files of a set that are absent, and check all of them; ``root`` as in `load`.

    Returns:
        The folder that holds the files.

    Raises:
        ValueError: The name is unknown.
        DataError: A file is damaged, or is missing and cannot be fetched. Files that arrived
            whole stay; of others, what arrived stays as ``.part`` and is continued next time.
    """
    _checked(name, root)
    return _folder(name, root)


def verify(name: str, root: str | Path | None = None) -> list[FileStatus]:
    """Check every file of a set without downloading anything; ``root`` as in `load`.

    Returns:
        The status of each file, in the order of the set. Damage is reported, not raised.

    Raises:
        ValueError: The name is unknown.
    """
    folder = _folder(name, root)
    return [_status(name, folder, file) for file in _source(name).files]


def _checked(name: str, root: str | Path | None) -> list[Checked]:
    source, folder = _source(name), _folder(name, root)
    missing = [file for file in source.files if locate(folder, file) is None]
    if missing:
        _fetch(name, folder, missing)
    return [_read(name, folder, file) for file in source.files]


def _read(name: str, folder: Path, file: SourceFile) -> Checked:
    path = locate(folder, file) or folder / file.name
    try:
        return read_checked(path, file)
    except DataError as error:
        raise DataError(f"{error}. {_remedy(name, file)}") from error


def _fetch(name: str, folder: Path, missing: list[SourceFile]) -> None:
    if not _source(name).folder:
        raise DataError(f"{folder / missing[0].name}: no such file. {_remedy(name, missing[0])}")
    try:
        without = [file.name for file in missing if not file.urls]
        if without:
            raise DataError(f"  {', '.join(without)}: no public source")
        fetch_missing(folder, missing)
    except (DataError, OSError) as error:
        names = ", ".join(file.name for file in missing if locate(folder, file) is None)
        raise DataError(
            f"cannot fetch {name}:\n{error}\n"
            f"Place {names} in {folder}, or set {ROOT_VARIABLE} to a folder that holds "
            f"{folder.name}/ with these files, or use the embedded {SAMPLE_NAME!r}."
        ) from error


def _status(name: str, folder: Path, file: SourceFile) -> FileStatus:
    path = locate(folder, file)
    if path is None:
        path = folder / file.name
        how = _how(name, folder, [file])
        return FileStatus(path, "missing", f"{path}: no such file. {how}")
    try:
        _read(name, folder, file)
    except DataError as error:
        return FileStatus(path, "damaged", str(error))
    return FileStatus(path, "ok")


def _how(name: str, folder: Path, missing: Sequence[SourceFile]) -> str:
    if not missing:
        return ""
    if not _source(name).folder:
        return _remedy(name, missing[0])
    if all(file.urls for file in missing):
        return f"Run `teleport data fetch {name}`."
    return f"No public source: place {', '.join(file.name for file in missing)} in {folder}."


def _remedy(name: str, file: SourceFile) -> str:
    if not _source(name).folder:
        return "The file is part of the package: install the package again."
    if not file.urls:
        return "The file is not used. Replace it; it has no public source."
    return f"The file is not used. Delete it and run `teleport data fetch {name}`."


def _checksum(files: Sequence[Checked], source: Source) -> str:
    parts = [file.digest for file in files] + [source.recipe]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _source(name: str) -> Source:
    if name not in SOURCES:
        close = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown data set {name!r}; known sets: {', '.join(SOURCES)}.{hint}")
    return SOURCES[name]


def _folder(name: str, root: str | Path | None) -> Path:
    folder = _source(name).folder
    if not folder:
        return Path(str(resources.files("teleport.data") / "sample"))
    return root_folder(root) / folder
