"""What became dearer between two records of benchmarks."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teleport import cli
from teleport.errors import RunError
from teleport.lab.bench.against import TOO_MUCH, changes, require_preset, sheet
from teleport.lab.bench.tables import Benchmark

costs = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.01, 100.0), min_size=1)


def measured(gradients: dict[str, float], preset: str = "cpu") -> dict[str, Benchmark]:
    """A record of the benchmark `step`: what operations cost, in gradients of 0.5 seconds."""
    rows = [
        {
            "network": "MLP",
            "shape": "",
            "operation": operation,
            "seconds": [0.5 * cost] * 3,
            "gradient_seconds": [0.5] * 3,
        }
        for operation, cost in gradients.items()
    ]
    return {"step": Benchmark("step", {"preset": preset}, rows, "finished")}


@given(costs, costs)
def test_each_operation_in_both_is_compared_the_dearest_first(
    now: dict[str, float], before: dict[str, float]
) -> None:
    both = now.keys() & before.keys()
    if not both:
        with pytest.raises(RunError, match="nothing to compare: step was measured now"):
            changes(measured(now), measured(before))
        return
    found = changes(measured(now), measured(before))
    assert {change.what[2]: pytest.approx(change.factor) for change in found} == {
        operation: now[operation] / before[operation] for operation in both
    }
    assert [c.factor for c in found] == sorted((c.factor for c in found), reverse=True)
    said = {row[2] for row in sheet(found).rows if row[-1] == "dearer"}
    assert said == {change.what[2] for change in found if change.factor >= TOO_MUCH}


def test_presets_are_not_mixed() -> None:
    with pytest.raises(RunError, match="tiny now, cpu before"):
        require_preset("tiny", measured({"a": 1.0}))
    require_preset("cpu", measured({"a": 1.0}))


@pytest.mark.slow
def test_the_command_fails_where_memory_has_doubled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes are the same at every run, so that a record can be compared with itself."""
    line = ["bench", "memory", "--preset", "tiny", "--out"]
    assert cli.main([*line, str(tmp_path / "first")]) == 0
    assert cli.main([*line, str(tmp_path / "again"), "--against", str(tmp_path / "first")]) == 0
    assert "1.00" in capsys.readouterr().out
    record = tmp_path / "first" / "memory.jsonl"
    rows = [json.loads(text) for text in record.read_text().splitlines()]
    for row in rows:
        if row["type"] == "measurement":
            row["tangent"] //= 3
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main([*line, str(tmp_path / "third"), "--against", str(tmp_path / "first")]) == 1
    assert "dearer" in capsys.readouterr().out
    assert cli.main([*line, str(tmp_path / "fourth"), "--against", str(tmp_path / "none")]) == 1
    assert not (tmp_path / "fourth").exists()
