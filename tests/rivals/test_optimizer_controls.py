"""Controls on the optimizer: a raised learning rate is one, a reset optimizer is a new one."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from teleport.rivals import (
    RaisedLearningRate,
    factors_by_parameter,
    growth_duration,
    reset_optimizer,
)
from tests.support.strategies import seeds

Make = Callable[[Iterator[nn.Parameter], float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr, initial_accumulator_value=0.1),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, momentum=0.5),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def train(model: nn.Module, step: Callable[[], object], steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        model.zero_grad()
        functional.mse_loss(model(x), x[:, :2]).backward()
        step()


def position(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@optimizers
@settings(max_examples=5)
@given(seed=seeds, factor=st.floats(0.5, 4.0), steps=st.integers(0, 4))
def test_raised_for_some_steps_is_a_larger_lr_for_some_steps(
    name: str, seed: int, factor: float, steps: int
) -> None:
    one, two = network(seed), network(seed)
    raised = RaisedLearningRate(OPTIMIZERS[name](one.parameters(), 0.01), factor, steps)
    train(one, raised.step, 5)
    optimizer = OPTIMIZERS[name](two.parameters(), 0.01)
    done = 0

    def step() -> None:
        nonlocal done
        optimizer.param_groups[0]["lr"] = 0.01 * (factor if done < steps else 1.0)
        optimizer.step()
        done += 1

    train(two, step, 5)
    torch.testing.assert_close(position(one), position(two))
    assert optimizer.param_groups[0]["lr"] == raised.optimizer.param_groups[0]["lr"] or steps >= 5


def test_factors_per_layer_are_parameter_groups_with_their_own_lr() -> None:
    one, two = network(1), network(1)
    growths = {"0": 3.0, "2": 0.5}
    raised = RaisedLearningRate(
        torch.optim.SGD(one.parameters(), lr=0.01), factors_by_parameter(one, growths), 4
    )
    train(one, raised.step, 4)
    groups = [{"params": two[int(n)].parameters(), "lr": 0.01 * f} for n, f in growths.items()]
    train(two, torch.optim.SGD(groups, lr=0.01).step, 4)
    torch.testing.assert_close(position(one), position(two))


@optimizers
@settings(max_examples=5)
@given(seeds)
def test_a_reset_optimizer_goes_on_as_a_new_one(name: str, seed: int) -> None:
    one, two = network(seed), network(seed)
    used = OPTIMIZERS[name](one.parameters(), 0.01)
    train(one, used.step, 4)
    two.load_state_dict(one.state_dict())
    kept = position(one)
    reset_optimizer(used)
    assert torch.equal(position(one), kept)
    train(one, used.step, 3, seed=1)
    train(two, OPTIMIZERS[name](two.parameters(), 0.01).step, 3, seed=1)
    torch.testing.assert_close(position(one), position(two), rtol=0.0, atol=0.0)


def test_a_reset_keeps_a_learning_rate_set_by_a_scheduler() -> None:
    model = network(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer.param_groups[0]["lr"] = 0.007
    reset_optimizer(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.007


def test_growth_lasts_until_half_of_it_on_a_log_scale_is_gone() -> None:
    plain = [1.0, 1.0, 1.0, 1.0]
    assert growth_duration([4.0, 2.1, 1.9, 4.0], plain, 4.0) == 2
    assert growth_duration([1.0, 4.0, 4.0, 4.0], plain, 4.0) == 0
    assert growth_duration([4.0] * 4, plain, 4.0) == 4


def test_arguments_out_of_range_are_refused() -> None:
    optimizer = torch.optim.SGD(network(0).parameters(), lr=0.1)
    for wrong in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="factor"):
            RaisedLearningRate(optimizer, wrong, 1)
    with pytest.raises(ValueError, match="steps"):
        RaisedLearningRate(optimizer, 2.0, -1)
