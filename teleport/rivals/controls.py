"""Controls: moves that share one property with a teleport and lack the others.

Each answers one objection to a gain that a teleport shows. Is it the gradient, or would any move in
the null space do? (`RandomNullDirection`.) Is it the null space, or would any move do?
(`NoiseTeleporter`.) Is it only that the layers' weights got larger? (`RescaleLayers`.) Controls on
the optimizer are in `teleport.rivals.optimizer_controls`.

What a control has to match is measured by `rehearse` on the model it will be applied to.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teleport.direction import Direction
from teleport.errors import require
from teleport.landscape import Landscape
from teleport.layers.support import WeightMatrix, cover
from teleport.line_search import step_to_norm
from teleport.objective import gradient, trainable
from teleport.report import TeleportReport
from teleport.rivals.batch import Batch
from teleport.rivals.climb import Move
from teleport.rivals.rival import MAX_DRIFT, Rival
from teleport.runtime.closures import Closure
from teleport.runtime.transaction import Transaction
from teleport.subspace import Projector
from teleport.teleporter import Teleporter


@dataclass(frozen=True)
class Rehearsal:
    """What a teleport would do.

    Attributes:
        report: its report.
        norms: Frobenius norm of each layer's weights (bias included) that it reaches.
        growths: factor by which it enlarges each layer's own gradient norm; 1 where that is zero.
    """

    report: TeleportReport
    norms: dict[str, float]
    growths: dict[str, float]


def rehearse(teleporter: Teleporter | Rival, closure: Closure) -> Rehearsal:
    """Teleport, look, and put everything back: what a control needs to know.

    Args:
        teleporter: of the model the control is for.
        closure: the teleport batch.

    Returns:
        What the teleport does; the model is bit for bit as before.

    Raises:
        ClosureError: as the teleport does.
    """
    model = teleporter.model
    with Transaction(model) as transaction:
        before = _layer_gradients(model, closure)
        transaction.rewind_random()
        report = teleporter.step(closure)
        transaction.rewind_random()
        after = _layer_gradients(model, closure)
        norms = layer_norms(model)
    growths = {name: after[name] / norm if norm else 1.0 for name, norm in before.items()}
    return Rehearsal(report, norms, growths)


def layer_norms(model: nn.Module) -> dict[str, float]:
    """Frobenius norm of the weights of every layer that teleportation covers, bias included."""
    return {block.name: float(block.part.matrix().norm()) for block in cover(model).blocks}


def _layer_gradients(model: nn.Module, closure: Closure) -> dict[str, float]:
    parameters = trainable(model)
    _, grads = gradient(closure, parameters)
    of = dict(zip(parameters, grads, strict=True))
    return {block.name: float(block.part.of(of).norm()) for block in cover(model).blocks}


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def move_norms(report: TeleportReport) -> dict[str, float]:
    """Norm of the move of every layer that a teleport moved."""
    return {layer.name: layer.move_norm for layer in report.layers if layer.move_norm > 0.0}


def _is_of_norm(matrix: Tensor, norm: float) -> bool:
    """To rounding; a zero matrix can be rescaled to no other norm."""
    found = float(matrix.norm())
    return found == 0.0 or math.isclose(found, norm, rel_tol=8 * torch.finfo(matrix.dtype).eps)


def as_still(report: TeleportReport) -> Move:
    """The control of a teleport that moved nothing: nothing."""
    return Move((), f"the teleport to match moved nothing: {report.reason}")


class NoiseTeleporter(Rival):
    """Gaussian noise, not projected, of the norm of a teleport's move in every layer.

    Leaves the level set, and is not rolled back for that. Where the teleport moved nothing, this
    moves nothing either. Cost: two gradients.

    Args:
        model: any module with the layers of the report.
        like: report of the teleport to match.
        seed: of the noise; successive steps draw on.

    Raises:
        ValueError: if the model has not the report's layers.
    """

    def __init__(self, model: nn.Module, like: TeleportReport, *, seed: int = 0) -> None:
        super().__init__(model, max_drift=None)
        self._like = like
        self._norms = _of_blocks(self.coverage.blocks, move_norms(like))
        self._generator = torch.Generator().manual_seed(seed)

    def _move(self, batch: Batch, loss: float, norm: float) -> Move:
        if not self._norms:
            return as_still(self._like)
        for block, size in self._norms.items():
            matrix = block.part.matrix()
            noise = _normal(matrix, self._generator)
            block.part.write(matrix + size / noise.norm() * noise)
        return Move((1.0,), "noise of the norm of a teleport")


class RescaleLayers(Rival):
    """Every layer times one number, so that its norm is the one a teleport reaches.

    Leaves the level set, and is not rolled back for that. Cost: two gradients.

    Args:
        model: any module with these layers.
        norms: wanted Frobenius norm (bias included) by layer name, as in `Rehearsal.norms`.

    Raises:
        ValueError: if the model has not these layers, or a norm is not positive.
    """

    def __init__(self, model: nn.Module, norms: Mapping[str, float]) -> None:
        super().__init__(model, max_drift=None)
        for name, size in norms.items():
            require(f"norm of layer {name!r}", size, 0.0 < size < math.inf, "> 0 and finite")
        self._norms = _of_blocks(self.coverage.blocks, norms)

    def _move(self, batch: Batch, loss: float, norm: float) -> Move:
        present = {block: block.part.matrix() for block in self._norms}
        if all(_is_of_norm(matrix, self._norms[block]) for block, matrix in present.items()):
            return Move((), "every layer has the wanted norm already")
        for block, matrix in present.items():
            if matrix.norm() > 0.0:
                block.part.write(self._norms[block] / matrix.norm() * matrix)
        return Move((1.0,), "layers rescaled to the norms a teleport reaches")


class RandomNullDirection(Rival):
    """A random direction of the joint null space: keeps the batch loss, ignores the gradient.

    Of the same norm as a teleport's move, layer by layer (``like``), or as far as the same line
    search goes until the gradient norm has grown by a factor (``growth``). A direction is standard
    normal, projected; its sign is that under which a first small trial gives the larger norm.

    Cost: as `Teleporter` without its tangent pass. Limits: as there; other data's outputs move.

    Args:
        model: any module with a covered layer.
        growth: wanted factor on the gradient norm; moves the layers a teleport could move.
        like: report of the teleport to match; moves the layers that moved there, none if none did.
        seed: of the directions; successive steps draw on.

    Raises:
        ValueError: unless exactly one of ``growth`` and ``like`` is given, in range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        growth: float | None = None,
        like: TeleportReport | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, MAX_DRIFT)
        if (growth is None) == (like is None):
            raise ValueError("give either growth or like, a report")
        require("growth", growth, growth is None or 1.0 < growth < math.inf, "> 1 and finite")
        self._growth, self._like = growth, like
        norms = {} if like is None else move_norms(like)
        self._norms = _of_blocks(self.coverage.blocks, norms)
        self._generator = torch.Generator().manual_seed(seed)

    def _move(self, batch: Batch, loss: float, norm: float) -> Move:
        if self._like is not None and not self._norms:
            return as_still(self._like)
        landscape = null_landscape(self, batch)
        wanted = self._norms or {b: 1.0 for b in landscape.blocks if b not in landscape.fixed}
        bases = landscape.bases([block for block in wanted if block in landscape.blocks], 1.0)
        room = {block: basis for block, basis in bases.items() if basis.null_dim > 0}
        if not room:
            return Move((), "nothing can move: no layer has a null space on this batch")
        along = {block: self._draw(block, basis) for block, basis in room.items()}
        step = 1.0 if self._growth is None else self._step(landscape, along, norm)
        if step is None:
            landscape.write_start()
            return Move((), "no step along the random direction reaches the wanted growth")
        landscape.advance(along, step)
        landscape.write()
        return Move((step,), "a random direction of the null space")

    def _draw(self, block: WeightMatrix, basis: Projector) -> Tensor:
        drawn = basis.project(_normal(block.part.matrix(), self._generator))
        return drawn if self._growth else self._norms[block] / drawn.norm() * drawn

    def _step(self, landscape: Landscape, along: Direction, norm: float) -> float | None:
        """The step that reaches the growth; its sign is chosen at a thousandth of the weights."""
        assert self._growth is not None
        length = math.sqrt(sum(float(d.double().square().sum()) for d in along.values()))
        weights = math.sqrt(sum(float(b.part.matrix().double().square().sum()) for b in along))
        trial = 1e-3 * (weights or 1.0) / length
        ahead, behind = (landscape.norm_squared_at(along, sign * trial) for sign in (1.0, -1.0))
        sign = 1.0 if ahead >= behind else -1.0
        start, target = norm**2, (self._growth * norm) ** 2
        if start == 0.0:
            return None
        step = step_to_norm(
            lambda s: landscape.norm_squared_at(along, sign * s),
            start,
            (target - start) / trial,
            target,
            8 * torch.finfo(landscape.dtype).eps,
            exact_slope=False,
        )
        return None if step is None else sign * step


def null_landscape(rival: Rival, batch: Batch) -> Landscape:
    """What finds the null space of a batch and moves in it, without bound on the steps."""
    frozen = len(batch.closures) == 1
    return Landscape(rival.model, rival.coverage.sites, batch.closures, frozen=frozen)


def _of_blocks(
    blocks: Sequence[WeightMatrix], values: Mapping[str, float]
) -> dict[WeightMatrix, float]:
    by_name = {block.name: block for block in blocks}
    if absent := sorted(values.keys() - by_name.keys()):
        raise ValueError(f"the model has no layer {absent[0]!r}; its layers are {list(by_name)}")
    return {by_name[name]: value for name, value in values.items()}
