"""Data sets by name: content, damage on disk, missing files, the shared shape, batches."""

import gzip
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from teleport import data
from teleport.data import builders
from teleport.data.images import UNSIGNED_BYTE
from teleport.data.series import windows
from teleport.data.store import LOCK_NAME
from teleport.errors import DataError
from tests.support.loopback import Mirrors, server

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = (
    file.name for file in data.SOURCES["mnist"].files
)
TEST_LABEL_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def idx(array: npt.NDArray[np.uint8]) -> bytes:
    header = bytes([0, 0, UNSIGNED_BYTE, array.ndim])
    return header + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def md5(content: bytes) -> str:
    return f"md5:{hashlib.md5(content, usedforsecurity=False).hexdigest()}"


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
    files = (replace(f, content=content_md5) if f.name == name else f for f in source.files)
    data.SOURCES["mnist"] = replace(source, files=tuple(files))


def use(mirrors: Mirrors, *names: str) -> None:
    """Let the files of the small set come from these mirrors."""
    source = data.SOURCES["mnist"]
    files = tuple(replace(f, urls=mirrors.urls(f.name, *names)) for f in source.files)
    data.SOURCES["mnist"] = replace(source, files=files)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallSet:
    files, archives = [], {}
    for official, array in zip(data.SOURCES["mnist"].files, small_arrays(), strict=True):
        content = idx(array)
        archive = gzip.compress(content)
        archives[official.name] = archive
        closed = f"http://127.0.0.1:1/closed/{official.name}"
        files.append(data.SourceFile(official.name, (closed,), md5(archive), md5(content)))
    build = partial(builders.idx_images, train=6)
    source = replace(data.SOURCES["mnist"], files=tuple(files), build=build, recipe="6")
    monkeypatch.setitem(data.SOURCES, "mnist", source)
    monkeypatch.setenv("NO_PROXY", "*")
    return SmallSet(archives, tmp_path / "root")


@pytest.fixture
def mirrors() -> Iterator[Mirrors]:
    with server() as state:
        yield state


def tree(root: Path) -> dict[str, bytes | None]:
    """Everything below a folder but the lock of the download."""
    paths = [p for p in sorted(root.rglob("*")) if p.name != LOCK_NAME] if root.exists() else []
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in paths}


def files(root: Path) -> dict[str, bytes | None]:
    """Everything below a folder but the lock and empty folders."""
    return {name: content for name, content in tree(root).items() if content is not None}


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


@pytest.mark.parametrize(("ending", "shape"), [("-rows", (28, 28)), ("-sequence", (784, 1))])
def test_sequential_mnist_is_the_same_pixels(ending: str, shape: tuple[int, int]) -> None:
    flat, sequence = data.load("mnist-sample"), data.load(f"mnist-sample{ending}")
    assert sequence.input_shape == shape
    assert (sequence.kind, sequence.width, sequence.outputs) == ("sequences", shape[1], 10)
    assert torch.equal(sequence.train_inputs.flatten(1), flat.train_inputs)
    assert torch.equal(sequence.test_targets, flat.test_targets)
    assert sequence.checksum != flat.checksum


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
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: small.root)
    monkeypatch.delenv(data.ROOT_VARIABLE, raising=False)
    assert data.fetch("mnist") == small.folder
    monkeypatch.setenv(data.ROOT_VARIABLE, str(small.root / "absent"))
    assert data.fetch("mnist", small.root) == small.folder
    with pytest.raises(DataError):
        data.fetch("mnist")


@pytest.mark.parametrize("function", [data.load, data.fetch, data.verify])
def test_unknown_name_lists_and_suggests(function: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"mnist-sample, .* ptb-treebank\. Did you mean 'mn"):
        function("mnits")
    with pytest.raises(ValueError, match=r"ptb-treebank\.$"):
        function("qqq")


def test_available_says_where_and_how(small: SmallSet) -> None:
    def listed() -> dict[str, tuple[str, str]]:
        return {info.name: (info.where, info.how) for info in data.available(small.root)}

    before = listed()
    assert list(before) == list(data.SOURCES)
    assert before["mnist-sample"] == ("embedded", "")
    assert before["mnist"] == ("not fetched", "Run `teleport data fetch mnist`.")
    packed = small.root / "cifar10"
    assert before["cifar10-jpeg"] == (
        "not fetched",
        f"No public source: place cifar10-jpeg.npz in {packed}.",
    )
    small.place()
    assert listed()["mnist"] == (str(small.folder), "")


def test_a_set_without_a_public_source_says_so(small: SmallSet) -> None:
    with pytest.raises(DataError, match=r"cifar10-jpeg\.npz: no public source\nPlace cifar10-jpeg"):
        data.load("cifar10-jpeg", small.root)
    assert tree(small.root) == {}


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
    "damage", [truncate, flip_compressed_byte, break_first_block, change_content, unpack, empty]
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


def test_unpacked_file_is_accepted_without_its_ending(small: SmallSet) -> None:
    small.place()
    packed = small.folder / TRAIN_IMAGES
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert len(data.load("mnist", small.root).train_inputs) == 6
    assert [status.state for status in data.verify("mnist", small.root)] == ["ok"] * 4


def test_digest_mismatch_states_both_digests(small: SmallSet) -> None:
    small.place()
    found = md5(gzip.decompress(small.archives[TEST_LABELS]))
    expect(TEST_LABELS, content_md5=f"md5:{'0' * 32}")
    with pytest.raises(DataError, match=f"content md5:{'0' * 32}, found {found}"):
        data.load("mnist", small.root)


def test_wrong_magic_and_shape_are_refused_behind_a_right_digest(small: SmallSet) -> None:
    small.place()
    small.replace_archive(TRAIN_LABELS, idx(np.zeros(5, np.uint8)))
    with pytest.raises(DataError, match=r"expected shape \(5, 28, 28\), found \(6, 28, 28\)"):
        data.load("mnist", small.root)
    small.replace_archive(TRAIN_LABELS, idx(np.array([0, 9, 1, 10, 2, 3], np.uint8)))
    with pytest.raises(DataError, match=rf"{TRAIN_LABELS}: .* below 10 at offset 11, found 10"):
        data.load("mnist", small.root)
    small.replace_archive(TRAIN_LABELS, b"\0\0\x0d\1" + bytes(10))
    with pytest.raises(DataError, match=r"at offset 0, found 00 00 0d 01"):
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


@pytest.mark.parametrize("placed", [[], [TRAIN_IMAGES, TEST_IMAGES]])
def test_no_network_says_what_to_place_where(small: SmallSet, placed: list[str]) -> None:
    if placed:
        small.place(*placed)
    before = files(small.root)
    with pytest.raises(DataError) as caught:
        data.load("mnist", small.root)
    message = str(caught.value)
    wanted = [name for name in small.archives if name not in placed]
    assert f"http://127.0.0.1:1/closed/{wanted[0]}: " in message
    assert "refused" in message
    assert "Max retries" not in message, "the reason is the innermost cause only"
    assert f"Place {', '.join(wanted)} in {small.folder}" in message
    assert data.ROOT_VARIABLE in message
    assert "mnist-sample" in message
    assert files(small.root) == before


def test_a_root_that_cannot_be_looked_into_is_a_data_error(small: SmallSet) -> None:
    """A name that is too long stands for a folder without permission, which root would have."""
    root = small.root / ("x" * 300)
    with pytest.raises(DataError, match=f"File name too long.*\nPlace {TRAIN_IMAGES}"):
        data.load("mnist", root)
    assert [status.state for status in data.verify("mnist", root)] == ["missing"] * 4
    assert {info.where for info in data.available(root)} == {"embedded", "not fetched"}


def test_unwritable_root_is_a_data_error(small: SmallSet) -> None:
    small.root.write_bytes(b"a file where the folder should be")
    with pytest.raises(DataError, match=f"Place {TRAIN_IMAGES}"):
        data.load("mnist", small.root)


def test_fetch_downloads_exact_files(small: SmallSet, mirrors: Mirrors) -> None:
    mirrors.serve("first", small.archives)
    use(mirrors, "absent", "first")
    assert data.fetch("mnist", small.root) == small.folder
    assert tree(small.folder) == small.archives
    assert len(mirrors.requests) == 8
    assert len(data.load("mnist", small.root).test_inputs) == 3
    assert len(mirrors.requests) == 8, "files on disk are not fetched again"


def test_load_fetches_only_what_is_absent(small: SmallSet, mirrors: Mirrors) -> None:
    small.place(TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES)
    mirrors.serve("first", small.archives)
    use(mirrors, "first")
    assert len(data.load("mnist", small.root).train_inputs) == 6
    assert mirrors.requests == [f"/first/{TEST_LABELS}"]


def test_failed_fetch_keeps_what_is_whole_and_asks_for_the_rest(
    small: SmallSet, mirrors: Mirrors
) -> None:
    mirrors.serve("first", small.archives)
    mirrors.files[f"/first/{TEST_IMAGES}"] = change_content(small.archives[TEST_IMAGES])
    use(mirrors, "first")
    with pytest.raises(DataError) as caught:
        data.fetch("mnist", small.root)
    message = str(caught.value)
    assert f"{mirrors.base}/first/{TEST_IMAGES}: expected md5:" in message
    assert f"Place {TEST_IMAGES}, {TEST_LABELS} in {small.folder}" in message
    assert set(tree(small.folder)) == {TRAIN_IMAGES, TRAIN_LABELS}


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


# The shared shape


def dataset(
    kind: data.DataKind, inputs: torch.Tensor, targets: torch.Tensor, classes: int
) -> data.Dataset:
    return data.Dataset("made", inputs, targets, inputs, targets, classes, "", "", kind=kind)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_widths_and_losses_by_kind() -> None:
    flat = dataset("images", random(6, 20), torch.arange(6) % 3, 3)
    colour = dataset("images", torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6) % 4, 4)
    sequence = dataset("sequences", random(6, 7, 5), torch.arange(6) % 2, 2)
    series = dataset("windows", *windows(random(40, 4), 6, 2), 0)
    tokens = dataset("tokens", torch.randint(9, (6, 7)), torch.randint(9, (6, 7)), 9)
    sets = (flat, colour, sequence, series, tokens)
    assert [s.width for s in sets] == [20, 3, 5, 4, 9]
    assert [s.outputs for s in sets] == [3, 4, 2, 4, 9]
    assert [s.input_shape for s in sets] == [(20,), (3, 8, 8), (7, 5), (6, 4), (7,)]
    assert [s.loss_kind for s in sets] == ["cross_entropy"] * 3 + ["mse", "cross_entropy"]
    scores = random(6, 3)
    by_hand = -scores.log_softmax(-1)[torch.arange(6), flat.train_targets].mean()
    torch.testing.assert_close(flat.loss(scores, flat.train_targets), by_hand)
    values = random(*series.train_targets.shape)
    by_hand = (values - series.train_targets).square().mean()
    torch.testing.assert_close(series.loss(values, series.train_targets), by_hand)
    scores = random(6, 7, 9)
    chosen = scores.log_softmax(-1).gather(-1, tokens.train_targets[..., None])
    torch.testing.assert_close(tokens.loss(scores, tokens.train_targets), -chosen.mean())


def test_bytes_are_scaled_and_resized_when_prepared() -> None:
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    images = dataset("images", pixels, torch.zeros(2, dtype=torch.int64), 1)
    assert torch.equal(images.prepare(pixels), pixels.float() / 255)
    larger = replace(images, resize=20)
    assert larger.input_shape == (3, 20, 20)
    expected = functional.interpolate(pixels.float() / 255, (20, 20), mode="bilinear")
    assert torch.equal(larger.prepare(pixels), expected)
    floats = random(2, 4)
    assert larger.prepare(floats) is floats


def test_resizing_agrees_with_pillow() -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    resized = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR)
    stored = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
    images = replace(dataset("images", stored, torch.zeros(1, dtype=torch.int64), 1), resize=224)
    found = images.prepare(stored)[0].permute(1, 2, 0) * 255
    # Pillow rounds to whole grey values after each of its two passes.
    torch.testing.assert_close(
        found, torch.from_numpy(np.array(resized)).float(), atol=1.01, rtol=0
    )


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 5), st.data())
def test_take_equals_indexing_also_for_windows(
    n: int, time: int, width: int, draws: st.DataObject
) -> None:
    view, targets = windows(torch.arange((n + time) * width).view(-1, width), time, 1)
    rows = torch.tensor(draws.draw(st.lists(st.integers(0, n - 1), max_size=9), label="rows"))
    rows = rows.long()
    for tensor in (
        view,
        targets,
        view.clone(),
        view[..., 0],
        view[draws.draw(st.integers(0, n)) :],
    ):
        if len(tensor) == n:
            assert torch.equal(data.take(tensor, rows), tensor[rows])
            assert data.take(tensor, rows).is_contiguous()


def test_moving_windows_moves_the_series_only() -> None:
    whole = random(100, 4)
    inputs, targets = windows(whole[20:], 30, 5)
    series = dataset("windows", inputs, targets, 0)
    assert inputs.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    moved = series.to("meta")
    assert moved.train_inputs.shape == inputs.shape
    assert moved.train_inputs.untyped_storage().nbytes() == 75 * 4 * whole.element_size()
    assert moved.train_inputs.is_meta
    assert moved.valid_targets.is_meta
    again = dataset("windows", inputs[3:9, :, 1:], targets, 0).to("cpu")
    assert torch.equal(again.train_inputs, inputs[3:9, :, 1:])
    assert torch.equal(again.train_targets, targets)


def test_windows_are_batched_like_their_copies() -> None:
    inputs, targets = windows(random(100, 4), 30, 5)
    pairs = list(data.batches(inputs, targets, 8, seeded(3)))
    copies = list(data.batches(inputs.clone(), targets.clone(), 8, seeded(3)))
    assert len(pairs) == 66 // 8
    for (x, y), (x_copy, y_copy) in zip(pairs, copies, strict=True):
        assert torch.equal(x, x_copy)
        assert torch.equal(y, y_copy)
