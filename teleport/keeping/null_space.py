"""The null space as a tool of its own: change a model without changing what it does on given data.

Teleportation moves in the null space of a batch's inputs. The same space keeps an old function
while something new is learned (theorem ``thm-keep``): project gradients (`NullSpace.project_`) or
the displacement of any optimizer (`NullSpace.keep`) out of the span of the old data's inputs.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from teleport.errors import ClosureError, NullSpaceError
from teleport.layers.one_hot import AxisBasis
from teleport.layers.part import LinearMap
from teleport.layers.shared_weight import TiedBasis
from teleport.layers.support import NO_GRADIENT, WeightMatrix, cover
from teleport.recording import USED_OUTSIDE, watch
from teleport.report import text_table
from teleport.runtime.closures import without_gradients
from teleport.runtime.precision import Autocast
from teleport.runtime.randomness import Quiet, RandomState, drawing_modules, names_of_drawing
from teleport.runtime.ranks import Ranks, ranks_of, silenced
from teleport.runtime.transaction import Transaction
from teleport.subspace import Basis, Projector


class NullSpace:
    """Bases of a model's layer inputs on some data; what is orthogonal to them is free.

    Made by `null_space`. It holds no reference to the model: it is applied to any model whose
    covered layers have the same names and shapes.

    Attributes:
        bases: one `Basis` per covered layer, by name. A layer the data never reached has rank 0.
        frozen: why each other layer with parameters must stay as it is, by name.
    """

    def __init__(
        self, bases: dict[str, Projector], frozen: Mapping[str, str] | None = None
    ) -> None:
        self.bases = bases
        self.frozen = dict(frozen or {})

    def project_(self, model: nn.Module) -> None:
        """Project the ``.grad`` of every covered layer in place; other gradients become zero.

        After it a step of SGD, with or without momentum, keeps the outputs on the data: exactly
        at tau = 1 (``thm-keep``). For optimizers that rescale gradients use `keep`.

        Raises:
            NullSpaceError: if the model's layers are not those of this space.
        """
        blocks = self._match(model)
        with torch.no_grad(), Autocast().off():
            covered = {p for block in blocks for p in block.parameters}
            grads = {p: _grad(p) for p in covered}
            for block in blocks:
                projected = self.bases[block.name].project(block.part.of(grads))
                for slot, piece in zip(block.part.slots, block.part.split(projected), strict=True):
                    slot.of(grads[slot.parameter]).copy_(piece)
            for parameter, grad in grads.items():
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = grad.to_sparse(1)
            for parameter in model.parameters():
                if parameter not in covered and parameter.grad is not None:
                    parameter.grad.zero_()

    def keep(self, model: nn.Module, every: int = 1) -> "Keeper":
        """A context in which whatever changes the parameters is projected afterwards.

        ``with space.keep(model): optimizer.step()`` keeps the outputs on the data for every
        optimizer. With ``every=k`` hold on to the keeper and use it around each step: the whole
        displacement since it was made is projected once every k uses, nearly the price of a plain
        step, and by `Keeper.project` at the end.

        Args:
            model: the model; parameters outside the covered layers are put back.
            every: uses between projections, >= 1.

        Raises:
            ValueError: if ``every`` < 1.
            NullSpaceError: if the model's layers are not those of this space.
        """
        return Keeper(model, self._match(model), self.bases, every)

    def merge(self, other: "NullSpace") -> "NullSpace":
        """The space that keeps both: bases of the joint span, re-factorized.

        A layer that one of them keeps frozen stays so.

        Raises:
            NullSpaceError: if the two are of different layers.
        """
        frozen = {**other.frozen, **self.frozen}
        ours, theirs = (
            {name: shape for name, shape in space._shapes().items() if name not in frozen}
            for space in (self, other)
        )
        if ours != theirs:
            raise NullSpaceError(
                f"these null spaces are of different layers: {_difference(ours, theirs)}"
            )
        return NullSpace({n: self.bases[n].merge(other.bases[n]) for n in ours}, frozen)

    def save(self, path: str | Path) -> None:
        """Write the bases to a safetensors file."""
        tensors: dict[str, Tensor] = {}
        layers: dict[str, dict[str, list[str]]] = {}
        for name, basis in self.bases.items():
            layers[name] = {}
            for side, simple in _sides(basis).items():
                kind = next(k for k, of in _KINDS.items() if isinstance(simple, of))
                layers[name][side] = [kind, str(simple.dtype)]
                for field in _FIELDS[kind]:
                    tensors[f"{name}/{side}/{field}"] = getattr(simple, field).contiguous()
        about = {"layers": json.dumps(layers), "frozen": json.dumps(self.frozen)}
        save_file(tensors, str(path), metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> "NullSpace":
        """Read bases written by `save`.

        Raises:
            NullSpaceError: if the file is not one.
        """

        def simple(name: str, side: str, kind: str, dtype: str) -> Projector:
            fields = {f: file.get_tensor(f"{name}/{side}/{f}") for f in _FIELDS[kind]}
            known = getattr(torch, dtype.removeprefix("torch."))
            basis: Projector = _KINDS[kind](**fields, dtype=known)
            return basis

        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                bases = {
                    name: _joined({side: simple(name, side, *of) for side, of in sides.items()})
                    for name, sides in json.loads(about["layers"]).items()
                }
                return cls(bases, json.loads(about.get("frozen", "{}")))
        except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as error:
            raise NullSpaceError(f"{path} holds no saved null space: {error}") from error

    def drift(self, before: nn.Module, after: nn.Module, inputs: Iterable[Tensor]) -> float:
        """Largest absolute difference between the outputs of two models, in evaluation mode.

        Args:
            before: the model as it was.
            after: the model as it is.
            inputs: batches for both.

        Returns:
            The difference; NaN if any is NaN or nothing was compared.
        """
        differences = []
        with silenced(before), silenced(after), Transaction(before), Transaction(after):
            before.eval()
            after.eval()
            for x in inputs:
                one, other = (without_gradients(partial(model, x)) for model in (before, after))
                differences += [(one - other).abs().reshape(-1).max().detach()] * bool(one.numel())
        return float(torch.stack(differences).max()) if differences else math.nan

    def __str__(self) -> str:
        rows = [("layer", "inputs", "rank", "free")]
        for name, basis in self.bases.items():
            total = basis.rank + basis.null_dim
            rows.append((name, str(total), str(basis.rank), str(basis.null_dim)))
        lines = text_table(rows)
        lines += [f"{name or '(model)'}  frozen: {why}" for name, why in self.frozen.items()]
        return "\n".join(lines)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: basis.shape for name, basis in self.bases.items()}

    def _match(self, model: nn.Module) -> list[WeightMatrix]:
        """The blocks of the model that may move; layers frozen since the space was made stay."""
        coverage = cover(model)
        blocks = [b for b in coverage.blocks if self.frozen.get(b.name, NO_GRADIENT) == NO_GRADIENT]
        found = {b.name: (*b.part.matrix_shape[:-2], b.part.matrix_shape[-1]) for b in blocks}
        stays = {name for name, why in coverage.frozen.items() if why == NO_GRADIENT}
        wanted = {n: s for n, s in self._shapes().items() if n in found or n not in stays}
        if found != wanted:
            reasons = [f"{n} is now frozen: {w}" for n, w in coverage.frozen.items() if n in wanted]
            reasons += [f"{n} was frozen then: {self.frozen[n]}" for n in found if n in self.frozen]
            raise NullSpaceError(
                "the model's layers are not those of this null space: "
                f"{'; '.join([_difference(wanted, found), *reasons])}. Make the space anew"
            )
        return blocks


class Keeper:
    """Projects what happened to a model's parameters; see `NullSpace.keep`."""

    def __init__(
        self, model: nn.Module, blocks: list[WeightMatrix], bases: dict[str, Projector], every: int
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be an integer >= 1, got {every}")
        self._model, self._blocks, self._bases, self._every = model, blocks, bases, every
        self._uses = 0
        self._remember()

    def project(self) -> None:
        """Project the displacement since the last projection now."""
        with torch.no_grad(), Autocast().off():
            for block, start in zip(self._blocks, self._matrices, strict=True):
                moved = block.part.matrix() - start
                block.part.write(start + self._bases[block.name].project(moved))
            for parameter, value in self._others:
                parameter.copy_(value)
        self._remember()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_: Any) -> None:
        self._uses += 1
        if self._uses % self._every == 0:
            self.project()

    def _remember(self) -> None:
        covered = {p for block in self._blocks for p in block.parameters}
        self._matrices = [block.part.matrix() for block in self._blocks]
        self._others = [
            (p, p.detach().clone()) for p in self._model.parameters() if p not in covered
        ]


def null_space(
    model: nn.Module, closures: Iterable[Callable[[], Any]], tau: float = 1.0
) -> NullSpace:
    """The null space of a model's layer inputs over any amount of data.

    It is of weights. Buffers that training updates, as the statistics of BatchNorm and the vectors
    of spectral normalisation, change the old outputs all the same: train with these modules in
    evaluation mode.

    Args:
        model: the model.
        closures: each runs the model on some of the data; what it returns does not matter. They
            are taken one at a time, so a generator over a data loader needs the memory of one
            batch and of one ``d_in x d_in`` matrix per layer. One is run again, and must then take
            the same data, if a module draws random numbers in train mode or if the forward pass
            needs gradients. For a model in ``DistributedDataParallel`` every rank gives its own,
            any number of them.
        tau: share of each layer's input energy to keep, in (0, 1].

    Returns:
        The space. Layers the data never reach are free in all directions; those whose weights
        take part in another way than by their layer are left out, see `NullSpace.frozen`.

    Raises:
        ValueError: if ``tau`` is outside (0, 1].
        UnsupportedModelError: if the model has no covered layer.
            ClosureError: if no closure calls a covered layer, if an input is NaN or infinite, or if
            what a module computes is random in evaluation mode, too.
    """
    with torch.inference_mode(False):
        survey = _Survey(model)
        autocast, ranks = Autocast(), ranks_of(model)
        with autocast.off(), ranks.together(), silenced(model), Transaction(model) as kept:
            with ranks.together():
                for closure in closures:
                    survey.add(closure, autocast, kept.quiet)
            return survey.space(tau, ranks)


class _Survey:
    """The inputs of a model's layers, and what shows meanwhile: who uses weights, who draws."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.coverage = cover(model, at_least_one=True)
        self.used: dict[WeightMatrix, str] = {}
        self._forget()

    def add(self, closure: Callable[[], Any], autocast: Autocast, quiet: Quiet) -> None:
        """Take in the inputs that one closure shows.

        The closure is run again if a module draws random numbers: then it was not in evaluation
        mode. What was seen of a first closure is forgotten; of later ones it stays, which only
        keeps more.
        """
        state = RandomState(self.model)
        while True:
            is_first = not self.seen
            quiet.enforce()
            drawing = drawing_modules(self.model, lambda: self._watch(closure, autocast))
            if not quiet.add(drawing):
                break
            state.restore()
            if is_first:
                self._forget()
        if names := names_of_drawing(self.model, drawing):
            raise ClosureError(
                f"{', '.join(names)}: what it computes is random, even in evaluation mode, so "
                "there is no old function to keep. Draw outside of the model, or give closures "
                "that run only its other layers"
            )

    def space(self, tau: float, ranks: Ranks) -> NullSpace:
        """The null space of all that was taken in, on all ranks."""
        flags = ranks.most([block in self.used for block in self.coverage.blocks])
        used = {
            block.name: self.used.get(block, USED_OUTSIDE).removeprefix("frozen: ")
            for block, flag in zip(self.coverage.blocks, flags, strict=True)
            if flag
        }
        free = [block for block in self.coverage.blocks if block.name not in used]
        spaces = {b: self.spaces[b].joined(ranks, b.part.matrix().shape) for b in free}
        if not any(space.count for space in spaces.values()):
            why = "; ".join(f"{name}: {reason}" for name, reason in used.items())
            raise ClosureError(
                "no closure called a covered layer of this model in a way that can be kept; do "
                f"they call it? {why}".rstrip()
            )
        bases = {b.name: b.basis(space, tau).of_first(ranks) for b, space in spaces.items()}
        return NullSpace(bases, {**self.coverage.frozen, **used})

    def _forget(self) -> None:
        self.spaces = {block: block.space() for block in self.coverage.blocks}
        self.seen = False

    def _watch(self, closure: Callable[[], Any], autocast: Autocast) -> None:
        def see(block: WeightMatrix, part: LinearMap, x: Tensor) -> None:
            with Autocast().off():  # that of the closure, too
                block.collect(self.spaces[block], part, x)

        def run() -> None:
            is_first = not self.seen
            with autocast.on():
                try:
                    self.used |= watch(self.coverage.sites, closure, see)
                except RuntimeError:
                    if is_first:
                        self._forget()
                    raise
            self.seen = True

        without_gradients(run)


_KINDS: dict[str, Any] = {"rows": Basis, "axes": AxisBasis}
_FIELDS = {"rows": ("vectors", "singular_values", "ranks"), "axes": ("kept", "counts")}


def _sides(basis: Projector) -> dict[str, Projector]:
    """What a projector is made of, to write it; `_joined` undoes it."""
    if isinstance(basis, TiedBasis):
        return {"own": basis.own, "other": basis.other}
    return {"own": basis}


def _joined(sides: dict[str, Projector]) -> Projector:
    return TiedBasis(**sides) if "other" in sides else sides["own"]


def _grad(parameter: nn.Parameter) -> Tensor:
    """The gradient, dense: what a sparse one leaves out is zero."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad


def _difference(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    names = [n for n in {**wanted, **found} if wanted.get(n) != found.get(n)]
    parts = (f"{n}: {wanted.get(n, 'absent')} against {found.get(n, 'absent')}" for n in names)
    return "; ".join(parts)
