"""What a check answers: one `Verdict`, in plain language."""

import html
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from teleport.check.places import CHAPTER_OF

GREEN, RED = "#116329", "#a8201a"
"""To be read on white, and on the grey behind outputs in the dark."""


@dataclass(frozen=True, repr=False)
class Verdict:
    """The answer of a check; true exactly if it passed.

    Attributes:
        passed: whether every case came out right.
        theorem: label in the book of the property that failed, or of the main one.
        counterexample: the smallest failing input, as code that reproduces it; empty if passed.
        expected: what the property asks for on that input.
        hint: the mistake that gives exactly these answers, or how to go on.
    """

    check: str
    passed: bool
    theorem: str = ""
    statement: str = ""
    counterexample: str = ""
    expected: str = ""
    got: str = ""
    hint: str = ""
    printed: str = ""
    cases: int = 0

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"<Verdict {self.check}: {'passed' if self.passed else 'wrong'}>"

    def __str__(self) -> str:
        if self.passed:
            return f"{self.check}: passed{self._count()}"
        lines = [f"{self.check}: wrong"]
        for name, text in self._parts():
            first, *rest = text.splitlines()
            if not rest:
                lines.append(f"  {name:15} {first}")
            else:
                lines += [f"  {name}", *(f"      {line}".rstrip() for line in text.splitlines())]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        mark, color = ("✓", GREEN) if self.passed else ("✗", RED)
        title = f"<b style='color:{color}'>{mark} {html.escape(self.check)}</b>"
        if self.passed:
            return f"<div>{title} passed{self._count()}</div>"
        place = html.escape(self.place)
        notebook = Path("..", f"{self.chapter}.ipynb")  # there, seen from the folder of the sheets
        there = self.chapter and notebook.is_file()
        link = f"<a href='{html.escape(notebook.as_posix())}'>{place}</a>" if there else place
        rows = "".join(
            f"<dt>{name}</dt><dd><pre>{html.escape(text)}</pre></dd>"
            for name, text in self._parts()
        )
        return f"<details><summary>{title} wrong {link}</summary><dl>{rows}</dl></details>"

    @property
    def place(self) -> str:
        """Where the book states the property."""
        return f"{self.theorem}, chapters/{self.chapter}.ipynb" if self.chapter else self.theorem

    @property
    def chapter(self) -> str:
        """The notebook that states the property, without suffix; empty if none does."""
        return CHAPTER_OF.get(self.theorem, "")

    def to_dict(self) -> dict[str, Any]:
        """All fields and the chapter, for JSON."""
        return {**asdict(self), "chapter": self.chapter}

    def _count(self) -> str:
        return f" ({self.cases} cases; {self.place})" if self.cases else ""

    def _parts(self) -> list[tuple[str, str]]:
        """Headings and texts that are not empty."""
        parts = [
            ("property", f"{self.statement} ({self.place})" if self.place else self.statement),
            ("smallest input", self.counterexample),
            ("expected", self.expected),
            ("got", self.got),
            ("hint", self.hint),
            ("it printed", self.printed),
        ]
        return [(name, text) for name, text in parts if text.strip()]
