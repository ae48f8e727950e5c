"""Equi-normalisation (ENorm): rescale neurons until the weights' norm is as small as it can be.

Among all rescalings of the neurons, which leave the function alone, one has the smallest
Σ_l ‖W_l‖_p^p. There, and only there, the weights into each neuron have the same p-norm as those out
of it: its share c^p a + c^-p b of the sum is smallest at c^p = √(b / a).

Source: Stock, Graham, Gribonval and Jégou 2019, "Equi-normalization of neural networks" (arXiv
1902.10416), who interleave one cycle over the layers with every training step. Here it is one move,
taken to convergence. As there, a bias is rescaled with its neuron and not counted in the norm. Not
here: their asymmetric factor per layer (1 is theirs by default). Their published program leaves out
the last hidden layer; here all hidden layers are balanced, as their objective says.
"""

from torch import nn

from teleport.errors import require
from teleport.rivals.balance import BalancedRescaling, least_sum
from teleport.rivals.batch import Batch
from teleport.rivals.climb import Move


class EquiNormalization(BalancedRescaling):
    """Rescale all hidden neurons to the least p-norm of the weights (see the module).

    The identity on all inputs. It looks at no data: the gradient norm may grow or fall, and the
    report says which. A second step finds nothing to do. A neuron without incoming or without
    outgoing weights keeps them. Cost: two gradients, for the report, and some matrix-vector
    products.

    Limits: the networks of `Rescaling`.

    Args:
        model: the network.
        p: of the norm, >= 1.

    Raises:
        UnsupportedModelError: for another model, or an activation that is not homogeneous.
        ValueError: for a ``p`` out of range.
    """

    def __init__(self, model: nn.Module, p: float = 2.0) -> None:
        super().__init__(model, "equi-normalisation")
        require("p", p, 1.0 <= p < float("inf"), ">= 1 and finite")
        self.p = p

    def _move(self, batch: Batch, loss: float, norm: float) -> Move:
        weights = (stage.module.get_parameter("weight") for stage in self._rescaling.stages)
        powers = [{"weight": weight.detach().double().abs() ** self.p} for weight in weights]
        terms = self._rescaling.couplings(powers)
        return self._settle(least_sum(terms, self.tolerance, self.sweeps), 1.0 / self.p)
