"""What an arm does when a teleport is due: weights move, or the optimizer does, as named."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from teleport import Teleporter
from teleport.experiment import Arm, Settings, default_arms, rival_arms, run_arms
from teleport.interventions import (
    INTERVENTIONS,
    LONGEST_TRIAL,
    MOVES,
    Subject,
    intervene,
    lasting,
)
from teleport.records import read_run
from tests.fingerprint import weights


class Training:
    """A small perceptron under way, in float64."""

    def __init__(self, lr: float = 0.05) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(6, 30), nn.LeakyReLU(), nn.Linear(30, 30), nn.LeakyReLU())
        self.model = nn.Sequential(*layers, nn.Linear(30, 3)).double()
        self.x, self.y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.5)
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


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_weights_move_if_the_name_is_a_move_and_the_report_says_so(name: str) -> None:
    training = Training()
    before = weights(training.model)
    buffers = {p: s["momentum_buffer"].clone() for p, s in training.optimizer.state.items()}
    report = intervene(name, training.subject, training.closure, held_out=training.closure)
    moved = weights(training.model) != before
    assert moved == (name in MOVES)
    assert (report.steps > 0) == moved
    assert (report.loss_after == report.loss_before) or moved
    if name == "optimizer reset":
        assert not training.optimizer.state
    else:
        for p, buffer in buffers.items():
            assert torch.equal(training.optimizer.state[p]["momentum_buffer"], buffer)


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
        arms = rival_arms("mnist-sample", optimizer)
        assert arms[:5] == default_arms("mnist-sample", optimizer)
        assert len({arm.name for arm in arms}) == len(arms)
        by_rate: dict[float, set[str]] = {}
        for arm in arms[5:]:
            assert arm.baseline == Arm(arm.lr)
            by_rate.setdefault(arm.lr, set()).add(arm.rival)
        assert set(by_rate) == {arms[0].lr, arms[2].lr}
        assert all(names == set(INTERVENTIONS) - absent for names in by_rate.values())


def test_a_rival_arm_leaves_a_record_with_its_report(tmp_path) -> None:
    settings = Settings("mnist-sample", "tiny", activation="leaky_relu")
    (path,) = run_arms(settings, [Arm(0.05, True, rival="noise, same norm")], [0], tmp_path)
    run = read_run(path)
    assert run.status == "finished"
    assert run.arm == "lr 0.05 + noise, same norm"
    assert run.config["baseline"] == "lr 0.05"
    (teleport,) = run.teleports
    assert teleport["step"] == 50
    assert "noise" in teleport["reason"]
    assert run.evaluations[-1]["teleport_seconds"] > 0.0
