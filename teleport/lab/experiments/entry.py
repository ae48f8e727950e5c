"""What a named experiment consists of: data, network, sizes, learning rates.

Nothing here loads PyTorch before a network is built.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from teleport.lab.experiments.choices import ACTIVATION_NAMES, INITS, READOUTS
from teleport.lab.records.schema import WIDTH, Kind
from teleport.schedule import Schedule

if TYPE_CHECKING:
    from torch.nn import Module

    from teleport.data import Dataset
else:  # names for whoever checks types while the program runs
    Module, Dataset = "torch.nn.Module", "teleport.data.Dataset"

Entry = TypeVar("Entry")

NATURALS = Kind(
    "a list of integers >= 1",
    lambda v: isinstance(v, list) and bool(v) and all(map(WIDTH.holds, v)),
)
NAME = Kind("a text", lambda v: isinstance(v, str) and bool(v))
INITIALISATION = Kind(f"one of {', '.join(INITS)}", lambda v: v in INITS)
READOUT = Kind(f"one of {', '.join(READOUTS)}", lambda v: v in READOUTS)

SCHEDULES = {
    "default": Schedule(epochs=1, batches=1, warmup_steps=50),
    "paper": Schedule(epochs=5, batches=32, warmup_steps=0),
}
"""``default``: once, early (``paper`` is section 4.1 of the paper: first 5 epochs, 32 batches)."""


def one_of(what: str, name: str, known: Mapping[str, Entry]) -> Entry:
    """The entry of this name; ValueError for an unknown one, with those there are."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; there are: {', '.join(known)}")
    return known[name]


@dataclass(frozen=True)
class Preset:
    """The size of an experiment.

    Attributes:
        train_size: training examples used, the first ones; None for all.
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
        network: ``kind``, one of `SIZES`, and its sizes.
        teleport: what the paper's schedule needs.
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
        """The network for data, at PyTorch's initial values; errors as of `check_activation`."""
        # Late, for the table is read without PyTorch.
        from teleport.lab.experiments.networks import MAKERS

        self.check_activation(activation)
        sizes = {**self.network, **preset.network}
        kind = sizes.pop("kind")
        if kind == "mlp":
            sizes["activation"] = activation
        return MAKERS[kind](dataset, sizes)


_BLOCKS = {"width": WIDTH, "blocks": WIDTH, "readout": READOUT}

SIZES: dict[str, dict[str, Kind]] = {
    "mlp": {"hidden": NATURALS},
    "cnn": {"channels": NATURALS},
    "residual": {"widths": NATURALS},
    "resnet18": {"width": WIDTH},
    "transformer": {"heads": WIDTH, **_BLOCKS},
    "mamba": {"state": WIDTH, **_BLOCKS},
    "ttt": {"inner_batch": WIDTH, **_BLOCKS},
}
"""The kinds of networks, each with its sizes and their checks; `networks` makes them."""
