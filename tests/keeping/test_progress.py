"""The bar of a long computation: on a terminal, and nowhere else."""

import io
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from teleport import null_space
from teleport.keeping import progress


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, output: io.StringIO, wanted: bool) -> str:
    monkeypatch.setattr("sys.stderr", output)
    monkeypatch.setattr(progress, "_BETWEEN", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    model, x = nn.Linear(2, 2), torch.randn(1, 2)
    null_space(model, [lambda: model(x)] * 3, progress=wanted)
    return output.getvalue()


def test_a_terminal_sees_how_many_closures_and_bases_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = drawn(monkeypatch, Terminal(), True)
    for part in ("old data", "3/3", "bases", "1/1"):
        assert part in text


def test_nobody_else_sees_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, io.StringIO(), True) == ""
    assert drawn(monkeypatch, Terminal(), False).strip("\x1b[?25lh\n\r") == ""


def test_items_come_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator is not read ahead: its batches need not be in memory together."""
    made: list[int] = []

    def batches() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number

    with progress.progress_bar(True) as track:
        for number in track(batches(), "batches"):
            assert made == list(range(number + 1))
    assert made == [0, 1, 2]
