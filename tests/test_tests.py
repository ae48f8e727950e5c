"""Where the tests lie, each module on its own feet; and what the quick tier has to hold."""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from teleport.book import ledger
from teleport.subspace import RowSpace

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "teleport"
NO_MIRROR = {"core", "support", "theorems"}
"""The modules flat in the package; what tests share; what the book states."""


def imported(source: str) -> Iterator[str]:
    """The modules that a file imports, and the names that may be modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)


def of_tests(source: str) -> list[str]:
    """What a file imports from test modules."""
    return [
        name for name in imported(source) if any(p.startswith("test_") for p in name.split("."))
    ]


@pytest.mark.parametrize(
    "line",
    [
        "import tests.layers.test_rules",
        "from tests.layers.test_rules import Layer",
        "from tests.layers import test_rules",
        "from .test_rules import Layer",
        "from . import test_rules",
        "def f():\n    from test_rules import Layer",
    ],
)
def test_an_import_of_a_test_module_is_seen(line: str) -> None:
    assert len(of_tests(line)) == 1


def test_no_module_imports_a_test_module() -> None:
    found = {
        path.relative_to(TESTS).as_posix(): names
        for path in TESTS.rglob("*.py")
        if (names := of_tests(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def folders(root: Path, pattern: str) -> set[str]:
    """The folders below a root that hold such files, by their path from there."""
    return {path.parent.relative_to(root).as_posix() for path in root.rglob(pattern)} - {"."}


def test_the_folders_of_tests_are_those_of_the_package() -> None:
    tested = folders(TESTS, "test_*.py") - NO_MIRROR
    package = folders(PACKAGE, "__init__.py")
    assert tested - package == set()
    below = {folder for folder in package for t in tested if folder.startswith(f"{t}/")}
    above = {folder for folder in package for t in tested if t.startswith(f"{folder}/")}
    assert package - tested - below - above == set()


@functools.cache
def slow(path: Path) -> set[str]:
    """The tests of a file that are marked as slow, one by one or all."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if any(ast.unparse(node) == "pytestmark = pytest.mark.slow" for node in tree.body):
        return {test.name for test in tests}
    return {
        test.name
        for test in tests
        if any(ast.unparse(mark) == "pytest.mark.slow" for mark in test.decorator_list)
    }


def test_every_theorem_is_verified_in_the_quick_tier() -> None:
    quick, every = set(), set()
    for test, theorems in ledger.marked(TESTS.parent).items():
        file, name = test.split("::")
        every |= set(theorems)
        quick |= set() if name in slow(TESTS.parent / file) else set(theorems)
    assert every - quick == set()
    assert len(every) > 15


def test_the_number_of_examples_of_a_theorem_grows_in_a_deep_run() -> None:
    """A number that Hypothesis is given as it is stays the same; ``examples`` lets it grow."""
    files = {test.split("::")[0] for test in ledger.marked(TESTS.parent)}
    fixed = {
        f"{file}, line {node.lineno}"
        for file in files
        for node in ast.walk(ast.parse((TESTS.parent / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "settings"
        if any(keyword.arg == "max_examples" for keyword in node.keywords)
    }
    assert {place for place in fixed if "test_reference.py" not in place} == set()


def test_annotations_with_shapes_are_checked_at_every_call() -> None:
    with (TESTS.parent / "pyproject.toml").open("rb") as file:
        options = tomllib.load(file)["tool"]["pytest"]["ini_options"]["addopts"]
    (hook,) = [o for o in options if o.startswith("--jaxtyping-packages=")]
    *checked, checker = hook.partition("=")[2].split(",")
    files = {path: path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    shaped = [path for path, source in files.items() if "from jaxtyping import" in source]
    names = {".".join(p.relative_to(TESTS.parent).with_suffix("").parts) for p in shaped}
    assert checker == "beartype.beartype"
    assert set(checked) == names
    rows = torch.zeros(3, 2)
    with pytest.raises(TypeCheckError):
        RowSpace().add(rows[0])
