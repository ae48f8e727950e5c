"""What is refused, with which words, and that the model is as before."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport import (
    ClosureError,
    Teleporter,
    TeleportError,
    UnsupportedModelError,
    null_space,
    supported,
)
from tests.support.fingerprint import fingerprint
from tests.support.networks import Task, task

not_positive = st.floats(max_value=0.0) | st.sampled_from([math.nan, math.inf])
BAD_ARGUMENTS = {
    "tau": st.floats(max_value=0.0) | st.floats(1.0, exclude_min=True) | st.just(math.nan),
    "growth": st.floats(max_value=1.0) | st.sampled_from([math.nan, math.inf]),
    "lr": not_positive,
    "cap": not_positive,
    "steps": st.integers(max_value=0),
    "max_drift": st.floats(max_value=0.0, exclude_max=True) | st.just(math.nan),
    "method": st.text(max_size=8),
    "objective": st.text(max_size=8),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
@given(data=st.data())
def test_an_argument_out_of_range_is_refused_with_value_and_range(
    name: str, data: st.DataObject
) -> None:
    value = data.draw(BAD_ARGUMENTS[name], label=name)
    with pytest.raises(ValueError, match=f"{name} must be ") as caught:
        Teleporter(nn.Linear(1, 1), **{name: value})
    assert repr(value) in str(caught.value)
    assert any(word in str(caught.value) for word in ("> ", ">= ", "in (", "one of"))


def test_a_text_in_the_place_of_a_number_is_refused_like_one_out_of_range() -> None:
    """In a process of its own: here the types of arguments are checked before the library is."""
    code = """
from torch import nn
import torch, teleport
model = nn.Linear(2, 2)
for name in ("tau", "growth", "lr", "cap", "max_drift"):
    try:
        teleport.Teleporter(model, **{name: "0.5"})
    except ValueError as error:
        print(error)
try:
    teleport.null_space(model, [lambda: model(torch.ones(1, 2))], tau="0.5")
except ValueError as error:
    print(error)
for name in ("epochs", "batches", "warmup_steps"):
    try:
        teleport.Schedule(**{name: "0.5"})
    except ValueError as error:
        print(error)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = ["tau", "growth", "lr", "cap", "max_drift", "tau"]
    names += ["epochs", "batches", "warmup_steps"]
    assert [line.split(" must be ")[0] for line in told.stdout.splitlines()] == names
    assert told.stdout.count("got '0.5'") == len(names)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match="no layer matches 'body") as caught:
        Teleporter(task("plain").model, **{argument: ["0", "body.*"]})
    assert "['0', '2', '4']" in str(caught.value)


@pytest.mark.parametrize("model", [nn.Linear, [nn.Linear(2, 2)], None], ids=str)
def test_what_is_no_model_is_refused(model: Any) -> None:
    for use in (Teleporter, supported, lambda model: null_space(model, [lambda: None])):
        with pytest.raises(TypeError, match=r"a model is an object of torch\.nn\.Module, got"):
            use(model)


@pytest.mark.parametrize("given", [torch.ones(2, 8), torch.tensor(1.0), None, [None], 3], ids=str)
def test_what_is_no_closure_is_refused(given: Any) -> None:
    model = task("plain").model
    before = fingerprint(model)
    uses = (Teleporter(model).step, Teleporter(model).run, lambda given: null_space(model, given))
    for use in uses:
        with pytest.raises(TypeError, match=r"a closure is a function without arguments.*, got"):
            use(given)
    assert fingerprint(model) == before


def test_a_pattern_that_is_no_text_is_refused() -> None:
    """As the number of a layer in a Sequential."""
    model = task("plain").model
    for options in ({"tau": {0: 0.9}}, {"include": [0]}):
        with pytest.raises(ValueError, match="a pattern is a text, as '0', got 0"):
            null_space(model, lambda: None, **options)
    with pytest.raises(ValueError, match=r"exclude must be a list of patterns, got \[0\]"):
        Teleporter(model, exclude=[0])


def test_a_complex_loss_and_one_without_values_are_refused() -> None:
    problem = task("plain")
    with pytest.raises(ClosureError, match=r"returned torch\.complex128: a loss is real"):
        Teleporter(problem.model).step(lambda: problem.closure() + 0j)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        x = torch.ones(2, 3)
    with pytest.raises(ClosureError, match="without values, on the device meta"):
        Teleporter(empty).step(lambda: empty(x).sum())
    with pytest.raises(UnsupportedModelError, match=r"layer '0' have no values \(device meta\)"):
        null_space(empty, lambda: empty(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_and_sparse_inputs_stay_by_name() -> None:
    """They ended in errors of PyTorch's."""
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(20, 20), nn.Tanh()))
    model = nn.Sequential(nn.Linear(6, 20), nn.Linear(20, 20), scripted, nn.Linear(20, 3))
    x = torch.randn(4, 6).to_sparse()
    old, state = model(x).detach(), [p.detach().clone() for p in scripted.parameters()]
    report = Teleporter(model, growth=1.2).step(lambda: model(x).square().sum())
    status = {layer.name: layer.status for layer in report.layers}
    assert status["0"] == "frozen: called with a sparse or nested input"
    assert report.growth == pytest.approx(1.2, rel=0.01)
    assert all(torch.equal(p, q) for p, q in zip(scripted.parameters(), state, strict=True))
    assert torch.allclose(model(x), old, atol=1e-5)
    space = null_space(model, lambda: model(x))
    assert set(space.bases) == {"1", "3"}
    assert space.frozen["0"] == "called with a sparse or nested input"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    space.attach(optimizer)
    model(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    assert torch.allclose(model(x), old, atol=1e-5)


def test_weights_in_eight_bits_stay_by_name() -> None:
    problem = task("plain")
    problem.model.small = nn.Linear(2, 2).to(torch.float8_e4m3fn)
    report = Teleporter(problem.model, growth=1.2).step(lambda: eight_bits_apart(problem))
    assert report.growth == pytest.approx(1.2, rel=0.01)
    assert "torch.float8_e4m3fn, in which nothing is computed" in str(report)
    assert "small" not in null_space(problem.model, lambda: eight_bits_apart(problem)).bases


def eight_bits_apart(problem: Task) -> Tensor:
    return nn.functional.cross_entropy(problem.model[:-1](problem.x), problem.y)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_whose_entries_share_memory_stays_by_name(name: str) -> None:
    """Nothing can be written to it: PyTorch raised."""
    problem = task("plain")
    layer = next(m for m in list(problem.model)[1:] if isinstance(m, nn.Linear))
    old = getattr(layer, name).detach()
    shared = old[..., :1].expand_as(old)
    setattr(layer, name, nn.Parameter(shared))
    report = Teleporter(problem.model, growth=1.2).step(problem.closure)
    assert report.growth == pytest.approx(1.2, rel=0.01)
    assert "as expand() leaves them: clone() it" in str(report)
    assert torch.equal(getattr(layer, name), shared)
    setattr(layer, name, nn.Parameter(shared.clone()))
    assert not supported(problem.model).frozen


def test_an_empty_list_of_closures_is_refused() -> None:
    problem = task("plain")
    before = fingerprint(problem.model)
    with pytest.raises(ValueError, match="at least one closure"):
        Teleporter(problem.model).step([])
    assert fingerprint(problem.model) == before


@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), nn.LayerNorm(3), nn.Linear(2, 2).requires_grad_(False), nn.Sequential()],
    ids=["no parameters", "no rule", "frozen", "empty"],
)
def test_a_model_without_a_layer_that_could_move_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="no layer that can move") as caught:
        Teleporter(model)
    assert "Linear" in str(caught.value)
    assert isinstance(caught.value, TeleportError)


Closures = Callable[[Task], Callable[[], Any]]


def calling_backward(problem: Task) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = problem.closure()
        loss.backward()
        return loss

    return closure


def without_gradients(problem: Task) -> Callable[[], Tensor]:
    return torch.no_grad()(problem.closure)


def of_another_model(problem: Task) -> Callable[[], Tensor]:
    return task("plain", seed=1).closure


def on_an_empty_batch(problem: Task) -> Callable[[], Tensor]:
    return lambda: problem.model(problem.x[:0]).sum()


def of_a_freed_loss(problem: Task) -> Callable[[], Tensor]:
    """As in a training loop that has called ``backward`` and the optimizer already."""
    loss = problem.closure()
    torch.autograd.grad(loss, list(problem.model.parameters()))
    return lambda: loss


def of_a_freed_part(problem: Task) -> Callable[[], Tensor]:
    first, *others = problem.model.children()
    hidden = first(problem.x)
    torch.autograd.grad(hidden.square().sum(), list(first.parameters()))
    return lambda: nn.Sequential(*others)(hidden).square().sum()


BAD_CLOSURES: dict[str, tuple[Closures, str]] = {
    "vector": (lambda p: lambda: p.model(p.x).sum(1), r"shape \(6,\)"),
    "float": (lambda p: lambda: float(p.closure()), "returned float"),
    "none": (lambda p: lambda: None, "returned NoneType"),
    "nan": (lambda p: lambda: p.closure() * math.nan, "returned nan"),
    "inf": (lambda p: lambda: p.closure() * math.inf, "returned inf"),
    "backward": (calling_backward, r"calls backward\(\)"),
    "no_grad": (without_gradients, "does not depend on this model"),
    "detached": (lambda p: lambda: p.closure().detach(), "does not depend on this model"),
    "another model": (of_another_model, "does not depend on this model"),
    "freed loss": (of_a_freed_loss, r"backward\(\) has freed"),
    "freed part": (of_a_freed_part, r"backward\(\) has freed"),
    "empty batch": (on_an_empty_batch, "empty batch"),
}


@pytest.mark.parametrize("name", BAD_CLOSURES)
@pytest.mark.parametrize("method", ["tangent", "double_backward"])
@pytest.mark.parametrize("with_grads", [False, True], ids=["grad is None", "grad is there"])
def test_a_bad_closure_is_refused_and_changes_nothing(
    name: str, method: str, with_grads: bool
) -> None:
    make, words = BAD_CLOSURES[name]
    problem = task("plain")
    if with_grads:
        problem.closure().backward()
    before = fingerprint(problem.model)
    with pytest.raises(ClosureError, match=words):
        Teleporter(problem.model, method=method).step(make(problem))
    assert fingerprint(problem.model) == before


def test_backward_is_noticed_where_only_other_parameters_are_reached() -> None:
    """The penalty on a LayerNorm reaches no covered layer."""
    problem = task("residual")
    before = fingerprint(problem.model)

    def closure() -> Tensor:
        problem.model.norm.weight.square().sum().backward()
        return problem.closure()

    with pytest.raises(ClosureError, match=r"calls backward\(\)"):
        Teleporter(problem.model).step(closure)
    assert fingerprint(problem.model) == before


def drawing(batches: Iterator[Tensor], problem: Task) -> Callable[[], Tensor]:
    """The next batch at each call: the classic mistake."""

    def closure() -> Tensor:
        x = next(batches)
        return nn.functional.cross_entropy(problem.model(x), problem.y[: len(x)])

    return closure


@pytest.mark.parametrize("sizes", [(6, 6), (6, 4)], ids=["same size", "other size"])
@pytest.mark.parametrize("method", ["tangent", "double_backward"])
def test_a_closure_that_draws_its_batch_does_not_move_the_model(
    sizes: tuple[int, int], method: str
) -> None:
    problem = task("plain")
    before = fingerprint(problem.model)
    batches = (problem.x[: sizes[n % 2]] / (1 + n) for n in count())  # none comes twice
    try:
        report = Teleporter(problem.model, method=method).step(drawing(batches, problem))
    except ClosureError as error:
        why = str(error)
    else:
        assert report.rolled_back
        why = report.reason
    assert "deterministic" in why
    assert fingerprint(problem.model) == before


@pytest.mark.parametrize("tau", [1.0, 0.99])
def test_a_loss_kept_from_a_teleport_is_refused_as_one_to_train_on(tau: float) -> None:
    """Its graph holds no gradient of what the teleport covers: there would be none, in silence."""
    problem, kept = task("residual"), list[Tensor]()

    def closure() -> Tensor:
        kept.append(problem.closure())
        return kept[-1]

    assert Teleporter(problem.model, tau=tau).step(closure).steps == 1
    with pytest.raises(ClosureError, match="Call the closure again"):
        kept[0].backward()
    assert all(p.grad is None for p in problem.model.head.parameters())


def test_a_loss_of_shape_one_is_a_number() -> None:
    problem = task("plain")
    report = Teleporter(problem.model, growth=2.0).step(lambda: problem.closure().reshape(1))
    assert math.isclose(report.growth, 2.0, rel_tol=1e-6)


def test_a_step_inside_no_grad_works() -> None:
    problem = task("plain")
    with torch.no_grad():
        report = Teleporter(problem.model, growth=2.0).step(problem.closure)
    assert math.isclose(report.growth, 2.0, rel_tol=1e-6)


@pytest.mark.parametrize("layer", ["2", "4"])
def test_the_layer_that_makes_the_first_nan_is_named(layer: str) -> None:
    problem = task("plain")
    with torch.no_grad():
        problem.model.get_submodule(layer).weight[0, 0] = math.nan
    with pytest.raises(ClosureError, match=f"layer '{layer}'"):
        Teleporter(problem.model).step(problem.closure)


def test_inputs_that_are_not_finite_are_named() -> None:
    problem = task("plain")
    problem.x[0, 0] = math.inf
    with pytest.raises(ClosureError, match="input of layer '0'"):
        Teleporter(problem.model).step(problem.closure)
