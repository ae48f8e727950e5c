"""A loopback file server that resumes downloads and fails on request."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """How one request is answered.

    Attributes:
        status: HTTP status; 200 stands for a good answer, also to a request for a range.
        cut: Bytes of the body that are sent before the connection is closed; all if negative.
        ranges: Whether a request for a range is understood.
        shift: Bytes by which the range that is sent is off the one that was asked for.
        length: What is announced as the length, if not the truth.
        chunked: Whether the body comes in chunks, without a length.
        endless: Whether it never ends then.
    """

    status: int = 200
    cut: int = -1
    ranges: bool = True
    shift: int = 0
    length: str = ""
    chunked: bool = False
    endless: bool = False


@dataclass
class Mirrors:
    """A server; `files` maps a path to its content, `plan` to the next answers (then good ones)."""

    base: str
    files: dict[str, bytes] = field(default_factory=dict)
    plan: dict[str, list[Answer]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    encodings: list[str | None] = field(default_factory=list)

    def serve(self, mirror: str, files: dict[str, bytes]) -> None:
        self.files.update({f"/{mirror}/{name}": content for name, content in files.items()})

    def urls(self, name: str, *mirrors: str) -> tuple[str, ...]:
        return tuple(f"{self.base}/{mirror}/{name}" for mirror in mirrors)


def _handler(mirrors: Mirrors) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            mirrors.requests.append(self.path)
            mirrors.ranges.append(wanted)
            mirrors.encodings.append(self.headers.get("Accept-Encoding"))
            plan = mirrors.plan.get(self.path)
            answer = plan.pop(0) if plan else Answer()
            content = mirrors.files.get(self.path)
            if answer.status != 200 or content is None:
                self.send_error(answer.status if content is not None else 404)
                return
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if not answer.ranges:
                start = 0
            if start >= len(content) and start:
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            begin = start + answer.shift
            if start:
                end = len(content)
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{end}")
            body = content[begin:]
            if answer.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            else:
                self.send_header("Content-Length", answer.length or str(len(body)))
            self.end_headers()
            if answer.chunked:
                self.send_chunks(body, answer)
            else:
                self.wfile.write(body if answer.cut < 0 else body[: answer.cut])

        def send_chunks(self, body: bytes, answer: Answer) -> None:
            """Each with its length before it; the chunk that is cut stands for a whole one."""
            whole = f"{len(body):x}\r\n".encode() + body + b"\r\n"
            try:
                while answer.endless:
                    self.wfile.write(whole)
            except OSError:
                return  # the client has had enough
            self.wfile.write(whole + b"0\r\n\r\n" if answer.cut < 0 else whole[: answer.cut])

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test output quiet."""

    return Handler


@contextmanager
def server() -> Iterator[Mirrors]:
    """Run a server on a free port of the loopback interface."""
    state = Mirrors(base="")
    running = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.base = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        running.shutdown()
        thread.join()
        running.server_close()
