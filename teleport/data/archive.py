"""Reading archives that may be hostile: nothing is ever unpacked to disk.

Members are handed out in memory, so no archive can write a file anywhere. An archive is refused
as a whole as soon as a member has a name that leaves the folder or that another member has, is no
plain file, or makes the content larger than the limit.
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
# The same for tar files, with headers that nest too deep or hold numbers that are none or too big.
TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError)
READ_SIZE = 1 << 20  # bytes decompressed at once; asking for the limit would reserve all of it
UNPACKED_LIMIT = 1 << 30  # bytes; the largest official content is about a quarter of it


def gunzip(content: bytes, where: str, limit: int = UNPACKED_LIMIT) -> bytes:
    """Decompress gzip, the file ``where``; DataError if damaged, or more than ``limit`` bytes."""
    compressed, result = BytesIO(content), BytesIO()
    try:
        with gzip.GzipFile(fileobj=compressed) as file:
            while result.tell() <= limit and (piece := file.read(READ_SIZE)):
                result.write(piece)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{where}: expected a complete readable gzip file, found: {error} "
            f"(at or before offset {compressed.tell()} of {len(content)})"
        ) from error
    _check_size(result.tell(), limit, where)
    return result.getvalue()


def tar_members(
    content: bytes, where: str, limit: int = UNPACKED_LIMIT
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a ``.tar.gz`` archive, in its order.

    Raises:
        DataError: The archive is damaged, has a member that is unsafe, or holds more than ``limit``
            bytes.
    """
    unpacked = BytesIO(gunzip(content, where, limit))
    seen: set[PurePosixPath] = set()
    try:
        with tarfile.open(fileobj=unpacked, mode="r:") as archive:
            for member in archive:
                _check_tar_member(member, seen, where)
                if (file := archive.extractfile(member)) is not None:
                    yield member.name, file.read()
            _check_end(unpacked, archive.offset, where)
    except TAR_ERRORS as error:
        raise DataError(
            f"{where}: expected a complete tar archive, found: {error} "
            f"(at or before offset {unpacked.tell()} of its {len(unpacked.getbuffer())} bytes)"
        ) from error


def zip_members(
    content: bytes, where: str, limit: int = UNPACKED_LIMIT
) -> Iterator[tuple[str, bytes]]:
    """The same of a zip archive, in the order of its directory; errors as of `tar_members`."""
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            members = archive.infolist()
            seen: set[PurePosixPath] = set()
            for member in members:
                _check_zip_member(member, seen, where)
            # No more is read of a member than it declares, so the sum bounds what will be read.
            _check_size(sum(member.file_size for member in members), limit, where)
            for member in members:
                if not member.is_dir():
                    yield member.filename, _read(archive, member, where)
    except ZIP_ERRORS as error:
        raise DataError(
            f"{where}: expected a complete zip archive, found: {error} "
            f"(its directory should end at offset {len(content)})"
        ) from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo, where: str) -> bytes:
    try:
        with archive.open(member) as file:
            return file.read(member.file_size)  # bounds the memory, whatever is really in it
    except ZIP_ERRORS as error:
        raise DataError(
            f"{where}: member {member.filename!r} at offset {member.header_offset}: "
            f"expected readable content, found: {error}"
        ) from error


def _check_tar_member(member: tarfile.TarInfo, seen: set[PurePosixPath], where: str) -> None:
    at = f"{where}: member {member.name!r} at offset {member.offset}"
    _check_name(member.name, seen, at)
    if not (member.isreg() or member.isdir()):
        raise DataError(f"{at}: expected a regular file, found a link or a device")
    if member.issparse():  # its holes are not in the archive, so the limit would not bound them
        raise DataError(f"{at}: expected a regular file, found one with holes")
    if member.size < 0:  # it would lead back to a member before, and round in a circle
        raise DataError(f"{at}: expected a size, found {member.size}")


def _check_end(archive: BytesIO, offset: int, where: str) -> None:
    """The reader of tar files takes a header that is damaged or cut short for the end."""
    archive.seek(offset)
    if archive.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(
            f"{where}: expected a member or the end of the archive at offset {offset}, "
            "found neither"
        )


def _check_zip_member(member: zipfile.ZipInfo, seen: set[PurePosixPath], where: str) -> None:
    at = f"{where}: member {member.filename!r} at offset {member.header_offset}"
    _check_name(member.filename, seen, at)
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError(f"{at}: expected a regular file, found a link or a device")
    if member.flag_bits & 1:
        raise DataError(f"{at}: expected a plain file, found an encrypted one")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{at}: expected it stored or deflated, found {member.compress_type}")


def _check_name(name: str, seen: set[PurePosixPath], at: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name:
        raise DataError(f"{at}: expected a name inside the archive's folder")
    if path in seen:
        raise DataError(f"{at}: expected a name that no member before it has")
    seen.add(path)


def _check_size(size: int, limit: int, where: str) -> None:
    if size > limit:
        raise DataError(f"{where}: expected at most {limit:,} bytes of content, found more")
