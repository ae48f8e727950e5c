"""Downloads under every fault a server can have. Only loopback connections."""

import hashlib
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teleport.data import SourceFile
from teleport.data import download as fetching
from teleport.data.download import digest, download
from teleport.data.store import fetch_missing
from teleport.errors import DataError
from tests.support.loopback import Answer, Mirrors, server

CONTENT = bytes(range(256)) * 40
NAME = "file.bin"
PART = f"{NAME}.part"


def md5(content: bytes) -> str:
    return f"md5:{hashlib.md5(content, usedforsecurity=False).hexdigest()}"


@pytest.fixture
def _quick_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PAUSE", 0.0)
    monkeypatch.setattr(fetching, "WRITE_SIZE", 1000)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def mirrors(_quick_and_small: None) -> Iterator[Mirrors]:
    with server() as state:
        state.serve("first", {NAME: CONTENT})
        yield state


def wanted(mirrors: Mirrors, *names: str) -> SourceFile:
    return SourceFile(NAME, mirrors.urls(NAME, *(names or ("first",))), md5(CONTENT))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_git_digest_is_the_id_that_git_gives(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(CONTENT)
    command = ["git", "hash-object", str(tmp_path / "x")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert digest("git:", CONTENT) == f"git:{found}"


def test_whole_file_arrives_in_one_request(mirrors: Mirrors, tmp_path: Path) -> None:
    download(wanted(mirrors), tmp_path)
    assert tree(tmp_path) == {NAME: CONTENT}
    assert mirrors.ranges == [None]
    assert mirrors.encodings == ["identity"]


def test_cut_connection_is_resumed_where_it_broke(mirrors: Mirrors, tmp_path: Path) -> None:
    mirrors.plan[f"/first/{NAME}"] = [Answer(cut=3000), Answer(cut=2000)]
    download(wanted(mirrors), tmp_path)
    assert tree(tmp_path) == {NAME: CONTENT}
    assert mirrors.ranges == [None, "bytes=3000-", "bytes=5000-"]


def test_a_later_call_resumes_what_an_earlier_one_left(mirrors: Mirrors, tmp_path: Path) -> None:
    mirrors.plan[f"/first/{NAME}"] = [Answer(cut=3000), Answer(status=404)]
    with pytest.raises(DataError, match="404"):
        download(wanted(mirrors), tmp_path)
    assert tree(tmp_path) == {PART: CONTENT[:3000]}
    download(wanted(mirrors), tmp_path)
    assert tree(tmp_path) == {NAME: CONTENT}
    assert mirrors.ranges[-1] == "bytes=3000-"


def test_a_server_that_gives_more_each_time_is_asked_on(mirrors: Mirrors, tmp_path: Path) -> None:
    mirrors.plan[f"/first/{NAME}"] = [Answer(cut=1000)] * 9
    download(wanted(mirrors), tmp_path)
    assert tree(tmp_path) == {NAME: CONTENT}
    assert len(mirrors.requests) == 10


def test_a_file_that_changed_while_it_was_resumed_is_begun_again(
    mirrors: Mirrors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrors.files[f"/first/{NAME}"] = CONTENT[::-1]
    mirrors.plan[f"/first/{NAME}"] = [Answer(cut=3000)]

    def change(seconds: float) -> None:
        mirrors.files[f"/first/{NAME}"] = CONTENT

    monkeypatch.setattr("time.sleep", change)
    download(wanted(mirrors), tmp_path)
    assert tree(tmp_path) == {NAME: CONTENT}
    assert mirrors.ranges == [None, "bytes=3000-", None]


def test_a_wrong_file_that_comes_in_pieces_is_begun_again_only_once(
    mirrors: Mirrors, tmp_path: Path
) -> None:
    mirrors.files[f"/first/{NAME}"] = CONTENT[::-1]
    mirrors.plan[f"/first/{NAME}"] = [Answer(cut=3000), Answer()] * 5
    with pytest.raises(DataError, match="found md5:"):
        download(wanted(mirrors), tmp_path)
    assert mirrors.ranges == [None, "bytes=3000-"] * 2
    assert tree(tmp_path) == {}


def test_a_terminal_sees_how_far_it_is(
    mirrors: Mirrors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    download(wanted(mirrors), tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    download(wanted(mirrors), tmp_path)
    told = capsys.readouterr().err
    assert "100%" in told
    assert "10.2/10.2 kB" in told


def test_another_mirror_goes_on_with_the_same_part(mirrors: Mirrors, tmp_path: Path) -> None:
    mirrors.serve("second", {NAME: CONTENT})
    mirrors.plan[f"/first/{NAME}"] = [Answer(cut=3000), Answer(status=404)]
    download(wanted(mirrors, "first", "second"), tmp_path)
    assert tree(tmp_path) == {NAME: CONTENT}
    assert (mirrors.requests[-1], mirrors.ranges[-1]) == (f"/second/{NAME}", "bytes=3000-")


def test_server_without_ranges_starts_again(mirrors: Mirrors, tmp_path: Path) -> None:
    mirrors.plan[f"/first/{NAME}"] = [Answer(cut=3000), Answer(ranges=False)]
    download(wanted(mirrors), tmp_path)
    assert tree(tmp_path) == {NAME: CONTENT}


def test_a_range_that_was_not_asked_for_is_refused(mirrors: Mirrors, tmp_path: Path) -> None:
    mirrors.plan[f"/first/{NAME}"] = [Answer(cut=3000), Answer(shift=7)]
    with pytest.raises(DataError, match="asked for bytes from 3000, got range 'bytes 3007-"):
        download(wanted(mirrors), tmp_path)
    assert tree(tmp_path) == {PART: CONTENT[:3000]}


@pytest.mark.parametrize(
    "left",
    [b"other bytes" * 10, CONTENT[:-1] + b"\0\0\0", b"x" * len(CONTENT), CONTENT + b"more"],
    ids=["short", "longer", "same length", "right but longer"],
)
def test_a_wrong_part_is_thrown_away(mirrors: Mirrors, tmp_path: Path, left: bytes) -> None:
    (tmp_path / PART).write_bytes(left)
    download(wanted(mirrors), tmp_path)
    assert tree(tmp_path) == {NAME: CONTENT}
    assert mirrors.ranges == [f"bytes={len(left)}-", None]


def test_a_complete_part_needs_no_more_bytes(mirrors: Mirrors, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(CONTENT)
    download(wanted(mirrors), tmp_path)
    assert tree(tmp_path) == {NAME: CONTENT}
    assert mirrors.ranges == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_is_asked_again(mirrors: Mirrors, tmp_path: Path, status: int) -> None:
    mirrors.plan[f"/first/{NAME}"] = [Answer(status=status)] * 2
    download(wanted(mirrors), tmp_path)
    assert tree(tmp_path) == {NAME: CONTENT}
    assert len(mirrors.requests) == 3


def test_a_server_that_stays_in_trouble_is_left(mirrors: Mirrors, tmp_path: Path) -> None:
    mirrors.plan[f"/first/{NAME}"] = [Answer(status=500)] * 20
    with pytest.raises(DataError, match="500"):
        download(wanted(mirrors), tmp_path)
    assert len(mirrors.requests) == fetching.ATTEMPTS
    assert tree(tmp_path) == {}


def test_every_mirror_says_why_and_nothing_stays(mirrors: Mirrors, tmp_path: Path) -> None:
    mirrors.serve("truncated", {NAME: CONTENT[:-1]})
    mirrors.serve("changed", {NAME: CONTENT[:-1] + b"\0"})
    closed = f"http://127.0.0.1:1/{NAME}"
    urls = (*mirrors.urls(NAME, "absent", "truncated", "changed"), closed)
    with pytest.raises(DataError) as caught:
        download(SourceFile(NAME, urls, md5(CONTENT)), tmp_path)
    lines = str(caught.value).splitlines()
    reasons = [
        "404",
        f"expected {md5(CONTENT)}, found {md5(CONTENT[:-1])}",
        "found md5:",
        "refused",
    ]
    assert all(line.startswith(f"  {url}: ") for line, url in zip(lines, urls, strict=True))
    assert all(reason in line for line, reason in zip(lines, reasons, strict=True))
    assert len(mirrors.requests) == 3, "none of these faults is worth a second request"
    assert tree(tmp_path) == {}


def test_a_server_that_never_ends_gets_no_more_than_its_share_of_the_disk(
    mirrors: Mirrors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "DOWNLOAD_LIMIT", 1 << 20)
    mirrors.serve("second", {NAME: CONTENT})
    mirrors.plan[f"/first/{NAME}"] = [Answer(chunked=True, endless=True)]
    with pytest.raises(DataError, match=r"first.*: sent more than 1048576 bytes"):
        download(wanted(mirrors, "first"), tmp_path)
    assert tree(tmp_path) == {}
    mirrors.plan[f"/first/{NAME}"] = [Answer(chunked=True, endless=True)]
    download(wanted(mirrors, "first", "second"), tmp_path)
    assert tree(tmp_path) == {NAME: CONTENT}


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        ("many", "its length is 'many'"),
        ("-5", "its length is '-5'"),
        ("1, 2", "Content-Length"),
        (str(1 << 40), "no file has more"),
    ],
)
def test_a_length_that_cannot_be_is_the_fault_of_its_mirror(
    length: str, reason: str, mirrors: Mirrors, tmp_path: Path
) -> None:
    mirrors.serve("second", {NAME: CONTENT})
    mirrors.plan[f"/first/{NAME}"] = [Answer(length=length)]
    with pytest.raises(DataError) as caught:
        download(wanted(mirrors, "first"), tmp_path)
    assert str(caught.value).startswith(f"  {mirrors.base}/first/{NAME}: ")
    assert reason in str(caught.value)
    assert tree(tmp_path) == {}
    mirrors.plan[f"/first/{NAME}"] = [Answer(length=length)]
    download(wanted(mirrors, "first", "second"), tmp_path)
    assert tree(tmp_path) == {NAME: CONTENT}


@pytest.mark.parametrize("cut", [0, 1, 2, 40])
def test_an_answer_in_chunks_that_is_cut_is_told_as_that(
    cut: int, mirrors: Mirrors, tmp_path: Path
) -> None:
    mirrors.plan[f"/first/{NAME}"] = [Answer(chunked=True, cut=cut, ranges=False)] * 9
    with pytest.raises(DataError, match=r"first.*: the connection was cut before the end"):
        download(wanted(mirrors, "first"), tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is wanted")
def test_a_full_disk_is_not_the_fault_of_a_mirror(mirrors: Mirrors, tmp_path: Path) -> None:
    (tmp_path / PART).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        download(wanted(mirrors, "first", "second"), tmp_path)
    assert mirrors.requests == [f"/first/{NAME}"]


def test_two_at_once_download_one_copy(mirrors: Mirrors, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    calls = [
        threading.Thread(target=fetch_missing, args=(folder, [wanted(mirrors)])) for _ in range(4)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert (folder / NAME).read_bytes() == CONTENT
    assert len(mirrors.requests) == 1


def test_one_that_gets_nothing_does_not_disturb_those_that_wait(
    mirrors: Mirrors, tmp_path: Path
) -> None:
    outcomes: list[str] = []

    def fetch(folder: Path) -> None:
        try:
            fetch_missing(folder, [wanted(mirrors)])
        except (DataError, OSError) as error:
            outcomes.append(type(error).__name__)
        else:
            outcomes.append("whole")

    for round_ in range(5):
        mirrors.plan[f"/first/{NAME}"] = [Answer(status=404)]
        folder = tmp_path / str(round_) / "set"
        calls = [threading.Thread(target=fetch, args=(folder,)) for _ in range(4)]
        for call in calls:
            call.start()
        for call in calls:
            call.join()
    assert sorted(outcomes) == ["DataError"] * 5 + ["whole"] * 15


cuts = st.lists(
    st.builds(Answer, cut=st.integers(0, 400), ranges=st.booleans(), chunked=st.booleans())
    | st.builds(Answer, status=st.sampled_from([404, 500])),
    max_size=6,
)


@given(
    content=st.binary(min_size=1, max_size=400), first=cuts, second=cuts, calls=st.integers(1, 3)
)
def test_whatever_breaks_the_file_is_right_or_absent(
    loopback: Mirrors, content: bytes, first: list[Answer], second: list[Answer], calls: int
) -> None:
    loopback.serve("a", {NAME: content})
    loopback.serve("b", {NAME: content})
    loopback.plan = {f"/a/{NAME}": list(first), f"/b/{NAME}": list(second)}
    file = SourceFile(NAME, loopback.urls(NAME, "a", "b"), md5(content))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(calls):
            try:
                download(file, folder)
            except DataError:
                left = tree(folder)
                assert set(left) <= {PART}
                assert content.startswith(left.get(PART, b""))
            else:
                assert tree(folder) == {NAME: content}
                return
        loopback.plan = {}
        download(file, folder)
        assert tree(folder) == {NAME: content}


@pytest.fixture(scope="module")
def loopback() -> Iterator[Mirrors]:
    with pytest.MonkeyPatch.context() as patch, server() as state:
        patch.setattr(fetching, "PAUSE", 0.0)
        patch.setattr(fetching, "WRITE_SIZE", 16)
        patch.setenv("NO_PROXY", "*")
        yield state
