"""The public interface does not change in silence: `tests/api.txt` holds every signature.

``python tests/test_api.py`` writes it anew, once the changelog names what has changed.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import GenericAlias, ModuleType

import click
import pytest
from typer.main import get_command

import teleport
from teleport.cli.commands import app

SNAPSHOT = Path(__file__).with_name("api.txt")
CHANGES = Path(__file__).parents[1] / "chapters" / "pages" / "changelog.md"


def interface() -> list[str]:
    """A line for every public name with its signature, then for every option of every command."""
    lines = [line for name in teleport.__all__ for line in told(f"teleport.{name}", name)]
    return [*lines, *options("teleport", get_command(app))]


def told(path: str, name: str) -> Iterator[str]:
    """What is to be kept of one public name."""
    found = getattr(import_module("teleport"), name)
    if not isinstance(found, ModuleType):
        yield from signatures(path, found)
        return
    yield path
    own = [n for n, v in vars(found).items() if getattr(v, "__module__", "") == found.__name__]
    for inner in getattr(found, "__all__", [n for n in own if not n.startswith("_")]):
        yield from signatures(f"{path}.{inner}", getattr(found, inner))


def signatures(path: str, found: object) -> Iterator[str]:
    """Of a function, or of a class and its public methods, those it inherits from us included."""
    if inspect.isclass(found) and not isinstance(found, GenericAlias):  # Python 3.10 says both
        yield path + ("" if issubclass(found, BaseException) else signature(found))
        for name in sorted(set(dir(found))):
            member = inspect.getattr_static(found, name)
            home = next(c.__module__ for c in found.__mro__ if name in vars(c))
            if name.startswith("_") or not home.startswith("teleport."):
                continue
            if isinstance(member, property):
                yield f"{path}.{name}: property"
            elif callable(getattr(found, name)):
                yield f"{path}.{name}{signature(getattr(found, name))}"
    elif inspect.isroutine(found):
        yield path + signature(found)
    else:
        yield path


def signature(found: object) -> str:
    """Names, kinds and defaults; annotations are written otherwise by other Pythons."""
    whole = inspect.signature(found)  # type: ignore[arg-type]
    plain = []
    for parameter in whole.parameters.values():
        default = parameter.default
        if inspect.isroutine(default):
            default = _Named(default.__name__)
        plain.append(parameter.replace(annotation=inspect.Parameter.empty, default=default))
    return str(inspect.Signature(plain))


class _Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def options(path: str, command: click.Command) -> Iterator[str]:
    """Of a command of the command line, and of those it has."""
    yield path
    for parameter in command.params:
        names = "/".join([*parameter.opts, *parameter.secondary_opts])
        yield f"{path} {names if names.startswith('-') else names.upper()}"
    for name, inner in getattr(command, "commands", {}).items():
        yield from options(f"{path} {name}", inner)


def differences(before: list[str], now: list[str]) -> list[str]:
    """Lines that are gone, then lines that are new."""
    gone = [f"- {line}" for line in before if line not in now]
    return gone + [f"+ {line}" for line in now if line not in before]


def unnamed(changed: list[str], changelog: str) -> list[str]:
    """Changes of which the newest section of the changelog names neither the name nor its owner."""
    newest = changelog.split("\n## ")[1]
    words = set(re.findall(r"--[\w-]+|\w+", newest))
    return [line for line in changed if not words & names(line[2:])]


def names(line: str) -> set[str]:
    """The name that a line is about, and that of its class, module or command."""
    if line.startswith("teleport "):
        *commands, last = line.removeprefix("teleport ").split(" ")
        return {*commands[-1:], *last.split("/")}
    _, *parts = re.match(r"[\w.]+", line)[0].split(".")  # type: ignore[index]
    return set(parts[-2:])


def test_the_public_interface_is_that_of_the_snapshot() -> None:
    before = SNAPSHOT.read_text("utf-8").splitlines()
    now = interface()
    changed = differences(before, now)
    assert not changed, "\n".join(
        [
            "the public interface has changed:",
            *changed,
            "if that is meant, name it in the newest section of chapters/pages/changelog.md "
            "and run: python tests/test_api.py",
        ]
    )
    assert before == now, "only the order differs; run: python tests/test_api.py"


def test_the_snapshot_holds_what_users_call() -> None:
    lines = SNAPSHOT.read_text("utf-8").splitlines()
    assert len(lines) == len(set(lines)) > 200
    for start in ("teleport.Teleporter(model, *, tau=1.0,", "teleport.layers.register(",
                  "teleport.NullSpace.attach(", "teleport.TeleportReport.growth: property",
                  "teleport.rivals.SymmetryTeleporter(", "teleport run --preset",
                  "teleport watch FOLDER", "teleport book build --execute"):  # fmt: skip
        assert any(line.startswith(start) for line in lines), start
    assert not any(" at 0x" in line for line in lines)


def grown(model: object, tau: float = 1.0, way: object = len) -> None: ...


class Parent:
    def inherited(self) -> None: ...


class Child(Parent):
    def own(self, x: int) -> None: ...

    @property
    def size(self) -> int:
        return 1

    def _hidden(self) -> None: ...


def test_lines_tell_names_kinds_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(signatures("grown", grown)) == ["grown(model, tau=1.0, way=len)"]
    for one in (Parent, Child):
        monkeypatch.setattr(one, "__module__", "teleport.x")
    members = ["C()", "C.inherited(self)", "C.own(self, x)", "C.size: property"]
    assert list(signatures("C", Child)) == members


def test_a_change_has_to_be_named_in_the_newest_section() -> None:
    before = ["teleport.f(x)", "teleport run --lr", "teleport.A.g()"]
    now = ["teleport.f(x, y=1)", "teleport run --lr", "teleport look", "teleport look --far/--near"]
    changed = differences(before, now)
    assert changed[0] == "- teleport.f(x)"
    assert len(changed) == 5
    log = (
        "# C\n\n## 2\n\n- `f` takes `y`; `teleport look`; `A.g` has gone.\n\n## 1\n\n- `A`, `look`"
    )
    assert unnamed(changed, log) == []
    assert unnamed(changed, log.replace("look`", "see`", 1)) == changed[3:]
    assert unnamed(changed, log.replace("`A.g`", "it")) == ["- teleport.A.g()"]


if __name__ == "__main__":
    old = SNAPSHOT.read_text("utf-8").splitlines() if SNAPSHOT.exists() else []
    new = interface()
    missing = unnamed(differences(old, new), CHANGES.read_text("utf-8")) if old else []
    if missing:
        lines = ["the newest section of the changelog does not name:", *missing]
        sys.exit("\n".join(lines))
    SNAPSHOT.write_text("\n".join(new) + "\n", encoding="utf-8")
