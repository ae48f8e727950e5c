"""The benchmark of the null space as a tool: its rows, its table, and what it needs."""

import json
from pathlib import Path

import pytest
import torch

from teleport.errors import RunError
from teleport.lab.bench import null_spaces
from teleport.lab.bench.benchmarks import PRESETS, Setting, run_benchmarks
from teleport.lab.bench.tables import BUDGETS, read_benchmarks, sheets

CPU = torch.device("cpu")


def test_every_row_of_the_issue_has_a_budget_and_a_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="the extra keeping is not installed")
    pytest.importorskip("peft", reason="the extra keeping is not installed")
    monkeypatch.setattr(null_spaces, "AT_ONCE", 2)
    run_benchmarks(["keeping"], "tiny", CPU, tmp_path)
    found = read_benchmarks(tmp_path)["keeping"]
    assert found.status == "finished"
    rows = [(row["network"], row["operation"]) for row in found.rows]
    assert rows == list(BUDGETS)[-4:]
    (sheet,) = sheets(found)
    assert [row[5:] for row in sheet.rows] == [("", "")] * 4
    # the same rows, as if of the real size: each with its budget, met or missed by its ratio
    lines = (tmp_path / "keeping.jsonl").read_text().splitlines()
    config = json.loads(lines[0])
    config["size"]["small"] = False
    (tmp_path / "keeping.jsonl").write_text("\n".join([json.dumps(config), *lines[1:]]) + "\n")
    (sheet,) = sheets(read_benchmarks(tmp_path)["keeping"])
    for row, most in zip(sheet.rows, map(BUDGETS.get, rows), strict=True):
        assert row[5] == f"<= {most:g}"
        assert row[6] in ("met", "missed")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(null_spaces, "find_spec", lambda name: None)
    setting = Setting(PRESETS["tiny"], CPU, 1)
    with pytest.raises(RunError, match=r"needs transformers, peft: pip install .*\[keeping\]"):
        null_spaces.comparisons(setting.preset.small, setting.device)
