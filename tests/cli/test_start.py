"""What a start loads: counted in modules, since seconds are another machine's."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import teleport
from teleport.lab.bench.benchmarks import BENCHMARKS
from teleport.lab.experiments import choices
from teleport.lab.experiments.entry import SIZES
from teleport.lab.experiments.models import ACTIVATIONS
from teleport.lab.experiments.optimizers import OPTIMIZERS
from teleport.lab.keeping.methods import LEARNING_METHODS
from teleport.lab.keeping.tasks import SEQUENCES

COMMANDS = [
    *(
        "list",
        "run",
        "continual",
        "keep",
        "bench",
        "sweep",
        "spectrum",
        "tau",
        "moves",
        "saving",
        "product",
    ),
    *("connectivity", "sensitivity"),
    *(
        "report",
        "figure",
        "watch",
        "pack",
        "unpack",
        "check",
        "data",
        "data list",
        "data fetch",
        "data verify",
    ),
    *("book", "book build", "book serve", "book check", "book proofs", "book slides", "book epub"),
    "book questions",
]
WRONG = ["run --nope", "run nope", "run --preset x", "run --schedule x", "sweep nope", "tau nope"]
WRONG += ["continual nope", "run --threads 0", "bench step --threads 2000", "spectrum nope"]
NO_HELP = ["--version", "list", *WRONG]
HEAVY = ["torch", "numpy", "scipy", "polars", "matplotlib", "requests", "sphinx", "transformers"]
HEAVY += ["lightning", "accelerate", "avalanche", "text2qti"]


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help_and_wrong_options_load_nothing_heavy() -> None:
    code = (
        "import contextlib, io, json, sys\n"
        "from teleport.cli import main\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    hush = io.StringIO()\n"
        "    with contextlib.redirect_stdout(hush), contextlib.redirect_stderr(hush):\n"
        "        code = main(line.split())\n"
        "    loaded = [name for name in json.loads(sys.argv[2]) if name in sys.modules]\n"
        "    print(json.dumps([line, code, loaded]))"
    )
    lines = ["--help", *(f"{command} --help" for command in COMMANDS), *NO_HELP]
    told = python(code, json.dumps(lines), json.dumps(HEAVY)).splitlines()
    found = [json.loads(line) for line in told]
    assert [line for line, _, _ in found] == lines
    assert {line: loaded for line, _, loaded in found if loaded} == {}
    assert {line for line, code, _ in found if code} == set(WRONG)


def test_every_command_is_among_those_above() -> None:
    from typer.main import get_command

    from teleport.cli.commands import app

    found = get_command(app).commands  # type: ignore[attr-defined]
    inner = [f"{n} {i}" for n, c in found.items() for i in getattr(c, "commands", ())]
    assert sorted([*found, *inner]) == sorted(COMMANDS)


def test_import_teleport_loads_little_beside_torch() -> None:
    code = (
        "import json, sys, torch\n"
        "before = {m.partition('.')[0] for m in sys.modules}\n"
        "import teleport\n"
        "teleport.Teleporter, teleport.null_space\n"
        "after = {m.partition('.')[0] for m in sys.modules} - before\n"
        "print(json.dumps(sorted(after - sys.stdlib_module_names)))"
    )
    assert set(json.loads(python(code))) <= {
        "teleport",
        "jaxtyping",
        "wadler_lindig",
        "safetensors",
    }


def test_import_teleport_alone_loads_no_torch() -> None:
    code = "import sys, teleport; print('torch' in sys.modules, teleport.__version__)"
    assert python(code).split() == ["False", teleport.__version__]


def test_public_names_are_all_there() -> None:
    namespace: dict[str, object] = {}
    exec("from teleport import *", namespace)
    assert set(teleport.__all__) <= set(namespace)
    assert set(teleport.__all__) <= set(dir(teleport))
    for module, names in teleport._HOMES.items():
        for name in names:
            assert namespace[name].__module__ == f"teleport.{module}"  # type: ignore[attr-defined]
    homes = {name for names in teleport._HOMES.values() for name in names}
    modules = {n for n in teleport.__all__ if f"teleport.{n}" in sys.modules} | {*teleport._MODULES}
    assert {*homes, *modules, "__version__"} == set(teleport.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = teleport.nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", ["layers", "layers.convolution", "layers.support", "teleporter", "layers.attention"]
)
def test_all_rules_are_there_whatever_is_imported_first(first: str) -> None:
    code = f"import teleport.{first}; from teleport.layers import RULES; print(len(RULES))"
    assert int(python(code)) == len(teleport.layers.RULES)


def test_a_rule_of_the_users_own_is_not_replaced_later() -> None:
    code = (
        "from torch import nn\n"
        "from teleport.layers import RULES, LinearRule, register\n"
        "register(nn.Conv2d)(type('Mine', (LinearRule,), {}))\n"
        "import teleport; teleport.Teleporter, teleport.supported\n"
        "print(type(RULES[nn.Conv2d]).__name__)"
    )
    assert python(code) == "Mine\n"


def test_what_can_be_chosen_is_what_there_is() -> None:
    assert tuple(ACTIVATIONS) == choices.ACTIVATION_NAMES
    assert tuple(OPTIMIZERS) == choices.OPTIMIZER_NAMES
    assert tuple(LEARNING_METHODS) == choices.METHOD_NAMES
    assert tuple(SEQUENCES) == choices.SEQUENCE_NAMES
    assert tuple(BENCHMARKS) == choices.BENCHMARK_NAMES
    from teleport.lab.experiments.networks import MAKERS

    assert set(SIZES) == set(MAKERS)


@pytest.mark.parametrize("module", ["torch", "typer", "teleport.cli.show"])
def test_ctrl_c_during_an_import_ends_quietly(module: str, tmp_path: Path) -> None:
    """The signal comes while the module is looked for, and what it raises is swallowed there."""
    code = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "                for _ in range(1000): pass\n"
        "            except KeyboardInterrupt:\n"
        "                raise RecursionError('as NumPy does') from None\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from teleport.cli import main\n"
        "sys.exit(main(['run', '--preset', 'tiny']))"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_that_is_ignored_stays_ignored() -> None:
    from teleport.cli.loading import loading

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with loading():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        own = signal.default_int_handler  # tests may be started with the signal ignored
        signal.signal(signal.SIGINT, own)
        with loading():
            assert signal.getsignal(signal.SIGINT) is not own
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


STEP = """
import sys, torch, teleport
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
x, y = torch.randn(16, 8), torch.randint(2, (16,))
teleporter = teleport.Teleporter(model)
before, ways = set(sys.modules), []
def loss(x, y):
    ways.append(torch.compiler.is_compiling())
    return nn.functional.cross_entropy(model(x), y)
"""


KINDS = {
    "dense": "",
    "convolution": "nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), "
    "nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 8)",
    "other padding": "nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1, padding_mode='circular'), "
    "nn.Flatten(), nn.Linear(16, 8)",
    "transformer": "nn.TransformerEncoderLayer(2, 1, 8, batch_first=True), nn.Flatten(), "
    "nn.Linear(8, 8)",
    "attention": "nn.Linear(2, 2), nn.TransformerEncoderLayer(2, 1, 8, batch_first=True), "
    "nn.Flatten(), nn.Linear(8, 8)",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_loads_nothing(kind: str) -> None:
    """Neither PyTorch's compiler, two seconds, nor what the search and the tangents need.

    Where a tangent meets a constant, as in the first residual block, PyTorch itself loads its
    compiler, but has done so if an optimizer was made before.
    """
    shape = {"dense": (8,), "transformer": (4, 2), "attention": (4, 2)}.get(kind, (2, 2, 2))
    front = f"nn.Unflatten(1, {shape}), {KINDS[kind]}, " if KINDS[kind] else ""
    program = STEP.replace("nn.Sequential(", f"nn.Sequential({front}")
    if kind == "transformer":
        program = program.replace("before, ", "torch.optim.SGD(model.parameters())\nbefore, ")
    closure = "print(teleporter.step(lambda: loss(x, y)).steps, *(set(sys.modules) - before))"
    assert python(program + closure).split() == ["1"]


@pytest.mark.slow
def test_a_closure_may_be_the_first_to_compile() -> None:
    """The first call may be compiled; those that need tangents run as they are written."""
    closure = "report = teleporter.step(lambda: torch.compile(loss, backend='eager')(x, y))"
    told = python(f"{STEP}{closure}\nprint(report.growth, report.reason)\nprint(*ways)")
    first, calls = told.splitlines()
    assert float(first.split()[0]) == pytest.approx(1.5, rel=1e-5), first
    assert calls.split()[1:] == ["False"] * (len(calls.split()) - 1), calls


@pytest.mark.parametrize("kind", ["list", "tuple"])
def test_threads_sleep_while_they_wait_but_for_bench(kind: str) -> None:
    """Whose times are those of a user's own process."""
    code = (
        "import contextlib, io, os, sys\n"
        "from teleport.cli import main\n"
        "for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME', 'KMP_LIBRARY'):\n"
        "    os.environ.pop(name, None)\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    main({kind}(sys.argv[1:]))\n"
        "print(os.environ.get('OMP_WAIT_POLICY'))\n"
    )
    assert python(code, "bench", "--help") == "None\n"
    assert python(code, "run", "--help") == "PASSIVE\n"
