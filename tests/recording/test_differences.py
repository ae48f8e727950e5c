"""The Hessian's action by differences of gradients, against PyTorch's own derivatives."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from teleport import Teleporter
from teleport.objective import ascent_double_backward, gradient, trainable
from teleport.recording.differences import hessian_times
from teleport.runtime.closures import Closure


class Marked(torch.autograd.Function):
    """Tanh that says it cannot be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(out := x.tanh())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (1 - ctx.saved_tensors[0] ** 2) * grad


class Kernel(torch.autograd.Function):
    """Tanh whose backward pass computes where autograd does not look, as a kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(out := x.tanh())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return ((1 - out.detach() ** 2) * grad.detach()).clone()


class Tanh(nn.Module):
    """The activation by one of the functions above, or by PyTorch's."""

    def __init__(self, function: Any = None) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if self.function is None else self.function.apply(x)


def network(function: Any, widths: Sequence[int], dtype: torch.dtype, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential()
    for d_in, d_out in itertools.pairwise(widths):
        model.extend([nn.Linear(d_in, d_out, dtype=dtype), Tanh(function)])
    return model[:-1]


def closure_of(model: nn.Module, widths: Sequence[int], rows: int, seed: int) -> Closure:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(rows, widths[0], dtype=dtype, generator=generator)
    y = torch.randint(widths[-1], (rows,), generator=generator)
    return lambda: functional.cross_entropy(model(x), y)


hidden = st.sampled_from([Marked, Kernel])
shapes = st.lists(st.integers(2, 9), min_size=3, max_size=4)
seeds = st.integers(0, 10_000)


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    missed = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return float((missed / sum(float(b.double().square().sum()) for b in expected)) ** 0.5)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float64, 1e-7), (torch.float32, 1e-2)])
@given(function=hidden, widths=shapes, rows=st.integers(1, 6), seed=seeds)
def test_where_a_function_hides_its_second_derivative_differences_find_it(
    dtype: torch.dtype, digits: float, function: Any, widths: list[int], rows: int, seed: int
) -> None:
    found, expected = [], []
    for kind in (function, None):
        model = network(kind, widths, dtype, seed)
        closure, parameters = closure_of(model, widths, rows, seed), trainable(model)
        grads = gradient(closure, parameters)[1]
        result, how = hessian_times(closure, parameters, grads, dtype)
        if kind is None:
            assert not how
            expected = ascent_double_backward(closure, parameters, grads)
            assert all(map(torch.equal, result, expected))
        else:
            assert f"{function.__name__}, a custom autograd.Function" in how
            found = result
    assert error(found, expected) < digits


@given(function=hidden, widths=shapes, seed=seeds)
def test_parameters_and_graphs_recorded_before_are_as_they_were(
    function: Any, widths: list[int], seed: int
) -> None:
    model = network(function, widths, torch.float64, seed)
    closure, parameters = closure_of(model, widths, 3, seed), trainable(model)
    before, recorded = [p.detach().clone() for p in parameters], closure()
    expected = gradient(closure, parameters)[1]
    hessian_times(closure, parameters, expected, torch.float64)
    assert all(map(torch.equal, parameters, before))
    assert all(map(torch.equal, torch.autograd.grad(recorded, parameters), expected))

    calls = 0

    def interrupted() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:  # the first is looked through, the second is one side
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        hessian_times(interrupted, parameters, expected, torch.float64)
    assert all(map(torch.equal, parameters, before))


@pytest.mark.parametrize("method", ["tangent", "double_backward"])
@pytest.mark.parametrize("function", [Marked, Kernel])
def test_a_teleport_through_such_a_function_is_that_through_pytorchs(
    function: Any, method: str
) -> None:
    """Before, autograd left terms out, and the report said that nothing can move."""
    weights = []
    for kind in (function, None):
        model = network(kind, [12, 20, 20, 5], torch.float64, 1)
        closure = closure_of(model, [12, 20, 20, 5], 8, 1)
        report = Teleporter(model, growth=1.5, method=method).step(closure)
        assert report.growth == pytest.approx(1.5)
        assert ("differences of gradients" in report.reason) == (kind is not None)
        weights.append([p.detach() for p in model.parameters()])
    assert error(*weights) < 1e-6


def test_what_pytorch_cannot_differentiate_twice_is_differenced() -> None:
    """A loss by CTC has no second derivative, an activation by `Kernel` no tangents."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 6)
    ).double()
    x, targets = torch.randn(5, 2, 24, dtype=torch.float64), torch.tensor([[1, 2], [3, 4]])
    lengths = torch.tensor([5, 5]), torch.tensor([2, 2])

    def closure() -> Tensor:
        return functional.ctc_loss(model(x).log_softmax(-1), targets, *lengths)

    parameters = trainable(model)
    grads = gradient(closure, parameters)[1]
    found, how = hessian_times(closure, parameters, grads, torch.float64)
    assert "_ctc_loss_backward is not implemented" in how
    # An independent one: a much smaller step, one side after the other, by hand.
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p.add_(g, alpha=sign * 1e-6)
        sides.append(gradient(closure, parameters)[1])
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p.sub_(g, alpha=sign * 1e-6)
    by_hand = [(a - b) / 2e-6 for a, b in zip(*sides, strict=True)]
    assert error(found, by_hand) < 1e-5


def test_other_errors_are_the_closures_own() -> None:
    model = network(None, [3, 4, 2], torch.float64, 0)
    closure = closure_of(model, [3, 4, 2], 2, 0)
    calls = 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise RuntimeError("out of paper")
        return closure()

    grads = gradient(closure, trainable(model))[1]
    with pytest.raises(RuntimeError, match="out of paper"):
        hessian_times(failing, trainable(model), grads, torch.float64)
