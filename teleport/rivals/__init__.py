"""Every other way to teleport, and the controls that a gain has to be compared with.

Rivals and controls share the call ``step(closure, *, held_out=None) -> TeleportReport`` of
`teleport.Teleporter`: what they mean to keep is checked, parameters change in place, and on failure
the model is bit for bit as before.
"""

from teleport.rivals.change_of_basis import ChangeOfBasisTeleporter
from teleport.rivals.controls import (
    NoiseTeleporter,
    RandomNullDirection,
    Rehearsal,
    RescaleLayers,
    layer_norms,
    rehearse,
)
from teleport.rivals.equi_normalization import EquiNormalization
from teleport.rivals.group_action import Bend, group_action
from teleport.rivals.level_set import LevelSetTeleporter
from teleport.rivals.optimizer_controls import (
    RaisedLearningRate,
    factors_by_parameter,
    growth_duration,
    reset_optimizer,
)
from teleport.rivals.other_objectives import (
    ObjectiveStep,
    flatter_curvature,
    sharpness,
    shorter_gradient,
    step_decrease,
)
from teleport.rivals.path_conditioning import PathConditioning
from teleport.rivals.planar import BOOTH, ROSENBROCK, PlanarFunction, so2_teleport
from teleport.rivals.preactivation_action import preactivation_action
from teleport.rivals.symmetry import SymmetryTeleporter

__all__ = [
    "BOOTH",
    "ROSENBROCK",
    "Bend",
    "ChangeOfBasisTeleporter",
    "EquiNormalization",
    "LevelSetTeleporter",
    "NoiseTeleporter",
    "ObjectiveStep",
    "PathConditioning",
    "PlanarFunction",
    "RaisedLearningRate",
    "RandomNullDirection",
    "Rehearsal",
    "RescaleLayers",
    "SymmetryTeleporter",
    "factors_by_parameter",
    "flatter_curvature",
    "group_action",
    "growth_duration",
    "layer_norms",
    "preactivation_action",
    "rehearse",
    "reset_optimizer",
    "sharpness",
    "shorter_gradient",
    "so2_teleport",
    "step_decrease",
]
