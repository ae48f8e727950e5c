"""Trainers collect garbage at every start; of what all the tests have loaded there is none."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _nothing_old_is_collected() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()
