"""A teleport changes the moved weights, or nothing at all, whatever happens on the way."""

import copy
import math
import random
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from teleport import ClosureError, Teleporter, TeleportReport
from teleport.runtime import transaction as transaction_module
from teleport.runtime.transaction import Transaction
from tests.support.fingerprint import all_but_weights, fingerprint, weights
from tests.support.networks import GRAPHS, Task, task
from tests.support.strategies import gradient_norm

names = pytest.mark.parametrize("name", GRAPHS)
methods = st.sampled_from(["tangent", "double_backward"])
kth = st.integers(1, 12)


class InterruptionError(Exception):
    """Something the user's closure raises."""


def used(name: str) -> Task:
    """A model in the middle of a training: some gradients are there, others are None."""
    problem = task(name)
    problem.closure().backward()
    next(problem.model.parameters()).grad = None
    return problem


@dataclass
class Trouble:
    """A closure that uses all random generators, and fails before or after the model.

    Only its ``at``-th call fails. One that replays the layers is left before it ends, and cannot
    fail after the model.
    """

    problem: Task
    at: int = 0
    before: Callable[[], None] = lambda: None
    after: Callable[[Tensor], Tensor] = lambda loss: loss
    calls: int = field(default=0, init=False)
    fired: bool = field(default=False, init=False)

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.before()
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))  # noqa: NPY002
        loss = self.problem.closure() + 1e-3 * noise
        if self.calls != self.at:
            return loss
        self.fired = True
        return self.after(loss)


def fail_with(error: type[BaseException]) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("at", range(1, 11))
@pytest.mark.parametrize("drift", [None, 0.0])
@given(method=methods, parts=st.integers(1, 2))
def test_a_graph_of_the_user_serves_after_a_teleport_that_did_not_move(
    at: int, drift: float | None, method: str, parts: int
) -> None:
    """Looks write into the model, and what is written is taken back: raised or rolled back."""
    problem = task("residual")
    before, loss = fingerprint(problem.model), problem.closure()
    trouble = Trouble(problem, at, before=fail_with(InterruptionError))
    teleporter = Teleporter(problem.model, growth=9.0, steps=2, method=method, max_drift=drift)
    try:
        moved = not teleporter.step([trouble] * parts).rolled_back
    except InterruptionError:
        moved = False
    assert (fingerprint(problem.model) == before) is not moved
    with pytest.raises(RuntimeError, match="inplace") if moved else nullcontext():
        loss.backward()  # its weights are there, or gone


@pytest.mark.parametrize("made", ["detached", "data"])
def test_a_weight_that_the_closure_holds_by_another_name_is_no_accident(made: str) -> None:
    """Its graph needs a weight that moves; what it gives cannot be kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 2))
    model.double()
    x = torch.randn(5, 3, dtype=torch.float64)
    weight = model[2].weight
    other = (weight.detach() if made == "detached" else weight.data).T
    before = fingerprint(model)
    report = Teleporter(model).step(lambda: (model(x).sum(1) * (model[0](x) @ other)[:, 0]).mean())
    assert report.rolled_back
    assert fingerprint(model) == before


@pytest.mark.parametrize("method", ["tangent", "double_backward"])
def test_a_weight_held_by_another_name_on_its_own_inputs_counts_as_it_is(method: str) -> None:
    """The move keeps what it gives, and the graph of the start reads it where it is by then."""
    problem = task("plain")
    first, inputs, layer, *rest = problem.model

    def closure() -> Tensor:
        h = inputs(first(problem.x))
        again = functional.linear(h, layer.weight.detach(), layer.bias.detach())
        return nn.Sequential(*rest)(layer(h)).square().mean() + again.tanh().square().mean()

    report = Teleporter(problem.model, growth=3.0, steps=3, method=method).step(closure)
    assert not report.rolled_back
    assert gradient_norm(problem.model, closure) == pytest.approx(report.grad_norm_after, rel=1e-9)


@names
@given(at=kth, method=methods)
def test_after_an_exception_everything_is_as_before(name: str, at: int, method: str) -> None:
    problem = used(name)
    before = fingerprint(problem.model)
    trouble = Trouble(problem, at, before=fail_with(InterruptionError))
    try:
        Teleporter(problem.model, lr=1e-3, growth=2.0, steps=3, method=method).step(trouble)
    except InterruptionError:
        assert fingerprint(problem.model) == before
    else:
        assert trouble.calls < at


@names
@given(at=st.integers(1, 6), method=methods)
def test_after_an_exception_inside_a_layer_everything_is_as_before(
    name: str, at: int, method: str
) -> None:
    problem = used(name)
    passed = count(1)

    def refuse(*_: object) -> None:
        if next(passed) == at:
            raise InterruptionError

    [m for m in problem.model.modules() if isinstance(m, nn.Linear)][1].register_forward_hook(
        refuse
    )
    before = fingerprint(problem.model)
    try:
        Teleporter(problem.model, growth=2.0, method=method).step(problem.closure)
    except InterruptionError:
        assert fingerprint(problem.model) == before
    else:
        assert next(passed) <= at


@given(at=kth)
def test_after_an_interrupt_everything_is_as_before(at: int) -> None:
    problem = used("zoo")
    before = fingerprint(problem.model)
    trouble = Trouble(problem, at, before=fail_with(KeyboardInterrupt))
    try:
        Teleporter(problem.model, tau=0.9, max_drift=10.0).step(trouble)
    except KeyboardInterrupt:
        assert fingerprint(problem.model) == before
    else:
        assert trouble.calls < at


@names
@given(at=kth, value=st.sampled_from([math.nan, math.inf]))
def test_after_a_loss_that_is_not_finite_everything_is_as_before(
    name: str, at: int, value: float
) -> None:
    problem = used(name)
    before = fingerprint(problem.model)
    trouble = Trouble(problem, at, after=lambda loss: loss * value)
    teleporter = Teleporter(problem.model, tau=0.95, growth=1.1, max_drift=10.0)
    try:
        failed = teleporter.step(trouble).rolled_back
    except ClosureError:
        failed = True
    counts = at > 1  # what the first call gives is dropped: it drew, and nobody saw where
    assert failed == (trouble.fired and counts)
    assert (fingerprint(problem.model) == before) == failed


@names
def test_after_a_guard_failure_everything_is_as_before(name: str) -> None:
    problem = used(name)
    before = fingerprint(problem.model)
    report = Teleporter(problem.model, tau=0.7, growth=1.3, max_drift=0.0).step(problem.closure)
    assert report.rolled_back
    assert "the loss moved by" in report.reason
    assert report.drift == 0.0
    assert fingerprint(problem.model) == before


@names
@given(method=methods)
def test_success_changes_moved_weights_only(name: str, method: str) -> None:
    problem = used(name)
    rest, start = all_but_weights(problem.model), weights(problem.model)
    report = Teleporter(problem.model, growth=2.0, method=method).step(problem.closure)
    assert not report.rolled_back, report.reason
    assert all_but_weights(problem.model) == rest
    changed = {n.rpartition(".")[0] for n, bits in weights(problem.model).items()
               if bits != start[n]}  # fmt: skip
    assert changed == {layer.name for layer in report.layers if layer.status == "moved"}


def test_batch_norm_statistics_are_untouched_in_train_mode() -> None:
    problem = used("zoo")
    norm = problem.model[1]
    before = (norm.running_mean.clone(), norm.running_var.clone(), int(norm.num_batches_tracked))
    Teleporter(problem.model).step(problem.closure)
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])
    assert int(norm.num_batches_tracked) == before[2]


def test_dropout_is_off_inside_and_on_after() -> None:
    problem = used("zoo")
    seen: list[bool] = []
    inputs = lambda module, x: seen.append(module.training)  # noqa: E731
    problem.model[3].register_forward_pre_hook(inputs)
    problem.model[1].register_forward_pre_hook(lambda module, _: seen.append(not module.training))
    Teleporter(problem.model).step(problem.closure)
    assert seen
    assert not any(seen)
    assert problem.model[3].training


def test_layers_without_a_rule_are_named() -> None:
    problem = used("zoo")
    report = Teleporter(problem.model).step(problem.closure)
    frozen = {x.name: x.status for x in report.layers if x.status.startswith("frozen")}
    assert frozen == {
        "1": "frozen: no rule for BatchNorm1d",
        "2": "frozen: no rule for PReLU",
        "5": "frozen: no rule for LayerNorm",
    }


def test_hooks_of_the_user_still_run() -> None:
    problem = used("plain")
    seen: list[str] = []
    problem.model[2].register_forward_pre_hook(lambda *_: seen.append("before"))
    problem.model[2].register_forward_hook(lambda *_: seen.append("after"))
    Teleporter(problem.model).step(problem.closure)
    assert seen[:2] == ["before", "after"]
    assert problem.model[2]._forward_hooks


def test_a_hook_that_changes_the_output_is_part_of_the_model() -> None:
    problem = used("plain")
    problem.model[2].register_forward_hook(lambda _, __, z: 2 * z)
    before = gradient_norm(problem.model, problem.closure)
    report = Teleporter(problem.model, growth=2.0).step(problem.closure)
    assert not report.rolled_back, report.reason
    assert abs(gradient_norm(problem.model, problem.closure) / before / 2 - 1) <= 1e-6


def test_a_forward_of_the_user_on_the_instance_survives() -> None:
    problem = used("plain")
    layer = problem.model[2]
    own = lambda x: nn.functional.linear(x, layer.weight, layer.bias)  # noqa: E731
    layer.forward = own
    Teleporter(problem.model).step(problem.closure)
    assert layer.__dict__["forward"] is own


@pytest.mark.parametrize("method", ["tangent", "double_backward"])
def test_activations_in_place_give_the_same_result(method: str) -> None:
    usual, in_place = task("plain"), task("plain")
    for module in in_place.model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    for problem in (usual, in_place):
        Teleporter(problem.model, growth=3.0, method=method).step(problem.closure)
    assert weights(usual.model) == weights(in_place.model)


def teleported(problem: Task, closure: Callable[[], Tensor], growth: float = 2.0) -> TeleportReport:
    """Teleport, and check loss and growth with plain autograd."""
    norm, loss = gradient_norm(problem.model, closure), float(closure())
    report = Teleporter(problem.model, growth=growth).step(closure)
    assert not report.rolled_back, report.reason
    assert abs(float(closure()) - loss) <= report.tolerance
    assert abs(gradient_norm(problem.model, closure) / norm / growth - 1) <= 1e-6
    return report


def test_a_layer_used_twice_moves() -> None:
    problem = task("twice")
    report = teleported(problem, problem.closure)
    core = next(layer for layer in report.layers if layer.name == "core")
    assert core.status == "moved"
    assert core.rank == 12  # six samples, two uses


def test_tied_layers_are_frozen_and_named() -> None:
    problem = task("tied")
    report = teleported(problem, problem.closure)
    found = {layer.name: layer.status for layer in report.layers}
    assert found["one"] == "frozen: shares a parameter with another layer in part"
    assert found["two"] == "frozen: shares a parameter with another layer in part"
    assert found["head"] == "moved"


def test_layers_tied_in_weight_and_bias_move_as_one() -> None:
    problem = task("tied")
    problem.model.two.bias = problem.model.one.bias
    report = teleported(problem, problem.closure)
    found = {layer.name: layer for layer in report.layers}
    assert list(found) == ["embed", "one", "head"]
    assert (found["one"].status, found["one"].rank) == ("moved", 12)


@pytest.mark.parametrize("penalised", [["2"], ["0", "4"]])
def test_layers_under_an_explicit_penalty_are_frozen(penalised: list[str]) -> None:
    problem = task("plain")
    layers = [problem.model.get_submodule(name) for name in penalised]

    def closure() -> Tensor:
        return problem.closure() + 0.01 * sum(m.weight.square().sum() for m in layers)

    report = teleported(problem, closure, growth=1.2)
    found = {layer.name: layer.status for layer in report.layers}
    assert all(found[name].startswith("frozen") for name in penalised)


def test_a_penalty_on_all_weights_leaves_nothing_to_move() -> None:
    problem = task("plain")
    before = weights(problem.model)

    def closure() -> Tensor:
        return problem.closure() + sum(p.square().sum() for p in problem.model.parameters())

    report = Teleporter(problem.model).step(closure)
    assert "nothing can move" in report.reason
    assert weights(problem.model) == before


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_inside_the_closure_leaves_the_gradients(set_to_none: bool) -> None:
    problem = used("plain")
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    rest = all_but_weights(problem.model)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        return problem.closure()

    Teleporter(problem.model, growth=2.0).step(closure)
    assert all_but_weights(problem.model) == rest


def test_frozen_parameters_stay_frozen_and_are_named() -> None:
    problem = task("plain")
    problem.model[2].weight.requires_grad_(False)
    before = problem.model[2].weight.clone()
    report = teleported(problem, problem.closure)
    found = {layer.name: layer.status for layer in report.layers}
    assert found["2"] == "frozen: its weight does not require a gradient"
    assert torch.equal(problem.model[2].weight, before)
    assert not problem.model[2].weight.requires_grad


def test_a_frozen_bias_stays() -> None:
    problem = task("plain")
    problem.model[2].bias.requires_grad_(False)
    before = problem.model[2].bias.clone()
    teleported(problem, problem.closure)
    assert torch.equal(problem.model[2].bias, before)


def test_every_call_of_a_random_closure_draws_the_same() -> None:
    """Noise from the global generators: deterministic for the teleport, going on afterwards."""
    problem = task("plain")
    closure = Trouble(problem)
    report = Teleporter(problem.model, growth=2.0).step(closure)
    assert not report.rolled_back, report.reason
    assert report.drift <= report.tolerance


class Noisy(nn.Module):
    """Multiplies by a random number in train mode; notes in which mode it ran."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.draw = draw
        self.ran: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.ran.append(self.training)
        return x * (1.0 + float(self.draw())) if self.training else x


@pytest.mark.parametrize(
    ("draw", "draws"),
    [
        (lambda: 2.0, False),
        (lambda: torch.rand(()), True),
        (lambda: np.random.rand(), True),  # noqa: NPY002
        (random.random, True),
    ],
    ids=["nothing", "torch", "NumPy", "Python"],
)
def test_modules_are_listened_to_only_where_something_is_drawn(
    draw: Callable[[], Any], draws: bool
) -> None:
    model = nn.Sequential(nn.Linear(3, 2), Noisy(draw))
    with Transaction(model) as transaction:
        run = transaction.repeatable(lambda: float(model(torch.ones(4, 3)).sum()))
        first, note = transaction.until_quiet(run)
        assert run() == first
    assert model[1].ran == [True] * 2 + [False] * 2 * draws
    assert model[1].training
    assert note == ""


def seeded(run: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    return run()


def put_back(run: Callable[[], Any]) -> Any:
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    found = seeded(run)
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])  # noqa: NPY002
    random.setstate(before[2])
    return found


@pytest.mark.parametrize("around", [seeded, put_back])
@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(()),
        lambda: np.random.rand(),  # noqa: NPY002
        random.random,
    ],
    ids=["torch", "NumPy", "Python"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_draws_are_noticed_though_the_closure_ends_where_it_began(
    around: Callable[[Callable[[], Any]], Any], draw: Callable[[], Any], nested: bool
) -> None:
    """As one that seeds all generators first, and ran once before."""
    model: Any = nn.Sequential(nn.Linear(3, 2), Noisy(draw))
    model = nn.Sequential(model, nn.Tanh()) if nested else model
    around(lambda: model(torch.ones(4, 3)))
    with Transaction(model) as transaction:
        run = transaction.repeatable(lambda: around(lambda: float(model(torch.ones(4, 3)).sum())))
        found, _ = transaction.until_quiet(run)
        model.eval()
        assert found == float(model(torch.ones(4, 3)).sum())


def test_a_transaction_without_commit_restores() -> None:
    problem = used("zoo")
    before = fingerprint(problem.model)
    with Transaction(problem.model):
        with torch.no_grad():
            [p.mul_(2) for p in problem.model.parameters()]
        problem.closure().backward()
        problem.model.eval()
    assert fingerprint(problem.model) == before


def test_a_transaction_with_commit_keeps_weights_and_nothing_else() -> None:
    problem = used("zoo")
    rest = all_but_weights(problem.model)
    with Transaction(problem.model) as transaction:
        with torch.no_grad():
            [p.mul_(2) for p in problem.model.parameters()]
        moved = weights(problem.model)
        problem.closure().backward()
        transaction.commit()
    assert weights(problem.model) == moved
    assert all_but_weights(problem.model) == rest


def test_a_commit_before_an_exception_does_not_count() -> None:
    problem = used("plain")
    before = fingerprint(problem.model)

    def fail_after_commit() -> None:
        with Transaction(problem.model) as transaction, torch.no_grad():
            problem.model[0].weight.mul_(2)
            transaction.commit()
            raise InterruptionError

    with pytest.raises(InterruptionError):
        fail_after_commit()
    assert fingerprint(problem.model) == before


def test_a_buffer_replaced_by_the_closure_comes_back() -> None:
    problem = used("zoo")
    before = fingerprint(problem.model)
    with Transaction(problem.model):
        problem.model[1].running_mean = torch.ones(20, dtype=torch.float64)
    assert fingerprint(problem.model) == before


def test_random_generators_go_on_where_they_were() -> None:
    problem = used("plain")
    before = (random.getstate(), fingerprint(problem.model)["random"])
    with Transaction(problem.model) as transaction:
        draws = [random.random() + float(np.random.rand()) + float(torch.rand(()))]  # noqa: NPY002
        transaction.rewind_random()
        draws += [random.random() + float(np.random.rand()) + float(torch.rand(()))]  # noqa: NPY002
    assert draws[0] == draws[1]
    assert (random.getstate(), fingerprint(problem.model)["random"]) == before


@pytest.mark.parametrize(
    ("owner", "name", "good"),
    [
        *((Tensor, "clone", good) for good in (0, 3)),
        *((torch, "add", good) for good in (0, 3)),
        (Tensor, "addmm_", 0),
        (torch, "zeros_like", 0),
    ],
)
def test_out_of_memory_at_a_copy_leaves_everything_as_before(
    owner: Any, name: str, good: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of the transaction; sums of tangents; weights on the way; the backward pass."""
    problem, calls = task("plain"), count()
    before, make = fingerprint(problem.model), getattr(owner, name)
    fast = torch.backends.mha.get_fastpath_enabled()

    def making(*args: object, **kwargs: object) -> Tensor:
        if next(calls) >= good:
            raise MemoryError("no memory left")
        made: Tensor = make(*args, **kwargs)
        return made

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, making)
        with pytest.raises(MemoryError) as caught:  # keeps every frame: no clean-up by collection
            Teleporter(problem.model).step(problem.closure)
    assert fingerprint(problem.model) == before
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert "no memory left" in str(caught.value)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda t: t,
    "view": lambda t: t.view(3, 2),
    "t": lambda t: t.t(),
    "[None]": lambda t: t[None],
    "expand": lambda t: t[:, :1].expand(2, 3),
    "slice": lambda t: t[:, ::2],
    "unbind": lambda t: t.unbind()[1],
    "diagonal": lambda t: t.diagonal(),
    "unfold": lambda t: t.unfold(1, 2, 1),
    "as_strided": lambda t: t.as_strided((2, 2), (1, 2), 1),
}

CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "nothing": lambda m: None,
    "in place": lambda m: m.kept.data.zero_() if 0 not in m.kept.stride() else None,
    "at its base": lambda m: m.base.data.fill_(1),
    "replaced": lambda m: setattr(m, "kept", m.kept + 1),
    "resized": lambda m: m.kept.data.resize_(7),
    "gone": lambda m: m._buffers.pop("kept"),
    "none": lambda m: setattr(m, "kept", None),
    "in the graph": lambda m: setattr(m, "kept", m.kept * m.weight.sum()),
}


@given(
    view=st.sampled_from(sorted(VIEWS)),
    change=st.sampled_from(sorted(CHANGES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.cfloat]),
    inference=st.booleans(),
    commit=st.booleans(),
)
def test_a_buffer_of_any_form_comes_back(
    view: str, change: str, dtype: torch.dtype, inference: bool, commit: bool
) -> None:
    """The same object, looking at the same memory with the same bits; nothing is raised."""
    module = nn.Linear(2, 2)
    with torch.inference_mode(inference):
        module.base = torch.arange(6).reshape(2, 3).to(dtype)
        module.register_buffer("kept", VIEWS[view](module.base))
    kept, base = module.kept, module.base.clone()
    values, place = kept.clone(), (kept.shape, kept.stride(), kept.storage_offset())
    with Transaction(module) as transaction:
        with torch.inference_mode(inference):
            CHANGES[change](module)
        if commit:
            transaction.commit()
    assert module.kept is kept
    assert torch.equal(kept, values)
    assert (kept.shape, kept.stride(), kept.storage_offset()) == place
    assert kept.untyped_storage().data_ptr() == module.base.untyped_storage().data_ptr()
    if change != "at its base" or view == "itself":
        assert torch.equal(module.base, base)


@pytest.mark.parametrize("at", [0, 1])
def test_what_cannot_be_put_back_keeps_nothing_else_from_it(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised once everything else is as before, in a commit or after it; the move is not kept."""
    problem = used("zoo")
    before, calls = fingerprint(problem.model), count()
    same = transaction_module._same_bits
    committed = len(list(problem.model.parameters()))

    def refuse(a: Tensor, b: Tensor) -> bool:
        if next(calls) == at * committed:
            raise InterruptionError
        return same(a, b)

    def commit_all() -> None:
        with Transaction(problem.model) as transaction:
            with torch.no_grad():
                [p.mul_(2) for p in problem.model.parameters()]
            problem.model.eval()
            torch.rand(3)
            transaction.commit()

    monkeypatch.setattr(transaction_module, "_same_bits", refuse)
    with pytest.raises(InterruptionError):
        commit_all()
    assert next(calls) > 1 + at * committed
    assert fingerprint(problem.model) == before


def test_the_copy_of_the_model_goes_when_the_transaction_is_left() -> None:
    model = nn.Linear(3, 3)
    with Transaction(model) as transaction:
        copies = [weakref.ref(values) for values in transaction.kept.values()]
        assert len(copies) == 2
        assert all(copy() is not None for copy in copies)
    assert not any(copy() is not None for copy in copies)


def _settings_of_all_threads() -> tuple[object, ...]:
    attention = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    return *attention, torch._dynamo.eval_frame._stance.stance


def test_overlapping_transactions_leave_the_settings_of_all_threads() -> None:
    """As in two threads: the second begins within the first and ends after it."""
    import_module("torch._dynamo")
    before = _settings_of_all_threads()
    first, second = Transaction(nn.Linear(2, 2)), Transaction(nn.Linear(2, 2))
    first.__enter__()
    second.__enter__()
    assert _settings_of_all_threads() == (False, False, "force_eager")
    first.__exit__(None, None, None)
    assert _settings_of_all_threads() == (False, False, "force_eager")
    second.__exit__(None, None, None)
    assert before == _settings_of_all_threads()


def test_teleports_in_threads_end_where_each_would_alone() -> None:
    """PyTorch has one level of forward mode for all threads: a second pass was refused."""
    tasks = [task("plain", seed=seed) for seed in range(6)]
    alone = [copy.deepcopy(problem.model.state_dict()) for problem in tasks]

    def teleported(problem: Task) -> TeleportReport:
        def closure() -> Tensor:
            time.sleep(0.003)  # so that the passes meet
            return problem.closure()

        return Teleporter(problem.model, growth=1.2).step(closure)

    in_turn = [teleported(problem) for problem in tasks]
    ends = [copy.deepcopy(problem.model.state_dict()) for problem in tasks]
    for problem, state in zip(tasks, alone, strict=True):
        problem.model.load_state_dict(state)
    with ThreadPoolExecutor(len(tasks)) as pool:
        at_once = list(pool.map(teleported, tasks))
    assert [report.reason for report in at_once] == [report.reason for report in in_turn]
    for problem, end in zip(tasks, ends, strict=True):
        state = problem.model.state_dict()
        assert all(torch.equal(state[name], end[name]) for name in end)
