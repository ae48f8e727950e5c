"""Archives: good ones are read whole, hostile and damaged ones are refused."""

import gzip
import io
import stat
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teleport.data.archive import gunzip, tar_members, zip_members
from teleport.errors import DataError
from tests.support.archives import Files, tar, zipped

Reader = Callable[..., Iterator[tuple[str, bytes]]]
BOTH = pytest.mark.parametrize(("pack", "read"), [(tar, tar_members), (zipped, zip_members)])
names = st.text("abcXYZ_-", min_size=1, max_size=8)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)


@BOTH
@given(files=st.dictionaries(paths, st.binary(max_size=2000), max_size=5))
def test_good_archives_are_read_whole_and_in_order(
    pack: Callable[[Files], bytes], read: Reader, files: Files
) -> None:
    assert list(read(pack(files), "good")) == list(files.items())


@BOTH
@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "..\\evil", "C:/evil", "C:\\evil", "a/.."]
)
def test_names_outside_the_folder_are_refused(
    pack: Callable[[Files], bytes], read: Reader, name: str, tmp_path: Path
) -> None:
    archive = pack({"good": b"1", name: b"2"})
    with pytest.raises(DataError, match=r"bad\.arc: member .* a name inside the archive's folder"):
        list(read(archive, "bad.arc"))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_in_a_tar_are_refused(kind: bytes) -> None:
    member = tarfile.TarInfo("innocent")
    member.type, member.linkname = kind, "good"
    with pytest.raises(DataError, match=r"'innocent' at offset 1024: .* a link or a device"):
        list(tar_members(tar({"good": b"1"}, member), "bad.tar.gz"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO])
def test_links_devices_and_encrypted_files_in_a_zip_are_refused(kind: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("innocent")
        link.create_system, link.external_attr = 3, (kind | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"'innocent' at offset 0: .*regular file, found a link"):
        list(zip_members(buffer.getvalue(), "bad.zip"))
    content = bytearray(zipped({"secret": b"1"}))
    content[content.find(b"PK\x01\x02") + 8] |= 1  # the flags in the directory
    with pytest.raises(DataError, match=r"'secret' at offset 0: .* found an encrypted one"):
        list(zip_members(bytes(content), "bad.zip"))


def test_a_name_that_two_members_have_is_refused() -> None:
    with pytest.raises(DataError, match=r"'a//b' at offset 1024: .* that no member before it has"):
        list(tar_members(tar({"a/b": b"1"}, tarfile.TarInfo("a//b")), "bad.tar.gz"))
    with pytest.raises(DataError, match=r"'\./a' at offset \d+: .* that no member before it has"):
        list(zip_members(zipped({"a": b"1", "./a": b"2"}), "bad.zip"))


def header(name: str, kind: bytes = tarfile.REGTYPE, **fields: bytes) -> bytes:
    """The header of a tar file with some fields as they should not be."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    for field, content in fields.items():
        start = {"size": 124, "real_size": 483}[field]
        block[start : start + len(content)] = content
    block[148:156] = b" " * 8  # the sum is over the header with spaces in the place of the sum
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(2 * tarfile.BLOCKSIZE)
NEGATIVE = tarfile.itn(-1024, 12, tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        # One block that would be read as 300 MB of zeros.
        (
            header("big", tarfile.GNUTYPE_SPARSE, real_size=b"2167414000\0\0"),
            "found one with holes",
        ),
        # After the third member the second would follow again, for ever; newer Pythons end there.
        (header("a") + header("b") + header("c", size=NEGATIVE), "found (-1024|neither)"),
        (header("long", tarfile.GNUTYPE_LONGNAME) * 3000, "a complete tar archive, found"),
        (
            header("x", tarfile.XHDTYPE, size=b"\x80" + b"\xff" * 11),
            "a complete tar archive, found",
        ),
    ],
    ids=["holes", "circle", "deep", "huge"],
)
def test_tar_headers_that_lie_are_refused(headers: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"bad\.tar\.gz: .*{message}"):
        list(tar_members(gzip.compress(headers + END), "bad.tar.gz"))


def test_folders_are_passed_over() -> None:
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    assert list(tar_members(tar({"folder/a": b"1"}, folder), "good")) == [("folder/a", b"1")]
    assert list(zip_members(zipped({"folder/": b"", "folder/a": b"1"}), "good")) == [
        ("folder/a", b"1")
    ]


BOMB = bytes(30_000_000)


@pytest.mark.parametrize(
    "read",
    [
        lambda limit: gunzip(gzip.compress(BOMB), "bomb", limit),
        lambda limit: list(tar_members(tar({"zeros": BOMB}), "bomb", limit)),
        lambda limit: list(zip_members(zipped({"zeros": BOMB}), "bomb", limit)),
        lambda limit: list(
            zip_members(zipped(dict.fromkeys("abc", BOMB[:400_000])), "bomb", limit)
        ),
    ],
    ids=["gzip", "tar", "zip", "several"],
)
def test_bombs_are_refused(read: Callable[[int], object]) -> None:
    with pytest.raises(DataError, match="bomb: expected at most 1,000,000 bytes of content"):
        read(1_000_000)


def lying_zip() -> bytes:
    """A member that declares ten bytes and holds thirty million."""
    content = bytearray(zipped({"zeros": BOMB}))
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        place = content.find(signature) + offset
        content[place : place + 4] = (10).to_bytes(4, "little")
    return bytes(content)


@pytest.mark.parametrize(
    ("pack", "read"),
    [
        (lambda: gzip.compress(BOMB), lambda content: gunzip(content, "bomb", 1000)),
        (lambda: tar({"zeros": BOMB}), lambda content: list(tar_members(content, "bomb", 1000))),
        (lying_zip, lambda content: list(zip_members(content, "bomb", 1000))),
    ],
    ids=["gzip", "tar", "lying zip"],
)
def test_a_bomb_takes_no_memory(pack: Callable[[], bytes], read: Callable[[bytes], object]) -> None:
    content = pack()
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            read(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


def test_a_small_file_takes_little_memory_whatever_the_limit() -> None:
    tracemalloc.start()
    try:
        assert gunzip(gzip.compress(b"little"), "small") == b"little"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


def test_other_compressions_are_refused_because_they_cannot_be_bounded() -> None:
    with pytest.raises(DataError, match="expected it stored or deflated, found 12"):
        list(zip_members(zipped({"a": b"1"}, zipfile.ZIP_BZIP2), "bad.zip"))


@pytest.mark.parametrize(("pack", "read"), [(tar, tar_members), (zipped, zip_members)])
@given(draws=st.data())
def test_a_damaged_archive_is_refused_or_read_right(
    pack: Callable[[Files], bytes], read: Reader, draws: st.DataObject
) -> None:
    files = {"a": bytes(range(256)), "b": b"text" * 50}
    content = bytearray(pack(files))
    if draws.draw(st.booleans(), label="truncate"):
        del content[draws.draw(st.integers(0, len(content) - 1), label="length") :]
    else:
        place = draws.draw(st.integers(0, len(content) - 1), label="place")
        content[place] ^= draws.draw(st.integers(1, 255), label="bits")
    try:
        members = dict(read(bytes(content), "damaged"))
    except DataError:
        return
    # What was hit is not part of the content, such as a date or a name.
    assert set(members.values()) <= set(files.values())


@given(draws=st.data())
def test_no_member_of_a_damaged_tar_is_lost_in_silence(draws: st.DataObject) -> None:
    """Inside the compression, whose own checksum finds nothing if the damage was there before."""
    content = bytearray(gzip.decompress(tar({"a": b"1" * 600, "b": b"2", "c": b"3"})))
    if draws.draw(st.booleans(), label="truncate"):
        del content[draws.draw(st.integers(0, len(content) - 1), label="length") :]
    else:
        place = draws.draw(st.integers(0, 4000), label="place")
        content[place] ^= draws.draw(st.integers(1, 255), label="bits")
    try:
        members = list(tar_members(gzip.compress(bytes(content), 1), "damaged"))
    except DataError as error:
        assert "at offset" in str(error) or "before offset" in str(error)  # noqa: PT017
        return
    assert [len(member) for _, member in members] == [600, 1, 1]


def test_damaged_gzip_states_the_offset() -> None:
    good = gzip.compress(bytes(range(256)) * 20)
    with pytest.raises(DataError, match=rf"x\.gz: .*at or before offset {len(good) // 2} of"):
        gunzip(good[: len(good) // 2], "x.gz")
