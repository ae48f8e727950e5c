"""What one teleport moves, by τ: the rows of a record, what is read off them, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from teleport import Teleporter, cli
from teleport.errors import RunError
from teleport.lab.paper.moves import (
    MOVE_TAUS,
    Moves,
    _gradient_seconds,
    read_moves,
    try_move,
)
from teleport.lab.paper.moves_report import MOVE_COLUMNS, move_cells, outcome, room
from teleport.lab.paper.snapshot import moment
from teleport.runtime.transaction import Transaction
from tests.support.fingerprint import fingerprint
from tests.support.networks import task


@given(st.integers(0, 2**31), st.sampled_from(MOVE_TAUS))
@settings(max_examples=10)
def test_a_move_is_that_of_a_default_teleport_and_the_model_stays(seed: int, tau: float) -> None:
    t = task("plain", seed)
    before = fingerprint(t.model)
    found, undone = try_move(t.model, t.closure, t.closure, tau, 1.5)
    assert fingerprint(t.model) == before
    plain = Teleporter(t.model, tau=tau, growth=1.5).step(t.closure)
    assert bool(undone) == plain.rolled_back
    assert found.tolerance == plain.tolerance
    if not undone:
        assert (found.step_sizes, found.loss_after) == (plain.step_sizes, plain.loss_after)


def test_what_the_guard_undid_is_shown_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(40, 8, dtype=torch.float64), torch.arange(40) % 3

    def closure() -> torch.Tensor:
        return cross_entropy(model(x), y)

    report, undone = try_move(model, closure, closure, 0.5, 4.0)
    assert "the loss moved by" in undone
    assert report.drift > report.tolerance == pytest.approx(0.01 * report.loss_before)
    assert report.growth == pytest.approx(4.0, rel=1e-6)
    assert [layer.name for layer in report.layers if layer.move_norm] == ["2"]
    assert outcome(row_of(model, closure, 0.5, 4.0), 4.0) == "undone by the guard"


def row_of(model: nn.Module, closure: Any, tau: float, growth: float) -> dict[str, Any]:
    report, undone = try_move(model, closure, closure, tau, growth)
    row = report.to_dict() | {"undone": undone, "searched": False, "gradient_seconds": 0.5}
    return json.loads(json.dumps(row | {"tau": tau, "seconds": 1.0}))


def narrow(count: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(count, 6, dtype=torch.float64), torch.arange(count) % 3
    return model, lambda: cross_entropy(model(x), y)


def test_the_outcome_is_read_off_the_row() -> None:
    assert outcome(row_of(*narrow(3), 1.0, 1.5), 1.5) == "reached"
    assert "no null space (thm-fixed)" in outcome(row_of(*narrow(50), 1.0, 1.5), 1.5)
    model, closure = narrow(50)
    model[1] = nn.ReLU()
    nn.init.constant_(model[0].bias[:1], -100.0)  # a dead unit: free for what reads it, and fixed
    fixed = outcome(row_of(model, closure, 1.0, 1.5), 1.5)
    assert "does not change (thm-fixed)" in fixed
    row = row_of(*narrow(3), 1.0, 1.5)
    assert outcome(row | {"reason": "it rained"}, 2.0) == "it rained"


def test_the_cells_are_of_all_seeds_and_the_layers_of_the_first() -> None:
    first, second = (row_of(*narrow(count), 1.0, 1.5) for count in (3, 50))
    moves = Moves({"growth": 1.5, "seed": 0}, {1.0: [first, second]})
    cells = dict(zip(MOVE_COLUMNS, move_cells(moves, 1.0), strict=True))
    assert cells["layers moved"] == "0 to 1 of 2"
    assert cells["free of inputs"] == "0 to 4 of 7"
    assert cells["growth"] == "1.250"
    assert cells["gradients"] == "2"
    assert cells["searched"] == "0 of 2"
    assert cells["outcome"].startswith("reached (1 of 2); cannot")
    assert room(moves) == [["0", "7", "-", "fixed point"], ["2", "7", "4", "moved"]]


def test_a_loss_that_is_not_finite_has_an_infinite_drift() -> None:
    row = row_of(*narrow(3), 1.0, 1.5) | {"loss_after": None, "held_out_after": None}
    cells = move_cells(Moves({"growth": 1.5, "seed": 0}, {1.0: [row]}), 1.0)
    assert cells[MOVE_COLUMNS.index("drift")] == "inf"


@pytest.mark.slow
def test_the_moves_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "moves"
    chosen = ["--preset", "tiny", "--trained", "2", "--batch", "30", "--evaluating", "--seeds", "2"]
    command = ["moves", "mnist-sample", "narrow-mlp", *chosen, "--out", str(out)]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    wide, slim = read_moves(out)
    assert [moves.config["experiment"] for moves in (wide, slim)] == ["mnist-sample", "narrow-mlp"]
    assert list(wide.by_tau) == list(MOVE_TAUS)
    assert [len(rows) for rows in wide.by_tau.values()] == [2] * len(MOVE_TAUS)
    assert wide.config["teleport_batch"] == 30
    assert wide.config["command"] == " ".join(["teleport", *command])
    at = moment("mnist-sample", "tiny", 2, seed=1, n=30)
    expected, _ = try_move(at.model.eval(), at.closure, at.held_out, 1.0, 1.5)
    found = wide.by_tau[1.0][1]
    assert found["grad_norm_after"] == pytest.approx(expected.grad_norm_after, rel=1e-5)
    assert found["held_out_after"] == pytest.approx(expected.held_out_after, rel=1e-5)
    assert [layer["rank"] for layer in found["layers"]] == [None, 30, 30]
    assert cli.main(["figure", str(out)]) == 0
    assert capsys.readouterr().out == first
    record = out / "01-narrow-mlp-seed1.jsonl"
    whole = record.read_text().splitlines(keepends=True)
    record.write_text("".join(whole[:3]))
    assert [len(rows) for rows in read_moves(out)[1].by_tau.values()] == [1] * len(MOVE_TAUS)
    assert cli.main(command) == 1
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    again = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row.get("grad_norm_after") for row in again] == [
        json.loads(line).get("grad_norm_after") for line in whole
    ]
    assert cli.main([*command, "--resume", "--growth", "2"]) == 1
    assert "another growth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nope"], "mnist-sample"),
        (["mnist-sample", "--growth", "1"], "> 1"),
        (["mnist-sample", "--growth", "nan"], "> 1"),
        (["mnist-sample", "--batch", "100000"], "examples"),
    ],
)
def test_bad_input_makes_no_folder(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    assert cli.main(["moves", *arguments, "--preset", "tiny", "--out", str(out)]) == 1
    assert word in capsys.readouterr().err
    assert not out.exists()


def test_foreign_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no moves"):
        read_moves(tmp_path)
    (tmp_path / "00-a.jsonl").write_text('{"type": "config"}\n', encoding="utf-8")
    with pytest.raises(RunError, match="is not a record"):
        read_moves(tmp_path)


def test_a_moment_with_a_batch_of_another_size_keeps_the_training() -> None:
    own, other = (moment("mnist-sample", "tiny", 2, n=n) for n in (None, 30))
    for one, two in zip(own.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert (own.config["teleport_batch"], other.config["teleport_batch"]) == (200, 30)
    with Transaction(own.model):
        assert float(own.closure().detach()) != float(other.closure().detach())


def test_a_gradient_is_timed_of_a_model_that_draws() -> None:
    class Dropping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(x, 0.5, self.training)

    model, x = nn.Sequential(nn.Linear(4, 8), Dropping(), nn.Linear(8, 2)), torch.randn(5, 4)
    before = fingerprint(model)
    assert _gradient_seconds(model, lambda: model(x).square().mean()) > 0.0
    assert fingerprint(model) == before
