import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from teleport import cli
from teleport.data import load
from teleport.errors import RunError
from teleport.lab.analysis.outcomes import markdown
from teleport.lab.experiments.models import mlp
from teleport.lab.keeping.measures import (
    accuracy_matrix,
    average_accuracy,
    backward_transfer,
    course,
    measures,
    summarise_forgetting,
)
from teleport.lab.keeping.methods import LEARNING_METHODS, Lazy, Plain, random_basis
from teleport.lab.keeping.report import forgetting_figure, forgetting_rows
from teleport.lab.keeping.tasks import SEQUENCES, Task
from teleport.lab.keeping.training import (
    TUNED,
    TUNING_SEED,
    SequenceRun,
    Strategy,
    default_strategies,
    run_strategies,
)
from teleport.lab.records.record_folder import RecordFolder
from teleport.lab.records.runs import Run, read_runs
from teleport.subspace import RowSpace
from tests.support.examples import examples

TINY = SequenceRun("digits", "tiny")
DIGIT_METHODS = SEQUENCES["digits"].methods
SEEDS = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def row(task: int, step: int, seconds: float, space: float, accuracies: list[float]) -> dict:
    return {
        "task": task,
        "task_step": step,
        "train_seconds": seconds,
        "space_seconds": space,
        "losses": [1 - a for a in accuracies],
        "accuracies": accuracies,
    }


def record(rows: list[dict], tasks: int, method: str = "plain", seed: int = 0) -> Run:
    config = {
        "arm": method,
        "seed": seed,
        "order": 0,
        "tasks": tasks,
        "sequence": "digits",
        "strategy": {"method": method, "lr": 0.1, "tau": None},
    }
    return Run(Path(), config, rows, [], "finished")


@given(tasks=st.integers(2, 5), looks=st.integers(1, 3), seed=SEEDS)
def test_the_accuracy_matrix_holds_the_last_look_after_each_task(
    tasks: int, looks: int, seed: int
) -> None:
    drawn = np.random.default_rng(seed).random((tasks, looks, tasks))
    rows = [
        row(task, look, 0.0, 0.0, list(drawn[task, look, : task + 1]))
        for task in range(tasks)
        for look in range(looks)
    ]
    matrix = accuracy_matrix(record(rows, tasks))
    final = drawn[-1, -1]
    for i in range(tasks):
        for j in range(tasks):
            assert np.isnan(matrix[i, j]) if j > i else matrix[i, j] == drawn[i, -1, j]
    assert average_accuracy(matrix) == pytest.approx(sum(final) / tasks)
    forgotten = [final[j] - drawn[j, -1, j] for j in range(tasks - 1)]
    assert backward_transfer(matrix) == pytest.approx(sum(forgotten) / (tasks - 1))


def two_tasks(method: str, speed: float, basis: float) -> Run:
    """Losses of the new task 0.8, 0.4, 0.2; of the old one 0.1, 0.2, 0.3."""
    rows = [row(0, 5, 3.0, 0.5, [0.9])]
    for n, (old, new) in enumerate([(0.9, 0.2), (0.8, 0.6), (0.7, 0.8)]):
        rows.append(row(1, 10 * n, 3.0 + speed * n, 0.5 + basis, [old, new]))
    return record(rows, 2, method)


def test_seconds_count_from_the_end_of_the_old_task_with_the_bases() -> None:
    columns = course(two_tasks("lazy", 2.0, 1.0), 1)
    assert columns["seconds"].tolist() == [1.0, 3.0, 5.0]
    assert columns["space_seconds"].tolist() == [1.0, 1.0, 1.0]
    assert columns["step"].tolist() == [0.0, 10.0, 20.0]


def test_measures_are_read_off_where_the_new_loss_is_reached() -> None:
    lazy, plain = two_tasks("lazy", 2.0, 1.0), two_tasks("plain", 1.0, 0.0)
    found = measures(lazy, plain, reach=0.4, compare=0.2)
    assert found["steps"] == pytest.approx(10.0)
    assert found["seconds_ratio"] == pytest.approx(3.0 / 1.0)
    assert found["step_ratio"] == pytest.approx(2.0)
    assert found["old_loss"] == pytest.approx(0.3)
    assert (found["old_accuracy"], found["new_accuracy"]) == (0.7, 0.8)
    assert found["bwt"] == pytest.approx(-0.2)
    never = measures(lazy, None, reach=0.1, compare=0.1)
    assert np.isnan([never["steps"], never["seconds_ratio"], never["old_loss"]]).all()


def test_a_run_is_compared_to_plain_of_its_own_seed() -> None:
    runs = [
        record(two_tasks(method, speed, 0.0).evaluations, 2, method, seed)
        for seed, base in ((0, 1.0), (1, 4.0))
        for method, speed in (("plain", base), ("lazy", 2 * base))
    ]
    found = summarise_forgetting(runs, 0.4, 0.4)
    assert found["lazy"]["seconds_ratio"] == pytest.approx((2.0, 0.0))
    assert found["plain"]["seconds"] == pytest.approx((2.5, np.std([1, 4], ddof=1)))


@given(
    d=st.integers(2, 12),
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    seed=SEEDS,
)
def test_a_random_basis_has_the_same_ranks_and_is_orthonormal(
    d: int, ranks: list[int], seed: int
) -> None:
    space = RowSpace()
    rows = torch.zeros(len(ranks), 8, d, dtype=torch.float64)
    for group, rank in enumerate(ranks):
        torch.manual_seed(seed % 1000 + group)
        rows[group] = torch.randn(8, rank).double() @ torch.randn(rank, d).double()
    space.add(rows)
    basis = space.basis()
    found = random_basis(basis, generator(seed))
    assert torch.equal(found.ranks, basis.ranks)
    assert found.vectors.shape == basis.vectors.shape
    for vectors, rank in zip(found.vectors, found.ranks.tolist(), strict=True):
        expected = torch.zeros(vectors.shape[1], dtype=torch.float64)
        expected[:rank] = 1.0
        assert torch.allclose(vectors.T @ vectors, expected.diag(), atol=1e-12)
    again = random_basis(basis, generator(seed))
    assert torch.equal(found.vectors, again.vectors)
    if any(0 < r < d for r in basis.ranks.tolist()):
        assert not torch.allclose(
            found.vectors @ found.vectors.mT, basis.vectors @ basis.vectors.mT, atol=1e-6
        )


class Toy:
    """A small network in float64, an old batch it has been given, and a new one to learn."""

    def __init__(self, seed: int, method: str, tau: float = 1.0) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = mlp(12, 3, hidden=(16,)).double()
        self.old, self.new = torch.randn(2, 5, 12, dtype=torch.float64)
        self.labels = torch.randint(3, (5,))
        self.method = LEARNING_METHODS[method](tau, generator(seed))
        self.method.learned(self.model, self.old, self.labels)

    def loss(self) -> torch.Tensor:
        return cross_entropy(self.model(self.new), self.labels)

    def train(self, steps: int = 25) -> None:
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss().backward()
            self.method.before_step(self.model)
            optimizer.step()
            self.method.after_step(self.model)
        self.method.ended()


@pytest.mark.verifies("thm-keep")
@pytest.mark.parametrize("method", ["projected", "lazy"])
@given(seed=SEEDS)
@examples(8)
def test_at_tau_1_the_old_outputs_stay_while_the_new_loss_falls(method: str, seed: int) -> None:
    toy = Toy(seed, method)
    before, start = toy.model(toy.old), toy.loss()
    toy.train()
    assert torch.allclose(toy.model(toy.old), before, rtol=0, atol=1e-12)
    assert toy.loss() < 0.9 * start


@given(seed=SEEDS)
@examples(8)
def test_plain_steps_and_random_subspaces_do_not_keep_the_old_outputs(seed: int) -> None:
    for method in ("plain", "random"):
        toy = Toy(seed, method)
        before = toy.model(toy.old)
        toy.train()
        assert (toy.model(toy.old) - before).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["projected", "lazy"])
@given(seed=SEEDS)
@examples(5)
def test_every_earlier_task_is_kept_not_only_the_last(method: str, seed: int) -> None:
    toy = Toy(seed, method)
    toy.train()
    more = torch.randn(3, 12, dtype=torch.float64)
    toy.method.learned(toy.model, more, toy.labels[:3])
    toy.new = torch.randn(5, 12, dtype=torch.float64)
    before = [toy.model(x) for x in (toy.old, more)]
    toy.train()
    for x, y in zip((toy.old, more), before, strict=True):
        assert torch.allclose(toy.model(x), y, rtol=0, atol=1e-12)


def test_lazy_projects_every_tenth_step() -> None:
    toy = Toy(0, "lazy")
    before = toy.model(toy.old)
    optimizer = torch.optim.SGD(toy.model.parameters(), lr=0.1)
    drifts = []
    for _ in range(2 * Lazy.EVERY):
        optimizer.zero_grad()
        toy.loss().backward()
        optimizer.step()
        toy.method.after_step(toy.model)
        drifts.append((toy.model(toy.old) - before).abs().max().item())
    kept = [drift < 1e-12 for drift in drifts]
    assert kept == 2 * ([False] * (Lazy.EVERY - 1) + [True])


def test_replay_puts_old_images_with_their_labels_behind_the_batch() -> None:
    method = LEARNING_METHODS["replay"](1.0, generator(0))
    model = nn.Linear(1, 1)
    for task in range(2):
        labels = torch.arange(50) + 100 * task
        method.learned(model, labels[:, None].float(), labels)
    x, y = torch.full((4, 1), -1.0), torch.full((4,), -1)
    images, labels = method.batch(x, y)
    assert torch.equal(images[:4], x)
    assert images.shape == (4 + 16, 1)
    assert torch.equal(images[:, 0].long(), labels)
    drawn = torch.cat([method.batch(x, y)[1][4:] for _ in range(50)])
    assert set(drawn.tolist()) == {*range(50), *range(100, 150)}


@pytest.mark.parametrize("name", ["digits", "permuted-mnist"])
def test_validation_images_are_neither_trained_on_nor_tested_on(name: str) -> None:
    course = SequenceRun(name, "tiny")
    for task in course.tasks(course.sets(), 0):
        assert task.pixels is None or task.pixels.sort().values.tolist() == list(range(784))
        inputs, targets = task.training()
        unseen, labels = task.unseen("validation", 10**6)
        everything = torch.cat([task.images(inputs), unseen])
        assert torch.equal(everything, task.images(task.dataset.train_inputs))
        assert torch.equal(torch.cat([targets, labels]), task.dataset.train_targets)
        assert len(labels) >= 500
        assert torch.equal(task.unseen("test", 7)[0], task.images(task.dataset.test_inputs[:7]))


def test_the_digits_are_split_by_label_and_the_pixels_by_seed() -> None:
    sample = load("mnist-sample")
    low, high = SEQUENCES["digits"].tasks([sample], 0)
    assert set(low.dataset.train_targets.tolist()) == set(range(5))
    assert set(high.dataset.test_targets.tolist()) == set(range(5, 10))
    first, again, other = (SEQUENCES["permuted-mnist"].tasks([sample], s) for s in (0, 0, 1))

    def orders(tasks: list[Task]) -> list[list[int]]:
        return [t.pixels.tolist() for t in tasks if t.pixels is not None]

    assert orders(first) == orders(again)
    assert len({tuple(o) for o in orders(first) + orders(other)}) == 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits")
    run_strategies(
        TINY, default_strategies("digits"), [0, 1], RecordFolder(out, command="teleport continual")
    )
    return out


def test_all_methods_of_a_seed_start_from_the_same_first_task(folder: Path) -> None:
    runs = read_runs(folder)
    assert len(runs) == 2 * len(DIGIT_METHODS)
    starts = {}
    for run in runs:
        assert run.status == "finished"
        first = [r for r in run.evaluations if r["task"] == 0]
        starts.setdefault(run.seed, []).append(json.dumps(first))
        new = course(run, 1)
        assert new["old_loss"][0] == first[-1]["losses"][0]
        assert new["step"].tolist() == [0, 20, 40]
        assert new["new_loss"][0] > new["new_loss"][-1]
        assert (np.diff(new["seconds"]) > 0).all()
        assert (np.diff(new["space_seconds"]) >= 0).all()
        assert (new["space_seconds"] <= new["seconds"]).all()
    assert [len(set(rows)) for rows in starts.values()] == [1, 1]


def test_a_run_does_not_depend_on_those_before_it(folder: Path, tmp_path: Path) -> None:
    run_strategies(TINY, default_strategies("digits", ["replay", "plain"]), [1], tmp_path)
    first = {run.arm: run for run in read_runs(folder) if run.seed == 1}
    for run in read_runs(tmp_path):
        for column in ("losses", "accuracies"):
            assert [r[column] for r in run.evaluations] == [
                r[column] for r in first[run.arm].evaluations
            ]


def test_resume_leaves_finished_runs_and_does_the_others_again(
    folder: Path, tmp_path: Path
) -> None:
    strategies = [Strategy("plain", 0.05), Strategy("lazy", 0.05, 0.9)]
    run_strategies(TINY, strategies, [0], tmp_path)
    finished, torn = sorted(tmp_path.glob("*.jsonl"))
    kept, losses = finished.read_bytes(), [r["losses"] for r in read_runs(tmp_path)[1].evaluations]
    torn.write_text("".join(torn.read_text().splitlines(keepends=True)[:3]) + '{"type": "eva')
    told: list[tuple[str, int]] = []
    run_strategies(
        TINY,
        strategies,
        [0],
        RecordFolder(tmp_path, resume=True, progress=lambda *step: told.append(step)),
    )
    assert finished.read_bytes() == kept
    assert told[0] == ("plain, lr 0.05 (seed 0)", 40)
    assert sum(steps for _, steps in told) == 80
    again = read_runs(tmp_path)[1]
    assert again.status == "finished"
    assert [r["losses"] for r in again.evaluations] == losses


def test_nothing_is_overwritten_without_resume_or_with_another_configuration(
    tmp_path: Path,
) -> None:
    strategies = [Strategy("plain", 0.05)]
    (path,) = run_strategies(TINY, strategies, [0], tmp_path)
    before = path.read_bytes()
    with pytest.raises(RunError, match="cannot write"):
        run_strategies(TINY, strategies, [0], tmp_path)
    other = SequenceRun("digits", "tiny", split="validation")
    with pytest.raises(RunError, match="another split"):
        run_strategies(other, strategies, [0], RecordFolder(tmp_path, resume=True))
    assert path.read_bytes() == before


def test_a_run_that_diverges_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    rates = Strategy("plain", 1e30), Strategy("plain", 1e39), Strategy("replay", 0.05)
    run_strategies(TINY, rates, [0], tmp_path)
    runs = read_runs(tmp_path)
    assert [run.status for run in runs] == ["diverged", "diverged", "finished"]
    rows = forgetting_rows(runs)
    assert rows[1][1] == rows[2][1] == "-"
    assert len(forgetting_figure(runs).axes) == 3


def test_every_method_has_a_strategy_and_every_tau() -> None:
    found = default_strategies("mnist-fashion", taus=[1.0, 0.9], lrs=[0.1])
    assert {s.method for s in found} == set(DIGIT_METHODS)
    for method in DIGIT_METHODS:
        taus = [s.tau for s in found if s.method == method]
        assert taus == ([1.0, 0.9] if LEARNING_METHODS[method].uses_tau else [None])
    assert {s.lr for s in found} == {0.1}
    assert len({s.name for s in found}) == len(found)
    for name in ("digits", "mnist-fashion", "permuted-mnist"):
        tuned = default_strategies(name)
        assert {(s.method, s.lr) for s in tuned} == {(m, TUNED[name][m]) for m in DIGIT_METHODS}
        assert {s.tau for s in tuned} == {None, SEQUENCES[name].tau}
    assert all(not kind.uses_tau for kind in (Plain, LEARNING_METHODS["replay"]))


def test_a_permuted_sequence_is_drawn_as_matrices(tmp_path: Path) -> None:
    tiny = SequenceRun("permuted-mnist", "tiny")
    strategies = default_strategies("permuted-mnist", ["plain", "projected"], [0.9])
    run_strategies(tiny, strategies, [0], tmp_path)
    runs = read_runs(tmp_path)
    panels = forgetting_figure(runs).axes
    assert [axes.get_title() for axes in panels] == [run.arm for run in runs]
    for axes, run in zip(panels, runs, strict=True):
        shown = [text.get_text() for text in axes.texts]
        matrix = accuracy_matrix(run)
        assert shown == [f"{100 * a:.0f}" for a in matrix[np.isfinite(matrix)]]


def test_the_table_is_markdown_with_a_cell_for_every_column(folder: Path) -> None:
    head, rule, *lines = markdown(forgetting_rows(read_runs(folder)))
    assert len(lines) == len(DIGIT_METHODS)
    assert {line.count("|") for line in (head, rule, *lines)} == {11}


def test_the_command_leaves_table_figure_and_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "job"
    arguments = ["continual", "--preset", "tiny", "--seeds", "1", "--methods", "plain,lazy"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for word in ("digits 0-4 then 5-9", "plain, lr", "lazy tau", "ACC", "BWT"):
        assert word in " ".join(text.split())
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    kept = {path: path.read_bytes() for path in out.glob("*.jsonl")}
    assert len(kept) == 2
    assert cli.main([*arguments, "--out", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume", "--out", str(out)]) == 0
    assert capsys.readouterr().out == text
    assert {path: path.read_bytes() for path in kept} == kept
    (out / "figure.png").unlink()
    assert cli.main(["figure", str(out)]) == 0
    assert capsys.readouterr().out == text
    assert (out / "figure.png").exists()


def test_tuning_has_a_grid_validation_images_and_its_own_seed(tmp_path: Path) -> None:
    out = tmp_path / "job"
    grid = ["--lr", "0.05", "--lr", "0.1"]
    arguments = ["--preset", "tiny", "--seeds", "1", "--methods", "plain", "--tune", *grid]
    assert cli.main(["continual", "digits", *arguments, "--out", str(out)]) == 0
    runs = read_runs(out)
    assert [run.config["strategy"]["lr"] for run in runs] == [0.05, 0.1]
    assert {(run.seed, run.config["split"]) for run in runs} == {(TUNING_SEED, "validation")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "permuted-mnist"),
        (["--preset", "huge"], "tiny"),
        (["--methods", "plain,magic"], "replay"),
        (["--tau", "0"], "(0, 1]"),
        (["--tau", "1.5"], "(0, 1]"),
        (["--lr", "-1"], "> 0"),
        (["--seeds", "0"], "1"),
        (["--resume"], "--out"),
    ],
)
def test_bad_arguments_are_answered_with_what_is_allowed(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["continual", *arguments]) != 0
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
