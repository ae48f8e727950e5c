"""How far one step travels through the package: files entered, and changes of file on the way.

``python -m tests.support.trace`` prints both, and between which files.
"""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

import teleport

PACKAGE = Path(teleport.__file__).parent


class Trip(NamedTuple):
    """What a profile hook saw of one `Teleporter.step`.

    Attributes:
        files: those of the package in which a function was called.
        changes: how often a function was called in another file than the one called before it, by
            the two files. Comprehensions and lambdas count with the function they stand in.
    """

    files: set[str]
    changes: Counter[tuple[str, str]]


def trip() -> Trip:
    """One step of a three-layer perceptron; the first, which imports, is not counted."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    x, y = torch.randn(100, 784), torch.randint(10, (100,))
    teleporter, found = teleport.Teleporter(model), Trip(set(), Counter())
    last = ""

    def hook(frame: FrameType, event: str, _: Any) -> None:
        nonlocal last
        path = Path(frame.f_code.co_filename)
        if event != "call" or PACKAGE not in path.parents or "<" in frame.f_code.co_name:
            return
        name = str(path.relative_to(PACKAGE))
        found.files.add(name)
        if last not in ("", name):
            found.changes[last, name] += 1
        last = name

    def closure() -> torch.Tensor:
        return functional.cross_entropy(model(x), y)

    teleporter.step(closure)
    sys.setprofile(hook)
    try:
        teleporter.step(closure)
    finally:
        sys.setprofile(None)
    return found


def main() -> None:
    found = trip()
    lines = [f"{len(found.files)} files, {found.changes.total()} changes of file"]
    lines += [f"{n:4d}  {a} -> {b}" for (a, b), n in found.changes.most_common()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
