"""Theorem T7 for whole chains: the bound holds, is reached, and its constants are right.

``python tests/bounds/test_network.py`` prints how loose it is on two networks and real images.
"""

import copy
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mpmath import iv
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from teleport import NetworkBound, Teleporter, UnsupportedModelError, data, network_bound
from teleport.bounds.lipschitz import GELU_TANH, LINEAR, SILU, convolution_norm, lipschitz
from teleport.lab.experiments import models
from tests.support.drawn_layers import Layer, convolutions, transposed_convolutions
from tests.support.examples import examples
from tests.support.fingerprint import fingerprint
from tests.support.strategies import seeds

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

ROUNDING = 1e-10
"""Relative; the networks have up to six layers, and condition numbers of their Grams matter."""

DOUBLE = torch.float64
EPS = torch.finfo(DOUBLE).eps


def jacobian(module: nn.Module, shape: Sequence[int]) -> Tensor:
    """The matrix of an affine module, column by column: what it does to the unit vectors."""
    count = math.prod(shape)
    units = torch.eye(count, dtype=DOUBLE).reshape(count, *shape)
    with torch.no_grad():
        columns = module(units) - module(torch.zeros(1, *shape, dtype=DOUBLE))
    return columns.flatten(1).T


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def unbatched(case: Layer) -> tuple[nn.Module, Tensor]:
    module, _, x = case.build()
    dims = len(module.kernel_size)
    return module, x.detach() if x.dim() == dims + 1 else x[0].detach()


@pytest.mark.verifies("thm-drift")
@examples(60)
@given(st.one_of(convolutions(), transposed_convolutions()))
def test_a_convolution_is_no_larger_than_its_norm_bound(case: Layer) -> None:
    module, x = unbatched(case)
    exact = norm(jacobian(module, x.shape))
    for given_input in (x, x[None]):
        assert exact <= convolution_norm(module, given_input) * (1 + ROUNDING)


@pytest.mark.verifies("thm-drift")
@given(
    dims=st.integers(1, 3),
    kernel=st.sampled_from([1, 3]),
    dilation=st.integers(1, 2),
    size=st.integers(3, 5),
    seed=seeds,
)
@example(dims=1, kernel=3, dilation=2, size=4, seed=6)  # it sees every other frequency only
def test_the_norm_of_a_circular_convolution_is_exact(
    dims: int, kernel: int, dilation: int, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    module = kind(
        2, 2, kernel, padding="same", padding_mode="circular", dilation=dilation, dtype=DOUBLE
    )
    shape = (2, *[size] * dims)
    found = convolution_norm(module, torch.zeros(shape, dtype=DOUBLE))
    assert found == pytest.approx(norm(jacobian(module, shape)), rel=1e-9)


@pytest.mark.verifies("thm-drift")
@given(kernel=st.integers(1, 3), groups=st.integers(1, 2), seed=seeds)
def test_the_norm_of_a_convolution_without_overlap_is_exact(
    kernel: int, groups: int, seed: int
) -> None:
    torch.manual_seed(seed)
    module = nn.Conv2d(2 * groups, 2 * groups, kernel, kernel, groups=groups).to(DOUBLE)
    shape = (2 * groups, 2 * kernel, 3 * kernel)
    found = convolution_norm(module, torch.zeros(shape, dtype=DOUBLE))
    assert found == pytest.approx(norm(jacobian(module, shape)), rel=1e-9)


@pytest.mark.verifies("thm-drift")
@pytest.mark.parametrize("size", range(2, 8))
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_the_norm_of_a_difference_is_bounded_where_few_frequencies_would_miss_it(
    kind: type[nn.Module], padding: int, stride: int, size: int
) -> None:
    """``x_i - x_j`` is largest at half the sampling rate, which an odd size does not have."""
    module = kind(1, 1, stride + 1, stride, padding, bias=False, dtype=DOUBLE)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[0, 0, 0], module.weight[0, 0, -1] = 1.0, -1.0
    shape = (1, size + (stride if kind is nn.Conv1d else 0))
    exact = norm(jacobian(module, shape))
    assert exact <= convolution_norm(module, torch.zeros(shape, dtype=DOUBLE)) * (1 + ROUNDING)


def test_a_linear_layer_has_its_spectral_norm() -> None:
    module = nn.Linear(5, 3).to(DOUBLE)
    found = lipschitz(module, torch.zeros(5, dtype=DOUBLE))
    assert found == pytest.approx(norm(module.weight.detach()), rel=1e-12)


@dataclass(frozen=True)
class Pool:
    """A pooling layer in one to three dimensions and the size of its input."""

    dims: int
    kernel: int
    stride: int
    padding: int
    ceil: bool
    size: int
    dilation: int = 1
    include: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return (2, *range(self.size, self.size + self.dims))

    def average(self) -> nn.Module:
        kind = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[self.dims - 1]
        return kind(self.kernel, self.stride, self.padding, self.ceil, self.include)

    def maximum(self) -> nn.Module:
        kind = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[self.dims - 1]
        return kind(self.kernel, self.stride, self.padding, self.dilation, ceil_mode=self.ceil)


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    kernel = draw(st.integers(1, 3))
    return Pool(
        dims=draw(st.integers(1, 3)),
        kernel=kernel,
        stride=draw(st.integers(1, 3)),
        padding=draw(st.integers(0, kernel // 2)),
        ceil=draw(st.booleans()),
        size=draw(st.integers(3, 5)),
        dilation=draw(st.integers(1, 2)) if kernel < 3 else 1,
        include=draw(st.booleans()),
    )


@pytest.mark.verifies("thm-drift")
@given(pools())
def test_the_constant_of_average_pooling_is_its_norm(case: Pool) -> None:
    exact = norm(jacobian(case.average(), case.shape))
    assert lipschitz(case.average(), torch.zeros(1, *case.shape)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.verifies("thm-drift")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_the_constant_of_adaptive_pooling_is_right(dims: int, wanted: int) -> None:
    shape = (2, 4, 5, 3)[: dims + 1]
    mean = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1](wanted)
    most = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[dims - 1](wanted)
    x = torch.zeros(1, *shape, dtype=DOUBLE)
    assert lipschitz(mean, x) == pytest.approx(norm(jacobian(mean, shape)), rel=1e-9)
    assert lipschitz(most, x) == pytest.approx(largest_spike(most, shape), rel=1e-9)


@pytest.mark.parametrize("make", [nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d])
def test_the_constant_of_pooling_does_not_ask_for_the_default_device(
    make: Callable[[int], nn.Module],
) -> None:
    x = torch.randn(1, 1, 12)
    with torch.device("meta"):
        assert lipschitz(make(3), x) == lipschitz(make(3), x.double())


def largest_spike(pool: nn.Module, shape: Sequence[int]) -> float:
    """How much of a batch of zeros one entry raised to 1 changes, at most."""
    return float(jacobian(pool, shape).norm(dim=0).max())


@pytest.mark.verifies("thm-drift")
@given(pools(), seeds)
def test_the_constant_of_max_pooling_is_reached_by_one_entry_and_never_exceeded(
    case: Pool, seed: int
) -> None:
    pool = case.maximum()
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 1, *case.shape, generator=generator, dtype=DOUBLE)
    constant = lipschitz(pool, x)
    assert (pool(x) - pool(y)).norm() <= constant * (x - y).norm() * (1 + ROUNDING)
    assert constant == pytest.approx(largest_spike(pool, case.shape), rel=1e-12)


SMOOTH = [
    nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.LeakyReLU(0.2), nn.LeakyReLU(-3.0),
    nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ELU(), nn.ELU(2.5),
    nn.Softplus(2.0),
]  # fmt: skip


@pytest.mark.verifies("thm-drift")
@pytest.mark.parametrize("bend", SMOOTH, ids=repr)
def test_the_constant_of_an_activation_is_its_steepest_slope(bend: nn.Module) -> None:
    z = torch.linspace(-12, 12, 48_001, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(bend(z).sum(), z)
    assert 0 <= lipschitz(bend, z) - slope.abs().max() <= 1.2e-3


def steepest(slope: Callable, low: float, high: float, limit: float) -> bool:
    """Whether a slope stays below the limit on an interval, by interval arithmetic."""
    value = slope(iv.mpf([low, high]))
    if value.b < limit:
        return True
    if value.a > limit or high - low < 1e-9:
        return False
    middle = (low + high) / 2
    return steepest(slope, low, middle, limit) and steepest(slope, middle, high, limit)


def gelu_tanh_slope(z: iv.mpf) -> iv.mpf:
    """``½ (1 + t) + ½ z (1 - t²) u'`` with ``t = tanh u``, ``u = √(2/π) (z + 0.044715 z³)``.

    In ``s = (1 + t) / 2 = 1 / (1 + exp(-2u))``, and so that z occurs as few times as possible.
    """
    root = iv.sqrt(2 / iv.pi)
    s = 1 / (1 + iv.exp(-2 * root * (z + iv.mpf("0.044715") * z**3)))
    return s + 2 * s * (1 - s) * root * (z + 3 * iv.mpf("0.044715") * z**3)


def silu_slope(z: iv.mpf) -> iv.mpf:
    s = 1 / (1 + iv.exp(-z))
    return s * (1 + z * (1 - s))


@pytest.mark.verifies("thm-drift")
@pytest.mark.parametrize(
    ("slope", "limit"), [(gelu_tanh_slope, GELU_TANH), (silu_slope, SILU)], ids=["gelu", "silu"]
)
def test_the_steepest_slope_is_proven_by_intervals(slope: Callable, limit: float) -> None:
    """On [0, 12]; ``f(z) - f(-z) = z`` makes the slope at -z one minus that at z.

    Beyond 12 the second term of either slope is below 1e-3: ``1 - s <= exp(-z)``, times ``z``.
    """
    assert steepest(slope, 0.0, 12.0, limit)
    assert not steepest(slope, 0.0, 12.0, limit - 3e-4)
    assert steepest(lambda z: -slope(z), 0.0, 12.0, limit - 1.0)


@given(st.floats(0.1, 3.0), st.floats(0.5, 4.0), seeds)
def test_softplus_is_bounded_across_the_point_where_pytorch_cuts_it(
    threshold: float, beta: float, seed: int
) -> None:
    """With a low threshold the function falls there by up to 0.7 / beta."""
    torch.manual_seed(seed)
    before = nn.Sequential(nn.Linear(1, 30), nn.Softplus(beta, threshold)).to(DOUBLE)
    nn.init.constant_(before[0].bias, threshold / beta)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after[0].bias += 1e-3 * torch.randn(30)
    found = network_bound(before, after, torch.zeros(2, 1, dtype=DOUBLE))
    assert found.measured <= found.bound * (1 + ROUNDING)


BENDS = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softplus,
)  # fmt: skip


@dataclass(frozen=True)
class Chain:
    """A perceptron, or a convolutional network with one such convolution and one such pool.

    Attributes:
        widths: of the hidden linear layers.
        first: a convolution; None for a perceptron.
        pool: after it.
        average: whether the pool takes means.
    """

    widths: tuple[int, ...]
    bend: type[nn.Module]
    samples: int
    seed: int
    first: Layer | None = None
    pool: Pool | None = None
    average: bool = False

    def build(self) -> tuple[nn.Sequential, Tensor, Tensor]:
        """A network in evaluation mode, a batch, and its classes."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            shape = (5,) if self.first is None else unbatched(self.first)[1].shape
            x = torch.randn(self.samples, *shape, dtype=DOUBLE)
            model = self._stem(len(shape) - 1).to(DOUBLE).eval()
            with torch.no_grad():
                width = model(x).shape[1]
            for wide in (*self.widths, 3):
                model += nn.Sequential(nn.Linear(width, wide), self.bend())
                width = wide
            return model[:-1].to(DOUBLE).eval(), x, torch.randint(3, (self.samples,))

    def _stem(self, dims: int) -> nn.Sequential:
        if self.first is None:
            return nn.Sequential()
        conv = unbatched(self.first)[0]
        kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        normal = kind(conv.out_channels)
        nn.init.normal_(normal.weight)
        nn.init.uniform_(normal.running_var, 0.5, 2.0)
        second = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        room = second(conv.out_channels, 3, 3, padding=2, padding_mode="replicate")
        pool = self.pool.average() if self.average else self.pool.maximum()
        return nn.Sequential(
            conv, nn.Sequential(normal, self.bend()), nn.Dropout(), room, pool, nn.Flatten()
        )


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    first = draw(st.none() | convolutions() | transposed_convolutions())
    pool = None
    if first is not None:
        dims = len(first.settings["kernel_size"])
        pool = replace(draw(pools()), dims=dims)
    return Chain(
        widths=tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))),
        bend=draw(st.sampled_from(BENDS)),
        samples=draw(st.integers(1, 4)),
        seed=draw(seeds),
        first=first,
        pool=pool,
        average=draw(st.booleans()),
    )


taus = st.sampled_from([1.0, 0.9999, 0.99, 0.9, 0.6, 0.1])
growths = st.sampled_from([1.01, 1.5, 4.0])


def teleported(
    model: nn.Sequential, x: Tensor, y: Tensor, tau: float, growth: float
) -> tuple[nn.Sequential, float]:
    """A copy that was moved, however far its loss went, and the drift of its loss."""
    after = copy.deepcopy(model)
    teleporter = Teleporter(after, tau=tau, growth=growth, max_drift=1e6)
    report = teleporter.step(lambda: functional.cross_entropy(after(x), y))
    return after, report.drift


def assert_holds(found: NetworkBound, before: nn.Module, x: Tensor) -> None:
    """Every line: a violation is found where it begins, not only if it reaches the output."""
    slack = 1e-12
    for line, size in zip(found.layers, sizes(before, x), strict=True):
        slack = line.lipschitz * slack + 4 * EPS * (1.0 + line.lipschitz) * size
        assert line.measured <= line.bound * (1 + ROUNDING) + slack, line
        assert line.bound <= line.a_priori * (1 + ROUNDING), line


def sizes(model: nn.Module, x: Tensor) -> Iterator[float]:
    """Of what goes into each module of a chain: what it computes is rounded by a share of that."""
    x = x.double().clone()
    with torch.no_grad():
        for module in chained(copy.deepcopy(model).double().eval()):
            yield float(x.norm())
            x = module(x)


def chained(model: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(model, nn.Sequential):
        yield model
        return
    for child in model:
        yield from chained(child)


@pytest.mark.verifies("thm-drift")
@examples(20)
@given(chains(), taus, growths)
def test_no_teleport_exceeds_the_bound_on_outputs_and_losses(
    case: Chain, tau: float, growth: float
) -> None:
    before, x, y = case.build()
    after, drift = teleported(before, x, y, tau, growth)
    found = network_bound(before, after, x, tau)
    assert_holds(found, before, x)
    assert drift <= found.cross_entropy(len(x)) * (1 + ROUNDING) + 1e-12
    with torch.no_grad():
        target = torch.zeros(len(x), 3, dtype=DOUBLE)
        old, new = (float(functional.mse_loss(model(x), target)) for model in (before, after))
    allowed = found.mean_squared_error(old, target.numel())
    assert abs(new - old) <= allowed * (1 + ROUNDING) + 1e-12


@pytest.mark.verifies("thm-drift")
@examples(40)
@given(chains(), taus, st.floats(-4.0, 2.0), seeds)
def test_no_move_at_all_exceeds_the_bound(case: Chain, tau: float, power: float, seed: int) -> None:
    """Moves that respect no null space, of any size."""
    before, x, _ = case.build()
    after = copy.deepcopy(before)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in after.modules():
            if isinstance(module, LINEAR):
                for p in module.parameters(recurse=False):
                    p += 10.0**power * torch.randn(p.shape, generator=generator, dtype=DOUBLE)
    assert_holds(network_bound(before, after, x, tau), before, x)


@pytest.mark.verifies("thm-drift")
@examples(10)
@given(chains(), growths)
def test_the_bound_of_an_exact_teleport_is_rounding(case: Chain, growth: float) -> None:
    before, x, y = case.build()
    after, _ = teleported(before, x, y, 1.0, growth)
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    moved = sum(float((p - q).detach().norm()) for p, q in pairs)
    found = network_bound(before, after, x)
    gain = math.prod(1 + line.lipschitz for line in found.layers)
    assert found.bound <= 1e-11 * (1 + moved) * gain


@pytest.mark.verifies("thm-drift")
@given(count=st.integers(2, 6), width=st.integers(2, 6), size=st.floats(0.01, 100.0), seed=seeds)
def test_one_layer_reaches_the_bound_along_the_largest_direction_left_out(
    count: int, width: int, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(count, width, dtype=DOUBLE)
    values, vectors = torch.linalg.svd(x, full_matrices=False)[1:]
    tau = float(values[0] ** 2 / values.square().sum()) * (1 - 1e-9)
    before = nn.Linear(width, 3, bias=False).to(DOUBLE)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.weight += size * torch.outer(torch.randn(3, dtype=DOUBLE), vectors[1])
    found = network_bound(before, after, x, tau)
    assert found.bound == pytest.approx(found.measured, rel=1e-7)


@pytest.mark.verifies("thm-drift")
def test_the_a_priori_form_is_reached_where_one_direction_is_left_out() -> None:
    x = torch.diag(torch.tensor([3.0, 1.0], dtype=DOUBLE))
    before = nn.Linear(2, 1, bias=False).to(DOUBLE)
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.weight += torch.tensor([[0.0, 2.0]])
    found = network_bound(before, after, x, 0.9 - 1e-12)
    assert found.a_priori == pytest.approx(found.measured, rel=1e-9) == pytest.approx(2.0)


@pytest.mark.verifies("thm-drift")
def test_the_cross_entropy_bound_is_reached_in_the_limit() -> None:
    """A certain and wrong prediction, moved along ``p - y``: the gradient has norm √2."""
    before = nn.Linear(2, 2).to(DOUBLE)
    with torch.no_grad():
        before.weight.zero_()
        before.bias.copy_(torch.tensor([0.0, 60.0]))
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.bias += torch.tensor([-1.0, 1.0])
    x, y = torch.ones(3, 2, dtype=DOUBLE), torch.zeros(3, dtype=torch.long)
    old, new = (float(functional.cross_entropy(m(x), y).detach()) for m in (before, after))
    found = network_bound(before, after, x)
    assert new - old == pytest.approx(found.cross_entropy(3), rel=1e-6)


def test_models_and_random_states_are_left_alone() -> None:
    before, x, y = Chain((6,), nn.ReLU, 3, 0, *IMAGE).build()
    before[2].train()  # dropout: off in the bound
    after, _ = teleported(before, x, y, 0.9, 1.5)
    states = fingerprint(before), fingerprint(after)
    assert_holds(network_bound(before, after, x, 0.9), before, x)
    assert (fingerprint(before), fingerprint(after)) == states


IMAGE = (
    Layer(nn.Conv2d, (2, 6, 6), {"in_channels": 2, "out_channels": 2, "kernel_size": (3, 3)}),
    Pool(2, 2, 2, 0, False, 4),
)


def test_layers_used_twice_and_models_in_half_the_precision_are_bounded() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    before = nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), shared, nn.Tanh(), shared)
    x, y = torch.randn(4, 5), torch.randint(3, (4,))
    after, _ = teleported(before, x, y, 0.9, 2.0)
    found = network_bound(before, after, x, 0.9)
    assert found.measured > 1e-3
    assert_holds(found, before, x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Residual(), "Residual '1.0'.*report of every teleport"),
        (nn.LayerNorm(4), "LayerNorm '1.0'.*known are"),
        (nn.TransformerEncoderLayer(4, 2), "not Lipschitz on unbounded.*Kim"),
        (nn.BatchNorm1d(4), "BatchNorm1d '1.0'.*model.eval"),
        (nn.BatchNorm1d(4, track_running_stats=False).eval(), "kept statistics"),
        (nn.AvgPool2d(1, divisor_override=2), "divisor_override"),
        (nn.MaxPool1d(1, return_indices=True), "return_indices"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_constant_is_refused_by_name(module: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(module))
    with pytest.raises(UnsupportedModelError, match=message):
        network_bound(model, copy.deepcopy(model), torch.randn(3, 4))


def test_models_that_do_not_belong_together_are_refused() -> None:
    x = torch.randn(3, 4)
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    other = copy.deepcopy(base)
    nn.init.constant_(other[1].weight, 2.0)
    with pytest.raises(ValueError, match="BatchNorm1d '1' differs"):
        network_bound(base, other, x)
    with pytest.raises(ValueError, match="BatchNorm1d '1' differs"):
        network_bound(copy.deepcopy(base).train(), base, x)
    with pytest.raises(ValueError, match=r"not of one architecture.*out_features=5"):
        network_bound(nn.Linear(4, 4), nn.Linear(4, 5), x)
    with pytest.raises(ValueError, match="2 modules against 1"):
        network_bound(base, base[:1], x)
    with pytest.raises(ValueError, match=r"tau must be in \(0, 1\], got 0"):
        network_bound(base, base, x, tau=0.0)
    with pytest.raises(UnsupportedModelError, match="without layers"):
        network_bound(nn.Sequential(), nn.Sequential(), x)


def test_the_table_names_every_module_and_ends_in_the_verdict() -> None:
    before, x, y = Chain((6,), nn.ReLU, 3, 0, *IMAGE).build()
    after, _ = teleported(before, x, y, 0.9, 1.5)
    lines = str(network_bound(before, after, x, 0.9)).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [
        "0", "1.0", "1.1", "2", "3", "4", "5", "6", "7", "8",
    ]  # fmt: skip
    assert lines[-1].startswith("output moved by")


Task = tuple[nn.Sequential, Tensor, Tensor]


def perceptron() -> Task:
    """784-256-256-10 and 1,000 images of the embedded sample."""
    known = data.load("mnist-sample")
    return models.mlp(784, 10, (256, 256)), known.train_inputs[:1000], known.train_targets[:1000]


def convolutional() -> Task:
    """Three convolutions, a linear layer, and 1,000 CIFAR-10 images from ``$TELEPORT_DATA``."""
    archive = np.load(Path(os.environ["TELEPORT_DATA"]) / "cifar10" / "cifar10-jpeg.npz")
    blob = archive["blob"]
    images = [
        np.asarray(Image.open(io.BytesIO(blob[start:end].tobytes())))
        for start, end in itertools.pairwise(archive["offsets"][:1001])
    ]
    x = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float() / 255.0
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    return model, x, torch.tensor(archive["labels"][:1000].astype(np.int64))


def train(model: nn.Sequential, x: Tensor, y: Tensor, steps: int) -> float:
    """Adam, learning rate 0.001, batches of 50; the loss at the end."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        part = slice(50 * step % len(x), 50 * step % len(x) + 50)
        optimizer.zero_grad()
        functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    return float(functional.cross_entropy(model(x), y).detach())


def looseness(build: Callable[[], Task], steps: int, tau: float, seed: int) -> tuple[float, ...]:
    """Growth 1.5 on 50 images in float64: loss, output drift, bounds over it, loss drifts."""
    torch.manual_seed(seed)
    model, x, y = build()
    loss = train(model, x, y, steps)
    model, x, y = model.double(), x[:50].double(), y[:50]
    after, drift = teleported(model, x, y, tau, 1.5)
    found = network_bound(model, after, x, tau)
    ratios = found.ratio, found.a_priori / found.measured
    return loss, found.measured, *ratios, drift, found.cross_entropy(len(x))


ROOT = Path(__file__).parents[2]
RECORD = ROOT / "chapters" / "results" / "network-bound.md"


@pytest.mark.parametrize("network", ["MLP", "CNN"])
def test_the_book_tells_the_looseness_on_record(network: str) -> None:
    lines = RECORD.read_text(encoding="utf-8").splitlines()
    ranges = [line.split("|")[6].split(" to ") for line in lines if line.startswith(f"| {network}")]
    low, high = min(float(a) for a, _ in ranges), max(float(b) for _, b in ranges)
    told = " ".join((ROOT / "chapters" / "use.md").read_text(encoding="utf-8").split())
    assert re.search(
        rf"{low:.2g} to {math.ceil(high)} times (the drift|that) of an? {network}", told
    )


def table() -> str:
    """Means over three seeds, with the range of what the bound is over the measured drift."""
    names = "network | Adam steps | loss | tau | output drift | bound / drift | a priori / drift"
    lines = [f"| {names} | loss drift | its bound |", "|" + "---|" * 9]
    networks = (("MLP, MNIST", perceptron), ("CNN, CIFAR-10", convolutional))
    for (name, build), steps, tau in itertools.product(networks, (0, 300), (0.999, 0.99, 0.9)):
        found = np.array([looseness(build, steps, tau, seed) for seed in range(3)])
        loss, drift, _, _, moved, allowed = found.mean(axis=0)
        (low, low_rough), (high, high_rough) = found[:, 2:4].min(axis=0), found[:, 2:4].max(axis=0)
        lines.append(
            f"| {name} | {steps} | {loss:.2f} | {tau:g} | {drift:.2g} | {low:.3g} to {high:.3g} "
            f"| {low_rough:.3g} to {high_rough:.3g} | {moved:.2g} | {allowed:.2g} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201
