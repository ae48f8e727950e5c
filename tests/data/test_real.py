"""The real files, where they are at hand: counts that the sources state, facts seen by eye."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from teleport import data
from teleport.data import jpeg

MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def folder(name: str) -> Path:
    """The folder of a set, if its files are in the data folder; nothing is downloaded."""
    if not os.environ.get(data.ROOT_VARIABLE):
        pytest.skip(f"needs {name}: set {data.ROOT_VARIABLE} to the folder that holds it")
    (info,) = (info for info in data.available() if info.name == name)
    if info.how:
        pytest.skip(f"needs {name} in {os.environ[data.ROOT_VARIABLE]}: {info.how}")
    return Path(info.where)


def real(name: str) -> data.Dataset:
    folder(name)
    return data.load(name)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decode anew in a folder of this test run, once for all tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platformdirs.user_cache_dir", lambda name: folder)
        yield


def counts(targets: torch.Tensor) -> list[int]:
    return torch.bincount(targets).tolist()


@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("mnist", MNIST_TRAIN, MNIST_TEST),
        ("fashion-mnist", [6_000] * 10, [1_000] * 10),
        ("cifar10", [5_000] * 10, [1_000] * 10),
        ("cifar100", [500] * 100, [100] * 100),
        ("tiny-imagenet-32", [80] * 200, [20] * 200),
    ],
)
def test_image_sets_have_the_official_classes(name: str, train: list[int], test: list[int]) -> None:
    loaded = real(name)
    assert counts(loaded.train_targets) == train
    assert counts(loaded.test_targets) == test
    assert len(loaded.train_inputs) == sum(train)
    assert len(loaded.test_inputs) == sum(test)
    assert len(loaded.names) in (0, loaded.classes)


def test_cifar10_of_jpeg_files() -> None:
    """Every hundredth image: decoding all of them takes longer than the other tests together."""
    path = folder("cifar10-jpeg") / "cifar10-jpeg.npz"
    with np.load(path) as packed:
        blob, offsets, names = packed["blob"], packed["offsets"], packed["class_names"]
        labels, split = packed["labels"], packed["split"]
    assert np.bincount(labels[split == 0]).tolist() == [5_000] * 10
    assert np.bincount(labels[split == 1]).tolist() == [1_000] * 10
    assert names[3] == "cat"
    some = range(0, 60_000, 100)
    files = ((f"image {i}", blob[offsets[i] : offsets[i + 1]]) for i in some)
    pixels = jpeg.decode(files, len(some), 32) / 255.0
    # Known of the official images; sampling and JPEG move them little.
    np.testing.assert_allclose(pixels.mean((0, 2, 3)), [0.4914, 0.4822, 0.4465], atol=0.02)
    np.testing.assert_allclose(pixels.std((0, 2, 3)), [0.2470, 0.2435, 0.2616], atol=0.02)


@pytest.mark.parametrize(
    ("name", "steps", "variables"),
    [
        ("electricity", 26_304, 321),
        ("traffic", 17_544, 862),
        ("exchange_rate", 7_588, 8),
        ("etth1", 17_420, 7),
    ],
)
def test_series_have_the_stated_lengths(name: str, steps: int, variables: int) -> None:
    loaded = real(name)
    parts = (loaded.train_inputs, loaded.valid_inputs, loaded.test_inputs)
    assert sum(len(inputs) + 168 + 24 - 1 for inputs in parts) == steps
    assert loaded.input_shape == (168, variables)
    assert all(inputs.isfinite().all() for inputs in parts)
    everything = torch.cat([loaded.train_inputs[::168].flatten(0, 1), loaded.train_targets])
    assert everything.mean(0).abs().max() < 0.2
    assert (everything.std(0) - 1).abs().max() < 0.2
    if name == "etth1":
        assert loaded.names == ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")


def test_penn_treebank_has_the_stated_counts() -> None:
    loaded = real("ptb")
    assert loaded.classes == len(loaded.names) == 10_000
    for tokens, inputs in (
        (929_589, loaded.train_inputs),
        (73_760, loaded.valid_inputs),
        (82_430, loaded.test_inputs),
    ):
        assert inputs.shape == ((tokens - 1) // 256, 256)
    first = [loaded.names[token] for token in loaded.train_inputs[0, :4]]
    assert first == ["aer", "banknote", "berlitz", "calloway"]
    unknown = loaded.names.index("<unk>")
    assert (loaded.test_inputs == unknown).double().mean() < 0.07


@pytest.mark.parametrize("name", ["mnist", "cifar10-jpeg", "exchange_rate", "etth1", "ptb"])
def test_real_files_are_verified(name: str) -> None:
    folder(name)
    assert {status.state for status in data.verify(name)} == {"ok"}
