"""A data set in memory: one shape for images, sequences, series and text.

Inputs and targets are plain tensors whose first axis counts the examples. Two things keep them
small: colour images stay unsigned bytes until a batch is prepared, and overlapping windows of a
series are a strided view of it, one copy in memory for all windows. `take` reads such views as
fast as ordinary tensors.

=========  =======================  =================  =============  ======================
kind       inputs                   targets            loss           the network returns
=========  =======================  =================  =============  ======================
images     float32 [n, pixels] or   int64 [n]          cross entropy  [n, outputs]
           uint8 [n, 3, h, w]
sequences  float32 [n, time, d]     int64 [n]          cross entropy  [n, outputs]
windows    float32 [n, time, d]     float32 [n, d]     mean squares   [n, outputs]
tokens     int64 [n, time]          int64 [n, time]    cross entropy  [n, time, outputs]
=========  =======================  =================  =============  ======================
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

DataKind = Literal["images", "sequences", "windows", "tokens"]
LossKind = Literal["cross_entropy", "mse"]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Parts:
    """What the builder of a set makes of its files.

    Attributes:
        valid: Inputs and targets of the validation part, where the set has one.
        names: Names of the classes, the variables or the words, in the order of their numbers.
    """

    train: Pair
    test: Pair
    valid: Pair | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, one example per row; the module's table gives the shapes.

    Attributes:
        train_inputs: Inputs of the training part; `prepare` makes a network's inputs of them.
        train_targets: Classes ``[n]``, values ``[n, d]`` or next tokens ``[n, time]``.
        classes: Number of classes or of words in the vocabulary; 0 for a regression.
        checksum: Short hex digest of the file contents and the way they were read and split.
        valid_inputs: Inputs of the validation part; empty where the set has none.
        names: Names of the classes, variables or words, in order; empty where unknown.
        resize: Side in pixels to which `prepare` resizes images; 0 leaves them as they are.
        note: Split, units and normalisation in one sentence, for the record.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    classes: int
    checksum: str
    source: str
    kind: DataKind = "images"
    valid_inputs: Tensor = field(default_factory=lambda: torch.empty(0))
    valid_targets: Tensor = field(default_factory=lambda: torch.empty(0))
    names: tuple[str, ...] = ()
    resize: int = 0
    note: str = ""

    @property
    def width(self) -> int:
        """Input features: pixels of a flat image, colour channels, variables, or vocabulary."""
        if self.kind == "tokens":
            return self.classes
        feature_axis = 1 if self.kind == "images" else -1
        return self.train_inputs.shape[feature_axis]

    @property
    def outputs(self) -> int:
        """Width of the network's last axis: classes, vocabulary or variables."""
        return self.classes or self.train_targets.shape[-1]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one prepared input."""
        shape = tuple(self.train_inputs.shape[1:])
        return (*shape[:-2], self.resize, self.resize) if self.resize else shape

    @property
    def loss_kind(self) -> LossKind:
        """Name of the loss: ``"mse"`` for windows, otherwise ``"cross_entropy"``."""
        return "mse" if self.kind == "windows" else "cross_entropy"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over all targets; outputs are shaped as the module's table says.

        Returns:
            A scalar: mean squared error for windows, cross entropy otherwise (over all positions
            for tokens).
        """
        if self.loss_kind == "mse":
            return functional.mse_loss(outputs, targets)
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def prepare(self, inputs: Tensor) -> Tensor:
        """Make a network's inputs of some rows of stored ones, on the device where they are.

        Bytes become float32 divided by 255, in [0, 1], and resized where the set says so
        (bilinear). All other inputs come back as they are.
        """
        if inputs.dtype != torch.uint8:
            return inputs
        scaled = inputs.to(torch.float32).div_(255)
        if not self.resize:
            return scaled
        return functional.interpolate(scaled, size=(self.resize, self.resize), mode="bilinear")

    def to(self, device: torch.device | str) -> "Dataset":
        """Copy all tensors to a device; windows arrive there as views, not as copies."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {
            name: _moved(value, device)
            for name, value in tensors.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def take(tensor: Tensor, rows: Tensor) -> Tensor:
    """Gather rows of a tensor, also of a view of overlapping windows.

    Equal to ``tensor[rows]``. A view whose first two axes advance by the same stride, as windows of
    a series do, is gathered from the series beneath it by index arithmetic, which is about ten
    times as fast as gathering from the view.

    Args:
        tensor: Any tensor ``[n, ...]``.
        rows: int64 ``[k]`` on the same device, each in 0 to n - 1.

    Returns:
        A contiguous tensor ``[k, ...]``.
    """
    if tensor.dim() < 2 or tensor.stride(0) != tensor.stride(1) or not tensor.numel():
        return tensor.index_select(0, rows)
    n, time, *rest = tensor.shape
    step, _, *strides = tensor.stride()
    beneath = tensor.as_strided((n + time - 1, *rest), (step, *strides))
    positions = rows[:, None] + torch.arange(time, device=rows.device)
    return beneath.index_select(0, positions.flatten()).reshape(len(rows), time, *rest)


def batches(
    inputs: Tensor, targets: Tensor, size: int, generator: torch.Generator
) -> Iterator[Pair]:
    """Make one shuffled pass over tensors in memory.

    The permutation is drawn when this function is called. The last short batch is dropped, so
    that an epoch always has ``n // size`` steps.

    Args:
        inputs: Tensor ``[n, ...]``.
        targets: Tensor ``[n, ...]`` on the same device.
        size: Rows per batch.
        generator: Source of the shuffle; it may live on another device than the tensors.

    Returns:
        An iterator of pairs ``(inputs [size, ...], targets [size, ...])``.

    Raises:
        ValueError: ``size`` is not between 1 and n, or the lengths of the tensors differ.
    """
    n = len(inputs)
    if len(targets) != n:
        raise ValueError(f"inputs and targets differ in length: {n} and {len(targets)}")
    if not 1 <= size <= n:
        raise ValueError(f"batch size {size} is outside the allowed range 1 to {n}")
    order = torch.randperm(n, generator=generator, device=generator.device)
    kept = order[: n - n % size].to(inputs.device)
    return ((take(inputs, rows), take(targets, rows)) for rows in torch.split(kept, size))


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Move the memory a view covers, then lay the same view over the copy."""
    shape, strides = tensor.shape, tensor.stride()
    steps = zip(shape, strides, strict=True)
    covered = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    return tensor.as_strided((covered,), (1,)).to(device).as_strided(shape, strides)
