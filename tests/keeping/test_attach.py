"""A null space attached to an optimizer: what is kept, in which loops, and what is refused."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from teleport import NullSpace, NullSpaceError, null_space
from tests.support.examples import examples
from tests.support.keeping import Learner, project_literally
from tests.support.strategies import seeds

KEPT = 1e-10
"""Absolute change of outputs near one that counts as kept: some 1e-13 a projection, and no sum."""

SEEN = 1e-5

few = examples(6)


def in_groups(learner: Learner) -> list[dict[str, object]]:
    """Weights and biases apart, as where decay is for weights alone."""
    biases = [p for n, p in learner.model.named_parameters() if n.endswith("bias")]
    weights = [p for n, p in learner.model.named_parameters() if n.endswith("weight")]
    return [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 1e-3}]


OPTIMIZERS: dict[str, Callable[[Learner], Optimizer]] = {
    "SGD": lambda t: torch.optim.SGD(t.model.parameters(), lr=0.02, momentum=0.9),
    "Adam, foreach": lambda t: torch.optim.Adam(t.model.parameters(), lr=3e-3, foreach=True),
    "Adam, fused": lambda t: torch.optim.Adam(t.model.parameters(), lr=3e-3, fused=True),
    "AdamW, groups": lambda t: torch.optim.AdamW(in_groups(t), lr=3e-3),
    "Rprop": lambda t: torch.optim.Rprop(t.model.parameters(), lr=3e-3),
}
makers = st.sampled_from(sorted(OPTIMIZERS))


def train(learner: Learner, optimizer: Optimizer, steps: int, parts: int = 1) -> None:
    """Steps on the new task, each of which sums the gradients of so many backward passes."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        for _ in range(parts):
            loss = learner.loss() / parts
            loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.verifies("thm-keep")
@few
@given(makers, seeds, st.integers(1, 4), st.integers(1, 2))
def test_attach_is_the_projection_written_out(
    maker: str, seed: int, every: int, parts: int
) -> None:
    ours, theirs = Learner.drawn(seed), Learner.drawn(seed)
    space, projectors, start = ours.space(), theirs.literal(), theirs.state()
    optimizer, other = OPTIMIZERS[maker](ours), OPTIMIZERS[maker](theirs)
    space.attach(optimizer, every)
    for step in range(1, 6):
        train(ours, optimizer, 1, parts)
        train(theirs, other, 1, parts)
        if step % every == 0:
            project_literally(theirs, start, projectors)
        for name, value in theirs.state().items():
            assert torch.allclose(ours.state()[name], value, rtol=0, atol=1e-9), (step, name)


@pytest.mark.verifies("thm-keep")
@few
@given(makers, seeds, st.integers(1, 4))
def test_old_outputs_are_kept_while_new_ones_are_learned(maker: str, seed: int, every: int) -> None:
    learner = Learner.drawn(seed)
    old, before = learner.out(), float(learner.loss().detach())
    optimizer = OPTIMIZERS[maker](learner)
    handle = learner.space().attach(optimizer, every)
    for step in range(1, 6):
        train(learner, optimizer, 1)
        assert (float((learner.out() - old).abs().max()) <= KEPT) == (step % every == 0)
    handle.remove()
    assert (learner.out() - old).abs().max() <= KEPT
    assert float(learner.loss().detach()) < before
    train(learner, optimizer, 1)
    assert (learner.out() - old).abs().max() > SEEN, "the hooks are still there"


@pytest.mark.verifies("thm-keep")
@few
@given(seeds, st.integers(1, 4), st.sampled_from([None, "strong_wolfe"]))
def test_lbfgs_learns_within_the_null_space(seed: int, every: int, search: str | None) -> None:
    """It takes the curvature from its own steps: to project these after the fact made it climb."""
    ours, theirs = Learner.drawn(seed), Learner.drawn(seed)
    first, old, projectors = float(ours.loss().detach()), ours.out(), theirs.literal()
    optimizer, other = (
        torch.optim.LBFGS(t.model.parameters(), lr=0.5, line_search_fn=search)
        for t in (ours, theirs)
    )

    def projected() -> Tensor:
        other.zero_grad()
        loss = theirs.loss()
        loss.backward()
        for name, p in theirs.model.named_parameters():
            if name.rsplit(".", 1)[0] not in projectors:
                p.grad = None
        for name, projector in projectors.items():
            layer = theirs.linears[name]
            rows = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1) @ projector
            layer.weight.grad, layer.bias.grad = rows[:, :-1].contiguous(), rows[:, -1].contiguous()
        return loss

    ours.space().attach(optimizer, every)
    for _ in range(2):
        train(ours, optimizer, 1)
        other.step(projected)
        assert torch.allclose(ours.out(), old, rtol=0, atol=1e-8)
    reached, literally = (float(t.loss().detach()) for t in (ours, theirs))
    assert reached == pytest.approx(literally, rel=0.05, abs=1e-8)
    assert reached < 0.5 * first
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()


def test_a_layer_that_is_replaced_or_added_later_is_refused() -> None:
    learner = Learner.drawn(0)
    space, optimizer = learner.space(), OPTIMIZERS["SGD"](learner)
    keeper, handle = space.keep(learner.model), space.attach(optimizer)
    model = learner.model
    model[3].added = nn.Linear(2, 2)
    with pytest.raises(NullSpaceError, match=r"not the parameters any more.*anew"), keeper:
        pass
    train(learner, optimizer, 1)  # of the optimizer it has none
    del model[3].added
    with keeper:
        pass
    model[3] = copy.deepcopy(model[3])
    with pytest.raises(NullSpaceError, match="a layer was replaced"), keeper:
        pass
    before = learner.state()
    with pytest.raises(NullSpaceError, match="a layer was replaced"):
        train(learner, optimizer, 1)
    assert all(torch.equal(value, before[name]) for name, value in learner.state().items())
    handle.remove()


@few
@given(seeds, st.sampled_from(["weight", "bias"]), st.integers(1, 3))
def test_a_part_of_a_layer_that_is_frozen_later_does_not_move(
    seed: int, part: str, every: int
) -> None:
    learner = Learner.drawn(seed)
    space, optimizer = learner.space(), OPTIMIZERS["SGD"](learner)
    keeper, handle = space.keep(learner.model, every), space.attach(optimizer, every)
    train(learner, optimizer, 2)
    learner.linears["3"].get_parameter(part).requires_grad_(False)
    before = learner.state()
    with pytest.raises(NullSpaceError, match=r"layer '3' cannot be kept.*frozen since.*anew"):
        train(learner, optimizer, 1)
    with pytest.raises(NullSpaceError, match="frozen since"), keeper:
        train(learner, optimizer, 1)
    assert all(torch.equal(value, learner.state()[name]) for name, value in before.items())
    handle.remove()


@few
@given(seeds, st.integers(1, 3))
def test_a_layer_that_is_frozen_later_stays_bit_for_bit(seed: int, every: int) -> None:
    learner = Learner.drawn(seed)
    old, optimizer = learner.out(), OPTIMIZERS["SGD"](learner)
    handle = learner.space().attach(optimizer, every)
    train(learner, optimizer, 2)
    learner.linears["3"].requires_grad_(False)
    handle.project()
    before = learner.state()
    train(learner, optimizer, 7)
    handle.remove()
    assert (learner.out() - old).abs().max() <= KEPT
    assert all(torch.equal(learner.state()[n], before[n]) for n in ("3.weight", "3.bias"))
    assert not torch.equal(learner.state()["0.weight"], before["0.weight"])


def test_a_context_removes_itself_also_after_an_error() -> None:
    learner = Learner.drawn(0)
    old, optimizer = learner.out(), OPTIMIZERS["SGD"](learner)

    def fail_after_three() -> None:
        with learner.space().attach(optimizer, every=10):
            train(learner, optimizer, 3)
            raise KeyError

    with pytest.raises(KeyError):
        fail_after_three()
    assert (learner.out() - old).abs().max() <= KEPT
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_removing_twice_does_not_project_what_came_between() -> None:
    learner = Learner.drawn(0)
    optimizer = OPTIMIZERS["SGD"](learner)
    handle = learner.space().attach(optimizer)
    handle.remove()
    train(learner, optimizer, 1)
    moved = learner.state()
    handle.remove()
    assert all(torch.equal(value, learner.state()[name]) for name, value in moved.items())


@few
@given(seeds, st.sampled_from(["SGD", "Adam, fused"]), st.integers(1, 3))
def test_a_step_that_the_gradient_scaler_skips_changes_nothing(
    seed: int, maker: str, every: int
) -> None:
    """Bit for bit, while steps before and after are projected as ever."""
    learner = Learner.drawn(seed)
    old, optimizer = learner.out(), OPTIMIZERS[maker](learner)
    handle = learner.space().attach(optimizer, every)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(6):
        optimizer.zero_grad()
        factor = float("inf") if step in (1, 2) else 1.0
        before = learner.state()
        scaler.scale(learner.loss() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if step in (1, 2):
            assert all(torch.equal(v, learner.state()[n]) for n, v in before.items())
    handle.remove()
    assert (learner.out() - old).abs().max() <= KEPT


def test_two_optimizers_share_a_model() -> None:
    """Weights to one and all else to another, as where Muon is for matrices alone."""
    learner = Learner.drawn(1)
    space, old, start = learner.space(), learner.out(), learner.state()
    matrices = [p for p in learner.model.parameters() if p.dim() == 2]
    vectors = [p for p in learner.model.parameters() if p.dim() == 1]
    both = torch.optim.SGD(matrices, lr=0.05), torch.optim.AdamW(vectors, lr=3e-3)
    handles = [space.attach(optimizer) for optimizer in both]
    for _ in range(4):
        learner.loss().backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
        assert (learner.out() - old).abs().max() <= KEPT
    for handle in handles:
        handle.remove()
    assert not torch.equal(learner.state()["0.weight"], start["0.weight"])


def test_neither_state_nor_copies_of_the_optimizer_know_the_space() -> None:
    learner = Learner.drawn(2)
    plain, attached = OPTIMIZERS["AdamW, groups"](learner), OPTIMIZERS["AdamW, groups"](learner)
    learner.space().attach(attached)
    assert attached.state_dict() == plain.state_dict()
    assert not copy.deepcopy(attached)._optimizer_step_post_hooks
    train(learner, attached, 2)
    state, old = copy.deepcopy(attached.state_dict()), learner.out()
    attached.load_state_dict(state)
    train(learner, attached, 2)
    assert (learner.out() - old).abs().max() <= KEPT, "loading a state took the space away"


@pytest.mark.parametrize("scheduler", [True, False])
def test_schedulers_and_clipping_need_nothing_else(scheduler: bool) -> None:
    learner = Learner.drawn(3)
    old, optimizer = learner.out(), OPTIMIZERS["Adam, foreach"](learner)
    learner.space().attach(optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2) if scheduler else None
    for _ in range(4):
        optimizer.zero_grad(set_to_none=False)
        learner.loss().backward()
        nn.utils.clip_grad_norm_(learner.model.parameters(), 0.1)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    assert (learner.out() - old).abs().max() <= KEPT


class Wrapper:
    """An optimizer in a wrapper that steps it, as those of Accelerate and Lightning."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


def test_the_optimizer_in_a_wrapper_is_found() -> None:
    learner = Learner.drawn(4)
    old, optimizer = learner.out(), OPTIMIZERS["SGD"](learner)
    learner.space().attach(Wrapper(Wrapper(optimizer)))
    train(learner, optimizer, 2)
    assert (learner.out() - old).abs().max() <= KEPT
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got Linear"):
        learner.space().attach(nn.Linear(2, 2))


def test_data_parallel_models_are_found_with_and_without_their_wrapper(tmp_path: Path) -> None:
    learner = Learner.drawn(4)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(learner.model)
        old, before = learner.out(), learner.state()
        optimizer = OPTIMIZERS["Adam, foreach"](learner)
        for model in (parallel, learner.model):
            space = null_space(model, [lambda model=model: model(learner.old)])
            with space.attach(optimizer):
                for _ in range(2):
                    optimizer.zero_grad()
                    (parallel(learner.new) - learner.target).square().mean().backward()
                    optimizer.step()
            assert (learner.out() - old).abs().max() <= KEPT
        assert not torch.equal(learner.state()["0.weight"], before["0.weight"])
    finally:
        distributed.destroy_process_group()


def test_rounding_does_not_add_up_in_half_precision() -> None:
    """After 300 projections the outputs are off by as little as after one."""
    learner = Learner.drawn(5)
    model = learner.model.bfloat16()
    old = learner.old.bfloat16()
    space, first = null_space(model, [lambda: model(old)]), model(old).detach().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    space.attach(optimizer)
    errors = []
    for _ in range(300):
        optimizer.zero_grad()
        (model(learner.new.bfloat16()) - learner.target.bfloat16()).square().mean().backward()
        optimizer.step()
        errors.append(float((model(old).detach().float() - first).abs().max()))
    assert max(errors) <= 16 * torch.finfo(torch.bfloat16).eps * float(1 + first.abs().max())


def test_packed_rows_that_are_left_out_are_put_back() -> None:
    """Query, key and value are rows of one parameter."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x, y = torch.randn(2, 1, 3, 8, dtype=torch.float64)
    space = null_space(model, [lambda: model(x, x, x)], include=["v"])
    start, old = model.in_proj_weight.detach().clone(), model(x, x, x)[0].detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    space.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(y, y, y)[0].square().sum().backward()
        optimizer.step()
    assert torch.equal(model.in_proj_weight[:16], start[:16])
    assert (model.in_proj_weight[16:] - start[16:]).abs().max() > SEEN
    assert (model(x, x, x)[0] - old).abs().max() <= KEPT
    model(y, y, y)[0].square().sum().backward()
    space.project_(model)
    assert not model.in_proj_weight.grad[:16].any()
    assert model.in_proj_weight.grad[16:].any()


def test_a_loaded_space_needs_the_model(tmp_path: Path) -> None:
    learner = Learner.drawn(6)
    old, optimizer = learner.out(), OPTIMIZERS["SGD"](learner)
    learner.space().save(tmp_path / "space")
    loaded = NullSpace.load(tmp_path / "space")
    with pytest.raises(NullSpaceError, match=r"space\.attach\(optimizer, model=model\)"):
        loaded.attach(optimizer)
    loaded.attach(optimizer, model=learner.model)
    train(learner, optimizer, 2)
    assert (learner.out() - old).abs().max() <= KEPT


def test_a_space_does_not_keep_its_model_alive() -> None:
    learner = Learner.drawn(7)
    space, optimizer = learner.space(), OPTIMIZERS["SGD"](learner)
    del learner
    gc.collect()
    with pytest.raises(NullSpaceError, match="its model is gone"):
        space.attach(optimizer)


def test_a_copied_space_has_no_model() -> None:
    learner = Learner.drawn(7)
    with pytest.raises(NullSpaceError, match="loaded or copied"):
        copy.deepcopy(learner.space()).attach(OPTIMIZERS["SGD"](learner))


def refused(learner: Learner, optimizer: Optimizer, match: str, **options: object) -> None:
    """No hook is left behind, and the model is as it was."""
    before, hooks = learner.state(), len(optimizer._optimizer_step_post_hooks)
    with pytest.raises((NullSpaceError, ValueError), match=match):
        learner.space().attach(optimizer, **options)
    assert len(optimizer._optimizer_step_post_hooks) == hooks
    assert all(torch.equal(value, learner.state()[name]) for name, value in before.items())


def test_parameters_of_another_model_are_refused() -> None:
    learner = Learner.drawn(0)
    extra = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.SGD([*learner.model.parameters(), extra], lr=0.1)
    refused(learner, optimizer, r"1 parameters of the optimizer, of shapes \[\(3, 2\)\]")
    copied = OPTIMIZERS["SGD"](learner.copy())
    refused(learner, copied, "Was the model copied")


def test_an_optimizer_that_would_train_nothing_is_refused() -> None:
    learner = Learner.drawn(0)
    optimizer = torch.optim.SGD(learner.model[2].parameters(), lr=0.1)
    refused(learner, optimizer, "would train nothing")


def test_a_second_space_on_one_optimizer_is_refused() -> None:
    learner = Learner.drawn(0)
    optimizer = OPTIMIZERS["SGD"](learner)
    handle = learner.space().attach(optimizer)
    refused(learner, optimizer, "attached to this optimizer already")
    handle.remove()
    learner.space().attach(optimizer)


ANOTHER = "projected by another null space since"


def other_space(learner: Learner) -> NullSpace:
    inputs = torch.randn(2, 7, generator=torch.Generator().manual_seed(1)).double()
    return null_space(learner.model, lambda: learner.model(inputs))


def stays(learner: Learner, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, learner.state()[name]) for name, v in before.items())


@pytest.mark.parametrize("every", [1, 2])
def test_two_spaces_do_not_take_turns_on_a_layer(every: int) -> None:
    """One after the other they may; the first again, after the second, would undo its work."""
    learner = Learner.drawn(0)
    one, two = (OPTIMIZERS["SGD"](learner) for _ in range(2))
    first = learner.space().attach(one, every)
    train(learner, one, every)
    second = other_space(learner).attach(two, every)
    train(learner, two, every)
    before = learner.state()
    with pytest.raises(NullSpaceError, match=ANOTHER):
        train(learner, one, 1)
    with pytest.raises(NullSpaceError, match=ANOTHER):
        first.project()
    train(learner, two, every)
    assert not stays(learner, before)
    before = learner.state()
    first.remove()  # has nothing of its own to project
    assert stays(learner, before)
    second.remove()
    learner.space().attach(one)
    train(learner, one, 2)


def test_a_space_that_waited_while_another_was_at_work_is_refused() -> None:
    """It counts displacements from when it was attached: the other's are among them."""
    learner = Learner.drawn(0)
    one, two = (OPTIMIZERS["SGD"](learner) for _ in range(2))
    spaces = learner.space(), other_space(learner)
    for space, optimizer in zip(spaces, (one, two), strict=True):
        space.attach(optimizer)
    train(learner, one, 1)
    with pytest.raises(NullSpaceError, match=ANOTHER):
        train(learner, two, 1)


def test_a_space_is_refused_after_another_that_is_let_go_at_once() -> None:
    learner = Learner.drawn(0)
    one, two = (OPTIMIZERS["SGD"](learner) for _ in range(2))
    learner.space().attach(one)
    train(learner, one, 1)
    with other_space(learner).keep(learner.model):
        train(learner, two, 1)
    gc.collect()
    with pytest.raises(NullSpaceError, match=ANOTHER):
        train(learner, one, 1)


def test_what_a_space_leaves_out_is_not_put_back_after_another_has_moved_it() -> None:
    """Nor does it go to where it began when that is removed."""
    learner = Learner.drawn(0)
    parts = [
        null_space(learner.model, lambda: learner.model(learner.old), include=[name])
        for name in ("0", "3")
    ]
    one, two = (OPTIMIZERS["SGD"](learner) for _ in range(2))
    handle = parts[0].attach(one)
    train(learner, one, 1)
    parts[1].attach(two)
    train(learner, two, 1)
    before = learner.state()
    with pytest.raises(NullSpaceError, match=r"parameter '3\.weight'.*" + ANOTHER):
        train(learner, one, 1)
    handle.remove()
    assert stays(learner, before)


def test_spaces_that_undo_nothing_may_take_turns() -> None:
    """Equal ones, one that keeps more before one that keeps less, and where weights were restored.

    Their keepers are made first: so the displacement of each has in it what the other has done.
    """
    learner = Learner.drawn(0)
    one, two = (OPTIMIZERS["SGD"](learner) for _ in range(2))
    space, other = learner.space(), other_space(learner)
    keepers = [copy.deepcopy(space).keep(learner.model), space.to("cpu").keep(learner.model)]
    space.attach(one)
    kept = learner.out()
    for _ in range(2):
        for keeper in keepers:
            with keeper:
                train(learner, two, 1)
        train(learner, one, 1)
    with space.merge(other).keep(learner.model):
        train(learner, two, 1)
    train(learner, one, 1)
    before = copy.deepcopy(learner.model.state_dict())
    with other.keep(learner.model):
        train(learner, two, 1)
    learner.model.load_state_dict(before)
    train(learner, one, 1)
    assert (learner.out() - kept).abs().max() < 1e-12


@pytest.mark.parametrize("every", [0, -1, True])
def test_every_is_a_count(every: object) -> None:
    learner = Learner.drawn(0)
    refused(learner, OPTIMIZERS["SGD"](learner), "every must be an integer >= 1", every=every)


def test_a_model_with_another_layer_is_refused() -> None:
    learner = Learner.drawn(0)
    space = learner.space()
    learner.model.append(nn.Linear(2, 2))
    with pytest.raises(NullSpaceError, match="6: absent against"):
        space.attach(torch.optim.SGD(learner.model.parameters(), lr=0.1))


@pytest.mark.parametrize("change", ["group", "layer"])
def test_a_change_behind_its_back_is_refused_before_the_step(change: str) -> None:
    learner = Learner.drawn(0)
    optimizer = OPTIMIZERS["SGD"](learner)
    learner.space().attach(optimizer)
    learner.loss().backward()
    if change == "group":
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    else:
        learner.model[0].weight = nn.Parameter(torch.zeros_like(learner.model[0].weight))
    before = learner.state()
    with pytest.raises(NullSpaceError, match="attach anew"):
        optimizer.step()
    assert all(torch.equal(value, learner.state()[name]) for name, value in before.items())


def test_a_layer_frozen_later_stays() -> None:
    learner = Learner.drawn(0)
    old, optimizer = learner.out(), OPTIMIZERS["AdamW, groups"](learner)
    learner.space().attach(optimizer)
    learner.model[0].requires_grad_(False)
    start = learner.state()
    train(learner, optimizer, 3)
    assert torch.allclose(learner.state()["0.weight"], start["0.weight"], rtol=0, atol=1e-12)
    assert (learner.out() - old).abs().max() <= KEPT


def test_a_space_on_another_device_is_refused() -> None:
    learner = Learner.drawn(0)
    space = learner.space().to("meta")
    with pytest.raises(NullSpaceError, match=r"on meta.*space\.to\('cpu'\)"):
        space.attach(OPTIMIZERS["SGD"](learner))
    with pytest.raises(NullSpaceError, match="on meta"):
        space.project_(learner.model)
