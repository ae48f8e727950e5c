"""Path conditioning (PathCond): the rescaling whose path lifting is conditioned best.

A ReLU network's function is linear in its *path lifting* Φ(θ): one entry per path from an input, or
a bias, to an output, the product of the weights along it. Φ does not change when neurons are
rescaled, but its Jacobian ∂Φ does, and with it the kernel ∂Φ ∂Φᵀ through which a gradient step acts
on the function. Asked for is the rescaling for which G = ∂Φᵀ ∂Φ is nearest to a multiple of the
identity, with only the diagonal g of G looked at and the log-determinant (Bregman) divergence
Σ_i (α g_i - log(α g_i) - 1) as distance, at the best α. For ``n`` parameters that is: minimise
n log Σ_i g_i - Σ_i log g_i, convex in the logarithms of the factors.

g_i is the sum over the paths through parameter i of the squared product of all other weights on
them: the gradient, in the squared weights, of the sum of outputs of the network with squared
weights on inputs that are all 1. So one backward pass gives all of them. Rescaling a neuron by c
divides g by c² on what enters it, and multiplies it by c² on what leaves it.

Source: Lebeurrier, Vayer and Gribonval 2026, "Path-conditioned training: a principled way to
rescale ReLU neural networks" (arXiv 2602.19799), of which we had the abstract, and a public program
that names it (Artim436/pathcond) for the objective and for g. From there: path lifting, divergence,
diagonal, a quadratic per neuron. Ours: how it is solved (`teleport.rivals.balance`), to
convergence rather than in ten rounds; the minimum is the same, as the objective is convex. A
parameter on no path (g_i = 0), where the divergence would be infinite, is left out of the sum.
Pooling is run as it is, as in that program: of a maximum one path of each window counts, and of an
average the weight of each path rather than its square.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from teleport.errors import ClosureError
from teleport.rivals.balance import BalancedRescaling, most_even
from teleport.rivals.batch import Batch
from teleport.rivals.chain import Stage
from teleport.rivals.climb import Move
from teleport.rivals.rescaling import HOMOGENEOUS
from teleport.runtime.closures import Closure, evaluate, without_gradients


class PathConditioning(BalancedRescaling):
    """Rescale all hidden neurons to the best conditioned path lifting (see the module).

    The identity on all inputs. Of the data only the shape of an input counts: the gradient norm may
    grow or fall, and the report says which. A second step finds nothing to do, and a rescaling
    before it changes nothing about where it ends. Meant for the start of a training. Cost: two
    gradients, for the report, a loss, a forward and backward pass of one example in double
    precision, and some matrix-vector products.

    Limits: the networks of `Rescaling`.

    Args:
        model: the network.

    Raises:
        UnsupportedModelError: for another model, or an activation that is not homogeneous.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "path conditioning")

    def _move(self, batch: Batch, loss: float, norm: float) -> Move:
        stages = self._rescaling.stages
        values = path_energies(stages, _ones_like_an_input(stages[0].module, batch.closures[0]))
        terms, counts = (
            self._rescaling.couplings(each)
            for each in (values, [{n: (g > 0.0).double() for n, g in v.items()} for v in values])
        )
        return self._settle(most_even(terms, counts, self.tolerance, self.sweeps), -0.5)


def path_energies(stages: Sequence[Stage], ones: Tensor) -> list[dict[str, Tensor]]:
    """Squared norms of the derivatives of the path lifting in each parameter, in double precision.

    Args:
        stages: the network; what follows the last weight layer is left out.
        ones: an input of that form, all 1.

    Returns:
        For each stage, by the parameter's name in its layer, a tensor of its shape.
    """
    squares = [
        {
            n: p.detach().double().square().requires_grad_()
            for n, p in stage.module.named_parameters()
        }
        for stage in stages
    ]
    with torch.enable_grad():
        x = ones
        for stage, square in zip(stages, squares, strict=True):
            x = functional_call(stage.module, square, (x,))
            if stage is not stages[-1]:
                x = _between(stage.after, x)
        flat = [tensor for square in squares for tensor in square.values()]
        found = iter(torch.autograd.grad(x.sum(), flat))
    return [{name: next(found) for name in square} for square in squares]


def _between(modules: Iterable[tuple[str, nn.Module]], x: Tensor) -> Tensor:
    for _, module in modules:
        if not isinstance(module, HOMOGENEOUS):  # those are the identity on what is not negative
            x = module(x)
    return x


def _ones_like_an_input(layer: nn.Module, closure: Closure) -> Tensor:
    """One example of ones in the form of what the closure feeds to the first weight layer.

    Raises:
        ClosureError: if it feeds it nothing.
    """
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        without_gradients(partial(evaluate, closure))
    finally:
        handle.remove()
    if not seen:
        raise ClosureError("the closure does not run the model, whose input has to be known")
    x = seen[0]
    batched = x.dim() > layer.get_parameter("weight").dim() - 1
    return torch.ones_like(x[:1] if batched else x, dtype=torch.float64)
