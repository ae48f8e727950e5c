"""Losses so small or so large that squares of their gradients leave the range of the dtype."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from teleport import Teleporter
from teleport.objective import squared_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(power=st.integers(-50, 50), layers=st.integers(2, 3))
def test_a_teleport_is_the_same_whatever_power_of_two_the_loss_is_scaled_by(
    dtype: torch.dtype, power: int, layers: int
) -> None:
    """Squares of its gradient may leave the range of single precision on the way."""
    torch.manual_seed(layers)
    widths = zip([6, *[24] * layers], [*[24] * layers, 3], strict=True)
    model = nn.Sequential(*(m for pair in widths for m in (nn.Linear(*pair), nn.Tanh()))).to(dtype)
    x = torch.randn(5, 6, dtype=dtype)
    scaled = copy.deepcopy(model)
    one = Teleporter(model, growth=1.5).step(lambda: model(x).square().mean())
    other = Teleporter(scaled, growth=1.5).step(lambda: 2.0**power * scaled(x).square().mean())
    assert other.growth == pytest.approx(1.5, rel=1e-3)
    assert other.grad_norm_before / 2.0**power == pytest.approx(one.grad_norm_before, rel=1e-5)
    for p, q in zip(model.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4 * float(p.abs().max()))


def test_a_gradient_too_small_to_be_squared_is_told_and_its_norm_is_right() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3)), torch.randn(5, 6)

    for scale in (1e-22, 1e-30):
        copied = copy.deepcopy(model)
        report = Teleporter(copied).step(lambda m=copied, s=scale: s * m(x).square().mean())
        assert "is below the range of the dtype. Scale the loss up" in report.reason
    tiny = [torch.full((3, 4), 1e-30), torch.full((4,), 1e30), torch.full((0, 4), 1.0)]
    assert list(map(squared_norm, tiny)) == pytest.approx([12e-60, 4e60, 0.0], rel=1e-6, abs=0.0)
    assert math.isinf(squared_norm(torch.tensor([1.0, math.inf])))
