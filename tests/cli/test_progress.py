"""The bar of the commands: how far, how fast, how long still; nothing where nobody looks."""

from pathlib import Path

import pytest
import typer

from teleport.cli.progress import step_progress


def test_a_terminal_sees_how_far_how_fast_and_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("teleport.cli.progress.SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "120")
    with step_progress(None, tmp_path) as progress:
        progress("lr 0.1", 0, 40)
        progress("lr 0.1", 10)
        progress("lr 0.1", 10)
    told = capsys.readouterr().err
    assert "lr 0.1" in told
    assert "20/40" in told
    assert "step/s" in told
    assert "0:00:0" in told


def test_a_log_sees_nothing_but_that_it_was_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with step_progress(40, tmp_path) as progress:
        progress("lr 0.1", 40)
    assert capsys.readouterr().err == ""
    with pytest.raises(typer.Exit) as left, step_progress(40, tmp_path) as progress:
        raise KeyboardInterrupt
    assert left.value.exit_code == 130
    assert str(tmp_path) in capsys.readouterr().err
