"""Packed studies: no number is lost, every reader reads them, and nothing is written into them."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teleport.cli import main
from teleport.errors import RunError
from teleport.lab.analysis.connectivity import read_lines
from teleport.lab.analysis.outcomes import blocks, matrix_markdown
from teleport.lab.analysis.sensitivity import read_outcomes
from teleport.lab.bench.tables import holds_benchmarks, read_benchmarks
from teleport.lab.experiments.arms import Arm, RunSettings, teleport_settings
from teleport.lab.experiments.run import run_arms
from teleport.lab.paper.input_energy import read_spectra
from teleport.lab.paper.moves import read_moves
from teleport.lab.paper.products import read_product
from teleport.lab.paper.savings import read_savings
from teleport.lab.paper.threshold import read_trajectories
from teleport.lab.records.pack import pack, unpack
from teleport.lab.records.runs import first_row, has_begun, read_rows, read_runs
from teleport.lab.records.study import INDEX, record_folders, record_paths, write_study
from tests.support.results import RESULTS, copy_records

SETTINGS = RunSettings(
    "sample-rows", "tiny", teleport=teleport_settings("sample-rows", "default", after=1)
)
ARMS = [Arm(0.1), Arm(0.1, True)]
FOLDERS = ("sgd", "again/sgd")


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of fresh runs, of two arms, with a table beside."""
    runs = tmp_path_factory.mktemp("made") / "runs"
    for name in FOLDERS:
        (runs / name).mkdir(parents=True)
        run_arms(SETTINGS, ARMS, [0], runs / name)
        (runs / name / "table.txt").write_text("losses")
    return runs


@pytest.fixture(scope="module")
def study(loose: Path) -> Path:
    """The same, packed."""
    packed = loose.parent / "study"
    assert pack(loose, packed) == 4
    return packed


def files(folder: Path) -> dict[str, bytes]:
    """The records below a folder as they are on disk."""
    found = folder.rglob("*.jsonl")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


numbers = st.integers() | st.floats()
texts = st.text(max_size=5) | st.sampled_from(["", "\ud800", "τ", "null"])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
KINDS = (
    st.integers(-(2**63), 2**63 - 1),
    st.integers(),
    st.floats(),
    numbers,
    st.sampled_from([0, 1, 0.0, 0.5]),
    st.booleans(),
    st.booleans() | st.integers(0, 1),
    st.text(st.characters(max_codepoint=127), max_size=5),
    texts,
    values,
)
COLUMNS = ("loss", "Loss", "layers", "steps")
"""Names that a table can have; a row with one of the others stays in the list."""

OTHERS = ("folder", "record", "line", "keys", "two words", "τ", "", "a.b")


@st.composite
def drawn_records(draw: st.DrawFn) -> dict[str, list[dict[str, Any]]]:
    """By their paths, records whose fields are mostly of one kind, null or missing."""
    kinds = {name: draw(st.sampled_from(KINDS)) | st.none() for name in COLUMNS + OTHERS}
    names = st.sampled_from(COLUMNS) | st.sampled_from(COLUMNS + OTHERS)
    drawn = st.lists(st.sampled_from(COLUMNS), unique=True) | st.lists(names, unique=True)
    fields = drawn.map(lambda names: {name: kinds[name] for name in names})
    types = st.sampled_from(["evaluation", "teleport", "move", "end", "resumed", "broken off"])

    def row(kind: str) -> dict[str, Any]:
        own = draw(fields.flatmap(st.fixed_dictionaries))
        return {"type": kind, **own} if draw(st.booleans()) else {**own, "type": kind}

    def record() -> list[dict[str, Any]]:
        config = draw(st.dictionaries(st.sampled_from(["a", "arm", "τ"]), values))
        between = [row(kind) for kind in draw(st.lists(types, max_size=6))]
        return [{"type": "config", **config}, *between, row("end")]

    places = st.sampled_from(["a.jsonl", "b.jsonl", "x/a.jsonl", "x/y/a.jsonl", "z/runs.jsonl"])
    return {place: record() for place in draw(st.sets(places, min_size=1))}


@given(records=drawn_records())
def test_unpacked_records_are_byte_for_byte_those_that_were_packed(
    records: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    below = tmp_path_factory.mktemp("drawn")
    for place, rows in records.items():
        (below / "runs" / place).parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (below / "runs" / place).write_text(text)
    pack(below / "runs", below / "study")
    unpack(below / "study", below / "back")
    assert files(below / "back") == files(below / "runs")
    for place in records:
        assert first_row(below / "study" / place).keys() == records[place][0].keys()
        assert has_begun(below / "study" / place)


def test_fresh_runs_are_the_same_in_both_forms(loose: Path, study: Path, tmp_path: Path) -> None:
    assert {path.name for path in study.iterdir()} == {
        INDEX,
        "evaluations.parquet",
        "teleports.parquet",
    }
    assert [path.relative_to(study) for path in record_folders(study)] == sorted(map(Path, FOLDERS))
    for name in FOLDERS:
        runs, packed = read_runs(loose / name), read_runs(study / name)
        assert [run.path.relative_to(loose) for run in runs] == [
            run.path.relative_to(study) for run in packed
        ]
        assert any(run.teleports for run in runs)
        for run, other in zip(runs, packed, strict=True):
            for field in ("config", "evaluations", "teleports", "status", "reason", "steps"):
                assert json.dumps(getattr(run, field)) == json.dumps(getattr(other, field))
    assert unpack(study, tmp_path / "all") == 4
    assert files(tmp_path / "all") == files(loose)
    assert unpack(study / "again", tmp_path / "again") == 2
    assert files(tmp_path / "again") == files(loose / "again")


def test_numbers_are_columns_of_numbers(study: Path) -> None:
    evaluations = pl.read_parquet(study / "evaluations.parquet")
    of = {name: str(dtype) for name, dtype in evaluations.schema.items()}
    assert (of["step"], of["train_loss"], of["train_seconds"]) == ("Int64", "Float64", "Float64")
    assert set(evaluations["folder"]) == set(FOLDERS)
    teleports = pl.read_parquet(study / "teleports.parquet")
    assert (str(teleports["rolled_back"].dtype), str(teleports["reason"].dtype)) == (
        "Boolean",
        "String",
    )
    runs = [json.loads(line) for line in (study / INDEX).read_text().splitlines()]
    assert [run["config"]["arm"] for run in runs[:2]] == ["lr 0.1", "lr 0.1 + teleport"]
    assert all(run["rows"][str(run["lines"])]["type"] == "end" for run in runs)


def test_rows_that_are_read_are_the_callers_own(study: Path) -> None:
    (path, *_) = record_paths(study / "sgd")
    for row in (rows := read_rows(path)):
        row["type"] = "changed"
    rows[0]["settings"].clear()
    assert read_rows(path)[1]["type"] == "evaluation"
    assert read_rows(path)[0]["settings"]


def test_a_study_that_is_packed_anew_is_read_anew(loose: Path, tmp_path: Path) -> None:
    pack(loose, tmp_path / "study")
    assert len(record_paths(tmp_path / "study" / "sgd")) == 2
    shutil.rmtree(tmp_path / "study")
    pack(loose / "again", tmp_path / "study")
    assert len(record_folders(tmp_path / "study")) == 1
    assert read_rows(record_paths(tmp_path / "study" / "sgd")[0])


@pytest.mark.slow
def test_report_and_figure_say_the_same_of_both_forms(
    loose: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = matrix_markdown(blocks(loose))
    assert said == matrix_markdown(blocks(study))
    assert matrix_markdown(blocks(loose / "again")) == matrix_markdown(blocks(study / "again"))
    for folder in (loose, study):
        assert main(["report", str(folder)]) == 0
        assert capsys.readouterr().out.strip() == said.strip()
    for name in FOLDERS:
        shown = []
        for folder in (loose / name, study / name):
            assert main(["figure", str(folder)]) == 0
            shown.append(capsys.readouterr().out.replace(str(folder), ""))
            assert (folder / "figure.png").exists()
        assert shown[0] == shown[1]
        assert (loose / name / "table.txt").read_text() == (study / name / "table.txt").read_text()
    assert len(read_runs(study / "sgd")) == 2  # with a folder of this name beside its figure


READERS: dict[str, Callable[[Path], Any]] = {
    "bench/after": read_benchmarks,
    "connectivity/mnist-sample": read_lines,
    "keeping/digits": read_runs,
    "sensitivity/design": read_outcomes,
    "moves/resnet18-training": read_moves,
    "saving": read_savings,
    "paper/product/cifar10-jpeg-cnn": read_product,
    "paper/spectrum": read_spectra,
    "paper/tau/mnist-mlp": read_trajectories,
}


@pytest.mark.parametrize("name", READERS)
def test_every_kind_of_record_is_read_alike(name: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "inside").mkdir(parents=True)
    assert copy_records(RESULTS / name, tmp_path / "runs" / "inside")
    pack(tmp_path / "runs", tmp_path / "study")
    read = READERS[name]
    with np.printoptions(threshold=sys.maxsize):
        loose, packed = (repr(read(tmp_path / form / "inside")) for form in ("runs", "study"))
    assert loose.replace(str(tmp_path / "runs"), str(tmp_path / "study")) == packed
    assert holds_benchmarks(tmp_path / "study" / "inside") == (read is read_benchmarks)


OPTIONS = ("--preset", "tiny")
WRITERS = {
    "run": ("run", "sample-rows", *OPTIONS),
    "run --resume": ("run", "sample-rows", *OPTIONS, "--resume"),
    "run --force": ("run", "sample-rows", *OPTIONS, "--force"),
    "sweep": ("sweep", "sample-rows", *OPTIONS, "--seeds", "1"),
    "continual": ("continual", "digits", *OPTIONS, "--resume"),
    "spectrum": ("spectrum", "mnist-sample", *OPTIONS, "--resume"),
    "tau": ("tau", "mnist-sample", *OPTIONS, "--resume"),
    "moves": ("moves", "mnist-sample", *OPTIONS, "--resume"),
    "saving": ("saving", "mnist-sample", *OPTIONS, "--resume"),
    "connectivity": ("connectivity", "mnist-sample", *OPTIONS, "--resume"),
    "sensitivity": ("sensitivity", "mnist-sample", *OPTIONS, "--resume"),
    "bench": ("bench", "memory", *OPTIONS),
}


@pytest.mark.parametrize("inside", ["", "sgd", "new"])
@pytest.mark.parametrize("command", WRITERS)
def test_no_run_is_written_into_a_packed_study(
    command: str, inside: str, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(study, tmp_path / "study")
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    out = tmp_path / "study" / inside
    assert main([*WRITERS[command], "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert f"{out} is in the packed study {tmp_path / 'study'}" in error
    assert "`teleport unpack` them into a new folder" in error
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_sweep_with_a_packed_study_below_does_not_write_into_it(
    loose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(loose, tmp_path / "sample-rows")
    assert main([*WRITERS["sweep"], "--out", str(tmp_path)]) == 1
    assert "in the packed study" in capsys.readouterr().err
    assert not (tmp_path / "sample-rows" / "sgd").exists()
    with pytest.raises(RunError, match="in the packed study"):
        run_arms(SETTINGS, ARMS, [2], tmp_path / "sample-rows")


def test_an_unpacked_study_is_gone_on_with(study: Path, tmp_path: Path) -> None:
    unpack(study / "sgd", tmp_path / "runs")
    before = files(tmp_path / "runs")
    run_arms(SETTINGS, ARMS, [0, 1], tmp_path / "runs", resume=True)
    after = files(tmp_path / "runs")
    assert len(after) == 4
    assert before.items() <= after.items()


@pytest.mark.parametrize("kept", ["", '{"type": "con', '{"type": "config"}\n'])
def test_only_whole_records_are_packed(
    kept: str, loose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(loose, tmp_path / "runs")
    (tmp_path / "runs" / "07-late-seed0.jsonl").write_text(kept)
    assert main(["pack", str(tmp_path / "runs"), str(tmp_path / "study")]) == 1
    assert "07-late-seed0.jsonl has not ended" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_what_cannot_be_packed_or_unpacked_is_said(
    loose: Path, study: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    for change, source in ((pack, loose), (unpack, study)):
        with pytest.raises(RunError, match="there exists already; give a new folder"):
            change(source, tmp_path / "there")
        with pytest.raises(RunError, match=r"is in the packed study .*; give a new folder"):
            change(source, study / "new")
        with pytest.raises(RunError, match="holds no records"):
            change(tmp_path / "there", tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write"):
        pack(loose, tmp_path / "file" / "study")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_a_record_that_does_not_come_back_is_not_packed(
    loose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would with a fault of ours or of the library's."""

    def rounded(study: Path, records: Any) -> None:
        kept = [(path, json.loads(json.dumps(rows), parse_float=lambda text: round(float(text), 6)))
                for path, rows in records]  # fmt: skip
        write_study(study, kept)

    monkeypatch.setattr("teleport.lab.records.pack.write_study", rounded)
    with pytest.raises(RunError, match="does not come back as it is"):
        pack(loose, tmp_path / "study")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("teleports.parquet", Path.unlink, r"has \d+ of its \d+ rows; a table"),
        (
            "teleports.parquet",
            lambda path: path.write_bytes(b"PAR1"),
            r"teleports\.parquet, a table",
        ),
        (INDEX, lambda path: path.write_text(path.read_text()[:-9]), r"runs\.jsonl, line 4"),
        (INDEX, lambda path: path.write_text('{"folder": 1}\n'), r"runs\.jsonl, line 1"),
        (INDEX, lambda path: path.write_text("[]"), r"runs\.jsonl"),
        (INDEX, lambda path: path.write_text(2 * path.read_text()), r"line 5: .*once more"),
        (
            "evaluations.parquet",
            lambda path: pl.read_parquet(path).drop("keys").write_parquet(path),
            r"evaluations\.parquet, a table",
        ),
        (
            "evaluations.parquet",
            lambda path: pl.read_parquet(path)[1:].write_parquet(path),
            r"has \d+ of its \d+ rows",
        ),
    ],
)
def test_a_damaged_study_is_named(
    name: str, change: Callable[[Path], Any], message: str, study: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "study"
    shutil.copytree(study, damaged)
    change(damaged / name)
    with pytest.raises(RunError, match=message):
        unpack(damaged, tmp_path / "runs")
    assert list(tmp_path.iterdir()) == [damaged]
