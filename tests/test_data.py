"""Data sets: content, damage, download faults and batches. Only loopback connections."""

import gzip
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teleport import data
from teleport.errors import DataError

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = (
    file.name for file in data.SOURCES["mnist"].files
)
TEST_LABEL_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
TRAIN_LABEL_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]

needs_full_data = pytest.mark.skipif(
    data.ROOT_VARIABLE not in os.environ,
    reason=f"needs the full data sets: set {data.ROOT_VARIABLE} to the folder that holds them",
)


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    header = bytes([0, 0, data.UNSIGNED_BYTE, array.ndim])
    return header + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def small_arrays() -> list[npt.NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    shapes = [(6, 28, 28), (6,), (3, 28, 28), (3,)]
    return [rng.integers(0, 256 if len(s) == 3 else 10, s, dtype=np.uint8) for s in shapes]


@dataclass
class SmallSet:
    """A made set of 6 + 3 images under the name `mnist`, with its archives by file name."""

    archives: dict[str, bytes]
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "mnist"

    def place(self, *names: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in names or self.archives:
            (self.folder / name).write_bytes(self.archives[name])

    def replace_archive(self, name: str, content: bytes) -> None:
        """Put other content on disk, with the expected content digest to match."""
        (self.folder / name).write_bytes(gzip.compress(content))
        expect(name, content_md5=md5(content))


def expect(name: str, content_md5: str) -> None:
    source = data.SOURCES["mnist"]
    files = (replace(f, content_md5=content_md5) if f.name == name else f for f in source.files)
    data.SOURCES["mnist"] = replace(source, files=tuple(files))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallSet:
    files, archives = [], {}
    for official, array in zip(data.SOURCES["mnist"].files, small_arrays(), strict=True):
        content = idx(array)
        archive = gzip.compress(content)
        archives[official.name] = archive
        files.append(data.SourceFile(official.name, array.shape, md5(archive), md5(content)))
    closed = "http://127.0.0.1:1/closed/"
    source = data.Source(urls=(closed,), files=tuple(files), train=6)
    monkeypatch.setitem(data.SOURCES, "mnist", source)
    monkeypatch.setenv("NO_PROXY", "*")
    return SmallSet(archives, tmp_path / "root")


@dataclass
class Mirrors:
    """A loopback server; `bodies` maps a path to its content and the length it claims."""

    base: str
    bodies: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def serve(self, mirror: str, archives: dict[str, bytes]) -> None:
        for name, body in archives.items():
            self.bodies[f"/{mirror}/{name}"] = (body, len(body))

    def use(self, *mirrors: str) -> None:
        urls = tuple(f"{self.base}/{mirror}/" for mirror in mirrors)
        data.SOURCES["mnist"] = replace(data.SOURCES["mnist"], urls=urls)


def handler_of(mirrors: Mirrors) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mirrors.requests.append(self.path)
            if self.path not in mirrors.bodies:
                self.send_error(404)
                return
            body, length = mirrors.bodies[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test output quiet."""

    return Handler


@pytest.fixture
def mirrors() -> Iterator[Mirrors]:
    state = Mirrors(base="")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(state))
    state.base = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def tree(root: Path) -> dict[str, bytes | None]:
    paths = sorted(root.rglob("*")) if root.exists() else []
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in paths}


def counts(targets: torch.Tensor) -> list[int]:
    return torch.bincount(targets, minlength=10).tolist()


# The sets


def test_sample_has_the_documented_shapes_and_ranges() -> None:
    sample = data.load("mnist-sample")
    assert sample.train_inputs.shape == (8_000, 784)
    assert sample.test_inputs.shape == (2_000, 784)
    assert sample.train_targets.shape == (8_000,)
    assert sample.test_targets.shape == (2_000,)
    assert sample.train_inputs.dtype == sample.test_inputs.dtype == torch.float32
    assert sample.train_targets.dtype == sample.test_targets.dtype == torch.int64
    assert [sample.train_inputs.min().item(), sample.train_inputs.max().item()] == [0, 1]
    assert (sample.width, sample.classes, sample.name) == (784, 10, "mnist-sample")


def test_sample_is_the_official_test_set_in_order() -> None:
    sample = data.load("mnist-sample")
    targets = torch.cat([sample.train_targets, sample.test_targets])
    assert counts(targets) == TEST_LABEL_COUNTS
    assert targets[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_sample_needs_no_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(tmp_path / "absent"))
    expected = data.load("mnist-sample").checksum
    assert data.load("mnist-sample", tmp_path / "other").checksum == expected
    assert tree(tmp_path) == {}


def test_missing_sample_asks_to_install_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path)
    with pytest.raises(DataError, match="install the package again"):
        data.load("mnist-sample")


def test_load_scales_pixels_and_keeps_the_split(small: SmallSet) -> None:
    small.place()
    images, labels, test_images, test_labels = small_arrays()
    loaded = data.load("mnist", small.root)
    assert torch.equal(loaded.train_inputs * 255, torch.tensor(images).reshape(6, 784).float())
    assert torch.equal(loaded.test_inputs * 255, torch.tensor(test_images).reshape(3, 784).float())
    assert loaded.train_targets.tolist() == labels.tolist()
    assert loaded.test_targets.tolist() == test_labels.tolist()


def test_checksum_follows_the_content(small: SmallSet) -> None:
    small.place()
    before = data.load("mnist", small.root).checksum
    assert before == data.load("mnist", small.root).checksum
    small.replace_archive(TRAIN_LABELS, idx(np.zeros(6, np.uint8)))
    assert data.load("mnist", small.root).checksum != before


def test_root_is_the_argument_then_the_variable_then_the_cache(
    small: SmallSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.place()
    monkeypatch.setattr("pooch.os_cache", lambda name: small.root)
    monkeypatch.delenv(data.ROOT_VARIABLE, raising=False)
    assert data.fetch("mnist") == small.folder
    monkeypatch.setenv(data.ROOT_VARIABLE, str(small.root / "absent"))
    assert data.fetch("mnist", small.root) == small.folder
    with pytest.raises(DataError):
        data.fetch("mnist")


@pytest.mark.parametrize("function", [data.load, data.fetch, data.verify])
def test_unknown_name_lists_and_suggests(function: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"mnist-sample, mnist, fashion-mnist\. Did you mean 'mn"):
        function("mnits")
    with pytest.raises(ValueError, match=r"fashion-mnist\.$"):
        function("qqq")


def test_available_says_where(small: SmallSet) -> None:
    where = {info.name: (info.images, info.where) for info in data.available(small.root)}
    assert where["mnist-sample"] == (10_000, "embedded")
    assert where["mnist"] == (9, "not fetched")
    assert where["fashion-mnist"] == (70_000, "not fetched")
    small.place()
    where = {info.name: (info.images, info.where) for info in data.available(small.root)}
    assert where["mnist"] == (9, str(small.folder))


@needs_full_data
@pytest.mark.parametrize(
    ("name", "train_counts", "test_counts"),
    [
        ("mnist", TRAIN_LABEL_COUNTS, TEST_LABEL_COUNTS),
        ("fashion-mnist", [6_000] * 10, [1_000] * 10),
    ],
)
def test_full_sets(name: str, train_counts: list[int], test_counts: list[int]) -> None:
    full = data.load(name)
    assert full.train_inputs.shape == (60_000, 784)
    assert full.test_inputs.shape == (10_000, 784)
    assert counts(full.train_targets) == train_counts
    assert counts(full.test_targets) == test_counts
    assert all(status.state == "ok" for status in data.verify(name))


# Damage on disk


def truncate(archive: bytes) -> bytes:
    return archive[: len(archive) // 2]


def flip_compressed_byte(archive: bytes) -> bytes:
    middle = len(archive) // 2
    return archive[:middle] + bytes([archive[middle] ^ 0xFF]) + archive[middle + 1 :]


def break_first_block(archive: bytes) -> bytes:
    header = 10
    return archive[:header] + b"\xff" + archive[header + 1 :]


def change_content(archive: bytes) -> bytes:
    content = bytearray(gzip.decompress(archive))
    content[-1] ^= 1
    return gzip.compress(bytes(content))


def unpack(archive: bytes) -> bytes:
    return gzip.decompress(archive)


def empty(archive: bytes) -> bytes:
    return b""


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_compressed_byte, break_first_block, change_content, unpack, empty],
)
@pytest.mark.parametrize("name", [TRAIN_IMAGES, TEST_LABELS])
@pytest.mark.parametrize("function", [data.load, data.fetch])
def test_damaged_file_is_refused_and_kept(
    small: SmallSet,
    damage: Callable[[bytes], bytes],
    name: str,
    function: Callable[[str, Path], object],
) -> None:
    small.place()
    (small.folder / name).write_bytes(damage(small.archives[name]))
    before = tree(small.root)
    with pytest.raises(DataError) as caught:
        function("mnist", small.root)
    message = str(caught.value)
    assert str(small.folder / name) in message
    assert "expected" in message
    assert "found" in message
    assert "Delete it and run `teleport data fetch mnist`" in message
    assert tree(small.root) == before


def test_other_gzip_container_is_accepted(small: SmallSet) -> None:
    small.place()
    content = gzip.decompress(small.archives[TRAIN_IMAGES])
    (small.folder / TRAIN_IMAGES).write_bytes(gzip.compress(content, compresslevel=0))
    assert len(data.load("mnist", small.root).train_inputs) == 6


def test_digest_mismatch_states_both_digests(small: SmallSet) -> None:
    small.place()
    found = md5(gzip.decompress(small.archives[TEST_LABELS]))
    expect(TEST_LABELS, content_md5="0" * 32)
    with pytest.raises(DataError, match=f"MD5 {'0' * 32}, found {found}"):
        data.load("mnist", small.root)


def test_wrong_magic_and_shape_are_refused_behind_a_right_digest(small: SmallSet) -> None:
    small.place()
    small.replace_archive(TRAIN_LABELS, idx(np.zeros(5, np.uint8)))
    with pytest.raises(DataError, match=r"shape \(6,\), found \(5,\)\. The file is not used"):
        data.load("mnist", small.root)
    small.replace_archive(TRAIN_LABELS, b"\0\0\x0d\1" + bytes(10))
    with pytest.raises(DataError, match=r"at offset 0, found 00 00 0d 01\. The file is not used"):
        data.load("mnist", small.root)


def test_verify_reports_each_file_without_raising(small: SmallSet) -> None:
    small.place(TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES)
    (small.folder / TRAIN_LABELS).write_bytes(truncate(small.archives[TRAIN_LABELS]))
    report = data.verify("mnist", small.root)
    assert [status.path.name for status in report] == list(small.archives)
    assert [status.state for status in report] == ["ok", "damaged", "ok", "missing"]
    assert report[0].detail == ""
    assert "teleport data fetch mnist" in report[1].detail
    assert TEST_LABELS in report[3].detail


def test_verify_of_the_sample_is_ok() -> None:
    assert [status.state for status in data.verify("mnist-sample")] == ["ok", "ok"]


# Download


@pytest.mark.parametrize("placed", [[], [TRAIN_LABELS, TEST_IMAGES]])
def test_no_network_says_what_to_place_where(small: SmallSet, placed: list[str]) -> None:
    if placed:
        small.place(*placed)
    before = tree(small.root.parent)
    with pytest.raises(DataError) as caught:
        data.load("mnist", small.root)
    message = str(caught.value)
    wanted = [name for name in small.archives if name not in placed]
    assert f"http://127.0.0.1:1/closed/{TRAIN_IMAGES}: " in message
    assert "refused" in message
    assert "Max retries" not in message, "the reason is the innermost cause only"
    assert f"Place {', '.join(wanted)} in {small.folder}" in message
    assert data.ROOT_VARIABLE in message
    assert "mnist-sample" in message
    assert tree(small.root.parent) == before


def test_unwritable_root_is_a_data_error(small: SmallSet) -> None:
    small.root.write_bytes(b"a file where the folder should be")
    with pytest.raises(DataError, match=f"Place {TRAIN_IMAGES}"):
        data.load("mnist", small.root)


def test_fetch_downloads_exact_files(small: SmallSet, mirrors: Mirrors) -> None:
    mirrors.serve("first", small.archives)
    mirrors.use("first")
    assert data.fetch("mnist", small.root) == small.folder
    assert tree(small.folder) == small.archives
    assert len(mirrors.requests) == 4
    assert len(data.load("mnist", small.root).test_inputs) == 3
    assert len(mirrors.requests) == 4, "files on disk are not fetched again"


def test_load_fetches_only_what_is_absent(small: SmallSet, mirrors: Mirrors) -> None:
    small.place(TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES)
    mirrors.serve("first", small.archives)
    mirrors.use("first")
    assert len(data.load("mnist", small.root).train_inputs) == 6
    assert mirrors.requests == [f"/first/{TEST_LABELS}"]


def not_found(mirrors: Mirrors, archive: bytes) -> None:
    """Leave the path unknown to the server, which then answers 404."""


def cut_off(mirrors: Mirrors, archive: bytes) -> None:
    mirrors.bodies[f"/first/{TEST_IMAGES}"] = (truncate(archive), len(archive))


def truncated(mirrors: Mirrors, archive: bytes) -> None:
    mirrors.serve("first", {TEST_IMAGES: truncate(archive)})


def other_content(mirrors: Mirrors, archive: bytes) -> None:
    mirrors.serve("first", {TEST_IMAGES: change_content(archive)})


FAULTS = [
    (not_found, "404"),
    (cut_off, "more expected"),
    (truncated, "does not match the known hash"),
    (other_content, "does not match the known hash"),
]


@pytest.mark.parametrize(("fault", "reason"), FAULTS)
def test_failed_download_leaves_the_disk_as_it_was(
    small: SmallSet, mirrors: Mirrors, fault: Callable[[Mirrors, bytes], None], reason: str
) -> None:
    small.place(TRAIN_LABELS)
    mirrors.serve("first", small.archives)
    del mirrors.bodies[f"/first/{TEST_IMAGES}"]
    fault(mirrors, small.archives[TEST_IMAGES])
    mirrors.use("first", "absent")
    before = tree(small.root)
    with pytest.raises(DataError) as caught:
        data.fetch("mnist", small.root)
    first, second = str(caught.value).splitlines()[1:3]
    assert first.startswith(f"  {mirrors.base}/first/{TEST_IMAGES}: ")
    assert reason in first
    assert second.startswith(f"  {mirrors.base}/absent/{TEST_IMAGES}: 404")
    assert tree(small.root) == before


@pytest.mark.parametrize("fault", [fault for fault, _ in FAULTS])
def test_second_mirror_replaces_a_faulty_first(
    small: SmallSet, mirrors: Mirrors, fault: Callable[[Mirrors, bytes], None]
) -> None:
    fault(mirrors, small.archives[TEST_IMAGES])
    mirrors.serve("second", small.archives)
    mirrors.use("first", "second")
    data.fetch("mnist", small.root)
    assert tree(small.folder) == small.archives


def test_refused_connection_falls_through_to_the_next_mirror(
    small: SmallSet, mirrors: Mirrors
) -> None:
    mirrors.serve("second", small.archives)
    urls = ("http://127.0.0.1:1/closed/", f"{mirrors.base}/second/")
    data.SOURCES["mnist"] = replace(data.SOURCES["mnist"], urls=urls)
    data.fetch("mnist", small.root)
    assert tree(small.folder) == small.archives


# The IDX format

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def arrays(draw: st.DrawFn) -> npt.NDArray[np.uint8]:
    shape = draw(shapes)
    size = math.prod(shape)
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(shape)


@given(arrays())
def test_idx_round_trip(array: npt.NDArray[np.uint8]) -> None:
    read = data.read_idx(idx(array))
    assert read.dtype == np.uint8
    assert read.flags.writeable
    np.testing.assert_array_equal(read, array, strict=True)


@given(st.data())
def test_any_damage_to_the_idx_header_is_found(draws: st.DataObject) -> None:
    array = draws.draw(arrays())
    content = bytearray(idx(array))
    position = draws.draw(st.integers(0, 3 + 4 * array.ndim), label="position")
    content[position] ^= draws.draw(st.integers(1, 255), label="flipped bits")
    with pytest.raises(DataError, match="offset"):
        data.read_idx(bytes(content))


@given(arrays(), st.data())
def test_idx_of_another_length_is_refused(
    array: npt.NDArray[np.uint8], draws: st.DataObject
) -> None:
    content = idx(array)
    length = draws.draw(st.integers(0, len(content) - 1), label="length")
    for wrong in (content[:length], content + b"\0"):
        with pytest.raises(DataError, match="offset"):
            data.read_idx(wrong)


def test_idx_errors_state_the_offset(tmp_path: Path) -> None:
    good = idx(np.zeros((2, 3), np.uint8))
    path = tmp_path / "broken-idx"
    for content, message in [
        (b"", "at offset 0, found nothing"),
        (good[:3], "at offset 0, found 00 00 08"),
        (b"\0\0\x08\0\1", "at offset 0, found 00 00 08 00"),
        (b"\0\0\x08\1\1" + b"\2", "at offset 4, found 01 02"),
        (idx(np.zeros((3, 0), np.uint8)), "at offset 8, found 00 00 00 00"),
        (good[:8], "at offset 8, found the end of the file"),
        (good[:-1], r"expected 6 bytes of data from offset 12 for shape \(2, 3\), found 5"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"broken-idx: .*{message}"):
            data.read_idx(path)


def test_idx_is_read_from_plain_and_gzipped_files(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    (tmp_path / "plain").write_bytes(idx(array))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx(array)))
    np.testing.assert_array_equal(data.read_idx(tmp_path / "plain"), array)
    np.testing.assert_array_equal(data.read_idx(str(tmp_path / "packed.gz")), array)
    with pytest.raises(DataError, match="absent"):
        data.read_idx(tmp_path / "absent")


# Batches


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 200), st.data())
def test_one_epoch_visits_each_row_at_most_once(n: int, draws: st.DataObject) -> None:
    size = draws.draw(st.integers(1, n), label="size")
    seed = draws.draw(st.integers(0, 2**32), label="seed")
    rows = torch.arange(n)
    inputs = torch.stack([rows, -rows], dim=1).float()
    epoch = list(data.batches(inputs, rows, size, seeded(seed)))
    assert len(epoch) == n // size
    assert all(x.shape == (size, 2) and y.shape == (size,) for x, y in epoch)
    drawn = torch.cat([y for _, y in epoch])
    assert len(set(drawn.tolist())) == len(drawn)
    assert torch.equal(torch.cat([x for x, _ in epoch])[:, 0].long(), drawn)
    again = [y for _, y in data.batches(inputs, rows, size, seeded(seed))]
    assert torch.equal(torch.cat(again), drawn)


@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_order_depends_on_the_seed_and_the_epoch(seed: int, other: int) -> None:
    rows = torch.arange(500)
    generator = seeded(seed)
    orders = [
        torch.cat([y for _, y in data.batches(rows, rows, 50, g)])
        for g in (generator, generator, seeded(other))
    ]
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2]) == (seed == other)


@pytest.mark.parametrize("size", [-1, 0, 11])
def test_batch_size_out_of_range_is_refused_at_the_call(size: int) -> None:
    rows = torch.arange(10)
    with pytest.raises(ValueError, match=f"batch size {size} .* 1 to 10"):
        data.batches(rows, rows, size, seeded(0))


def test_batches_refuse_different_lengths() -> None:
    with pytest.raises(ValueError, match="10 and 9"):
        data.batches(torch.zeros(10, 2), torch.zeros(9), 2, seeded(0))
