import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest

import teleport
from teleport import cli
from teleport.lab.analysis.outcomes import blocks, how
from teleport.lab.experiments.arms import teleport_settings
from teleport.lab.records.runs import read_runs
from teleport.lab.records.sameness import as_read
from tests.support.tables import SMALL


def run(*arguments: str) -> int:
    return cli.main(arguments)


def test_version_and_module_are_the_same_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    printed = capsys.readouterr().out
    assert printed.split() == ["teleport", teleport.__version__]
    module = subprocess.run(
        [sys.executable, "-m", "teleport", "--version"], capture_output=True, text=True, check=True
    )
    assert module.stdout == printed


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["run", "continual", "list", "figure", "data", "book", "--version"]),
        (
            ["run"],
            [
                "--preset",
                "--optimizer",
                "--lr",
                "--epochs",
                "--seeds",
                "--schedule",
                "--tau",
                "--growth",
                "--cap",
                "--teleport-lr",
                "--batches",
                "--steps",
                "--out",
                "--device",
                "--init",
                "--head-gain",
                "--resume",
                "--force",
                "--checkpoint",
            ],
        ),
        (
            ["continual"],
            [
                "--methods",
                "--tau",
                "--lr",
                "--tune",
                "--resume",
                "--first-seed",
                "--seeds",
                "--out",
            ],
        ),
        (["list"], ["experiments"]),
        (["figure"], ["folders", "records"]),
        (["pack"], ["folder", "study", "Parquet"]),
        (["unpack"], ["folder", "out", "JSON lines"]),
        (["data"], ["fetch", "list", "verify"]),
        (["data", "verify"], ["names", "checksums"]),
    ],
)
def test_help_names_everything(
    command: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command, "--help") == 0
    text = capsys.readouterr().out
    text += text.lower()
    assert [word for word in words if word not in text] == []


def test_list_shows_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("mnist-sample", "mnist-mlp", "fashion-mlp", "adagrad"))


def test_the_main_job_prints_a_table_and_leaves_records_and_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "job"
    assert run("run", "--preset", "tiny", "--out", str(out)) == 0
    text = capsys.readouterr().out
    for word in (
        "train loss / test loss",
        "+ teleport",
        "seconds teleporting",
        "gradient-norm growth",
        "drift, teleport batches",
        "drift, held-out data",
        "to own baseline: steps",
        "to best baseline: seconds",
        str(out),
    ):
        assert word in " ".join(text.split()) or word in text.replace("\n", "")
    assert len(read_runs(out)) == 6
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "gradient-norm growth" in (out / "table.txt").read_text()


def test_figures_are_redrawn_from_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "job"
    assert run("run", "--preset", "tiny", "--lr", "0.1", "--no-teleport", "--out", str(out)) == 0
    first = capsys.readouterr().out
    (out / "figure.png").unlink()
    assert run("figure", str(out)) == 0
    assert capsys.readouterr().out == first
    assert (out / "figure.png").exists()


@pytest.mark.slow
def test_every_teleport_option_reaches_the_record(tmp_path: Path) -> None:
    out = tmp_path / "job"
    options = [
        "--tau",
        "0.99",
        "--growth",
        "1.2",
        "--cap",
        "9",
        "--steps",
        "2",
        "--batches",
        "3",
        "--after",
        "7",
        "--seeds",
        "2",
        "--epochs",
        "1",
    ]
    arguments = ["--preset", "tiny", "--lr", "0.1", "--optimizer", "momentum", *options]
    assert run("run", *arguments, "--out", str(out)) == 0
    runs = read_runs(out)
    assert {(r.arm, r.seed) for r in runs} == {
        (arm, seed) for arm in ("lr 0.1", "lr 0.1 + teleport") for seed in (0, 1)
    }
    settings = runs[0].config["settings"]
    assert settings["optimizer"] == "momentum"
    wanted = {"tau": 0.99, "growth": 1.2, "cap": 9.0, "steps": 2}
    assert wanted.items() <= settings["teleport"].items()
    assert settings["teleport"]["schedule"]["batches"] == 3
    moved = [r for r in runs if r.config["training"]["teleport"]]
    assert all([row["step"] for row in r.teleports] == [7] * 3 for r in moved)
    (block,) = blocks(out)
    assert "1 epoch of 2,560 examples, losses of the first 200" in block.title
    assert block.title.endswith(
        "teleport once, after 7 steps, 3 x 200 examples, 2 steps, growth 1.2, cap 9, tau 0.99"
    )


def test_the_papers_schedule_brings_the_papers_step_control() -> None:
    options = teleport_settings("mnist-sample", "paper")
    assert (options.schedule.epochs, options.schedule.batches) == (5, 32)
    assert (options.steps, options.lr, options.schedule.warmup_steps) == (8, 0.2, 0)
    assert options.cap is not None
    convolution = teleport_settings("cifar10-cnn", "paper")
    assert (convolution.lr, convolution.schedule.warmup_steps) == (0.003, 40)
    assert how(as_read(asdict(convolution))) == (
        "teleport in each of the first 5 epochs, after 40 steps, 32 x 200 examples, "
        "8 steps of 0.003, cap 3"
    )
    own = teleport_settings("mnist-sample", "paper", growth=1.2)
    assert (own.lr, own.steps, own.growth) == (None, None, 1.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nope"], "mnist-sample"),
        (["run", "--preset", "huge"], "tiny"),
        (["run", "--optimizer", "sdg"], "adagrad"),
        (["run", "--optimizer", "lbfgs"], "one gradient per step"),
        (["run", "cifar10-cnn", "--optimizer", "rmsprop"], "give --lr"),
        (["run", "cifar10-cnn", "--activation", "tanh", "--lr", "1"], "has relu"),
        (["run", "--resume"], "--out"),
        (["run", "--force"], "--out"),
        (["run", "--resume", "--force", "--out", "x"], "one of them"),
        (["run", "no-such.toml:mine"], "cannot read"),
        (["run", "--schedule", "never"], "default"),
        (["run", "--tau", "0"], "(0, 1]"),
        (["run", "--tau", "1.5"], "(0, 1]"),
        (["run", "--growth", "1"], "> 1"),
        (["run", "--cap", "-1"], "> 0"),
        (["run", "--lr", "0"], "> 0"),
        (["run", "--epochs", "0"], ">= 1"),
        (["run", "--batches", "0"], ">= 1"),
        (["run", "--schedule", "paper", "--steps", "0"], "steps must be an integer >= 1, got 0"),
        (["run", "--schedule", "paper", "--cap", "0"], "cap must be > 0 and finite, got 0.0"),
        (["run", "--lr", "0.1", "--init", "xavier"], "default"),
        (["run", "--device", "no-such-device"], "not available"),
        (["run", "--device", "meta"], "not available"),
        (["bench", "step", "--device", "meta"], "not available"),
        (["run", "--init", "he"], "with --lr"),
        (["run", "--head-gain", "3"], "with --lr"),
        (["run", "--lr", "0.1", "--head-gain", "0"], "head_gain must be > 0"),
        (["run", "--lr", "0.1", "--head-gain", "nan"], "head_gain must be > 0"),
        (["run", "--lr", "0.1", "--lr", "0.10000001"], "another one"),
        (["spectrum", "no-such.toml"], "cannot read"),
        (["run", "--objectives", "--rivals"], "got --rivals"),
        (["run", "--objectives", "--lr", "0.1"], "got --lr [0.1]"),
        (["run", "--objectives", "--controls"], "got --controls"),
        (
            ["sweep", "mnist-sample", "--scheduler", "nonsense"],
            "dask scheduler" if find_spec("distributed") else "pip install",
        ),
        (["run", "--after", "-1"], "after must be an integer >= 0, got -1"),
        (["run", "--out", "/dev/null"], "not a folder; give another --out"),
        (["sweep", "mnist-sample", "--out", "/dev/null"], "not a folder; give another --out"),
        (["figure", "no-such-folder"], "teleport run"),
        (["figure", "a" * 300], "File name too long"),
        (["run", "--out", "a" * 300], "File name too long"),
        (["continual", "--methods", ""], "unknown method ''"),
        (["pack", "no-such-folder", "new"], "no-such-folder holds no records"),
        (["unpack", "no-such-folder", "new"], "no-such-folder holds no records"),
        (["data", "fetch", "mnsit"], "mnist"),
    ],
)
def test_bad_input_is_named_with_what_is_allowed(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_disk_that_is_full_ends_a_command_with_a_line(unbuffered: str) -> None:
    command = [sys.executable, "-m", "teleport", "--version"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_a_seed_too_large_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["run", "--first-seed"], ["tau", "mnist-sample", "--seed"]):
        assert run(*command, str(2**31)) == 2
        assert "less than or equal to 2147483647" in capsys.readouterr().err


def test_what_to_do_is_only_what_the_command_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    can = {"run": ["--resume", "--force"], "tau": ["--resume"], "bench": []}
    for command, options in can.items():
        what = "step" if command == "bench" else "mnist-sample"
        assert run(command, what, "--out", str(tmp_path)) == 1
        error = capsys.readouterr().err
        assert [option for option in ("--resume", "--force") if option in error] == options


TABLE = (
    SMALL
    + """
[few]
like = "small"
presets.tiny.ours = { epochs = 1, train_size = 20, evaluate_every = 1, evaluate_size = 10 }

[fewer]
like = "small"
presets.tiny.ours = { epochs = 1, train_size = 40, evaluate_every = 1, evaluate_size = 10 }

[shapes]
like = "small"
network.kind.ours = "cnn"
network.channels.ours = [3, 4]

[heads]
like = "small"
data.ours = "mnist-sample-rows"
network.kind.ours = "transformer"
network.heads.ours = 3
network.width.ours = 8
network.blocks.ours = 1
network.readout.ours = "mean"

[outputs]
like = "heads"
data.ours = "etth1"
network.kind.ours = "mlp"
network.hidden.ours = [4]
"""
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("few", "a training batch needs 32 examples"),
        ("fewer", "held-out data need 45 examples"),
        ("shapes", "'cnn' of t.toml:shapes does not fit the data set mnist-sample"),
        ("heads", "'transformer' of t.toml:heads does not fit"),
        ("outputs", "for 2 examples its outputs are [2, 168, 7], where the loss needs [2, 7]"),
        ("", "give one of them: t.toml:small or"),
    ],
)
@pytest.mark.parametrize("command", ["run", "sweep", "spectrum", "tau", "moves", "product"])
def test_a_table_whose_sizes_do_not_fit_is_refused_before_a_folder_is_made(
    command: str,
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text(TABLE)
    assert run(command, f"t.toml:{name}" if name else "t.toml", "--preset", "tiny") == 1
    if command == "sweep" and not name:
        message = "examples, the preset tiny of t.toml:few"  # a file stands for all it holds
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["t.toml"]


@pytest.mark.slow
def test_an_optimizer_is_the_same_in_any_case_of_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text(TABLE)
    small = ["t.toml:small", "--preset", "tiny", "--seeds", "1"]
    assert run("run", *small, "--optimizer", "SGD", "--out", "run") == 0
    assert run("run", *small, "--optimizer", "sgd", "--out", "run", "--resume") == 0
    assert run("sweep", *small, "--optimizers", "SGD, sgd", "--out", "sweep") == 0
    assert [path.name for path in Path("sweep").glob("*/*")] == ["sgd"]
    assert {r.config["settings"]["optimizer"] for r in read_runs(Path("run"))} == {"sgd"}


@pytest.mark.slow
def test_arms_that_are_the_same_run_once_and_a_teleport_that_never_comes_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.toml").write_text(TABLE)
    for command in ("run", "sweep"):
        assert run(command, "t.toml:small", "--preset", "tiny", "--seeds", "1", "--out", "r") == 0
        said = capsys.readouterr().err
        assert "t.toml:small never teleports: the first is due after 50" in said
        found = {
            r.arm: len(r.teleports) for p in Path("r").rglob("00*") for r in read_runs(p.parent)
        }
        assert found == {"lr 0.2": 0, "lr 0.2 + teleport": 0}
        shutil.rmtree("r")
    assert run("run", "t.toml:small", "--preset", "tiny", "--epochs", "26", "--out", "r") == 0
    assert "never teleports" not in capsys.readouterr().err
    assert [len(r.teleports) for r in read_runs(Path("r"))] == [0, 1]


def test_a_loss_that_is_not_finite_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    chosen = ["--preset", "tiny", "--lr", "1e6", "--no-teleport", "--out", str(out)]
    assert run("run", *chosen) == 0
    said = capsys.readouterr().err
    assert "diverged: " in said
    assert "the train loss is nan after" in said
    assert run("figure", str(out)) == 0
    assert "the train loss is nan after" in capsys.readouterr().err


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("run", "--learning-rate", "1") == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_data_list_says_how_to_get_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TELEPORT_DATA", str(tmp_path))
    assert run("data", "list") == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(name in text for name in ("mnist-sample", "cifar100", "ptb-treebank", "embedded"))
    assert "Run `teleport data fetch" in text
    assert "No public source: place" in text


def test_data_verify_without_names_checks_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TELEPORT_DATA", str(tmp_path))
    assert run("data", "verify") == 0
    text = capsys.readouterr().out
    assert text.count(" ok ") == 2, "the two files of the embedded sample"
    assert run("data", "verify", "ptb") == 1
    assert capsys.readouterr().out.count("missing") == 3


@pytest.mark.parametrize("command", ["list", "verify"])
def test_a_data_folder_that_is_none_is_told(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TELEPORT_DATA", str(tmp_path))
    assert run("data", command) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TELEPORT_DATA", str(tmp_path / "none"))
    assert run("data", command) == 0
    assert f"TELEPORT_DATA is {tmp_path / 'none'}, which is no folder" in capsys.readouterr().err


def test_a_damaged_data_file_is_named_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TELEPORT_DATA", str(tmp_path))
    folder = tmp_path / "mnist"
    folder.mkdir()
    for kind in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{kind}-ubyte.gz").write_bytes(b"\x1f\x8b not really gzip")
    assert run("data", "verify", "mnist") == 1
    assert "damaged" in capsys.readouterr().out
    out = tmp_path / "job"
    assert run("run", "mnist-mlp", "--preset", "tiny", "--out", str(out)) == 1
    assert "train-images" in capsys.readouterr().err
    assert not out.exists()
