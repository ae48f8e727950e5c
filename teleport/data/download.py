"""Download one file: mirrors in order, partial files resumed, checksum before the final name."""

import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from teleport.errors import DataError

if TYPE_CHECKING:
    from requests import Response
    from requests.adapters import HTTPAdapter

WRITE_SIZE = 1 << 16  # bytes that are written at once; a cut connection loses at most as many
ATTEMPTS = 4  # of a server in trouble
PAUSE = 0.5  # seconds before the second attempt; doubled before each further one
TIMEOUT = 30  # seconds without an answer
DOWNLOAD_LIMIT = 1 << 30  # bytes of one file, well above any data set's


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
    """Digest some content by the algorithm of another digest, ``"algorithm:hex digits"``.

    The algorithm ``git`` is SHA-1 over a header and the content, which is how git names a file.
    """
    algorithm = like.split(":")[0]
    if algorithm == "git":
        header = b"blob %d\0" % len(content)
        return f"git:{hashlib.sha1(header + content, usedforsecurity=False).hexdigest()}"
    return f"{algorithm}:{hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()}"


def download(file: SourceFile, folder: Path) -> None:
    """Download a file from the first of its mirrors that hands out the right content.

    What has arrived lies in ``<name>.part`` of the folder until it is complete and its digest is
    right; a later call goes on from there. The final name appears in one step.

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

    Returns whether the file is put together from more than one answer.
    """
    from requests import RequestException  # late: it is slow to load and mostly not needed
    from urllib3.exceptions import HTTPError

    resumed = False
    while True:
        before = part.stat().st_size
        resumed = resumed or before > 0
        try:
            _request(url, part)
        except RequestException as error:
            if error.response is not None and error.response.status_code == 416 and before:
                return resumed  # nothing comes after what is there: the digest decides
            if part.stat().st_size <= before:
                raise DataError(_reason(error)) from error
            time.sleep(PAUSE)
        except (HTTPError, ValueError) as error:  # what requests lets through of a bad answer
            raise DataError(f"an answer that cannot be read ({_reason(error)})") from error
        else:
            return resumed


def _request(url: str, part: Path) -> None:
    """Ask for what the partial file lacks, and append it as it comes."""
    from requests import Session
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    # Some servers unpack a .gz on the way, which changes its checksum, unless told not to.
    headers = {"Accept-Encoding": "identity"}
    with Session() as session, part.open("r+b") as output:
        start = output.seek(0, os.SEEK_END)
        if start:
            headers["Range"] = f"bytes={start}-"
        for scheme in ("http://", "https://"):
            session.mount(scheme, _asking_again())
        with session.get(url, headers=headers, timeout=TIMEOUT, stream=True) as response:
            response.raise_for_status()
            length = _length(response)
            if start and response.status_code == 200:  # the server does not resume: from 0
                start = output.seek(output.truncate(0))
            if response.status_code == 206:
                answer = response.headers.get("Content-Range", "")
                if not answer.startswith(f"bytes {start}-"):
                    raise DataError(f"asked for bytes from {start}, got range {answer!r}")
            columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
            quiet = not sys.stderr.isatty()
            with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
                task = bar.add_task(part.stem, total=length and start + length, completed=start)
                for chunk in response.iter_content(WRITE_SIZE):
                    if output.tell() + len(chunk) > DOWNLOAD_LIMIT:  # a server may send without end
                        output.truncate(0)  # the disk is needed
                        raise DataError(
                            f"sent more than {DOWNLOAD_LIMIT} bytes, and no file has as many"
                        )
                    output.write(chunk)
                    bar.advance(task, len(chunk))


def _asking_again() -> "HTTPAdapter":
    """Asks a server in trouble again, for a while; everything else is said at once."""
    from requests.adapters import HTTPAdapter
    from urllib3 import Retry

    retry = Retry(
        ATTEMPTS - 1,
        connect=0,
        read=0,
        other=0,
        status_forcelist=(429, *range(500, 600)),
        backoff_factor=PAUSE,
        raise_on_status=False,
        respect_retry_after_header=False,  # it may ask for hours
    )
    return HTTPAdapter(max_retries=retry)


def _length(response: "Response") -> int | None:
    """Bytes that an answer announces; None if it does not."""
    announced = response.headers.get("Content-Length")
    if announced is None:
        return None
    if not (announced.isascii() and announced.isdigit()):
        raise DataError(f"an answer that cannot be read (its length is {announced!r})")
    if int(announced) > DOWNLOAD_LIMIT:
        raise DataError(f"announced {announced} bytes, and no file has more than {DOWNLOAD_LIMIT}")
    return int(announced)


def _reason(error: BaseException) -> str:
    """Shorten a download error to what its innermost cause says."""
    from requests.exceptions import ChunkedEncodingError

    if isinstance(error, ChunkedEncodingError):  # its causes speak of the numbers before chunks
        return "the connection was cut before the end of the answer"
    while cause := error.__cause__ or error.__context__:
        error = cause
    return str(error).split(" for url")[0].split(". ")[0] or type(error).__name__
