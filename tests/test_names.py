"""One word, one thing: a public name is defined in one module of the package."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "teleport"

CONVENTIONS = {"TeleportCallback", "app", "main", "setup"}
"""What trainers, Typer, the command line and Sphinx call the same in every module that has it."""

CHECKED = {"energy_rank", "group_action", "holm", "leak", "tally", "teleport_gradient"}
"""A learner's function, and beside it in `teleport.check` the check that has to have its name."""

"""Of the core; to be given two names there."""


def defined(path: Path) -> Iterator[str]:
    """Public names that a module gives to something at its top level."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [
                n.id
                for t in targets
                for n in ast.walk(t)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            ]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


def homes() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        for name in defined(path):
            found[name].add(path.relative_to(PACKAGE).as_posix())
    return found


def test_no_public_name_is_defined_for_two_things() -> None:
    doubled = {name: sorted(paths) for name, paths in homes().items() if len(paths) > 1}
    assert {n: p for n, p in doubled.items() if n not in CONVENTIONS | CHECKED} == {}
    assert set(doubled) >= CONVENTIONS | CHECKED, "what is allowed and not there any more"
    for name in CHECKED:
        assert sum(path.startswith("check/chapters/") for path in doubled[name]) == 1
