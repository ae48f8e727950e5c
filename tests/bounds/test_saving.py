"""`growth="auto"`: the steps a teleport saves, by theory and by counting, and what is decided."""

import copy
import gc
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

import teleport
from teleport.bounds import saving
from teleport.bounds.saving import TriedStep, best_growth, try_step
from teleport.runtime.ranks import ALONE


class Scaled(nn.Module):
    """``s w``, of which w is trained and s is not: γs and w / γ is a teleport by γ."""

    def __init__(self, scale: float, weight: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def loss(self) -> torch.Tensor:
        return 0.5 * (self.scale * self.weight - 3.0) ** 2


def steps_down(model: Scaled, lr: float) -> int:
    """Steps of gradient descent until the gradient has fallen to 1/e of itself."""
    optimizer, first, steps = SGD(model.parameters(), lr=lr), math.nan, 0
    while True:
        optimizer.zero_grad()
        model.loss().backward()
        here = abs(float(model.weight.grad))
        first = here if steps == 0 else first
        if here <= first / math.e:
            return steps
        optimizer.step()
        steps += 1


@pytest.mark.verifies("thm-saving")
@given(st.floats(0.2, 2.0), st.floats(-1.0, 0.5), st.floats(0.005, 0.02), st.floats(1.05, 2.0))
def test_the_steps_saved_are_those_counted(
    scale: float, weight: float, stride: float, growth: float
) -> None:
    lr = stride / scale**2
    slow, fast = Scaled(scale, weight), Scaled(growth * scale, weight / growth)
    before, after = (try_step([m.loss], m, SGD(m.parameters(), lr=lr), ALONE) for m in (slow, fast))
    assert after.loss == pytest.approx(before.loss, rel=1e-12)
    assert before.stride == pytest.approx(stride, rel=1e-6)
    assert after.stride == pytest.approx(growth**2 * stride, rel=1e-6)
    assert after.fall == pytest.approx(growth**2 * before.fall, rel=1e-9)
    counted = steps_down(slow, lr) - steps_down(fast, lr)
    assert counted == pytest.approx(before.saved(growth), abs=2.0)
    assert before.saved(growth) == pytest.approx((growth**2 - 1) / after.stride, rel=1e-6)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.01),
    "momentum": lambda p: SGD(p, lr=0.01, momentum=0.8),
    "two groups": lambda p: SGD([{"params": p[:1], "lr": 0.02}, {"params": p[1:]}], lr=0.005),
    "Adam": lambda p: Adam(p, lr=0.001),
    "AdamW": lambda p: AdamW(p, lr=0.001),
    "Adagrad": lambda p: Adagrad(p, lr=0.01),
    "RMSprop": lambda p: RMSprop(p, lr=0.001),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_stride_is_that_of_the_hessian_on_a_quadratic(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(9, 4).double(), torch.randn(9, 3).double()
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[name](parameters)
    for _ in range(3):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    grads = [p.grad.clone() for p in parameters]
    trial = try_step([lambda: mse_loss(model(x), y)], model, optimizer, ALONE)
    for before, after in zip(state, (model.state_dict(), optimizer.state_dict()), strict=True):
        assert str(before) == str(after)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, grads, strict=True))
    now = torch.autograd.grad(mse_loss(model(x), y), parameters, create_graph=True)
    ways = []
    for p, g in zip(parameters, now, strict=True):
        group = next(one for one in optimizer.param_groups if any(p is q for q in one["params"]))
        lr, own, square = group["lr"], optimizer.state[p], g.detach() ** 2
        if "exp_avg_sq" in own:
            second = 0.999 * own["exp_avg_sq"] + 0.001 * square
            lr = lr / ((second / (1 - 0.999 ** (float(own["step"]) + 1))).sqrt() + 1e-8)
        elif "square_avg" in own:
            lr = lr / ((0.99 * own["square_avg"] + 0.01 * square).sqrt() + 1e-8)
        elif "sum" in own:
            lr = lr / ((own["sum"] + square).sqrt() + 1e-10)
        ways.append(lr * g.detach() / (1 - group.get("momentum", 0.0)))
    slope = sum((g * v).sum() for g, v in zip(now, ways, strict=True))
    bend = torch.autograd.grad(slope, parameters)
    curved = float(sum((b * v).sum() for b, v in zip(bend, ways, strict=True)))
    assert trial.fall == pytest.approx(float(slope), rel=1e-9)
    assert trial.stride == pytest.approx(curved / float(slope), rel=1e-6)


@given(st.floats(2.0, 30.0), st.floats(1.001, 2.0))
def test_no_growth_saves_more_than_the_best(power: float, other: float) -> None:
    trial, best = TriedStep(1.0, 1.0, 1.0, 0.01), best_growth(power)
    assert 1.0 < best <= saving.MOST_GROWTH
    assert trial.saved(other, power) <= trial.saved(best, power) * (1 + 1e-12)


def test_a_step_that_does_not_descend_saves_nothing() -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.0)
    trial = try_step([lambda: model(torch.ones(1, 2)).sum() ** 2], model, optimizer, ALONE)
    assert trial.stride == math.inf
    assert trial.saved(1.5) == 0.0


class Trained:
    """A perceptron behind ``growth="auto"``, with a budget that is never short."""

    def __init__(self, lr: float = 1e-4, **options: object) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 3)
        )
        self.x, self.y = torch.randn(24, 8), torch.arange(24) % 3
        self.optimizer = SGD(self.model.parameters(), lr=lr)
        self.teleporter = teleport.Teleporter(
            self.model, growth="auto", optimizer=self.optimizer, **options
        )

    def loss(self) -> torch.Tensor:
        return cross_entropy(self.model(self.x), self.y)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()

    def long_ago(self, seconds: float = 1e6) -> None:
        """As if training had taken so long."""
        self.teleporter._decision.training += seconds

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_it_goes_where_it_pays_and_says_why() -> None:
    trained = Trained()
    trained.train(5)
    trained.long_ago()
    before = trained.weights()
    report = trained.teleporter.step(trained.loss)
    assert report.steps == 1
    assert not report.rolled_back
    assert report.growth == pytest.approx(1.5**0.5, rel=1e-3)
    assert not same(before, trained.weights())
    assert "growth 1.22 saves about" in report.reason
    assert report.seconds <= trained.teleporter._decision.spent


def test_without_steps_and_without_room_nothing_is_looked_at() -> None:
    trained, calls = Trained(), []

    def loss() -> torch.Tensor:
        calls.append(1)
        return trained.loss()

    assert "no two steps" in trained.teleporter.step(loss).reason
    trained.train(3)
    trained.teleporter._decision.spent = 1e3
    report = trained.teleporter.step(loss)
    assert "no room in the budget yet: 2 % of" in report.reason
    assert str(report).splitlines()[0] == f"not moved: {report.reason}"
    assert "nan" not in str(report)
    assert math.isnan(report.loss_before)
    assert not calls


def test_at_a_rate_that_is_large_it_says_that_it_would_not_pay() -> None:
    trained = Trained(lr=3.0)
    trained.train(5)
    trained.teleporter._decision.training = 50.0  # 10 s for a step: a teleport costs next to none
    before = trained.weights()
    report = trained.teleporter.step(trained.loss)
    assert "it would not pay" in report.reason
    assert (report.steps, report.grad_norm_after) == (0, report.grad_norm_before)
    assert same(before, trained.weights())


def test_the_budget_is_kept_but_for_the_first_teleport_whose_cost_nobody_knows() -> None:
    other = Trained()
    other.train(3)
    other.long_ago()
    other.teleporter.step(other.loss)  # the first in a process loads what the others find
    trained = Trained(budget=0.1)
    decision, costs = trained.teleporter._decision, []
    for _ in range(40):
        trained.train(2)
        report = trained.teleporter.step(trained.loss)
        costs += [report.seconds] if report.steps else []
    assert decision.spent <= max(0.1 * decision.training, costs[0] if costs else 0.0) + 1.0
    assert len(costs) <= 2


def test_a_teleport_after_which_a_step_overshoots_is_undone() -> None:
    trained = Trained(lr=1.0)
    trained.teleporter._decision.power = 2.0  # go far
    trained.train(3)
    trained.long_ago()
    before = trained.weights()
    report = trained.teleporter.step(trained.loss)
    assert report.rolled_back
    assert "would overshoot" in report.reason
    assert same(before, trained.weights())


def test_the_power_is_learned_from_the_last_teleport() -> None:
    trained = Trained()
    trained.train(5)
    trained.long_ago()
    assert trained.teleporter._decision.growth == pytest.approx(1.5**0.5)
    before = try_step([trained.loss], trained.model, trained.optimizer)
    trained.teleporter.step(trained.loss)
    after = try_step([trained.loss], trained.model, trained.optimizer)
    power = math.log(after.stride / before.stride) / math.log(1.5**0.5)
    assert trained.teleporter._decision.power == pytest.approx(max(2.0, power), rel=0.05)


def test_a_teleport_that_other_data_pays_for_is_undone() -> None:
    trained = Trained()
    trained.train(5)
    trained.long_ago()
    before = trained.weights()

    def held_out() -> torch.Tensor:
        return torch.tensor(0.5 if same(before, trained.weights()) else 5.0)

    report = trained.teleporter.step(trained.loss, held_out=held_out)
    assert report.rolled_back
    assert "the held-out loss rose by" in report.reason
    assert same(before, trained.weights())


def test_time_spent_teleporting_is_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(saving, "now", lambda: float(next(clock)))
    decision = Trained().teleporter._decision
    for _ in range(3):  # at 0, 10 and 20
        decision.count()
    decision.spend(4.0, moved=True)
    decision.count()
    assert (decision.steps, decision.training, decision.spent) == (3, 26.0, 4.0)


def test_the_optimizer_forgets_a_teleporter_that_is_gone() -> None:
    trained = Trained()
    hooks = trained.optimizer._optimizer_step_post_hooks
    assert len(hooks) == 1
    del trained.teleporter
    gc.collect()
    assert not hooks
    trained.train(1)


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"growth": "auto"}, "growth='auto'"),
        ({"growth": 0.5}, 'or "auto"'),
        ({"growth": "auto", "lr": 0.1}, "left out"),
        ({"growth": "auto", "cap": 1.0}, "left out"),
        ({"growth": "auto", "budget": 0.0}, r"in \(0, 1\]"),
        ({"growth": "auto", "budget": 1.5}, r"in \(0, 1\]"),
    ],
)
def test_bad_arguments(model: nn.Module, options: dict[str, object], word: str) -> None:
    optimizer = {"optimizer": SGD(model.parameters(), lr=0.1)} if len(options) > 1 else {}
    with pytest.raises(ValueError, match=word):
        teleport.Teleporter(model, **options, **optimizer)


def test_an_optimizer_that_is_not_known_is_named(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="NAdam"):
        teleport.Teleporter(model, growth="auto", optimizer=torch.optim.NAdam(model.parameters()))


def test_adam_without_a_state_is_told_to_take_a_step(model: nn.Module) -> None:
    optimizer = Adam(model.parameters())
    teleporter = teleport.Teleporter(model, growth="auto", optimizer=optimizer)
    teleporter._decision.steps, teleporter._decision.training = 5, 1e6
    with pytest.raises(teleport.OptimizerStateError, match="no state yet"):
        teleporter.step(lambda: model(torch.ones(1, 2)).sum() ** 2)


def test_with_the_preconditioned_norm(model: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 2))
    x, y = torch.randn(8, 6), torch.arange(8) % 2
    optimizer = Adam(net.parameters(), lr=1e-6)
    teleporter = teleport.Teleporter(
        net, growth="auto", optimizer=optimizer, objective="preconditioned"
    )
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    teleporter._decision.training += 1e6
    report = teleporter.step(lambda: cross_entropy(net(x), y))
    assert report.norm == "preconditioned gradient norm (Adam)"
    assert report.growth == pytest.approx(1.5**0.5, rel=1e-3)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "amsgrad", "Adagrad", "RMSprop", "centered"])
def test_the_step_tried_is_the_optimizers_next_but_for_its_momentum(name: str) -> None:
    """With β₁ = 0 the optimizer itself goes along v."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = torch.randn(5, 3).double()
    parameters = list(model.parameters())
    optimizer = {
        "Adam": lambda: Adam(parameters, lr=0.01, betas=(0.0, 0.9)),
        "AdamW": lambda: AdamW(parameters, lr=0.01, betas=(0.0, 0.9), weight_decay=0.0),
        "amsgrad": lambda: Adam(parameters, lr=0.01, betas=(0.0, 0.9), amsgrad=True),
        "Adagrad": lambda: Adagrad(parameters, lr=0.01),
        "RMSprop": lambda: RMSprop(parameters, lr=0.01),
        "centered": lambda: RMSprop(parameters, lr=0.01, centered=True),
    }[name]()

    def loss() -> torch.Tensor:
        return model(x).square().sum()

    for step in range(4):
        optimizer.zero_grad()
        loss().backward()
        if step > 0:
            trial = try_step([loss], model, optimizer)
        before, grads = (
            [t.detach().clone() for t in of] for of in (parameters, [p.grad for p in parameters])
        )
        optimizer.step()
    moved = [a - p.detach() for a, p in zip(before, parameters, strict=True)]
    fall = sum(float((g * m).sum()) for g, m in zip(grads, moved, strict=True))
    assert trial.fall == pytest.approx(fall, rel=1e-9)


def test_an_optimizer_that_climbs_saves_nothing_on_a_loss_that_shall_fall() -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1, maximize=True)
    trial = try_step([lambda: model(torch.ones(1, 2)).sum() ** 2], model, optimizer)
    assert trial.fall < 0.0
    assert trial.saved(1.5) == 0.0


def test_complex_weights_fall_by_both_parts_of_their_gradient() -> None:
    weight = nn.Parameter(torch.tensor([1.0 + 2.0j], dtype=torch.complex128))
    model = nn.Module()
    model.weight = weight
    optimizer = SGD(model.parameters(), lr=0.01)
    trial = try_step([lambda: (weight * weight.conj()).real.sum()], model, optimizer)
    assert trial.fall == pytest.approx(0.01 * 20.0)  # |2 w|^2
    assert trial.stride == pytest.approx(0.02)


def test_an_end_without_a_gradient_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    decision = Trained().teleporter._decision
    decision.trial = TriedStep(1.0, 1.0, 1.0, 0.1)
    monkeypatch.setattr(saving, "try_step", lambda *_: TriedStep(1.0, 0.0, 0.0, math.inf))
    assert "overshoot" in decision.objection([], None, None, None)
    assert decision.power == saving.FIRST_POWER
