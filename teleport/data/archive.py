"""Reading archives that may be hostile: nothing is ever unpacked to disk.

Members are handed out in memory, so no archive can write a file anywhere. An archive is refused
as a whole as soon as a member has a name that leaves the folder, is a link or a device, or makes
the content larger than the limit.
"""

import gzip
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import PurePosixPath

from teleport.errors import DataError

# What the reader of zip files raises on damaged ones, besides errors of its own class.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, IndexError, RuntimeError)
LIMIT = 1 << 30  # bytes; the largest official content, Tiny-ImageNet's, is about a quarter of it


def gunzip(content: bytes, where: str, limit: int = LIMIT) -> bytes:
    """Decompress gzip, but never to more than ``limit`` bytes.

    Args:
        content: The compressed file.
        where: Name of the file, for messages.
        limit: Largest allowed size of the result in bytes.

    Returns:
        The decompressed content.

    Raises:
        DataError: The file is damaged or incomplete, or its content is larger than the limit.
    """
    compressed = BytesIO(content)
    try:
        with gzip.GzipFile(fileobj=compressed) as file:
            result = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{where}: expected a complete readable gzip file, found: {error} "
            f"(at or before offset {compressed.tell()} of {len(content)})"
        ) from error
    _check_size(len(result), limit, where)
    return result


def tar_members(content: bytes, where: str, limit: int = LIMIT) -> Iterator[tuple[str, bytes]]:
    """Read the files in a gzipped tar archive one after the other.

    Args:
        content: The archive, ``.tar.gz``.
        where: Name of the archive, for messages.
        limit: Largest allowed size of everything in it, in bytes.

    Yields:
        Name and content of each regular file, in the order of the archive.

    Raises:
        DataError: The archive is damaged, too large, or has a member that is unsafe.
    """
    unpacked = gunzip(content, where, limit)
    try:
        with tarfile.open(fileobj=BytesIO(unpacked), mode="r:") as archive:
            for member in archive:
                at = f"{where}: member {member.name!r} at offset {member.offset}"
                _check_name(member.name, at)
                if member.isdir():
                    continue
                file = archive.extractfile(member) if member.isreg() else None
                if file is None:
                    raise DataError(f"{at}: expected a regular file, found a link or a device")
                yield member.name, file.read()
    except tarfile.TarError as error:
        raise DataError(f"{where}: expected a complete tar archive, found: {error}") from error


def zip_members(content: bytes, where: str, limit: int = LIMIT) -> Iterator[tuple[str, bytes]]:
    """Read the files in a zip archive one after the other.

    Args:
        content: The archive.
        where: Name of the archive, for messages.
        limit: Largest allowed size of everything in it, in bytes.

    Yields:
        Name and content of each file, in the order of the archive's directory.

    Raises:
        DataError: The archive is damaged, too large, or has a member that is unsafe.
    """
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            members = archive.infolist()
            for member in members:
                _check_zip_member(member, f"{where}: member {member.filename!r}")
            # No more is read of a member than it declares, so the sum bounds what will be read.
            _check_size(sum(member.file_size for member in members), limit, where)
            for member in members:
                if not member.is_dir():
                    yield member.filename, _read(archive, member, where)
    except ZIP_ERRORS as error:
        raise DataError(f"{where}: expected a complete zip archive, found: {error}") from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> bytes:
    try:
        with archive.open(member) as file:
            return file.read(member.file_size)  # bounds the memory, whatever is really in it
    except ZIP_ERRORS as error:
        raise DataError(
            f"{where}: member {member.filename!r} at offset {member.header_offset}: "
            f"expected readable content, found: {error}"
        ) from error


def _check_zip_member(member: zipfile.ZipInfo, at: str) -> None:
    _check_name(member.filename, at)
    if stat.S_ISLNK(member.external_attr >> 16):
        raise DataError(f"{at}: expected a regular file, found a link")
    if member.flag_bits & 1:
        raise DataError(f"{at}: expected a plain file, found an encrypted one")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{at}: expected it stored or deflated, found {member.compress_type}")


def _check_name(name: str, at: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name:
        raise DataError(f"{at}: expected a name inside the archive's folder")


def _check_size(size: int, limit: int, where: str) -> None:
    if size > limit:
        raise DataError(f"{where}: expected at most {limit:,} bytes of content, found more")
