import subprocess
import sys
from pathlib import Path

import pytest

import teleport
from teleport import cli
from teleport.experiment import teleport_settings
from teleport.records import read_runs


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
    assert len(read_runs(out)) == 5
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
    assert all(len(r.teleports) == 3 for r in runs if r.config["training"]["teleport"])


def test_the_papers_schedule_brings_the_papers_step_control() -> None:
    options = teleport_settings("mnist-sample", "paper")
    assert (options.schedule.epochs, options.schedule.batches) == (5, 32)
    assert (options.steps, options.lr, options.schedule.warmup_steps) == (8, 0.2, 0)
    assert options.cap is not None
    convolution = teleport_settings("cifar10-cnn", "paper")
    assert (convolution.lr, convolution.schedule.warmup_steps) == (0.003, 40)
    own = teleport_settings("mnist-sample", "paper", growth=1.2)
    assert (own.lr, own.steps, own.growth) == (None, None, 1.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nope"], "mnist-sample"),
        (["run", "--preset", "huge"], "tiny"),
        (["run", "--optimizer", "sdg"], "adagrad"),
        (["run", "--optimizer", "lbfgs"], "one gradient per step"),
        (["run", "cifar10-cnn", "--optimizer", "adamw"], "give --lr"),
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
        (["run", "--lr", "0.1", "--init", "xavier"], "default"),
        (["run", "--device", "no-such-device"], "not available"),
        (["figure", "no-such-folder"], "teleport run"),
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
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
