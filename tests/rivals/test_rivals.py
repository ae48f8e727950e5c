"""What all rivals promise alike, and each control's one property."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from teleport import ClosureError, Teleporter, rivals
from teleport.rivals import (
    BOOTH,
    ROSENBROCK,
    NoiseTeleporter,
    PlanarFunction,
    RandomNullDirection,
    RescaleLayers,
    layer_norms,
    rehearse,
    so2_teleport,
)
from teleport.rivals.rival import Rival
from tests.support.fingerprint import all_but_weights, fingerprint, weights
from tests.support.strategies import gradient_norm, seeds


class Work:
    """A small perceptron in the middle of a training with Adam, and a batch it leaves room for."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(6, 9), nn.LeakyReLU(0.3), nn.Dropout(0.4), nn.Linear(9, 8), nn.LeakyReLU(0.3),
            nn.Linear(8, 3),
        ).to(dtype)  # fmt: skip
        self.x, self.other = torch.randn(2, 5, 6, dtype=dtype)
        self.y = torch.randint(3, (5,))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.closure().backward()
        self.optimizer.step()

    def closure(self) -> Tensor:
        return functional.cross_entropy(self.model(self.x), self.y)

    def held_out(self) -> Tensor:
        return functional.cross_entropy(self.model(self.other), self.y)

    def quiet(self) -> None:
        """Dropout off, as inside a teleport."""
        self.model.eval()


def report_of(work: Work) -> rivals.Rehearsal:
    return rehearse(Teleporter(work.model, growth=1.5), work.closure)


RIVALS: dict[str, Callable[[Work], Rival]] = {
    "symmetry": lambda w: rivals.SymmetryTeleporter(w.model, 2, growth=1.1),
    "level set": lambda w: rivals.LevelSetTeleporter(w.model, 3, growth=1.02),
    "basis": lambda w: rivals.ChangeOfBasisTeleporter(w.model, 1),
    "best basis": lambda w: rivals.ChangeOfBasisTeleporter(w.model, 4, 0.9),
    "noise": lambda w: NoiseTeleporter(w.model, report_of(w).report),
    "rescale": lambda w: RescaleLayers(w.model, report_of(w).norms),
    "null, same norm": lambda w: RandomNullDirection(w.model, like=report_of(w).report),
    "null, same growth": lambda w: RandomNullDirection(w.model, growth=1.3),
}
KEEP = ("symmetry", "basis", "best basis", "null, same norm", "null, same growth")
names = pytest.mark.parametrize("name", RIVALS)


@names
def test_only_weights_change_and_the_optimizer_stays_valid(name: str) -> None:
    work = Work()
    state = {k: v.clone() for k, v in work.optimizer.state[work.model[0].weight].items()}
    rival = RIVALS[name](work)
    before, start = all_but_weights(work.model), weights(work.model)
    report = rival.step(work.closure, held_out=work.held_out)
    assert report.steps > 0
    assert not report.rolled_back
    assert all_but_weights(work.model) == before
    assert weights(work.model) != start
    for key, value in work.optimizer.state[work.model[0].weight].items():
        assert torch.equal(value, state[key])
    assert all(p is q for p, q in zip(work.optimizer.param_groups[0]["params"],
                                      work.model.parameters(), strict=True))  # fmt: skip


@names
def test_the_report_tells_what_plain_evaluation_finds(name: str) -> None:
    work = Work()
    rival = RIVALS[name](work)
    work.quiet()
    before, held, norm = work.closure().item(), work.held_out().item(), 0.0
    norm = gradient_norm(work.model, work.closure)
    start = {n: p.detach().clone() for n, p in work.model.named_parameters()}
    report = rival.step(work.closure, held_out=work.held_out)
    found = (report.loss_before, report.held_out_before, report.grad_norm_before)
    assert found == pytest.approx((before, held, norm))
    after = (work.closure().item(), work.held_out().item())
    assert (report.loss_after, report.held_out_after) == pytest.approx(after)
    assert report.grad_norm_after == pytest.approx(gradient_norm(work.model, work.closure))
    for layer in report.layers:
        moved = sum(
            float((p.detach() - start[n]).square().sum())
            for n, p in work.model.named_parameters()
            if n.startswith(f"{layer.name}.")
        )
        assert layer.move_norm == pytest.approx(math.sqrt(moved), abs=1e-12)
        assert layer.status == ("moved" if moved else "not moved")


@pytest.mark.parametrize("name", KEEP)
def test_what_means_to_keep_the_outputs_keeps_them(name: str) -> None:
    work = Work()
    rival = RIVALS[name](work)
    work.quiet()
    before = work.model(work.x).detach()
    rival.step(work.closure)
    torch.testing.assert_close(work.model(work.x), before, rtol=1e-8, atol=1e-9)


class InterruptionError(Exception):
    """Something the user's closure raises."""


@names
@settings(max_examples=8)
@given(at=st.integers(1, 8))
def test_after_an_exception_everything_is_as_before(name: str, at: int) -> None:
    work = Work()
    rival = RIVALS[name](work)
    before, calls = fingerprint(work.model), 0

    def trouble() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise InterruptionError
        return work.closure()

    try:
        rival.step(trouble)
    except InterruptionError:
        assert fingerprint(work.model) == before
    else:
        assert calls < at


@names
def test_a_closure_that_becomes_nan_after_the_move_is_rolled_back(name: str) -> None:
    work = Work()
    rival = RIVALS[name](work)
    before, start = fingerprint(work.model), weights(work.model)

    def nan_elsewhere() -> Tensor:
        loss = work.closure()
        return loss if weights(work.model) == start else loss * math.nan

    report = rival.step(nan_elsewhere)
    assert report.rolled_back or report.steps == 0
    assert fingerprint(work.model) == before


@names
def test_an_unusable_closure_is_refused_and_nothing_changes(name: str) -> None:
    work = Work()
    rival = RIVALS[name](work)
    before = fingerprint(work.model)
    with pytest.raises(ClosureError):
        rival.step(lambda: work.model(work.x))
    with pytest.raises(ValueError, match="closure"):
        rival.step([])
    assert fingerprint(work.model) == before


@names
def test_a_list_of_closures_is_one_batch(name: str) -> None:
    reports = []
    for parts in (1, 5):
        work = Work()
        rival = RIVALS[name](work)
        closures = [
            lambda x=x, y=y, work=work: functional.cross_entropy(work.model(x), y)
            for x, y in zip(work.x.chunk(parts), work.y.chunk(parts), strict=True)
        ]
        reports.append(rival.step(closures))
    whole, streamed = reports
    assert streamed.loss_before == pytest.approx(whole.loss_before)
    assert streamed.growth == pytest.approx(whole.growth, rel=2e-3)


@names
def test_it_moves_single_precision_too(name: str) -> None:
    work = Work(dtype=torch.float32)
    report = RIVALS[name](work).step(work.closure)
    assert report.steps > 0
    assert not report.rolled_back
    assert report.drift < 2e-2


# --- Controls ------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(seeds)
def test_a_rehearsal_leaves_no_trace_and_knows_what_the_teleport_does(seed: int) -> None:
    work = Work(seed)
    before = fingerprint(work.model)
    teleporter = Teleporter(work.model, growth=1.5)
    rehearsal = rehearse(teleporter, work.closure)
    assert fingerprint(work.model) == before
    work.quiet()
    grads = [_layer_gradient(work, name) for name in rehearsal.growths]
    report = teleporter.step(work.closure)
    assert layer_norms(work.model) == pytest.approx(rehearsal.norms)
    for layer, rehearsed in zip(report.layers, rehearsal.report.layers, strict=True):
        assert layer.move_norm == pytest.approx(rehearsed.move_norm)
    grown = [_layer_gradient(work, name) for name in rehearsal.growths]
    wanted = [after / before for after, before in zip(grown, grads, strict=True)]
    assert list(rehearsal.growths.values()) == pytest.approx(wanted)


def _layer_gradient(work: Work, name: str) -> float:
    layer = work.model.get_submodule(name)
    grads = torch.autograd.grad(work.closure(), list(layer.parameters()))
    return math.sqrt(sum(float(g.square().sum()) for g in grads))


def moves(model: nn.Module, start: dict[str, float], rival: Rival, work: Work) -> dict[str, float]:
    report = rival.step(work.closure)
    return {layer.name: layer.move_norm for layer in report.layers}


@pytest.mark.parametrize("control", [NoiseTeleporter, "null"])
def test_controls_of_the_same_norm_have_it_layer_by_layer(control: object) -> None:
    work = Work()
    like = report_of(work).report
    rival = (
        RandomNullDirection(work.model, like=like)
        if control == "null"
        else NoiseTeleporter(work.model, like)
    )
    report = rival.step(work.closure)
    assert [layer.move_norm for layer in report.layers] == pytest.approx(
        [layer.move_norm for layer in like.layers]
    )
    assert sum(layer.move_norm for layer in report.layers) > 0.0


def test_noise_is_not_projected_and_null_directions_are() -> None:
    drifts = {}
    for name in ("noise", "null, same norm"):
        work = Work()
        drifts[name] = RIVALS[name](work).step(work.closure).drift
    assert drifts["noise"] > 1e-4
    assert drifts["null, same norm"] < 1e-12


@settings(max_examples=10)
@given(seeds, st.floats(1.05, 3.0))
@example(1, 1.05078125)  # where a guessed slope, taken for the derivative, led elsewhere
def test_a_random_null_direction_reaches_the_growth(seed: int, growth: float) -> None:
    work = Work(seed)
    work.quiet()
    norm = gradient_norm(work.model, work.closure)
    report = RandomNullDirection(work.model, growth=growth, seed=seed).step(work.closure)
    assert report.steps == 1
    assert gradient_norm(work.model, work.closure) / norm == pytest.approx(growth, rel=1e-6)
    assert report.layers[0].move_norm == 0.0  # its inputs depend on no parameter


def test_another_seed_is_another_direction_and_the_same_seed_the_same() -> None:
    found = []
    for seed in (1, 1, 2):
        work = Work()
        RandomNullDirection(work.model, growth=1.3, seed=seed).step(work.closure)
        found.append(weights(work.model))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_random_null_direction_that_reaches_no_growth_moves_nothing(parts: int) -> None:
    """Nor does its report say so, after all that was looked at."""
    work = Work()
    before = fingerprint(work.model)
    report = RandomNullDirection(work.model, growth=1e30).step([work.closure] * parts)
    assert report.steps == 0
    assert {layer.move_norm for layer in report.layers} == {0.0}
    assert fingerprint(work.model) == before


def test_a_full_rank_batch_leaves_no_random_null_direction() -> None:
    work = Work()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    before = fingerprint(work.model)
    report = RandomNullDirection(work.model, growth=1.5).step(
        lambda: functional.cross_entropy(work.model(x), y)
    )
    assert report.steps == 0
    assert "null space" in report.reason
    assert fingerprint(work.model) == before


def test_rescaled_layers_have_the_norms_and_the_old_directions() -> None:
    work = Work()
    norms = report_of(work).norms
    before = {n: p.detach().clone() for n, p in work.model.named_parameters()}
    RescaleLayers(work.model, norms).step(work.closure)
    assert layer_norms(work.model) == pytest.approx(norms)
    for name in ("3.weight", "5.weight"):
        ratio = work.model.get_parameter(name).detach() / before[name]
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
        assert float(ratio[0, 0]) != 1.0


def test_controls_refuse_what_they_cannot_match() -> None:
    work = Work()
    like = report_of(work).report
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no layer '3'"):
        NoiseTeleporter(other, like)
    with pytest.raises(ValueError, match="either growth or like"):
        RandomNullDirection(work.model)
    with pytest.raises(ValueError, match="either growth or like"):
        RandomNullDirection(work.model, growth=2.0, like=like)
    with pytest.raises(ValueError, match="norm of layer"):
        RescaleLayers(work.model, {"0": 0.0})


STILL: dict[str, Callable[[Work, rivals.Rehearsal], Rival]] = {
    "noise": lambda w, r: NoiseTeleporter(w.model, r.report),
    "null, same norm": lambda w, r: RandomNullDirection(w.model, like=r.report),
    "rescale": lambda w, r: RescaleLayers(w.model, r.norms),
}


@pytest.mark.parametrize("name", STILL)
def test_the_control_of_a_teleport_that_cannot_move_is_the_identity(name: str) -> None:
    """Full rank on a large batch: no null space anywhere. The control's batch has room."""
    work = Work()
    small = work.x, work.y
    work.x, work.y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    rehearsal = report_of(work)
    work.x, work.y = small
    assert rehearsal.report.steps == 0
    before = fingerprint(work.model)
    report = STILL[name](work, rehearsal).step(work.closure)
    assert fingerprint(work.model) == before
    assert report.steps == 0
    assert not report.rolled_back
    why = "no layer has a null space" if name != "rescale" else "has the wanted norm already"
    assert why in report.reason
    assert report.growth == 1.0


# --- Functions of two variables ------------------------------------------------------------------


def point(x: float, y: float) -> Tensor:
    return torch.tensor([x, y], dtype=torch.float64)


coordinates = st.floats(-3.0, 3.0, allow_nan=False)
planar = pytest.mark.parametrize("function", [BOOTH, ROSENBROCK], ids=lambda f: f.name)
LITERAL = {
    "Booth": lambda x, y: (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2,
    "Rosenbrock": lambda x, y: 100 * (x**2 - y) ** 2 + (x - 1) ** 2,
}


@planar
@given(x=coordinates, y=coordinates, angle=st.floats(-4.0, 4.0))
def test_rotations_keep_the_value(
    function: PlanarFunction, x: float, y: float, angle: float
) -> None:
    start = point(x, y)
    value = LITERAL[function.name](x, y)
    assert float(function(start)) == pytest.approx(value, rel=1e-9, abs=1e-9)
    torch.testing.assert_close(function.from_uv(function.to_uv(start)), start, rtol=1e-8, atol=1e-8)
    turned = function.rotate(start, angle)
    assert float(function(turned)) == pytest.approx(value, rel=1e-8, abs=1e-8)
    assert float(function(point(*function.minimum))) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("function", "start", "lr"),
    [(BOOTH, point(4.0, -2.0), 1e-4), (ROSENBROCK, point(0.0, -1.0), 1e-8)],
)
def test_teleporting_on_a_circle_enlarges_the_gradient(
    function: PlanarFunction, start: Tensor, lr: float
) -> None:
    there = so2_teleport(function, start, steps=100, lr=lr)
    assert float(function(there)) == pytest.approx(float(function(start)))
    assert function.gradient(there).norm() > 1.1 * function.gradient(start).norm()


def test_on_booth_the_teleport_finds_the_largest_gradient_of_the_level_set() -> None:
    start = point(4.0, -2.0)
    there = so2_teleport(BOOTH, start, steps=300, lr=1e-4)
    # f = qᵀ (JᵀJ) q with eigenvalues 1 and 9: on f = c the gradient norm is at most 2 √(9 c).
    largest = 2 * math.sqrt(9 * float(BOOTH(start)))
    assert float(BOOTH.gradient(there).norm()) == pytest.approx(largest, rel=1e-6)


def test_an_angle_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="lr"):
        so2_teleport(BOOTH, point(4.0, -2.0), steps=3, lr=1e308)
