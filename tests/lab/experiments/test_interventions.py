"""What an arm does when a teleport is due: weights move, or the optimizer does, as named."""

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from teleport import Teleporter, cli
from teleport.lab.analysis.curves import gap_figure
from teleport.lab.experiments.arms import (
    Arm,
    RunSettings,
    default_arms,
    objective_arms,
    rival_arms,
)
from teleport.lab.experiments.interventions import (
    INTERVENTIONS,
    LONGEST_TRIAL,
    MOVES,
    ON_THE_OPTIMIZER,
    OTHER_OBJECTIVES,
    Subject,
    intervene,
    lasting,
)
from teleport.lab.experiments.run import run_arms
from teleport.lab.records.compare import summarise
from teleport.lab.records.runs import read_run, read_runs
from teleport.lab.records.writer import RecordWriter
from tests.support.fingerprint import weights

OPTIMIZERS = {
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.5),
    "Adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr / 50),
}


class Training:
    """A small perceptron under way, in float64."""

    def __init__(self, lr: float = 0.05, optimizer: str = "momentum") -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(6, 30), nn.LeakyReLU(), nn.Linear(30, 30), nn.LeakyReLU())
        self.model = nn.Sequential(*layers, nn.Linear(30, 3)).double()
        self.x, self.y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), lr)
        self.subject = Subject(self.model, self.optimizer, 10, self.train_on)
        for number in range(5):
            self.train_on(number)

    def gradients(self, number: int) -> None:
        self.optimizer.zero_grad()
        part = slice(8 * (number % 5), 8 * (number % 5) + 8)
        cross_entropy(self.model(self.x[part]), self.y[part]).backward()

    def train_on(self, number: int) -> None:
        self.gradients(number)
        self.optimizer.step()

    def closure(self) -> Tensor:
        return cross_entropy(self.model(self.x[:6]), self.y[:6])

    def steps(self) -> list[float]:
        """Lengths of the next twelve steps over the length the gradient alone would give."""
        lengths = []
        for number in range(12):
            before = torch.cat([p.detach().flatten().clone() for p in self.model.parameters()])
            self.gradients(number)
            self.subject.take_step()
            after = torch.cat([p.detach().flatten() for p in self.model.parameters()])
            lengths.append(float((after - before).norm()))
        return lengths


def test_a_trial_that_diverges_does_not_end_the_run() -> None:
    """A teleport after which training explodes leaves its gradient grown as long as one looks."""
    one = Training()
    start, calls = weights(one.model), 0

    def explodes(number: int) -> None:
        nonlocal calls
        calls += 1
        one.train_on(number)
        if calls > LONGEST_TRIAL:  # at once after the teleport
            with torch.no_grad():
                one.model[0].weight.fill_(math.nan)

    one.subject.train_on = explodes
    teleporter = Teleporter(one.model, growth=1.5)
    assert lasting(one.subject, teleporter, one.closure) == LONGEST_TRIAL
    assert calls == LONGEST_TRIAL + 1
    assert weights(one.model) == start


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_weights_move_if_the_name_is_a_move_and_the_report_says_so(
    name: str, optimizer: str
) -> None:
    training = Training(optimizer=optimizer)
    before = weights(training.model)
    state = deepcopy(training.optimizer.state_dict()["state"])
    report = intervene(name, training.subject, training.closure, held_out=training.closure)
    moved = weights(training.model) != before
    assert moved == (name in (*MOVES, *OTHER_OBJECTIVES))
    assert (report.steps > 0) == moved
    assert (report.loss_after == report.loss_before) or moved
    if name == "optimizer reset":
        assert not training.optimizer.state
    else:
        for kept, had in zip(training.optimizer.state.values(), state.values(), strict=True):
            assert kept.keys() == had.keys()
            assert all(torch.equal(kept[key], had[key]) for key in had if had[key] is not None)
    training.gradients(0)
    here = weights(training.model)
    training.subject.take_step()
    assert weights(training.model) != here


def test_a_trial_leaves_weights_and_optimizer_as_they_were() -> None:
    one, two = Training(), Training()
    teleporter = Teleporter(one.model, growth=1.5)
    steps = lasting(one.subject, teleporter, one.closure)
    assert 1 <= steps <= LONGEST_TRIAL
    assert weights(one.model) == weights(two.model)
    assert one.steps() == two.steps()


def test_a_raised_learning_rate_is_raised_by_the_growth_while_it_lasts() -> None:
    plain, raised = Training(), Training()
    lasts = lasting(raised.subject, Teleporter(raised.model, growth=1.5), raised.closure)
    report = intervene("lr raised", raised.subject, raised.closure)
    assert f"for {lasts} steps" in report.reason
    assert report.steps == 0
    (first, *_), (grown, *_) = plain.steps(), raised.steps()
    assert grown / first == pytest.approx(1.5)


def test_warm_restarts_bring_the_learning_rate_back() -> None:
    training = Training()
    intervene("warm restarts", training.subject, training.closure)
    rates = []
    for _ in range(21):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.gradients(0)
        training.subject.take_step()
    assert rates[0] == rates[10] == rates[20] == 0.05
    assert rates[:10] == sorted(rates[:10], reverse=True)
    assert rates[9] < 0.1 * rates[0]


def test_an_unknown_intervention_is_refused() -> None:
    training = Training()
    with pytest.raises(ValueError, match="unknown intervention 'prayer'"):
        intervene("prayer", training.subject, training.closure)


def test_rival_arms_are_the_default_arms_and_each_rival_at_both_learning_rates() -> None:
    for optimizer, absent in (("sgd", {"optimizer reset"}), ("adam", set())):
        arms, default = (
            rival_arms("mnist-sample", optimizer),
            default_arms("mnist-sample", optimizer),
        )
        assert [*arms[:5], arms[-1]] == default
        assert len({arm.name for arm in arms}) == len(arms)
        by_rate: dict[float, set[str]] = {}
        for arm in arms[5:-1]:
            assert arm.baseline == Arm(arm.lr)
            by_rate.setdefault(arm.lr, set()).add(arm.rival)
        assert set(by_rate) == {arms[0].lr, arms[2].lr}
        assert all(names == {*MOVES, *ON_THE_OPTIMIZER} - absent for names in by_rate.values())
        others = objective_arms("mnist-sample", optimizer)
        assert [*others[:5], others[-1]] == default
        assert [(a.lr, a.rival) for a in others[5:-1]] == [
            (lr, name) for lr in by_rate for name in OTHER_OBJECTIVES
        ]


def test_a_rival_arm_leaves_a_record_with_its_report(tmp_path: Path) -> None:
    settings = RunSettings("mnist-sample", "tiny", activation="leaky_relu")
    (path,) = run_arms(settings, [Arm(0.05, True, rival="noise, same norm")], [0], tmp_path)
    run = read_run(path)
    assert run.status == "finished"
    assert run.arm == "lr 0.05 + noise, same norm"
    assert run.config["baseline"] == "lr 0.05"
    (teleport,) = run.teleports
    assert teleport["step"] == 50
    assert "noise" in teleport["reason"]
    assert run.evaluations[-1]["teleport_seconds"] > 0.0


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Records of nine arms at two learning rates, two seeds, with losses one can see through."""
    names = ["lr 0.1", "lr 0.2"] + [f"lr {lr} + way {n}" for n in range(4) for lr in (0.1, 0.2)]
    for order, arm in enumerate(names):
        for seed in (0, 1):
            with RecordWriter(tmp_path / f"{order:02d}-seed{seed}.jsonl") as writer:
                writer.write(
                    "config", arm=arm, baseline=arm[:6], order=order, seed=seed,
                    experiment="mnist-sample", settings={"optimizer": "sgd", "preset": "tiny"},
                    training={"lr": float(arm.split()[1]), "teleport": "way" in arm},
                )  # fmt: skip
                for step in (0, 50, 100):
                    loss = 2.0 * math.exp(-step / 50 - order / 100 - seed / 1000 * (order + 1))
                    writer.write(
                        "evaluation", step=step, epoch=0.0, train_seconds=float(step),
                        teleport_seconds=0.0, train_loss=loss, test_loss=loss, test_accuracy=0.5,
                        grad_norm=1.0,
                    )  # fmt: skip
                writer.write("end", status="finished", step=100)
    return tmp_path


def test_the_figure_of_many_arms_has_a_panel_per_baseline_and_a_dot_per_arm(many: Path) -> None:
    summaries = summarise(read_runs(many))
    figure = gap_figure(summaries, "title")
    assert len(figure.axes) == 2
    assert figure.get_figwidth() <= 8.5, "text of 8 points is legible in the book"
    for axes, baseline in zip(figure.axes, ("lr 0.1", "lr 0.2"), strict=True):
        arms = [s for s in summaries if s.baseline == baseline and s.to_own is not None]
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == [f"way {n}" for n in range(4)]
        dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert dots == pytest.approx([arm.to_own.log_loss for arm in arms])


def test_the_table_of_many_arms_has_one_whole_row_each(many: Path) -> None:
    assert cli.main(["figure", str(many)]) == 0
    assert (many / "figure.png").exists()
    lines = (many / "table.txt").read_text().splitlines()
    for summary in summarise(read_runs(many)):
        (row,) = (line for line in lines if line.split("│")[1:2] == [f" {summary.arm:<14} "])
        assert f"{summary.train_loss:.4f}" in row


def test_rivals_on_the_command_line_need_an_activation_all_can_act_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--activation", "leaky_relu", "--lr", "0.1"]
    for extra, word in (([], "--activation leaky_relu"), (fixed, "leave --lr")):
        assert cli.main(["run", "--rivals", *extra, "--out", str(tmp_path / "none")]) != 0
        assert word in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
