"""Capture: the tape of a closure holds its layers' inputs, cotangents and tangents."""

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport.layers.support import WeightMatrix, cover
from teleport.objective import EUCLIDEAN
from teleport.recording import Tape, push_tangents, record
from tests.support.fingerprint import fingerprint
from tests.support.networks import GRAPHS, Task, task, without_dropout
from tests.support.strategies import (
    Case,
    Problem,
    cases,
    gradient,
    join_like,
    layer_rows,
    matrix_gradients,
    opposed,
)

TOLERANCE = 1e-12
"""A few hundred roundings in float64 of gradients of size 1."""


def tape_of(problem: Problem | Task, once: bool = False) -> Tape:
    return record(problem.model, cover(problem.model).sites, problem.closure, once)


def drive_by_gradient(tape: Tape, block: WeightMatrix) -> Callable[[], Iterator[Tensor]]:
    return partial(tape.drive_of, block, block.part.split(tape.weight_gradient(block)))


def products(tape: Tape) -> list[Tensor]:
    return [tape.deltas(b).T @ tape.rows(b) for b in tape.blocks]


def close(found: Tensor, wanted: Tensor, size: float | None = None) -> bool:
    scale = 1.0 + float(wanted.norm()) if size is None else size
    return bool((found - wanted).norm() <= TOLERANCE * scale)


@pytest.mark.verifies("thm-span")
@given(cases())
def test_cotangents_times_inputs_are_the_gradient(case: Case) -> None:
    problem = case.build()
    assert all(map(close, products(tape_of(problem)), matrix_gradients(problem)))


@pytest.mark.verifies("thm-span")
@given(cases())
def test_gradient_rows_lie_in_the_span_of_the_inputs(case: Case) -> None:
    problem = case.build()
    for own, rows in zip(matrix_gradients(problem), layer_rows(problem), strict=True):
        coefficients = torch.linalg.lstsq(rows.T, own.T, driver="gelsd").solution
        assert (rows.T @ coefficients - own.T).norm() <= 1e-9 * (1 + own.norm())


@pytest.mark.verifies("thm-span")
@pytest.mark.parametrize("name", GRAPHS)
def test_gradient_of_any_graph_is_on_the_tape(name: str) -> None:
    problem = task(name)
    without_dropout(problem.model)
    tape = tape_of(problem)
    own = gradient(problem.model, problem.closure)
    wanted = dict(zip(problem.model.parameters(), own, strict=True))
    for block, product in zip(tape.blocks, products(tape), strict=True):
        assert close(product, block.part.of(wanted))
        assert close(tape.weight_gradient(block), block.part.of(wanted))
    for parameter, own in zip(tape.others, tape.other_gradients, strict=True):
        assert close(own, wanted[parameter])


@pytest.mark.parametrize("once", [False, True], ids=["by drives", "by products of cotangents"])
@given(left=st.floats(-6.0, 0.0), scale=st.floats(-25.0, 15.0))
@example(left=-4.0, scale=-14.0)
def test_a_norm_by_gram_matrices_is_right_where_rows_cancel_or_leave_the_range(
    once: bool, left: float, scale: float
) -> None:
    tape = tape_of(opposed(10.0**left, 10.0**scale), once)
    if not once:
        tape.backward()
    for block in tape.blocks[1:]:  # the first has more rows than columns
        share = tape.shares()[block]
        gradient = tape.deltas(block).double().mT @ tape.rows(block).double()
        # A sum in float64 of a hundred products that are 1 / left² times as large as it.
        rounding = 8 * torch.finfo(torch.float64).eps / 10.0 ** (2 * left)
        allowed = {"rel": max(1e-5, rounding), "abs": torch.finfo(torch.float32).tiny}
        assert share == pytest.approx(float(gradient.square().sum()), **allowed)


@pytest.mark.parametrize("scale", [1.0, 2.0**-14])
def test_a_drive_is_the_same_whether_a_norm_was_taken_by_it_or_not(scale: float) -> None:
    tape = tape_of(opposed(1.0, 1.0))

    def drives() -> list[Tensor]:
        return [torch.cat(list(tape.drive(b, EUCLIDEAN, scale))) for b in tape.blocks]

    alone = drives()
    tape.backward()
    tape.norm_squared()
    known = [drive.clone() for drive in tape._driven.values()]
    with_norm = drives()
    assert len(known) == 1
    assert not tape._driven  # they were taken from there
    assert all(map(torch.equal, alone, with_norm))
    assert torch.equal(scale * known[0], with_norm[1])


def test_blocks_whose_rows_are_the_same_have_one_gram_matrix() -> None:
    tape = tape_of(task("attention"))
    grams = {block.name: tape.row_gram(block) for block in tape.blocks}
    assert grams["q"] is grams["k"] is grams["v"]
    assert len({id(gram) for gram in grams.values()}) == len(grams) - 2
    assert all(torch.equal(tape.rows(b) @ tape.rows(b).mT, grams[b.name]) for b in tape.blocks)


@pytest.mark.parametrize("left", [1.0, 1e-1, 1e-2, 1e-3])
def test_it_is_seen_where_little_is_left_of_a_gradient(left: float) -> None:
    tape = tape_of(opposed(left, 1.0, torch.float64))
    tape.backward()
    assert tape.cancels() == (left < 0.05)


@given(cases())
def test_rows_are_the_inputs_of_each_layer(case: Case) -> None:
    problem = case.build()
    tape = tape_of(problem)
    assert all(map(torch.equal, map(tape.rows, tape.blocks), layer_rows(problem)))


@given(cases())
def test_loss_is_that_of_the_closure(case: Case) -> None:
    problem = case.build()
    assert torch.equal(tape_of(problem).loss.detach(), problem.closure().detach())


@given(cases())
def test_backward_uses_the_matrices_of_the_moment(case: Case) -> None:
    """Doubling all weights of the backward pass multiplies δ of layer l by 2 per layer above it."""
    problem = case.build()
    tape = tape_of(problem)
    before = [tape.deltas(b).clone() for b in tape.blocks]
    for block in tape.blocks:
        block.part.write(2 * block.part.matrix())
    tape.backward()
    for above, (block, old) in enumerate(zip(reversed(tape.blocks), reversed(before), strict=True)):
        assert torch.equal(tape.deltas(block), 2**above * old)


@pytest.mark.verifies("thm-survivor")
@given(cases())
def test_input_tangents_are_directional_derivatives(case: Case) -> None:
    """ẋ along the gradient, against forward-mode through the whole chain by torch.func."""
    problem = case.build()
    tape = tape_of(problem)
    drive = {b: drive_by_gradient(tape, b) for b in tape.blocks}
    push_tangents(tape, problem.model, problem.closure, drive, {})
    names = [name for name, _ in problem.model.named_parameters()]
    velocity = dict(zip(names, gradient(problem.model, problem.closure), strict=True))
    state = {n: p.detach() for n, p in problem.model.named_parameters()}

    def inputs(parameters: dict[str, Tensor]) -> list[Tensor]:
        seen: list[Tensor] = []
        hooks = [
            m.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for m in problem.linears
        ]
        torch.func.functional_call(problem.model, parameters, problem.x)
        [hook.remove() for hook in hooks]
        return seen

    _, wanted = torch.func.jvp(inputs, (state,), (velocity,))
    for block, x_dot in zip(tape.blocks[1:], wanted[1:], strict=True):
        flat = x_dot.reshape(-1, x_dot.shape[-1])
        assert close(tape.tangents(block)[:, : flat.shape[1]], flat)


@given(cases(depths=(3, 5)), st.integers(0, 2))
def test_the_tangent_pass_ends_at_the_last_wanted_call(case: Case, last: int) -> None:
    problem = case.build()
    tape = tape_of(problem)
    asked = []

    def drive(block: WeightMatrix) -> Iterator[Tensor]:
        asked.append(tape.blocks.index(block))
        yield from tape.drive_of(block, block.part.pieces())

    drives = {b: partial(drive, b) for b in tape.blocks}
    push_tangents(tape, problem.model, problem.closure, drives, {}, wanted={tape.blocks[last]})
    assert asked == list(range(last))
    kept = [tape.tangents(b) is not None for b in tape.blocks]
    assert kept == [0 < n == last for n in range(len(tape.blocks))]


def test_in_place_activations_do_not_reach_what_was_recorded() -> None:
    """The tangent pass needs outputs that the model may have overwritten."""

    def tangents(inplace: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 20), nn.LeakyReLU(0.1, inplace), nn.Linear(20, 20), nn.ReLU(inplace),
            nn.Linear(20, 3),
        ).double()  # fmt: skip
        x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

        def closure() -> Tensor:
            return (model(x) - y).square().mean()

        tape = record(model, cover(model).sites, closure)
        drive = {b: drive_by_gradient(tape, b) for b in tape.blocks}
        push_tangents(tape, model, closure, drive, {})
        return [tape.tangents(b) for b in tape.blocks[1:]]

    pairs = zip(tangents(inplace=True), tangents(inplace=False), strict=True)
    assert all(torch.equal(one, other) and bool(one.any()) for one, other in pairs)


@pytest.mark.verifies("thm-fixed")
@given(cases())
def test_only_the_first_layer_has_inputs_without_tangent(case: Case) -> None:
    problem = case.build()
    tape = tape_of(problem)
    drive = {b: partial(tape.drive_of, b, b.part.pieces()) for b in tape.blocks}
    push_tangents(tape, problem.model, problem.closure, drive, {})
    assert tape.tangents(tape.blocks[0]) is None
    assert not tape.depends_on_parameters(tape.blocks[0])
    assert all(tape.depends_on_parameters(b) for b in tape.blocks[1:])


@pytest.mark.parametrize("name", GRAPHS)
def test_recording_leaves_the_model_as_it_was(name: str) -> None:
    problem = task(name)
    problem.model.eval()  # no BatchNorm statistics: those are the transaction's business
    before = fingerprint(problem.model)
    tape_of(problem)
    assert fingerprint(problem.model) == before


@pytest.mark.parametrize("name", GRAPHS)
def test_a_tape_that_nobody_holds_leaves_no_memory(name: str) -> None:
    """A cycle through the graph is one that Python's collector does not see."""
    tape = tape_of(task(name))
    tape.backward()
    left = [weakref.ref(call) for call in tape.calls]
    assert len(left) >= 2
    del tape
    gc.collect()
    assert [call() for call in left if call() is not None] == []


def test_a_layer_without_effect_on_the_loss_has_no_gradient() -> None:
    """An auxiliary head that is called but not used: common, and no reason to fail."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.extra = (nn.Linear(3, 3).double() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.body(x))
            self.extra(h)
            return self.head(h)

    model, x = Auxiliary(), torch.randn(2, 3, dtype=torch.float64)
    tape = record(model, cover(model).sites, lambda: model(x).square().mean())
    extra = next(b for b in tape.blocks if b.name == "extra")
    assert not tape.deltas(extra).any()


def test_layers_that_share_a_weight_but_not_the_bias_are_no_blocks() -> None:
    coverage = cover(GRAPHS["tied"]())
    assert [b.name for b in coverage.blocks] == ["embed", "head"]
    assert coverage.frozen == dict.fromkeys(
        ["one", "two"], "shares a parameter with another layer in part"
    )


def test_layers_that_share_everything_are_one_block() -> None:
    model = GRAPHS["tied"]()
    model.two.bias = model.one.bias
    assert [b.name for b in cover(model).blocks] == ["embed", "one", "head"]
    assert not cover(model).frozen


def test_block_matrix_holds_weight_and_bias() -> None:
    layer = nn.Linear(3, 2)
    (block,) = cover(nn.Sequential(layer)).blocks
    wanted = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    assert torch.equal(block.part.matrix(), wanted)
    assert block.parameters == (layer.weight, layer.bias)


def test_join_like_is_the_inverse_of_splitting() -> None:
    problem = Case((2, 3, 1), (True, False), seed=1).build()
    parts = join_like(problem, list(problem.model.parameters()))
    assert [tuple(p.shape) for p in parts] == [(3, 3), (1, 3)]
