"""Bases in a safetensors file: each once, whoever shares it.

The metadata hold ``layers``, in their order: for each name the kind and dtype of every side of its
basis, or the name of the layer whose basis it shares. Format 1 had no shared bases, and no number.
A checksum tells a damaged file, whose bases would keep something else; older files have none.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from teleport.errors import NullSpaceError
from teleport.layers.one_hot import AxisBasis
from teleport.layers.shared_weight import TiedBasis
from teleport.subspace import Basis, Projector

FORMAT = 2

_KINDS: dict[str, Any] = {"rows": Basis, "axes": AxisBasis}
_FIELDS = {"rows": ("vectors", "singular_values", "ranks"), "axes": ("kept", "counts")}


def write(path: Path, bases: dict[str, Projector], frozen: dict[str, str]) -> None:
    """Write bases and reasons; a file that was there stays if that fails.

    Raises:
        NullSpaceError: if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, list[str]] | str] = {}
    first: dict[int, str] = {}
    for name, basis in bases.items():
        leader = first.setdefault(id(basis), name)
        layers[name] = leader if leader != name else _add(tensors, name, basis)
    about = {
        "format": str(FORMAT),
        "layers": json.dumps(layers),
        "frozen": json.dumps(frozen),
    }
    about["checksum"] = _checksum(tensors, about)
    try:
        with replacing(path) as unfinished:
            save_file(tensors, str(unfinished), metadata=about)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: of a name none can be
        raise NullSpaceError(
            f"the null space cannot be written to {path}: {error}. Give a file in a folder that "
            "exists, may be written to and has room"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what gets this name at the end; if that fails, a file that was there stays.

    It has the same name in a folder of its own: another process, on another machine with the same
    folder too, has another, and a name is as long as it was given.
    """
    with tempfile.TemporaryDirectory(
        prefix=".new-", dir=path.parent, ignore_cleanup_errors=True
    ) as scratch:
        part = Path(scratch) / path.name
        part.touch()
        mode = (path if path.exists() else part).stat().st_mode
        yield part
        part.chmod(S_IMODE(mode))  # safetensors makes files that nobody else can read
        os.replace(part, path)


def read(path: Path) -> tuple[dict[str, Projector], dict[str, str]]:
    """Read what `write` wrote, in this format or the one before.

    Raises:
        NullSpaceError: if the file holds something else, is damaged, or is of a later format.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            if int(about.get("format", 1)) > FORMAT:
                raise NullSpaceError(
                    f"{path} is of format {about['format']}; this version of teleport reads up to "
                    f"format {FORMAT}: update it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about.get("checksum", "") not in {"", _checksum(tensors, about)}:
            raise NullSpaceError(
                f"{path} is damaged: what it holds is not what was written. Copy it anew, or make "
                "the space anew"
            )
        bases: dict[str, Projector] = {}
        for name, sides in json.loads(about["layers"]).items():
            shared = isinstance(sides, str)
            bases[name] = bases[sides] if shared else _basis(tensors, name, sides)
        return bases, json.loads(about.get("frozen", "{}"))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise NullSpaceError(f"{path} holds no saved null space: {error}") from error


def _add(tensors: dict[str, Tensor], name: str, basis: Projector) -> dict[str, list[str]]:
    """Add the tensors of a basis, and tell what they are."""
    sides: dict[str, list[str]] = {}
    for side, simple in _sides(basis).items():
        kind = next(k for k, of in _KINDS.items() if isinstance(simple, of))
        sides[side] = [kind, str(simple.dtype)]
        for field in _FIELDS[kind]:
            tensors[f"{name}/{side}/{field}"] = getattr(simple, field).contiguous()
    return sides


def _basis(tensors: Mapping[str, Tensor], name: str, sides: dict[str, list[str]]) -> Projector:
    def simple(side: str, kind: str, dtype: str) -> Projector:
        fields = {f: tensors[f"{name}/{side}/{f}"] for f in _FIELDS[kind]}
        known = getattr(torch, dtype.removeprefix("torch."))
        basis: Projector = _KINDS[kind](**fields, dtype=known)
        return basis

    parts = {side: simple(side, *of) for side, of in sides.items()}
    return TiedBasis(**parts) if "other" in parts else parts["own"]


def _sides(basis: Projector) -> dict[str, Projector]:
    """What a projector is made of."""
    if isinstance(basis, TiedBasis):
        return {"own": basis.own, "other": basis.other}
    return {"own": basis}


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Of all that a file says, its own checksum left out."""
    texts = {key: text for key, text in about.items() if key != "checksum"}
    crc = zlib.crc32(json.dumps(texts, sort_keys=True).encode())
    for name in sorted(tensors):
        content = tensors[name].reshape(-1).view(torch.uint8).cpu().numpy().data
        crc = zlib.crc32(content, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
