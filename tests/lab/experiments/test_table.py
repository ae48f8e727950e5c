"""The table of experiments is read to the last key, and says what is the paper's."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from teleport import data
from teleport.errors import RunError
from teleport.lab.experiments.arms import (
    GAIN_CONTROLS,
    MORE_GAIN,
    Arm,
    RunSettings,
    control_arms,
    default_arms,
    lent_tuning,
    rival_arms,
    tuning,
)
from teleport.lab.experiments.models import initialise
from teleport.lab.experiments.optimizers import OPTIMIZERS, find_optimizer
from teleport.lab.experiments.table import EXPERIMENTS, find_experiment, read_experiments

BASE = """
[base]
title = "a title"
data.paper = "mnist-sample"
network.kind.paper = "mlp"
network.hidden.paper = [8, 8]
batch_size.paper = 32
teleport.lr.ours = 0.2
teleport.cap.ours = 3.0
teleport.warmup_steps.paper = 0
teleport.n.ours = 20
teleport.held_out.ours = 20
presets.tiny.ours = { epochs = 1, train_size = 64, evaluate_every = 1, evaluate_size = 20 }
tuning.sgd.ours = { low = 0.1, tuned = 0.2, gain_lr = 0.2, init = "he", head_gain = 3.0 }
"""


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("mnist-mlp", {"data", "network.kind", "network.hidden", "batch_size"}),
        ("cifar10-cnn", {"data", "network.channels", "teleport.warmup_steps"}),
        ("tiny-imagenet-residual", {"data", "network.widths", "teleport.warmup_steps"}),
        ("smnist", {"data", "network.heads", "network.blocks", "network.readout"}),
        ("electricity", {"data", "network.heads", "network.width", "network.blocks"}),
        ("ptb", {"data", "network.heads", "network.readout"}),
    ],
)
def test_what_stands_in_the_paper_is_marked_so(name: str, keys: set[str]) -> None:
    marks = EXPERIMENTS[name].marks
    assert {key for key in keys if marks[key] != "paper"} == set()
    assert marks["batch_size"] == "paper"
    # The paper's Table 1 is lost: nothing that stood in it can be the paper's here.
    lost = {"teleport.lr", "teleport.cap", "teleport.n", "presets.paper", "tuning.sgd"}
    assert {marks[key] for key in lost & set(marks)} == {"ours"}


def test_the_papers_values() -> None:
    assert {e.batch_size for e in EXPERIMENTS.values()} == {32}
    cnn = EXPERIMENTS["cifar10-cnn"]
    assert cnn.network == {"kind": "cnn", "channels": [3, 16, 32, 64]}
    assert cnn.teleport.warmup_steps == 40
    assert EXPERIMENTS["cifar100-cnn"].network == cnn.network
    assert EXPERIMENTS["smnist"].network["heads"] * 64 == EXPERIMENTS["smnist"].network["width"]


@pytest.mark.parametrize("name", [e.name for e in EXPERIMENTS.values() if "sample" in e.data])
def test_every_preset_of_an_embedded_set_builds_its_network(name: str) -> None:
    experiment = EXPERIMENTS[name]
    dataset = data.load(experiment.data)
    for preset in experiment.presets.values():
        torch.manual_seed(0)
        model = experiment.build(dataset, preset)
        initialise(model)
        outputs = model(dataset.prepare(dataset.train_inputs[:2]))
        assert dataset.loss(outputs, dataset.train_targets[:2]).isfinite()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_all_sizes_and_a_known_data_set(name: str) -> None:
    experiment = find_experiment(name)
    assert {"tiny", "cpu", "paper"} == set(experiment.presets)
    assert experiment.data in data.SOURCES
    for preset in experiment.presets.values():
        need = experiment.teleport.n + experiment.teleport.held_out
        assert preset.train_size is None or preset.train_size >= need
        steps = preset.epochs * (preset.train_size or 10**9) // experiment.batch_size
        assert steps >= preset.evaluate_every


def test_a_table_of_ones_own_is_used_by_file_and_name(tmp_path: Path) -> None:
    path = table(tmp_path, BASE + '[mine]\nlike = "base"\ndata.ours = "mnist-sample-rows"\n')
    mine = find_experiment(f"{path}:mine")
    assert (mine.data, mine.marks["data"]) == ("mnist-sample-rows", "ours")
    assert mine.presets == find_experiment(f"{path}:base").presets
    with pytest.raises(ValueError, match="base, mine"):
        find_experiment(f"{path}:yours")
    assert RunSettings(f"{path}:mine", "tiny").size().epochs == 1


def test_another_kind_of_network_inherits_no_sizes(tmp_path: Path) -> None:
    text = BASE + '[b]\nlike = "base"\nnetwork.kind.ours = "cnn"\nnetwork.channels.ours = [3, 4]\n'
    assert read_experiments(table(tmp_path, text))["b"].network == {
        "kind": "cnn",
        "channels": [3, 4],
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size.paper = 32", "batch_size.paper = 0", r"base\.batch_size: must be an int"),
        ("batch_size.paper = 32", "batch_size.paper = true", r"base\.batch_size: must be an int"),
        ("batch_size.paper = 32", "batch_size = 32", r"base\.batch_size: mark the value"),
        ("batch_size.paper = 32", "batch_size.theirs = 3", r"base\.batch_size: mark the value"),
        ("batch_size.paper = 32", "", r"base\.batch_size: missing"),
        ("batch_size.paper = 32", "batch_size.paper == 32", "line 7"),
        ("[8, 8]", "[8, 0]", r"base\.network\.hidden: must be a list"),
        ("hidden.paper", "widths.paper", r"base\.network\.widths: unknown key; known are hidden"),
        ('"mlp"', '"mpl"', r"base\.network\.kind: must be one of mlp"),
        ("epochs = 1", "epochs = 1.5", r"base\.presets\.tiny\.epochs: must be an int"),
        ("epochs = 1", "epoch = 1", r"base\.presets\.tiny\.epoch: unknown key"),
        ("tuned = 0.2", "tuned = -1", r"base\.tuning\.sgd\.tuned: must be a number > 0"),
        ("tuned = 0.2", "tuned = inf", r"base\.tuning\.sgd\.tuned: must be a number > 0"),
        ('init = "he"', 'init = "xavier"', r"base\.tuning\.sgd\.init: must be one of default, he"),
        ("lr.ours = 0.2", "eta.ours = 0.2", r"base\.teleport\.eta: unknown key"),
        ('title = "a title"', "title = 3", r"base\.title: must be a text"),
        ('title = "a title"', 'like = "nobody"', r"base\.like: expected the name"),
        ('title = "a title"', 'like = "base"', r"base\.like: goes in a circle"),
        ('title = "a title"', 'name = "x"\ntitle = "x"', r"base\.name: unknown key"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_or_key(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert old in BASE
    with pytest.raises(RunError, match=message) as refused:
        read_experiments(table(tmp_path, BASE.replace(old, new, 1)))
    assert "own.toml" in str(refused.value)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot read"):
        read_experiments(tmp_path / "none.toml")


@given(name=st.sampled_from(["RMSprop", "nadam", "Adamax", "RAdam", *OPTIMIZERS]))
def test_an_optimizer_by_name_descends_and_leaves_random_numbers_alone(name: str) -> None:
    descends(name)


@pytest.mark.extra("pytorch_optimizer")
@pytest.mark.parametrize("name", ["AdamP", "diffGrad", "Lion"])
def test_an_optimizer_of_the_extra_package_descends(name: str) -> None:
    descends(name)
    assert (
        name.lower()
        in type(find_optimizer(name)([nn.Parameter(torch.ones(2))], 0.1)).__name__.lower()
    )


def descends(name: str) -> None:
    state = torch.get_rng_state()
    build = find_optimizer(name)
    assert torch.equal(torch.get_rng_state(), state)
    x = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = build([x], 0.01)
    before = float(x.detach().square().sum())
    for _ in range(5):
        optimizer.zero_grad()
        x.square().sum().backward()
        optimizer.step()
    assert float(x.detach().square().sum()) < before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamm", r"did you mean (?!.*\badam\b.*\badam\b)"),
        ("lbfgs", "one gradient per step"),
        ("sparseadam", "one gradient per step"),
        ("optimizer", "unknown optimizer"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_optimizer(name)


@pytest.mark.extra("pytorch_optimizer")
@pytest.mark.parametrize("name", ["SAM", "lookahead", "PCGrad"])
def test_a_class_of_the_extra_package_around_an_optimizer_is_refused_as_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer '{name}' needs more than"):
        find_optimizer(name)


def test_without_the_extra_package_its_names_are_unknown_and_how_to_get_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("teleport.lab.experiments.optimizers.EXTRA", "no_such_package")
    with pytest.raises(ValueError, match="pip install pytorch-optimizer"):
        find_optimizer("adamp")


def test_controls_stand_beside_the_teleports_they_are_for() -> None:
    best = tuning("mnist-sample", "adam")
    gained = Arm(best.gain_lr, True, best.init, best.head_gain)
    for arms in (control_arms("mnist-sample", "adam"), rival_arms("mnist-sample", "adam")):
        assert {arm.baseline for arm in arms} <= set(arms)
        assert len({arm.name for arm in arms}) == len(arms)
        assert gained in arms
        rates = {arm.lr for arm in arms if arm.rival and arm.init == "default"}
        assert rates == {best.low, best.tuned}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_controls_can_be_added_to_records_of_the_default_arms(optimizer: str) -> None:
    default = default_arms("mnist-sample", optimizer)
    assert control_arms("mnist-sample", optimizer)[: len(default)] == default


def test_the_teleport_from_the_tuned_gain_has_its_controls_and_more_gain_beside_it() -> None:
    best = tuning("mnist-sample", "sgd")
    arms = [arm for arm in control_arms("mnist-sample", "sgd") if arm.init == best.init]
    assert {arm.lr for arm in arms} == {best.gain_lr}
    plain = [arm.head_gain for arm in arms if not arm.teleport]
    assert plain == [best.head_gain, *(pytest.approx(best.head_gain * f) for f in MORE_GAIN)]
    assert [arm.rival for arm in arms if arm.teleport] == ["", *GAIN_CONTROLS]


SCALARS = (
    st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.sampled_from(["", "mlp", "he", "base", "a text"])
    | st.dates()
)
INNER_KEYS = st.sampled_from(["paper", "ours", "kind", "low", "a"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(INNER_KEYS, inner, max_size=2),
    max_leaves=5,
)
KEYS = ["title", "data", "network.kind", "network.hidden", "network", "batch_size", "teleport"]
KEYS += ["teleport.lr", "teleport.n", "presets", "presets.tiny", "tuning", "tuning.sgd"]
KEYS += ["tuning_of", "presets.tiny.ours.network", "tuning.sgd.ours.init", "tuning.sgd.ours.low"]


def as_toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {as_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


@given(
    key=st.sampled_from(KEYS),
    mark=st.sampled_from(["", ".paper", ".ours", ".none"]),
    like=st.just("base") | VALUES,
    value=VALUES,
)
@settings(max_examples=400, deadline=None)
def test_whatever_a_table_holds_is_used_or_refused_by_its_key(
    tmp_path_factory: pytest.TempPathFactory, key: str, mark: str, like: object, value: object
) -> None:
    one = f"[one]\nlike = {as_toml(like)}\n{key}{mark} = {as_toml(value)}\n"
    path = table(tmp_path_factory.mktemp("t"), BASE + one)
    found, refused = None, ""
    try:
        found = read_experiments(path)["one"]
    except RunError as error:
        refused = str(error)
    if found is None:
        assert refused.startswith(f"{path}: one.")
        return
    for number in (found.teleport.lr, *(rates.low for rates in found.tuning.values())):
        assert float(f"{number:g}") > 0


@pytest.mark.slow
def test_a_chain_too_long_to_follow_is_named(tmp_path: Path) -> None:
    links = [f'[e{n + 1}]\nlike = "e{n}"\n' for n in range(3000)]
    path = table(tmp_path, f'{BASE}[e0]\nlike = "base"\n{"".join(links)}')
    with pytest.raises(RunError, match=r"own\.toml: .*too long"):
        read_experiments(path)


@pytest.mark.parametrize("number", [str(2**63), f"-{2**63 + 1}", "0x" + "f" * 5000])
@pytest.mark.parametrize("key", ["title", "batch_size.ours", "network.hidden.ours", "like"])
def test_an_integer_that_toml_does_not_have_is_refused_by_its_key(
    key: str, number: str, tmp_path: Path
) -> None:
    value = f"[{number}]" if "hidden" in key else number
    like = "" if key == "like" else 'like = "base"\n'
    path = table(tmp_path, f"{BASE}[one]\n{like}{key} = {value}\n")
    with pytest.raises(RunError, match=rf"own\.toml: one\.{key}.*64 bits"):
        read_experiments(path)


def test_an_integer_that_python_does_not_read_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path, f'{BASE}[one]\nlike = "base"\nbatch_size.ours = {"1" * 5000}\n')
    with pytest.raises(RunError, match=r"own\.toml.*(digits|64 bits)"):
        read_experiments(path)


@pytest.mark.parametrize("key", ["a", "network.a", "presets.tiny", "title"])
def test_tables_in_tables_without_end_are_refused(key: str, tmp_path: Path) -> None:
    path = table(tmp_path, f'{BASE}[one]\nlike = "base"\n{key}{".a" * 3000} = 1\n')
    with pytest.raises(RunError, match=r"own\.toml: "):
        read_experiments(path)


RATES = '{ low = 0.1, tuned = 0.2, gain_lr = 0.3, init = "he", head_gain = 1.0 }'


def test_rates_are_lent_and_it_is_said(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        BASE
        + f'[tuned]\nlike = "base"\ntuning.adam.ours = {RATES}\n'
        + '[lent]\nlike = "base"\ntuning_of.ours = "tuned"\n'
        + '[heir]\nlike = "lent"\n'
        + f'[itself]\nlike = "base"\ntuning_of.ours = "itself"\ntuning.adam.ours = {RATES}\n',
    )
    own = tuning(f"{path}:tuned", "adam")
    assert (own.on, lent_tuning(f"{path}:tuned", "adam")) == ("tuned", "")
    assert lent_tuning(f"{path}:itself", "adam") == ""
    for name in ("lent", "heir"):
        assert tuning(f"{path}:{name}", "adam") == own
        said = lent_tuning(f"{path}:{name}", "adam")
        assert said.endswith(
            "was not tuned with adam; its learning rates are those tuned for tuned"
        )


def test_every_experiment_of_the_package_has_rates_and_tells_where_from() -> None:
    for one in EXPERIMENTS.values():
        assert "sgd" in one.tuning
        for optimizer, rates in one.tuning.items():
            assert rates == EXPERIMENTS[rates.on].tuning[optimizer]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('tuning_of.ours = "nobody"', "one.tuning_of: must be one of base, one; got 'nobody'"),
        ('tuning_of = "base"', "one.tuning_of: mark the value"),
        ("tuning_of.ours = 3", "one.tuning_of: must be a text, got 3"),
    ],
)
def test_who_lends_the_rates_must_be_there(line: str, message: str, tmp_path: Path) -> None:
    path = table(tmp_path, f'{BASE}[one]\nlike = "base"\n{line}\n')
    with pytest.raises(RunError, match=re.escape(message)):
        find_experiment(f"{path}:one")


def test_a_rate_that_was_not_tuned_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"known.*give --lr"):
        tuning("mnist-sample", "rmsprop")
