"""The bar of the commands: how far, how fast, how long still; nothing where nobody looks."""

from pathlib import Path

import pytest
import typer

from teleport import cli
from teleport.cli.study import interruptible
from teleport.lab.paper.input_energy import FIGURE_TAUS
from teleport.lab.paper.snapshot import moment
from teleport.runtime.progress import parts_of, progress_of
from tests.support.records import LAYER, write_record


def test_a_terminal_sees_how_far_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("teleport.runtime.progress.SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "120")
    with progress_of(None, "step") as progress:
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
    with interruptible(tmp_path), progress_of(40, "step") as progress:
        progress("lr 0.1", 40)
    assert capsys.readouterr().err == ""
    with pytest.raises(typer.Exit) as left, interruptible(tmp_path):
        raise KeyboardInterrupt
    assert left.value.exit_code == 130
    assert str(tmp_path) in capsys.readouterr().err


def seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a terminal, every time."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("teleport.runtime.progress.SECONDS", 0.0)


def test_with_another_total_the_bar_counts_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen(monkeypatch)
    with progress_of(None, "part") as progress:
        progress("running", 1, 3)
        progress("pages", 1, 7)
        progress("pages", 1, 7)
    told = capsys.readouterr().err
    assert "1/3" in told
    assert "1/7" in told
    assert "2/7" in told


def test_parts_that_begin_are_counted_when_they_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with parts_of(2, "part") as begin:
        begin("one")
        begin("two")
    assert capsys.readouterr().err == "one\ntwo\n"
    seen(monkeypatch)
    with parts_of(2, "part") as begin:
        begin("one")
        assert "0/2" in capsys.readouterr().err
        begin("two")
        assert "1/2" in capsys.readouterr().err
    assert "2/2" in capsys.readouterr().err


BARS = {
    "spectrum mnist-sample --preset tiny --trained 1": "1/1",
    "tau mnist-sample --preset tiny --trained 1 --steps 1": f"/{1 + len(FIGURE_TAUS)}",
}


@pytest.mark.parametrize("command", BARS)
def test_a_command_that_looks_at_a_moment_has_a_bar(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen(monkeypatch)
    monkeypatch.setattr("teleport.cli.show.show", lambda folder: None)
    monkeypatch.setattr("teleport.lab.paper.threshold.trajectory", lambda *args, **kept: ([], ""))
    monkeypatch.setattr("teleport.lab.paper.input_energy.spectra", lambda *args: [])
    assert cli.main([*command.split(), "--out", str(tmp_path / "out")]) == 0
    assert BARS[command] in capsys.readouterr().err


def test_every_step_before_a_moment_is_told() -> None:
    steps: list[int] = []
    moment("mnist-sample", "tiny", 3, stepped=lambda: steps.append(1))
    assert len(steps) == 3


def test_reading_packing_and_grading_have_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen(monkeypatch)
    kept = {"baseline": "lr 0.1", "layers": [LAYER], "order": 1}
    write_record(tmp_path / "a", "lr 0.1", {0: 2.0, 4: 1.0}, end={"status": "finished"})
    write_record(tmp_path / "a", "lr 0.1 + t", {0: 2.0, 4: 0.5}, end={"status": "finished"}, **kept)
    answers = tmp_path / "answers.py"
    answers.write_text("x = 1\n\ndef projection(gradient, basis):\n    return gradient\n")
    commands = {
        f"report {tmp_path}": "1/1",
        f"watch {tmp_path}": "1/1",
        f"pack {tmp_path / 'a'} {tmp_path / 'study'}": "4/4",
        f"check {answers}": "3/3",
    }
    for command, count in commands.items():
        cli.main(command.split())
        assert count in capsys.readouterr().err, command
