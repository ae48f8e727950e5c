"""Closed-form editing: the least change of one weight matrix that maps new keys to new values."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teleport.errors import NullSpaceError, is_between, require
from teleport.layers.part import DenseMap
from teleport.layers.support import WeightMatrix
from teleport.subspace import Basis, Projector, RowSpace, rank_cut


@dataclass(frozen=True)
class Edit:
    """What an edit has done; see `NullSpace.edit`.

    Attributes:
        layer: its name.
        wanted: for every key how far the layer's output was from its value, Euclidean norm.
        residual: how far it is now: what the null space could not give, and rounding.
        moved: Frobenius norm of the weight change, the bias with it.
        weight: Frobenius norm of the weights before.
        used: how many independent directions of the null space the keys have.
    """

    layer: str
    wanted: tuple[float, ...]
    residual: tuple[float, ...]
    moved: float
    weight: float
    used: int

    @property
    def unmet(self) -> float:
        """Norm of all residuals as a share of all that was wanted; 0 if nothing was."""
        wanted = math.hypot(*self.wanted)
        return math.hypot(*self.residual) / wanted if wanted else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All values as plain ones, for JSON."""
        return {
            "layer": self.layer,
            "wanted": list(self.wanted),
            "residual": list(self.residual),
            "unmet": self.unmet,
            "moved": self.moved,
            "weight": self.weight,
            "used": self.used,
        }

    def __str__(self) -> str:
        share = self.moved / self.weight if self.weight else math.inf
        return (
            f"{self.layer or '(model)'}: {len(self.wanted)} keys in {self.used} free directions; "
            f"{self.unmet:.2%} of the change of their outputs is unmet; "
            f"the weights moved by {share:.2%}"
        )


def edit(
    block: WeightMatrix,
    basis: Projector,
    keys: Tensor,
    values: Tensor,
    rcond: float | None,
) -> tuple[Edit, Basis]:
    """Edit the weights of a block in place.

    With rows ``K`` of the keys, each with its 1 if the bias moves, and ``E = V - K Wᵀ``: among all
    ``ΔW = C P`` that make ``‖E - K ΔWᵀ‖_F`` least, the one of least norm is
    ``ΔWᵀ = (K P)⁺ E``, for the pseudoinverse's columns lie in the range of ``P``.

    Args:
        block: a linear layer.
        basis: of its old inputs.
        keys: new inputs, ``[n, features]``.
        values: outputs wanted for them, ``[n, d_out]``.
        rcond: see `NullSpace.edit`.

    Returns:
        What was done, and the basis that keeps the new outputs, too.
    """
    part, own = _checked(block, basis, keys, values, rcond)
    with torch.no_grad():
        rows = part.rows(keys.to(part.weight.parameter.device).double())
        weights, constant = part.matrix().double(), _constant(part)
        wanted = values.to(rows) - rows @ weights.mT - constant
        dtype = max(own.dtype, keys.dtype, key=lambda d: torch.finfo(d).eps)
        known = RowSpace()
        known.add(rows)
        keys_basis = known.basis(dtype=dtype)
        if keys_basis.rank > own.null_dim:
            raise NullSpaceError(
                f"{len(rows)} keys with {keys_basis.rank} independent directions do not fit into "
                f"the null space of layer {block.name!r}, which has {own.null_dim}. Give fewer "
                "keys, or make the space at a smaller tau"
            )
        left, sizes, right = torch.linalg.svd(own.project(rows), full_matrices=False)
        cut = rank_cut(torch.linalg.svdvals(rows), rows.shape[-1], dtype)
        if rcond is not None:
            cut = torch.maximum(cut, rcond * rows.norm())
        met = sizes > cut
        inverse = torch.where(met, 1.0 / torch.where(met, sizes, 1.0), 0.0)
        move = (right.mT * inverse) @ (left.mT @ wanted)
        edited = weights + own.project(move.mT)
        if not bool(edited.to(part.weight.parameter.dtype).isfinite().all()):
            raise NullSpaceError(
                f"the weights of layer {block.name!r} would leave the range of "
                f"{part.weight.parameter.dtype}: the keys are too small for these values, or "
                "hardly in the null space. Give an rcond, as 1e-3, or a model in float32"
            )
        part.write(edited)
        residual = values.to(rows) - rows @ part.matrix().double().mT - constant
        done = Edit(
            layer=block.name,
            wanted=tuple(wanted.norm(dim=1).tolist()),
            residual=tuple(residual.norm(dim=1).tolist()),
            moved=float((part.matrix().double() - weights).norm()),
            weight=float(weights.norm()),
            used=int(met.sum()),
        )
        return done, own.merge(keys_basis)


def _checked(
    block: WeightMatrix, basis: Projector, keys: Tensor, values: Tensor, rcond: float | None
) -> tuple[DenseMap, Basis]:
    """Raise for what cannot be edited, or not with these."""
    part = block.part
    if not isinstance(part, DenseMap) or not isinstance(basis, Basis):
        raise NullSpaceError(
            f"layer {block.name!r} ({block.kind}) is no linear layer with a weight of its own: "
            "only such layers can be edited"
        )
    if rcond is not None:
        require("rcond", rcond, rcond == 0.0 or is_between(rcond, 0.0, 1.0), "in [0, 1)")
    for name, tensor in (("keys", keys), ("values", values)):
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(
                f"{name} of layer {block.name!r} must be a tensor of real floating-point numbers, "
                f"got {found}"
            )
    count = len(keys) if keys.dim() == 2 and len(keys) else "n"
    shapes = {"keys": (keys, part.features), "values": (values, part.d_out)}
    for name, (tensor, width) in shapes.items():
        if tensor.dim() != 2 or tensor.shape != (count, width):
            raise ValueError(
                f"{name} of layer {block.name!r} must be [{count}, {width}], a row for every key "
                f"and one at least, got {list(tensor.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} of layer {block.name!r} must be finite")
    return part, basis


def _constant(part: DenseMap) -> Tensor:
    """The bias where it does not move, else nothing."""
    if part.bias is None or part.has_bias_column:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    bias: Tensor = part.bias.of(part.bias.parameter).detach().double()
    return bias
