"""Where the tests lie: beside what they test, and each module on its own feet."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

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
