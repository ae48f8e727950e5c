"""New words learned against an old index kept: every way to fine-tune, from the same start."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from teleport.errors import NonFiniteLossError
from teleport.keeping.null_space import NullSpace, null_space
from teleport.lab.experiments.entry import one_of
from teleport.lab.experiments.run import Progress
from teleport.lab.keeping.words import (
    WORD_SIZES,
    Examination,
    SentenceModel,
    WordSize,
    WordTask,
    sentence_model,
    word_task,
)
from teleport.lab.records.checkpoint import locked
from teleport.lab.records.folders import slug
from teleport.lab.records.sameness import check_folder, is_complete
from teleport.lab.records.writer import RecordWriter, environment
from teleport.runtime.clock import now

WORDS_TITLE = "new words for MiniLM beside an old index"
HELD = 0.999
"""Share of energy up to which a space is made, once a seed; smaller ones are taken from it."""

EVERY = 10
RANK = 16
_LINEAR = ["query", "key", "value", "dense"]


@dataclass(frozen=True)
class WordsWay:
    """A method with its settings.

    Attributes:
        method: one of `WORDS_SETTINGS`.
        lr: of AdamW.
        value: of the method's own setting; see `WORDS_SETTINGS`.
    """

    method: str
    lr: float
    value: float | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        setting = "" if self.value is None else f" {WORDS_SETTINGS[self.method]} {self.value:g}"
        return f"{self.method}{setting}, lr {self.lr:g}"


WORDS_SETTINGS = {
    "plain": "",
    "pull": "lambda",
    "lora": "decay",
    "distil": "weight",
    "osf": "share",
    "attach": "tau",
    "lora null": "tau",
    "attach+distil": "tau",
}
"""Methods, and what their setting is.

``plain``: AdamW on all weights. ``pull``: with lambda / 2 times the squared distance to the start.
``lora``: low-rank adapters on all linear layers, with weight decay. ``distil``: with this weight
times the squared distance of old sentences' vectors to what they were. ``osf``: PEFT's, which
freezes this share of the singular directions of the weights. ``attach``: `NullSpace.attach`, every
10 steps. ``lora null``: adapters in the null space, `NullSpace.lora_`.
"""

DEFAULT_WAYS = (
    *(WordsWay("plain", lr) for lr in (1e-4, 3e-4)),
    *(WordsWay("attach", lr, tau) for lr, tau in ((1e-3, 0.9), (1e-3, 0.97), (3e-3, 0.99))),
    *(WordsWay("lora", 3e-3, decay) for decay in (0.0, 10.0)),
    WordsWay("distil", 3e-4, 10.0),
    WordsWay("lora null", 1e-2, 0.9),
    WordsWay("attach+distil", 1e-3, 0.9),
    WordsWay("osf", 1e-3, 0.5),
    WordsWay("pull", 3e-4, 1.0),
)


class _Start:
    """What all ways of a seed share: the task, the model as it was, its null space."""

    def __init__(self, size: WordSize, seed: int, choosing: bool) -> None:
        self.task: WordTask = word_task(size, seed, choosing)
        self.model = sentence_model(size.model, self.task)
        self.examination = Examination(self.model, self.task)
        self.targets = self.model.vectors(self.task.targets)
        self.old = self.model.vectors(self.task.old)
        self.space_seconds = 0.0
        self._space: NullSpace | None = None

    def space(self, tau: float) -> NullSpace:
        """Of the old sentences; made once."""
        if self._space is None:
            started, old = now(), self.task.old
            parts = [old[i : i + 64] for i in range(0, len(old), 64)]
            closures = [lambda part=part: self.model.encode(part) for part in parts]
            self._space = null_space(self.model.network, closures, HELD)
            self.space_seconds = now() - started
        return self._space.grow(tau)

    def copied(self) -> SentenceModel:
        """A model to train."""
        fresh = copy.copy(self.model)
        fresh.network = copy.deepcopy(self.model.network)
        return fresh


class _Run:
    """One way on its course."""

    def __init__(self, start: _Start, way: WordsWay, size: WordSize, seed: int) -> None:
        self.start, self.way, self.size = start, way, size
        self.draws = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = start.copied()
        self.seconds = 0.0
        method, value = way.method, way.value
        if method in ("lora", "lora null", "osf"):
            self.model.network = _adapted(self.model.network, way)
        if method == "lora null":
            start.space(value or 1.0).lora_(self.model.network)
        trained = [p for p in self.model.network.parameters() if p.requires_grad]
        decay = (value or 0.0) if method == "lora" else 0.0
        self.optimizer = AdamW(trained, lr=way.lr, weight_decay=decay)
        self.origin = [p.detach().clone() for p in trained] if method == "pull" else []
        self.attached = None
        if method.startswith("attach"):
            space = start.space(value or 1.0)
            self.attached = space.attach(self.optimizer, EVERY, model=self.model.network)

    def rows(self, told: Callable[[int], None]) -> Iterator[dict[str, Any]]:
        """Evaluations at the start, every few steps and at the end."""
        yield self._row(0)
        for step in range(1, self.size.steps + 1):
            started = now()
            self.optimizer.zero_grad()
            self._loss().backward()
            self.optimizer.step()
            if self.attached is not None and step % self.size.evaluate_every == 0:
                self.attached.project()
            self.seconds += now() - started
            told(1)
            if step % self.size.evaluate_every == 0:
                yield self._row(step)

    def _row(self, step: int) -> dict[str, Any]:
        found = self.start.examination.of(self.model)
        if not all(map(torch.isfinite, map(torch.tensor, found.values()))):
            raise NonFiniteLossError(f"the vectors are not finite after {step} steps")
        return {
            "step": step,
            "train_seconds": self.seconds,
            "space_seconds": self._spent(),
            **found,
        }

    def _spent(self) -> float:
        uses = self.way.method in ("attach", "lora null", "attach+distil")
        return self.start.space_seconds if uses else 0.0

    def _loss(self) -> Tensor:
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


def _adapted(network: nn.Module, way: WordsWay) -> nn.Module:
    from peft import LoraConfig, OSFConfig, get_peft_model

    if way.method == "osf":
        config: Any = OSFConfig(target_modules=_LINEAR, effective_rank=way.value)
    else:
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=_LINEAR, exclude_modules="pooler.dense"
        )
    adapted: nn.Module = get_peft_model(network, config).eval()
    return adapted


def run_words(
    preset: str,
    seeds: Sequence[int],
    out: Path,
    *,
    ways: Sequence[WordsWay] = DEFAULT_WAYS,
    choosing: bool = False,
    resume: bool = False,
    command: str = "",
    progress: Progress = lambda what, steps: None,
) -> list[Path]:
    """Teach new words in every way, with every seed; one record file each.

    Args:
        preset: one of `WORD_SIZES`.
        seeds: each draws words, sentences and order.
        out: an existing folder for the records.
        ways: the ways.
        choosing: with the words and sentences that are for choosing settings.
        resume: leave finished records of the same configuration as they are.
        command: the command line, for the record.
        progress: told about every step.

    Raises:
        ValueError: for an unknown preset.
        RunError: if the folder is in use or holds other records, a package is missing, or a record
            cannot be written.
        DataError: if the old sentences cannot be had.
    """
    size: WordSize = one_of("preset", preset, WORD_SIZES)
    shared = {
        "figure": "words",
        "title": WORDS_TITLE,
        "preset": preset,
        "choosing": choosing,
        "size": asdict(size),
    }
    paths = []
    with locked(out / ".lock", str(out)):
        check_folder(out, "words", shared)
        for seed in seeds:
            start: _Start | None = None
            for order, way in enumerate(ways):
                path = out / f"{order:02d}-{slug(way.name)}-seed{seed}.jsonl"
                paths.append(path)
                config = {
                    **shared,
                    "arm": way.name,
                    "order": order,
                    "seed": seed,
                    "way": asdict(way),
                }
                what = f"{way.name} (seed {seed})"
                if resume and is_complete(path, config):
                    progress(what, size.steps)
                    continue
                if resume:
                    path.unlink(missing_ok=True)
                start = start or _Start(size, seed, choosing)
                with RecordWriter(path) as writer:
                    writer.write("config", command=command, **config, **environment())
                    _record(_Run(start, way, size, seed), writer, partial(progress, what))
    return paths


def _record(run: _Run, writer: RecordWriter, told: Callable[[int], None]) -> None:
    status = "interrupted"
    try:
        for row in run.rows(told):
            writer.write("evaluation", **row)
        status = "finished"
    except NonFiniteLossError:
        status = "diverged"
    finally:
        writer.write("end", status=status)
