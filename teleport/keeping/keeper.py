"""Projecting what happened to parameters: by hand, in a context, or after an optimizer's steps."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from teleport.errors import NullSpaceError, require
from teleport.layers.one_hot import AxisBasis
from teleport.layers.support import WeightMatrix
from teleport.runtime.precision import Autocast, at_least_single
from teleport.subspace import Basis, Projector, aligned_mm, empty_aligned

EVERYTHING: Any = ...

_LAST: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""A mark for each parameter of who has projected it last: the ids of the bases, a new list a time.

A reader's own bases are alive, so that nobody else's can have their ids.
"""


class Keeper:
    """Projects the displacement of parameters since it was made; see `NullSpace.keep`.

    All displacements are counted from one origin, not from the last projection: in exact
    arithmetic that is the same (``thm-keep``), and rounding does not add up over the projections,
    which in half precision would soon be more than what is learned.

    Args:
        blocks: what may move within its null space.
        bases: by the name of a block.
        parameters: whatever of these no block covers is put back.
        every: uses as a context between projections, >= 1.
        model: whose parameters they are, and have to stay.
        alone: whether it may have no others.
    """

    def __init__(
        self,
        blocks: Sequence[WeightMatrix],
        bases: Mapping[str, Projector],
        parameters: Iterable[nn.Parameter],
        every: int,
        model: nn.Module,
        alone: bool,
    ) -> None:
        parameters = list(parameters)
        self._model, self._alone, self._known = model, alone, set(parameters)
        is_count = isinstance(every, int) and not isinstance(every, bool) and every >= 1
        require("every", every, is_count, "an integer >= 1")
        self._every, self._uses, self._blocks = every, 0, blocks
        touched = {*parameters, *(block.parameters[0] for block in blocks)}
        self._marks = {parameter: _LAST.get(parameter) for parameter in touched}
        self._projected = False
        self._settled: set[WeightMatrix] = set()  # nothing trained since the last projection
        ready: dict[int, _Ready] = {}
        self._origins = []
        stay = list(uncovered(parameters, blocks))
        for block in blocks:
            basis = bases[block.name]
            if isinstance(basis, AxisBasis):  # rows of a table: the others may do as they like
                stay.append((block.part.weight.parameter, basis.kept.nonzero()[:, 0]))
                continue
            remover = ready.setdefault(id(basis), _Ready(basis))
            self._origins.append((block, remover, block.part.matrix()))
        self._rest = [
            (parameter, rows, parameter.detach()[rows].clone()) for parameter, rows in stay
        ]

    def check(self) -> None:
        """Before anything moves: refuse a layer that cannot be projected any more."""
        self._require_no_other()
        for block in self._blocks:
            trained = {parameter.requires_grad for parameter in block.parameters}
            why = block.part.bypassed()
            if not why and len(trained) > 1:
                why = "its weight or its bias alone was frozen since, and the two move as one"
            if why:
                raise NullSpaceError(
                    f"layer {block.name!r} cannot be kept: {why}. remove() what attach returned, "
                    "make the space anew and attach anew"
                )
            if True in trained:
                self._settled.discard(block)
        found = set(self._model.parameters())
        if found != self._known if self._alone else not self._known <= found:
            raise NullSpaceError(
                "the model has not the parameters any more that it had when its null space was "
                "taken into use, as after a layer was replaced or adapters were put in: what is "
                "new would move as it likes. remove() what attach returned and attach anew, or "
                "make what keep returned anew"
            )

    def project(self) -> None:
        """Project the displacement since the keeper was made now.

        Raises:
            NullSpaceError: if that would undo what another null space has left.
        """
        self._require_no_other()
        with torch.no_grad(), Autocast().off():
            marks: dict[nn.Parameter, list[int]] = {}
            for block, remover, stored in self._moving():
                origin, moved = self._displacement(block, stored)
                block.part.write(remover.project(moved).add_(origin))
                marks.setdefault(block.parameters[0], []).append(id(remover.basis))
            for parameter, rows, value in self._rest:
                parameter[rows] = value
        _LAST.update(marks)
        self._marks |= marks
        self._uses, self._settled, self._projected = 0, set(self._blocks), True

    def finish(self) -> None:
        """Project what has come since the last use, unless all of it is another null space's."""
        if self._uses or not any(self._undone()):
            self.project()

    def _moving(self) -> Iterator[tuple[WeightMatrix, "_Ready", Tensor]]:
        """What is projected; what was frozen since may not even change by a rounding."""
        for block, remover, stored in self._origins:
            if block not in self._settled or block.parameters[0].requires_grad:
                yield block, remover, stored

    @staticmethod
    def _displacement(block: WeightMatrix, stored: Tensor) -> tuple[Tensor, Tensor]:
        origin = at_least_single(stored)
        return origin, at_least_single(block.part.matrix()) - origin

    def _require_no_other(self) -> None:
        """Raise NullSpaceError if another null space is at work on a layer in turn with this one.

        Each would project what the other has left, so that neither function were kept. What is
        found to be in order is not asked about again: a step may follow before the projection.
        """
        for name in self._undone():
            raise NullSpaceError(
                f"{name} was projected by another null space since this one was: each would undo "
                "the other's work. Use one space for both, as from `NullSpace.merge`, or remove() "
                "the other and attach this one anew"
            )
        self._marks = {parameter: _LAST.get(parameter) for parameter in self._marks}

    def _undone(self) -> Iterator[str]:
        """Layers and other parameters that others have projected since, and this one would undo."""
        for block, remover, stored in self._moving():
            if self._is_undoing(block, remover, stored):
                yield f"layer {block.name!r}"
        for parameter, rows, value in self._rest:
            marked = _LAST.get(parameter) is not self._marks[parameter]
            if marked and not torch.equal(parameter[rows], value):
                names = {p: name for name, p in self._model.named_parameters()}
                name = names.get(parameter, "")
                yield f"parameter {name!r}, which has to stay in this null space,"

    def _is_undoing(self, block: WeightMatrix, remover: "_Ready", stored: Tensor) -> bool:
        """Whether another has projected a layer since, to where this one would not let it be.

        Nothing is undone where the weights are as they were again, or where the spaces are equal.
        """
        parameter = block.parameters[0]
        last = _LAST.get(parameter)
        if last is self._marks[parameter] or id(remover.basis) in last:
            return False
        with torch.no_grad(), Autocast().off():
            origin, moved = self._displacement(block, stored)
            undone = moved - remover.project(moved)
            rounding = torch.finfo(parameter.dtype).eps * (origin.norm() + moved.norm())
            return not bool(undone.norm() <= rounding)

    def used(self, is_kept: bool = False) -> None:
        """Count a use, and project if it is time, unless nothing has changed in this one."""
        self._uses += 1
        if self._uses >= self._every and not is_kept:
            self.project()

    def __del__(self) -> None:
        if getattr(self, "_uses", 0) and not self._projected:
            warnings.warn(
                f"a null space with every={self._every} was used {self._uses} times and let go "
                "before it projected: nothing was kept. Make a keeper once, before the loop, use "
                "it in each step, and end with its project(), or remove() of what attach returned",
                stacklevel=2,
            )

    def __enter__(self) -> "Keeper":
        self.check()
        return self

    def __exit__(self, *_: Any) -> None:
        self.used()


class _Ready:
    """A projector for many uses: as `Projector.project`, in fewer operations.

    The directions are brought to the precision of the matrices once. Where more than half are
    locked, the free ones are found once, and a matrix's part along them is taken: that is the
    smaller product, and nothing has to be done twice, for no difference of near numbers is taken.
    """

    def __init__(self, basis: Projector) -> None:
        self.basis = basis
        self._vectors: dict[torch.dtype, Tensor] = {}
        self._takes = isinstance(basis, Basis) and len(basis.shape) == 1
        self._free = self._takes and 2 * basis.rank > basis.shape[-1]

    def project(self, matrix: Tensor) -> Tensor:
        """The matrix with its action on the kept space removed, as a new tensor."""
        if not self._takes:
            return self.basis.project(matrix)
        vectors = self._vectors.get(matrix.dtype)
        if vectors is None:
            vectors = self._vectors[matrix.dtype] = self._directions().to(matrix.dtype)
        if self._free:
            return aligned_mm(matrix @ vectors, vectors.mT)
        once = _rest(matrix, vectors)
        return once if 2 * once.norm() > matrix.norm() else _rest(once, vectors)

    def _directions(self) -> Tensor:
        assert isinstance(self.basis, Basis)
        return self.basis.free_directions() if self._free else self.basis.vectors


def _rest(matrix: Tensor, vectors: Tensor) -> Tensor:
    """``M - M B Bᵀ`` in one pass over what is left."""
    place = empty_aligned(matrix, *matrix.shape)
    return torch.addmm(matrix, matrix @ vectors, vectors.mT, alpha=-1, out=place)


class Attachment:
    """A null space at work behind every step of an optimizer; see `NullSpace.attach`.

    As a context manager it is removed at the end, also after an error.
    """

    def __init__(
        self, optimizer: Optimizer, keeper: Keeper, project_gradients: Callable[[], None]
    ) -> None:
        self._optimizer, self._keeper = optimizer, keeper
        self._project_gradients = project_gradients
        self._parameters = _identities(optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def project(self) -> None:
        """Project the displacement since `NullSpace.attach` now, as before an evaluation."""
        self._keeper.project()

    def remove(self) -> None:
        """Project what has come since the last projection, and let the optimizer alone."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._keeper.finish()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Refuse a step that would move what nobody projects.

        L-BFGS moves many times within a step, and learns the curvature from where it believes to
        be: it is given projected gradients, so that it does not leave the null space.
        """
        if _identities(optimizer) != self._parameters:
            raise NullSpaceError(
                "the optimizer has got other parameters since the null space was attached to it, "
                "as by add_param_group: remove() what attach returned and attach anew"
            )
        self._keeper.check()
        closure = kwargs.get("closure", args[-1])
        if not isinstance(optimizer, torch.optim.LBFGS) or closure is optimizer:
            return None

        def projected() -> Any:
            loss = closure()
            self._project_gradients()
            return loss

        return (optimizer, projected), {}

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        self._keeper.used(is_kept=_skipped(optimizer))


def optimizer_to_attach_to(optimizer: Any) -> Optimizer:
    """The optimizer itself, or the one inside a wrapper without hooks, as those of Accelerate.

    Raises:
        TypeError: for something else.
        NullSpaceError: if a null space is attached to it already.
    """
    inner = optimizer
    while not (isinstance(inner, Optimizer) and hasattr(inner, "_optimizer_step_post_hooks")):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"attach() takes a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
    hooks = inner._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in hooks):
        raise NullSpaceError(
            "a null space is attached to this optimizer already, and one projection after another "
            "keeps neither function. Merge the spaces (`merge`), or remove() the other one first"
        )
    return inner


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """The parameters of all groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


def uncovered(
    parameters: Iterable[nn.Parameter], blocks: Sequence[WeightMatrix]
) -> Iterator[tuple[nn.Parameter, Any]]:
    """What no block covers: parameters, each with an index of those of its rows.

    A packed attention layer has three matrices in one parameter, of which some may be frozen.
    """
    slots = [slot for block in blocks for slot in block.part.slots]
    for parameter in dict.fromkeys(parameters):
        own = [slot.rows for slot in slots if slot.parameter is parameter]
        if not own:
            yield parameter, EVERYTHING
            continue
        rest = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)
        for rows in own:
            rest[rows] = False
        if bool(rest.any()):
            yield parameter, rest


def project_gradients(
    blocks: Sequence[WeightMatrix],
    bases: Mapping[str, Projector],
    parameters: Iterable[nn.Parameter],
) -> None:
    """Project the ``.grad`` of the blocks in place; those of the other parameters become zero."""
    with torch.no_grad(), Autocast().off():
        grads = {p: _grad(p) for block in blocks for p in block.parameters}
        for block in blocks:
            matrix = at_least_single(block.part.of(grads))
            pieces = block.part.split(bases[block.name].project(matrix))
            for slot, piece in zip(block.part.slots, pieces, strict=True):
                slot.of(grads[slot.parameter]).copy_(piece)
        for parameter, rows in uncovered(parameters, blocks):
            if rows is not EVERYTHING:
                grads[parameter][rows] = 0.0
            elif parameter.grad is not None:
                parameter.grad.zero_()
        for parameter, grad in grads.items():
            if parameter.grad is None and bool(grad.any()):  # the weight has moved it
                parameter.grad = grad
            elif parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = grad.to_sparse(1)


def _grad(parameter: nn.Parameter) -> Tensor:
    """The gradient, dense: what a sparse one leaves out is zero."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad


def _identities(optimizer: Optimizer) -> list[int]:
    return [id(parameter) for parameter in parameters_of(optimizer)]


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler has let a fused optimizer skip this step.

    Others it does not call, so that their hooks do not run.
    """
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
