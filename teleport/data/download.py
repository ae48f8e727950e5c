"""Download one file: mirrors in order, partial files resumed, checksum before the final name."""

import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from teleport.errors import DataError

if TYPE_CHECKING:
    from requests import Response

CHUNK = 1 << 16  # bytes that are written at once; a cut connection loses at most as many
ATTEMPTS = 4  # in a row that bring nothing
PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
TIMEOUT = 30  # seconds without an answer
LIMIT = 1 << 30  # bytes of one file, well above any data set's


@dataclass(frozen=True)
class SourceFile:
    """One file of a data set.

    Attributes:
        name: File name on disk. Where ``content`` is known, the file may also lie there with
            ``.gz`` added or taken away.
        urls: Where it is downloaded from, in the order in which they are tried; empty for a file
            that has no public source.
        download: Digest of the file as the urls hand it out, ``"md5:..."``, ``"sha256:..."``, or
            ``"git:..."`` for the id that git gives the content. Checked on download.
        content: Digest of the decompressed content, checked at every use; where it is empty,
            ``download`` is checked at every use instead.
    """

    name: str
    urls: tuple[str, ...]
    download: str
    content: str = ""


def digest(like: str, content: bytes) -> str:
    """Digest some content.

    Args:
        like: A digest of the same sort, ``"algorithm:..."``.
        content: The bytes.

    Returns:
        ``"algorithm:hex digits"``. The algorithm ``git`` is SHA-1 over a header and the content,
        which is how git names a file.
    """
    algorithm = like.split(":")[0]
    if algorithm == "git":
        header = b"blob %d\0" % len(content)
        return f"git:{hashlib.sha1(header + content, usedforsecurity=False).hexdigest()}"
    return f"{algorithm}:{hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()}"


def download(file: SourceFile, folder: Path) -> None:
    """Download a file from the first of its mirrors that hands out the right content.

    What has arrived lies in ``<name>.part`` until it is complete and its digest is right; a
    later call goes on from there. The final name appears in one step.

    Args:
        file: What to download.
        folder: An existing folder.

    Raises:
        DataError: No mirror had the right content; one line per mirror says why.
        OSError: The folder cannot be written to.
    """
    part = folder / f"{file.name}.part"
    part.touch()
    failures = []
    for url in file.urls:
        try:
            _from_mirror(url, part, file.download)
        except DataError as error:
            failures.append(f"  {url}: {error}")
        else:
            os.replace(part, folder / file.name)
            return
    if not part.stat().st_size:
        part.unlink()
    raise DataError("\n".join(failures))


def _from_mirror(url: str, part: Path, expected: str) -> None:
    resumed = _transfer(url, part)
    found = digest(expected, part.read_bytes())
    if found != expected and resumed:  # the pieces may be of different files: once more from 0
        os.truncate(part, 0)
        _transfer(url, part)
        found = digest(expected, part.read_bytes())
    if found != expected:
        os.truncate(part, 0)
        raise DataError(f"expected {expected}, found {found}")


def _transfer(url: str, part: Path) -> bool:
    """Append to the partial file until it is whole; go on as long as the server gives more.

    Returns:
        Whether the file is put together from more than one answer.
    """
    from requests import RequestException  # late: it is slow to load and mostly not needed
    from urllib3.exceptions import HTTPError

    resumed, failed = False, 0  # attempts in a row that gave nothing
    while True:
        before = part.stat().st_size
        resumed = resumed or before > 0
        try:
            _request(url, part)
        except RequestException as error:
            status = 0 if error.response is None else error.response.status_code
            if status == 416 and before:  # nothing comes after what is there: the digest decides
                return resumed
            gained = part.stat().st_size > before
            failed = 0 if gained else failed + 1
            hopeful = gained or status >= 500 or status == 429
            if not hopeful or failed == ATTEMPTS:
                raise DataError(_reason(error)) from error
            time.sleep(PAUSE * 2 ** max(failed - 1, 0))
        except (HTTPError, ValueError) as error:  # what requests lets through of a bad answer
            raise DataError(f"an answer that cannot be read ({_reason(error)})") from error
        else:
            return resumed


def _request(url: str, part: Path) -> None:
    import pooch  # late: it loads widgets, which warn in a notebook that has none

    with part.open("r+b") as output:
        start = output.seek(0, os.SEEK_END)

        def restart_unless_continued(response: "Response", *_: object, **__: object) -> None:
            _check_length(response.headers.get("Content-Length", "0"))
            if response.status_code == 200:  # the server does not resume: from the beginning
                output.truncate(0)
                output.seek(0)
            if response.status_code == 206:
                answer = response.headers.get("Content-Range", "")
                if not answer.startswith(f"bytes {start}-"):
                    raise DataError(f"asked for bytes from {start}, got range {answer!r}")

        # Some servers unpack a .gz on the way, which changes its checksum, unless told not to.
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        pooch.HTTPDownloader(
            progressbar=sys.stderr.isatty(),
            chunk_size=CHUNK,
            headers=headers,
            timeout=TIMEOUT,
            hooks={"response": restart_unless_continued},
        )(url, _Bounded(output), None)


def _check_length(announced: str) -> None:
    if not (announced.isascii() and announced.isdigit()):
        raise DataError(f"an answer that cannot be read (its length is {announced!r})")
    if int(announced) > LIMIT:
        raise DataError(f"announced {announced} bytes, and no file has more than {LIMIT}")


class _Bounded:
    """A file that takes no more than a data set can have: a server may send without end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.flush = file.flush

    def write(self, chunk: bytes) -> None:
        if self._file.tell() + len(chunk) > LIMIT:
            self._file.truncate(0)  # the disk is needed
            raise DataError(f"sent more than {LIMIT} bytes, and no file has as many")
        self._file.write(chunk)


def _reason(error: BaseException) -> str:
    """Shorten a download error to what its innermost cause says."""
    from requests.exceptions import ChunkedEncodingError

    if isinstance(error, ChunkedEncodingError):  # its causes speak of the numbers before chunks
        return "the connection was cut before the end of the answer"
    while cause := error.__cause__ or error.__context__:
        error = cause
    return str(error).split(" for url")[0].split(". ")[0] or type(error).__name__
