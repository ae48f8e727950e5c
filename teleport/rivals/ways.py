"""Every rival and control by its name, made for a model and a rehearsed teleport."""

from collections.abc import Callable

from torch import nn

from teleport.rivals import (
    ChangeOfBasisTeleporter,
    EquiNormalization,
    LevelSetTeleporter,
    NoiseTeleporter,
    PathConditioning,
    RandomNullDirection,
    Rehearsal,
    RescaleLayers,
    SymmetryTeleporter,
)
from teleport.rivals.rival import Rival
from teleport.teleporter import Teleporter

Way = Callable[[nn.Module, Rehearsal], Teleporter | Rival]
"""A way to move, made for a model; controls look at the rehearsal of the default teleport."""

OURS = "null space"

STEPS = 8
"""Directions of the ways that take several: the paper's t."""

RESCALINGS = ("equi-normalisation", "path conditioning")
"""The ways with an optimum of their own: no growth can be asked for, a second step does nothing."""


def ways(growth: float, seed: int = 0) -> dict[str, Way]:
    """Every rival and control, asked for the same growth where it can be asked."""
    return {
        "null space": lambda m, _: Teleporter(m, growth=growth),
        f"null space, {STEPS} steps": lambda m, _: Teleporter(m, growth=growth, steps=STEPS),
        "null space, double backward": lambda m, _: Teleporter(
            m, growth=growth, steps=STEPS, method="double_backward"
        ),
        "symmetry, 1 step": lambda m, _: SymmetryTeleporter(m, 1, growth=growth),
        f"symmetry, {STEPS} steps": lambda m, _: SymmetryTeleporter(m, STEPS, growth=growth),
        "symmetry, first-order inverse": lambda m, _: SymmetryTeleporter(
            m, STEPS, inverse="first_order", growth=growth, max_drift=None
        ),
        "level set, 1 step": lambda m, _: LevelSetTeleporter(m, 1, growth=growth, max_drift=None),
        f"level set, {STEPS} steps": lambda m, _: LevelSetTeleporter(
            m, STEPS, growth=growth, max_drift=None
        ),
        "change of basis": lambda m, _: ChangeOfBasisTeleporter(m, 1, 0.9, seed=seed),
        "change of basis, best of 20": lambda m, _: ChangeOfBasisTeleporter(m, 20, 0.9, seed=seed),
        "random null direction, same growth": lambda m, _: RandomNullDirection(
            m, growth=growth, seed=seed
        ),
        "random null direction, same norm": lambda m, r: RandomNullDirection(
            m, like=r.report, seed=seed
        ),
        "noise, same norm": lambda m, r: NoiseTeleporter(m, r.report, seed=seed),
        "layers rescaled": lambda m, r: RescaleLayers(m, r.norms),
        "equi-normalisation": lambda m, _: EquiNormalization(m),
        "path conditioning": lambda m, _: PathConditioning(m),
    }
