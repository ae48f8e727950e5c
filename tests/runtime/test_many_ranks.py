"""Any number of ranks, replicated or sharded, teleports to the bit as one process does.

Four processes that each load torch and meet every scenario are for the slow tier; the quick one has
the two of `test_ranks.py`.
"""

from typing import Any

import pytest
import torch
from torch.distributed.pipelining import SplitPoint, pipeline

from teleport import Teleporter, UnsupportedModelError, null_space
from teleport.runtime.wrappers import refuse_pipeline
from tests.support.many_ranks import (
    CHOSEN,
    PAIRS,
    SHARDED,
    SHARDS,
    SIZE,
    one_process,
    run,
    trained_in_one,
)
from tests.support.ranks import (
    SAME,
    Ranks,
    assert_same_report,
    batch,
    build,
    found_by,
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What the four ranks found: one dictionary each, a key per scenario."""
    return found_by(run, SIZE, tmp_path_factory.mktemp("ranks"))


def of(ranks: Ranks, name: str, size: int = SIZE) -> list[Any]:
    """What the first ranks found in one scenario."""
    for rank in ranks[:size]:
        assert name in rank, f"not reached: {rank[list(rank)[-1]]}"
        assert not isinstance(rank[name], str), rank[name]
    return [rank[name] for rank in ranks[:size]]


@pytest.mark.slow
@pytest.mark.verifies("thm-invariance", "thm-survivor")
@pytest.mark.parametrize(("shards", "name"), PAIRS)
def test_ranks_are_one_process_with_their_closures_in_a_list(
    ranks: Ranks, shards: str, name: str
) -> None:
    """To the last bit: weights, and every number of the report."""
    wanted = one_process(name, SHARDS[shards])
    assert not wanted["report"]["rolled_back"], wanted["report"]["reason"]
    assert wanted["report"]["steps"] > 0
    for found in of(ranks, f"{shards}, {name}", len(SHARDS[shards])):
        assert torch.equal(found["parameters"], wanted["parameters"])
        assert found["report"] == wanted["report"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_four_ranks_are_one_process_on_the_joined_batch(ranks: Ranks, name: str) -> None:
    """To rounding only: products of other shapes round otherwise."""
    wanted, rtol = one_process(name, [sum(SHARDS["four"])]), SAME[CHOSEN[name][1]]
    found = of(ranks, f"four, {name}")[0]
    assert_same_report(found["report"], wanted["report"], rtol)
    apart = (found["parameters"] - wanted["parameters"]).norm()
    assert apart <= rtol * wanted["parameters"].norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_a_model_of_fsdp2_teleports_as_one_process(ranks: Ranks, name: str) -> None:
    """To the last bit; and it goes on to be one of FSDP2, which trains."""
    wanted, trained = trained_in_one(name)
    for found in of(ranks, f"sharded, {name}", 2):
        assert torch.equal(found["parameters"], wanted["parameters"])
        assert found["report"] == wanted["report"]
        assert found["as FSDP2"]
        rtol = SAME[CHOSEN[name][1]]
        assert (found["trained"] - trained).norm() <= rtol * trained.norm()


@pytest.mark.slow
def test_shards_stay_as_they_were_where_a_teleport_fails(ranks: Ranks) -> None:
    first, second = of(ranks, "trouble", 2)
    assert second["error"] == ("TroubleError", "no more data")
    assert first["error"][0] == "TeleportError"
    assert "on rank 1: TroubleError: no more data" in first["error"][1]
    for rank in (first, second):
        assert rank["as before"]
        assert rank["rolled back"]


REFUSED = {
    "space": "layer '0' is sharded by FSDP2 (fully_shard)",
    "supported": "before fully_shard, or on a plain copy",
    "rival": "is sharded by FSDP2",
    "optimizer": "objective='preconditioned' and growth='auto' read the state of the optimizer",
    "mixed": "the model has a MixedPrecisionPolicy of FSDP2",
    "partly": "parameter '1.weight' is not sharded while others are",
    "hooked": "parameter '3.weight' has a gradient hook",
    "tensor": "the weights of layer '3' are DTensors (tensor parallelism",
    "tensor, space": "before parallelize_module",
    "flat": "the model is in FullyShardedDataParallel (FSDP1)",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_gathered_is_refused_by_name(ranks: Ranks, case: str) -> None:
    for rank in of(ranks, "refused", 2):
        kind, text = rank[case]
        assert kind == "UnsupportedModelError", text
        assert REFUSED[case] in text


@pytest.mark.slow
def test_a_mesh_of_two_dimensions_is_refused_by_name(ranks: Ranks) -> None:
    for kind, text in of(ranks, "two dimensions"):
        assert kind == "UnsupportedModelError"
        assert "on a mesh of 2 dimensions (HSDP" in text


def test_a_pipeline_is_refused_by_name() -> None:
    model, x = build("perceptron"), batch()[0]
    whole = pipeline(model, (x,), split_spec={"3": SplitPoint.BEGINNING})
    with pytest.raises(UnsupportedModelError, match="Pipe is a part of a pipeline"):
        Teleporter(whole)
    with pytest.raises(UnsupportedModelError, match="before it is split"):
        null_space(whole, [lambda: whole(x)])
    stage = type("PipelineStage", (), {"__module__": "torch.distributed.pipelining.stage"})
    with pytest.raises(UnsupportedModelError, match="PipelineStage is a part of a pipeline"):
        refuse_pipeline(stage())  # which is no module
