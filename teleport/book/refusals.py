"""What the library refuses, and why: a table of cases, and the book's page of them.

The same table is run by the tests, case by case, so that the page says what happens.
"""

from dataclasses import dataclass
from pathlib import Path

from teleport.runtime.toml import tomllib

OUTCOMES = {
    "moves": "the loss stays, the gradient grows",
    "stays": "nothing moves",
    "kept": "old outputs stay",
    "refused": "refused",
}
"""What a case comes to, in the words of the page."""


@dataclass(frozen=True)
class Situation:
    """One thing a model or closure may contain.

    Attributes:
        code: defines ``model``, ``loss`` and ``output``, after the table's setup.
        step: ``"moves"``, ``"stays"`` or ``"refused"``: what `teleport.Teleporter.step` does.
        keep: ``"kept"`` or ``"refused"``: what `teleport.null_space` does.
        says: words that it says so with, one for both or one each.
        later: code that runs once the Teleporter or the null space is there.
        inside: the context around the call.
    """

    what: str
    code: str
    step: str
    keep: str
    says: str | dict[str, str] = ""
    later: str = ""
    inside: str = ""

    def says_of(self, call: str) -> str:
        """What ``"step"`` or ``"keep"`` says."""
        return self.says if isinstance(self.says, str) else self.says.get(call, "")


@dataclass(frozen=True)
class SituationKind:
    """Cases that are alike, and why they matter."""

    title: str
    why: str
    cases: tuple[Situation, ...]


@dataclass(frozen=True)
class Refusals:
    """The whole table; ``setup`` is the code that every case begins with."""

    setup: str
    kinds: tuple[SituationKind, ...]


def read_refusals(path: Path) -> Refusals:
    """Read the table; unknown keys are errors."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    kinds = (
        SituationKind(kind["title"], kind["why"], tuple(Situation(**case) for case in kind["case"]))
        for kind in table["kind"]
    )
    return Refusals(table["setup"], tuple(kinds))


def refusals_page(table: Refusals) -> str:
    """The table as MyST: the kinds as sections, the cases as rows, their code folded."""
    return "\n".join(
        [_code("What every case begins with", table.setup), *map(_section, table.kinds)]
    )


def _section(kind: SituationKind) -> str:
    head = "| | a teleport | a null space | it says |\n|---|---|---|---|"
    code = "\n\n".join(f"# {case.what.replace('`', '')}\n{_source(case)}" for case in kind.cases)
    return "\n".join(
        [
            f"## {kind.title}\n",
            f"{kind.why}\n",
            head,
            *map(_row, kind.cases),
            "",
            _code("Code", code),
        ]
    )


def _row(case: Situation) -> str:
    said = dict.fromkeys(words for words in map(case.says_of, ("step", "keep")) if words)
    words = "; ".join(f"“{each}”" for each in said)
    return f"| {case.what} | {OUTCOMES[case.step]} | {OUTCOMES[case.keep]} | {words} |"


def _source(case: Situation) -> str:
    parts = [case.code.strip()]
    if case.inside:
        parts.append(f"with {case.inside}:\n    ...  # the call")
    if case.later:
        parts.append(f"...  # the Teleporter or the null space is made\n{case.later.strip()}")
    return "\n".join(parts)


def _code(title: str, source: str) -> str:
    return f":::{{admonition}} {title}\n:class: dropdown\n\n```python\n{source.strip()}\n```\n:::\n"
