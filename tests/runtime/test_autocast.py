"""Autocast: products in half precision, the null space in float64, growth and drift as measured."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from teleport import Teleporter, TeleportReport, null_space
from teleport.layers.support import cover
from teleport.recording import record
from teleport.runtime.precision import unit_scale
from teleport.runtime.transaction import Transaction
from teleport.teleporter import METHODS
from tests.support.fingerprint import all_but_weights, fingerprint
from tests.support.strategies import gradient_norm, seeds

few = settings(max_examples=6)
GROWTH = 1.5
HALF = (torch.bfloat16, torch.float16)


class Sequences(nn.Module):
    """An embedding, a layer over 3 positions, a head on their mean."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(5, 32), layer, nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.layer(h, h, h) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(h)
        return self.head((h[0] if isinstance(h, tuple) else h).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (lambda: Sequences(nn.MultiheadAttention(32, 2, batch_first=True)), (3, 5)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 16, 3, groups=2),
            nn.BatchNorm2d(16).eval(), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3),
        ),
        (2, 8, 8),
    ),
    "encoder": (
        lambda: Sequences(nn.TransformerEncoderLayer(32, 2, 48, batch_first=True)), (3, 5)
    ),
    "gru": (lambda: Sequences(nn.GRU(32, 32, batch_first=True)), (3, 5)),
    "linear": (
        lambda: nn.Sequential(
            nn.Linear(9, 48), nn.Tanh(), nn.Linear(48, 200), nn.Tanh(), nn.Linear(200, 3)
        ),
        (9,),
    ),
    "lstm": (lambda: Sequences(nn.LSTM(32, 32, batch_first=True)), (3, 5)),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 4, 3, stride=2),
            nn.ReLU(), nn.Flatten(), nn.Linear(676, 3),
        ),
        (2, 4, 4),
    ),
}  # fmt: skip


class Problem:
    """A float32 model and six samples, cast to ``dtype`` in the closure or around the step."""

    def __init__(self, name: str, dtype: torch.dtype, inside: bool, seed: int = 0) -> None:
        torch.manual_seed(seed)
        make, shape = MODELS[name]
        self.model, self.x, self.y = make(), torch.randn(6, *shape), torch.randint(3, (6,))
        self.dtype, self.inside = dtype, inside

    def region(self, wanted: bool = True) -> AbstractContextManager:
        return torch.autocast("cpu", self.dtype) if wanted else nullcontext()

    def closure(self, start: int = 0, end: int = 6) -> Tensor:
        with self.region(self.inside):
            return functional.cross_entropy(self.model(self.x[start:end]), self.y[start:end])

    def closures(self, parts: int) -> list[Callable[[], Tensor]]:
        size = 6 // parts
        return [partial(self.closure, i * size, (i + 1) * size) for i in range(parts)]

    def teleport(self, parts: int = 1, **settings: object) -> TeleportReport:
        with self.region(not self.inside):
            return Teleporter(self.model, growth=GROWTH, **settings).step(self.closures(parts))

    def measured(self, parts: int = 1) -> tuple[float, float]:
        """Loss and gradient norm by plain autograd, dropout off as inside a teleport."""

        def mean() -> Tensor:
            with self.region(not self.inside):
                return torch.stack([f() for f in self.closures(parts)]).mean()

        with Transaction(self.model):
            return float(mean().detach()), gradient_norm(self.model, mean)


@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("settings_", "parts", "inside"),
    [
        ({}, 1, True),
        ({}, 1, False),
        ({"method": "double_backward"}, 1, True),
        ({"tau": 0.99, "max_drift": 0.05}, 1, True),
        ({}, 2, True),
    ],
    ids=["closure", "region", "double backward", "tau", "parts"],
)
def test_growth_and_drift_are_as_measured(
    name: str, dtype: torch.dtype, settings_: dict, parts: int, inside: bool
) -> None:
    """Growth to the rounding of the dtype; the report is what plain autograd finds."""
    problem = Problem(name, dtype, inside)
    before, state = problem.measured(parts), all_but_weights(problem.model)
    report = problem.teleport(parts, **settings_)
    assert all_but_weights(problem.model) == state
    loss, norm = problem.measured(parts)
    assert not report.rolled_back, report.reason
    assert report.steps == 1, report.reason
    assert "double backward" not in report.reason  # whoever asked for it is told nothing
    assert (report.loss_before, report.loss_after) == pytest.approx((before[0], loss), rel=1e-6)
    assert report.growth == pytest.approx(norm / before[1], rel=1e-5)
    assert report.growth == pytest.approx(GROWTH, rel=4 * torch.finfo(dtype).eps)
    assert abs(loss - before[0]) <= report.tolerance


@few
@given(seeds, st.sampled_from(HALF), st.sampled_from(METHODS))
def test_what_is_a_fixed_point_does_not_move_along_rounding(
    seed: int, dtype: torch.dtype, method: str
) -> None:
    """``thm-fixed``: the first layer stays bit for bit, though its direction is rounded."""
    problem = Problem("linear", dtype, inside=True, seed=seed)
    start = problem.model[0].weight.detach().clone()
    report = problem.teleport(method=method)
    assert [layer.status for layer in report.layers] == ["fixed point", "moved", "moved"]
    assert torch.equal(problem.model[0].weight, start)


@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_the_basis_is_that_of_what_the_layer_computed_with(dtype: torch.dtype) -> None:
    """Rows are the inputs rounded to the dtype; the basis spans them in float64."""
    problem = Problem("linear", dtype, inside=False)
    with problem.region():
        space = null_space(problem.model, [lambda: problem.model(problem.x)])
    rounded = problem.x.to(dtype).double()
    rows = torch.cat([rounded, torch.ones(6, 1, dtype=torch.float64)], dim=1)
    vectors = space.bases["0"].vectors
    assert vectors.dtype == torch.float64
    assert space.bases["0"].rank == 6
    assert (rows - rows @ vectors @ vectors.T).norm() <= 1e-12 * rows.norm()
    with problem.region(), nullcontext():
        tape = record(problem.model, cover(problem.model).sites, problem.closure)
    assert {call.x.dtype for call in tape.calls} == {dtype}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "rolled back"])
def test_later_calls_in_the_region_see_the_weights_as_they_are(kept: bool) -> None:
    """Autocast keeps cast weights for its region; a teleport inside must not leave stale ones."""
    problem = Problem("linear", torch.bfloat16, inside=False)
    with problem.region():
        before = problem.model(problem.x)  # fills the cache
        growth, drift = (3.0, None) if kept else (50.0, 0.0)
        teleporter = Teleporter(problem.model, growth=growth, max_drift=drift)
        report = teleporter.step(problem.closure)
        assert report.rolled_back != kept
        inside = problem.model[:4](problem.x), problem.model(problem.x)
    with problem.region():
        outside = problem.model[:4](problem.x), problem.model(problem.x)
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[1], outside[1])
    assert torch.equal(inside[1], before) != kept
    assert inside[1].requires_grad


def test_a_weight_used_outside_its_layer_is_noticed() -> None:
    """The layer's product is cast without gradients; another use of the weight must not find it."""
    problem = Problem("linear", torch.bfloat16, inside=True)
    weight, x = problem.model[2].weight, torch.randn(6, 48)

    def closure() -> Tensor:
        with problem.region():
            loss = functional.cross_entropy(problem.model(problem.x), problem.y)
            return loss + functional.linear(x, weight).square().mean()

    tape = record(problem.model, cover(problem.model).sites, closure)
    assert [block.name for block in tape.left_out] == ["2"]


@few
@given(seeds, st.sampled_from([2.0**8, 2.0**16]), st.sampled_from(METHODS), st.sampled_from([1, 2]))
def test_a_scaled_loss_grows_like_the_loss(
    seed: int, scale: float, method: str, parts: int
) -> None:
    """Scaled as `torch.amp.GradScaler` does: the first derivatives just fit into float16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    problem = Problem("linear", torch.float16, inside=True, seed=seed)
    scaled = [lambda f=f: scaler.scale(f()) for f in problem.closures(parts)]
    report = Teleporter(problem.model, growth=GROWTH, method=method).step(scaled)
    assert not report.rolled_back, report.reason
    if method == "double_backward" and "leaves the range of the dtype" in report.reason:
        assert report.steps == 0  # it forms second derivatives, which leave float16 first
        return
    assert report.growth == pytest.approx(GROWTH, rel=4 * torch.finfo(torch.float16).eps)
    assert report.loss_before / scale == pytest.approx(problem.measured(parts)[0], rel=1e-2)


@pytest.mark.parametrize(
    ("method", "exponent"), [("double_backward", 18), ("tangent", 19), ("tangent", 23)]
)
def test_derivatives_out_of_range_are_named(method: str, exponent: int) -> None:
    """The second derivatives leave float16 first, the gradient later."""
    problem = Problem("linear", torch.float16, inside=True)
    start = fingerprint(problem.model)
    report = Teleporter(problem.model, method=method).step(
        lambda: 2.0**exponent * problem.closure()
    )
    assert "leaves the range of the dtype" in report.reason
    assert report.steps == 0
    assert fingerprint(problem.model) == start


@given(st.floats(1e-30, 1e30))
def test_the_unit_scale_is_a_power_of_two_that_makes_a_norm_of_one(norm: float) -> None:
    scale = unit_scale(lambda: norm**2, torch.float16)
    assert math.frexp(scale)[0] == 0.5
    assert 0.7 <= scale * norm <= 1.42
    assert unit_scale(lambda: norm**2, torch.bfloat16) == 1.0


@few
@given(seeds, st.booleans())
def test_a_null_space_keeps_outputs_to_rounding_of_the_dtype(seed: int, project: bool) -> None:
    """``thm-keep`` in a region: the projection itself is done in full precision."""
    problem = Problem("linear", torch.bfloat16, inside=False, seed=seed)
    model, old, new = problem.model, problem.x[:3], problem.x[3:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with problem.region():
        space = null_space(model, [lambda: model(old)])
    exact = [old.bfloat16().float()]
    for layer in (0, 2):
        with torch.no_grad(), problem.region():
            exact.append(model[: layer + 2](old).float())
    start = {layer: model[layer].weight.detach().clone() for layer in (0, 2, 4)}
    biases = {layer: model[layer].bias.detach().clone() for layer in (0, 2, 4)}
    with problem.region():
        functional.cross_entropy(model(new), problem.y[3:]).backward()
        if project:
            space.project_(model)
            optimizer.step()
        else:
            with space.keep(model):
                optimizer.step()
    for layer, rows in zip((0, 2, 4), exact, strict=True):
        moved = model[layer].weight.detach() - start[layer]
        change = rows @ moved.T + (model[layer].bias.detach() - biases[layer])
        size = rows.norm() * moved.norm()
        assert moved.norm() > 1e-3
        assert change.norm() <= 1e-5 * size
