"""The paper's Figure 6: input spectra, and what the threshold trades along a teleport."""

import json
import shlex
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from teleport import Teleporter, cli, null_space
from teleport.data import load
from teleport.errors import RunError
from teleport.lab.experiments.arms import Arm, RunSettings
from teleport.lab.experiments.run import Cell, run_cell
from teleport.lab.experiments.table import find_experiment
from teleport.lab.paper.input_energy import FIGURE_TAUS, Spectrum, read_spectra, spectra
from teleport.lab.paper.plots import spectrum_figure, threshold_figure
from teleport.lab.paper.snapshot import moment, rate_of
from teleport.lab.paper.threshold import DIVERGED_GROWTH, read_trajectories, trajectory
from teleport.lab.records.runs import read_run
from teleport.objective import grad_norm, trainable
from tests.support.networks import task
from tests.support.tables import small

seeds = st.integers(0, 2**31)


def inputs_of(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The input rows of every linear layer, with a one for the bias, seen by plain hooks."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([rows, torch.ones(len(rows), 1)], 1) for name, rows in seen.items()}


@pytest.mark.slow
@given(seeds)
@settings(max_examples=12)
def test_captured_energy_is_that_of_the_svd_and_ranks_are_the_rank_rule_s(seed: int) -> None:
    t = task("plain", seed)
    found = {s.layer: s for s in spectra(t.model, t.closure)}
    spaces = {tau: null_space(t.model, [t.closure], tau) for tau in FIGURE_TAUS}
    expected = inputs_of(t.model, t.x)
    assert list(found) == list(expected)
    for name, rows in expected.items():
        energies = torch.linalg.svdvals(rows).square().numpy()
        captured = np.cumsum(energies) / energies.sum()
        s = found[name]
        assert s.d_in == rows.shape[1]
        np.testing.assert_allclose(s.captured, captured[: len(s.shares)], rtol=1e-9)
        assert s.ranks == {tau: space.bases[name].rank for tau, space in spaces.items()}
        assert s.ranks[1.0] == np.linalg.matrix_rank(rows.numpy())
        for tau in FIGURE_TAUS[1:]:
            assert s.ranks[tau] == 1 + int((captured < tau).sum())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


def test_tokens_are_counted_and_both_uses_of_a_tied_weight_are_shown() -> None:
    model, tokens = Tied(), torch.tensor([[3, 3, 3, 5], [3, 5, 7, 9]])
    found = spectra(model, lambda: model(tokens))
    by_width = {s.d_in: s for s in found}
    assert len(found) == 2
    assert by_width[11].shares == (4 / 8, 2 / 8, 1 / 8, 1 / 8)
    assert by_width[11].ranks == {1.0: 4, 0.999: 4, 0.99: 4, 0.95: 4, 0.9: 4, 0.5: 1}
    assert sorted(s.layer.endswith("(other use)") for s in found) == [False, True]


def test_every_group_of_a_convolution_has_a_spectrum_of_its_own() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv1d(4, 6, 1, groups=2, bias=False).double(), torch.zeros(1, 4, 8).double()
    x[0, 0], x[0, 2:] = 1.0, torch.randn(2, 8)
    whole = nn.Sequential(conv)
    found = spectra(whole, lambda: whole(x), [1.0])
    assert [(s.layer, s.d_in, s.ranks) for s in found] == [
        ("0[0]", 2, {1.0: 1}),
        ("0[1]", 2, {1.0: 2}),
    ]
    values = torch.linalg.svdvals(x[0, 2:]).square()
    np.testing.assert_allclose(found[1].shares, values / values.sum(), rtol=1e-9)


def test_a_moment_is_that_of_a_run_with_the_same_seed(tmp_path: Path) -> None:
    """The run teleports after 50 steps: its batch has the loss and gradient of the moment's."""
    options = RunSettings("mnist-sample", "tiny")
    _, lr = rate_of(options.recipe())
    path = run_cell(Cell(options, Arm(lr, True), 3, 0), load("mnist-sample"), tmp_path)
    report = read_run(path).teleports[0]
    assert report["step"] == 50
    at = moment("mnist-sample", "tiny", 50, seed=3)
    loss, norm = grad_norm(at.closure, trainable(at.model))
    assert loss == pytest.approx(report["loss_before"], rel=1e-6)
    assert norm == pytest.approx(report["grad_norm_before"], rel=1e-5)
    assert float(at.held_out().detach()) == pytest.approx(report["held_out_before"], rel=1e-6)
    assert at.config["data"]["checksum"] == load("mnist-sample").checksum
    assert all(p.grad is None for p in at.model.parameters())


def test_the_rate_is_that_of_tuned_sgd_then_what_was_tuned_then_a_fixed_one() -> None:
    assert rate_of(find_experiment("mnist-mlp")) == ("sgd", 0.2)
    tuned = find_experiment("mnist-mlp")
    only_adam = replace(tuned, tuning={"adam": tuned.tuning["adam"]})
    assert rate_of(only_adam) == ("adam", tuned.tuning["adam"].tuned)
    assert rate_of(replace(tuned, tuning={})) == ("sgd", 0.1)


@given(seeds, st.sampled_from([1.0, 0.9, 0.5]))
@settings(max_examples=10)
def test_points_are_ends_of_whole_teleports_and_the_model_stays(seed: int, tau: float) -> None:
    t, lr = task("plain", seed), 0.01
    before = [p.detach().clone() for p in t.model.parameters()]
    points, reason = trajectory(t.model, t.closure, t.closure, tau, lr=lr, steps=3)
    assert all(torch.equal(p, q) for p, q in zip(t.model.parameters(), before, strict=True))
    loss, norm = grad_norm(t.closure, trainable(t.model))
    assert (points[0].loss, points[0].grad_norm) == pytest.approx((loss, norm))
    assert [p.number for p in points] == [0, 1, 2, 3]
    assert reason == ""
    if tau == 1.0:
        assert [p.loss for p in points] == pytest.approx([loss] * 4, rel=1e-9)
    Teleporter(t.model, tau=tau, lr=lr, steps=3, growth=1e9, max_drift=1e9).step(t.closure)
    loss, norm = grad_norm(t.closure, trainable(t.model))
    last = points[-1]
    assert (last.loss, last.grad_norm, last.held_out) == pytest.approx((loss, norm, loss))


def test_a_trajectory_that_diverges_is_broken_off() -> None:
    t = task("plain", 1)
    points, reason = trajectory(t.model, t.closure, t.closure, 0.5, lr=1e3, steps=5)
    assert len(points) < 6
    assert f"{DIVERGED_GROWTH:g}" in reason
    assert points[-1].grad_norm <= DIVERGED_GROWTH * points[0].grad_norm


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_the_spectrum_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "spectrum"
    names = [small(tmp_path), "sample-rows"]
    chosen = ["--preset", "tiny", "--trained", "0", "--trained", "1", "--out", str(out)]
    assert cli.main(["spectrum", *names, *chosen]) == 0
    first = printed(capsys)
    assert "tau 0.999" in first
    found = read_spectra(out)
    assert [m.config["experiment"] for m in found] == names
    at = moment(names[0], "tiny", 1)
    assert found[0].by_step == {
        0: spectra((start := moment(names[0], "tiny", 0)).model, start.closure),
        1: spectra(at.model, at.closure),
    }
    assert found[0].config["command"] == shlex.join(["teleport", "spectrum", *names, *chosen])
    assert found[0].config["versions"]["torch"] == torch.__version__
    figures = [out / f"figure-{steps}-steps.png" for steps in (0, 1)]
    for drawn in figures:
        drawn.unlink()
    assert cli.main(["figure", str(out)]) == 0
    assert printed(capsys) == first
    assert all(drawn.exists() for drawn in figures)
    figure = spectrum_figure(found, 0)
    figure.savefig(BytesIO())
    assert figure.get_figwidth() <= 8.5
    axes = figure.axes
    for panel in axes:
        assert (legend := panel.get_legend()) is not None
        assert not legend.get_window_extent().overlaps(panel.get_window_extent())
        assert min(text.get_fontsize() for text in legend.get_texts()) >= 8
    assert len(axes[0].lines) == 2
    labels = [text.get_text() for text in axes[1].get_legend().get_texts()]
    assert "blocks.0.self_attn.q, k, v (17)" in labels


def test_the_tau_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tau"
    chosen = ["--preset", "tiny", "--trained", "2", "--steps", "2", "--lr", "0.1"]
    name = small(tmp_path)
    assert cli.main(["tau", name, *chosen, "--out", str(out)]) == 0
    first = printed(capsys)
    found = read_trajectories(out)
    assert list(found.by_tau) == list(FIGURE_TAUS)
    assert found.config["teleport_lr"] == 0.1
    assert found.config["trained"] == 2
    at = moment(name, "tiny", 2)
    for tau in (1.0, 0.5):
        expected, _ = trajectory(at.model, at.closure, at.held_out, tau, lr=0.1, steps=2)
        assert found.by_tau[tau] == expected
    (out / "figure.png").unlink()
    assert cli.main(["figure", str(out)]) == 0
    assert printed(capsys) == first
    assert (out / "figure.png").exists()
    left, right = threshold_figure(found).axes
    assert [len(axes.lines) for axes in (left, right)] == [6, 6]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["spectrum", "nope"], "mnist-sample"),
        (["spectrum", "mnist-sample", "--preset", "nope"], "tiny"),
        (["tau", "nope"], "mnist-sample"),
        (["tau", "mnist-sample", "--lr", "-1"], "> 0"),
        (["tau", "mnist-sample", "--lr", "nan"], "> 0"),
    ],
)
def test_bad_input_makes_no_folder(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*arguments, "--out", str(tmp_path / "new")]) == 1
    assert word in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_steps_and_foreign_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps must be"):
        moment("mnist-sample", "tiny", -1)
    for read in (read_spectra, read_trajectories):
        with pytest.raises(RunError):
            read(tmp_path)
    (tmp_path / "00-a.jsonl").write_text('{"type": "config"}\n', encoding="utf-8")
    for read in (read_spectra, read_trajectories):
        with pytest.raises(RunError, match="is not a record"):
            read(tmp_path)


@pytest.mark.slow
def test_a_record_that_was_killed_early_is_left_out_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "spectrum"
    chosen = ["sample-rows", small(tmp_path), "--preset", "tiny"]
    chosen += ["--trained", "0", "--trained", "1"]
    assert cli.main(["spectrum", *chosen, "--out", str(out)]) == 0
    (out / "figure-1-steps.png").unlink()
    first = out / "00-sample-rows.jsonl"
    whole = first.read_text().splitlines(keepends=True)
    for kept in (3, 1, 0):  # a layer after 0 steps, no layer, not even the configuration
        first.write_text("".join(whole[:kept]))
        assert cli.main(["figure", str(out)]) == 0
        assert ("28 rows of 28" in printed(capsys)) == (kept == 3)
        assert (out / "figure-1-steps.png").exists()
        (out / "figure-1-steps.png").unlink()
    for path in out.glob("*.jsonl"):
        path.unlink()
    config = json.loads(whole[0]) | {"figure": "tau", "trained": 1, "teleport_lr": 0.1}
    first.write_text(json.dumps(config) + "\n")
    assert cli.main(["figure", str(out)]) == 1
    assert "run `teleport tau` again" in capsys.readouterr().err


def test_captured_of_nothing_is_nothing() -> None:
    assert len(Spectrum("unused", 3, (), {1.0: 0}).captured) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["spectrum", "tau"])
def test_what_was_broken_off_is_made_again_and_what_is_complete_stays(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    names = [small(tmp_path)] if command == "tau" else [small(tmp_path), "sample-rows"]
    chosen = [command, *names, "--preset", "tiny", "--trained", "1", "--out", str(out)]
    chosen += ["--steps", "2"] * (command == "tau")
    assert cli.main(chosen) == 0
    records = sorted(out.glob("*.jsonl"))
    whole = [path.read_text() for path in records]
    assert cli.main(chosen) == 1
    assert "--resume" in capsys.readouterr().err
    for kept in (3, 0):
        records[-1].write_text("".join(whole[-1].splitlines(keepends=True)[:kept]))
        times = [path.stat().st_mtime_ns for path in records[:-1]]
        assert cli.main([*chosen, "--resume"]) == 0
        again = records[-1].read_text().splitlines()
        assert again[1:] == whole[-1].splitlines()[1:]
        assert [path.stat().st_mtime_ns for path in records[:-1]] == times
    before = [path.read_bytes() for path in records]
    other = ["0" if word == "1" else word for word in chosen]
    assert cli.main([*other, "--resume"]) == 1
    assert "another steps" in (error := capsys.readouterr().err) or "another trained" in error
    assert [path.read_bytes() for path in records] == before


def test_resume_needs_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tau", "mnist-sample", "--preset", "tiny", "--resume"]) == 1
    assert "--out" in capsys.readouterr().err
