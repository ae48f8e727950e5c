"""One teleport of every kind of network ends where it did before the package was rearranged."""

import json

import pytest
import torch

from tests.support import steps

RECORDED = json.loads(steps.RECORD.read_text())
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}


def test_every_kind_is_recorded() -> None:
    assert sorted(RECORDED) == sorted(map(steps.name_of, steps.KINDS))


@pytest.mark.parametrize("kind", steps.KINDS, ids=steps.name_of)
def test_a_step_ends_where_it_did(kind: steps.Kind) -> None:
    """On one machine float64 agrees to 1e-12; other machines sum in another order."""
    found, recorded = steps.told(kind), RECORDED[steps.name_of(kind)]
    assert found.keys() == recorded.keys()
    tolerance = 0.02 if kind.autocast else TOLERANCES[kind.dtype]
    length = max(1.0, *(abs(value) for values in recorded.values() for value in values))
    for name, values in recorded.items():
        assert found[name] == pytest.approx(values, rel=tolerance, abs=tolerance * length), name
