"""A network of a named experiment at a moment of its training, with its first teleport batch.

For figures that look at one moment rather than at a whole run. The initial values, the order of the
data and the teleport batch are those that `teleport run` has with the same seed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from teleport.data import Dataset, load
from teleport.lab.experiments.arms import Arm, RunSettings, teleport_settings
from teleport.lab.experiments.entry import Experiment
from teleport.lab.experiments.training import Training, check_fits, train_size
from teleport.lab.records.writer import environment
from teleport.runtime.closures import Closure

UNTUNED = ("sgd", 0.1)
"""How an experiment is trained of which no learning rate was tuned."""


@dataclass(frozen=True)
class Moment:
    """A network and the loss of a teleport batch.

    Attributes:
        model: after the steps, in training mode.
        closure: returns the loss of the batch.
        held_out: returns the loss of training examples that are not in it.
        config: everything this depends on, for a record.
    """

    model: nn.Module
    closure: Closure
    held_out: Closure
    config: dict[str, Any]


def rate_of(recipe: Experiment) -> tuple[str, float]:
    """Optimizer and learning rate of the steps: tuned SGD, else what was tuned, else `UNTUNED`."""
    for name in ("sgd", *recipe.tuning):
        if name in recipe.tuning:
            return name, recipe.tuning[name].tuned
    return UNTUNED


def check_moment(experiment: str, preset: str, n: int | None = None) -> tuple[RunSettings, Dataset]:
    """What `moment` trains, refused before anything is written; errors as there."""
    options = teleport_settings(experiment)
    if n is not None:
        options = replace(options, batch_size=n)
    settings = RunSettings(experiment, preset, teleport=options)
    settings.size()
    dataset = load(settings.recipe().data)
    check_fits(settings, dataset)
    return settings, dataset


def moment(
    experiment: str,
    preset: str = "cpu",
    steps: int = 0,
    seed: int = 0,
    n: int | None = None,
    stepped: Callable[[], None] = lambda: None,
) -> Moment:
    """A named experiment after some training steps, with the optimizer of `rate_of`.

    The teleport batch has ``n`` examples, by default the experiment's; ``stepped`` is called after
    every training step. ValueError for an unknown name, or ``steps`` out of range; other errors as
    of `check_fits` and `load`.
    """
    if steps < 0:
        raise ValueError(f"steps must be an integer >= 0, got {steps}")
    settings, dataset = check_moment(experiment, preset, n)
    recipe = settings.recipe()
    optimizer, lr = rate_of(recipe)
    epochs = max(1, math.ceil(steps / (train_size(settings.size(), dataset) // settings.batch())))
    settings = replace(settings, optimizer=optimizer, epochs=epochs)
    training = Training(settings, Arm(lr), seed, dataset)
    training.advance(steps, stepped)
    batch, held_out = training.draw()
    config = {
        "experiment": experiment,
        "title": recipe.title,
        "preset": preset,
        "network": {**recipe.network, **settings.size().network},
        "seed": seed,
        "optimizer": optimizer,
        "lr": lr,
        "batch_size": settings.batch(),
        "teleport_batch": settings.teleport.batch_size,
        "data": {"name": dataset.name, "checksum": dataset.checksum, "source": dataset.source},
        **environment(),
    }
    return Moment(training.model, batch, held_out, config)
