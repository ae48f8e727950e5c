"""The theorem ledger: which test verifies which theorem of the book, and with how many examples.

A theorem is a ``prf:theorem`` with a label in a chapter. A test verifies it if it is marked with
``@pytest.mark.verifies("thm-…")``, or with ``exact=True`` added if it computes without rounding and
compares with ``==``. ``chapters/ledger.json`` holds what the marked tests did when they were last
run, with a digest of each test's file; `REGENERATE` writes it. `ledger_faults` compares all three.

Beside the tests stand the machine-checked proofs: the formal statements of `teleport.book.proofs`
that verify a theorem, as they were when Coq last accepted them; `REGENERATE_PROOFS` writes them.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

from teleport.book.coq_source import PROOFS_FOLDER, read_proofs
from teleport.book.notebook_form import outside_of_code, page_markdown

ProofKind = Literal["exact", "numerical"]
"""How a test checks; the third kind, machine-checked, is a `ProofRow`."""

REGENERATE = "pytest tests -m verifies --ledger"
"""The command that runs all marked tests and writes the ledger; one file's: its name instead."""

REGENERATE_PROOFS = "teleport book proofs --ledger"
"""The command that checks the proofs and writes them into the ledger."""

LEDGER_PATH = "chapters/ledger.json"

TOLERANT = {"allclose", "approx", "assert_close", "atol", "isclose", "rel_tol", "rtol", "tolerance"}
"""Names that a test marked as exact must not use."""

_THEOREM = re.compile(r"^\s*(?::{3,}|`{3,})\s*\{prf:theorem\}\s*(?P<title>.*?)\s*$")
_LABEL = re.compile(r"^\s*:label:\s*(?P<label>\S+)\s*$")


@dataclass(frozen=True)
class Theorem:
    """A theorem of the book: its label, its title and the file that states it."""

    label: str
    title: str
    page: str


@dataclass(frozen=True)
class LedgerRow:
    """What one test function did when it was last run, all its parameters together.

    Attributes:
        theorems: label → how it is checked, ``exact`` or ``numerical``.
        examples: passed executions of the test's body: Hypothesis examples times parameters.
        source: digest of the test's file at that time.
    """

    theorems: dict[str, ProofKind]
    examples: int
    source: str


@dataclass(frozen=True)
class ProofRow:
    """A machine-checked statement, as it was when it was last checked.

    Attributes:
        theorems: labels of the theorems that it is a formal version of.
        lines: how many it takes, with its proof.
        source: digest of its file at that time.
    """

    theorems: list[str]
    lines: int
    source: str


_Row = TypeVar("_Row", LedgerRow, ProofRow)


def theorems(chapters: Path) -> list[Theorem]:
    """All theorems that notebooks and Markdown pages below a folder state, in order of the files.

    A theorem without a label has an empty one.
    """
    pages = [p for p in chapters.rglob("*") if p.suffix in (".ipynb", ".md")]
    hidden = {"_build", ".ipynb_checkpoints", "results"}
    return [
        theorem
        for page in sorted(pages)
        if not hidden & set(page.relative_to(chapters).parts)
        for theorem in _stated(page, page.relative_to(chapters).as_posix())
    ]


def _stated(page: Path, name: str) -> Iterator[Theorem]:
    lines = list(outside_of_code(page_markdown(page)))
    for number, line in enumerate(lines):
        if found := _THEOREM.match(line):
            options = [o for o in lines[number + 1 :][:5] if o.lstrip().startswith(":")]
            labels = (label["label"] for o in options if (label := _LABEL.match(o)))
            yield Theorem(next(labels, ""), found["title"], name)


def marked(root: Path) -> dict[str, dict[str, ProofKind]]:
    """Tests below ``root/tests`` that are marked as verifying: id → label → kind, read statically.

    Raises:
        ValueError: a mark is not written out in full, so that it cannot be read.
    """
    return {
        f"{path.relative_to(root).as_posix()}::{function.name}": marks
        for path in sorted((root / "tests").rglob("test_*.py"))
        for function in _functions(path)
        if (marks := _marks(function, path))
    }


def _functions(path: Path) -> Iterator[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return (node for node in tree.body if isinstance(node, ast.FunctionDef))


def _marks(function: ast.FunctionDef, path: Path) -> dict[str, ProofKind]:
    found: dict[str, ProofKind] = {}
    for mark in function.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.verifies":
            try:
                labels = [ast.literal_eval(argument) for argument in mark.args]
                options = {k.arg or "**": ast.literal_eval(k.value) for k in mark.keywords}
                found |= read_mark(labels, options)
            except ValueError as error:
                place = f"{path.name}, line {mark.lineno}"
                raise ValueError(
                    f'{place}: a mark is written @pytest.mark.verifies("thm-span") or '
                    f'@pytest.mark.verifies("thm-span", exact=True), got {ast.unparse(mark)}'
                ) from error
    return found


def read_mark(labels: Iterable[object], options: dict[str, object]) -> dict[str, ProofKind]:
    """What one mark says; ValueError but for labels and at most ``exact=True`` or ``False``."""
    exact = options.get("exact", False)
    names = [label for label in labels if isinstance(label, str)]
    if set(options) - {"exact"} or not isinstance(exact, bool) or not names or names != [*labels]:
        raise ValueError(
            f"verifies takes labels of theorems and exact=True, got {labels}, {options}"
        )
    return dict.fromkeys(names, "exact" if exact else "numerical")


def file_digest(path: Path) -> str:
    """Digest of a file of tests, the same on every system."""
    text = path.read_text(encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_ledger(path: Path) -> dict[str, LedgerRow]:
    """The ledger in a file; empty if there is none; ValueError if the file is something else."""
    return _rows(path, "tests", LedgerRow, REGENERATE)


def read_proof_rows(path: Path) -> dict[str, ProofRow]:
    """The machine-checked statements in a ledger, by file and name; errors as of `read_ledger`."""
    return _rows(path, "proofs", ProofRow, REGENERATE_PROOFS)


def _rows(path: Path, part: str, kind: type[_Row], command: str) -> dict[str, _Row]:
    if not path.exists():
        return {}
    try:
        rows = {"proofs": {}, **json.loads(path.read_text(encoding="utf-8"))}[part]
        return {name: kind(**row) for name, row in rows.items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a ledger ({error!r}): run `{command}`") from error


def proof_rows(root: Path) -> dict[str, ProofRow]:
    """What the proofs below ``root/chapters`` say now: ``file::name`` → row."""
    return {
        f"{file.path.relative_to(root).as_posix()}::{statement.name}": ProofRow(
            [*statement.verifies], statement.lines, file_digest(file.path)
        )
        for file in read_proofs(root / "chapters" / PROOFS_FOLDER)
        for statement in file.statements
        if statement.verifies
    }


def record_proofs(root: Path, rows: dict[str, ProofRow]) -> None:
    """Write proofs, as `proof_rows` gave them before they were checked, into the ledger.

    The rows of the tests stay as they are.
    """
    _write(root / LEDGER_PATH, read_ledger(root / LEDGER_PATH), rows)


def update(root: Path, results: dict[str, tuple[int, str]]) -> dict[str, LedgerRow]:
    """Write what tests did into the ledger; rows of other tests stay as long as they exist.

    ``results`` has by test how many examples passed, and the `file_digest` of its file before it
    ran.
    """
    marks, rows = marked(root), read_ledger(root / LEDGER_PATH)
    rows |= {
        test: LedgerRow(marks[test], *result) for test, result in results.items() if test in marks
    }
    rows = {test: rows[test] for test in sorted(rows) if test in marks}
    _write(root / LEDGER_PATH, rows, read_proof_rows(root / LEDGER_PATH))
    return rows


def _write(path: Path, tests: dict[str, LedgerRow], proofs: dict[str, ProofRow]) -> None:
    parts = [f' "written by": {json.dumps(REGENERATE)}', _entries("tests", tests)]
    if proofs:
        parts += [f' "proofs written by": {json.dumps(REGENERATE_PROOFS)}']
        parts += [_entries("proofs", proofs)]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _entries(name: str, rows: Mapping[str, _Row]) -> str:
    lines = [f"  {json.dumps(key)}: {json.dumps(asdict(row))}" for key, row in rows.items()]
    return f' "{name}": {{\n' + ",\n".join(lines) + "\n }"


def ledger_faults(root: Path) -> list[str]:
    """Where book, tests and ledger of a repository disagree, one line each; empty if nowhere."""
    stated, marks, rows = theorems(root / "chapters"), marked(root), read_ledger(root / LEDGER_PATH)
    return [
        *_unverified(stated, marks),
        *_unknown(stated, marks),
        *_inexact(root, marks),
        *_stale(root, marks, rows),
        *_stale_proofs(root, stated),
    ]


def _unverified(stated: list[Theorem], marks: dict[str, dict[str, ProofKind]]) -> Iterator[str]:
    verified = {label for labels in marks.values() for label in labels}
    pages: dict[str, str] = {}
    for theorem in stated:
        where = f"{theorem.page} states the theorem {theorem.title!r}"
        if not theorem.label:
            yield f"{where} without a label: add the line `:label: thm-…`"
        elif theorem.label in pages:
            yield (
                f"{where} as {theorem.label}, which {pages[theorem.label]} states already: "
                "state it once and refer to it elsewhere"
            )
        elif theorem.label not in verified:
            yield (
                f"{where}, which no test verifies: mark one with "
                f'@pytest.mark.verifies("{theorem.label}")'
            )
        pages.setdefault(theorem.label, theorem.page)


def _unknown(stated: list[Theorem], marks: dict[str, dict[str, ProofKind]]) -> Iterator[str]:
    known = sorted({theorem.label for theorem in stated} - {""})
    unknown: dict[str, list[str]] = {}
    for test, labels in marks.items():
        for label in labels:
            if label not in known:
                unknown.setdefault(label, []).append(test)
    for label, tests in sorted(unknown.items()):
        more = f" and {len(tests) - 1} more" if len(tests) > 1 else ""
        yield (
            f"{tests[0]}{more} verifies {label}, which no chapter states: the book has "
            f"{', '.join(known) or 'no theorem'}"
        )


def _inexact(root: Path, marks: dict[str, dict[str, ProofKind]]) -> Iterator[str]:
    exact = {test for test, labels in marks.items() if "exact" in labels.values()}
    for path in sorted({test.split("::")[0] for test in exact}):
        for function in _functions(root / path):
            if f"{path}::{function.name}" in exact and (found := _tolerances(function)):
                yield (
                    f"{path}::{function.name} is marked as exact, but uses {', '.join(found)}: "
                    "compare with ==, or leave exact=True out"
                )


def _tolerances(function: ast.FunctionDef) -> list[str]:
    """What in the body of a test speaks of rounding: names of tolerances, decimal numbers."""
    found = set()
    for node in (n for statement in function.body for n in ast.walk(statement)):
        name = getattr(node, "attr", getattr(node, "id", getattr(node, "arg", None)))
        if name in TOLERANT:
            found.add(str(name))
        if isinstance(node, ast.Constant) and isinstance(node.value, float):
            found.add(repr(node.value))
    return sorted(found)


def _stale(
    root: Path, marks: dict[str, dict[str, ProofKind]], rows: dict[str, LedgerRow]
) -> Iterator[str]:
    files: dict[str, list[str]] = {}
    for test, labels in marks.items():
        row, path = rows.get(test), test.split("::")[0]
        if row is None or (row.theorems, row.source) != (labels, file_digest(root / path)):
            files.setdefault(path, []).append(test)
    for path, tests in files.items():
        absent = [test.split("::")[1] for test in tests if test not in rows]
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        what = f"has no row for {absent[0]}{more}" if absent else "is older than the file"
        command = f"`pytest {path} --ledger`, or `{REGENERATE}` for all"
        yield f"{path}: {LEDGER_PATH} {what}: run {command}"
    for test in sorted(set(rows) - set(marks)):
        yield f"{LEDGER_PATH} has a row for {test}, which is no marked test: run `{REGENERATE}`"
    for test in sorted(test for test in marks if test in rows and rows[test].examples < 1):
        yield f"{test} ran no example: run `{REGENERATE}` where it is not skipped"


def _stale_proofs(root: Path, stated: list[Theorem]) -> Iterator[str]:
    known = {theorem.label for theorem in stated}
    now, then = proof_rows(root), read_proof_rows(root / LEDGER_PATH)
    for name, row in now.items():
        for label in row.theorems:
            if label not in known:
                yield f"{name} verifies {label}, which no chapter states"
    for file in sorted({n.split("::")[0] for n in {*now, *then} if now.get(n) != then.get(n)}):
        yield f"{file}: {LEDGER_PATH} is older than the file: run `{REGENERATE_PROOFS}`"
