"""Sphinx extension: under each theorem of the book what verifies it, and a page of all theorems.

Tests are listed by name; machine-checked proofs are shown by `teleport.book.proof_page`.

Add ``"teleport.book.ledger_page"`` to the extensions, beside ``sphinx_proof``; ``theorem_ledger``
in the configuration is the ledger's path, by default ``ledger.json`` in the source folder. The
directive ``{theorem-ledger}`` stands for the table. What is shown is what `teleport.book.ledger`
has recorded.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from teleport.book.ledger import REGENERATE, LedgerRow, read_ledger, read_proof_rows
from teleport.book.proof_page import Proofs

logger = logging.getLogger(__name__)

GUIDE = "pages/proofs"
"""The page that says how to read the machine-checked proofs."""

COLUMNS = ("Theorem", "Chapter", "Verified by", "Examples")


class TheoremTable(nodes.General, nodes.Element):  # type: ignore[misc]
    """Where the table goes; it is made when all chapters have been read and numbered."""


class TheoremLedger(SphinxDirective):
    """``{theorem-ledger}``: the table of all theorems."""

    def run(self) -> list[nodes.Node]:
        """Put a placeholder."""
        return [TheoremTable()]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension."""
    app.add_config_value("theorem_ledger", "ledger.json", "env")
    app.add_directive("theorem-ledger", TheoremLedger)
    app.connect("doctree-read", _depend)
    app.connect("doctree-resolved", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _depend(app: Sphinx, doctree: nodes.document) -> None:
    """Pages that show the ledger are built again when it changes."""
    if next(_theorems(doctree), None) or next(doctree.findall(TheoremTable), None):
        app.env.note_dependency(str(_path(app)))


def _fill(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    theorems, tables = list(_theorems(doctree)), list(doctree.findall(TheoremTable))
    if not theorems and not tables:
        return
    if not _path(app).exists():
        logger.warning("there is no theorem ledger %s: run `%s`", _path(app), REGENERATE)
    rows = read_ledger(_path(app))
    proofs = Proofs(Path(app.srcdir), read_proof_rows(_path(app)))
    guide = app.builder.get_relative_uri(docname, GUIDE)
    for theorem in theorems:
        theorem += _note(_verifying(rows, theorem["label"]), theorem["label"])
        theorem += proofs.note(theorem["label"], guide)
    for table in tables:
        table.replace_self(_table(app, docname, rows, proofs))


def _path(app: Sphinx) -> Path:
    return Path(app.srcdir, app.config.theorem_ledger)


def _theorems(doctree: nodes.Node) -> Iterator[nodes.Element]:
    return (n for n in doctree.findall(nodes.Admonition) if n.get("realtype") == "theorem")


def _verifying(rows: dict[str, LedgerRow], label: str) -> dict[str, LedgerRow]:
    """The tests of one theorem: exact ones first, then by the number of examples."""
    found = [(test, row) for test, row in rows.items() if label in row.theorems]
    return dict(sorted(found, key=lambda f: (f[1].theorems[label] != "exact", -f[1].examples)))


def _note(tests: dict[str, LedgerRow], label: str) -> list[nodes.Node]:
    """One line that opens to the list of tests."""
    if not tests:
        return [nodes.paragraph("", "No test verifies this yet.", classes=["verified-by"])]
    return _folded(f"Verified by {_tests(tests, label)}; {_examples(tests)}", tests, label)


def _tests(tests: dict[str, LedgerRow], label: str) -> str:
    """Their number, and how many of them are exact."""
    exact = sum(row.theorems[label] == "exact" for row in tests.values())
    count = _count(len(tests), "test")
    if exact == len(tests):
        return f"{count}, exact" if exact == 1 else f"{count}, all exact"
    return f"{count}, {exact} of them exact" if exact else count


def _examples(tests: dict[str, LedgerRow]) -> str:
    return _count(sum(row.examples for row in tests.values()), "example")


def _folded(summary: str, tests: dict[str, LedgerRow], label: str) -> list[nodes.Node]:
    """A summary that opens to the tests; in print, and without HTML, the list alone or nothing."""
    start = f'<details class="verified-by"><summary>{summary}</summary>'
    items = nodes.bullet_list(classes=["verified-by"])
    for test, row in tests.items():
        path, function = test.split("::")
        text = nodes.paragraph("", function.removeprefix("test_").replace("_", " ") + " (")
        text += nodes.literal("", path)
        text += nodes.Text(f", {_count(row.examples, 'example')}, {row.theorems[label]})")
        items += nodes.list_item("", text)
    return [nodes.raw("", start, format="html"), items, nodes.raw("", "</details>", format="html")]


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def _table(app: Sphinx, docname: str, rows: dict[str, LedgerRow], proofs: Proofs) -> nodes.table:
    body = nodes.tbody()
    for page, theorem in _all_theorems(app):
        label = theorem["label"]
        tests, formal = _verifying(rows, label), proofs.summary(label)
        found = [nodes.paragraph("", formal)] if formal else []
        found += _folded(_tests(tests, label), tests, label) if tests else []
        examples = nodes.paragraph("", _examples(tests).split()[0])
        places = _places(app, docname, page, theorem)
        body += _row(*places, found or [nodes.paragraph("", "–")], [examples])
    head = nodes.thead("", _row(*([nodes.paragraph("", column)] for column in COLUMNS)))
    group = nodes.tgroup("", cols=len(COLUMNS))
    group += [nodes.colspec(colwidth=width) for width in (30, 25, 35, 10)]
    group += [head, body]
    return nodes.table("", group, classes=["theorem-ledger"])


def _all_theorems(app: Sphinx) -> Iterator[tuple[str, nodes.Element]]:
    """All theorems of the book with their pages, in the order of the table of contents."""
    known = getattr(app.env, "proof_list", {})
    pages = {entry["docname"] for entry in known.values() if entry["realtype"] == "theorem"}
    for page in sorted(pages):
        for theorem in _theorems(app.env.get_doctree(page)):
            yield page, theorem


def _places(
    app: Sphinx, docname: str, page: str, theorem: nodes.Element
) -> Iterator[list[nodes.Node]]:
    """The theorem and its chapter, with links."""
    target, label = app.builder.get_relative_uri(docname, page), theorem["label"]
    numbers = app.env.toc_fignumbers.get(page, {}).get("theorem", {}).get(label, ())
    number = f"Theorem {'.'.join(map(str, numbers))}".strip()
    link = nodes.reference("", number, refuri=f"{target}#{label}", internal=True)
    yield [nodes.paragraph("", "", link, *(child.deepcopy() for child in theorem[0].children))]
    title = app.env.titles[page].astext()
    yield [nodes.paragraph("", "", nodes.reference("", title, refuri=target, internal=True))]


def _row(*cells: list[nodes.Node]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", *cell) for cell in cells))
