"""Another geometry of gradients, D_M = ½ gᵀ M⁻¹ g with M of an optimizer: T10, and T6 for it."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from teleport import OptimizerStateError, Teleporter, TeleportReport
from teleport.direction import direction, project_ascent
from teleport.landscape import Landscape
from teleport.layers.support import WeightMatrix, cover
from teleport.objective import Metric, Shares, ascent_double_backward, metric_of, trainable
from teleport.recording import record
from teleport.subspace import RowSpace
from teleport.teleporter import METHODS
from tests.support.examples import examples
from tests.support.fingerprint import fingerprint
from tests.support.networks import GRAPHS, Task, task, without_dropout
from tests.support.strategies import (
    NEVER_DEAD,
    SMOOTH,
    Case,
    Problem,
    add_matrices,
    cases,
    gradient,
    join_like,
    layer_rows,
    rank_is_clear,
    seeds,
)

Build = Callable[[list[nn.Parameter]], Optimizer]
ADAPTIVE: dict[str, Build] = {
    "Adam": lambda p: Adam(p, lr=1e-2),
    "Adam, amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True, betas=(0.5, 0.3)),
    "AdamW": lambda p: AdamW(p, lr=1e-2, eps=1e-3),
    "Adagrad": lambda p: Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "RMSprop": lambda p: RMSprop(p, lr=1e-2, alpha=0.7),
    "RMSprop, centered": lambda p: RMSprop(p, lr=1e-2, alpha=0.7, centered=True, eps=0.1),
}
adaptive = pytest.mark.parametrize("name", ADAPTIVE)


def drawn_metric(model: nn.Module, seed: int) -> Metric:
    """Any positive diagonal, over two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    inverse = {p: torch.randn(p.shape, generator=generator).to(p).exp() for p in trainable(model)}
    return Metric(inverse)


def frozen_landscape(problem: Problem | Task, metric: Metric) -> Landscape:
    sites = cover(problem.model).sites
    return Landscape(problem.model, sites, [problem.closure], frozen=True, metric=metric)


def ascent(problem: Problem | Task, metric: Metric) -> list[Tensor]:
    """∇D_M by plain autograd through the gradient, M held fixed."""
    assert metric.inverse is not None
    parameters = trainable(problem.model)
    grads = torch.autograd.grad(
        problem.closure(), parameters, create_graph=True, materialize_grads=True
    )
    pairs = zip(parameters, grads, strict=True)
    d = sum((metric.inverse[p] * g.square()).sum() for p, g in pairs) / 2
    return list(torch.autograd.grad(d, parameters, materialize_grads=True))


def root_of_twice_d(problem: Problem | Task, metric: Metric) -> float:
    """√(gᵀ M⁻¹ g) by plain autograd."""
    grads = gradient(problem.model, problem.closure)
    assert metric.inverse is not None
    pairs = zip(trainable(problem.model), grads, strict=True)
    return math.sqrt(sum(float((metric.inverse[p] * g.square()).sum()) for p, g in pairs))


def trained(problem: Problem | Task, build: Build, steps: int = 3) -> Optimizer:
    optimizer = build(trainable(problem.model))
    for _ in range(steps):
        optimizer.zero_grad()
        problem.closure().backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.verifies("thm-geometry")
@given(cases(), seeds)
def test_tangents_along_the_divided_gradient_give_the_projected_ascent(
    case: Case, seed: int
) -> None:
    """Against ∇D_M by autograd, projected by the pseudo-inverse of the layers' inputs."""
    problem = case.build()
    assume(rank_is_clear(problem))
    metric = drawn_metric(problem.model, seed)
    full = join_like(problem, ascent(problem, metric))
    walk = frozen_landscape(problem, metric)
    bases = walk.bases(walk.blocks, 1.0)
    fast, slow = walk.tangent_direction(bases), walk.double_backward_direction(bases)
    size = 1.0 + sum(float(a.norm()) for a in full)
    for block, a, rows in zip(walk.blocks, full, layer_rows(problem), strict=True):
        wanted = a - a @ torch.linalg.pinv(rows, rtol=1e-9) @ rows
        assert (fast[block] - wanted).norm() <= 1e-9 * size
        assert (slow[block] - wanted).norm() <= 1e-9 * size


@pytest.mark.verifies("thm-geometry")
@pytest.mark.parametrize("name", GRAPHS)
@given(seed=seeds)
@examples(10)
def test_it_holds_in_any_graph(name: str, seed: int) -> None:
    problem = task(name, seed)
    without_dropout(problem.model)
    metric = drawn_metric(problem.model, seed)
    tape = record(problem.model, cover(problem.model).sites, problem.closure)
    bases = {}
    for block in tape.blocks:
        space = RowSpace()
        space.add(tape.rows(block))
        bases[block] = space.basis()
    values = dict(zip(trainable(problem.model), ascent(problem, metric), strict=True))
    full = {block: block.part.of(values) for block in tape.blocks}
    wanted = project_ascent(full, bases)
    found = direction(tape, problem.model, problem.closure, bases, metric)
    size = 1.0 + math.sqrt(sum(float(a.square().sum()) for a in full.values()))
    assert all((found[b] - wanted[b]).norm() <= 1e-11 * size for b in bases)
    norm = root_of_twice_d(problem, metric)
    assert abs(math.sqrt(tape.norm_squared(metric)) - norm) <= 1e-10 * norm


@pytest.mark.verifies("thm-geometry")
@given(cases(activations=SMOOTH), seeds)
def test_d_grows_along_the_direction_by_its_squared_norm(case: Case, seed: int) -> None:
    """Central difference of a polynomial: error h² times its third derivative, and eps D / h."""
    problem = case.build()
    metric = drawn_metric(problem.model, seed)
    walk = frozen_landscape(problem, metric)
    along = list(walk.tangent_direction(walk.bases(walk.blocks, 1.0)).values())
    squared = sum(float(a.square().sum()) for a in along)
    size = root_of_twice_d(problem, metric) ** 2
    h = 1e-4 / (1 + math.sqrt(squared))
    add_matrices(problem, along, h)
    above = root_of_twice_d(problem, metric) ** 2 / 2
    add_matrices(problem, along, -2 * h)
    slope = (above - root_of_twice_d(problem, metric) ** 2 / 2) / (2 * h)
    assert abs(slope - squared) <= 1e-5 * (squared + squared**1.5 + size)


@pytest.mark.verifies("thm-polynomial")
@given(cases(depths=(2, 3), activations=NEVER_DEAD, roomy=True), seeds)
@examples(25)
def test_d_is_a_polynomial_in_the_step(case: Case, seed: int) -> None:
    """The values at degree + 1 steps determine the one at any other."""
    problem = case.build()
    metric = drawn_metric(problem.model, seed)
    walk = frozen_landscape(problem, metric)
    along = walk.tangent_direction(walk.bases(walk.blocks, 1.0))
    length = math.sqrt(sum(float(a.square().sum()) for a in along.values()))
    assume(length > 1e-6)
    degree = walk.degree(along)
    assert degree is not None
    nodes = torch.linspace(-1.0, 1.0, degree + 1, dtype=torch.float64)
    values = [walk.norm_squared_at(along, float(s) / length) for s in nodes]
    lagrange = [
        math.prod(float((1.5 - other) / (node - other)) for other in nodes if other != node)
        for node in nodes
    ]
    predicted = sum(v * weight for v, weight in zip(values, lagrange, strict=True))
    found = walk.norm_squared_at(along, 1.5 / length)
    rounding = 1e-11 * sum(abs(v * weight) for v, weight in zip(values, lagrange, strict=True))
    assert abs(predicted - found) <= rounding


@pytest.mark.verifies("thm-geometry")
@adaptive
@pytest.mark.parametrize("method", METHODS)
@given(case=cases(activations=NEVER_DEAD, roomy=True))
@examples(8)
def test_a_teleport_enlarges_the_norm_the_optimizer_sees_and_keeps_the_loss(
    name: str, method: str, case: Case
) -> None:
    problem = case.build()
    optimizer = trained(problem, ADAPTIVE[name])
    metric = metric_of(optimizer, problem.model)
    before, state = root_of_twice_d(problem, metric), fingerprint_of(optimizer)
    loss = float(problem.closure().detach())
    teleporter = Teleporter(
        problem.model, growth=2.0, objective="preconditioned", optimizer=optimizer, method=method
    )
    report = teleporter.step(problem.closure)
    assert not report.rolled_back, report.reason
    assert report.norm == f"preconditioned gradient norm ({type(optimizer).__name__})"
    assert report.norm in str(report)
    assert fingerprint_of(optimizer) == state
    after = root_of_twice_d(problem, metric)
    assert report.grad_norm_before == pytest.approx(before, rel=1e-9)
    assert report.grad_norm_after == pytest.approx(after, rel=1e-9)
    assert abs(float(problem.closure().detach()) - loss) <= report.tolerance + 1e-15
    if report.steps:
        assert report.reason == f"{report.norm} reached 2 x its start"
        assert after == pytest.approx(2.0 * before, rel=1e-7)


def fingerprint_of(optimizer: Optimizer) -> list[float]:
    tensors = (v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    return [float(t.double().sum()) for t in tensors]


@pytest.mark.verifies("thm-geometry")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@given(seed=seeds)
@examples(3)
def test_with_the_identity_it_is_the_plain_objective(
    method: str, momentum: float, seed: int
) -> None:
    def teleported(preconditioned: bool) -> tuple[list[Tensor], TeleportReport]:
        problem = task("residual", seed)
        optimizer = SGD(problem.model.parameters(), lr=0.1, momentum=momentum)
        how = {"objective": "preconditioned", "optimizer": optimizer} if preconditioned else {}
        report = Teleporter(problem.model, steps=2, method=method, **how).step(problem.closure)
        return [p.detach() for p in problem.model.parameters()], report

    (one, report), (other, plain) = teleported(True), teleported(False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert report.norm == plain.norm == "gradient norm"
    assert report.step_sizes == plain.step_sizes


def named(shares: Shares) -> dict[object, float]:
    """With names for blocks, which are others for every walk."""
    return {part.name if isinstance(part, WeightMatrix) else part: s for part, s in shares.items()}


@pytest.mark.parametrize("name", ["plain", "residual", "tied"])
@pytest.mark.parametrize("method", METHODS)
@given(seed=seeds)
@examples(6)
def test_a_batch_in_pieces_is_one_batch(name: str, method: str, seed: int) -> None:
    problem = task(name, seed)
    metric = drawn_metric(problem.model, seed)
    sites = cover(problem.model).sites
    frozen = frozen_landscape(problem, metric)
    names = {block.name for block in frozen.blocks}
    streamed = Landscape(problem.model, sites, [problem.closure] * 2, movable=names, metric=metric)
    assert streamed.norm_squared() == pytest.approx(frozen.norm_squared(), rel=1e-11)
    how = f"{method}_direction"
    one = getattr(frozen, how)(frozen.bases(frozen.blocks, 1.0))
    other = getattr(streamed, how)(streamed.bases(streamed.blocks, 1.0))
    by_name = {block.name: matrix for block, matrix in other.items()}
    size = 1.0 + sum(float(m.norm()) for m in one.values())
    assert all((m - by_name[b.name]).norm() <= 1e-10 * size for b, m in one.items())
    own, shares = map(named, (frozen.shares(), streamed.measure()[1]))
    assert shares == pytest.approx(own, rel=1e-9, abs=1e-11 * frozen.norm_squared())
    assert sum(shares.values()) == pytest.approx(frozen.norm_squared(), rel=1e-11)


@adaptive
@given(seed=seeds, steps=st.integers(1, 5))
@examples(10)
def test_m_is_what_the_optimizer_divides_by(name: str, seed: int, steps: int) -> None:
    """From the gradients it has seen, by the formulas of the optimizers' papers."""
    problem = task("plain", seed)
    optimizer = ADAPTIVE[name](trainable(problem.model))
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        problem.closure().backward()
        seen.append([p.grad.clone() for p in trainable(problem.model)])  # type: ignore[union-attr]
        optimizer.step()
    inverse = metric_of(optimizer, problem.model).inverse
    assert inverse is not None
    for parameter, *history in zip(trainable(problem.model), *seen, strict=True):
        m = 1.0 / inverse[parameter]
        assert torch.allclose(m, expected(name, history), rtol=1e-10, atol=0.0)


def expected(name: str, history: list[Tensor]) -> Tensor:
    def average(values: list[Tensor], keep: float) -> Tensor:
        total = torch.zeros_like(values[0])
        for value in values:
            total = keep * total + (1 - keep) * value
        return total

    squares = [g.square() for g in history]
    if name == "Adagrad":
        return (0.1 + torch.stack(squares).sum(0)).sqrt() + 1e-10
    if name == "RMSprop":
        return average(squares, 0.7).sqrt() + 1e-8
    if name == "RMSprop, centered":
        return (average(squares, 0.7) - average(history, 0.7).square()).sqrt() + 0.1
    if name == "Adam, amsgrad":
        largest = torch.stack([average(squares[: n + 1], 0.3) for n in range(len(squares))])
        return (largest.amax(0) / (1 - 0.3 ** len(squares))).sqrt() + 1e-8
    eps = 1e-3 if name == "AdamW" else 1e-8
    return (average(squares, 0.999) / (1 - 0.999 ** len(squares))).sqrt() + eps


def test_m_does_not_change_when_the_optimizer_goes_on() -> None:
    problem = task("plain")
    optimizer = trained(problem, ADAPTIVE["Adam"])
    metric = metric_of(optimizer, problem.model)
    assert metric.inverse is not None
    before = [m.clone() for m in metric.inverse.values()]
    problem.closure().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, metric.inverse.values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions_teleport_too(dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh())
        model.append(nn.Linear(40, 3)).to(dtype)
        x, y = torch.randn(8, 6, dtype=dtype), torch.randn(8, 3, dtype=dtype)

    def closure() -> Tensor:
        return nn.functional.mse_loss(model(x), y)

    optimizer = Adam(model.parameters(), lr=1e-3, eps=1e-4)
    closure().backward()
    optimizer.step()
    for method in METHODS:
        teleporter = Teleporter(
            model, objective="preconditioned", optimizer=optimizer, method=method, max_drift=0.1
        )
        report = teleporter.step(closure)
        assert not report.rolled_back, report.reason
        assert report.growth == pytest.approx(1.5, rel=0.1)


class Own(Adam):
    """Divides by nobody knows what."""


def test_an_optimizer_that_cannot_serve_is_refused_with_what_to_do() -> None:
    model = task("plain").model
    parameters = list(model.parameters())

    def refused(optimizer: Optimizer | None, objective: str = "preconditioned") -> str:
        with pytest.raises(ValueError, match="optimizer must ") as caught:
            Teleporter(model, objective=objective, optimizer=optimizer)
        return str(caught.value)

    assert "given with objective='preconditioned' and with growth='auto', and only" in refused(None)
    assert "only then, got SGD" in refused(SGD(parameters, lr=0.1), "grad_norm")
    unknown = refused(Own(parameters))
    assert "SGD, Adam, AdamW, Adagrad, RMSprop; of a wrapper, its .optimizer" in unknown
    assert "got Own" in unknown
    assert "objective='grad_norm'" in unknown
    absent = refused(Adam(parameters[:1]))
    assert "does not hold '0.bias', '2.weight', '2.bias', '4.weight', '4.bias'" in absent
    assert "add_param_group" in absent
    many = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    with pytest.raises(ValueError, match="and 2 more"):
        Teleporter(many, objective="preconditioned", optimizer=SGD([many[0].weight], lr=1.0))


@adaptive
def test_an_optimizer_that_took_no_step_is_refused(name: str) -> None:
    problem = task("plain")
    optimizer = ADAPTIVE[name](list(problem.model.parameters()))
    teleporter = Teleporter(problem.model, objective="preconditioned", optimizer=optimizer)
    before = fingerprint(problem.model)
    with pytest.raises(OptimizerStateError, match=r"has no state yet for '0.weight'.*take a step"):
        teleporter.step(problem.closure)
    assert fingerprint(problem.model) == before


def test_a_parameter_without_state_is_named_and_may_be_frozen_instead() -> None:
    problem = task("plain")
    problem.model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    optimizer = trained(problem, ADAPTIVE["Adam"])
    teleporter = Teleporter(problem.model, objective="preconditioned", optimizer=optimizer)
    with pytest.raises(OptimizerStateError, match="no state yet for 'idle'"):
        teleporter.step(problem.closure)
    problem.model.idle.requires_grad_(False)
    assert teleporter.step(problem.closure).growth == pytest.approx(1.5)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan, -1.0])
def test_an_m_that_is_not_positive_and_finite_is_refused(value: float) -> None:
    problem = task("plain")
    optimizer = trained(problem, ADAPTIVE["Adam"])
    optimizer.param_groups[0]["eps"] = 0.0
    for state in optimizer.state.values():
        state["exp_avg_sq"] += 1.0
    optimizer.state[problem.model[2].weight]["exp_avg_sq"][0, 0] = value
    teleporter = Teleporter(problem.model, objective="preconditioned", optimizer=optimizer)
    before = fingerprint(problem.model)
    wanted = r"not positive and finite for '2.weight': use eps > 0"
    with pytest.raises(OptimizerStateError, match=wanted):
        teleporter.step(problem.closure)
    assert fingerprint(problem.model) == before


def test_the_definition_by_the_library_is_the_one_by_autograd() -> None:
    """`ascent_double_backward` along M⁻¹ g is ∇D_M."""
    problem = task("attention")
    metric = drawn_metric(problem.model, 1)
    grads = gradient(problem.model, problem.closure)
    parameters = trainable(problem.model)
    velocity = [metric.velocity(p, g) for p, g in zip(parameters, grads, strict=True)]
    found = ascent_double_backward(problem.closure, parameters, velocity)
    pairs = zip(found, ascent(problem, metric), strict=True)
    assert all((a - b).norm() <= 1e-11 * (1 + b.norm()) for a, b in pairs)
