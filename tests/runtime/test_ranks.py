"""Two ranks teleport exactly as one process on the joined batch, and none waits for the other."""

from typing import Any

import pytest
import torch
from torch import nn

from teleport import Teleporter, UnsupportedModelError
from tests.support.ranks import (
    CALLS,
    CASES,
    METHODS,
    PLACES,
    SAME,
    SIZE,
    Ranks,
    assert_same_report,
    attached,
    batch,
    branched,
    branches,
    build,
    case,
    found_by,
    in_train_mode,
    keeping,
    loss_of,
    parameters,
    parts,
    run,
    space_of,
    training_goes_on,
)

TANGENTS = 3
"""The call of the closure that pushes tangents, which ends before there is a loss."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What both ranks found: one dictionary each, a key per scenario."""
    return found_by(run, SIZE, tmp_path_factory.mktemp("ranks"))


def of(ranks: Ranks, name: str) -> list[Any]:
    """What each rank found in one scenario."""
    for rank in ranks:
        assert name in rank, f"not reached: {list(rank)[-1]!r} broke off"
        assert not isinstance(rank[name], str), rank[name]
    return [rank[name] for rank in ranks]


def same(ranks: Ranks, name: str, wanted: dict[str, Any], rtol: float = 1e-10) -> None:
    """Both ranks say and hold the same, to the last bit; one process the same to rounding."""
    first, second = of(ranks, name)
    assert first["report"] == second["report"]
    assert torch.equal(first["parameters"], second["parameters"])
    assert not wanted["report"]["rolled_back"], wanted["report"]["reason"]
    assert wanted["report"]["steps"] > 0
    assert_same_report(first["report"], wanted["report"], rtol)
    apart = (first["parameters"] - wanted["parameters"]).norm()
    assert apart <= rtol * wanted["parameters"].norm()


@pytest.mark.verifies("thm-invariance", "thm-survivor")
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{CASES[i][2]}")
def test_two_ranks_are_one_process_on_the_joined_batch(ranks: Ranks, number: int) -> None:
    wanted = case(number, lambda t: t, lambda model: model)
    same(ranks, f"case {number}", wanted, SAME[CASES[number][1]])


def test_unequal_shards_count_as_ddp_counts_them(ranks: Ranks) -> None:
    """The mean of the ranks' losses, whatever their sizes."""
    same(ranks, "unequal", parts(lambda t: t, build("perceptron"), [17, 7]))


def test_ranks_may_have_lists_of_different_lengths(ranks: Ranks) -> None:
    """Rank 0 has three closures and rank 1 two: the mean over each rank, then over ranks."""
    model, (x, y) = build("perceptron"), batch()

    def mean(start: int, sizes: list[int]) -> Any:
        end = start + sum(sizes)
        pieces = zip(x[start:end].split(sizes), y[start:end].split(sizes), strict=True)
        closures = [loss_of(model, a, b) for a, b in pieces]
        return lambda: sum(f() for f in closures) / len(closures)

    report = Teleporter(model, growth=2.0).step([mean(0, [4, 4, 4]), mean(12, [6, 6])])
    wanted = {"report": report.to_dict() | {"seconds": 0.0}, "parameters": parameters(model)}
    same(ranks, "lists", wanted)


def test_batch_statistics_are_each_shard_s_and_stay_where_they_are(ranks: Ranks) -> None:
    x, y = batch()
    wanted = in_train_mode(build("perceptron"), list(zip(x.chunk(2), y.chunk(2), strict=True)))
    same(ranks, "train mode", wanted)
    assert all(rank["state kept"] for rank in of(ranks, "train mode"))


def test_ranks_may_go_different_ways_through_the_model(ranks: Ranks) -> None:
    """A layer called, or leaking, or with inputs that depend on parameters, on one rank only."""
    x, y = batch()
    wanted = branches(branched(), list(zip((0, 1), x.chunk(2), y.chunk(2), strict=True)))
    moved = {layer["name"]: layer["status"] for layer in wanted["report"]["layers"]}
    assert moved["ways.0"] == moved["head"] == "moved"
    assert moved["ways.1"].startswith("frozen")
    same(ranks, "branches", wanted)


def test_the_first_rank_s_arithmetic_counts(ranks: Ranks) -> None:
    """Ranks on other hardware round otherwise; parameters must not drift apart."""
    wanted = case(CASES.index(("perceptron", torch.float64, {})), lambda t: t, lambda m: m)
    first, second = of(ranks, "arithmetic")
    assert first["report"] == second["report"]
    assert torch.equal(first["parameters"], second["parameters"])
    apart = (first["parameters"] - wanted["parameters"]).norm()
    assert apart <= 1e-10 * wanted["parameters"].norm()


def test_training_goes_on_and_gradients_are_still_shared(ranks: Ranks) -> None:
    wanted = training_goes_on(build("perceptron"), *batch())
    same(ranks, "training", wanted, rtol=1e-7)  # three steps of Adam: its division by small roots
    first, second = of(ranks, "training")
    assert torch.equal(first["grads"], second["grads"])
    assert (first["grads"] - wanted["grads"]).norm() <= 1e-7 * wanted["grads"].norm()
    assert first["state kept"]
    assert second["state kept"]


@pytest.mark.parametrize("name", ["space", "space, both"])
def test_a_null_space_is_that_of_all_data(ranks: Ranks, name: str) -> None:
    """Whoever has it: in the first case rank 1 has none."""
    x = batch()[0]
    model = build("perceptron" if name == "space" else "sequences")
    wanted = space_of(model, [x], **({"tau": 0.99} if name == "space" else {}))
    first, second = of(ranks, name)
    assert list(first) == list(wanted)
    for layer, (projector, values, counts) in wanted.items():
        assert all(torch.equal(a, b) for a, b in zip(first[layer], second[layer], strict=True))
        assert torch.equal(first[layer][2], counts)
        assert (first[layer][0] - projector).norm() <= 1e-9
        assert (first[layer][1] - values).norm() <= 1e-12 * values.norm()


@pytest.mark.verifies("thm-keep")
def test_a_null_space_keeps_what_all_ranks_know(ranks: Ranks) -> None:
    x, y = batch()
    model = build("perceptron")
    wanted = keeping(model, x[:8], [x[:4], x[4:8]], x, y)
    first, second = of(ranks, "keeping")
    assert (parameters(model) - parameters(build("perceptron"))).norm() > 0.1
    assert torch.equal(first["at"], second["at"])
    assert (first["at"] - wanted["at"]).norm() <= 1e-7 * wanted["at"].norm()
    assert max(first["change"], second["change"]) <= 1e-4


@pytest.mark.verifies("thm-keep")
def test_attached_to_an_optimizer_it_keeps_what_all_ranks_know(ranks: Ranks) -> None:
    x, y = batch()
    model = build("perceptron")
    wanted = attached(model, x[:8], [x[:4], x[4:8]], x, y)
    first, second = of(ranks, "attached")
    assert (parameters(model) - parameters(build("perceptron"))).norm() > 0.1
    assert torch.equal(first["at"], second["at"])
    assert (first["at"] - wanted["at"]).norm() <= 1e-7 * wanted["at"].norm()
    assert max(first["change"], second["change"]) <= 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_an_exception_on_one_rank_is_one_on_all(ranks: Ranks, method: str) -> None:
    """At whichever call of the closure; each rank is as it was."""
    for call in CALLS[method]:
        first, second = of(ranks, f"raise, {method}, {call}")
        assert second["calls"] == call, "the closure is called less often than the test believes"
        assert second["error"] == ("TroubleError", "no more data")
        kind, text = first["error"]
        assert kind == "TeleportError"
        assert "on rank 1: TroubleError: no more data" in text
        assert first["as before"]
        assert second["as before"]


def test_an_interrupt_on_one_rank_ends_all(ranks: Ranks) -> None:
    first, second = of(ranks, "interrupt, tangent, 2")
    assert second["error"][0] == "KeyboardInterrupt"
    assert first["error"][0] == "TeleportError"
    assert first["as before"]
    assert second["as before"]


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_of_nan_on_one_rank_is_one_on_all(ranks: Ranks, method: str) -> None:
    """At the start an error that names the rank, later a rollback, as in one process."""
    for call in CALLS[method]:
        if (method, call) == ("tangent", TANGENTS):
            continue
        first, second = of(ranks, f"nan, {method}, {call}")
        assert first["as before"]
        assert second["as before"]
        if call == 1:
            assert first["error"][0] == second["error"][0] == "NonFiniteLossError"
            assert "on rank 1" in first["error"][1]
        else:
            assert first["error"] == second["error"] == ("nothing", "")
            assert first["rolled back"]
            assert second["rolled back"]
            assert (
                first["reason"] == second["reason"] == "the loss became NaN or infinite on the way"
            )


def test_if_one_rank_has_no_forward_mode_none_uses_it(ranks: Ranks) -> None:
    wanted = case(CASES.index(("perceptron", torch.float64, {"method": "double_backward"})),
                  lambda t: t, lambda model: model)  # fmt: skip
    first, second = of(ranks, "fallback")
    assert torch.equal(first["parameters"], second["parameters"])
    # The second has a function of its own: a difference of gradients keeps ten digits.
    ways = ("directions by double backward", "directions by differences of gradients")
    for rank, way in zip((first, second), ways, strict=True):
        assert way in rank["report"]["reason"]
        apart = (rank["parameters"] - wanted["parameters"]).norm()
        assert apart <= 1e-9 * wanted["parameters"].norm()


@pytest.mark.parametrize("place", PLACES)
def test_an_error_of_the_package_on_one_rank_ends_all(ranks: Ranks, place: str) -> None:
    """Wherever it happens; and afterwards they understand each other again."""
    first, second = of(ranks, f"memory, {place}")
    assert second["error"] == ("MemoryError", "no room")
    assert first["error"][0] == "TeleportError"
    assert "on rank 1: MemoryError: no room" in first["error"][1]
    assert first["as before"]
    assert second["as before"]
    assert first["growth"] == second["growth"] == pytest.approx(2.0)


def test_ranks_that_ask_for_different_things_are_refused(ranks: Ranks) -> None:
    first, second = of(ranks, "disagreeing")
    for rank in (first, second):
        for kind, text in rank[:2]:
            assert kind == "TeleportError"
            assert "the ranks do not ask for the same" in text
    assert first[2][0] == "ValueError"
    assert second[2][0] == "TeleportError"
    assert "ValueError: step() needs at least one closure" in second[2][1]


def test_what_cannot_teleport_together_says_what_to_do(ranks: Ranks) -> None:
    for rank in of(ranks, "refused"):
        assert {kind for kind, _ in rank.values()} == {"UnsupportedModelError"}
        assert "wrap the whole model" in rank["part"][1]
    with pytest.raises(UnsupportedModelError, match=r"teleport model\.module"):
        Teleporter(nn.DataParallel(build("perceptron")))


def test_ranks_agree_to_the_bit_under_autocast(ranks: Ranks) -> None:
    first, second = of(ranks, "autocast")
    assert first["report"] == second["report"]
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["report"]["steps"] == 1
    after, before = (first["report"][f"grad_norm_{when}"] for when in ("after", "before"))
    assert after / before == pytest.approx(2.0, rel=4 * torch.finfo(torch.bfloat16).eps)


def test_a_compiled_wrapper_is_a_wrapper(ranks: Ranks) -> None:
    wanted = case(CASES.index(("perceptron", torch.float64, {})), lambda t: t, lambda m: m)
    first, second = of(ranks, "compiled")
    assert torch.equal(first["parameters"], second["parameters"])
    apart = (first["parameters"] - wanted["parameters"]).norm()
    assert apart <= 1e-10 * wanted["parameters"].norm()


def test_names_leave_the_wrapper_out(ranks: Ranks) -> None:
    for wrapped, plain in of(ranks, "names"):
        assert wrapped == plain
