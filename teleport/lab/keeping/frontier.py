"""New words learned against an old index kept: every way to fine-tune, from the same start."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from teleport.keeping.null_space import NullSpace, null_space
from teleport.lab.experiments.entry import one_of
from teleport.lab.keeping.comparison import (
    EVERY,
    HELD,
    USES_SPACE,
    Recipe,
    look_row,
    looks,
    run_ways,
    with_adapters,
    with_own_network,
)
from teleport.lab.keeping.words import (
    WORD_SIZES,
    Examination,
    WordSize,
    WordTask,
    give_tokens,
    sentence_model,
    word_task,
)
from teleport.lab.records.record_folder import RecordFolder
from teleport.lab.records.study import Row
from teleport.runtime.clock import now

WORDS_TITLE = "new words for MiniLM beside an old index"
ALPHAS = (0.7, 0.5, 0.3)
"""Where between the old weights, 0, and those at the end, 1, models are looked at, too."""

_LINEAR = ["query", "key", "value", "dense"]

DEFAULT_WAYS = (
    Recipe("tokens", 1e-2),
    Recipe("attach", 1e-3, 0.97),
    Recipe("embedding", 1e-2),
    Recipe("embedding null", 1e-2),
    Recipe("plain", 3e-4),
    *(Recipe("lora", 3e-3, decay) for decay in (0.0, 10.0)),
    Recipe("lora null", 1e-2, 0.9),
    Recipe("distil", 3e-4, 10.0),
    Recipe("attach+distil", 1e-3, 0.97),
    Recipe("osf", 1e-3, 0.5),
    Recipe("plain", 1e-4),
    Recipe("pull", 3e-4, 1.0),
)


class _Start:
    """What all ways of a seed share: the task, the model as it was, its null space."""

    def __init__(self, size: WordSize, seed: int, choosing: bool) -> None:
        self.task: WordTask = word_task(size, seed, choosing)
        self.model = sentence_model(size.model, self.task)
        self.examination = Examination(self.model, self.task)
        self.targets = self.model.vectors(self.task.targets)
        self.old = self.model.vectors(self.task.old)
        self.space_seconds = {"embedding null": 0.0, "": 0.0}
        self._spaces: dict[str, NullSpace] = {}

    def space(self, way: Recipe) -> NullSpace:
        """Of the old sentences: of the token vectors for the way that trains these alone.

        For the others of all but these, for a token that no old sentence has would be free to move,
        and others have it. Each is made once.
        """
        kind = way.method if way.method == "embedding null" else ""
        if kind not in self._spaces:
            started, old = now(), self.task.old
            parts = [old[i : i + 64] for i in range(0, len(old), 64)]
            closures = [lambda part=part: self.model.encode(part) for part in parts]
            if kind:
                chosen: Any = {"tau": 1.0, "include": ["*word_embeddings"]}
            else:
                chosen = {"tau": HELD, "exclude": ["embeddings*"]}
            self._spaces[kind] = null_space(self.model.network, closures, **chosen)
            self.space_seconds[kind] = now() - started
        return self._spaces[kind] if kind else self._spaces[kind].grow(way.value or 1.0)


class _Run:
    """One way on its course."""

    def __init__(self, start: _Start, way: Recipe, size: WordSize, seed: int) -> None:
        self.start, self.way, self.size = start, way, size
        self.draws = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = with_own_network(start.model)
        method, value = way.method, way.value
        if method in ("embedding", "embedding null", "tokens"):
            self._train_embedding_alone()
        network = self.model.network
        self.first = {name: p.detach().clone() for name, p in network.named_parameters()}
        if method in ("lora", "lora null", "osf"):
            self.model.network = _adapted(network, way)
        if method == "lora null":
            start.space(way).lora_(self.model.network)
        trained = [p for p in self.model.network.parameters() if p.requires_grad]
        decay = (value or 0.0) if method == "lora" else 0.0
        self.optimizer = AdamW(trained, lr=way.lr, weight_decay=decay)
        self.origin = [p.detach().clone() for p in trained] if method == "pull" else []
        self.attached = None
        if method in ("attach", "attach+distil", "embedding null"):
            self.attached = start.space(way).attach(self.optimizer, EVERY, model=self.model.network)

    def _train_embedding_alone(self) -> None:
        if self.way.method == "tokens":
            new = give_tokens(self.model, self.start.task.words)
        network: Any = self.model.network
        table = network.get_input_embeddings().weight
        network.requires_grad_(requires_grad=False)
        table.requires_grad_()
        if self.way.method == "tokens":
            own = torch.zeros(len(table), 1)
            own[new] = 1.0
            table.register_hook(lambda grad: grad * own)

    def rows(self, told: Callable[[int], None]) -> Iterator[Row]:
        """Evaluations at the start, every few steps, at the end, and on the way back from there."""
        size, seconds = self.size, 0.0
        for step, seconds in looks(
            self.optimizer, self._loss, size.steps, size.evaluate_every, self.attached, told
        ):
            yield self._row(step, seconds)
        yield from self._back(size.steps, seconds)

    @torch.no_grad()
    def _back(self, step: int, seconds: float) -> Iterator[Row]:
        """Between the weights at the end and those of the start, by all methods alike."""
        network: Any = self.model.network
        if self.way.method in ("lora", "lora null", "osf"):
            network = self.model.network = network.merge_and_unload()
        ends = {name: value.clone() for name, value in network.named_parameters()}
        for alpha in ALPHAS:
            for name, value in network.named_parameters():
                value.copy_(torch.lerp(self.first[name], ends[name], alpha))
            yield {**self._row(step, seconds), "alpha": alpha}

    def _row(self, step: int, seconds: float) -> Row:
        method, spent = self.way.method, self.start.space_seconds
        space_seconds = spent.get(method, spent[""]) if method in USES_SPACE else 0.0
        return look_row(self.start.examination.of(self.model), step, seconds, space_seconds)

    def _loss(self, step: int) -> Tensor:
        task, method = self.start.task, self.way.method
        rows = torch.randperm(len(task.learned), generator=self.draws)[: self.size.batch].tolist()
        vectors = self.model.encode([task.learned[i] for i in rows])
        loss = (vectors - self.start.targets[rows]).square().sum(1).mean()
        if method == "pull":
            pairs = zip(self.optimizer.param_groups[0]["params"], self.origin, strict=True)
            distance = torch.stack([(p - q).square().sum() for p, q in pairs]).sum()
            return loss + (self.way.value or 0.0) / 2 * distance
        if method in ("distil", "attach+distil"):
            weight = self.way.value or 0.0 if method == "distil" else 1.0
            rows = torch.randperm(len(task.old), generator=self.draws)[: self.size.batch].tolist()
            again = self.model.encode([task.old[i] for i in rows])
            return loss + weight * (again - self.start.old[rows]).square().sum(1).mean()
        return loss


def _adapted(network: nn.Module, way: Recipe) -> nn.Module:
    if way.method != "osf":
        return with_adapters(network, _LINEAR, exclude_modules="pooler.dense")
    from peft import OSFConfig, get_peft_model

    config = OSFConfig(target_modules=_LINEAR, effective_rank=way.value)
    adapted: nn.Module = get_peft_model(network, config).eval()
    return adapted


def run_words(
    preset: str,
    seeds: Sequence[int],
    out: RecordFolder,
    *,
    ways: Sequence[Recipe] = DEFAULT_WAYS,
    choosing: bool = False,
) -> list[Path]:
    """Teach new words in every way, with every seed; one record file each.

    Each seed draws words, sentences and order; ``choosing`` draws from those that are for choosing
    settings. Errors as of `run_ways`, `require_packages` and `teleport.data.load`; ValueError for
    an unknown preset.
    """
    size = one_of("preset", preset, WORD_SIZES)
    shared = {"figure": "words", "title": WORDS_TITLE, "preset": preset, "choosing": choosing}
    shared["size"] = asdict(size)
    return run_ways(
        shared,
        ways,
        seeds,
        out,
        lambda seed: _Start(size, seed, choosing),
        lambda start, way, seed, told: _Run(start, way, size, seed).rows(told),
        size.steps,
    )
