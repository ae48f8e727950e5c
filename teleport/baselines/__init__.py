"""Every other way to teleport, and the controls that a gain has to be compared with.

Rivals and controls share the call ``step(closure, *, held_out=None) -> TeleportReport`` of
`teleport.Teleporter`: what they mean to keep is checked, parameters change in place, and on failure
the model is bit for bit as before.
"""

from teleport.baselines.change_of_basis import ChangeOfBasisTeleporter
from teleport.baselines.controls import (
    NoiseTeleporter,
    RandomNullDirection,
    Rehearsal,
    RescaleLayers,
    layer_norms,
    rehearse,
)
from teleport.baselines.equi_normalization import EquiNormalization
from teleport.baselines.gpm import gpm_rank, kept_energy
from teleport.baselines.group import Bend, group_action
from teleport.baselines.level_set import LevelSetTeleporter
from teleport.baselines.objectives import (
    ObjectiveStep,
    flatter_curvature,
    sharpness,
    shorter_gradient,
    step_decrease,
)
from teleport.baselines.optimizer import (
    RaisedLearningRate,
    factors_by_parameter,
    growth_duration,
    reset_optimizer,
)
from teleport.baselines.path_conditioning import PathConditioning
from teleport.baselines.planar import BOOTH, ROSENBROCK, PlanarFunction, so2_teleport
from teleport.baselines.preactivation import preactivation_action
from teleport.baselines.symmetry import SymmetryTeleporter

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
    "gpm_rank",
    "group_action",
    "growth_duration",
    "kept_energy",
    "layer_norms",
    "preactivation_action",
    "rehearse",
    "reset_optimizer",
    "sharpness",
    "shorter_gradient",
    "so2_teleport",
    "step_decrease",
]
