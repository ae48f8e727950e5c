"""Closed-form edits against a least-squares solution written out; what they keep and report."""

import json
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from teleport import NullSpace, NullSpaceError, null_space
from tests.support.examples import examples
from tests.support.keeping import Learner
from tests.support.strategies import seeds

few = examples(8)

KEPT = 1e-9
"""Absolute; numbers are near one, and well-conditioned draws magnify rounding by 1e4 at most."""


def extended(keys: Tensor) -> Tensor:
    return torch.cat([keys, torch.ones(len(keys), 1, dtype=keys.dtype)], dim=1)


def matrix(layer: nn.Linear) -> Tensor:
    return torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()


def written_out(start: Tensor, projector: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The change by a system for all its entries at once: ``C P`` as a vector, entry by entry.

    Among all least-squares solutions `torch.linalg.lstsq` (gelsd) gives the one of least norm.
    """
    d_out, d_in = start.shape
    _, vectors = torch.linalg.eigh(projector)
    free = vectors[:, -round(float(projector.trace())) :]
    system = torch.zeros(len(keys) * d_out, d_out * free.shape[1], dtype=start.dtype)
    wanted = torch.zeros(len(keys) * d_out, 1, dtype=start.dtype)
    for n, key in enumerate(extended(keys)):
        for i in range(d_out):
            row = n * d_out + i
            wanted[row] = values[n, i] - start[i] @ key
            for j in range(free.shape[1]):
                system[row, i * free.shape[1] + j] = free[:, j] @ key
    found = torch.linalg.lstsq(system, wanted, driver="gelsd").solution
    assert free.shape[1] < d_in
    return found.view(d_out, free.shape[1]) @ free.T


@pytest.mark.verifies("thm-keep")
@few
@given(seeds, st.integers(1, 6), st.sampled_from(["free", "dependent", "contradictory"]))
def test_an_edit_is_the_least_change_written_out(seed: int, count: int, kind: str) -> None:
    """Also of keys that repeat, or that no matrix maps to their values."""
    learner = Learner.drawn(seed)
    layer = learner.linears["3"]
    space, projector, start = learner.space(), learner.literal()["3"], matrix(layer)
    keys = torch.randn(count, 9, dtype=torch.float64)
    values = torch.randn(count, 8, dtype=torch.float64)
    if kind != "free":
        keys = torch.cat([keys, keys[:1]])
        values = torch.cat([values, values[:1] + (kind == "contradictory")])
    old = learner.out()
    done, _ = space.edit(learner.model, "3", keys, values)
    sizes = torch.linalg.svdvals(extended(keys[:count]) @ projector)
    assume(sizes[-1] > 1e-3)
    moved = matrix(layer) - start
    assert torch.allclose(moved, written_out(start, projector, keys, values), rtol=0, atol=KEPT)
    assert (learner.out() - old).abs().max() <= KEPT
    gaps = (values - layer(keys).detach()).norm(dim=1)
    assert torch.allclose(gaps, torch.tensor(done.residual, dtype=gaps.dtype), rtol=0, atol=KEPT)
    assert (done.unmet > 1e-6) == (kind == "contradictory")
    assert done.used == count
    assert done.moved == pytest.approx(float(moved.norm()), rel=1e-9)


@pytest.mark.verifies("thm-keep")
@few
@given(seeds, st.integers(2, 4))
def test_edits_in_sequence_keep_the_old_data_and_each_other(seed: int, count: int) -> None:
    learner = Learner.drawn(seed)
    space, layer, old = learner.space(), learner.linears["3"], learner.out()
    pairs = []
    for _ in range(count):
        key = torch.randn(1, 9, dtype=torch.float64)
        value = torch.randn(1, 8, dtype=torch.float64)
        free = space.bases["3"].project(extended(key)).norm()
        assume(free > 1e-2)
        done, space = space.edit(learner.model, "3", key, value)
        assert done.unmet <= KEPT
        pairs.append((key, value))
    for key, value in pairs:
        assert (layer(key) - value).abs().max() <= 1e-7
    assert (learner.out() - old).abs().max() <= 1e-7


def test_the_space_before_an_edit_stays_as_it_was() -> None:
    learner = Learner.drawn(0)
    space = learner.space()
    ranks = {name: basis.rank for name, basis in space.bases.items()}
    keys, values = torch.randn(1, 9).double(), torch.randn(1, 8).double()
    _, after = space.edit(learner.model, "3", keys, values)
    assert {name: basis.rank for name, basis in space.bases.items()} == ranks
    assert after.bases["3"].rank == ranks["3"] + 1
    assert after.bases["0"] is space.bases["0"]
    after.attach(torch.optim.SGD(learner.model.parameters(), lr=0.1))


@few
@given(seeds)
def test_keys_that_the_old_data_hold_are_a_residual_and_not_forced(seed: int) -> None:
    """An old input as a key cannot be met, and a new one beside it is met all the same."""
    learner = Learner.drawn(seed)
    layer, space = learner.linears["3"], learner.space()
    old_keys = learner.model[:3](learner.old).detach()
    keys = torch.cat([old_keys[:1], torch.randn(1, 9, dtype=torch.float64)])
    values = layer(keys).detach() + 1.0
    before, old = matrix(layer), learner.out()
    assume(space.bases["3"].project(extended(keys[1:])).norm() > 1e-2)
    alone, _ = space.edit(learner.model, "3", keys[:1], values[:1])
    assert torch.allclose(matrix(layer), before, rtol=0, atol=1e-12)
    assert alone.unmet == pytest.approx(1.0)
    assert alone.used == 0
    both, _ = space.edit(learner.model, "3", keys, values)
    assert both.residual[0] == pytest.approx(both.wanted[0])
    assert both.residual[1] <= KEPT
    assert (learner.out() - old).abs().max() <= KEPT


def test_rcond_gives_up_what_would_take_large_weights() -> None:
    learner = Learner.drawn(0)
    space, layer = learner.space(), learner.linears["3"]
    old_key = learner.model[:3](learner.old).detach()[:1]
    near = old_key + 1e-5 * torch.randn(1, 9, dtype=torch.float64)
    values, copied = layer(near).detach() + 1.0, learner.copy()
    forced, _ = space.edit(learner.model, "3", near, values)
    given_up, _ = space.edit(copied.model, "3", near, values, rcond=1e-3)
    assert forced.unmet <= 1e-6
    assert forced.moved > 1e3
    assert given_up.unmet == pytest.approx(1.0)
    assert given_up.moved <= 1e-12


def test_a_frozen_bias_is_a_constant() -> None:
    learner = Learner.drawn(1)
    layer = learner.linears["3"]
    layer.bias.requires_grad_(False)
    bias, space = layer.bias.clone(), learner.space()
    keys, values = torch.randn(2, 9).double(), torch.randn(2, 8).double()
    done, _ = space.edit(learner.model, "3", keys, values)
    assert done.unmet <= KEPT
    assert torch.equal(layer.bias, bias)
    assert torch.allclose(layer(keys), values, atol=1e-8)


def test_a_layer_without_bias_is_edited_whatever_the_default_device() -> None:
    layer = nn.Linear(5, 3, bias=False)
    keys, values, rows = torch.randn(1, 5), torch.randn(1, 3), torch.randn(2, 5)
    with torch.device("meta"):
        null_space(layer, lambda: layer(rows)).edit(layer, "", keys, values)
    assert torch.allclose(layer(keys), values, atol=1e-5)


def test_float32_weights_are_edited_to_their_rounding() -> None:
    torch.manual_seed(0)
    model, old = nn.Sequential(nn.Linear(32, 16)), torch.randn(8, 32)
    space, out = null_space(model, [lambda: model(old)]), model(old).detach()
    keys, values = torch.randn(6, 32), torch.randn(6, 16)
    done, _ = space.edit(model, "0", keys, values)
    assert done.unmet <= 1e-5
    assert (model(old) - out).abs().max() <= 1e-5
    assert "6 keys in 6 free directions" in str(done)
    assert json.loads(json.dumps(done.to_dict()))["unmet"] == done.unmet


def test_more_keys_than_there_is_room_are_refused() -> None:
    learner = Learner.drawn(0, samples=6)
    start = learner.state()
    keys, values = torch.randn(5, 9).double(), torch.randn(5, 8).double()
    with pytest.raises(NullSpaceError, match=r"5 independent directions do not fit.*which has 4"):
        learner.space().edit(learner.model, "3", keys, values)
    assert all(torch.equal(value, learner.state()[name]) for name, value in start.items())


@pytest.mark.parametrize(
    ("keys", "values", "match"),
    [
        (torch.zeros(2, 8), torch.zeros(2, 8), r"keys of layer '3' must be \[2, 9\]"),
        (torch.zeros(9), torch.zeros(8), r"keys of layer '3' must be \[n, 9\]"),
        (torch.zeros(2, 9), torch.zeros(3, 8), r"values of layer '3' must be \[2, 8\].*\[3, 8\]"),
        (torch.zeros(0, 9), torch.zeros(0, 8), "keys of layer '3' must be"),
        (torch.full((1, 9), torch.nan), torch.zeros(1, 8), "keys of layer '3' must be finite"),
        (torch.zeros(1, 9), torch.full((1, 8), torch.inf), "values of layer '3' must be finite"),
    ],
)
def test_wrong_keys_and_values_are_refused(keys: Tensor, values: Tensor, match: str) -> None:
    learner = Learner.drawn(0)
    with pytest.raises(ValueError, match=match):
        learner.space().edit(learner.model, "3", keys.double(), values.double())


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (torch.ones(2, 9, dtype=torch.int64), "torch.int64"),
        (torch.ones(2, 9) + 0j, "torch.complex"),
        ([[0.0] * 9], "list"),
        (torch.ones(2, 9).numpy(), "ndarray"),
    ],
)
def test_what_is_no_tensor_of_real_numbers_is_refused(keys: Any, found: str) -> None:
    """A complex one lost its imaginary part."""
    learner = Learner.drawn(0)
    with pytest.raises(ValueError, match=f"keys of layer '3' must be a tensor of real.*{found}"):
        learner.space().edit(learner.model, "3", keys, torch.zeros(2, 8))


def test_an_edit_that_leaves_the_range_of_half_precision_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).half()
    x, key = torch.randn(3, 6).half(), (1e-4 * torch.randn(1, 6)).half()
    space, before = null_space(model, lambda: model(x)), model[0].weight.detach().clone()
    with pytest.raises(NullSpaceError, match=r"leave the range of torch\.float16"):
        space.edit(model, "0", key, torch.full((1, 4), 1e3).half())
    assert torch.equal(model[0].weight, before)
    assert space.edit(model, "0", key, model(key).detach() + 1e-3)[0].unmet < 0.1


def test_other_layers_are_refused() -> None:
    learner = Learner.drawn(0)
    keys, values = torch.zeros(1, 9).double(), torch.zeros(1, 8).double()
    with pytest.raises(NullSpaceError, match=r"no layer '4' may move.*there are 0, 3, 5"):
        learner.space().edit(learner.model, "4", keys, values)
    with pytest.raises(NullSpaceError, match=r"no layer '2' may move.*no rule for LayerNorm"):
        learner.space().edit(learner.model, "2", keys, values)
    with pytest.raises(ValueError, match=r"rcond must be in \[0, 1\)"):
        learner.space().edit(learner.model, "3", keys, values, rcond=1.0)


def test_a_layer_that_is_no_matrix_times_rows_is_refused() -> None:
    model, x = nn.Sequential(nn.Conv1d(2, 3, 2)).double(), torch.randn(1, 2, 2).double()
    space: NullSpace = null_space(model, [lambda: model(x)])
    with pytest.raises(NullSpaceError, match=r"layer '0' \(Conv\) is no linear layer"):
        space.edit(model, "0", torch.zeros(1, 4).double(), torch.zeros(1, 3).double())
