"""The rank rule of the gradient projection memory, as published and as its code has it."""

from jaxtyping import Float
from torch import Tensor


def gpm_rank(singular_values: Float[Tensor, " values"], tau: float) -> int:
    """Basis size of the published code of Saha, Garg and Roy 2021 (ICLR) for a first task.

    It counts the partial sums of energy that are strictly below ``tau``. Its own equation (5) asks
    for the smallest k whose energy reaches ``tau``, which is one more
    (`teleport.subspace.energy_rank`): an off-by-one, by which the kept energy stays below ``tau``,
    and the basis is empty if the first direction alone reaches it.

    Args:
        singular_values: of the layer's inputs, largest first.
        tau: share of energy, in (0, 1].
    """
    energy = singular_values.double().square().cumsum(0)
    return int((energy < tau * energy[-1]).sum())


def kept_energy(singular_values: Float[Tensor, " values"], rank: int) -> float:
    """Share of the squared singular values that the first ``rank`` hold."""
    energy = singular_values.double().square()
    return float(energy[:rank].sum() / energy.sum())
