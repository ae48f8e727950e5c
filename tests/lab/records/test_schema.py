"""Records with fields that are missing or of another kind: read, or refused by file and line."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teleport import cli
from teleport.cli import show
from teleport.errors import RunError
from teleport.lab.analysis.outcomes import blocks, matrix_markdown
from teleport.lab.bench.tables import curves, read_benchmarks, sheets
from teleport.lab.keeping.report import forgetting_figure, forgetting_tables
from teleport.lab.paper.input_energy import read_spectra
from teleport.lab.paper.moves import read_moves
from teleport.lab.paper.plots import product_figure, spectrum_figure, threshold_figure
from teleport.lab.paper.products import read_product
from teleport.lab.paper.savings import read_savings
from teleport.lab.paper.threshold import read_trajectories
from teleport.lab.records.runs import read_rows, read_runs
from teleport.lab.records.schema import ROWS, made_by
from teleport.lab.records.study import record_folders, record_paths
from tests.support.results import RESULTS, copy_record, lines_of


def show_runs(folder: Path) -> None:
    runs = read_runs(folder)
    show._compared(runs)
    matrix_markdown(blocks(folder))


def show_tasks(folder: Path) -> None:
    runs = read_runs(folder)
    forgetting_tables(runs)
    forgetting_figure(runs)


def show_spectra(folder: Path) -> None:
    read_runs(folder)
    for measured in (found := read_spectra(folder)):
        show._spectrum_table(measured)
    for steps in found[0].by_step:
        spectrum_figure(found, steps)


def show_trajectories(folder: Path) -> None:
    read_runs(folder)
    show._threshold_table(found := read_trajectories(folder))
    threshold_figure(found)


def show_product(folder: Path) -> None:
    read_runs(folder)
    config, found = read_product(folder)
    product_figure(found, f"{config['title']} after {config['trained']}")


def show_moves(folder: Path) -> None:
    read_runs(folder)
    for moves in read_moves(folder):
        show._moves_table(moves)
        show._room_table(moves)


def show_benchmarks(folder: Path) -> None:
    for benchmark in read_benchmarks(folder).values():
        sheets(benchmark)
        if benchmark.name == "scaling":
            curves(benchmark)


SHOWN: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "runs": (
        show_runs,
        [
            f"matrix/mnist-sample/0{n}-lr-0.05{arm}-seed0.jsonl"
            for n, arm in enumerate(("", "-teleport"))
        ],
    ),
    "tasks": (
        show_tasks,
        [
            f"keeping/digits/0{n}-{name}-seed0.jsonl"
            for n, name in enumerate(("plain-lr-0.2", "projected-tau-0.9-lr-0.4"))
        ],
    ),
    "spectra": (
        show_spectra,
        ["paper/spectrum/00-mnist-mlp.jsonl", "paper/spectrum/01-fashion-mlp.jsonl"],
    ),
    "trajectories": (show_trajectories, ["paper/tau/mnist-mlp/00-mnist-mlp.jsonl"]),
    "moves": (
        show_moves,
        [f"moves/transformers/00-etth1-seed{seed}.jsonl" for seed in (0, 1)],
    ),
    "saving": (read_savings, ["saving/01-etth1-sgd-seed0.jsonl"]),
    "product": (show_product, ["paper/product/cifar10-jpeg-cnn/00-0.jsonl"]),
    "rivals": (show_benchmarks, ["bench/rivals-budget/rivals.jsonl"]),
    **{
        name: (show_benchmarks, [f"bench/before/{name}.jsonl"])
        for name in ("step", "basis", "scaling", "memory", "layers")
    },
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def places(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every field of a row, as the object that holds it and its name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield value, key
            yield from places(item)


def kind(value: Any) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


def damage(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    """Take a field out of a row, or put a value of another type in its place."""
    types = sorted({row["type"] for row in rows})
    of = data.draw(st.sampled_from(types), "type")
    row = data.draw(st.sampled_from([row for row in rows if row["type"] == of]), "row")
    holder, key = data.draw(st.sampled_from(list(places(row))), "field")
    value = data.draw(json_values, "value")
    if kind(value) == kind(holder[key]):
        del holder[key]
    else:
        holder[key] = value


@pytest.mark.parametrize("what", SHOWN)
@given(data=st.data())
def test_a_damaged_field_is_read_over_or_named_with_its_file(
    what: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    show, names = SHOWN[what]
    folder = tmp_path_factory.mktemp(what)
    for name in names:
        copy_record(RESULTS / name, folder)
    chosen = data.draw(st.sampled_from(sorted(folder.glob("*.jsonl"))), "record")
    rows = [json.loads(line) for line in chosen.read_text().splitlines()]
    damage(rows, data)
    chosen.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        show(folder)
    except RunError as error:
        assert chosen.name in str(error)  # noqa: PT017


def changed(folder: Path, where: str, value: Any = ...) -> tuple[Path, int]:
    """Copy two runs and change one field of the second, ``type.key.key``; ``...`` takes it out."""
    names = SHOWN["runs"][1]
    for name in names:
        copy_record(RESULTS / name, folder)
    path = folder / Path(names[1]).name
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    of, *keys, last = where.split(".")
    number = max(n for n, row in enumerate(rows) if row["type"] == of)
    holder = rows[number]
    for key in keys:
        holder = holder[key]
    if value is ...:
        holder.pop(last, None)
    else:
        holder[last] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, number + 1


@pytest.mark.parametrize("command", ["figure", "report"])
@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("evaluation.train_loss", ..., "train_loss is missing"),
        ("evaluation.train_loss", "low", 'train_loss is "low", expected a number >= 0 or null'),
        ("evaluation.test_loss", -1.0, "test_loss is -1.0, expected a number >= 0 or null"),
        ("evaluation.step", None, "step is null, expected an integer >= 0"),
        ("teleport.grad_norm_before", ..., "grad_norm_before is missing"),
        ("teleport.held_out_after", [1.0], "held_out_after is [1.0], expected a number or null"),
        ("end.status", ..., "status is missing"),
        ("end.status", "done", 'status is "done", expected finished, diverged or interrupted'),
        ("config.training", ..., "training is missing"),
        ("config.training.teleport", 1, "training.teleport is 1, expected true or false"),
        ("config.settings", 3, "settings is 3, expected an object"),
        ("config.settings.teleport.tau", True, "settings.teleport.tau is true, expected a number"),
        ("config.baseline", ..., "baseline is missing"),
        ("config.experiment", ..., "experiment is missing"),
        ("config.seed", "0", 'seed is "0", expected an integer >= 0'),
        ("config.seed", 10**400, f"seed is {str(10**400)[:40]}..., expected an integer >= 0"),
        ("config.order", 1.5, "order is 1.5, expected an integer >= 0"),
    ],
)
def test_a_wrong_field_is_named_with_its_file_and_line(
    command: str,
    where: str,
    value: Any,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, line = changed(tmp_path, where, value)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert cli.main([command, str(tmp_path)]) == 1
    of = where.partition(".")[0]
    assert f"{path}, line {line} ({of}): {message}; move the file" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "where",
    [
        "config.size",
        "config.size.network",
        "config.size.train_size",
        "config.data",
        "config.settings.activation",
        "config.settings.teleport",
        "config.training.rival",
        "end.step",
        "evaluation.grad_norm",
    ],
)
def test_what_records_of_older_versions_lack_is_not_missed(where: str, tmp_path: Path) -> None:
    path, _ = changed(tmp_path, where)
    (tmp_path / SHOWN["runs"][1][0].rpartition("/")[2]).unlink()
    rows = read_rows(path)
    rows[0] |= {"arm": rows[0]["baseline"], "training": {"lr": 0.05, "teleport": False}, "order": 0}
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "00.jsonl").write_text(lines)
    show_runs(tmp_path)


def test_every_record_of_the_book_is_accepted() -> None:
    paths = [path for folder in record_folders(RESULTS) for path in record_paths(folder)]
    makers = {made_by(read_rows(path)[0]) for path in paths}
    assert makers == set(ROWS)


def test_evaluations_of_tasks_look_at_as_many_as_were_learned(tmp_path: Path) -> None:
    source = RESULTS / SHOWN["tasks"][1][0]
    for key, value, message in [
        ("task", 2, "task is 2, expected one of 2"),
        ("losses", [0.1], "losses are 1, expected 2"),
        ("accuracies", [0.1] * 3, "accuracies are 3, expected 2"),
    ]:
        rows = [json.loads(line) for line in lines_of(source).splitlines()]
        rows[-2][key] = value
        path = tmp_path / "r.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(RunError, match=rf"r\.jsonl, line {len(rows) - 1} .*{message}"):
            read_rows(path)


def test_an_unknown_sequence_of_tasks_is_named(tmp_path: Path) -> None:
    source = RESULTS / SHOWN["tasks"][1][0]
    path = tmp_path / "r.jsonl"
    path.write_text(lines_of(source).replace('"sequence": "digits"', '"sequence": "letters"'))
    with pytest.raises(RunError, match=r"r\.jsonl.*'letters'.*digits"):
        show_tasks(tmp_path)


def test_a_folder_in_which_no_sequence_was_finished_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = record_paths(RESULTS / "keeping" / "permuted-mnist")
    for path in [path for path in records if path.stem.endswith("-seed0")]:
        rows = lines_of(path).splitlines(keepends=True)
        (tmp_path / path.name).write_text("".join(rows[:-1]))
    assert cli.main(["figure", str(tmp_path)]) == 0
    assert "(seed 0): unfinished" in capsys.readouterr().out
    assert (tmp_path / "figure.png").exists()


def test_records_of_two_commands_are_not_shown_together(tmp_path: Path) -> None:
    for what in ("runs", "tasks"):
        copy_record(RESULTS / SHOWN[what][1][0], tmp_path)
    with pytest.raises(RunError, match="records of two commands"):
        read_runs(tmp_path)


@pytest.mark.parametrize("last", [b"5", b"{}", b'{"type": "evaluation"}', b'{"type": "end"}'])
def test_only_half_a_line_is_taken_for_what_a_kill_leaves(last: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    whole = lines_of(RESULTS / SHOWN["runs"][1][0]).encode()
    path.write_bytes(whole + last)
    with pytest.raises(RunError, match=r"r\.jsonl, line"):
        read_rows(path)
    path.write_bytes(whole + last[:-1] + b" ")
    if last != b"5":
        assert len(read_rows(path)) == len(whole.splitlines())


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_json_has_no_name_for_are_refused(number: float, tmp_path: Path) -> None:
    changed(tmp_path, "evaluation.train_loss", number)
    with pytest.raises(RunError, match="expected a number"):
        read_runs(tmp_path)
