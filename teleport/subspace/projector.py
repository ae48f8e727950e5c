"""What a space of inputs and a projector onto its complement promise, whatever the inputs are."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from teleport.runtime.ranks import Ranks


class Projector(ABC):
    """P of one weight matrix: removes what acts on the kept part of the layer's inputs."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the inputs: the precision to which their space is known."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it is."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``[*groups, d_in]`` of the matrices it applies to, without their ``d_out``."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """How many input directions are kept, in all groups together."""

    @property
    @abstractmethod
    def null_dim(self) -> int:
        """How many input directions stay free to move in, in all groups together."""

    @property
    @abstractmethod
    def residual(self) -> float:
        """Root of the energy left out: the norm of the rows' part outside the kept space."""

    @property
    @abstractmethod
    def cut_off(self) -> float:
        """Largest singular value that the rank rule left out: ``‖ΔW Rᵀ‖_F ≤ ‖ΔW‖_F cut_off``.

        At most the cut itself, whatever is left out: more than that no rank rule allows
        (``thm-rank``).
        """

    @abstractmethod
    def project(
        self, matrix: Float[Tensor, "*groups rows d_in"]
    ) -> Float[Tensor, "*groups rows d_in"]:
        """The matrix with its action on the kept space removed (paper equation 11)."""

    @abstractmethod
    def to(self, device: torch.device) -> "Projector":
        """The same on a device."""

    @abstractmethod
    def merge(self, other: "Projector") -> "Projector":
        """Keeps what either keeps."""

    @abstractmethod
    def at(self, tau: float) -> "Projector":
        """Keeps another share of the energy of the same inputs, from what is known of them.

        Raises:
            ValueError: if ``tau`` is outside (0, 1], or takes directions that were not kept.
        """

    def numbers(self) -> "Projector":
        """The same without the memory of what only projections need: it cannot project any more."""
        return self

    def of_first(self, ranks: Ranks) -> "Projector":
        """The first rank's, so that what it projects is bit for bit the same on all."""
        return self if ranks.size == 1 else self._of_first(ranks)

    @abstractmethod
    def _of_first(self, ranks: Ranks) -> "Projector":
        """`of_first` of several ranks."""


class Space(ABC):
    """Collects the inputs of one layer, in any number of pieces."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Rows so far."""

    @abstractmethod
    def basis(self, tau: float = 1.0) -> Projector:
        """The projector that keeps a share ``tau``, in (0, 1], of the energy of the inputs.

        Raises:
            ValueError: if ``tau`` is out of range, or nothing was collected.
        """

    @abstractmethod
    def absorb(self, other: Any) -> None:
        """Take in what another space of this kind has collected."""

    def joined(self, ranks: Ranks, shape: Sequence[int]) -> "Space":
        """The space of the inputs on all ranks, of a matrix ``[*groups, d_out, d_in]``.

        The same to the bit as that of one process which absorbs the spaces of the ranks in turn.
        """
        return self if ranks.size == 1 else self._joined(ranks, shape)

    @abstractmethod
    def _joined(self, ranks: Ranks, shape: Sequence[int]) -> "Space":
        """`joined` of several ranks."""
