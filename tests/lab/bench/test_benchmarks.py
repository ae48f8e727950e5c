import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import teleport
from teleport import cli
from teleport.errors import RunError
from teleport.lab.bench import benchmarks
from teleport.lab.bench.rivals import repeated_ways, speed_ways
from teleport.lab.bench.tables import Benchmark, curves, read_benchmarks, sheets
from teleport.lab.bench.timing import peak_bytes
from teleport.lab.experiments.models import Transformer, cnn, mlp
from teleport.landscape import Landscape
from teleport.rivals.ways import ways
from teleport.runtime.threads import using_threads
from teleport.runtime.transaction import _unfused

CPU = torch.device("cpu")
TINY = benchmarks.PRESETS["tiny"]
SETTING = benchmarks.Setting(replace(TINY, rounds=1, seconds=0.0), CPU, 1)
NETWORKS = ["MLP", "CNN", "transformer"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All benchmarks through the command line: their folder and what was printed."""
    out = tmp_path_factory.mktemp("bench") / "tiny"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["bench", "all", "--preset", "tiny", "--out", str(out)]) == 0
    return out, printed.getvalue()


@pytest.mark.slow
def test_every_benchmark_leaves_a_finished_record_with_its_circumstances(
    tiny: tuple[Path, str],
) -> None:
    folder, _ = tiny
    found = read_benchmarks(folder)
    assert list(found) == ["step", "basis", "scaling", "memory", "layers"]
    for benchmark in found.values():
        assert benchmark.status == "finished"
        assert benchmark.config["hardware"]["threads"] == 1
        assert benchmark.config["versions"]["torch"] == torch.__version__
        assert {"command", "device", "load", "preset"} <= set(benchmark.config)
    for name in ("step", "basis", "memory"):
        assert list(dict.fromkeys(row["network"] for row in found[name].rows)) == NETWORKS
    timed = [row for name in ("step", "basis", "scaling", "layers") for row in found[name].rows]
    assert all(1 <= len(row["seconds"]) <= TINY.rounds for row in timed)
    assert all(min(row["seconds"] + row["gradient_seconds"]) > 0 for row in timed)


@pytest.mark.slow
def test_tables_and_the_figure_come_from_the_records(
    tiny: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, printed = tiny
    for word in (
        "tangent step",
        "double backward direction",
        "one look of the line search",
        "first recording",
        "default teleport, all in",
        "floor",
        "all bases",
        "near constant",
        "parallel / sequential",
        "one gradient",
    ):
        assert word in " ".join(printed.split())
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "tangent step" in (folder / "table.txt").read_text()
    (folder / "scaling.png").unlink()
    assert cli.main(["figure", str(folder)]) == 0
    assert capsys.readouterr().out == printed
    assert (folder / "scaling.png").exists()


def test_small_networks_have_no_budgets_and_the_real_ones_do() -> None:
    row = _row(network="MLP", operation="tangent step", seconds=[1.5], gradient_seconds=[1.0])
    for small, wanted in ((True, ("", "")), (False, ("<= 1", "missed"))):
        (sheet,) = sheets(_benchmark("step", [row], small=small))
        assert sheet.rows[1][5:7] == wanted
    cheap = {**row, "seconds": [1.0]}
    (sheet,) = sheets(_benchmark("step", [cheap], small=False))
    assert sheet.rows[1][2:7] == ("1.00", "1.00 - 1.00 (1)", "1000.0", "<= 1", "met")


def test_memory_is_compared_with_that_of_a_gradient() -> None:
    row = {
        "network": "MLP", "shape": "", "model": 0, "gradient": 100, "grams": 50,
        "tangent": 200, "double_backward": 350,
    }  # fmt: skip
    (sheet,) = sheets(_benchmark("memory", [row], small=False))
    assert sheet.rows[0][-4:] == ("2.00", "3.50", "<= 2", "met")


@pytest.mark.parametrize("number", range(3))
def test_a_default_teleport_takes_twice_the_memory_of_a_gradient_at_most(number: int) -> None:
    """The snapshot of the weights and a direction are a gradient and a half of the perceptron."""
    case = benchmarks._seeded(benchmarks.networks, False, CPU)[number]
    task = benchmarks._teleport_task(case, None, "tangent")
    with using_threads(1):
        gradient = peak_bytes(lambda: benchmarks.ordinary_gradient(case), CPU)
        prepared = task.prepare()
        assert peak_bytes(lambda: task.run(prepared), CPU) <= 2.0 * gradient


@given(
    powers=st.fixed_dictionaries({letter: st.floats(0.0, 3.0) for letter in "tdnlb"}),
    factor=st.floats(1e-4, 1e2),
)
def test_curves_hold_one_letter_varied_and_its_exponent(
    powers: dict[str, float], factor: float
) -> None:
    rows = []
    for _, point in TINY.points():
        seconds = factor
        for letter, value in asdict(point).items():
            seconds *= value ** powers[letter]
        rows.append(_row(method="tangent", seconds=[seconds], **asdict(point)))
    panels = curves(_benchmark("scaling", rows, small=True))
    assert list(panels) == list("tdnlb")
    for letter, (_, found) in panels.items():
        curve = found["tangent"]
        assert curve.sizes == tuple(float(v) for v in TINY.axes[letter])
        assert curve.exponent is not None
        assert curve.exponent.value == pytest.approx(powers[letter], abs=1e-6)


def test_the_base_is_measured_once_and_belongs_to_every_letter() -> None:
    for preset in benchmarks.PRESETS.values():
        points = [point for _, point in preset.points()]
        assert len(points) == len(set(points))
        assert points[0] == preset.base
        for letter, values in preset.axes.items():
            assert getattr(preset.base, letter) in values
            assert len(values) >= 3
            assert sorted(values) == list(values)


def test_gram_matrices_are_counted_on_their_smaller_side() -> None:
    mlp_, cnn_, _ = benchmarks._seeded(benchmarks.networks, True, CPU)
    # 20-32-32-4 on 8 rows: the two layers that need a basis have 33 inputs
    assert benchmarks.gram_bytes(benchmarks.recorded(mlp_)) == 2 * 8 * 8**2
    # 3-4-8 on 4 images: the second convolution has 64 rows of 37 inputs, the head 4 of 33
    assert benchmarks.gram_bytes(benchmarks.recorded(cnn_)) == 8 * 37**2 + 8 * 4**2


def test_the_floor_is_a_count_of_multiplications() -> None:
    model, x = mlp(3, 2, (8, 5)), torch.randn(4, 3)
    case = benchmarks.Workload("MLP", "", model, ((x, torch.zeros(4, dtype=torch.long)),))
    walk = benchmarks.recorded(case)
    _, second, third = walk.blocks
    bases = benchmarks.sequential_bases(walk, [second, third])
    assert [bases[b].rank for b in (second, third)] == [4, 4]
    # rows 4; inputs with the bias column 4, 9, 6; outputs 8, 5, 2
    one, two, three = 4 * 4 * 8, 4 * 9 * 5, 4 * 6 * 2
    gradient = 2 * one + 3 * two + 3 * three
    own = 4 * 4 * 8 + 4 * 4 * 5  # the Gram matrix of the rows times the cotangents
    step = (two + three) + (two + own) + (two + three)
    projection = 2 * (4 * 9 * 4) + 2 * (2 * 6 * 4)
    assert benchmarks.floors(walk.tape, bases) == (step / gradient, (step + projection) / gradient)
    # Where only the head moves, its inputs' tangents still pass through every layer before it.
    head = {third: bases[third]}
    step = (two + three) + (two + own) + three
    assert benchmarks.floors(walk.tape, head)[0] == step / gradient
    # Where only the layer after the first moves, nothing later needs a tangent.
    middle = {second: bases[second]}
    step = (two + three) + 4 * 4 * 8 + two
    assert benchmarks.floors(walk.tape, middle)[0] == step / gradient


@pytest.mark.parametrize(("rows", "floor"), [(1, 1.0), (64, 5 / 3)])
def test_floors_of_a_deep_network_are_those_of_the_cost_model(rows: int, floor: float) -> None:
    """1 with few rows, 5/3 with many, up to the ends of the network and the rows' Gram matrix."""
    model = nn.Sequential(*(layer for _ in range(120) for layer in (nn.Linear(24, 24), nn.Tanh())))
    case = benchmarks.Workload(
        "", "", model, ((torch.randn(rows, 24), torch.zeros(rows, dtype=torch.long)),)
    )
    walk = benchmarks.recorded(case)
    bases = benchmarks.sequential_bases(walk, benchmarks.candidates(walk))
    assert benchmarks.floors(walk.tape, bases)[0] == pytest.approx(floor, rel=0.03)


@pytest.mark.parametrize("number", range(3), ids=NETWORKS)
def test_what_is_timed_is_what_a_teleport_does(number: int) -> None:
    case = benchmarks._seeded(benchmarks.networks, True, CPU)[number]
    case.model.double()
    case = replace(case, batches=tuple((x.double(), y) for x, y in case.batches))
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    with _unfused():
        walk = benchmarks.recorded(case)
        bases = benchmarks.with_room(benchmarks.sequential_bases(walk, benchmarks.candidates(walk)))
        assert bases
        first = benchmarks.tangent_step(walk, bases)
        walk.norm_squared_at(first, 0.1)
        again = benchmarks.tangent_step(walk, bases)  # a look ahead leaves nothing behind
        exact = walk.double_backward_direction(bases)
    for block in bases:
        assert torch.equal(first[block], again[block])
        assert torch.allclose(first[block], exact[block], rtol=1e-8, atol=1e-12)
    assert sum(float(move.norm()) for move in first.values()) > 0
    task = benchmarks._teleport_task(case, 2, "tangent")
    own, mover = task.prepare()
    task.run((own, mover))
    moved = own.model.state_dict()
    assert any(not torch.equal(moved[k], v) for k, v in before.items())
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())


def test_a_teleport_that_did_less_than_asked_is_not_timed() -> None:
    case = benchmarks._seeded(benchmarks.networks, True, CPU)[0].copy()
    report = teleport.Teleporter(case.model).step(case.closure)
    benchmarks._as_asked(report, 1)
    with pytest.raises(RunError, match="1 of 2 steps"):
        benchmarks._as_asked(report, 2)
    with pytest.raises(RunError, match="would mean nothing"):
        benchmarks._as_asked(replace(report, rolled_back=True), 1)


def test_numbers_do_not_depend_on_the_random_state_and_leave_it_alone() -> None:
    torch.manual_seed(1)
    first = benchmarks._seeded(benchmarks.networks, True, CPU)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = benchmarks._seeded(benchmarks.networks, True, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(first, second, strict=True):
        assert all(map(torch.equal, one.model.parameters(), two.model.parameters()))
        assert torch.equal(one.batches[0][0], two.batches[0][0])


def test_a_method_that_got_too_slow_is_not_run_at_larger_values_of_the_same_letter() -> None:
    setting = replace(SETTING, preset=replace(SETTING.preset, limit=0.0))
    jobs = benchmarks.scaling_jobs(setting)
    rows = [row for _, job in jobs for row in job()]
    points = [tuple(row[k] for k in "tdnlb") for row in rows if row["method"] == "tangent"]
    base = TINY.base
    smallest = [replace(base, t=1), replace(base, d=16), replace(base, n=4), replace(base, l=2)]
    wanted = [base, *smallest, replace(base, b=2)]
    assert points == [tuple(asdict(point).values()) for point in wanted]
    tables = sheets(_benchmark("scaling", rows, small=True))
    cells = {row[0]: row[1:] for row in tables[1].rows}
    assert "t = 4" not in cells
    assert set(tables[0].rows[0][2:]) == {"-"}  # two points: no exponent


def test_symmetry_teleportation_is_measured_too() -> None:
    _, job = benchmarks.scaling_jobs(SETTING)[0]
    rows = job()
    assert [row["method"] for row in rows][-1] == "symmetry teleportation"
    exponents, seconds = sheets(_benchmark("scaling", rows, small=True))
    assert "symmetry teleportation takes" in exponents.caption
    assert "budget: >= 50" in exponents.caption
    assert seconds.columns[-1] == "symmetry teleportation"


def test_parallel_bases_are_measured_with_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    sound = Landscape.bases

    def bases(
        self: Landscape, blocks: Sequence[Any], tau: float, parallel: bool | None = None
    ) -> dict[Any, Any]:
        seen.add((len(blocks), tau, torch.get_num_threads(), parallel))
        return sound(self, blocks, tau, parallel)

    monkeypatch.setattr(Landscape, "bases", bases)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    before = torch.get_num_threads()
    rows = [row for _, job in benchmarks.layers_jobs(SETTING) for row in job()]
    assert {(1, 1.0, 3, None), *((depth, 1.0, 3, True) for depth in TINY.depths)} == seen
    assert torch.get_num_threads() == before
    assert [row["operation"] for row in rows] == ["sequential", "parallel"] * len(TINY.depths)
    (sheet,) = sheets(_benchmark("layers", rows, small=True))
    assert [row[0] for row in sheet.rows] == [str(depth) for depth in TINY.depths]
    assert all(" - " in row[-1] for row in sheet.rows)


@pytest.fixture(scope="module")
def rivals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The comparison with the rivals through the command line: its folder and what it printed."""
    out = tmp_path_factory.mktemp("bench") / "rivals"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["bench", "rivals", "--preset", "tiny", "--out", str(out)]) == 0
    return out, printed.getvalue()


@pytest.mark.slow
def test_the_rivals_are_measured_at_the_base_by_every_way(rivals: tuple[Path, str]) -> None:
    folder, printed = rivals
    (found,) = read_benchmarks(folder).values()
    assert found.status == "finished"
    parts = ("same batch", "same budget", "speed")
    rows = {part: [r for r in found.rows if r["part"] == part] for part in parts}
    assert [row["way"] for row in rows["same batch"]] == list(ways(1.5))
    wanted = [(kind, way) for kind in ("LeakyReLU", "Tanh") for way in speed_ways(1)]
    assert [(row["activation"], row["way"]) for row in rows["speed"]] == wanted
    ours = rows["same batch"][0]
    assert ours["growth"] == pytest.approx(1.5, rel=1e-5)
    assert ours["drift"] < 1e-5 < ours["held_out_drift"]
    timed = rows["same batch"] + rows["speed"]
    assert all(len(r["seconds"]) == len(r["gradient_seconds"]) <= TINY.rounds for r in timed)
    rounds = {row["round"] for row in rows["same budget"]}
    assert rounds in ({0}, {0, 1})
    assert [row["way"] for row in rows["same budget"]] == list(repeated_ways(1.5)) * len(rounds)
    assert all(word in printed for word in ("held out", "x null space", "change of basis"))
    assert "the same batch and the same time" in printed
    assert (folder / "table.txt").exists()
    assert not (folder / "scaling.png").exists()


def test_sizes_of_the_rivals_are_those_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def table(**given: Any) -> list[Any]:
        asked.append((given["hidden"], given["samples"], given["threads"], given["seconds"]))
        return []

    def speed(*sizes: int, **given: Any) -> dict[str, Any]:
        asked.append((*sizes, given["batches"], given["activation"]))
        return {}

    def budget(**given: Any) -> list[Any]:
        asked.append((given["hidden"], given["samples"], given["threads"]))
        return []

    setting = replace(SETTING, preset=replace(TINY, rounds=2), threads=3)
    monkeypatch.setattr(benchmarks, "same_budget_table", budget)
    monkeypatch.setattr(benchmarks, "same_batch_table", table)
    monkeypatch.setattr(benchmarks, "symmetry_timings", speed)
    assert [job() for _, job in benchmarks.rivals_jobs(setting)] == [[]] * 4
    sizes = (24, 6, 3, 2, 1)
    same = ((24, 24), 6, 3, TINY.rival_seconds)
    again = [same[:3]] * 2
    assert asked == [same, *again, (*sizes, "leaky_relu"), (*sizes, "tanh")]
    assert benchmarks.PRESETS["cpu"].base == benchmarks.ScalingPoint(t=8, d=512, n=128, l=3, b=1)


def test_the_same_time_is_shown_by_medians_over_the_rounds() -> None:
    row = {"part": "same budget", "way": "noise", "gradients": 30.0, "gradient_seconds": 0.01}
    rows = [
        {**row, "steps": n, "growth": 2.0 * n, "drift": 0.1, "held_out_drift": 0.2, "seconds": s}
        for n, s in ((3, 0.3), (5, 0.5), (4, 0.1))
    ]
    _, sheet = sheets(_benchmark("rivals", rows, small=True))
    cells = ("noise", "4", "8.000", "1.0e-01", "2.0e-01", "300", "30.0", "20.0 - 40.0 (3)")
    assert sheet.rows == [cells]
    assert "the time of 30 gradients" in sheet.caption


@pytest.mark.parametrize(("seconds", "verdict"), [(49.0, "missed"), (50.0, "met")])
def test_the_speed_ratio_is_held_against_its_budget(seconds: float, verdict: str) -> None:
    ours = _row(part="speed", activation="Tanh", way="null space", seconds=[1.0, 2.0, 4.0])
    theirs = {**ours, "way": "symmetry", "seconds": [seconds, 2 * seconds, 1.0]}
    for row in (ours, theirs):
        row["gradient_seconds"] = [1.0] * 3
    _, sheet = sheets(_benchmark("rivals", [ours, theirs], small=False))
    assert sheet.rows[0][4:] == ("1.00", "", "")
    assert sheet.rows[1][4:] == (f"{seconds:.2f}", ">= 50", verdict)
    _, small = sheets(_benchmark("rivals", [ours, theirs], small=True))
    assert small.rows[1][5:] == ("", "")


def test_deep_networks_are_measured_in_time_and_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep"
    assert cli.main(["bench", "deep", "--preset", "tiny", "--out", str(out)]) == 0
    rows = read_benchmarks(out)["deep"].rows
    assert [row["network"] for row in rows] == ["GPT-2-like", "GPT-2-like", "ResNet-18"]
    assert all(min(row["tangent"] - row["gradient"], *row["seconds"]) > 0 for row in rows)
    assert [row["shape"].split(",")[0] for row in rows] == ["1 blocks", "2 blocks", "width 2"]
    assert "a teleport, MiB" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("seconds", "verdict"), [(11.0, "met"), (13.0, "missed")])
def test_a_deep_teleport_is_held_against_its_budget(seconds: float, verdict: str) -> None:
    row = _row(network="ResNet-18", shape="n = 64", operation="default teleport, all in")
    row |= {"seconds": [seconds], "gradient_seconds": [1.0], "gradient": 2**20, "tangent": 2**21}
    (sheet,) = sheets(_benchmark("deep", [row], small=False))
    assert sheet.rows[0][3:] == ("<= 12", verdict, "1", f"{seconds:.3g}", "1", "2", "2.00")


@pytest.mark.parametrize("training", [False, True])
def test_a_deep_network_teleports_in_either_mode(training: bool) -> None:
    case = benchmarks._seeded(benchmarks.resnet, True, training, CPU)
    assert case.model.training is training
    report = teleport.Teleporter(case.model).step(case.closure)
    assert report.growth == pytest.approx(1.5, rel=1e-3)


def test_all_leaves_out_what_takes_minutes_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.chosen("all", "cpu")[0] == ["step", "basis", "scaling", "memory", "layers"]
    assert benchmarks.chosen("rivals", "cpu")[0] == ["rivals"]
    assert cli.main(["bench", "--help"]) == 0
    assert "all but rivals" in " ".join(capsys.readouterr().out.replace("│", "").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["speed"],
            "step, basis, scaling, memory, layers, rivals, ranks, deep, keeping, all",
        ),
        (["step", "--preset", "huge"], "tiny, cpu, paper"),
        (["step", "--threads", "0"], "threads must be >= 1, got 0"),
        (["step", "--device", "no-such-device"], "not available"),
        (["step", "--device", "cuda:99"], "not available"),
    ],
)
def test_bad_arguments_are_named_with_what_is_allowed(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *arguments]) != 0
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_benchmark_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops() -> list[benchmarks.Measurement]:
        raise KeyboardInterrupt

    def jobs(setting: benchmarks.Setting) -> list[benchmarks.BenchmarkJob]:
        return [*benchmarks.memory_jobs(setting)[:1], ("the next one", stops)]

    monkeypatch.setitem(benchmarks.BENCHMARKS, "memory", jobs)
    out = tmp_path / "out"
    assert cli.main(["bench", "memory", "--preset", "tiny", "--out", str(out)]) == 130
    assert str(out) in capsys.readouterr().err.replace("\n", "")
    found = read_benchmarks(out)["memory"]
    assert found.status == "interrupted"
    assert [row["network"] for row in found.rows] == ["MLP"]
    assert "interrupted" in found.title


def test_threads_are_set_for_the_benchmark_only_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    seen = []

    def job() -> list[benchmarks.Measurement]:
        seen.append(torch.get_num_threads())
        return []

    monkeypatch.setitem(benchmarks.BENCHMARKS, "memory", lambda setting: [("nothing", job)])
    told: list[tuple[str, int, int]] = []
    benchmarks.run_benchmarks(
        ["memory"], "tiny", CPU, tmp_path, threads=2, progress=lambda *what: told.append(what)
    )
    assert told == [("memory: nothing", 0, 1), ("memory: nothing", 1, 1)]
    assert seen == [2]
    assert torch.get_num_threads() == before
    config = json.loads((tmp_path / "memory.jsonl").read_text().splitlines()[0])
    assert config["hardware"]["threads"] == 2


@pytest.mark.slow
def test_folders_without_benchmarks_and_wrong_records_are_refused(
    tiny: tuple[Path, str], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="no benchmark"):
        read_benchmarks(tmp_path)
    shutil.copy(tiny[0] / "basis.jsonl", tmp_path / "step.jsonl")
    with pytest.raises(RunError, match="not a record of the benchmark 'step'"):
        read_benchmarks(tmp_path)


def test_the_paper_s_cnn_is_full_rank_but_for_its_head() -> None:
    model = cnn()
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 4] == [
        (16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3),
    ]  # fmt: skip
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert cnn((1, 4), image=7, classes=3)(torch.randn(2, 1, 7, 7)).shape == (2, 3)
    with pytest.raises(ValueError, match="at least 8 wide"):
        cnn(image=7)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("readout", ["mean", "last", "all"])
def test_a_transformer_answers_once_or_at_every_position(norm_first: bool, readout: str) -> None:
    model = Transformer(3, 5, length=6, width=8, norm_first=norm_first, readout=readout)
    x = torch.randn(2, 6, 3)
    assert model(x).shape == ((2, 6, 5) if readout == "all" else (2, 5))
    assert model.blocks[0].linear1.out_features == 32
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.allclose(model(x), model(swapped), atol=1e-6)  # it knows its positions
    names = {b.name for b in teleport.layers.support.cover(model).blocks}
    assert {"embed", "head", "blocks.1.linear2", "blocks.0.self_attn.q"} <= names


def _row(**given: Any) -> dict[str, Any]:
    return {"network": "MLP", "shape": "", "gradient_seconds": [1.0], **given}


def _benchmark(name: str, rows: list[dict[str, Any]], small: bool) -> Benchmark:
    size = {"small": small, "base": asdict(TINY.base)}
    hardware = {"threads": 1, "gpu": None}
    config = {"size": size, "hardware": hardware, "device": "cpu", "load": None, "preset": "tiny"}
    return Benchmark(name, config, rows, "finished")
