"""What is trained and how: settings, arms, and the arms that every comparison needs.

An experiment is a data set and a network; an arm is one way to train it. All arms of a seed share
the initial random state and the order of the data, so they differ in nothing but what their name
says. The default arms put beside each teleport its own baseline (the same learning rate and initial
gain): at a low learning rate, at the tuned one, and at the tuned rate and initial gain together,
which is what a teleport has to beat to be of use.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from teleport.lab.experiments.entry import SCHEDULES, Experiment, Preset, Tuning, one_of
from teleport.lab.experiments.interventions import MOVES, ON_THE_OPTIMIZER, OTHER_OBJECTIVES
from teleport.lab.experiments.optimizers import find_optimizer
from teleport.lab.experiments.table import find_experiment
from teleport.rivals.ways import RESCALINGS
from teleport.schedule import Schedule
from teleport.teleporter import Teleporter


def tuning(experiment: str, optimizer: str) -> Tuning:
    """The learning rates and initial gain found best; ValueError for an optimizer not tuned for."""
    known = find_experiment(experiment).tuning
    if optimizer not in known:
        only = f", only those of {', '.join(known)}" if known else ""
        raise ValueError(
            f"no learning rates of {optimizer!r} on {experiment} are known{only}; give --lr to "
            "`teleport run`, or name them in a table of your own, FILE.toml:NAME"
        )
    return known[optimizer]


def lent_tuning(experiment: str, optimizer: str) -> str:
    """What to tell the user if its learning rates were tuned for another one; else nothing."""
    on = tuning(experiment, optimizer).on
    if on == find_experiment(experiment).name:
        return ""
    return (
        f"{experiment} was not tuned with {optimizer}; its learning rates are those tuned for {on}"
    )


@dataclass(frozen=True)
class TeleportSettings:
    """How an arm teleports: the arguments of `Teleporter` and `Schedule`.

    Attributes:
        batch_size: images per teleport batch, the paper's n.
        held_out_size: images, of the training split, on which the held-out drift is measured.
    """

    schedule: Schedule = SCHEDULES["default"]
    tau: float = 1.0
    growth: float | None = None
    cap: float | None = None
    lr: float | None = None
    steps: int | None = None
    batch_size: int = 200
    held_out_size: int = 1000

    def check(self) -> None:
        """Raise ValueError now, rather than at the first teleport, for a value out of range."""
        self.teleporter(nn.Linear(1, 1))

    def teleporter(self, model: nn.Module) -> Teleporter:
        """A `Teleporter` with these settings around ``model``."""
        return Teleporter(
            model, tau=self.tau, growth=self.growth, cap=self.cap, lr=self.lr, steps=self.steps
        )


def teleport_settings(
    experiment: str,
    schedule: str = "default",
    *,
    batches: int | None = None,
    steps: int | None = None,
    lr: float | None = None,
    growth: float | None = None,
    cap: float | None = None,
    tau: float = 1.0,
    after: int | None = None,
) -> TeleportSettings:
    """How an experiment teleports by a schedule; what is given replaces what the schedule says.

    The schedule ``paper`` brings the paper's step control (8 steps of a fixed size, bounded norm)
    unless ``lr`` or ``growth`` is given; its step size, cap and warm-up are the experiment's.
    ``after`` is the number of training steps before the first teleport. ValueError for an unknown
    experiment or schedule, or a value out of range.
    """
    values = find_experiment(experiment).teleport
    chosen = one_of("schedule", schedule, SCHEDULES)
    if schedule == "paper":
        chosen = replace(chosen, warmup_steps=values.warmup_steps)
        if lr is None and growth is None:
            lr = values.lr
            cap = values.cap if cap is None else cap
            steps = PAPER_STEPS if steps is None else steps
    if batches is not None:
        chosen = replace(chosen, batches=batches)
    if after is not None:
        if after < 0:
            raise ValueError(f"after must be an integer >= 0, got {after}")
        chosen = replace(chosen, warmup_steps=after)
    options = TeleportSettings(chosen, tau, growth, cap, lr, steps, values.n, values.held_out)
    options.check()
    return options


PAPER_STEPS = 8
"""Teleport steps per batch, section 4.1 of the paper."""


@dataclass(frozen=True)
class Arm:
    """One way to train: everything in which two runs of a seed may differ.

    Attributes:
        teleport: whether anything is done when a teleport is due.
        rival: what is done then; empty for a null-space teleport.
    """

    lr: float
    teleport: bool = False
    init: str = "default"
    head_gain: float = 1.0
    rival: str = ""

    @property
    def name(self) -> str:
        """What the tables and figures call it."""
        gain = "" if self.head_gain == 1.0 else f" head x{self.head_gain:g}"
        start = "" if self.init == "default" and not gain else f", {self.init} init{gain}"
        return f"lr {self.lr:g}{start}" + (f" + {self.rival or 'teleport'}" * self.teleport)

    @property
    def baseline(self) -> "Arm":
        """The same arm without teleportation."""
        return replace(self, teleport=False, rival="")


CONTROLS = ("random null direction, same norm", "noise, same norm", "lr raised")
"""The controls of a teleport that act on any network; the tuned initial gain is a baseline."""

GAIN_CONTROLS = ("random null direction, same growth", *CONTROLS, "layers rescaled")
"""The controls of a teleport from the tuned initial gain."""

MORE_GAIN = (4 / 3, 5 / 3)
"""Factors on the tuned initial gain of the head: whether more of it does what a teleport does."""


def default_arms(experiment: str, optimizer: str) -> list[Arm]:
    """Low and tuned learning rate and tuned initial gain, each with and without teleport."""
    return _arms(experiment, optimizer)


def control_arms(experiment: str, optimizer: str) -> list[Arm]:
    """The default arms, and what each teleport has to be told from.

    `CONTROLS` at the low and at the tuned learning rate; from the tuned initial gain
    `GAIN_CONTROLS`, and plain arms with `MORE_GAIN`.
    """
    best = _at_tuned_gain(experiment, optimizer)
    more = [replace(best.baseline, head_gain=best.head_gain * factor) for factor in MORE_GAIN]
    others = [arm for plain in _rates(experiment, optimizer) for arm in controlled(plain, CONTROLS)]
    # The default arms keep their numbers, so that controls can be added to a folder that has them.
    return [*default_arms(experiment, optimizer), *others, *controlled(best, GAIN_CONTROLS), *more]


def rival_arms(experiment: str, optimizer: str) -> list[Arm]:
    """The default arms, and every rival and control at the low and at the tuned learning rate.

    A reset of the optimizer is left out for plain SGD, which has no state to forget. The rescalings
    came later and are last, so that records keep their numbers.
    """
    rivals = (*MOVES, *ON_THE_OPTIMIZER)
    spared = set(RESCALINGS) | ({"optimizer reset"} if optimizer == "sgd" else set())
    return _arms(experiment, optimizer, [n for n in rivals if n not in spared], RESCALINGS)


def objective_arms(experiment: str, optimizer: str) -> list[Arm]:
    """The default arms, and every other objective at the low and at the tuned learning rate."""
    return _arms(experiment, optimizer, OTHER_OBJECTIVES)


def controlled(arm: Arm, names: Sequence[str]) -> list[Arm]:
    """The arm with each of these rivals in place of its teleport."""
    return [replace(arm, teleport=True, rival=name) for name in names]


def _arms(experiment: str, optimizer: str, *rivals: Sequence[str]) -> list[Arm]:
    """The default arms and groups of rivals of those at PyTorch's initial gain, each arm once."""
    rates, gained = _rates(experiment, optimizer), _at_tuned_gain(experiment, optimizer)
    pairs = [arm for plain in rates for arm in (plain, replace(plain, teleport=True))]
    others = [arm for group in rivals for plain in rates for arm in controlled(plain, group)]
    return list(dict.fromkeys([*pairs, gained.baseline, *others, gained]))


def _rates(experiment: str, optimizer: str) -> list[Arm]:
    """Plain arms at the low and at the tuned learning rate; one if they are the same."""
    best = tuning(experiment, optimizer)
    return list(dict.fromkeys([Arm(best.low), Arm(best.tuned)]))


def _at_tuned_gain(experiment: str, optimizer: str) -> Arm:
    """The teleport from the best rate and initial gain together."""
    best = tuning(experiment, optimizer)
    return Arm(best.gain_lr, True, best.init, best.head_gain)


@dataclass(frozen=True)
class RunSettings:
    """Everything a run depends on but its arm and seed."""

    experiment: str = "mnist-sample"
    preset: str = "cpu"
    optimizer: str = "sgd"
    epochs: int | None = None
    batch_size: int | None = None
    device: str = "cpu"
    activation: str = "relu"
    teleport: TeleportSettings = TeleportSettings()

    def recipe(self) -> Experiment:
        """The experiment's entry in the table; ValueError for an unknown name."""
        return find_experiment(self.experiment)

    def size(self) -> Preset:
        """The preset, with ``epochs`` replaced if given.

        ValueError for an unknown experiment, preset or optimizer, or a count < 1.
        """
        preset = one_of("preset", self.preset, self.recipe().presets)
        find_optimizer(self.optimizer)
        self.recipe().check_activation(self.activation)
        for what in ("epochs", "batch_size"):
            value = getattr(self, what)
            if value is not None and value < 1:
                raise ValueError(f"{what} must be an integer >= 1, got {value}")
        return preset if self.epochs is None else replace(preset, epochs=self.epochs)

    def batch(self) -> int:
        """Examples of a training batch: the experiment's unless given."""
        return self.recipe().batch_size if self.batch_size is None else self.batch_size
