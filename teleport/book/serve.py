"""A web server for the built book, on this machine only."""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from teleport.errors import BookError


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def server(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server of the pages in a folder, bound to this machine's loopback address.

    Args:
        folder: Folder of a built book.
        port: Port to listen on; 0 takes a free one.

    Raises:
        BookError: if there is no book in the folder, or the port cannot be used.
    """
    if not (folder / "index.html").is_file():
        raise BookError(f"there is no book in {folder}; run `teleport book build` first")
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Quiet, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise BookError(
            f"cannot listen on port {port}: {error}; name another with --port"
        ) from error
