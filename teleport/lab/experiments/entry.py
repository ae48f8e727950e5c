"""What a named experiment consists of: data, network, sizes, learning rates.

Nothing here loads PyTorch before a network is built.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from teleport.lab.experiments.choices import ACTIVATION_NAMES, INITS, READOUTS

if TYPE_CHECKING:
    from torch.nn import Module

    from teleport.data import Dataset
else:  # names for whoever checks types while the program runs
    Module, Dataset = "torch.nn.Module", "teleport.data.Dataset"

Condition = Callable[[Any], bool]


def is_natural(value: Any) -> bool:
    """Whether it is an integer >= 1."""
    return type(value) is int and value >= 1


def is_count(value: Any) -> bool:
    """Whether it is an integer >= 0."""
    return type(value) is int and value >= 0


def is_positive(value: Any) -> bool:
    """Whether it is a number > 0, and finite also as a float."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def is_naturals(value: Any) -> bool:
    """Whether it is a list of integers >= 1."""
    return isinstance(value, list) and bool(value) and all(map(is_natural, value))


def is_text(value: Any) -> bool:
    """Whether it is a text and not empty."""
    return isinstance(value, str) and bool(value)


def is_initialisation(value: Any) -> bool:
    """Whether it is one of `INITS`."""
    return value in INITS


def is_readout(value: Any) -> bool:
    """Whether it is one of `READOUTS`."""
    return value in READOUTS


def one_of(what: str, name: str, known: Mapping[str, Any]) -> Any:
    """The entry of this name.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; there are: {', '.join(known)}")
    return known[name]


ALLOWED: dict[Condition, str] = {
    is_natural: "an integer >= 1",
    is_count: "an integer >= 0",
    is_positive: "a number > 0",
    is_naturals: "a list of integers >= 1",
    is_text: "a text",
    is_initialisation: f"one of {', '.join(INITS)}",
    is_readout: f"one of {', '.join(READOUTS)}",
}
"""What each check lets pass, for messages."""


@dataclass(frozen=True)
class Preset:
    """The size of an experiment.

    Attributes:
        epochs: passes over the training data.
        train_size: training examples used, the first ones; None for all.
        evaluate_every: training steps between evaluations.
        evaluate_size: examples of each split an evaluation looks at, the first ones.
        network: sizes of the network that differ from the experiment's.
    """

    epochs: int
    evaluate_every: int
    evaluate_size: int
    train_size: int | None = None
    network: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """Learning rates and initial gain of the default arms for one optimizer.

    Attributes:
        on: the experiment that they were tuned for; another one lends them.
        low: a learning rate of the paper's kind, well below the best (its Table 1 is lost).
        tuned: the best constant learning rate with PyTorch's initialisation.
        gain_lr: the best learning rate together with the initial gain.
        init: initialisation of that; see `teleport.models.initialise`.
        head_gain: factor on the initial weights of the head.
    """

    on: str
    low: float
    tuned: float
    gain_lr: float
    init: str
    head_gain: float


@dataclass(frozen=True)
class PaperTeleport:
    """What the paper's schedule needs to know of an experiment.

    Attributes:
        lr: fixed teleport step size, the paper's eta.
        cap: bound on the gradient norm, its CAP.
        warmup_steps: training steps before the first teleport.
        n: examples of a teleport batch, with every schedule.
        held_out: training examples on which the drift outside the batch is measured.
    """

    lr: float
    cap: float
    warmup_steps: int
    n: int
    held_out: int


@dataclass(frozen=True)
class Experiment:
    """A data set, a network on it, and sizes.

    Attributes:
        name: what the command line calls it.
        title: what figures call it.
        data: name of the data set.
        network: ``kind``, one of `SIZES`, and its sizes.
        batch_size: of training.
        teleport: what the paper's schedule needs.
        presets: sizes by name.
        tuning: by optimizer.
        tuning_of: the experiment whose learning rates hold for optimizers that ``tuning`` would not
            name; None if there is none.
        marks: ``"paper"`` or ``"ours"`` for every key, such as ``network.hidden``.
    """

    name: str
    title: str
    data: str
    network: dict[str, Any]
    batch_size: int
    teleport: PaperTeleport
    presets: dict[str, Preset]
    tuning: dict[str, Tuning]
    tuning_of: str | None
    marks: dict[str, str]

    def check_activation(self, activation: str) -> None:
        """Raise ValueError for an activation that the network cannot have."""
        one_of("activation", activation, dict.fromkeys(ACTIVATION_NAMES))
        kind = self.network["kind"]
        if kind != "mlp" and activation != "relu":
            raise ValueError(f"the network {kind!r} of {self.name} has relu; got {activation!r}")

    def build(self, dataset: Dataset, preset: Preset, activation: str = "relu") -> Module:
        """The network for a data set, at PyTorch's initial values.

        Raises:
            ValueError: as `check_activation`.
        """
        from teleport.lab.experiments.networks import (
            MAKERS,  # late: the table is read without PyTorch
        )

        self.check_activation(activation)
        sizes = {**self.network, **preset.network}
        kind = sizes.pop("kind")
        if kind == "mlp":
            sizes["activation"] = activation
        return MAKERS[kind](dataset, sizes)


SIZES: dict[str, dict[str, Condition]] = {
    "mlp": {"hidden": is_naturals},
    "cnn": {"channels": is_naturals},
    "residual": {"widths": is_naturals},
    "resnet18": {"width": is_natural},
    "transformer": {
        "heads": is_natural,
        "width": is_natural,
        "blocks": is_natural,
        "readout": is_readout,
    },
    "mamba": {
        "width": is_natural,
        "blocks": is_natural,
        "state": is_natural,
        "readout": is_readout,
    },
    "ttt": {
        "width": is_natural,
        "blocks": is_natural,
        "inner_batch": is_natural,
        "readout": is_readout,
    },
}
"""The kinds of networks, each with its sizes and their checks; `networks` makes them."""
