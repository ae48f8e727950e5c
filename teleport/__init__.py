"""Teleportation with null-space gradient projection, derived, verified and measured.

`Teleporter` moves a model to other parameters with the same loss on a batch and a larger gradient.
The book in ``chapters/`` derives why that works, what is wrong in the paper it comes from
(arXiv 2502.11362), and what it is worth.
"""

from importlib.metadata import version

from teleport import (
    attention,
    baselines,
    check,
    convolution,
    data,
    embedding,
    layers,
    recurrent,
    reference,
)
from teleport.bound import LayerBound, NetworkBound, network_bound
from teleport.coverage import supported
from teleport.errors import (
    BookError,
    CheckError,
    ClosureError,
    DataError,
    GroupElementError,
    NonFiniteLossError,
    NullSpaceError,
    OptimizerStateError,
    RunError,
    TeleportError,
    UnsupportedModelError,
)
from teleport.nullspace import NullSpace, null_space
from teleport.report import LayerReport, TeleportReport
from teleport.schedule import Schedule
from teleport.teleporter import Teleporter

__version__ = version("nullspace-teleport")

__all__ = [
    "BookError",
    "CheckError",
    "ClosureError",
    "DataError",
    "GroupElementError",
    "LayerBound",
    "LayerReport",
    "NetworkBound",
    "NonFiniteLossError",
    "NullSpace",
    "NullSpaceError",
    "OptimizerStateError",
    "RunError",
    "Schedule",
    "TeleportError",
    "TeleportReport",
    "Teleporter",
    "UnsupportedModelError",
    "__version__",
    "attention",
    "baselines",
    "check",
    "convolution",
    "data",
    "embedding",
    "layers",
    "network_bound",
    "null_space",
    "recurrent",
    "reference",
    "supported",
]
