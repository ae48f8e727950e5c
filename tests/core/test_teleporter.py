"""`Teleporter`: what is reached, what is kept, what never moves (T2, T5, T6)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from teleport import Teleporter, TeleportReport, reference
from teleport.lab.experiments.models import mlp
from teleport.line_search import step_to_norm
from teleport.objective import grad_norm, trainable
from teleport.subspace import Basis, RowSpace
from tests.support.examples import examples
from tests.support.networks import GRAPHS, Task, task, without_dropout
from tests.support.own_models import CLASSES, UNet, batch_norm
from tests.support.strategies import (
    BENDS,
    NEVER_DEAD,
    Case,
    Problem,
    cases,
    gradient_norm,
    network,
    opposed,
    rank_is_clear,
    with_bias,
)

REACHED = 1e-6
"""Relative accuracy of a wanted gradient norm in float64."""

METHODS = ("tangent", "double_backward")
methods = st.sampled_from(METHODS)
growths = st.floats(1.05, 100.0)
roomy = cases(roomy=True, activations=NEVER_DEAD, depths=(2, 4))
FULL_RANK = Case((2, 2, 2, 2), (True,) * 3, samples=10, rank=2, seed=3)
FLAT = Case(
    (2, 3, 3, 3, 1), (False, False, False, True), "LeakyReLU", samples=1, dtype=torch.float32
)
"""T is flat here and steep soon: extrapolating its slope overflows float32."""

WIDE = Case((4, 16, 16, 3), (True,) * 3, "Tanh", "cross_entropy", samples=6, rank=4, seed=2)


def norm(problem: Problem | Task) -> float:
    return gradient_norm(problem.model, problem.closure)


def loss(problem: Problem | Task) -> float:
    return float(problem.closure().detach())


def status(report: TeleportReport) -> dict[str, str]:
    return {layer.name: layer.status for layer in report.layers}


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    return all(map(torch.equal, model.parameters(), before))


@pytest.mark.verifies("thm-polynomial")
@given(roomy, growths, methods)
def test_wanted_growth_is_reached(case: Case, growth: float, method: str) -> None:
    problem = case.build()
    before = norm(problem)
    report = Teleporter(problem.model, growth=growth, method=method).step(problem.closure)
    assert not report.rolled_back, report.reason
    assert abs(norm(problem) / before / growth - 1) <= REACHED


@pytest.mark.verifies("thm-polynomial")
@given(roomy, growths, st.integers(2, 5))
def test_wanted_growth_is_reached_in_several_steps(case: Case, growth: float, steps: int) -> None:
    problem = case.build()
    before = norm(problem)
    report = Teleporter(problem.model, growth=growth, steps=steps).step(problem.closure)
    assert abs(norm(problem) / before / growth - 1) <= REACHED
    assert report.steps == len(report.step_sizes) == steps


@given(roomy, growths, st.floats(1.01, 10.0))
def test_the_cap_is_respected(case: Case, growth: float, share: float) -> None:
    problem = case.build()
    before = norm(problem)
    cap = before * share
    Teleporter(problem.model, growth=growth, cap=cap).step(problem.closure)
    assert abs(norm(problem) / min(cap, growth * before) - 1) <= REACHED


@pytest.mark.parametrize("settings", [{"lr": 0.1, "cap": 1e300}, {"growth": 1e300}])
def test_a_limit_whose_square_overflows_is_a_limit_like_any_other(settings: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(4, 3).double()
    report = Teleporter(model, steps=1, **settings).step(lambda: model(x).square().mean())
    assert math.isfinite(report.grad_norm_after)
    assert (report.steps == 1) == ("lr" in settings)


@given(roomy, st.floats(0.1, 0.999))
def test_a_gradient_above_the_cap_stays_where_it_is(case: Case, share: float) -> None:
    problem = case.build()
    before = weights(problem.model)
    report = Teleporter(problem.model, cap=share * norm(problem)).step(problem.closure)
    assert "cap" in report.reason
    assert unchanged(problem.model, before)


@given(roomy, st.floats(1e2, 1e8))
def test_a_huge_step_size_alone_grows_the_norm_by_at_most_half(case: Case, lr: float) -> None:
    problem = case.build()
    before = norm(problem)
    Teleporter(problem.model, lr=lr).step(problem.closure)
    assert norm(problem) / before <= 1.5 * (1 + REACHED)


@given(roomy)
def test_default_growth_is_one_and_a_half(case: Case) -> None:
    problem = case.build()
    before = norm(problem)
    report = Teleporter(problem.model).step(problem.closure)
    assert abs(norm(problem) / before / 1.5 - 1) <= REACHED
    assert report.steps == 1


@given(roomy, growths, methods)
def test_the_report_tells_the_truth(case: Case, growth: float, method: str) -> None:
    problem = case.build()
    start = (loss(problem), norm(problem), weights(problem.model))
    report = Teleporter(problem.model, growth=growth, method=method).step(problem.closure)
    assert math.isclose(report.loss_before, start[0], rel_tol=1e-12)
    assert math.isclose(report.grad_norm_before, start[1], rel_tol=1e-10)
    assert math.isclose(report.loss_after, loss(problem), rel_tol=1e-12)
    assert math.isclose(report.grad_norm_after, norm(problem), rel_tol=1e-10)
    moved = sum(float((a - b).square().sum()) for a, b in zip(problem.model.parameters(), start[2]))  # noqa: B905
    assert math.isclose(sum(x.move_norm**2 for x in report.layers), moved, rel_tol=1e-9)


@pytest.mark.parametrize("left", [1e-2, 1e-3, 1e-4])
def test_near_a_minimum_the_norms_are_those_of_the_model(left: float) -> None:
    problem = opposed(left)
    start = norm(problem)
    report = Teleporter(problem.model, growth=1.5).step(problem.closure)
    assert report.steps == 1
    assert report.grad_norm_before == pytest.approx(start, rel=3e-4)
    assert report.grad_norm_after == pytest.approx(norm(problem), rel=3e-4)


@given(roomy)
def test_a_default_teleport_runs_the_closure_four_times(case: Case) -> None:
    """To record, for the tangents, for a graph to look along, and to see that the loss is the same.

    The second and third repeat no product of a covered layer.
    """
    problem, calls = case.build(), count(1)

    def closure() -> Tensor:
        next(calls)
        return problem.closure()

    report = Teleporter(problem.model).step(closure)
    assert report.steps == 1
    assert next(calls) == 5


def smooth_images(seed: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A small CNN in single precision on 2 smooth images: 128 rows with energy at every scale."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(c, 16, 3, padding=1) for c in (3, 16, 16)]
        model = nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())))
        model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)])
        coarse, y = torch.randn(2, 3, 3, 3), torch.randint(5, (2,))
        x = functional.interpolate(coarse, size=(8, 8), mode="bicubic")
    return model, lambda: functional.cross_entropy(model(x), y)


@pytest.mark.verifies("thm-rank")
@given(st.integers(0, 10_000), st.floats(1.5, 10.0))
@examples(6)
def test_the_growth_is_reached_where_free_directions_hold_a_little_energy(
    seed: int, growth: float
) -> None:
    """Less than the cut: frozen activations promise the growth, and the model itself has it."""
    model, closure = smooth_images(seed)
    report = Teleporter(model, growth=growth).step(closure)
    assert not report.rolled_back, report.reason
    assert report.steps == 1
    assert any(layer.kind == "Conv" and layer.status == "moved" for layer in report.layers)
    assert report.growth == pytest.approx(growth, rel=0.01)
    _, end = grad_norm(closure, trainable(model))
    assert end == pytest.approx(report.grad_norm_after, rel=1e-4)
    assert report.drift <= report.tolerance


@pytest.mark.parametrize(("dtype", "searched"), [(torch.float32, True), (torch.float64, False)])
def test_a_search_on_the_model_itself_is_named(dtype: torch.dtype, searched: bool) -> None:
    """The move is a thousand times the weights: single precision rounds it by what is seen."""
    torch.manual_seed(0)
    model = UNet(batch_norm).eval().to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    y = (CLASSES * x.mean(1)).long()
    report = Teleporter(model, growth=1e3).step(lambda: functional.cross_entropy(model(x), y))
    assert ("searched on the model itself" in report.reason) == searched


@pytest.mark.verifies("thm-invariance")
@given(
    st.sampled_from([torch.float64, torch.float32]).flatmap(
        lambda dtype: cases(roomy=True, activations=NEVER_DEAD, depths=(2, 4), dtype=dtype)
    ),
    st.floats(1.1, 1e3),
)
@example(FLAT, 191.0)
def test_the_loss_stays_within_the_tolerance(case: Case, growth: float) -> None:
    problem = case.build()
    before = loss(problem)
    report = Teleporter(problem.model, growth=growth).step(problem.closure)
    assert not report.rolled_back, report.reason
    assert abs(loss(problem) - before) <= report.tolerance
    assert report.growth > 1.05


def test_the_tolerance_is_measured_where_the_walk_ended() -> None:
    """A search that gave up far away must not widen what the guard allows."""
    problem, calls = WIDE.build(), count(1)

    def give_up_far_away(
        norm_squared: Callable[[float], float], *arguments: float, **options: Any
    ) -> float | None:
        if next(calls) == 1:
            return step_to_norm(norm_squared, *arguments, **options)
        norm_squared(1e30)
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teleport.ascent.step_to_norm", give_up_far_away)
        report = Teleporter(problem.model, growth=2.0, steps=2).step(problem.closure)
    assert report.steps == 1
    assert report.tolerance <= 1e-10 * report.loss_before


def test_a_walk_so_far_that_rounding_hides_the_loss_is_undone() -> None:
    """The rounding it would have to be forgiven is many times the loss."""
    torch.manual_seed(0)
    model = mlp(20, 3, hidden=(16, 16)).double()
    x, y = torch.randn(8, 20, dtype=torch.float64), torch.randint(3, (8,))
    before = [p.clone() for p in model.parameters()]
    report = Teleporter(model, steps=12, lr=300.0, cap=1e200).step(
        lambda: torch.nn.functional.cross_entropy(model(x), y)
    )
    assert report.rolled_back
    assert report.tolerance <= 0.01 * report.loss_before
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_beyond_the_range_of_the_weights_is_too_far_and_no_accident() -> None:
    torch.manual_seed(0)
    model = mlp(6, 3, hidden=(8, 8))
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    teleporter = Teleporter(model, steps=2, lr=1e39, cap=10.0)
    report = teleporter.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
    assert report.steps >= 1
    assert all(0.0 < step < 1e38 for step in report.step_sizes)


def mirrored(basis: Basis) -> Basis:
    """As orthonormal as before, and the wrong space."""
    return replace(basis, vectors=basis.vectors.flip(0))


def one_short(basis: Basis) -> Basis:
    """As from a rank rule that is wrong by one."""
    return replace(basis, vectors=basis.vectors[:, :-1], ranks=basis.ranks - 1)


@pytest.mark.parametrize("damage", [mirrored, one_short])
@pytest.mark.parametrize("layer", [1, 2])
@given(seed=st.integers(0, 100), growth=st.floats(1.1, 3.0))
def test_the_guard_sees_a_damaged_basis(
    damage: Callable[[Basis], Basis], layer: int, seed: int, growth: float
) -> None:
    """The tolerance is not vacuous. Inputs of full rank keep all singular values above 1e-3.

    The damage is in every basis of the layer: that of a second walk on the model itself, too, which
    sees the growth as it is and reaches it at a loss that moved, or finds no step.
    """
    problem = Case((4, 16, 16, 3), (True,) * 3, "LeakyReLU", samples=4, rank=4, seed=seed).build()
    before, calls, sound = weights(problem.model), count(1), RowSpace.basis

    def damaged(self: RowSpace, tau: float = 1.0) -> Basis:
        basis = sound(self, tau)
        return damage(basis) if next(calls) % 2 == layer % 2 else basis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowSpace, "basis", damaged)
        report = Teleporter(problem.model, growth=growth).step(problem.closure)
    assert report.rolled_back or not report.steps
    assert unchanged(problem.model, before)


@pytest.mark.verifies("thm-fixed")
@given(roomy, growths, methods)
def test_the_first_layer_never_moves(case: Case, growth: float, method: str) -> None:
    problem = case.build()
    first = problem.linears[0]
    before = weights(first)
    report = Teleporter(problem.model, growth=growth, method=method).step(problem.closure)
    assert unchanged(first, before)
    if method == "tangent":
        assert status(report)["0"] == "fixed point"


@pytest.mark.verifies("thm-fixed")
@given(cases(), methods)
def test_layers_of_full_rank_never_move(case: Case, method: str) -> None:
    problem = case.build()
    before = {str(i): weights(m) for i, m in enumerate(problem.model)}
    report = Teleporter(problem.model, method=method).step(problem.closure)
    full = [layer.name for layer in report.layers if layer.null_dim == 0]
    assert all(status(report)[name].startswith("full rank") for name in full)
    assert all(unchanged(problem.model[int(name)], before[name]) for name in full)


@pytest.mark.verifies("thm-fixed")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("setting", [{"growth": 2.0}, {"lr": 0.1}])
def test_a_network_without_null_space_stays_and_says_so(
    method: str, setting: dict[str, float]
) -> None:
    problem = FULL_RANK.build()
    before = weights(problem.model)
    report = Teleporter(problem.model, method=method, **setting).step(problem.closure)
    assert "nothing can move: no layer has a null space" in report.reason
    assert (report.steps, report.rolled_back, report.growth) == (0, False, 1.0)
    assert unchanged(problem.model, before)


@pytest.mark.verifies("thm-fixed")
def test_a_single_layer_has_nothing_to_move() -> None:
    problem = Case((6, 3), (True,), loss="cross_entropy", samples=2, rank=2).build()
    report = Teleporter(problem.model).step(problem.closure)
    assert "nothing can move" in report.reason
    assert "do not change with the parameters" in report.reason  # it has room, which is no use


def test_a_zero_gradient_cannot_grow() -> None:
    problem = WIDE.build()
    y = problem.model(problem.x).detach()
    closure = lambda: (problem.model(problem.x) - y).square().mean()  # noqa: E731
    report = Teleporter(problem.model).step(closure)
    assert "gradient is zero" in report.reason
    assert report.steps == 0


def literal_teleport(problem: Problem, case: Case, eta: float, steps: int, tau: float) -> Any:
    return reference.algorithm_1_teleport(
        network(problem.model), [problem.batch], [problem.loss],
        BENDS[case.activation].reference, eta, steps, tau,
    )  # fmt: skip


def modest_step(problem: Problem, case: Case, share: float, tau: float) -> float:
    """A step that lets T grow by ``share`` to first order, and the weights by no more.

    Where the slope is small the first bound alone leads far up a steep polynomial.
    """
    weights = network(problem.model)
    arguments = (weights, problem.batch, BENDS[case.activation].reference)
    bases = reference.bases_of_batch(*arguments, tau)
    ascent = reference.teleport_gradient(*arguments, problem.loss)
    along = [reference.equation_11(a, b) for a, b in zip(ascent, bases, strict=True)]
    slope = sum(float((a**2).sum()) for a in along)
    size = math.sqrt(sum(float((w**2).sum()) for w in weights))
    return min(share * float(reference.equation_4(*arguments, problem.loss)) / slope,
               share * size / math.sqrt(slope))  # fmt: skip


def same_as_literal(case: Case, share: float, steps: int, method: str, tau: float) -> bool:
    """Whether a Teleporter with a fixed step ends where Algorithm 1 ends."""
    problem = case.build()
    start, eta = network(problem.model), modest_step(problem, case, share, tau)
    wanted = literal_teleport(problem, case, eta, steps, tau)
    teleporter = Teleporter(
        problem.model, lr=eta, steps=steps, growth=1e6, method=method, tau=tau, max_drift=1e6
    )
    assert not teleporter.step(problem.closure).rolled_back
    pairs = zip(network(problem.model), wanted, start, strict=True)
    # The reference moves the first layer too, by the rounding of ∇T, which grows with the steps.
    ascent = reference.teleport_gradient(
        wanted, problem.batch, BENDS[case.activation].reference, problem.loss
    )
    size = [v.norm() + eta * a.norm() for v, a in zip(wanted, ascent, strict=True)]
    rounding = 1e-11 * float(sum(size))
    return all((w - v).norm() <= 1e-8 * (v - s).norm() + rounding for w, v, s in pairs)


literal = cases(roomy=True, activations=("LeakyReLU", "Tanh"), biases=with_bias, depths=(2, 4))


@pytest.mark.verifies("thm-survivor")
@given(literal, st.floats(0.01, 0.3), st.integers(1, 3), methods)
def test_fixed_steps_are_algorithm_1(case: Case, share: float, steps: int, method: str) -> None:
    assume(rank_is_clear(case.build()))
    assert same_as_literal(case, share, steps, method, tau=1.0)


@given(literal, st.floats(0.01, 0.1), st.integers(1, 3), st.floats(0.5, 0.999))
def test_double_backward_is_algorithm_1_below_tau_1(
    case: Case, share: float, steps: int, tau: float
) -> None:
    assume(rank_is_clear(case.build()))
    assert same_as_literal(case, share, steps, "double_backward", tau)


def test_tangent_is_not_algorithm_1_below_tau_1() -> None:
    """It leaves out the killed term's remainder: documented, bounded by √(1 - τ)."""
    assert same_as_literal(WIDE, 0.05, 1, "tangent", tau=1.0)
    assert not same_as_literal(WIDE, 0.05, 1, "tangent", tau=0.9)


@pytest.mark.parametrize("tau", [0.9, 0.99])
def test_below_tau_1_the_loss_drifts_within_the_bound(tau: float) -> None:
    problem = WIDE.build()
    before = loss(problem)
    report = Teleporter(problem.model, tau=tau, growth=1.2, max_drift=0.5).step(problem.closure)
    assert not report.rolled_back, report.reason
    assert abs(loss(problem) - before) <= 0.5 * before
    assert math.isclose(report.growth, 1.2, rel_tol=REACHED)


@examples(10)
@given(roomy, growths)
def test_micro_batches_are_one_batch(case: Case, growth: float) -> None:
    """The mean of the losses of two equal halves is the loss of the whole.

    A direction of inputs that is kept and hardly there is known to few digits.
    """
    halves, whole = case.build(), case.build()
    x, other = halves.x, halves.x.flip(-1)
    for number, layer in enumerate(whole.model):
        if isinstance(layer, nn.Linear):
            rows = whole.model[:number](torch.cat([x, other])).detach().flatten(0, -2)
            values = torch.linalg.svdvals(rows)
            assume(not bool(((values > 1e-15 * values[0]) & (values < 1e-8 * values[0])).any()))
    parts = [lambda: halves.model(x).square().mean(), lambda: halves.model(other).square().mean()]
    both = torch.cat([x, other])
    Teleporter(halves.model, growth=growth).step(parts)
    Teleporter(whole.model, growth=growth).step(lambda: whole.model(both).square().mean())
    pairs = zip(halves.model.parameters(), whole.model.parameters(), strict=True)
    assert all((a - b).norm() <= 1e-6 * (1 + b.norm()) for a, b in pairs)


@given(roomy)
def test_run_teleports_batch_after_batch(case: Case) -> None:
    problem = case.build()
    other = lambda: problem.model(problem.x).square().mean()  # noqa: E731
    reports = Teleporter(problem.model, growth=1.2).run([problem.closure, other])
    assert [r.rolled_back for r in reports] == [False, False]
    assert math.isclose(reports[1].grad_norm_after, gradient_norm(problem.model, other))


def test_held_out_loss_is_reported() -> None:
    problem = WIDE.build()
    held_out = lambda: problem.model(problem.x + 1).square().mean()  # noqa: E731
    before = float(held_out())
    report = Teleporter(problem.model).step(problem.closure, held_out=held_out)
    assert math.isclose(report.held_out_before, before)
    assert math.isclose(report.held_out_after, float(held_out()))
    assert report.held_out_drift > 0


def test_include_and_exclude_choose_the_layers() -> None:
    problem = WIDE.build()
    report = Teleporter(problem.model, include=["2", "4"], exclude=["4"]).step(problem.closure)
    assert [status(report)[n] for n in "024"] == ["excluded", "moved", "excluded"]


@pytest.mark.parametrize("chosen", [{"include": []}, {"exclude": ["*"]}])
def test_where_every_layer_is_excluded_the_reason_says_so(chosen: Any) -> None:
    problem = WIDE.build()
    report = Teleporter(problem.model, **chosen).step(problem.closure)
    assert report.steps == 0
    assert "include and exclude leave no layer" in report.reason


@pytest.mark.verifies("thm-invariance")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", GRAPHS)
def test_any_graph_keeps_its_loss_and_grows(name: str, method: str, dtype: torch.dtype) -> None:
    problem = task(name, dtype=dtype)
    without_dropout(problem.model)
    before, at = norm(problem), loss(problem)
    report = Teleporter(problem.model, growth=2.0, method=method).step(problem.closure)
    assert not report.rolled_back, report.reason
    assert abs(norm(problem) / before / 2 - 1) <= 1e4 * torch.finfo(dtype).eps
    assert abs(loss(problem) - at) <= report.tolerance


def test_an_optimizer_made_before_stays_valid() -> None:
    problem = WIDE.build()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    Teleporter(problem.model, growth=3.0).step(problem.closure)
    before = loss(problem)
    problem.closure().backward()
    optimizer.step()
    assert loss(problem) < before


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """What is made without a device is on none."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("parts", [1, 2])
def test_the_users_default_device_is_not_asked(method: str, parts: int, elsewhere: None) -> None:
    with torch.device("cpu"):
        model = mlp(12, 3, hidden=(8,))
        x, y = torch.randn(5, 12), torch.arange(5) % 3
    closures = [lambda: functional.cross_entropy(model(x), y)] * parts
    assert Teleporter(model, method=method).step(closures).steps == 1


def test_a_layer_the_loss_ignores_does_no_harm() -> None:
    problem = task("plain")
    aux = nn.Linear(18, 2).double()
    problem.model.add_module("aux", aux)
    body = problem.model[:5]

    def closure() -> Tensor:
        aux(problem.model[:4](problem.x))
        return nn.functional.cross_entropy(body(problem.x), problem.y)

    report = Teleporter(problem.model, growth=2.0).step(closure)
    assert math.isclose(report.growth, 2.0, rel_tol=REACHED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_half_precision_keeps_its_loss_to_its_own_rounding(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    model = model.append(nn.Linear(64, 5)).to(dtype)
    x, y = torch.randn(16, 20, dtype=dtype), torch.randint(5, (16,))
    teleporter = Teleporter(model, growth=1.5)
    report = teleporter.step(lambda: nn.functional.cross_entropy(model(x).float(), y))
    eps = torch.finfo(dtype).eps
    assert not report.rolled_back, report.reason
    assert report.drift <= report.tolerance <= 10 * eps * report.loss_before
    assert report.growth == pytest.approx(1.5, rel=4 * eps)
