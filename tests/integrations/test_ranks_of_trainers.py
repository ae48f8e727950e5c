"""Two processes of a trainer teleport as one process on their joined batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support.trainer_ranks import SCHEDULE, Model
from tests.support.trainers import BATCHES, by_hand, same, weights
from tests.support.waiting import HANG

ROOT = Path(__file__).parents[2]


def loss_by_hand(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss: Tensor = model(batch[0].double(), batch[1])["loss"]
    return loss


@pytest.mark.slow
def test_two_processes_teleport_as_one(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="pip install '.[test]' brings it")
    pytest.importorskip("accelerate", reason="pip install '.[test]' brings it")
    script = str(ROOT / "tests" / "support" / "trainer_ranks.py")
    done = subprocess.run(
        [sys.executable, script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model = Model()
    steps = by_hand(model, loss_by_hand, SCHEDULE, 1, growth=1.5)
    assert steps == [2, BATCHES]
    for library in ("lightning", "transformers"):
        one, other = (torch.load(tmp_path / f"{library}{rank}.pt") for rank in range(2))
        assert one["ranks"] == 2
        assert same(one["weights"], other["weights"])
        assert one["teleports"] == other["teleports"]
        assert [step for step, _ in one["teleports"]] == steps
        for name, value in weights(model).items():
            torch.testing.assert_close(one["weights"][name], value, rtol=1e-7, atol=1e-9)
