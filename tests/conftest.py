"""Hypothesis profiles and a torch that uses one thread and known seeds."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

COMMON = {
    "deadline": None,
    "max_examples": 30,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("local", **COMMON)
settings.register_profile("ci", derandomize=True, **COMMON)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # processes that tests start: same threads, same rounding


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    """Global random states are the same at the start of every test, and put back after it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        yield
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
