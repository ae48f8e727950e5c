"""Symmetry teleportation: ascend the gradient norm along a group action on hidden layers.

Two actions are known. That of 2022 multiplies a hidden layer's activations by ``g`` and solves for
the weights before them (`group_action`); that of 2023 multiplies the pre-activations and solves for
the weights after them (`preactivation_action`).

The direction in the Lie algebra is the gradient in ``M`` of ½‖∇L‖² at ``g = I + M``, ``M = 0``. By
the chain rule it is the action's derivative applied to ``H g``, so one double backward pass serves
all layers.

Sources: Zhao, Dehmamy, Walters and Yu 2022 (arXiv 2205.10637), equation (8), and Zhao, Gower,
Walters and Yu 2023 (arXiv 2305.13404).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from teleport.errors import ClosureError, GroupElementError, require
from teleport.layers.part import LinearMap
from teleport.layers.support import WeightMatrix
from teleport.recording import watch
from teleport.rivals.batch import Batch
from teleport.rivals.chain import chain
from teleport.rivals.climb import Move, Ray, StepRule, climb
from teleport.rivals.group_action import INVERSE_KINDS, PSEUDO_INVERSES, bend_of, group_action
from teleport.rivals.preactivation_action import elementwise_of, preactivation_action
from teleport.rivals.rival import MAX_DRIFT, Rival
from teleport.runtime.closures import Closure

ACTIONS = ("activations", "preactivations")


class SymmetryTeleporter(Rival):
    """Symmetry teleportation of a perceptron (see the module for the derivation and sources).

    Keeps the outputs on the batch to rounding times the condition numbers of the layers' inputs.
    Other data's outputs move.

    Cost of a step: one double backward pass (about 4 gradients), and per hidden layer of width d
    two pseudo-inverses, O(n² d), and one inverse, O(d³); on pre-activations no inverse, but a
    product, O(d³) too. With ``growth`` every trial of the line search acts again.

    Limits: an ``nn.Sequential`` of ``nn.Linear`` with activations in `INVERSES` between them, on
    pre-activations in `ELEMENTWISE`; no more samples than the width of any hidden layer's input, on
    pre-activations of any hidden layer; samples linearly independent there.

    Args:
        model: the perceptron.
        steps: ascent steps in the Lie algebra, each from the identity.
        lr: step size; the published scripts use 1e-7 to 5e-2.
        inverse: ``"exact"``, or ``"first_order"`` as in the published code, to show its drift.
        growth: instead of ``lr``: wanted factor on the gradient norm.
        max_drift: largest relative change of the batch loss. Default 0.01.
        pseudo_inverse: ``"qr"``, or ``"svd"`` as in the published code, which is slower and takes
            dependent samples and more samples than inputs, by least squares: outputs then move.
        action: on ``"activations"`` (2022), or on ``"preactivations"`` (2023), which needs no
            inverse of anything.

    Raises:
        UnsupportedModelError: for another model, or an activation without an inverse.
        ValueError: for an argument out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int = 8,
        lr: float | None = None,
        inverse: str = "exact",
        *,
        growth: float | None = None,
        max_drift: float | None = MAX_DRIFT,
        pseudo_inverse: str = "qr",
        action: str = "activations",
    ) -> None:
        super().__init__(model, max_drift)
        require("inverse", inverse, inverse in INVERSE_KINDS, f"one of {INVERSE_KINDS}")
        require("action", action, action in ACTIONS, f"one of {ACTIONS}")
        known = pseudo_inverse in PSEUDO_INVERSES
        require("pseudo_inverse", pseudo_inverse, known, f"one of {PSEUDO_INVERSES}")
        on_activations = action == "activations"
        possible = on_activations or inverse == "exact"
        require("inverse", inverse, possible, "'exact' on pre-activations: none is taken there")
        self.inverse = inverse
        self.pseudo_inverse = pseudo_inverse
        self._rule = StepRule(steps, lr, growth)
        stages = chain(model, self.coverage, (nn.Linear,), "symmetry teleportation")
        self._blocks = [stage.block for stage in stages]
        between = [stage.after for stage in stages[:-1]]
        self._bends = [bend_of(after) for after in between] if on_activations else []
        self._functions = [] if on_activations else [elementwise_of(after) for after in between]

    def _move(self, batch: Batch, loss: float, norm: float) -> Move:
        rows = self._first_inputs(batch.closures)
        return climb(batch, self._rule, norm, lambda: self._look(batch, rows))

    def _look(self, batch: Batch, rows: Tensor) -> Ray:
        matrices = [block.part.matrix() for block in self._blocks]
        direction = self._lie_gradient(batch, matrices, rows)

        def go(step: float) -> None:
            elements = [torch.eye(len(m)).to(m) + step * m for m in direction]
            try:
                self._write(self._act(matrices, rows, elements, self.inverse))
            except ClosureError as error:
                raise GroupElementError(
                    "the step makes the samples linearly dependent in a hidden layer; take a "
                    "smaller one"
                ) from error

        return Ray(go, sum(float(m.double().square().sum()) for m in direction))

    def _lie_gradient(self, batch: Batch, matrices: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Gradient of ½‖∇L‖² in the Lie algebra at the identity: the chain rule on ``H g``."""
        _, _, ascent = batch.ascent()
        of = dict(zip(batch.parameters, ascent, strict=True))
        cotangents = [block.part.of(of) for block in self._blocks]
        with torch.enable_grad():
            eyes = [
                torch.eye(len(m), dtype=m.dtype, device=m.device, requires_grad=True)
                for m in matrices[:-1]
            ]
            # To first order the two inverses are the same, and this one costs nothing.
            moved = self._act(matrices, rows, eyes, "first_order")
            return list(torch.autograd.grad(moved, eyes, cotangents))

    def _act(
        self, matrices: Sequence[Tensor], rows: Tensor, elements: Sequence[Tensor], inverse: str
    ) -> list[Tensor]:
        kind = self.pseudo_inverse
        if self._functions:
            functions = self._functions
            return preactivation_action(matrices, rows, elements, functions, pseudo_inverse=kind)
        bends = self._bends
        return group_action(matrices, rows, elements, bends, inverse=inverse, pseudo_inverse=kind)

    def _write(self, matrices: Sequence[Tensor]) -> None:
        for block, matrix in zip(self._blocks, matrices, strict=True):
            block.part.write(matrix)

    def _first_inputs(self, closures: Sequence[Closure]) -> Tensor:
        """Input rows of the first layer over all parts of the batch."""
        found = []

        def see(block: WeightMatrix, part: LinearMap, x: Tensor) -> None:
            if block is self._blocks[0]:
                found.append(part.rows(x))

        for closure in closures:
            watch(self.coverage.sites, closure, see)
        if not found:
            raise ClosureError("the closure does not call the model that was given")
        return torch.cat(found)
