"""The null space as a tool of its own: change a model without changing what it does on given data.

Teleportation moves in the null space of a batch's inputs. The same space keeps an old function
while something new is learned (theorem ``thm-keep``): behind every step of an optimizer
(`NullSpace.attach`), around any code (`NullSpace.keep`), or in the gradients
(`NullSpace.project_`), the part that acts on the span of the old data's inputs is taken away.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teleport.errors import NullSpaceError, UnsupportedModelError
from teleport.keeping.adapters import lora_
from teleport.keeping.choice import LEFT_OUT, Tau, left_out_of, taus_of
from teleport.keeping.drift import (
    DriftReport,
    layer_drifts,
    locked_share,
    output_drift,
    trainable_as,
)
from teleport.keeping.editing import Edit, edit
from teleport.keeping.file import read, write
from teleport.keeping.joint import kept_by_both
from teleport.keeping.keeper import (
    Attachment,
    Keeper,
    optimizer_to_attach_to,
    parameters_of,
    project_gradients,
)
from teleport.keeping.progress import progress_bar
from teleport.keeping.survey import Survey
from teleport.keeping.unfinished import Unfinished
from teleport.layers.support import (
    NO_GRADIENT,
    Coverage,
    cover,
)
from teleport.report import text_table
from teleport.runtime.closures import closures_of
from teleport.runtime.precision import Autocast
from teleport.runtime.ranks import ranks_of, silenced
from teleport.runtime.transaction import Transaction
from teleport.subspace import Projector


class NullSpace:
    """Bases of a model's layer inputs on some data; what is orthogonal to them is free.

    Made by `null_space`. It is applied to any model whose covered layers have the same names and
    shapes. Of the model it was made of it has a weak reference, so that `attach` finds the layers
    by the optimizer alone; a space that was loaded, copied or pickled has none.

    Args:
        bases: as the attribute.
        frozen: as the attribute.
        model: the model they are of, if it is at hand.

    Attributes:
        bases: one `Basis` per covered layer, by name. A layer the data never reached has rank 0;
            layers with the same inputs share one.
        frozen: why each other layer with parameters must stay as it is, by name.
    """

    def __init__(
        self,
        bases: dict[str, Projector],
        frozen: Mapping[str, str] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.bases = bases
        self.frozen = dict(frozen or {})
        self._model = None if model is None else weakref.ref(model)

    def attach(
        self, optimizer: Any, every: int = 1, *, model: nn.Module | None = None
    ) -> Attachment:
        """Keep the old outputs behind every step of an optimizer, in any training loop.

        By the optimizer's own step hooks: after every ``every``-th step the whole displacement of
        its layers since now is projected (``thm-keep``, part 1). A step that a gradient scaler
        skips changes nothing; accumulation, closures, several groups, schedulers and fused steps
        need nothing else; L-BFGS gets projected gradients, too. Neither hooks nor anything about
        the space is in the optimizer's state or in a copy of it: attach again after loading one,
        with the model as it is then.

        A layer with any parameter in the optimizer is projected whole, weight and bias. Parameters
        of the optimizer outside of the covered layers are put back. A layer that is frozen later
        stays; for one that comes later, or of which a weight or bias alone is frozen later, the
        space has to be made and attached anew.

        Args:
            optimizer: a ``torch.optim.Optimizer``, or a wrapper with one as its ``optimizer``.
            every: steps between two projections, >= 1. In between the old outputs move.
            model: whose parameters it has; by default the one that the space was made of.

        Returns:
            A handle; `Attachment.project` projects now, `Attachment.remove` once more at the end.
            As a context manager it is removed at the end of the context.

        Raises:
            ValueError: if ``every`` < 1.
            TypeError: if it is no optimizer.
            NullSpaceError: if the model is not known or its layers are not those of this space, if
                the optimizer has parameters of another model or none that may move, or if a space
                is attached to it already. Later, from a step, before anything is moved: if
                parameters were added to the optimizer, layers replaced or frozen in part, or if
                another null space has moved weights since, and this one would undo that.
        """
        inner = optimizer_to_attach_to(optimizer)
        model = self._made_of() if model is None else model
        parameters = list(parameters_of(inner))
        _require_own(parameters, model)
        held = set(parameters)
        blocks = [b for b in self._match(model).blocks if not held.isdisjoint(b.parameters)]
        if not blocks:
            raise NullSpaceError(
                "the optimizer has no parameter of a layer that may move in this null space: it "
                f"would train nothing. May move: {', '.join(self.bases) or 'none'}"
            )
        whole = [p for block in blocks for p in block.parameters]
        keeper = Keeper(blocks, self.bases, [*parameters, *whole], every, model, alone=False)
        project = partial(project_gradients, blocks, self.bases, parameters)
        return Attachment(inner, keeper, project)

    def keep(self, model: nn.Module, every: int = 1) -> Keeper:
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
            NullSpaceError: if the model's layers are not those of this space; at a use also if it
                got or lost parameters since, or if another null space has moved weights since,
                and this one would undo that.
        """
        blocks = self._match(model).blocks
        return Keeper(blocks, self.bases, model.parameters(), every, model, alone=True)

    def project_(self, model: nn.Module) -> None:
        """Project the ``.grad`` of every covered layer in place; other gradients become zero.

        After it a step of SGD, with or without momentum, keeps the outputs on the data: exactly
        at tau = 1 (``thm-keep``). For optimizers that rescale gradients use `attach` or `keep`.

        Raises:
            NullSpaceError: if the model's layers are not those of this space.
        """
        blocks = self._match(model).blocks
        project_gradients(blocks, self.bases, model.parameters())

    def lora_(self, peft_model: nn.Module) -> dict[str, int]:
        """Put low-rank adapters into the null space, so that any optimizer keeps the old function.

        The rows of every active ``lora_A`` are projected, brought to the lengths they had, and
        frozen, by a hook of the layer, for PEFT frees them wherever an adapter is chosen. Then
        ``A x = 0`` for all old inputs: the outputs on the old data, in evaluation mode, are the
        same whatever ``lora_B`` becomes (at tau = 1; below, to the energy left out,
        ``thm-drift``). A step costs what it did. Adapters whose layers have no direction left get
        zeros, and learn nothing.

        Args:
            peft_model: the model of this space with adapters of PEFT on linear and convolutional
                layers, that are new (``lora_B`` is 0) or in this null space already: call it again
                for adapters that were loaded to be trained further.

        Returns:
            How many input directions each adapter may use, by the name of its layer.

        Raises:
            NullSpaceError: if there are no adapters, if one is on a layer that is not in this space
                or has been trained, if none has a direction left, or if other parameters would be
                trained as well, as biases. The model is as before.
        """
        return lora_(self.bases, peft_model)

    def edit(
        self,
        model: nn.Module,
        layer: str,
        keys: Tensor,
        values: Tensor,
        rcond: float | None = None,
    ) -> tuple[Edit, "NullSpace"]:
        """Change one linear layer by the least that maps new keys to new values, in closed form.

        The change is in the null space: outputs on the old data stay (``thm-keep``). Where a key
        has no part in it, nothing is forced: what is missing is the residual of the result.

        Args:
            model: the model; its weights are changed in place.
            layer: name of the layer, as in `bases`.
            keys: ``[n, features]``, inputs of that layer.
            values: ``[n, d_out]``, the outputs wanted for them, bias included.
            rcond: directions in which the free parts of the keys are, as singular values, at most
                this share of the norm of all keys are given up, for reaching them takes large
                weights; in [0, 1). By default only those that the rank rule (``thm-rank``) calls 0.

        Returns:
            What was done, and the space that keeps the new outputs of this layer, too: use it for
            the next edit. This one stays as it is.

        Raises:
            ValueError: if keys or values are of other shapes or not finite, or ``rcond`` is out of
                range.
            NullSpaceError: if the model's layers are not those of this space, the layer is none
                of them or not a linear one, or if the keys have more independent directions than
                its null space. The model is as before.
        """
        blocks = {block.name: block for block in self._match(model).blocks}
        if layer not in blocks:
            raise NullSpaceError(
                f"no layer {layer!r} may move in this null space"
                f"{': ' + self.frozen[layer] if layer in self.frozen else ''}; there are "
                f"{', '.join(blocks)}"
            )
        with torch.no_grad(), Autocast().off():
            done, basis = edit(blocks[layer], self.bases[layer], keys, values, rcond)
        return done, NullSpace({**self.bases, layer: basis}, self.frozen, self._alive())

    def merge(self, other: "NullSpace", tau: Tau = 1.0) -> "NullSpace":
        """The space that keeps both: bases of the joint span, re-factorized.

        A layer that one of them keeps frozen stays so.

        Args:
            other: of the same layers, on other data.
            tau: at less than 1, only this share of the energy that ``other`` holds is kept, what
                this space keeps of it counted, by as few directions more as will do (Gradient
                Projection Memory). Make ``other`` at tau = 1 then. As in `null_space`.

        Raises:
            TypeError: if ``other`` is no null space.
            ValueError: if a tau is outside (0, 1] or a pattern matches no layer.
            NullSpaceError: if the two are of different layers, or for a tau below 1 of an embedding
                or of a tied layer.
        """
        if not isinstance(other, NullSpace):
            raise TypeError(f"merge() takes another NullSpace, got {type(other).__name__}")
        frozen = {**other.frozen, **self.frozen}
        ours, theirs = (
            {name: shape for name, shape in space._shapes().items() if name not in frozen}
            for space in (self, other)
        )
        if ours != theirs:
            raise NullSpaceError(
                f"these null spaces are of different layers: {_difference(ours, theirs)}"
            )
        taus = taus_of(tau, list(self.bases), 1.0)
        joint: dict[tuple[int, int, float], Projector] = {}
        merged = {}
        for name in ours:
            one, two, share = self.bases[name], other.bases[name], taus[name]
            key = id(one), id(two), share
            if key not in joint:
                joint[key] = kept_by_both(one, two, share)
            merged[name] = joint[key]
        return NullSpace(merged, frozen, self._alive() or other._alive())

    def grow(self, tau: Tau) -> "NullSpace":
        """The space of the same data at another share of energy, without seeing them again.

        Fewer directions are always at hand. More are if this space holds them, for a space holds
        those directions alone that it keeps: make and save it at the largest tau that may be
        wanted, take smaller ones from it, and later larger ones from it again.

        Args:
            tau: as in `null_space`; layers that no pattern matches stay as they are.

        Returns:
            The new space; this one stays as it is.

        Raises:
            ValueError: if a tau is outside (0, 1] or a pattern matches no layer.
            NullSpaceError: if it takes directions that this space does not hold.
        """
        taus = taus_of(tau, list(self.bases), None)
        grown: dict[tuple[int, float | None], Projector] = {}
        for name, basis in self.bases.items():
            key = id(basis), taus[name]
            if key not in grown:
                grown[key] = basis if taus[name] is None else _at(name, basis, taus[name])
        bases = {name: grown[id(basis), taus[name]] for name, basis in self.bases.items()}
        return NullSpace(bases, self.frozen, self._alive())

    def to(self, device: torch.device | str) -> "NullSpace":
        """The same space with its bases on another device."""
        moved: dict[int, Projector] = {}
        for basis in self.bases.values():
            if id(basis) not in moved:
                moved[id(basis)] = basis.to(torch.device(device))
        bases = {name: moved[id(basis)] for name, basis in self.bases.items()}
        return NullSpace(bases, self.frozen, self._alive())

    def save(self, path: str | Path) -> None:
        """Write the bases to a safetensors file, shared ones once."""
        write(Path(path), self.bases, self.frozen)

    @classmethod
    def load(cls, path: str | Path) -> "NullSpace":
        """Read bases written by `save`, of this version or an earlier one.

        Raises:
            NullSpaceError: if the file is not one.
        """
        return cls(*read(Path(path)))

    def drift(self, before: nn.Module, after: nn.Module, inputs: Iterable[Any]) -> float:
        """Largest absolute difference between the outputs of two models, in evaluation mode.

        Args:
            before: the model as it was.
            after: the model as it is.
            inputs: batches for both: tensors, tuples of arguments or mappings of named ones.

        Returns:
            The difference; NaN if any is NaN or nothing was compared.
        """
        return output_drift(before, after, inputs).largest

    def report(
        self,
        before: nn.Module,
        after: nn.Module,
        old_inputs: Iterable[Any],
        held_out: Iterable[Any] | None = None,
    ) -> DriftReport:
        """How far the old function has drifted: predicted (``thm-drift``) and measured, by layer.

        Args:
            before: the model as it was when the space was made.
            after: the model as it is.
            old_inputs: batches of old data, as in `drift`; those the space was made of, if the
                prediction is to be compared.
            held_out: batches of other data.

        Returns:
            The report; print it. Both models are as before.

        Raises:
            NullSpaceError: if the layers of a model are not those of this space, or what it returns
                cannot be compared.
        """
        with trainable_as(before, after):  # PEFT leaves a merged model frozen
            was, now = self._match(before), self._match(after)
        batches = list(old_inputs)
        return DriftReport(
            layer_drifts(self.bases, was, now, before, batches),
            self.frozen,
            locked_share(self.bases, now, after),
            output_drift(before, after, batches),
            None if held_out is None else output_drift(before, after, held_out),
        )

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

    def _alive(self) -> nn.Module | None:
        return None if self._model is None else self._model()

    def _made_of(self) -> nn.Module:
        model = self._alive()
        if model is None:
            raise NullSpaceError(
                "this null space knows no model: it was loaded or copied, or its model is gone. "
                "Say which: space.attach(optimizer, model=model)"
            )
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def _match(self, model: nn.Module) -> Coverage:
        """What of the model may move; layers frozen since the space was made stay."""
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
        for block in blocks:
            here, there = self.bases[block.name].device, block.parameters[0].device
            if here != there:
                raise NullSpaceError(
                    f"the null space is on {here}, the weights of {block.name!r} are on {there}: "
                    f"use space.to({str(there)!r})"
                )
        return replace(coverage, blocks=blocks)


def null_space(
    model: nn.Module,
    closures: Callable[[], Any] | Iterable[Callable[[], Any]],
    tau: Tau = 1.0,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    progress: bool = True,
    unfinished: str | Path | None = None,
) -> NullSpace:
    """The null space of a model's layer inputs over any amount of data.

    It is of weights. Buffers that training updates, as the statistics of BatchNorm and the vectors
    of spectral normalisation, change the old outputs all the same: train with these modules in
    evaluation mode.

    Args:
        model: the model.
        closures: each runs the model on some of the data; what it returns does not matter; one
            alone needs no list. They
            are taken one at a time, so a generator over a data loader needs the memory of one
            batch and of one ``d_in x d_in`` matrix per layer, layers with the same inputs counted
            once. One is run again, and must then take the same data, if a module draws random
            numbers in train mode or if the forward pass needs gradients. A model in
            ``DistributedDataParallel`` makes it collectively: every rank calls this with its own,
            any number of them or none, and all get the space of all data.
        tau: share of each layer's input energy to keep, in (0, 1]; or a mapping from patterns of
            layer names, as in ``fnmatch``, to shares: the first that matches counts, and 1 where
            none does.
        include: patterns of the layers that may move; all by default. The others stay as they are.
        exclude: patterns of layers that must not move.
        progress: draw a bar on the terminal, if the standard error is one.
        unfinished: a file for what is taken in, written at most once a minute, a Gram matrix for
            each basis, and deleted in the end. If this was interrupted, call it again with the same
            file, model, closures and layers: it goes on where the file ends, to the same bases; a
            file made at a ``tau`` of at most 0.999 serves no larger one.
            Each rank has a file of its own, with its number behind the name.

    Returns:
        The space. Layers the data never reach are free in all directions; those whose weights
        take part in another way than by their layer are left out, see `NullSpace.frozen`.

    Raises:
        ValueError: if a ``tau`` is outside (0, 1], a pattern matches no layer, or ``include`` and
            ``exclude`` leave none.
        UnsupportedModelError: if the model has no covered layer, or its weights are sharded.
        ClosureError: if no closure calls a covered layer, if an input is NaN or infinite, or if
            what a module computes is random in evaluation mode, too.
        NullSpaceError: if the file ``unfinished`` is none of this model and these closures.
    """
    with torch.inference_mode(False), progress_bar(progress) as track:
        coverage = cover(model, at_least_one=True)
        _require_values(coverage)
        names = [block.name for block in coverage.blocks]
        taus = taus_of(tau, names, 1.0)
        left_out = left_out_of(coverage, include, exclude)
        survey = Survey(model, coverage, left_out, taus)
        autocast, ranks = Autocast(), ranks_of(model)
        with autocast.off(), ranks.together(), silenced(model):
            with Transaction(model) as kept, ranks.together():
                file = Unfinished(unfinished, model, survey, ranks)
                for closure in file.rest(track(closures_of(closures), "old data")):
                    survey.add(closure, autocast, kept.quiet)
            bases, used = survey.bases(ranks, track)
        file.unlink()
    stay = {block.name: LEFT_OUT for block in coverage.blocks if block in left_out}
    return NullSpace(bases, {**coverage.frozen, **stay, **used}, model)


def _require_values(coverage: Coverage) -> None:
    """Raise UnsupportedModelError for weights on the device meta."""
    for block in coverage.blocks:
        if any(parameter.is_meta for parameter in block.parameters):
            raise UnsupportedModelError(
                f"the weights of layer {block.name!r} have no values (device meta), as where a "
                "part of the model is not loaded or waits on a disk: load all of it first"
            )


def _require_own(parameters: Iterable[nn.Parameter], model: nn.Module) -> None:
    """Raise NullSpaceError for parameters that are not of this model."""
    own = set(model.parameters())
    foreign = [tuple(parameter.shape) for parameter in parameters if parameter not in own]
    if foreign:
        raise NullSpaceError(
            f"{len(foreign)} parameters of the optimizer, of shapes {foreign[:3]}"
            f"{' and others' * (len(foreign) > 3)}, are none of the {type(model).__name__} of this "
            "null space: nobody could keep them. Was the model copied, or a layer replaced? Give "
            "the optimizer's own model: space.attach(optimizer, model=model)"
        )


def _at(name: str, basis: Projector, tau: float) -> Projector:
    try:
        return basis.at(tau)
    except ValueError as error:
        raise NullSpaceError(
            f"layer {name!r}: {error}. Make the space at the largest tau that may be wanted, and "
            "take others from it by grow()"
        ) from None


def _difference(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    names = [n for n in {**wanted, **found} if wanted.get(n) != found.get(n)]
    parts = (f"{n}: {wanted.get(n, 'absent')} against {found.get(n, 'absent')}" for n in names)
    return "; ".join(parts)
