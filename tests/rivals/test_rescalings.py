"""Equi-normalisation and path conditioning: where each ends, by slow and literal means."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn import functional

from teleport import ClosureError, UnsupportedModelError
from teleport.rivals import ChangeOfBasisTeleporter, EquiNormalization, PathConditioning
from teleport.rivals.balance import BalancedRescaling
from tests.support.examples import examples
from tests.support.fingerprint import fingerprint, weights
from tests.support.homogeneous import Case, cases
from tests.support.strategies import seeds


def until(rival: BalancedRescaling, tolerance: float, sweeps: int = 1000) -> BalancedRescaling:
    """The rival with another end of its turns."""
    rival.tolerance, rival.sweeps = tolerance, sweeps
    return rival


METHODS: dict[str, Callable[[nn.Module], BalancedRescaling]] = {
    "equi-normalisation": lambda m: until(EquiNormalization(m), 1e-10),
    "path conditioning": lambda m: until(PathConditioning(m), 1e-10),
}
methods = pytest.mark.parametrize("method", METHODS)
perceptrons = st.builds(
    lambda widths, seed, bias: Case(tuple(widths), bias=bias, seed=seed),
    st.lists(st.integers(1, 4), min_size=3, max_size=5),
    seeds,
    st.booleans(),
)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: functional.mse_loss(model(x), y)


@methods
@pytest.mark.verifies("thm-change-of-basis")
@examples(25)
@example(case=Case((1, 2, 4, 3, 2), groups=2, convolutions=2, activation="PReLU", pool="max"))
@given(case=cases())
def test_the_function_is_kept_on_all_inputs(method: str, case: Case) -> None:
    model, x, y = case.build()
    model.eval()
    others = 3 * torch.randn_like(x)
    before = model(others).detach()
    report = METHODS[method](model).step(loss_of(model, x, y))
    assert not report.rolled_back
    assert "not yet" not in report.reason
    torch.testing.assert_close(model(others), before, rtol=1e-9, atol=1e-10)


@methods
@examples(15)
@given(case=cases())
def test_the_end_does_not_depend_on_a_rescaling_before_and_is_a_fixed_point(
    method: str, case: Case
) -> None:
    model, x, y = case.build()
    model.eval()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    METHODS[method](model).step(loss_of(model, x, y))
    ends = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(start)
    ChangeOfBasisTeleporter(model, 1, 0.9, seed=case.seed).step(loss_of(model, x, y))
    METHODS[method](model).step(loss_of(model, x, y))
    for parameter, end in zip(model.parameters(), ends, strict=True):
        torch.testing.assert_close(parameter, end, rtol=1e-6, atol=1e-9)
    again = METHODS[method](model)
    again.tolerance = 1e-7
    before = fingerprint(model)
    assert again.step(loss_of(model, x, y)).steps == 0
    assert fingerprint(model) == before


@pytest.mark.verifies("thm-equi-normalisation")
@examples(25)
@given(perceptrons, st.sampled_from([1.0, 1.5, 2.0, 4.0]))
def test_incoming_and_outgoing_weights_have_one_norm_and_the_sum_is_least(
    case: Case, p: float
) -> None:
    model, x, y = case.build()
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]

    def total() -> float:
        return sum(float(layer.weight.detach().abs().pow(p).sum()) for layer in layers)

    start = total()
    until(EquiNormalization(model, p), 1e-10).step(loss_of(model, x, y))
    least = total()
    assert least <= start * (1 + 1e-12)
    for layer, after in itertools.pairwise(layers):
        into = layer.weight.detach().norm(p, dim=1)
        torch.testing.assert_close(into, after.weight.detach().norm(p, dim=0), rtol=1e-6, atol=0)
    for seed in range(3):
        ChangeOfBasisTeleporter(model, 1, 0.3, seed=seed).step(loss_of(model, x, y))
        assert total() >= least * (1 - 1e-12)


def test_all_channels_of_a_convolution_are_balanced_too() -> None:
    case = Case((2, 4, 4, 3, 2), groups=2, convolutions=2, pool="max")
    model, x, y = case.build()
    until(EquiNormalization(model), 1e-10).step(loss_of(model, x, y))
    first, second, third, last = (m for m in model if hasattr(m, "weight"))
    into = [layer.weight.detach().flatten(1).norm(dim=1) for layer in (first, second, third)]
    grouped = second.weight.detach().view(2, 2, 2, -1)  # group, output, input of the group
    torch.testing.assert_close(into[0], grouped.transpose(1, 2).flatten(2).norm(dim=2).flatten())
    flat = third.weight.detach().view(3, 4, -1)
    torch.testing.assert_close(into[1], flat.transpose(0, 1).flatten(1).norm(dim=1))
    torch.testing.assert_close(into[2], last.weight.detach().norm(dim=0))


def paths(matrices: list[np.ndarray], biases: list[np.ndarray]) -> list[dict[tuple, float]]:
    """Every path of a perceptron, as the parameters on it with their values, one by one."""
    ends: list[tuple[int, dict[tuple, float]]] = [(i, {}) for i in range(matrices[0].shape[1])]
    for layer, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        ends = [
            (row, {**path, ("weight", layer, row, column): matrix[row, column]})
            for column, path in ends
            for row in range(len(matrix))
        ]
        ends += [(row, {("bias", layer, row): bias[row]}) for row in range(len(bias))]
    return [path for _, path in ends]


def divergence(matrices: list[np.ndarray], biases: list[np.ndarray]) -> float:
    """Least Burg divergence of α diag(∂Φᵀ ∂Φ) from ones, path by path."""
    squares: dict[tuple, float] = {}
    for path in paths(matrices, biases):
        for parameter in path:
            others = math.prod(value for other, value in path.items() if other != parameter)
            squares[parameter] = squares.get(parameter, 0.0) + others**2
    g = np.array(list(squares.values()))
    alpha = len(g) / g.sum()
    return float((alpha * g - np.log(alpha * g) - 1).sum())


def arrays(model: nn.Sequential) -> tuple[list[np.ndarray], list[np.ndarray]]:
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    none = np.zeros(0)
    return (
        [layer.weight.detach().numpy().copy() for layer in layers],
        [none if layer.bias is None else layer.bias.detach().numpy().copy() for layer in layers],
    )


@pytest.mark.verifies("thm-path-conditioning")
@examples(10, deadline=None)
@example(Case((2, 3, 4, 2), seed=1))
@example(Case((3, 1, 4, 2, 1), seed=2, bias=False))
@given(perceptrons)
def test_path_conditioning_has_the_least_divergence_counted_path_by_path(case: Case) -> None:
    """Against a general minimiser of the literal objective over all log factors."""
    model, x, y = case.build()
    matrices, biases = arrays(model)
    hidden = [len(matrix) for matrix in matrices[:-1]]

    def at(logs: np.ndarray) -> float:
        factors = np.split(np.exp(logs), np.cumsum(hidden)[:-1])
        out = [*factors, np.ones(len(matrices[-1]))]
        fro = [np.ones(matrices[0].shape[1]), *factors]
        return divergence(
            [c[:, None] * w / d for w, c, d in zip(matrices, out, fro, strict=True)],
            [c * b if len(b) else b for b, c in zip(biases, out, strict=True)],
        )

    best = minimize(at, np.zeros(sum(hidden)), method="BFGS", options={"gtol": 1e-7}).fun
    until(PathConditioning(model), 1e-10).step(loss_of(model, x, y))
    found = divergence(*arrays(model))
    assert found <= at(np.zeros(sum(hidden))) + 1e-9
    assert found == pytest.approx(best, rel=1e-6, abs=1e-7)


def test_both_solve_deep_networks_in_a_few_sweeps() -> None:
    """Turns alone take thousands: a factor that a whole layer shares travels a layer a sweep."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(20):
        layers += [nn.Linear(16, 16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(16, 3)).double()
    x, y = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    for method in (EquiNormalization, PathConditioning):
        report = until(method(model), 1e-8, sweeps=30).step(loss_of(model, x, y))
        assert "not yet" not in report.reason
        assert report.steps == 1
    once = until(EquiNormalization(model), 1e-6, sweeps=1)
    assert "not yet at rest" in once.step(loss_of(model, x, y)).reason


@methods
def test_neurons_that_lead_nowhere_do_no_harm(method: str) -> None:
    model, x, y = Case((3, 4, 3, 2)).build()
    model.eval()
    first, second, third = (layer for layer in model if isinstance(layer, nn.Linear))
    with torch.no_grad():
        first.weight[0] = 0.0
        first.bias[0] = 0.0
        second.weight[:, 1] = 0.0
        second.weight[2] = 0.0
        third.weight[:, 0] = 0.0
    others = torch.randn_like(x)
    before = model(others).detach()
    report = METHODS[method](model).step(loss_of(model, x, y))
    assert (report.steps, report.rolled_back) == (1, False)
    assert "not yet" not in report.reason
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    torch.testing.assert_close(model(others), before)


@methods
def test_a_network_that_is_zero_is_left_finite(method: str) -> None:
    model, x, y = Case((3, 4, 3, 2), bias=False).build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    report = METHODS[method](model).step(loss_of(model, x, y))
    assert not report.rolled_back, report.reason
    assert all(bool((p == 0.0).all()) for p in model.parameters())


linear = nn.Linear(4, 4)


@methods
@pytest.mark.parametrize(
    ("model", "match"),
    [
        (nn.Sequential(linear, nn.Tanh(), nn.Linear(4, 2)), "needs φ.*Tanh"),
        (nn.Sequential(linear, nn.BatchNorm1d(4), nn.Linear(4, 2)), "BatchNorm1d"),
        (nn.Sequential(linear), "between two consecutive"),
        (nn.Sequential(linear, nn.ReLU(), nn.Conv1d(4, 2, 1)), "cannot follow"),
    ],
)
def test_what_is_not_homogeneous_is_refused_by_name(
    method: str, model: nn.Module, match: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{method}.*{match}|{match}"):
        METHODS[method](model)


def test_arguments_out_of_range_are_refused() -> None:
    model, _x, _ = Case((2, 3, 1)).build()
    for p in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match="p must be >= 1"):
            EquiNormalization(model, p)


def test_path_conditioning_has_to_see_the_model_run() -> None:
    model, _, _ = Case((2, 3, 1)).build()
    before = weights(model)
    with pytest.raises(ClosureError):
        PathConditioning(model).step(lambda: sum(p.sum() for p in model.parameters()))
    assert weights(model) == before
