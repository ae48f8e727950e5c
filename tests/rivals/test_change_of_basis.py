"""Change of basis: no input notices, the weights do."""

import pytest
import torch
from hypothesis import example, given
from torch import nn
from torch.nn import functional

from teleport import UnsupportedModelError
from teleport.rivals import ChangeOfBasisTeleporter
from tests.support.fingerprint import fingerprint, weights
from tests.support.homogeneous import Case, cases
from tests.support.strategies import gradient_norm


@pytest.mark.verifies("thm-change-of-basis")
@example(Case((1, 2, 2, 3, 2), groups=2, convolutions=2))
@example(Case((1, 2, 4, 3, 2), groups=2, convolutions=2, activation="PReLU", pool="max"))
@given(cases())
def test_no_input_notices_and_the_weights_move(case: Case) -> None:
    model, x, y = case.build()
    model.eval()
    others = 3 * torch.randn_like(x)
    before, start = model(others).detach(), weights(model)
    teleporter = ChangeOfBasisTeleporter(model, spread=0.9, seed=case.seed)
    report = teleporter.step(lambda: functional.mse_loss(model(x), y))
    assert not report.rolled_back
    assert weights(model) != start
    torch.testing.assert_close(model(others), before, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("draws", [2, 9])
def test_the_best_of_several_draws_is_kept(draws: int) -> None:
    """The winner is the largest of what single draws with the same seed give."""
    case = Case((4, 6, 5, 2))
    model, x, y = case.build()
    norm = gradient_norm(model, lambda: functional.mse_loss(model(x), y))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    single = ChangeOfBasisTeleporter(model, 1, 0.9, seed=5)
    norms = []
    for _ in range(draws):
        model.load_state_dict(start)
        norms.append(single.step(lambda: functional.mse_loss(model(x), y)).grad_norm_after)
    model.load_state_dict(start)
    several = ChangeOfBasisTeleporter(model, draws, 0.9, seed=5)
    report = several.step(lambda: functional.mse_loss(model(x), y))
    assert report.grad_norm_after == pytest.approx(max(*norms, norm))
    assert max(norms) > norm  # else this shows nothing


def test_the_start_is_kept_if_no_draw_is_better() -> None:
    """ω = (w, v) of v w x with w = v: every factor keeps v w, and here any but 1 lowers no norm."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.fill_(1e3)  # far from balance: most factors above 1 balance it
    x = torch.ones(1, 1, dtype=torch.float64)
    # ‖g‖² = (v² + w²) · const; scaling w by c gives v²/c² + c² w²: larger for c < 1 only.
    for seed in range(20):
        start = weights(model)
        report = ChangeOfBasisTeleporter(model, 2, 1e-3, seed=seed).step(
            lambda: functional.mse_loss(model(x), 0 * x)
        )
        assert report.growth >= 1.0
        if report.steps == 0:
            assert weights(model) == start
            return
    pytest.fail("in 20 pairs of draws, not one had both factors above 1")


def test_factors_lie_within_the_spread() -> None:
    model, x, y = Case((3, 200, 2), activation="Identity", bias=False).build()
    before = model[-1].weight.detach().clone()
    spread = 0.3
    ChangeOfBasisTeleporter(model, 1, spread).step(lambda: functional.mse_loss(model(x), y))
    factors = (before / model[-1].weight.detach())[0]
    assert 1 - spread <= float(factors.min()) < 1 - 0.9 * spread
    assert 1 + 0.9 * spread < float(factors.max()) <= 1 + spread


linear = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Sequential(linear, nn.Tanh(), nn.Linear(4, 2)), "Tanh"),
        (nn.Sequential(linear, nn.ELU(), nn.Linear(4, 2)), "ELU"),
        (nn.Sequential(linear, nn.ReLU(), linear), "used twice"),
        (nn.Sequential(linear, nn.BatchNorm1d(4), nn.Linear(4, 2)), "BatchNorm1d"),
        (nn.Sequential(linear, nn.MaxPool1d(2), nn.Linear(2, 2)), "mix neurons"),
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Linear(4, 2)), "do not fit"),
        (nn.Sequential(linear, nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 1)), "Unflatten"),
        (nn.Sequential(linear, nn.ReLU(), nn.Conv1d(4, 2, 1)), "cannot follow"),
    ],
)
def test_what_is_not_homogeneous_is_refused_by_name(model: nn.Module, match: str) -> None:
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=match):
        ChangeOfBasisTeleporter(model)
    assert fingerprint(model) == before


def test_arguments_out_of_range_are_refused() -> None:
    model, _, _ = Case((2, 3, 1)).build()
    for wrong in ({"draws": 0}, {"spread": 1.0}, {"spread": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ChangeOfBasisTeleporter(model, **wrong)
