"""The formats: small files of the official layouts, and what is said of wrong ones."""

import gzip
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from PIL import Image
from safetensors import SafetensorError

from teleport import data
from teleport.data import builders, jpeg, store
from teleport.data.download import digest
from teleport.data.images import UNSIGNED_BYTE, read_cifar
from teleport.data.series import read_table, split_windows, windows
from teleport.data.text import END, UNKNOWN, encode, sequences, vocabulary, words
from teleport.errors import DataError
from tests.support.archives import tar, zipped
from tests.support.loopback import Mirrors, server

Bytes = npt.NDArray[np.uint8]


@pytest.fixture
def mirrors() -> Iterator[Mirrors]:
    with server() as state:
        yield state


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's own cache out of the tests."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: folder)
    monkeypatch.setenv("NO_PROXY", "*")
    return folder


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def random_pixels(n: int, side: int = 32) -> Bytes:
    return generator().integers(0, 256, (n, 3, side, side), dtype=np.uint8)


# CIFAR


def records(images: Bytes, *labels: list[int]) -> bytes:
    columns = np.array(labels, np.uint8).T
    return np.concatenate([columns, images.reshape(len(images), -1)], axis=1).tobytes()


def cifar10_tar(images: Bytes, labels: list[int]) -> bytes:
    """Two training files of two images, in the wrong order, and a test file with the rest."""
    folder = "cifar-10-batches-bin"
    files = {
        f"{folder}/data_batch_2.bin": records(images[2:4], labels[2:4]),
        f"{folder}/test_batch.bin": records(images[4:], labels[4:]),
        f"{folder}/data_batch_1.bin": records(images[:2], labels[:2]),
        f"{folder}/batches.meta.txt": b"airplane\nautomobile\nbird\n\n",
        f"{folder}/readme.html": b"not read",
    }
    return tar(files)


def cifar100_tar(images: Bytes, labels: list[int]) -> bytes:
    coarse = [19 - label % 20 for label in labels]
    files = {
        "cifar-100-binary/train.bin": records(images[:4], coarse[:4], labels[:4]),
        "cifar-100-binary/test.bin": records(images[4:], coarse[4:], labels[4:]),
        "cifar-100-binary/coarse_label_names.txt": b"fish\n",
        "cifar-100-binary/fine_label_names.txt": b"apple\naquarium_fish\n",
    }
    return tar(files)


def serve_instead(
    monkeypatch: pytest.MonkeyPatch, mirrors: Mirrors, name: str, *contents: bytes
) -> None:
    """Let the files of a set be these contents, from the loopback server."""
    source = data.SOURCES[name]
    files = []
    for file, content in zip(source.files, contents, strict=True):
        mirrors.serve("made", {file.name: content})
        download = digest(file.download, content)
        inner = gzip.decompress(content) if file.name.endswith(".txt.gz") else content
        known = digest(file.content, inner) if file.content else ""
        files.append(
            replace(file, urls=mirrors.urls(file.name, "made"), download=download, content=known)
        )
    monkeypatch.setitem(data.SOURCES, name, replace(source, files=tuple(files)))


@pytest.mark.parametrize(
    ("name", "pack", "labels"),
    [
        ("cifar10", cifar10_tar, [3, 0, 9, 1, 4, 4, 2]),
        ("cifar100", cifar100_tar, [3, 0, 99, 1, 44, 4, 72]),
    ],
)
def test_cifar_from_a_server(
    name: str,
    pack: Callable[[Bytes, list[int]], bytes],
    labels: list[int],
    mirrors: Mirrors,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    images = random_pixels(7)
    serve_instead(monkeypatch, mirrors, name, pack(images, labels))
    loaded = data.load(name, tmp_path)
    assert torch.equal(loaded.train_inputs, torch.from_numpy(images[:4]))
    assert torch.equal(loaded.test_inputs, torch.from_numpy(images[4:]))
    assert loaded.train_targets.tolist() + loaded.test_targets.tolist() == labels
    assert (loaded.width, loaded.outputs) == (3, data.SOURCES[name].classes)
    assert loaded.names[:2] in {("airplane", "automobile"), ("apple", "aquarium_fish")}
    assert [path.name for path in (tmp_path / name).iterdir() if path.name[0] != "."] == [
        data.SOURCES[name].files[0].name
    ], "nothing is unpacked"
    assert [status.state for status in data.verify(name, tmp_path)] == ["ok"]


def test_a_damaged_archive_on_disk_is_refused_whole(
    mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = cifar10_tar(random_pixels(6), [1] * 6)
    serve_instead(monkeypatch, mirrors, "cifar10", content)
    (file,) = data.SOURCES["cifar10"].files
    path = data.fetch("cifar10", tmp_path) / file.name
    readable = gzip.compress(gzip.decompress(content), 1)
    path.write_bytes(readable)
    found = digest("md5:", readable)
    with pytest.raises(DataError, match=rf"expected digest of .* {file.download}, found {found}\."):
        data.load("cifar10", tmp_path)
    (status,) = data.verify("cifar10", tmp_path)
    assert (status.state, "Delete it" in status.detail) == ("damaged", True)


def test_cifar_errors_state_file_and_offset(
    mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"x\.bin: .* the record at offset 6146 is incomplete"):
        read_cifar(records(random_pixels(3), [1, 2, 3])[:-1], "x.bin", 10)
    with pytest.raises(DataError, match=r"x\.bin: .* at offset 0 is incomplete"):
        read_cifar(b"", "x.bin", 10)
    with pytest.raises(
        DataError, match=r"x\.bin: expected a label below 10 at offset 3073, found 10"
    ):
        read_cifar(records(random_pixels(3), [9, 10, 3]), "x.bin", 10)
    with pytest.raises(DataError, match="a label below 100 at offset 3075, found 200"):
        read_cifar(records(random_pixels(2), [0, 0], [9, 200]), "x.bin", 100, label_bytes=2)
    serve_instead(monkeypatch, mirrors, "cifar10", tar({"folder/data_batch_1.bin": b""}))
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: .*found data_batch_1\.bin"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "tiny-imagenet"])
def test_a_hostile_archive_writes_nothing(
    name: str, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pack = tar if name == "cifar10" else zipped
    serve_instead(monkeypatch, mirrors, name, pack({"../../escaped": b"evil"}))
    root = tmp_path / "deep" / "root"
    with pytest.raises(DataError, match="a name inside the archive's folder"):
        data.load(name, root)
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {data.SOURCES[name].files[0].name, ".fetch.lock"}


# JPEG


def jpeg_file(pixels: npt.NDArray, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def photos(n: int, side: int = 32, colour: bool = True) -> list[bytes]:
    shape = (n, side, side, 3) if colour else (n, side, side)
    return [jpeg_file(p) for p in generator().integers(0, 256, shape, dtype=np.uint8)]


def reference(file: bytes) -> torch.Tensor:
    image = Image.open(io.BytesIO(file)).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def npz(files: list[bytes], **changes: npt.NDArray) -> bytes:
    packed = {
        "blob": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)], dtype=np.int64),
        "labels": np.arange(len(files), dtype=np.uint8) % 3,
        "split": (np.arange(len(files)) >= len(files) - 2).astype(np.uint8),
        "class_names": np.array(["ant", "bee", "cat"]),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **(packed | changes))
    return buffer.getvalue()


def test_packed_jpegs_from_a_server(
    mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = photos(6)
    serve_instead(monkeypatch, mirrors, "tiny-imagenet-32", npz(files))
    loaded = data.load("tiny-imagenet-32", tmp_path)
    assert torch.equal(loaded.train_inputs, torch.stack([reference(f) for f in files[:4]]))
    assert torch.equal(loaded.test_inputs, torch.stack([reference(f) for f in files[4:]]))
    assert loaded.train_targets.tolist() + loaded.test_targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert loaded.names == ("ant", "bee", "cat")


def array_header(shape: str) -> bytes:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def bomb(file: bytes) -> bytes:
    """A JPEG file that says it is 65,000 pixels wide and high."""
    size = file.find(b"\xff\xc0") + 5
    return file[:size] + 2 * (65_000).to_bytes(2, "big") + file[size + 4 :]


def packed_errors() -> list[tuple[bytes, str]]:
    files = photos(3)
    sizes = [len(file) for file in files]
    total = sum(sizes)
    cut = files[1][: sizes[1] // 2]
    return [
        (npz([files[0], cut, files[2]]), f"image 1 at offset {sizes[0]} of blob: .*readable JPEG"),
        (npz([files[0], *photos(1, 16), files[2]]), "image 1 .*expected 32 x 32 pixels, found .16"),
        (
            npz([bomb(files[0]), *files[1:]]),
            "image 0 at offset 0 .*readable JPEG.* decompression bomb",
        ),
        (npz([jpeg_file(random_pixels(1)[0].T, "PNG")] * 3), "image 0 at offset 0 .*readable JPEG"),
        (npz(files, labels=np.array([0, 1, 3], np.uint8)), "expected that labels are below 3"),
        (npz(files, labels=np.array([0, 1, 2])), "expected that labels and split are bytes"),
        (npz(files, split=np.array([1, 0, 1], np.uint8)), "expected that split is 0 first, then 1"),
        (npz(files, split=np.array([0, 1, 2], np.uint8)), "expected that split is 0 or 1"),
        (npz(files, split=np.zeros(2, np.uint8)), "expected that split has 3 entries"),
        (npz(files, offsets=np.array([0, 1, total])), "expected that offsets has 4 integers"),
        (npz(files, offsets=np.array([0, 9, 5, total])), "expected that offsets grow from 0"),
        (npz(files, offsets=np.array([1, 5, 9, total])), "expected that offsets grow from 0"),
        (npz(files, offsets=np.array([0, 5, 9, total + 1])), "expected that offsets grow from 0"),
        (npz(files, blob=np.zeros(total)), "expected that blob is bytes"),
        (npz(files, labels=np.array(2, np.uint8)), "expected that every array has one axis"),
        (npz(files, class_names=np.array("ant")), "expected that every array has one axis"),
        (npz(files, blob=np.zeros((total, 2), np.uint8)), "expected that every array has one axis"),
        (zipped({"blob.npy": array_header("(10_000_000_000_000,)")}), "array 'blob.npy': "),
        (zipped({"blob.npy": array_header(f"({10**30},)")}), "array 'blob.npy': "),
        (zipped({"blob.npy": array_header("(3, ")}), "array 'blob.npy': "),
        (zipped({"blob.npy": array_header("(3,)}\n  x\n y")}), "array 'blob.npy': "),
        (zipped({"blob.npy": array_header("(3,), 9: 9")}), "array 'blob.npy': "),
        (npz(files, labels=np.array([[], {}], object)), "array 'labels.npy': Object arrays cannot"),
        (zipped({"blob.npy": b"short"}), r"array 'blob.npy': "),
        (zipped({}), "missing: .'blob'"),
        (npz(files)[:-30], "expected a complete zip archive"),
    ]


@pytest.mark.parametrize("case", range(26))
def test_wrong_packed_files_are_named(case: int) -> None:
    content, message = packed_errors()[case]
    with pytest.raises(DataError, match=rf"p\.npz: .*{message}"):
        jpeg.read_packed(content, "p.npz", 32)


def tiny_zip(**changes: bytes | None) -> tuple[bytes, list[bytes]]:
    """Two classes with two training images each (one grey), two for validation, one for test."""
    files = [*photos(3, 64), *photos(1, 64, colour=False), *photos(2, 64)]
    base = "tiny-imagenet-200"
    members = {
        f"{base}/wnids.txt": b"n02\nn01\n",
        f"{base}/words.txt": b"n01\tone\nn02\ttwo\n",
        f"{base}/test/images/test_0.JPEG": files[0],
        f"{base}/train/n01/n01_boxes.txt": b"n01_0.JPEG\t0\t0\t62\t62\n",
        f"{base}/train/n01/images/n01_0.JPEG": files[0],
        f"{base}/train/n01/images/n01_1.JPEG": files[1],
        f"{base}/val/images/val_0.JPEG": files[4],
        f"{base}/val/images/val_1.JPEG": files[5],
        f"{base}/val/val_annotations.txt": b"val_1.JPEG\tn01\t0\t9\nval_0.JPEG\tn02\t0\t9\n",
        f"{base}/train/n02/images/n02_0.JPEG": files[2],
        f"{base}/train/n02/images/n02_1.JPEG": files[3],
    }
    for name, content in changes.items():
        (path,) = (member for member in members if member.endswith(name))
        if content is None:
            del members[path]
        else:
            members[path] = content
    return zipped(members), files


@pytest.mark.parametrize("name", ["tiny-imagenet", "tiny-imagenet-224"])
def test_tiny_imagenet_from_a_server(
    name: str, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content, files = tiny_zip()
    serve_instead(monkeypatch, mirrors, name, content)
    loaded = data.load(name, tmp_path)
    assert torch.equal(loaded.train_inputs, torch.stack([reference(f) for f in files[:4]]))
    assert torch.equal(loaded.test_inputs, torch.stack([reference(f) for f in files[4:]]))
    assert loaded.train_targets.tolist() == [1, 1, 0, 0]
    assert loaded.test_targets.tolist() == [0, 1]
    assert loaded.names == ("n02", "n01")
    side = 224 if name.endswith("224") else 64
    assert loaded.input_shape == loaded.prepare(loaded.test_inputs).shape[1:] == (3, side, side)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wnids.txt": None}, "expected the lists wnids.txt and"),
        ({"val_annotations.txt": None}, "expected the lists wnids.txt and"),
        ({"val_annotations.txt": b"val_0.JPEG\tn02"}, r"val_1\.JPEG: expected a label from"),
        ({"val_annotations.txt": b"\nval_0.JPEG"}, r"val_0\.JPEG: expected a label from"),
        ({"wnids.txt": b"n02"}, r"n01_0\.JPEG: expected a label from"),
        ({"n01_1.JPEG": b"no image"}, r"n01_1\.JPEG: expected a readable JPEG"),
        ({"val_1.JPEG": photos(1, 32)[0]}, r"val_1\.JPEG: expected 64 x 64 pixels"),
    ],
)
def test_wrong_tiny_imagenet_is_named(changes: dict[str, bytes | None], message: str) -> None:
    with pytest.raises(DataError, match=rf"t\.zip: .*{message}"):
        jpeg.read_tiny_imagenet(tiny_zip(**changes)[0], "t.zip")


# The cache of what was decoded


def test_images_are_decoded_once(
    cache: Path, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name, calls = "tiny-imagenet-32", []
    real = jpeg.read_packed

    def counted(*arguments: object) -> tuple[dict[str, npt.NDArray], tuple[str, ...]]:
        calls.append(arguments)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(jpeg, "read_packed", counted)
    serve_instead(monkeypatch, mirrors, name, npz(photos(6)))
    first, second = data.load(name, tmp_path), data.load(name, tmp_path)
    assert len(calls) == 1
    assert torch.equal(first.train_inputs, second.train_inputs)
    assert torch.equal(first.test_targets, second.test_targets)
    assert (first.names, first.checksum) == (second.names, second.checksum)
    (kept,) = (cache / "decoded").iterdir()
    for damage in (b"", b"short", kept.read_bytes()[:-1] + b"\xff", kept.read_bytes()[:-9]):
        kept.write_bytes(damage)
        assert torch.equal(data.load(name, tmp_path).test_inputs, first.test_inputs)
    assert len(calls) == 5, "a damaged file is made again"
    data.load(name, tmp_path)
    assert len(calls) == 5
    other = tmp_path / "other"
    serve_instead(monkeypatch, mirrors, name, npz(photos(6)[::-1]))
    assert not torch.equal(data.load(name, other).train_inputs, first.train_inputs)
    assert len(calls) == 6, "another content is decoded for itself"
    assert [path.suffix for path in (cache / "decoded").iterdir()] == [".safetensors"] * 2


def test_a_cache_that_cannot_be_written_is_a_warning(
    cache: Path, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (cache / "decoded").write_bytes(b"a file where the folder should be")
    serve_instead(monkeypatch, mirrors, "tiny-imagenet-32", npz(photos(6)))
    with pytest.warns(UserWarning, match="it is decoded at every use"):
        loaded = data.load("tiny-imagenet-32", tmp_path)
    assert len(loaded.train_inputs) == 4


def test_a_full_disk_under_the_cache_is_a_warning(
    cache: Path, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(store, "save_file", full)
    serve_instead(monkeypatch, mirrors, "tiny-imagenet-32", npz(photos(6)))
    with pytest.warns(UserWarning, match="No space left .* it is decoded at every use"):
        loaded = data.load("tiny-imagenet-32", tmp_path)
    assert len(loaded.train_inputs) == 4
    assert list((cache / "decoded").iterdir()) == []


# Series


def csv(table: npt.NDArray) -> bytes:
    lines = [",".join(map(str, row)) for row in table.tolist()]
    return "\n".join([*lines, ""]).encode()


def dated(table: npt.NDArray) -> bytes:
    lines = csv(table).decode().splitlines()
    rows = [f"2016-07-01 {i % 24:02d}:00:00,{line}" for i, line in enumerate(lines)]
    return "\n".join(["date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT", *rows]).encode()


@pytest.mark.parametrize(
    ("name", "variables"),
    [("electricity", 321), ("traffic", 862), ("exchange_rate", 8), ("etth1", 7)],
)
def test_series_from_a_server(
    name: str,
    variables: int,
    mirrors: Mirrors,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    table = generator().integers(-50, 100, (1000, variables)) / 4
    content = dated(table) if name == "etth1" else gzip.compress(csv(table), 1)
    serve_instead(monkeypatch, mirrors, name, content)
    loaded = data.load(name, tmp_path)
    mean, deviation = table[:600].mean(0), table[:600].std(0)
    scaled = torch.from_numpy(((table - mean) / deviation).astype(np.float32))
    assert (loaded.width, loaded.outputs, loaded.classes) == (variables, variables, 0)
    parts = [
        (loaded.train_inputs, loaded.train_targets, scaled[:600]),
        (loaded.valid_inputs, loaded.valid_targets, scaled[600:800]),
        (loaded.test_inputs, loaded.test_targets, scaled[800:]),
    ]
    for inputs, targets, part in parts:
        assert len(inputs) == len(targets) == len(part) - 168 - 24 + 1
        for i in (0, len(inputs) - 1):
            torch.testing.assert_close(inputs[i], part[i : i + 168])
            torch.testing.assert_close(targets[i], part[i + 167 + 24])
    assert ("168 day" if name == "exchange_rate" else "168 hour") in loaded.note
    columns = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
    assert loaded.names == (columns if name == "etth1" else ())


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 20), st.integers(1, 3))
def test_windows_by_their_definition(length: int, horizon: int, more: int, width: int) -> None:
    series = torch.randn(length + horizon + more, width)
    inputs, targets = windows(series, length, horizon)
    assert len(inputs) == len(targets) == more + 1
    for i in range(more + 1):
        assert torch.equal(inputs[i], series[i : i + length])
        assert torch.equal(targets[i], series[i + length - 1 + horizon])
    storage = series.untyped_storage().data_ptr()
    assert inputs.untyped_storage().data_ptr() == targets.untyped_storage().data_ptr() == storage


@given(st.integers(40, 90), st.integers(1, 5), st.integers(1, 3), st.data())
def test_no_window_sees_what_comes_after_its_part(
    steps: int, length: int, horizon: int, draws: st.DataObject
) -> None:
    """Changing a step changes no part before it, and the training part only through itself."""
    table = generator().normal(size=(steps, 2))
    before = split_windows(table, (), length, horizon)
    changed = table.copy()
    step = draws.draw(st.integers(round(0.6 * steps), steps - 1), label="step")
    changed[step] += 7
    after = split_windows(changed, (), length, horizon)
    assert torch.equal(before.train[0], after.train[0])
    assert torch.equal(before.train[1], after.train[1])
    assert before.valid is not None
    assert after.valid is not None
    valid_changed = not torch.equal(before.valid[0], after.valid[0]) or not torch.equal(
        before.valid[1], after.valid[1]
    )
    test_changed = not torch.equal(before.test[0], after.test[0]) or not torch.equal(
        before.test[1], after.test[1]
    )
    border = round(0.8 * steps)
    assert not (valid_changed if step >= border else test_changed)


@given(arrays_of.arrays(np.float64, (60, 3), elements=st.floats(-1e3, 1e3, width=32)))
def test_training_part_is_normalised(table: npt.NDArray[np.float64]) -> None:
    table[:, 0] = 5.1
    parts = split_windows(table, ("a", "b", "c"), 1, 1)
    steps = torch.cat([parts.train[0][:, 0], parts.train[1][-1:]]).double()
    assert steps[:, 0].abs().max() < 1e-12, "constant but for the rounding of its mean"
    assert parts.test[0].isfinite().all()
    varied = np.ptp(table[:36], axis=0) > 1e-2 * np.abs(table[:36]).max(0) + 1e-3
    torch.testing.assert_close(
        steps.mean(0)[varied], torch.zeros(int(varied.sum())).double(), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        steps.std(0, correction=0)[varied],
        torch.ones(int(varied.sum())).double(),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "expected lines of 2 columns, found none"),
        (b"1,2\n3\n", {}, "expected 2 columns on line 2, found 1"),
        (b"1,2\n3,4,5\n", {}, "expected 2 columns on line 2, found 3"),
        (b"1,2\n\n3,4\n", {}, "expected 2 columns on line 2, found 1"),
        (b"1,2\n3,x\n", {}, "could not convert string 'x' to float64 at row 1, column 2"),
        (b"1,2\n3,\n", {}, "at row 1, column 2"),
        (b"1,2\nnan,4\n", {}, "expected a finite number on line 2, column 1, found nan"),
        (b"d,a,b\n0,1,2\n0,1,inf\n", {"header": True, "skip": 1}, "line 3, column 3, found inf"),
        (b"d,a,b\n0,1,2\n0,1\n", {"header": True, "skip": 1}, "3 columns on line 3, found 2"),
        (b"d,a,b\n", {"header": True, "skip": 1}, "expected lines of 3 columns, found none"),
    ],
)
def test_wrong_tables_are_named(content: bytes, options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=rf"s\.txt: .*{message}"):
        read_table(content, "s.txt", 2, **options)  # type: ignore[arg-type]


def test_too_short_series_is_refused() -> None:
    with pytest.raises(ValueError, match=r"10 time steps are too few .* at least 12 are needed"):
        windows(torch.zeros(10, 1), 9, 3)
    with pytest.raises(ValueError, match="at least 1, got 0 and 3"):
        windows(torch.zeros(10, 1), 0, 3)


# Text

TEXTS = (" the cat sat \n the dog <unk> \n", " the cow \n", " a cat \n")


def test_penn_treebank_from_a_server(
    mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    serve_instead(monkeypatch, mirrors, "ptb", *(text.encode() for text in TEXTS))
    short = partial(builders.penn_treebank, treebank=False, length=2)
    monkeypatch.setitem(data.SOURCES, "ptb", replace(data.SOURCES["ptb"], build=short))
    loaded = data.load("ptb", tmp_path)
    assert loaded.names == (END, "the", UNKNOWN, "cat", "dog", "sat")
    assert (loaded.width, loaded.outputs, loaded.classes) == (6, 6, 6)
    assert loaded.train_inputs.tolist() == [[1, 3], [5, 0], [1, 4]]
    assert loaded.train_targets.tolist() == [[3, 5], [0, 1], [4, 2]]
    assert loaded.valid_inputs.tolist() == [[1, 2]], "cow is unknown"
    assert loaded.test_targets.tolist() == [[3, 0]]


@given(st.integers(1, 8), st.integers(1, 5), st.data())
def test_sequences_by_their_definition(length: int, count: int, draws: st.DataObject) -> None:
    n = count * length + 1 + draws.draw(st.integers(0, length - 1), label="rest")
    stream = generator().integers(0, 50, n).astype(np.int32)
    inputs, targets = sequences(stream, length)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.flatten().tolist() == stream[: count * length].tolist()
    assert targets.flatten().tolist() == stream[1 : count * length + 1].tolist()
    assert inputs.shape == targets.shape == (count, length)
    assert inputs.untyped_storage().data_ptr() == targets.untyped_storage().data_ptr()


lines = st.lists(st.text("abc ", max_size=9), min_size=1, max_size=6)


@given(lines.filter(lambda text: any(line.strip() for line in text)))
def test_words_and_numbers_by_their_definition(text: list[str]) -> None:
    found = words("\n".join([*text, ""]).encode(), "t")
    assert found == [word for line in text for word in [*line.split(), END]]
    names = vocabulary(found)
    assert len(set(names)) == len(names) == len({*found, UNKNOWN})
    counts = [found.count(name) for name in names]
    assert counts == sorted(counts, reverse=True)
    assert [names[i] for i in encode(found, names)] == found
    assert encode(["new"], names).tolist() == [names.index(UNKNOWN)]


def test_wrong_text_is_named() -> None:
    with pytest.raises(
        DataError, match=r"t\.txt: expected UTF-8 text, found byte 0xff at offset 4"
    ):
        words(b"good\xff", "t.txt")
    with pytest.raises(DataError, match=r"t\.txt: expected text, found 3 bytes without a word"):
        words(b" \n ", "t.txt")
    with pytest.raises(ValueError, match="3 tokens are too few for one sequence of 3"):
        sequences(np.zeros(3, np.int32), 3)


@pytest.mark.extra("nltk")
def test_treebank_tokenizer_splits_contractions() -> None:
    from teleport.data.text import treebank_tokenizer

    assert treebank_tokenizer()("it 's n't <unk> cannot") == [
        "it", "'s", "n't", "<", "unk", ">", "can", "not",
    ]  # fmt: skip


def test_without_nltk_the_extra_is_named(
    mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nltk.tokenize", None)
    serve_instead(monkeypatch, mirrors, "ptb-treebank", *(text.encode() for text in TEXTS))
    with pytest.raises(DataError, match=r"pip install 'nullspace-teleport\[text\]'"):
        data.load("ptb-treebank", tmp_path)


# The IDX format

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def idx(array: Bytes) -> bytes:
    header = bytes([0, 0, UNSIGNED_BYTE, array.ndim])
    return header + np.array(array.shape, ">u4").tobytes() + array.tobytes()


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
