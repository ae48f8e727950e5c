"""Durations in reports and records: what other programs do must not be in them."""

import time

import pytest
import torch

from teleport.runtime.clock import clock_name, now


def test_waiting_for_others_is_not_counted_with_one_thread() -> None:
    assert torch.get_num_threads() == 1
    if torch.cuda.is_available():
        pytest.skip("with a GPU the wall clock is taken")
    started = now()
    time.sleep(0.2)
    assert clock_name() == "process"
    assert now() - started < 0.1


def test_waiting_is_counted_with_more_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        started = now()
        time.sleep(0.02)
        assert clock_name() == "wall"
        assert now() - started >= 0.02
    finally:
        torch.set_num_threads(before)
