import signal
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import Tensor, nn

from teleport.errors import NonFiniteLossError, RunError
from teleport.lab.analysis.curves import draw_losses, gap_figure, loss_figure, matrix_figure
from teleport.lab.experiments.arms import Arm, RunSettings, TeleportSettings, default_arms
from teleport.lab.experiments.choices import INITS
from teleport.lab.experiments.interventions import INTERVENTIONS
from teleport.lab.experiments.models import mlp
from teleport.lab.experiments.optimizers import OPTIMIZERS, within_range
from teleport.lab.experiments.run import Cell, run_arms
from teleport.lab.experiments.table import EXPERIMENTS
from teleport.lab.experiments.training import Training
from teleport.lab.records.compare import summarise
from teleport.lab.records.folders import new_folder
from teleport.lab.records.runs import Run, by_arm, read_runs
from teleport.schedule import Schedule
from tests.support.waiting import HANG, wait_for

EARLY = TeleportSettings(schedule=Schedule(warmup_steps=20), batch_size=100, held_out_size=100)
TINY = RunSettings(preset="tiny", teleport=EARLY)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("runs")
    run_arms(TINY, [Arm(0.05), Arm(0.05, teleport=True)], [0, 1], folder)
    return read_runs(folder)


def test_arms_of_a_seed_share_everything_until_the_teleport(runs: list[Run]) -> None:
    plain, moved = (run for run in runs if run.seed == 0)
    before = plain.column("step") <= EARLY.schedule.warmup_steps
    assert before.sum() >= 2
    assert (plain.column("train_loss") == moved.column("train_loss"))[before].all()
    assert (plain.column("train_loss") != moved.column("train_loss"))[~before].all()


def arms() -> st.SearchStrategy[Arm]:
    return st.builds(
        Arm,
        st.floats(1e-300, 1e300),
        st.booleans(),
        st.sampled_from(INITS),
        st.floats(1e-300, 1e300),
        st.sampled_from(["", *INTERVENTIONS]),
    )


@given(arms(), arms())
@example(Arm(1e30), Arm(1e-30))
@example(Arm(0.1, head_gain=1e30), Arm(0.1, head_gain=1e-30))
def test_arms_with_different_names_have_different_records(one: Arm, other: Arm) -> None:
    assume(one.name != other.name)
    assert Cell(TINY, one, 0, 0).record != Cell(TINY, other, 0, 0).record


def test_the_records_of_arms_are_named_as_ever() -> None:
    arm = Arm(1e-05, True, "he", 2.5)
    assert Cell(TINY, arm, 7, 3).record == "03-lr-1e-05-he-init-head-x2.5-teleport-seed7.jsonl"
    assert Cell(TINY, Arm(1e30), 0, 0).record == "00-lr-1e30-seed0.jsonl"


def test_seeds_differ(runs: list[Run]) -> None:
    first, second = (run for run in runs if run.arm == "lr 0.05")
    assert first.column("train_loss")[0] != second.column("train_loss")[0]


def test_the_same_run_again_gives_the_same_numbers(runs: list[Run], tmp_path: Path) -> None:
    run_arms(TINY, [Arm(0.05, teleport=True)], [0], tmp_path)
    again = read_runs(tmp_path)[0]
    first = next(run for run in runs if run.seed == 0 and run.teleports)
    for column in ("train_loss", "test_loss", "grad_norm"):
        assert np.array_equal(first.column(column), again.column(column))


def test_the_record_tells_what_the_teleport_did(runs: list[Run]) -> None:
    for run in runs:
        assert run.status == "finished"
        assert len(run.teleports) == int(run.config["training"]["teleport"])
    (row,) = next(run for run in runs if run.teleports).teleports
    assert not row["rolled_back"]
    assert row["grad_norm_after"] / row["grad_norm_before"] == pytest.approx(1.5, rel=1e-5)
    assert abs(row["loss_after"] - row["loss_before"]) <= row["tolerance"]


def test_seconds_of_training_and_teleporting_are_apart(runs: list[Run]) -> None:
    for run in runs:
        assert (np.diff(run.column("train_seconds")) > 0).all()
        teleported = run.column("teleport_seconds")[-1]
        assert teleported == sum(row["seconds"] for row in run.teleports)


def test_a_diverging_run_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    run_arms(TINY, [Arm(1e6), Arm(0.05)], [0], tmp_path)
    assert [run.status for run in read_runs(tmp_path)] == ["diverged", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 1e38), ("sgd", 1e39), ("momentum", 1e300)])
@pytest.mark.parametrize("rival", ["", "lr raised"])  # whose trials take steps, too
def test_a_step_beyond_the_range_of_its_numbers_is_a_divergence(
    optimizer: str, lr: float, rival: str, tmp_path: Path
) -> None:
    at_once = replace(EARLY, schedule=Schedule(warmup_steps=0))
    settings = replace(TINY, optimizer=optimizer, teleport=at_once)
    run_arms(settings, [Arm(lr, bool(rival), rival=rival), Arm(0.001)], [0], tmp_path)
    gone, other = read_runs(tmp_path)
    assert (gone.status, other.status) == ("diverged", "finished")
    assert "without overflow" in gone.reason
    assert "lower learning rate" in gone.reason


def test_only_an_overflow_is_taken_for_a_divergence() -> None:
    for error in (RuntimeError("no space"), ValueError("without overflow")):
        with pytest.raises(type(error), match=str(error)), within_range():
            raise error
    with pytest.raises(NonFiniteLossError, match="out of range"), within_range():
        raise OverflowError("result out of range")


TUNED = [(e.name, optimizer) for e in EXPERIMENTS.values() for optimizer in e.tuning]


ROWS = RunSettings("sample-rows", "tiny")
"""1,280 examples, an evaluation every 10 steps."""


@given(batch_size=st.integers(41, 128))
@settings(max_examples=5, deadline=None)
def test_the_last_evaluation_is_of_the_trained_network(
    tmp_path_factory: pytest.TempPathFactory, batch_size: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    run_arms(replace(ROWS, batch_size=batch_size), [Arm(0.01)], [0], folder)
    (run,) = read_runs(folder)
    steps = 1280 // batch_size
    assert run.column("step").tolist() == [*range(0, steps, 10), steps]


def test_what_diverges_after_the_last_regular_evaluation_is_not_called_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Training._compute_gradients

    def poisoned(self: Training, *batch: Tensor) -> None:
        compute(self, *batch)
        if self.step == self.steps - 1:
            next(self.model.parameters()).grad.fill_(torch.nan)  # type: ignore[union-attr]

    monkeypatch.setattr(Training, "_compute_gradients", poisoned)
    run_arms(replace(ROWS, batch_size=36), [Arm(0.01)], [0], tmp_path)
    (run,) = read_runs(tmp_path)
    assert run.column("step").tolist() == [0, 10, 20, 30]
    assert (run.status, run.reason) == ("diverged", "the train loss is nan after 35 steps")


@pytest.mark.parametrize(("experiment", "optimizer"), TUNED)
def test_default_arms_hold_a_baseline_for_every_teleport(experiment: str, optimizer: str) -> None:
    arms = default_arms(experiment, optimizer)
    assert {arm.baseline for arm in arms if arm.teleport} <= set(arms)
    assert len({arm.name for arm in arms}) == len(arms)
    parameter = nn.Parameter(torch.ones(1))
    OPTIMIZERS[optimizer]([parameter], arms[0].lr)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiment": "nope"}, "mnist-sample"),
        ({"preset": "huge"}, "tiny"),
        ({"optimizer": "sdg"}, "sgd"),
        ({"epochs": 0}, ">= 1"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RunSettings(), **change).size()  # type: ignore[arg-type]


def test_an_absent_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not available"):
        run_arms(replace(TINY, device="no-such-device"), [Arm(0.1)], [0], tmp_path)


def test_two_runs_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = new_folder("x", None), new_folder("x", None)
    assert first != second
    with pytest.raises(RunError, match="--out"):
        new_folder("x", first)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to"):
        new_folder("x", tmp_path / "file" / "below")


def evaluations(folder: Path) -> int:
    """Of the run that has come furthest."""
    records = [path.read_text() for path in folder.glob("*.jsonl")]
    return max((text.count("evaluation") for text in records), default=0)


@pytest.mark.slow
def test_ctrl_c_leaves_complete_records_and_exit_code_130(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "teleport", "run", "--epochs", "50", "--out", str(out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A job started in the background ignores SIGINT and hands that down to its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(lambda: process.poll() is not None or evaluations(out) > 1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=HANG)
    finally:
        process.kill()
    assert process.returncode == 130, stderr.decode()
    assert b"complete" in stderr
    (run,) = read_runs(out)
    assert run.status == "interrupted"


@given(
    epochs=st.integers(0, 6),
    warmup=st.integers(0, 50),
    per_epoch=st.integers(1, 20),
)
def test_a_schedule_never_teleports_before_its_warm_up(
    epochs: int, warmup: int, per_epoch: int
) -> None:
    due = Schedule(epochs=epochs, warmup_steps=warmup).due_steps(per_epoch)
    assert all(step >= warmup for step in due)
    assert {e * per_epoch for e in range(epochs) if e * per_epoch >= warmup} <= due
    assert bool(due) == bool(epochs)


@pytest.mark.parametrize("bad", [{"epochs": -1}, {"batches": 0}, {"warmup_steps": -1}])
def test_a_schedule_refuses_negative_counts(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Schedule(**bad)


@given(gain=st.floats(0.1, 10), init=st.sampled_from(["default", "he"]), seed=st.integers(0, 99))
def test_the_head_gain_scales_the_outputs_without_bias(gain: float, init: str, seed: int) -> None:
    torch.manual_seed(seed)
    plain = mlp(6, 3, hidden=(8,), init=init)
    torch.manual_seed(seed)
    scaled = mlp(6, 3, hidden=(8,), init=init, head_gain=gain)
    assert torch.equal(plain[0].weight, scaled[0].weight)
    assert torch.allclose(scaled[-1].weight, gain * plain[-1].weight, rtol=1e-6)


def test_an_unknown_initialisation_is_refused() -> None:
    with pytest.raises(ValueError, match="default"):
        mlp(4, 2, init="xavier")


def test_the_figure_shows_every_arm_on_both_axes(runs: list[Run]) -> None:
    panels = loss_figure(runs, "title").axes
    assert len(panels) == 4
    labels = [axes.get_xlabel() for axes in panels]
    assert sum("seconds" in label for label in labels) == 2
    for axes in panels:
        drawn = {line.get_label() for line in axes.get_lines()}
        assert drawn == {"lr 0.05", "lr 0.05 + teleport"}
        assert axes.get_yscale() == "log"


def test_the_loss_has_a_unit_where_the_data_set_is_known(runs: list[Run]) -> None:
    def label(*names: str) -> str:
        shown = [
            replace(
                run,
                config={**run.config, "data": {"name": name}, "arm": f"{run.arm} on {name}"},
                path=Path(name),
            )
            for run in runs
            for name in names
        ]
        return loss_figure(shown).axes[0].get_ylabel()

    assert loss_figure(runs).axes[0].get_ylabel() == "train loss (nats)"
    assert label("etth1") == label("etth1", "exchange_rate") == "train loss (mean squared error)"
    assert label("ptb", "mnist") == "train loss (nats)"
    assert label("etth1", "mnist") == label("nope") == label("nope", "mnist") == "train loss"


def test_legends_cover_no_panel_and_the_page_s_width_is_kept(runs: list[Run]) -> None:
    """At 8.5 to 10 inches wide, text of 8 points and more is legible in the book."""
    for figure in (loss_figure(runs), matrix_figure({"a": runs, "b": runs})):
        figure.savefig(BytesIO())
        assert figure.get_figwidth() <= 10
        legends = [legend for part in (figure, *figure.subfigs) for legend in part.legends]
        assert len(legends) == max(1, len(figure.subfigs))
        for legend in legends:
            covered = legend.get_window_extent()
            assert not any(covered.overlaps(axes.get_window_extent()) for axes in figure.axes)
            assert {text.get_text() for text in legend.get_texts()} == {run.arm for run in runs}


@st.composite
def trajectories(draw: st.DrawFn) -> list[list[float]]:
    """Losses of a few arms; the last begins far above, as a large initial gain does."""
    count = draw(st.integers(1, 30))
    losses = st.floats(1e-3, 20.0)
    arms = draw(st.lists(st.lists(losses, min_size=count, max_size=count), min_size=2, max_size=4))
    arms[-1][0] = draw(st.floats(30.0, 1e4))
    return arms


@given(trajectories())
def test_a_start_far_above_the_rest_does_not_flatten_the_figure(arms: list[list[float]]) -> None:
    axes = Figure().subplots()
    runs = [_run_of(f"arm {number}", losses) for number, losses in enumerate(arms)]
    draw_losses(axes, by_arm(runs), "train_loss", "step")
    low, high = axes.get_ylim()
    followed = [loss for losses in arms for loss in losses[1:]]
    shown = [*followed, min(losses[0] for losses in arms)]
    assert low < min(shown) <= max(shown) < high
    assert np.log(high / max(shown)) <= 0.1 * max(np.log(max(shown) / min(shown)), 0.1)
    if max(shown) < 100 * min(shown):
        ticks = [tick for tick in axes.get_yticks() if low < tick < high]
        labels = axes.yaxis.get_major_formatter().format_ticks(ticks)
        assert [float(label) for label in labels] == pytest.approx(ticks), "plain numbers"
        assert len(labels) >= 2


with_zeros = st.lists(st.just(0.0) | st.floats(1e-3, 10), min_size=3, max_size=3)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@given(st.lists(with_zeros, min_size=4, max_size=4))
@example([[0.0, 0.0, 0.0]] * 4)
@example([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]] * 2)
@settings(max_examples=10, deadline=None)
def test_a_figure_with_a_loss_of_exactly_zero_is_drawn(losses: list[list[float]]) -> None:
    runs = [_run_of(f"arm {n % 2}", each) for n, each in enumerate(losses)]
    for n, run in enumerate(runs):
        run.config.update(seed=n // 2, baseline="arm 0")
    positive = any((np.array(losses[n::2]) > 0.0).all(0).any() for n in range(2))
    figure = loss_figure(runs)
    figure.savefig(BytesIO())
    for axes in figure.axes:
        assert len(axes.get_lines()) == 2
        assert np.isfinite(axes.get_ylim()).all()
        assert axes.get_yscale() == ("log" if positive else "linear")
    *_, arm = summarise(runs)
    gap_figure([arm, replace(arm, arm="b"), replace(arm, arm="c")]).savefig(BytesIO())


def test_a_curve_that_ends_because_a_seed_diverged_says_so() -> None:
    axes = Figure().subplots()
    whole = _run_of("a", [2.0, 1.0, 0.5])
    gone = replace(_run_of("a", [2.0, 1e6], seed=1), status="diverged")
    draw_losses(axes, by_arm([whole, gone, _run_of("b", [2.0, 1.0])]), "train_loss", "step")
    assert [line.get_label() for line in axes.get_lines()] == ["a (diverged)", "b"]
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [2, 2]


def _run_of(arm: str, losses: list[float], seed: int = 0) -> Run:
    rows = [
        {
            "step": i,
            "train_loss": loss,
            "test_loss": loss,
            "train_seconds": float(i),
            "teleport_seconds": 0.0,
        }
        for i, loss in enumerate(losses)
    ]
    config = {"arm": arm, "seed": seed, "training": {"teleport": False}}
    return Run(Path(f"{arm}-{seed}"), config, rows, [], "end")


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_curves_that_are_the_same_are_both_seen(count: int) -> None:
    def run(teleport: bool) -> Run:
        rows = [
            {"step": i, "train_loss": 1.0, "train_seconds": float(i), "teleport_seconds": 0.0}
            for i in range(count)
        ]
        config = {"arm": f"a{teleport}", "seed": 0, "training": {"teleport": teleport}}
        return Run(Path(), config, rows, [], "finished")

    axes = Figure().subplots()
    draw_losses(axes, by_arm([run(False), run(True)]), "train_loss", "step")
    plain, moved = axes.get_lines()
    assert plain.get_zorder() > moved.get_zorder(), "the dashes lie above the solid line"
    (first, every), (second, _) = (line.get_markevery() for line in (plain, moved))
    assert (first - second) % every != 0 or count < 20
    assert max(first, second) < count


def test_what_has_no_evaluation_yet_is_not_drawn(runs: list[Run]) -> None:
    begun = [replace(run, evaluations=[]) for run in runs]
    assert not loss_figure(begun).axes[0].lines
    assert not loss_figure(begun).legends
    arms = {run.arm for run in runs}
    other = replace(begun[0], config={**begun[0].config, "seed": 99})
    assert len(loss_figure([other, *runs]).axes[0].lines) == len(arms)
