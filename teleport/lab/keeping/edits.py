"""New facts put into a language model: in closed form, or by training, with the null space or not.

A closed form changes one matrix, the output of a layer's feed-forward part, as MEMIT does (Meng et
al. 2023, arXiv 2210.07229). Its keys are the inputs of that matrix where a subject ends, its values
what comes out there, changed by what makes the model say the answer, which a short search finds.
With keys as rows ``K``, ``E`` the change wanted of their outputs and ``C`` the second moment of the
inputs on old text, MEMIT takes ``ΔWᵀ = (λC + KᵀK)⁺ Kᵀ E``; `NullSpace.edit` the least change in
the null space of old inputs. Training changes the same kind of matrix in several layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, AdamW

from teleport.keeping.null_space import NullSpace, null_space
from teleport.lab.experiments.entry import one_of
from teleport.lab.keeping.comparison import (
    EVERY,
    HELD,
    Recipe,
    look_row,
    looks,
    run_ways,
    with_adapters,
    with_own_network,
)
from teleport.lab.keeping.facts import (
    CONTEXTS,
    FACT_SIZES,
    FactExamination,
    FactSize,
    LanguageModel,
    fact_task,
    inputs_of,
    language_model,
)
from teleport.lab.records.record_folder import RecordFolder
from teleport.lab.records.study import Row
from teleport.runtime.clock import now

EDITS_TITLE = "new facts for a language model"
SEARCH_LR, SEARCH_DECAY = 0.0125, 0.5
"""Of the search for values: changes are counted in norms of the outputs."""

DEFAULT_EDITS = (
    *(Recipe("edit", 0.0, tau) for tau in (0.9, 0.97)),
    *(Recipe("memit", 0.0, strength) for strength in (1e4, 1e5)),
    Recipe("plain", 1e-3),
    Recipe("attach", 1e-3, 0.97),
    Recipe("lora", 1e-2, 1.0),
    Recipe("lora null", 1e-2, 0.97),
    Recipe("plain", 3e-4),
    Recipe("lora", 1e-2, 0.0),
)


class _Start:
    """What all ways of a seed share: the task, the model as it was, and what is known of it."""

    def __init__(self, size: FactSize, seed: int) -> None:
        self.size = size
        self.task = fact_task(size, seed)
        self.model = language_model(size.model, self.task)
        self.examination = FactExamination(self.model, self.task)
        self.first = self.examination.of(self.model)  # what every way begins with
        first, last = size.trained
        matrices = {self.model.output_matrix(n) for n in range(first, last + 1)}
        modules = self.model.network.named_modules()
        self.trained = [name for name, module in modules if module in matrices]
        self.edited = self.trained[size.layer - first]
        self.search_seconds = self.moment_seconds = self.space_seconds = 0.0

    def space(self, tau: float) -> NullSpace:
        """Of the trained layers on the old sentences."""
        return self._space.grow(tau)

    @cached_property
    def _space(self) -> NullSpace:
        started = now()
        closures = [partial(self.model.read, [sentence]) for sentence in self.task.old]
        found = null_space(self.model.network, closures, HELD, include=self.trained)
        self.space_seconds = now() - started
        return found

    @cached_property
    def moment(self) -> Tensor:
        """Second moment ``[d_in, d_in]`` of the edited matrix's inputs on old text, float64."""
        started = now()
        with inputs_of(self.model.output_matrix(self.size.layer)) as got:
            self.model.read(self.task.old)
        rows = torch.cat([part.flatten(0, -2) for part in got]).double()
        found = rows.mT @ rows / len(rows)
        self.moment_seconds = now() - started
        return found

    @cached_property
    def wanted(self) -> tuple[Tensor, Tensor]:
        """Keys ``[n, d_in]`` of the edited matrix, and values ``[n, d_out]``."""
        started, layer = now(), self.model.output_matrix(self.size.layer)
        subjects = [s[:end] for s, end in zip(self.task.sentences, self.task.ends, strict=True)]
        with inputs_of(layer) as got:
            self.model.read([context.format(text) for context in CONTEXTS for text in subjects])
        keys = torch.cat([one[0, -1:] for one in got])
        with torch.no_grad():
            values: Tensor = layer(keys)
        change = self._searched(layer, subjects, float(values.norm(dim=1).mean()))
        self.search_seconds = now() - started
        return keys, values + change.repeat(len(CONTEXTS), 1)

    def _searched(self, layer: nn.Module, subjects: list[str], scale: float) -> Tensor:
        """The change ``[facts, d_out]`` of outputs where subjects end that makes the answers."""
        answers = self.examination.answers
        change = torch.zeros(len(answers), self.model.width, requires_grad=True)
        optimizer = Adam([change], lr=SEARCH_LR)
        for step in range(self.size.steps):
            context = CONTEXTS[step % len(CONTEXTS)]
            ends = torch.tensor([len(self.model.tokens(context.format(s))) - 1 for s in subjects])
            where = torch.arange(len(ends)), ends
            hook = layer.register_forward_hook(
                lambda _, __, out, where=where: out.index_put(where, change * scale, True)
            )
            with hook:
                logits = self.model.next_words([context.format(s) for s in self.task.sentences])
            loss = cross_entropy(logits, answers, reduction="sum")
            loss = loss + SEARCH_DECAY * change.square().sum()
            (change.grad,) = torch.autograd.grad(loss, change)
            optimizer.step()
        return change.detach() * scale


def closed_form(start: _Start, way: Recipe) -> tuple[LanguageModel, float]:
    """The model behind the one change, and the seconds that it took, the search left out."""
    model, (keys, values) = with_own_network(start.model), start.wanted
    if way.method == "edit":
        space, started = start.space(way.value or 1.0), now()
        space.edit(model.network, start.edited, keys, values)
        return model, now() - started
    layer, moment = model.output_matrix(start.size.layer), start.moment
    started = now()
    with torch.no_grad():
        rows, missing = keys.double(), (values - layer(keys)).double()
        ridge = (way.value or 1.0) * moment + rows.mT @ rows
        # Less old text than the layer is wide leaves the ridge singular: the least change, then.
        move = torch.linalg.pinv(ridge, hermitian=True) @ (rows.mT @ missing)
        layer.weight += move.mT.to(layer.weight)
    return model, now() - started


def _edited(start: _Start, way: Recipe) -> Iterator[Row]:
    """Two looks: as it was, and behind the change."""
    yield look_row(start.first, 0, 0.0, 0.0)
    model, seconds = closed_form(start, way)
    spent = start.space_seconds if way.method == "edit" else start.moment_seconds
    yield look_row(start.examination.of(model), 1, start.search_seconds + seconds, spent)


def _trained(
    start: _Start, way: Recipe, size: FactSize, seed: int, told: Callable[[int], None]
) -> Iterator[Row]:
    """Evaluations at the start, every few steps and at the end."""
    draws = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, method, attached, spent = with_own_network(start.model), way.method, None, 0.0
    if method in ("attach", "lora null"):
        space, spent = start.space(way.value or 1.0), start.space_seconds
    if method.startswith("lora"):
        model.network = with_adapters(model.network, start.trained)
        if method == "lora null":
            space.lora_(model.network)
    else:
        model.network.requires_grad_(requires_grad=False)
        for name in start.trained:
            model.network.get_submodule(name).requires_grad_()
    trained = [p for p in model.network.parameters() if p.requires_grad]
    decay = (way.value or 0.0) if method == "lora" else 0.0
    optimizer = AdamW(trained, lr=way.lr, weight_decay=decay)
    if method == "attach":
        attached = space.attach(optimizer, EVERY, model=model.network)

    def loss(step: int) -> Tensor:
        rows = torch.randperm(size.facts, generator=draws)[: size.batch]
        context = CONTEXTS[step % len(CONTEXTS)]
        texts = [context.format(start.task.sentences[n]) for n in rows.tolist()]
        return cross_entropy(model.next_words(texts), start.examination.answers[rows])

    for step, seconds in looks(optimizer, loss, size.steps, size.evaluate_every, attached, told):
        found = start.examination.of(model) if step else start.first
        yield look_row(found, step, seconds, spent)


def run_edits(
    preset: str, seeds: Sequence[int], out: RecordFolder, *, ways: Sequence[Recipe] = DEFAULT_EDITS
) -> list[Path]:
    """Put new facts into a language model in every way, with every seed; one record file each.

    Each seed draws facts and sentences. Errors as of `run_words`.
    """
    size = one_of("preset", preset, FACT_SIZES)
    shared = {"figure": "edit", "title": EDITS_TITLE, "preset": preset, "size": asdict(size)}

    def rows(start: _Start, way: Recipe, seed: int, told: Callable[[int], None]) -> Iterator[Row]:
        if way.method in ("memit", "edit"):
            yield from _edited(start, way)
            told(size.steps)
        else:
            yield from _trained(start, way, size, seed, told)

    return run_ways(shared, ways, seeds, out, partial(_Start, size), rows, size.steps)
