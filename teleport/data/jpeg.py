"""Images stored as JPEG files: the official Tiny-ImageNet-200 archive and the packed npz layout."""

from collections.abc import Iterable
from io import BytesIO
from itertools import pairwise
from pathlib import PurePosixPath
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

from teleport.data.archive import zip_members
from teleport.data.images import Bytes
from teleport.errors import DataError

# What the reader of arrays raises on damaged headers, such as one of more bytes than there are.
NPY_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    TokenError,
    EOFError,
    OverflowError,
    MemoryError,
    RecursionError,
)
PACKED = ("blob", "offsets", "labels", "split", "class_names")


def decode(files: Iterable[tuple[str, Any]], count: int, side: int) -> Bytes:
    """Decode ``count`` JPEG files of ``side`` x ``side`` pixels, each with its name for messages.

    Returns:
        uint8 ``[count, 3, side, side]``, red, green, blue; grey images have three equal planes.

    Raises:
        DataError: A file is not a JPEG, is damaged or has another size; the message names it.
    """
    from PIL import Image  # late: most data sets are no JPEG files

    images = np.empty((count, 3, side, side), np.uint8)
    for row, (where, content) in zip(images, files, strict=True):
        try:
            with Image.open(BytesIO(content), formats=["JPEG"]) as image:
                if image.size != (side, side):  # known before anything is decoded
                    raise DataError(f"{where}: expected {side} x {side} pixels, found {image.size}")
                row[:] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{where}: expected a readable JPEG file, found: {error}") from error
    return images


def read_packed(
    content: bytes, where: str, side: int
) -> tuple[dict[str, npt.NDArray], tuple[str, ...]]:
    """Read the npz layout in which all JPEG files lie one after the other.

    ``blob`` uint8 holds the files, file i is ``blob[offsets[i]:offsets[i + 1]]``; ``labels`` are
    classes, ``split`` is 0 for training and 1 for test, training first; ``class_names`` are text.

    Returns:
        ``images`` uint8 ``[n, 3, side, side]``, ``labels`` uint8 and ``split`` uint8; and the class
        names.

    Raises:
        DataError: An array is missing or does not fit the others, or an image is damaged. The
            message names the file, ``where``, and the image with its offset.
    """
    packed = _npz(content, where)
    blob, offsets, labels, split, names = (packed[name] for name in PACKED)
    _check_packed(where, blob, offsets, labels, split, names)
    files = (
        (f"{where}: image {i} at offset {start} of blob", blob[start:end])
        for i, (start, end) in enumerate(pairwise(offsets.tolist()))
    )
    images = decode(files, len(labels), side)
    return {"images": images, "labels": labels, "split": split}, tuple(map(str, names))


def read_tiny_imagenet(
    content: bytes, where: str, side: int = 64
) -> tuple[dict[str, npt.NDArray], tuple[str, ...]]:
    """Read the official archive of Tiny-ImageNet-200.

    The labelled training and validation images are read; the official test images have no labels.

    Returns:
        ``images`` uint8 ``[n, 3, side, side]``, ``labels`` uint8 ``[n]`` and ``split`` uint8
        ``[n]``, 0 for training and 1 for validation, training first, in the order of the archive;
        and the class names, WordNet ids in the order of ``wnids.txt``.

    Raises:
        DataError: The archive is unsafe or damaged, a list is missing, an image has no label.
    """
    names: tuple[str, ...] = ()
    annotations: dict[str, str] = {}
    images: dict[str, list[tuple[str, bytes]]] = {"train": [], "val": []}
    for member, data in zip_members(content, where):
        path = PurePosixPath(member)
        part = path.parts[1] if len(path.parts) > 2 else ""
        if path.name == "wnids.txt":
            names = tuple(data.decode("ascii", "replace").split())
        elif path.name == "val_annotations.txt":
            lines = data.decode("ascii", "replace").splitlines()
            annotations = {line.split("\t")[0]: f"{line}\t".split("\t")[1] for line in lines}
        elif path.suffix == ".JPEG" and part in images:
            images[part].append((member, data))
    if not names or not annotations:
        raise DataError(f"{where}: expected the lists wnids.txt and val/val_annotations.txt")
    wanted = images["train"] + images["val"]
    owners = [PurePosixPath(member).parts[2] for member, _ in images["train"]]
    owners += [annotations.get(PurePosixPath(member).name, "") for member, _ in images["val"]]
    labels = _numbers(owners, names, [f"{where}: {member}" for member, _ in wanted])
    split = np.repeat(np.array([0, 1], np.uint8), [len(images["train"]), len(images["val"])])
    files = ((f"{where}: {member}", data) for member, data in wanted)
    decoded = decode(files, len(wanted), side)
    return {"images": decoded, "labels": labels, "split": split}, names


def _npz(content: bytes, where: str) -> dict[str, npt.NDArray]:
    arrays = {}
    for member, data in zip_members(content, where):
        try:
            array = np.lib.format.read_array(BytesIO(data), allow_pickle=False)
        except NPY_ERRORS as error:
            raise DataError(f"{where}: array {member!r}: {error}") from error
        arrays[member.removesuffix(".npy")] = array
    missing = [name for name in PACKED if name not in arrays]
    if missing:
        raise DataError(f"{where}: expected arrays {', '.join(PACKED)}; missing: {missing}")
    return arrays


def _check_packed(where: str, *arrays: npt.NDArray) -> None:
    blob, offsets, labels, split, names = arrays
    n = labels.size
    fits = {
        "every array has one axis": all(array.ndim == 1 for array in arrays),
        "blob is bytes": blob.dtype == np.uint8,
        "labels and split are bytes": labels.dtype == split.dtype == np.uint8,
        f"split has {n} entries": split.shape == labels.shape == (n,),
        f"offsets has {n + 1} integers": offsets.dtype == np.int64 and offsets.shape == (n + 1,),
    }
    if all(fits.values()):
        fits["offsets grow from 0 to the end of blob"] = bool(
            offsets[0] == 0 and offsets[-1] == len(blob) and (np.diff(offsets) > 0).all()
        )
        fits[f"labels are below {len(names)}"] = bool((labels < len(names)).all())
        fits["split is 0 first, then 1"] = bool((np.diff(np.append([0], split)) >= 0).all())
        fits["split is 0 or 1"] = bool((split <= 1).all())
    wrong = [rule for rule, holds in fits.items() if not holds]
    if wrong:
        raise DataError(f"{where}: expected that {wrong[0]}")


def _numbers(owners: list[str], names: tuple[str, ...], files: list[str]) -> Bytes:
    number = {name: i for i, name in enumerate(names)}
    unknown = [file for file, owner in zip(files, owners, strict=True) if owner not in number]
    if unknown:
        raise DataError(f"{unknown[0]}: expected a label from wnids.txt for this image")
    return np.array([number[owner] for owner in owners], np.uint8)
