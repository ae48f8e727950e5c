"""Teleportation with null-space gradient projection, derived, verified and measured.

`Teleporter` moves a model to other parameters with the same loss on a batch and a larger gradient.
The book in ``chapters/`` derives why that works, what is wrong in the paper it comes from
(arXiv 2502.11362), and what it is worth.
"""

import sys
from importlib import import_module

TYPE_CHECKING = False  # as in typing, which takes longer to load than all of this

if TYPE_CHECKING:
    from teleport import check, data, layers, reference, rivals
    from teleport.bounds.network import LayerBound, NetworkBound, network_bound
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
    from teleport.keeping.null_space import NullSpace, null_space
    from teleport.lab.experiments import models
    from teleport.lab.records import reading as records
    from teleport.layers.support import supported
    from teleport.report import LayerReport, TeleportReport
    from teleport.schedule import Schedule
    from teleport.teleporter import Teleporter

    __version__: str

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
    "check",
    "data",
    "layers",
    "models",
    "network_bound",
    "null_space",
    "records",
    "reference",
    "rivals",
    "supported",
]

_HOMES = {
    "bounds.network": ("LayerBound", "NetworkBound", "network_bound"),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "keeping.null_space": ("NullSpace", "null_space"),
    "layers.support": ("supported",),
    "report": ("LayerReport", "TeleportReport"),
    "schedule": ("Schedule",),
    "teleporter": ("Teleporter",),
}
"""The module of every public name that is not a module itself."""

_MODULES = {"models": "lab.experiments.models", "records": "lab.records.reading"}
"""Modules with a public name that is shorter than their place."""


class _ByPublicName:
    """Finds and loads those where they lie, so that ``from teleport.models import mlp`` works."""

    def __init__(self, home: str = "") -> None:
        self.home, self.spec = home, None

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> object:
        package, _, module = name.rpartition(".")
        if package != __name__ or module not in _MODULES:
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, _ByPublicName(f"{__name__}.{_MODULES[module]}"))  # type: ignore[arg-type]

    def create_module(self, spec: object) -> object:
        module = import_module(self.home)
        self.spec = module.__spec__  # type: ignore[assignment]
        return module

    def exec_module(self, module: object) -> None:
        module.__spec__ = self.spec  # type: ignore[attr-defined]


sys.meta_path.append(_ByPublicName)  # type: ignore[arg-type]


if not TYPE_CHECKING:  # the names are those imported above, and no others

    def __getattr__(name: str) -> object:
        """Import a public name, or a module of the package, when it is first asked for (PEP 562).

        So ``teleport --help`` need not wait for PyTorch.
        """
        from importlib.util import find_spec

        if name == "__version__":
            from importlib.metadata import version

            value = version("nullspace-teleport")
        elif home := next((module for module, names in _HOMES.items() if name in names), None):
            value = getattr(import_module(f"{__name__}.{home}"), name)
        elif not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            value = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
