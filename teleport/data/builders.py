"""From the checked files of a set to its parts: one function per format."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from teleport.data import images, jpeg, series, text
from teleport.data.archive import tar_members
from teleport.data.dataset import Parts
from teleport.data.store import Checked, Decoded, decoded_once
from teleport.errors import DataError


def idx_images(files: Sequence[Checked], train: int, shape: tuple[int, ...] = (784,)) -> Parts:
    """Build MNIST or Fashion-MNIST of IDX files, images and labels in turn.

    The first ``train`` images are the training part; each gets ``shape``: flat, or as a sequence
    ``(time, features)``.

    Returns:
        Inputs float32 ``[n, *shape]``, pixels divided by 255, and targets int64 ``[n]``.

    Raises:
        DataError: A file is no IDX file, images and labels differ in number, or a label is not
            one of ten classes.
    """
    arrays = [images.read_idx(file.content, str(file.path)) for file in files]
    for file, pixels, labels in zip(files[0::2], arrays[0::2], arrays[1::2], strict=True):
        if pixels.shape[1:] != (28, 28) or labels.shape != pixels.shape[:1]:
            raise DataError(
                f"{file.path}: expected shape {(*labels.shape, 28, 28)}, found {pixels.shape}"
            )
    for file, labels in zip(files[1::2], arrays[1::2], strict=True):
        images.check_labels(labels, str(file.path), 10, start=8)
    scaled = np.concatenate(arrays[0::2]).astype(np.float32)
    inputs = torch.from_numpy(scaled).div_(255).view(len(scaled), *shape)
    targets = torch.from_numpy(np.concatenate(arrays[1::2]).astype(np.int64))
    return Parts((inputs[:train], targets[:train]), (inputs[train:], targets[train:]))


def cifar(files: Sequence[Checked], classes: int, label_bytes: int, lists: str) -> Parts:
    """Build CIFAR-10 or CIFAR-100 from the ``.tar.gz`` archive of the binary distribution.

    A record has ``label_bytes`` labels, of which the last is used; ``lists`` is the text file in
    the archive that holds the class names.

    Returns:
        Inputs uint8 ``[n, 3, 32, 32]`` and targets int64 ``[n]``, in the official order.

    Raises:
        DataError: The archive is unsafe or damaged, or a member is missing or wrong.
    """
    (file,) = files
    members = {
        name.split("/")[-1]: (name, content)
        for name, content in tar_members(file.content, str(file.path))
        if name.endswith((".bin", lists))
    }
    test = [name for name in members if name.startswith("test") and name.endswith(".bin")]
    train = sorted(name for name in members if name.endswith(".bin") and name not in test)
    if not train or len(test) != 1 or lists not in members:
        raise DataError(
            f"{file.path}: expected .bin files for training, one for test, and {lists}; "
            f"found {', '.join(sorted(members)) or 'none of them'}"
        )

    def part(names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        read = [
            images.read_cifar(members[n][1], f"{file.path}: {members[n][0]}", classes, label_bytes)
            for n in names
        ]
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
        return torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))

    names = tuple(members[lists][1].decode("ascii", "replace").split())
    return Parts(part(train), part(test), names=names)


def packed_jpegs(files: Sequence[Checked], key: str, side: int) -> Parts:
    """Build a set of JPEG files in the packed npz layout; decoded once, then read from the cache.

    Returns:
        Inputs uint8 ``[n, 3, side, side]`` and targets int64 ``[n]``.

    Raises:
        DataError: The file is not of this layout, or an image is damaged.
    """
    return _decoded(key, files, jpeg.read_packed, side)


def tiny_imagenet(files: Sequence[Checked], side: int = 64) -> Parts:
    """Build Tiny-ImageNet-200 of the official zip; decoded once, then read from the cache.

    Returns:
        Inputs uint8 ``[n, 3, side, side]`` and targets int64 ``[n]``. The official validation
        images are the test part, because the official test images have no labels.

    Raises:
        DataError: The archive is unsafe or damaged, or an image is damaged or has no label.
    """
    return _decoded("tiny-imagenet", files, jpeg.read_tiny_imagenet, side)


def table(
    files: Sequence[Checked], variables: int, *, header: bool = False, skip: int = 0
) -> Parts:
    """Build a multivariate time series of a table of numbers; see `series.read_table`.

    Returns:
        Windows of 168 steps with the step 24 after the last; see `series.split_windows`.

    Raises:
        DataError: The file is not such a table.
    """
    (file,) = files
    read = series.read_table(file.content, str(file.path), variables, header=header, skip=skip)
    return series.split_windows(*read)


def penn_treebank(files: Sequence[Checked], *, treebank: bool, length: int = text.LENGTH) -> Parts:
    """Build Penn Treebank of its three texts, training first, for predicting the next token.

    Words are split at spaces, or with ``treebank`` as in the paper, by NLTK's tokenizer.

    Returns:
        Inputs and targets int64 ``[n, length]``; the names are the vocabulary of the training
        text.

    Raises:
        DataError: A file is not text, or NLTK is wanted and not installed.
    """

    def decode() -> Decoded:
        tokenizer = text.treebank_tokenizer() if treebank else str.split
        split = [text.words(file.content, str(file.path), tokenizer) for file in files]
        names = text.vocabulary(split[0])
        streams = zip(("train", "valid", "test"), split, strict=True)
        return Decoded({name: text.encode(words, names) for name, words in streams}, names)

    decoded = decoded_once("ptb-treebank" if treebank else "ptb", files, decode)
    cut = partial(text.sequences, length=length)
    return Parts(**{k: cut(v) for k, v in decoded.arrays.items()}, names=decoded.names)


def _decoded(key: str, files: Sequence[Checked], read: Callable[..., Any], side: int) -> Parts:
    (file,) = files
    decoded = decoded_once(key, files, lambda: Decoded(*read(file.content, str(file.path), side)))
    pixels, labels, split = (decoded.arrays[name] for name in ("images", "labels", "split"))
    train = int(np.count_nonzero(split == 0))
    inputs, targets = torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))
    parts = (inputs[:train], targets[:train]), (inputs[train:], targets[train:])
    return Parts(*parts, names=decoded.names)
