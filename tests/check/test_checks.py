"""Checks of learners' functions: the library passes them, wrong answers get the right message."""

import json
import math
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import teleport
from teleport import check
from teleport.check import engine
from teleport.check.answers import alike
from teleport.check.chapters.ch03_mlp import SquaredError
from teleport.check.chapters.ch08_rivals import sigma, undo
from teleport.check.engine import (
    BUDGET,
    CASES,
    _attempt,
    _diagnosis,
    _search,
    wrong_answers,
)
from teleport.check.grading import grade
from teleport.check.guard import WALL_FACTOR, Bounded, TimeUp, Watch, run_within
from teleport.check.literal import literal
from teleport.check.places import CHAPTER_OF
from teleport.cli import main
from teleport.errors import CheckError
from teleport.layers.rule import rule_for
from teleport.objective import ascent_double_backward
from teleport.rivals import Bend, group_action
from teleport.subspace import Basis, RowSpace, energy_rank, numerical_rank
from tests.support.submissions import WRONG, functions_of
from tests.support.waiting import HANG

# beartype checks lists at random places; that is no part of any case.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

CHAPTERS = Path(__file__).parents[2] / "chapters"


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch):
    """How many cases are tried is not to depend on what else the machine does."""
    monkeypatch.setattr(engine, "BUDGET", HANG)


# The library against the same checks.


def library_rows(inputs):
    (part,) = rule_for(nn.Linear(1, 1)).parts(nn.Linear(inputs.shape[-1], 1))
    return part.rows(inputs)


def library_conv_rows(images, size, stride, padding):
    module = nn.Conv2d(images.shape[1], 1, size, stride=stride, padding=padding)
    (part,) = rule_for(module).parts(module)
    return part.rows(images).reshape(-1, images.shape[1] * size**2 + 1)


def library_weight_gradient(delta, rows):
    module = nn.Linear(rows.shape[1], delta.shape[1], bias=False)
    (part,) = rule_for(module).parts(module)
    return part.weight_gradient(rows, delta)


def library_projection(gradient, basis):
    count = basis.shape[-1]
    ranks = torch.full(basis.shape[:-2], count)
    return Basis(basis, torch.ones(*basis.shape[:-2], count).double(), ranks).project(gradient)


def library_grouped_projection(gradient, bases):
    groups = gradient.unflatten(0, (len(bases), -1))
    return library_projection(groups, bases).flatten(0, 1)


def library_basis(rows, tau):
    return library_space([rows]).basis(tau).vectors


def library_space(batches):
    space = RowSpace()
    for rows in batches:
        space.add(rows)
    return space


def library_merged(batches):
    merged = library_space(batches[:1]).basis()
    for rows in batches[1:]:
        merged = merged.merge(library_space([rows]).basis())
    return merged.vectors


def library_rank(matrix):
    values = torch.linalg.svdvals(matrix)
    return int(numerical_rank(values, matrix.shape[1], matrix.dtype))


def chain(weights):
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = weight.clone()
    return nn.Sequential(*layers)


def closure_of(model, loss):
    return lambda: (model(loss.x.T) - loss.y.T).square().sum() / 2


SQUARE = SquaredError(torch.eye(2), torch.zeros(2, 2))


def library_teleport_gradient(weights, loss):
    model = chain(weights)
    found = ascent_double_backward(closure_of(model, loss), list(model.parameters()))
    return list(found if isinstance(found, (list, tuple)) else found.values())


def library_teleport_step(weights, loss, bases, eta):
    model = chain(weights)
    options: dict = {"steps": 1, "lr": eta, "growth": 1e6, "method": "double_backward"}
    teleport.Teleporter(model, **options).step(closure_of(model, loss))
    return [parameter.detach() for parameter in model.parameters()]


def library_group_action(first, second, rows, element):
    return group_action([first, second], rows, [element], [Bend(sigma, undo)])


LIBRARY = [
    pytest.param("rows", library_rows, marks=pytest.mark.verifies("thm-span")),
    pytest.param("conv_rows", library_conv_rows, marks=pytest.mark.verifies("thm-span")),
    pytest.param(
        "weight_gradient", library_weight_gradient, marks=pytest.mark.verifies("thm-span")
    ),
    pytest.param(
        "projection",
        library_projection,
        marks=pytest.mark.verifies("thm-invariance", "thm-layerwise"),
    ),
    pytest.param(
        "grouped_projection",
        library_grouped_projection,
        marks=pytest.mark.verifies("thm-invariance", "thm-layerwise"),
    ),
    pytest.param("basis", library_basis, marks=pytest.mark.verifies("thm-rank", "thm-span")),
    pytest.param("merged_basis", library_merged, marks=pytest.mark.verifies("thm-batch")),
    pytest.param(
        "merged_basis",
        lambda batches: library_space(batches).basis().vectors,
        marks=pytest.mark.verifies("thm-batch"),
    ),
    pytest.param("rank", library_rank, marks=pytest.mark.verifies("thm-rank")),
    pytest.param(
        "energy_rank",
        lambda values, tau: int(energy_rank(values, tau)),
        marks=pytest.mark.verifies("thm-rank"),
    ),
    pytest.param("teleport_gradient", library_teleport_gradient),
    pytest.param(
        "teleport_step",
        library_teleport_step,
        marks=pytest.mark.verifies("thm-invariance", "thm-layerwise"),
    ),
    pytest.param(
        "group_action", library_group_action, marks=pytest.mark.verifies("thm-group-action")
    ),
    pytest.param(
        "rotation",
        lambda point, angle: teleport.rivals.BOOTH.rotate(
            point, torch.tensor(angle, dtype=torch.float64)
        ),
    ),
]


@pytest.mark.parametrize(("name", "fn"), LIBRARY)
def test_the_library_passes_the_checks_of_the_learners(name, fn):
    if name == "teleport_step":
        library_teleport_step([torch.eye(2), torch.eye(2)], SQUARE, [], 1.0)  # warm up: imports
    verdict = check.CHECKS[name](fn, quiet=True)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("name", check.CHECKS)
def test_right_answers_pass_in_time(name):
    one = check.CHECKS[name]
    start = time.process_time()
    verdict = one(one.answer, quiet=True)
    assert time.process_time() - start < BUDGET
    assert verdict.passed, str(verdict)
    assert (verdict.cases == CASES) or name in ("causal_tokens", "polynomial_degree")
    assert verdict.theorem.startswith(("thm-", "eq-"))
    assert verdict.counterexample == verdict.hint == ""


# One wrong answer to every check in the quick tier, and where all are tried the others.
FIRST, *OTHERS = WRONG
WRONG_FILES = [FIRST, *(pytest.param(path, marks=pytest.mark.slow) for path in OTHERS)]


@pytest.mark.parametrize("name", check.CHECKS)
@pytest.mark.parametrize("path", WRONG_FILES, ids=lambda path: path.stem)
def test_a_wrong_answer_gets_its_theorem_its_hint_and_code_that_shows_it(path, name):
    fn = functions_of(path)[name]
    theorem, _, words = fn.__doc__.partition(" ")
    verdict = check.CHECKS[name](fn, quiet=True)
    assert not verdict.passed
    assert (verdict.theorem or "-") == theorem
    assert words in verdict.hint
    assert verdict.statement
    names = {fn.__name__: fn}
    if "Error: " in verdict.got:
        with pytest.raises(RuntimeError):
            exec(verdict.counterexample, names)
        return
    exec(verdict.counterexample, names)  # the code is what a learner would paste
    if "in place" in verdict.got:
        return
    got, expected = names["got"], names["expected"]
    assert not alike(got, expected)
    assert literal(expected) == verdict.expected
    assert literal(got) in verdict.got


def test_every_file_of_wrong_answers_is_wrong_throughout():
    assert len(WRONG) >= 3
    for path in WRONG:
        assert set(functions_of(path)) == set(check.CHECKS)


def test_the_same_function_gets_the_same_verdict():
    wrong = functions_of(WRONG[0])["projection"]
    random.seed(1)
    first = check.projection(wrong, quiet=True)
    random.seed(2)
    torch.manual_seed(5)
    assert check.projection(wrong, quiet=True) == first


def test_a_verdict_says_everything_and_is_printed(capsys, monkeypatch):
    def mine(gradient, basis):
        sys.stdout.write(f"looking at {gradient.shape}")
        return gradient @ basis @ basis.T

    verdict = check.projection(mine)
    text = capsys.readouterr().out
    assert text == f"{verdict}\n"
    assert "gradient = torch.tensor([[1., 0.]], dtype=torch.float64)" in text
    assert "thm-invariance, chapters/03_mlp.ipynb" in text
    assert "looking at torch.Size([1, 2])" in verdict.printed
    assert "✗ projection" in verdict._repr_html_()
    assert "<a href" not in verdict._repr_html_()  # where the link would lead nowhere
    monkeypatch.chdir(CHAPTERS / "exercises")
    assert "<a href='../03_mlp.ipynb'>thm-invariance, " in verdict._repr_html_()
    assert json.loads(json.dumps(verdict.to_dict()))["passed"] is False
    assert not verdict
    assert "wrong" in repr(verdict)
    passed = check.projection(check.projection.answer)
    assert capsys.readouterr().out == f"{passed}\n"
    assert str(passed) == "projection: passed (40 cases; thm-invariance, chapters/03_mlp.ipynb)"
    assert "✓" in passed._repr_html_()


def forever(gradient, basis):
    total = 0
    while True:
        try:
            total += 1
        except:  # noqa: E722
            total = 0


def in_place(gradient, basis):
    gradient -= gradient @ basis @ basis.T
    return gradient


def unsteady(gradient, basis):
    if random.random() < 0.5:
        return gradient
    return gradient - gradient @ basis @ basis.T


def leaves_settings(gradient, basis):
    torch.set_default_dtype(torch.float16)
    torch.set_grad_enabled(False)
    torch.manual_seed(7)
    return gradient - gradient @ basis @ basis.T


def rejected(gradient, basis):
    return gradient @ torch.eye(basis.shape[0])


class Unspeakable:
    def __repr__(self):
        raise ZeroDivisionError


BAD = {
    "nothing": (lambda g, b: None, "nothing was returned", "`return`"),
    "array": (lambda g, b: g.numpy(), "not ndarray", "torch.as_tensor"),
    "list": (lambda g, b: g.tolist(), "not list", "torch.as_tensor"),
    "shape": (lambda g, b: g[0], "the shape is (2,) instead of (1, 2)", ""),
    "dtype": (
        lambda g, b: (g - g @ b @ b.T).float(),
        "the dtype is torch.float32",
        "dtype of the inputs",
    ),
    "mixed dtype": (rejected, "RuntimeError: ", "different dtype"),
    "not finite": (lambda g, b: g * math.nan, "nan", "0/0"),
    "exception": (lambda g, b: g[7], "IndexError: ", ""),
    "not written": (
        lambda g, b: (_ for _ in ()).throw(NotImplementedError),
        "NotImplementedError",
        "Replace the line",
    ),
    "exit": (lambda g, b: sys.exit(1), "exit() was called", "`return`"),
    "in place": (in_place, "`gradient` changed in place", "gradient.clone()"),
    "no import": (lambda g, b: __import__("no_such_package"), "ModuleNotFoundError", "torch"),
    "recursion": (lambda g, b: BAD["recursion"][0](g, b), "RecursionError", ""),
    "transposed": (lambda g, b: (g - g @ b @ b.T).T, "the shape is (2, 1)", "transposed"),
    "negative": (lambda g, b: g @ b @ b.T - g, "tensor", "Every answer is -1 times"),
    "complex": (lambda g, b: g.to(torch.complex128), "complex", ""),
    "sparse": (lambda g, b: g.to_sparse(), "a tensor with its values", "to_dense"),
    "without values": (lambda g, b: g.to("meta"), "a tensor with its values", ""),
    "without a text": (lambda g, b: Unspeakable(), "its repr raises ZeroDivisionError", ""),
    "a huge number": (lambda g, b: 10**5000, "not int", "torch.as_tensor"),
    "a long list": (lambda g, b: [0.0] * 100_000, "a list of 100000 entries", ""),
    "input": (lambda g, b: (_ for _ in ()).throw(EOFError), "EOFError", "input()"),
    "single precision": (
        lambda g, b: (g.float() - g.float() @ b.float() @ b.float().T).double(),
        "tensor",
        "first digits only",
    ),
    "rounded": (lambda g, b: (g - g @ b @ b.T).round(decimals=4), "tensor", "first digits only"),
    "three digits": (lambda g, b: (g - g @ b @ b.T) * 1.0004, "tensor", "first digits only"),
    "arguments": (lambda g: g, "too many positional arguments", "2 arguments"),
    "no function": (7, "int 7", "check.projection(my_function)"),
}


@pytest.mark.parametrize("case", BAD)
def test_whatever_a_function_does_the_answer_is_kind(case):
    fn, got, hint = BAD[case]
    verdict = check.projection(fn, quiet=True)
    assert not verdict.passed
    assert got in verdict.got
    assert hint in verdict.hint
    assert verdict.statement


NOT_WHOLE = {
    "infinite": (math.inf, "a whole number was expected, not inf"),
    "NaN": (torch.tensor(math.nan), "a whole number was expected, not nan"),
    "too large": (10**400, "1000"),
    "a half": (Fraction(1, 2), "a whole number was expected, not 0.5"),
    "two": (np.array([1, 2]), "a whole number was expected, not ndarray"),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_of_a_number_nothing_ends_the_check(case):
    answer, got = NOT_WHOLE[case]
    verdict = check.path_degree(lambda blocks: answer, quiet=True)
    assert not verdict.passed
    assert got in verdict.got


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("stationary", np.bool_),
        ("stationary", torch.tensor),
        ("path_degree", Fraction),
        ("path_degree", np.array),
        ("leak", np.float64),
        ("leak", lambda value: torch.tensor([value], dtype=torch.float64)),
    ],
)
def test_a_right_number_may_be_of_any_kind(name, made):
    one = check.CHECKS[name]
    verdict = one(lambda *arguments: made(one.answer(*arguments)), quiet=True)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("name", ["rotation", "teleport_step", "half_width"])
def test_what_a_notebook_has_set_does_not_matter(name):
    one = check.CHECKS[name]
    with torch.device("meta"), torch.inference_mode():
        torch.set_grad_enabled(False)
        assert one(one.answer, quiet=True)


def test_what_a_terminal_would_act_on_is_written_out():
    def wild(gradient, basis):
        sys.stdout.write("\x1b[2J\ud800")
        raise ValueError("\x1b[31m\ud800 é")

    verdict = check.projection(wild, quiet=True)
    assert verdict.got == "ValueError: \\x1b[31m\\ud800 é"
    assert verdict.printed == "\\x1b[2J\\ud800"


def test_the_stream_of_a_function_has_an_encoding():
    def encodes(gradient, basis):
        sys.stdout.write("é".encode(sys.stdout.encoding).decode())
        return gradient - gradient @ basis @ basis.T

    assert check.projection(encodes, quiet=True)


@pytest.mark.slow
def test_an_endless_loop_is_ended_even_if_it_catches_everything():
    verdict = check.projection(forever, quiet=True)
    assert verdict.cases == 1
    assert verdict.got == "no answer after 3 s"
    assert "loop" in verdict.hint
    assert "gradient = torch.tensor" in verdict.counterexample


class Clocks:
    """Stands in for the clocks: ``wall`` seconds pass, of which the process gets a share."""

    def __init__(self, monkeypatch, share):
        self.wall, self.share = 0.0, share
        monkeypatch.setattr(time, "monotonic", lambda: self.wall)
        monkeypatch.setattr(time, "process_time", lambda: self.wall * self.share)


@pytest.mark.parametrize(
    ("share", "ends"),
    [(1.0, 3.0), (2.0, 1.5), (0.5, 6.0), (0.2, 15.0), (0.05, 3.0 * WALL_FACTOR), (0.0, 3.0)],
)
def test_a_limit_is_of_the_processor_s_time_unless_the_work_sleeps(monkeypatch, share, ends):
    clocks = Clocks(monkeypatch, share)
    watch = Watch(3.0)
    clocks.wall = ends - 0.01
    assert not watch.over
    clocks.wall = ends + 0.01
    assert watch.over


def test_on_a_busy_machine_a_slow_call_is_no_loop(monkeypatch):
    """The alarm rings, and is not raised: the process got a tenth of the seconds that passed."""
    clocks = Clocks(monkeypatch, 0.1)

    def work():
        begun = time.perf_counter()
        while time.perf_counter() - begun < 0.2:
            clocks.wall += 1e-7
        return 7

    assert run_within(0.05, work) == 7
    clocks.share = 1e9
    with pytest.raises(TimeUp):
        run_within(0.05, work)


def test_outside_the_main_thread_a_loop_is_left_behind():
    seen, forever = [], threading.Event()

    def work():
        try:
            run_within(0.1, forever.wait)
        except TimeUp:
            seen.append("time up")
        seen.append(run_within(HANG, lambda: 7))
        with pytest.raises(ZeroDivisionError):
            run_within(HANG, lambda: 1 / 0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(HANG)
    forever.set()
    assert seen == ["time up", 7]


def test_a_function_that_answers_differently_each_time_is_wrong():
    assert not check.projection(unsteady, quiet=True)


def test_global_settings_are_as_before():
    state = torch.random.get_rng_state()
    assert check.projection(leaves_settings, quiet=True)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_megabytes_of_output_are_not_kept(capsys):
    def chatty(gradient, basis):
        sys.stdout.write("x" * 1_000_000)
        sys.stderr.write("y" * 1_000_000)
        return gradient

    verdict = check.projection(chatty, quiet=True)
    assert len(verdict.printed) < 300
    assert "more characters" in verdict.printed
    assert capsys.readouterr() == ("", "")
    stream = Bounded(3)
    assert stream.write("ab") + stream.write("cd") == 4
    assert stream.getvalue() == "abc … (1 more characters)"


def test_a_function_of_two_entries_only_is_wrong_where_there_are_three():
    def flat(gradient, hessian):
        image = hessian @ gradient
        return bool(gradient[0] * image[1] == gradient[1] * image[0])

    verdict = check.stationary(flat, quiet=True)
    assert not verdict
    assert verdict.counterexample.count("[") == 5

    def plane(first, second):
        incoming = (first[:, 0].square() + first[:, 1].square()).sqrt()
        factors = (second[:, :-1].norm(dim=0) / incoming).sqrt()
        return factors[:, None] * first, second / torch.cat([factors, factors.new_ones(1)])

    assert not check.balanced(plane, quiet=True)


def test_the_hint_is_of_the_mistake_that_explains_all_answers():
    def right_for_one_row(gradient, basis):
        one = gradient - gradient @ basis @ basis.T
        return one if len(gradient) == 1 else gradient

    verdict = check.projection(right_for_one_row, quiet=True)
    assert not verdict
    assert verdict.hint == ""
    assert "gradient = torch.tensor([[" in verdict.counterexample


def _wrong_answer(one, number, *arguments):
    return list(wrong_answers(one, arguments))[number][1]()


@pytest.mark.parametrize("name", check.CHECKS)
def test_every_mistake_is_recognised(name):
    one = check.CHECKS[name]
    assert one.signature.startswith(f"{name}(")
    right = []
    _search(one, one.answer, right, Watch(math.inf))
    hints = [hint for hint, _ in wrong_answers(one, right[0].case.values())][:-1]
    assert len(set(hints)) >= 3
    for number, hint in enumerate(hints):
        mistaken = partial(_wrong_answer, one, number)
        survey = [_attempt(one, mistaken, attempt.case) for attempt in right]
        assert _diagnosis(one, survey) == hint
        assert any(attempt.problem for attempt in survey)


def test_every_theorem_is_in_the_chapter_that_a_verdict_names():
    named = {prop.theorem for one in check.CHECKS.values() for prop in one.properties.values()}
    assert named <= set(CHAPTER_OF)
    for label, chapter in CHAPTER_OF.items():
        path = CHAPTERS / f"{chapter}.ipynb"
        if path.exists():  # chapters are written one after the other
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            text = "".join("".join(cell["source"]) for cell in cells)
            assert f":label: {label}\n" in text or f"({label})" in text, label


def test_a_sealed_answer_is_known_without_being_told():
    seal = check.seal_of("b", "which")
    assert seal.startswith("which:0:")
    assert check.answer(" B ", seal, "the sign", quiet=True)
    wrong = check.answer("a", seal, "the sign", theorem="thm-span", quiet=True)
    assert (wrong.passed, wrong.hint) == (False, "Not quite: think of the sign.")
    assert (wrong.theorem, wrong.check) == ("thm-span", "answer")
    for other in (2, "", "bb", None, True):
        assert check.answer(other, seal, "x", quiet=True).hint == "Set the variable to one letter."
    assert check.seal_of("b", "other").split(":")[2] != seal.split(":")[2]  # the name is the salt


def test_of_a_sealed_number_the_first_digits_count():
    seal = check.seal_of(1.13279568, "loose", 4)
    for right in (1.1328, torch.tensor(1.13279), np.float64(1.133)):
        assert check.answer(right, seal, "x", quiet=True)
    for wrong in (1.134, -1.133, 0, float("inf"), float("nan")):
        assert check.answer(wrong, seal, "x", quiet=True).hint == "Not quite: think of x."
    for other in ("1.133", None, True):
        assert check.answer(other, seal, "x", quiet=True).hint == "Set the variable to a number."
    assert check.answer(-0.0, check.seal_of(0, "nothing", 3), "x", quiet=True)
    assert check.answer(2, check.seal_of(2.0, "two", 3), "x", quiet=True)


@pytest.mark.parametrize("arguments", [("b", "a:b"), ("b", "a", 1), (2, "a"), (2, "a", -1)])
def test_what_cannot_be_sealed_is_refused(arguments):
    with pytest.raises(ValueError, match="a seal needs a name without colons"):
        check.seal_of(*arguments)


@pytest.mark.parametrize("seal", ["b", "a:b", "a:x:1234", "a:1:2:3"])
def test_what_is_no_seal_is_refused(seal):
    with pytest.raises(ValueError, match="a seal is 'name:digits:digest'"):
        check.answer("b", seal, "x")


def test_questions_with_one_answer(capsys):
    why = {"a": "that is the other one"}
    assert check.choice(" B ", "b", why)
    wrong = check.choice("a", "b", why, theorem="thm-span")
    assert (wrong.hint, wrong.got, wrong.theorem) == (why["a"], "'a'", "thm-span")
    assert "one letter" in check.choice(2, "b", quiet=True).hint
    assert check.choice("c", "b", why, quiet=True).hint == ""
    assert check.value(torch.tensor(53), 53)
    assert check.value(np.float64(0.1 + 0.2), 0.3, quiet=True)
    assert check.value(54, 53, {54: "one too many"}, quiet=True).hint == "one too many"
    assert check.value(55, 53, {54: "one too many"}, quiet=True).hint == ""
    for none in (None, np.array([53, 53])):
        assert "a number" in check.value(none, 53, quiet=True).hint
    assert not check.value(True, 1, quiet=True)
    assert not check.value(math.nan, 1, quiet=True)
    assert "that is the other one" in capsys.readouterr().out


def test_without_hypothesis_the_package_imports_and_says_what_to_install():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "from teleport import check\n"
        "assert check.choice('a', 'a', quiet=True)\n"
        "try: check.projection(lambda g, b: g)\n"
        "except check.CheckError as error: print(error)\n"
    ).replace("check.CheckError", "__import__('teleport').CheckError")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'nullspace-teleport[course]'" in run.stdout, run.stderr


def test_nothing_is_left_in_the_working_directory(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from teleport import check\n"
        "def projection(g, b): return 7.25\n"
        "check.projection(projection, quiet=True)\n"
    )
    package = str(Path(teleport.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package}
    subprocess.run([sys.executable, mine], cwd=tmp_path, check=True, env=environment)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


# Whole files.

UNRULY = """
import torch
import no_such_package

def projection(gradient, basis):
    print("x" * 5_000_000)
    return gradient @ basis @ basis.T

def rows(inputs):
    exit()

def rank(matrix):
    return no_such_package.rank(matrix)

def basis(rows, tau):
    return torch.tensor(open("answers.txt").read())

def held_out_drift(move, rows):
    import os
    os._exit(3)

def drift_bound(move, rows, tau):
    import itertools
    return sum(itertools.count())  # in compiled code: no signal ends it

exit()

def weight_gradient(delta, rows):
    return delta.T @ rows
"""


@pytest.mark.slow
def test_every_exercise_of_an_unruly_file_is_graded_on_its_own(tmp_path):
    path = tmp_path / "unruly.py"
    path.write_text(UNRULY)
    grades = grade(path)
    found = {exercise.name: exercise for exercise in grades.exercises}
    assert (grades.points, grades.possible, grades.passed) == (1.0, 7.0, False)
    assert found["weight_gradient"].passed
    (projected,) = found["projection"].verdicts
    assert "onto" in projected.hint
    assert len(json.dumps(grades.to_dict())) < 10_000
    assert found["rows"].verdicts[0].got == "exit() was called"
    assert "no_such_package" in found["rank"].reason
    assert "line 3: ModuleNotFoundError" in found["rank"].reason
    assert "FileNotFoundError" in found["basis"].verdicts[0].got
    assert found["held_out_drift"].reason == "it ended the process (exit code 3)"
    assert found["drift_bound"].reason == "no end after 10 seconds (--time-limit gives more)"
    assert [path.name for path in tmp_path.iterdir()] == ["unruly.py"]


def notebook(path, *cells):
    """A notebook of code cells; a pair is a graded cell with its points."""
    made = []
    for number, cell in enumerate(cells):
        source, points = cell if isinstance(cell, tuple) else (cell, None)
        graded = {"grade": True, "solution": False, "grade_id": f"e{number}", "points": points}
        metadata = {} if points is None else {"nbgrader": graded}
        made.append({"cell_type": "code", "metadata": metadata, "source": source, "outputs": []})
    path.write_text(json.dumps({"cells": made, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.mark.slow
def test_a_notebook_gets_the_points_of_its_graded_cells(tmp_path, capsys):
    path = notebook(
        tmp_path / "mine.ipynb",
        "%matplotlib inline\nfrom teleport import check\ncheck.rows(lambda x: 1, quiet=True)",
        "def projection(g, b):\n    return g - g @ b @ b.T",
        ("assert check.projection(projection)", 3),
        ("check.rows(projection)", 2),
        "a syntax error",
        ("assert 1 == 2, 'two'", 1.5),
        ("assert undefined", 1),
        ("open('answers.txt')", 1),
    )
    assert main(["check", str(path)]) == 1
    out = capsys.readouterr().out
    assert " 3 " in out
    assert "two" in out
    assert main(["check", str(path), "--json"]) == 1
    grades = json.loads(capsys.readouterr().out)
    assert (grades["points"], grades["possible"]) == (3.0, 8.5)
    reasons = {exercise["name"]: exercise["reason"] for exercise in grades["exercises"]}
    assert list(reasons) == ["e2", "e3", "e5", "e6", "e7"]
    assert reasons["e5"] == "AssertionError: two"
    assert "cell 5: SyntaxError" in reasons["e6"]
    assert "empty folder" in reasons["e7"]


@pytest.mark.slow
def test_files_without_marks_are_read_by_the_calls_and_names_they_hold(tmp_path, capsys):
    path = notebook(
        tmp_path / "plain.ipynb",
        "from teleport import check\ndef mine(g, b):\n    return g - g @ b @ b.T",
        "check.projection(mine)",
        "check.projection(mine)\ncheck.choice('a', 'a')",
    )
    assert main(["check", str(path), "--json"]) == 0
    grades = json.loads(capsys.readouterr().out)
    names = [(e["name"], e["points"]) for e in grades["exercises"]]
    assert names == [("projection", 1.0), ("projection-2", 2.0)]
    script = tmp_path / "mine.py"
    script.write_text(
        textwrap.dedent("""
            from teleport import check
            def projection(g, b):
                return g - g @ b @ b.T
            def survivor(delta, tangents, basis):
                return projection(delta.T @ tangents, basis)
            check.projection(projection)
            """)
    )
    grades = grade(script)
    assert [exercise.name for exercise in grades.exercises] == ["projection", "survivor"]
    assert grades.passed


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.py", "def f(:", "line 1"),
        ("a.py", "x = 1", "no exercise"),
        ("a.py", "\0", "not Python"),
        ("a.ipynb", "{", "not a notebook"),
        ("a.ipynb", "[1]", "not a notebook"),
        ("a.ipynb", '{"cells": [{}]}', "not a notebook"),
        ("a.ipynb", '{"cells": []}', "no exercise"),
        ("a.txt", "", "neither a notebook"),
        ("b.py", None, "cannot read"),
    ],
)
def test_a_file_that_cannot_be_graded_ends_with_2(tmp_path, capsys, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["check", str(tmp_path / name)]) == 2
    assert said in capsys.readouterr().err


def test_the_errors_of_checking_are_errors_of_the_package():
    assert issubclass(CheckError, teleport.TeleportError)
    assert teleport.CheckError is CheckError
