"""Sequences of tasks for one network with one head: what is to be learned, and how much of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from teleport.data import Dataset
from teleport.lab.experiments.choices import METHOD_NAMES
from teleport.runtime.toml import packaged_table

VALIDATION = 5000
"""Images at the end of each training split that are never trained on; tuning looks at them.

A size may say otherwise.
"""

MEAN, DEVIATION = 0.1307, 0.3081
"""Of the pixels of MNIST's training images, from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of a sequence.

    Attributes:
        data: data sets by name; one for each task, or one that the tasks are made from.
        batch_size: images of the task being learned per step.
        first_steps, steps: training steps on the first task, and on every later one.
        first_lr: learning rate of the first task, which all methods share.
        memory: images per old task that a method may keep: for its bases, or to replay.
        evaluate_size: images of every task that an evaluation looks at, the first ones.
        validation: images at the end of each training split that are never trained on.
        normalised: whether pixels get mean 0 and standard deviation 1, by those of MNIST.
    """

    data: tuple[str, ...]
    hidden: tuple[int, ...]
    batch_size: int
    first_steps: int
    steps: int
    first_lr: float
    memory: int
    evaluate_every: int
    evaluate_size: int
    bias: bool = True
    validation: int = VALIDATION
    normalised: bool = False


@dataclass(frozen=True)
class Task:
    """One task: a data set, its labels perhaps restricted, its pixels perhaps in another order.

    Attributes:
        pixels: order of the pixels, int64 ``[width]``; None leaves them.
        validation: images at the end of the training split, at most a fifth, that are not trained
            on.
    """

    dataset: Dataset
    pixels: Tensor | None = None
    validation: int = VALIDATION
    normalised: bool = False

    def images(self, inputs: Tensor) -> Tensor:
        """The task's view of images ``[n, width]``."""
        ordered = inputs if self.pixels is None else inputs[:, self.pixels]
        return (ordered - MEAN) / DEVIATION if self.normalised else ordered

    def training(self) -> tuple[Tensor, Tensor]:
        """Images, in the data set's order of pixels, and labels to learn from."""
        count = len(self.dataset.train_inputs) - self._reserved()
        return self.dataset.train_inputs[:count], self.dataset.train_targets[:count]

    def unseen(self, split: str, size: int) -> tuple[Tensor, Tensor]:
        """The first images and labels of the ``"test"`` or the ``"validation"`` split."""
        data = self.dataset
        inputs, targets = data.test_inputs, data.test_targets
        if split == "validation":
            start = len(data.train_inputs) - self._reserved()
            inputs, targets = data.train_inputs[start:], data.train_targets[start:]
        return self.images(inputs[:size]), targets[:size]

    def _reserved(self) -> int:
        return min(self.validation, len(self.dataset.train_inputs) // 5)


def _lower_then_upper_labels(sets: Sequence[Dataset], seed: int) -> list[Task]:
    half = sets[0].classes // 2
    return [Task(_labelled(sets[0], low, low + half)) for low in (0, half)]


def _orders_of_the_pixels(count: int, sets: Sequence[Dataset], seed: int) -> list[Task]:
    draws, width = torch.Generator().manual_seed(seed), sets[0].width
    return [Task(sets[0], torch.randperm(width, generator=draws)) for _ in range(count)]


def _labelled(dataset: Dataset, low: int, high: int) -> Dataset:
    """The images whose label is at least ``low`` and below ``high``."""
    train = (dataset.train_targets >= low) & (dataset.train_targets < high)
    test = (dataset.test_targets >= low) & (dataset.test_targets < high)
    return replace(
        dataset,
        train_inputs=dataset.train_inputs[train],
        train_targets=dataset.train_targets[train],
        test_inputs=dataset.test_inputs[test],
        test_targets=dataset.test_targets[test],
    )


@dataclass(frozen=True, kw_only=True)
class TaskSequence:
    """Tasks to be learned in turn.

    Attributes:
        reach: loss of a new task to which steps and seconds are counted.
        compare: loss of a new task at which the old tasks' loss is read off.
        tau: of the methods that use a null space, unless they are given another.
        methods: those it is run with unless others are asked for.
    """

    name: str
    title: str
    tasks: Callable[[Sequence[Dataset], int], list[Task]]
    reach: float
    compare: float
    tau: float
    presets: dict[str, Size]
    methods: tuple[str, ...] = METHOD_NAMES[:5]


_MAKERS: dict[str, Callable[[Sequence[Dataset], int], list[Task]]] = {
    "one task per set": lambda sets, seed: [Task(dataset) for dataset in sets],
    "lower then upper labels": _lower_then_upper_labels,
    "five orders of the pixels": partial(_orders_of_the_pixels, 5),
    "ten orders of the pixels": partial(_orders_of_the_pixels, 10),
}


def _sequence(name: str, entry: dict[str, Any]) -> TaskSequence:
    presets = {
        preset: Size(**{**size, "data": tuple(size["data"]), "hidden": tuple(size["hidden"])})
        for preset, size in entry["presets"].items()
    }
    made = {"tasks": _MAKERS[entry["tasks"]], "presets": presets}
    if "methods" in entry:
        made["methods"] = tuple(entry["methods"])
    return TaskSequence(name=name, **{**entry, **made})


SEQUENCES = {
    name: _sequence(name, entry)
    for name, entry in packaged_table("teleport.lab.keeping", "sequences.toml").items()
}
"""By name, from ``sequences.toml`` beside this module."""
