"""The null space as a tool: what it holds, what it keeps while something is learned, its file."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from teleport import (
    ClosureError,
    NullSpace,
    NullSpaceError,
    Teleporter,
    UnsupportedModelError,
    null_space,
)
from teleport.layers.support import cover
from teleport.subspace import Basis
from tests.support.examples import examples
from tests.support.fingerprint import fingerprint
from tests.support.networks import Residual
from tests.support.strategies import seeds

STEPS = 5

KEPT = 1e-9
"""Relative change of outputs that count as kept. Every projection leaves a few d^{3/2} eps of the
weights (d <= 49: 1e-13); a few layers and five steps multiply it by less than 1e3."""

SEEN = 1e-5
"""Relative change that is none of rounding."""

few = examples(8)


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last state; 5 steps of 3 features."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(3, 18, batch_first=True), nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Encoder(nn.Module):
    """A post-norm transformer block in evaluation mode; 3 positions of 24 features."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True)
        self.head = nn.Linear(24, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(9, 20), nn.Tanh(), nn.Linear(20, 18), nn.GELU(), nn.Linear(18, 2)
    )


def convolutional() -> nn.Sequential:
    """Two convolutions, the second in two groups; patches of 36 entries at 4 positions."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Tanh(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2), nn.GELU(),
        nn.Flatten(), nn.Linear(24, 2),
    )  # fmt: skip


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (convolutional, (4, 8, 6)),
    "encoder": (Encoder, (3, 24)),
    "mlp": (perceptron, (9,)),
    "recurrent": (Recurrent, (5, 3)),
    "residual": (Residual, (3,)),
}
kinds = st.sampled_from(sorted(KINDS))


@dataclass(frozen=True)
class Tasks:
    """A model, the data it has to keep, and a new task."""

    model: nn.Module
    old: Tensor
    new: Tensor
    target: Tensor

    def loss(self) -> Tensor:
        return functional.mse_loss(self.model(self.new), self.target)

    def score(self) -> float:
        return float(self.loss().detach())

    def out(self, x: Tensor) -> Tensor:
        return self.model(x).detach()

    def null_space(self, *inputs: Tensor, tau: float = 1.0) -> NullSpace:
        return null_space(self.model, [lambda x=x: self.model(x) for x in inputs], tau)


def tasks(kind: str, seed: int, samples: int = 2, dtype: torch.dtype = torch.float64) -> Tasks:
    make, shape = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().to(dtype)
        x = torch.randn(2 * samples, *shape, dtype=torch.float64).to(dtype)
        old, new = x.split(samples)
        target = torch.randn_like(model(new)).detach()
        return Tasks(model, old, new, target)


def change(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / (1.0 + wanted.norm()))


def projector(basis: Basis) -> Tensor:
    return basis.vectors @ basis.vectors.mT


def same(one: NullSpace, other: NullSpace, tolerance: float = 1e-9) -> bool:
    """Same layers, same spans. A span is known to eps over the relative gap at the cut (1e-6)."""
    pairs = [(b, other.bases[n]) for n, b in one.bases.items()]
    close = all((projector(a) - projector(b)).abs().max() <= tolerance for a, b in pairs)
    return one.bases.keys() == other.bases.keys() and close


def rank_is_clear(space: NullSpace) -> bool:
    """No singular value between rounding and 1e-6 of the largest."""
    for basis in space.bases.values():
        values = basis.singular_values / basis.singular_values[..., :1].clamp(min=1e-300)
        if bool(((values > 1e-14) & (values < 1e-6)).any()):
            return False
    return True


def sgd(model: nn.Module, rate: float = 3e-3) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=0.1)


def learn(task: Tasks, space: NullSpace, make: Callable[..., torch.optim.Optimizer]) -> None:
    """Steps on the new task, each of them kept in the null space."""
    optimizer = make(task.model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        task.loss().backward()
        with space.keep(task.model):
            optimizer.step()


@few
@given(kinds, seeds, st.permutations(range(4)), st.sampled_from([1.0, 0.95]))
def test_micro_batches_in_any_order_are_one_batch(
    kind: str, seed: int, order: list[int], tau: float
) -> None:
    task = tasks(kind, seed, samples=4)
    whole = task.null_space(task.old, tau=tau)
    assume(rank_is_clear(whole))
    pieces = [task.old[i : i + 1] for i in order]
    assert same(task.null_space(*pieces, tau=tau), whole)


@pytest.mark.verifies("thm-keep")
@pytest.mark.parametrize("kind", KINDS)
@few
@given(seed=seeds)
def test_projected_gradients_keep_the_old_outputs_while_the_new_loss_falls(
    kind: str, seed: int
) -> None:
    task = tasks(kind, seed)
    space, optimizer = task.null_space(task.old), sgd(task.model)
    old, before = task.out(task.old), task.score()
    for _ in range(STEPS):
        optimizer.zero_grad()
        task.loss().backward()
        space.project_(task.model)
        optimizer.step()
    assert change(task.out(task.old), old) <= KEPT
    assert task.score() < before - SEEN


@pytest.mark.verifies("thm-keep")
@pytest.mark.parametrize("kind", KINDS)
@few
@given(seed=seeds)
def test_keep_keeps_the_old_outputs_under_adam_with_weight_decay(kind: str, seed: int) -> None:
    task = tasks(kind, seed)
    old, new = task.out(task.old), task.out(task.new)
    learn(task, task.null_space(task.old), adam)
    assert change(task.out(task.old), old) <= KEPT
    assert change(task.out(task.new), new) > SEEN


@pytest.mark.verifies("thm-keep")
@few
@given(kinds, seeds, st.integers(1, 4))
def test_keep_every_few_steps_keeps_the_old_outputs_once_projected(
    kind: str, seed: int, every: int
) -> None:
    task = tasks(kind, seed)
    old, new = task.out(task.old), task.out(task.new)
    optimizer = adam(task.model)
    keeper = task.null_space(task.old).keep(task.model, every=every)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        task.loss().backward()
        with keeper:
            optimizer.step()
        assert (change(task.out(task.old), old) <= KEPT) == (step % every == 0)
    keeper.project()
    assert change(task.out(task.old), old) <= KEPT
    # A projected step of Adam need not lead down: what is new moves, which way it is not promised.
    assert change(task.out(task.new), new) > SEEN


@pytest.mark.verifies("thm-keep")
@few
@given(kinds, seeds)
def test_plain_steps_do_not_keep_the_old_outputs(kind: str, seed: int) -> None:
    """The control: without the projection the same steps are seen."""
    task = tasks(kind, seed)
    old, optimizer = task.out(task.old), sgd(task.model)
    task.loss().backward()
    optimizer.step()
    assert change(task.out(task.old), old) > SEEN


@pytest.mark.verifies("thm-keep")
@few
@given(seeds)
def test_the_first_layer_learns_too(seed: int) -> None:
    """Unlike in a teleport, whose loss is that of the kept data (``thm-fixed``)."""
    task = tasks("mlp", seed)
    first = task.model[0].weight.detach().clone()
    learn(task, task.null_space(task.old), sgd)
    assert change(task.model[0].weight, first) > SEEN


@pytest.mark.verifies("thm-drift")
@few
@given(seeds, st.floats(0.5, 0.999), st.integers(1, 12), st.integers(2, 9))
def test_a_projected_change_moves_the_outputs_within_the_drift_bound(
    seed: int, tau: float, count: int, width: int
) -> None:
    """‖ΔW R‖ ≤ ‖ΔW‖₂ residual ≤ ‖ΔW‖₂ √(1−τ) ‖R‖; slack for rounding: 1e-12 of ‖ΔW‖ ‖R‖."""
    torch.manual_seed(seed)
    model, x = nn.Linear(width, 5).double(), torch.randn(count, width, dtype=torch.float64)
    (basis,) = null_space(model, [lambda: model(x)], tau).bases.values()
    rows = functional.pad(x, (0, 1), value=1.0)
    raw = torch.randn(5, width + 1, dtype=torch.float64)
    moved = basis.project(raw)
    drift, largest = float((moved @ rows.T).norm()), float(torch.linalg.matrix_norm(moved, 2))
    slack = 1e-12 * float(raw.norm() * rows.norm())
    assert drift <= largest * basis.residual + slack
    assert basis.residual <= (1 - tau) ** 0.5 * float(rows.norm()) * (1 + 1e-9) + slack


@pytest.mark.verifies("thm-drift")
@few
@given(seeds)
def test_below_tau_1_the_first_layer_drifts_within_its_bound(seed: int) -> None:
    """The same bound on the displacement a training leaves in a model."""
    task = tasks("mlp", seed, samples=12)
    space, layer = task.null_space(task.old, tau=0.9), task.model[0]
    joined = lambda: torch.cat([layer.weight, layer.bias[:, None]], 1).detach()  # noqa: E731
    start, out = joined(), layer(task.old).detach()
    learn(task, space, adam)
    largest = float(torch.linalg.matrix_norm(joined() - start, 2))
    drift = float((layer(task.old) - out).norm())
    assert 1e-6 < drift <= largest * space.bases["0"].residual + 1e-12


@dataclass(frozen=True)
class Normed:
    """A LayerNorm with drawn scale and shift before a linear layer."""

    width: int
    seed: int

    def build(self) -> tuple[nn.Sequential, Tensor, Tensor]:
        """The model, its null direction (1/γ, −Σ β/γ), and more tokens than features."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            d, norm = self.width, nn.LayerNorm(self.width)
            model = nn.Sequential(nn.Linear(3 * d, d), norm, nn.Linear(d, 4)).double()
            signs = torch.randint(2, (d,)) * 2.0 - 1.0
            norm.weight.data = (signs * (0.2 + torch.rand(d))).double()
            norm.bias.data = torch.randn(d, dtype=torch.float64)
            inverse = 1.0 / norm.weight.detach()
            direction = torch.cat([inverse, -(norm.bias.detach() * inverse).sum()[None]])
            return model, direction, torch.randn(4 * d, 2, 3 * d, dtype=torch.float64)


normed = st.builds(Normed, st.integers(2, 16), seeds)


@pytest.mark.verifies("thm-layernorm")
@given(normed)
def test_after_layer_norm_any_number_of_tokens_leaves_one_direction_free(case: Normed) -> None:
    """Rank d of d + 1, and the free direction is the predicted one to 1e-10 of its length.

    The norm divides by a token's spread: of features that are nearly equal it keeps rounding only.
    """
    model, direction, tokens = case.build()
    before = model[0](tokens).detach()
    assume(bool((before.std(-1) > 0.1 * before.abs().amax(-1)).all()))
    basis = null_space(model, [lambda: model(tokens)]).bases["2"]
    assert basis.rank <= case.width
    left = basis.project(direction[None])[0]
    assert (left - direction).norm() <= 1e-10 * direction.norm()


@pytest.mark.verifies("thm-layernorm")
@given(normed, st.integers(-3, 3))
def test_the_layer_norm_direction_changes_no_output_on_other_data(case: Normed, power: int) -> None:
    """Rounding: the terms of W x grow with the move; 1e-12 of the largest of them."""
    model, direction, _ = case.build()
    other = 10.0 * torch.randn(7, 3 * case.width, dtype=torch.float64) + 3.0
    before = model(other).detach()
    u = 10.0**power * torch.randn(4, 1, dtype=torch.float64)
    moved = u * direction
    with torch.no_grad():
        model[2].weight += moved[:, :-1]
        model[2].bias += moved[:, -1]
    inputs = model[:2](other).detach().norm(dim=-1).max()
    assert (model(other) - before).abs().max() <= 1e-12 * (1 + moved.norm()) * (1 + inputs)


@pytest.mark.verifies("thm-layernorm")
@given(normed, st.floats(1.01, 3.0))
def test_along_it_only_the_gradient_of_scale_and_shift_grows(case: Normed, growth: float) -> None:
    """A teleport of which it is the only direction: no other parameter sees a longer gradient."""
    model, _, tokens = case.build()
    answers = torch.zeros(len(tokens), dtype=torch.long)
    report = Teleporter(model, growth=growth).step(
        lambda: functional.cross_entropy(model(tokens).mean(1), answers)
    )
    assume(report.steps)
    before = {layer.name: layer.grad_norm_before or 0.0 for layer in report.layers}
    after = {layer.name: layer.grad_norm_after or 0.0 for layer in report.layers}
    for name in ("0", "2"):
        assert abs(after[name] - before[name]) <= 1e-9 * report.grad_norm_before
    assert report.growth == pytest.approx(growth, rel=1e-9)
    assert after["1"] >= (1 - 1e-9) * growth * before["1"]


@few
@given(kinds, seeds)
def test_merged_spaces_are_the_space_of_both_data_sets(kind: str, seed: int) -> None:
    task = tasks(kind, seed)
    both = task.null_space(task.old, task.new)
    assume(rank_is_clear(both))
    merged = task.null_space(task.old).merge(task.null_space(task.new))
    assert [b.rank for b in merged.bases.values()] == [b.rank for b in both.bases.values()]
    assert same(merged, both, 1e-7)  # the gap at the cut is that of directions: 1e-8 at worst


@pytest.mark.verifies("thm-keep")
@few
@given(st.sampled_from(["conv", "encoder", "mlp"]), seeds)
def test_a_merged_space_keeps_both_data_sets_and_one_alone_does_not(kind: str, seed: int) -> None:
    both, alone = tasks(kind, seed, samples=1), tasks(kind, seed, samples=1)
    spaces = [both.null_space(x) for x in (both.old, both.new)]
    third = torch.randn_like(both.new)
    outs = [both.out(x) for x in (both.old, both.new)]
    for task, space in ((both, spaces[0].merge(spaces[1])), (alone, spaces[0])):
        learn(Tasks(task.model, task.old, third, task.target), space, sgd)
    assert all(change(both.out(x), z) <= KEPT for x, z in zip((both.old, both.new), outs))  # noqa: B905
    assert change(alone.out(both.old), outs[0]) <= KEPT
    assert change(alone.out(both.new), outs[1]) > SEEN


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@few
@given(kind=kinds, seed=seeds)
def test_merging_the_same_data_in_another_order_takes_no_room(
    kind: str, seed: int, dtype: torch.dtype
) -> None:
    task = tasks(kind, seed, samples=3, dtype=dtype)
    once, again = task.null_space(task.old), task.null_space(*task.old.flip(0).split(1))
    assume(rank_is_clear(tasks(kind, seed, samples=3).null_space(task.old.double())))
    merged = once.merge(again)
    assert [b.rank for b in merged.bases.values()] == [b.rank for b in once.bases.values()]


def with_spare_layer() -> tuple[nn.Sequential, Tensor]:
    """A perceptron whose last layer the data do not reach."""
    torch.manual_seed(0)
    model, x = perceptron().double(), torch.randn(4, 9, dtype=torch.float64)
    return model, x


def test_layers_the_data_never_reached_are_free() -> None:
    model, x = with_spare_layer()
    basis = null_space(model, [lambda: model[:4](x)]).bases["4"]
    assert (basis.rank, basis.null_dim) == (0, 19)
    raw = torch.randn(2, 19, dtype=torch.float64)
    assert torch.equal(basis.project(raw), raw)


def test_layers_neither_data_set_reached_are_free_after_a_merge() -> None:
    model, x = with_spare_layer()
    one, other = (null_space(model, [lambda y=y: model[:4](y)]) for y in (x, x + 1))
    assert one.merge(other).bases["4"].null_dim == 19


@few
@given(kind=kinds, seed=seeds, tau=st.sampled_from([1.0, 0.9]))
def test_a_saved_space_loads_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int, tau: float
) -> None:
    task = tasks(kind, seed)
    space = task.null_space(task.old, tau=tau)
    path = tmp_path_factory.mktemp("spaces") / "old.safetensors"
    space.save(path)
    loaded = NullSpace.load(path)
    assert list(loaded.bases) == list(space.bases)
    for basis, wanted in zip(loaded.bases.values(), space.bases.values(), strict=True):
        assert torch.equal(basis.vectors, wanted.vectors)
        assert torch.equal(basis.singular_values, wanted.singular_values)
        assert torch.equal(basis.ranks, wanted.ranks)
    loaded.keep(task.model)


def test_a_space_with_a_free_layer_loads_as_it_was(tmp_path: Path) -> None:
    model, x = with_spare_layer()
    null_space(model, [lambda: model[:4](x)]).save(tmp_path / "space")
    assert NullSpace.load(tmp_path / "space").bases["4"].null_dim == 19


@pytest.mark.parametrize("content", ["absent", "text", "other tensors", "layers without tensors"])
def test_a_file_that_holds_no_null_space_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file"
    if content == "text":
        path.write_text("not a space")
    elif content == "other tensors":
        save_file({"weight": torch.zeros(2)}, path)
    elif content == "layers without tensors":
        save_file({"weight": torch.zeros(2)}, path, metadata={"layers": '["0"]'})
    with pytest.raises(NullSpaceError, match="holds no saved null space"):
        NullSpace.load(path)


@pytest.mark.parametrize("use", ["project_", "keep"])
def test_a_model_of_another_shape_is_refused_with_the_layer_named(use: str) -> None:
    task = tasks("mlp", 0)
    space = task.null_space(task.old)
    other = perceptron()
    other[2] = nn.Linear(21, 18)
    with pytest.raises(NullSpaceError, match="2: ") as caught:
        getattr(space, use)(other)
    assert "0: " not in str(caught.value)


def test_spaces_of_different_layers_do_not_merge() -> None:
    one, other = tasks("mlp", 0), tasks("conv", 0)
    with pytest.raises(NullSpaceError, match="different layers"):
        one.null_space(one.old).merge(other.null_space(other.old))
    with pytest.raises(TypeError, match=r"merge.. takes another NullSpace, got dict"):
        one.null_space(one.old).merge({})


@pytest.mark.parametrize("tau", [0.0, -1.0, 1.5, float("nan")])
def test_tau_outside_its_range_is_refused(tau: float) -> None:
    task = tasks("mlp", 0)
    with pytest.raises(ValueError, match="tau must be in"):
        task.null_space(task.old, tau=tau)


@pytest.mark.parametrize("every", [0, -2])
def test_a_keeper_that_never_projects_is_refused(every: int) -> None:
    task = tasks("mlp", 0)
    with pytest.raises(ValueError, match="every"):
        task.null_space(task.old).keep(task.model, every=every)


def test_a_keeper_that_is_made_anew_in_every_step_warns_that_nothing_is_kept() -> None:
    task = tasks("mlp", 0)
    space = task.null_space(task.old)
    with (
        pytest.warns(UserWarning, match=r"every=10 was used 1 times .* nothing was kept"),
        space.keep(task.model, every=10),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keeper = space.keep(task.model, every=2)
        for _ in range(3):
            with keeper:
                pass
        del keeper


def test_closures_that_never_call_the_model_are_refused() -> None:
    task = tasks("mlp", 0)
    with pytest.raises(ClosureError, match="covered layer"):
        null_space(task.model, [lambda: None])
    with pytest.raises(UnsupportedModelError):
        null_space(nn.Sequential(nn.ReLU()), [lambda: None])


def test_frozen_parameters_are_put_back_by_keep() -> None:
    task = tasks("residual", 0)
    norm = task.model.norm
    norm.weight.data.uniform_(0.5, 2.0)
    before = [p.detach().clone() for p in norm.parameters()]
    learn(task, task.null_space(task.old), adam)
    pairs = zip(norm.parameters(), before, strict=True)
    assert all(torch.equal(p, b) for p, b in pairs)


@few
@given(st.sampled_from(sorted(KINDS)), seeds)
def test_a_gradient_that_is_missing_is_made_where_the_projection_has_one(
    kind: str, seed: int
) -> None:
    """Without it the bias would not follow its weight, and the old outputs would move."""
    task = tasks(kind, seed)
    space, old = task.null_space(task.old), task.out(task.old)
    task.loss().backward()
    for name, parameter in task.model.named_parameters():
        if name.endswith("bias"):
            parameter.grad = None
    space.project_(task.model)
    sgd(task.model).step()
    assert change(task.out(task.old), old) <= KEPT


def test_projected_gradients_of_frozen_parameters_are_zero() -> None:
    task = tasks("residual", 0)
    task.loss().backward()
    task.null_space(task.old).project_(task.model)
    assert not any(p.grad.any() for p in task.model.norm.parameters())
    assert task.model.up.weight.grad.any()


class InterruptionError(Exception):
    """What a user's closure raises."""


@few
@given(kinds, seeds, st.booleans(), st.integers(0, 3))
def test_the_model_is_as_before_also_when_a_closure_raises(
    kind: str, seed: int, training: bool, at: int
) -> None:
    task = tasks(kind, seed)
    task.loss().backward()
    task.model.train(training)
    before = fingerprint(task.model)

    def fail() -> None:
        task.model(task.new)
        raise InterruptionError

    closures = [lambda: task.model(task.old)] * 3
    if at < 3:
        closures.insert(at, fail)
        with pytest.raises(InterruptionError):
            null_space(task.model, closures)
    else:
        null_space(task.model, closures)
    assert fingerprint(task.model) == before


def test_batch_norm_statistics_are_untouched() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    x = torch.randn(5, 4)
    before = fingerprint(model)
    null_space(model, [lambda: model(x)])
    assert fingerprint(model) == before


def test_a_space_applies_to_another_copy_of_the_model() -> None:
    task = tasks("mlp", 0)
    space, twin = task.null_space(task.old), copy.deepcopy(task.model)
    with space.keep(twin), torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert change(twin(task.old), task.out(task.old)) <= KEPT
    assert space.drift(task.model, twin, [task.old]) <= 100 * KEPT
    assert space.drift(task.model, twin, [task.old, task.new]) > SEEN


def test_every_covered_layer_is_in_the_table() -> None:
    task = tasks("encoder", 0)
    space = task.null_space(task.old)
    text = str(space)
    assert all(block.name in text for block in cover(task.model).blocks)
