"""How far the outputs of a model have moved: predicted from its weights, and measured."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from teleport.errors import NullSpaceError
from teleport.layers.part import LinearMap
from teleport.layers.shared_weight import TiedBasis
from teleport.layers.support import Coverage, WeightMatrix
from teleport.recording import watch
from teleport.report import text_table
from teleport.runtime.closures import without_gradients
from teleport.runtime.ranks import silenced
from teleport.runtime.transaction import Transaction
from teleport.subspace import Basis, Projector


@dataclass(frozen=True)
class OutputDrift:
    """How far the outputs of a model have moved on some data.

    Attributes:
        largest: largest absolute difference; NaN if any is NaN or nothing was compared.
        relative: norm of the difference as a share of the norm of the outputs before.
    """

    largest: float
    relative: float

    def __str__(self) -> str:
        return f"at most {self.largest:.3g}, {self.relative:.3g} of their norm"


@dataclass(frozen=True)
class LayerDrift:
    """One layer that may move.

    Attributes:
        name: of the layer.
        inputs: its input directions, the bias counted, in all groups.
        kept: how many of them are locked.
        moved: Frobenius norm of the weight change ``ΔW``.
        predicted: bound on ``‖ΔW R‖_F`` for the inputs ``R`` of the data that the space was made
            of, ``‖ΔW‖₂`` times the root of the energy left out (``thm-drift``). It holds if the
            weights have moved within the null space, to rounding.
        measured: ``‖ΔW R‖_F`` for the inputs ``R`` that the given old data have in the model as it
            was. If these are the data of the space, it is at most ``predicted``.
        relative: ``measured`` as a share of the norm of the layer's outputs before.
    """

    name: str
    inputs: int
    kept: int
    moved: float
    predicted: float
    measured: float
    relative: float

    @property
    def locked(self) -> float:
        """Share of the layer that is locked."""
        return self.kept / self.inputs


@dataclass(frozen=True)
class DriftReport:
    """What has become of the old function; see `NullSpace.report`.

    Attributes:
        layers: those that may move.
        frozen: why each other layer with parameters stays, by name.
        locked: share of all the model's weights that cannot move.
        old: drift of the model's outputs on the old data.
        held_out: the same on other data; None if there were none.
    """

    layers: tuple[LayerDrift, ...]
    frozen: Mapping[str, str]
    locked: float
    old: OutputDrift
    held_out: OutputDrift | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [_COLUMNS, *map(_cells, self.layers)]
        lines = [f"outputs on the old data moved by {self.old}"]
        if self.held_out is not None:
            lines.append(f"outputs on held-out data moved by {self.held_out}")
        lines += [f"{self.locked:.1%} of the weights are locked", "", *text_table(rows)]
        lines += [f"{name or '(model)'}  frozen: {why}" for name, why in self.frozen.items()]
        return "\n".join(lines)


_COLUMNS = ("layer", "inputs", "locked", "moved by", "predicted", "measured", "of its outputs")


def _cells(layer: LayerDrift) -> tuple[str, ...]:
    norms = (layer.moved, layer.predicted, layer.measured, layer.relative)
    return (
        layer.name or "(model)",
        str(layer.inputs),
        f"{layer.locked:.1%}",
        *(f"{norm:.3g}" for norm in norms),
    )


def output_drift(before: nn.Module, after: nn.Module, inputs: Iterable[Any]) -> OutputDrift:
    """Compare the outputs of two models in evaluation mode; both stay as they are.

    Args:
        before: the model as it was.
        after: the model as it is.
        inputs: batches for both: a tensor, a tuple of arguments or a mapping of named ones.
    """
    largest, difference, norm = [], 0.0, 0.0
    with _evaluated(before, after):
        for batch in inputs:
            was, now = _outputs(before, batch), _outputs(after, batch)
            if [x.shape for x in was] != [x.shape for x in now]:
                raise NullSpaceError(
                    "the two models return tensors of other shapes: "
                    f"{[tuple(x.shape) for x in was]} and {[tuple(x.shape) for x in now]}"
                )
            for one, other in zip(was, now, strict=True):
                gap = (one - other).detach()
                largest += [float(gap.abs().max())] * bool(gap.numel())
                difference += float(gap.double().square().sum())
                norm += float(one.detach().double().square().sum())
    if not largest:
        return OutputDrift(math.nan, math.nan)
    worst = math.nan if any(map(math.isnan, largest)) else max(largest)
    return OutputDrift(worst, _share(math.sqrt(difference), math.sqrt(norm)))


def layer_drifts(
    bases: Mapping[str, Projector],
    was: Coverage,
    now: Coverage,
    before: nn.Module,
    inputs: Iterable[Any],
) -> tuple[LayerDrift, ...]:
    """Predicted and measured drift of every layer that may move.

    Args:
        bases: by name.
        was: what may move of the model as it was.
        now: what may move of the model as it is.
        before: the model as it was.
        inputs: batches of old data, as in `output_drift`.
    """
    after = {block.name: block for block in now.blocks}
    moves = {block: _Moves.of(block, after[block.name]) for block in was.blocks}
    others = set().union(*(site.blocks for site in was.sites)) - set(was.blocks)
    sites = [site.without(others) for site in was.sites]

    def see(block: WeightMatrix, part: LinearMap, x: Tensor) -> None:
        moves[block].see(part, x)

    with _evaluated(before):
        for batch in inputs:
            watch(sites, partial(_call, before, batch), see)
    return tuple(moved.drift(block.name, bases[block.name]) for block, moved in moves.items())


@dataclass
class _Moves:
    """The change of one layer's weights, and what it does to the outputs on inputs shown."""

    matrix: Tensor
    changes: dict[nn.Parameter, Tensor]
    moved: float = field(default=0.0, init=False)
    outputs: float = field(default=0.0, init=False)

    @classmethod
    def of(cls, before: WeightMatrix, after: WeightMatrix) -> "_Moves":
        """From the same layer of two models."""
        changes = {
            p: torch.zeros_like(p).detach().to(q.device)
            for p, q in zip(before.parameters, after.parameters, strict=True)
        }
        for slot, other in zip(before.part.slots, after.part.slots, strict=True):
            new, old = (s.of(s.parameter.detach()) for s in (other, slot))
            slot.of(changes[slot.parameter]).copy_(new.to(old.device) - old)
        return cls(before.part.of(changes).double(), changes)

    def see(self, part: LinearMap, x: Tensor) -> None:
        """Add an input of the layer as it was."""
        z = part.compute(x).detach()
        change = part.push_affine(x, part.pieces_of(self.changes), z)
        self.moved += float(change.double().square().sum())
        self.outputs += float(z.double().square().sum())

    def drift(self, name: str, basis: Projector) -> LayerDrift:
        measured = math.sqrt(self.moved)
        return LayerDrift(
            name,
            inputs=basis.rank + basis.null_dim,
            kept=basis.rank,
            moved=float(self.matrix.norm()),
            predicted=_bound(basis, self.matrix),
            measured=measured,
            relative=_share(measured, math.sqrt(self.outputs)),
        )


def _bound(basis: Projector, move: Tensor) -> float:
    """`Basis.drift_bound`, also for other projectors."""
    if isinstance(basis, Basis):
        return basis.drift_bound(move)
    if isinstance(basis, TiedBasis):
        return math.hypot(_bound(basis.own, move), _bound(basis.other, move.mT))
    return float(torch.linalg.matrix_norm(move, ord=2)) * basis.residual


@contextmanager
def trainable_as(model: nn.Module, other: nn.Module) -> Iterator[None]:
    """The parameters of the other model require gradients where those of the model do."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = [(name, p, p.requires_grad) for name, p in other.named_parameters()]
    try:
        for name, parameter, flag in before:
            parameter.requires_grad_(flags.get(name, flag))
        yield
    finally:
        for _, parameter, flag in before:
            parameter.requires_grad_(flag)


def locked_share(bases: Mapping[str, Projector], coverage: Coverage, model: nn.Module) -> float:
    """Share of a model's weights that cannot move within the null space."""
    total = sum(parameter.numel() for parameter in model.parameters())
    free = sum(b.part.matrix_shape[-2] * bases[b.name].null_dim for b in coverage.blocks)
    return 1.0 - free / total


def _share(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if part == 0.0 else math.inf)


@contextmanager
def _evaluated(*models: nn.Module) -> Iterator[None]:
    """The models in evaluation mode; afterwards they are as before."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(silenced(model))
            stack.enter_context(Transaction(model))
            model.eval()
        yield


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """All tensors of floating-point numbers among what the model returns."""
    result = without_gradients(partial(_call, model, batch))
    leaves = pytree.tree_leaves(dict(result) if isinstance(result, Mapping) else result)
    found = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    if not found:
        raise NullSpaceError(
            f"{type(model).__name__} returned {type(result).__name__} with no tensor of real "
            "numbers to compare"
        )
    return found


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)
