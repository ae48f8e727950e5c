"""What the book shows of the machine-checked proofs: under a theorem its formal versions.

Each has its sentence in words, the statement as Coq reads it with what is given, and its proof,
folded; then come the definitions that the statements use, with a sentence each, and what is not
covered.
"""

from pathlib import Path

from docutils import nodes

from teleport.book.coq_source import (
    PROOFS_FOLDER,
    FormalStatement,
    ProofFile,
    definitions_used,
    formal_versions,
    read_proofs,
)
from teleport.book.ledger import ProofRow, file_digest

Formal = list[tuple[ProofFile, FormalStatement]]


class Proofs:
    """The proofs of a book that its ledger knows: those that Coq has accepted as they stand."""

    def __init__(self, source: Path, rows: dict[str, ProofRow]) -> None:
        self.files = read_proofs(source / PROOFS_FOLDER)
        accepted = {name.rsplit("/", 1)[-1]: row.source for name, row in rows.items()}
        digests = {file.name: file_digest(file.path) for file in self.files}
        self.found: dict[str, Formal] = {}
        for label, versions in formal_versions(self.files).items():
            for file, one in versions:
                if accepted.get(f"{file.path.name}::{one.name}") == digests[file.name]:
                    self.found.setdefault(label, []).append((file, one))

    def summary(self, label: str) -> str:
        """In a few words how a theorem is machine-checked; empty if it is not."""
        count = len(self.found.get(label, []))
        return f"machine-checked, {count} statement{'s' * (count != 1)}" if count else ""

    def not_covered(self, label: str) -> list[str]:
        """What the files say that they do not cover of a theorem."""
        return [file.not_covered[label] for file in self.files if label in file.not_covered]

    def note(self, label: str, guide: str) -> list[nodes.Node]:
        """One line that opens to the formal versions; nothing if there are none.

        Args:
            label: of the theorem.
            guide: address of the page that explains how to read them.
        """
        versions = self.found.get(label)
        if not versions:
            return []
        summary = self.summary(label).capitalize() + ", no assumptions"
        return [
            _open("machine-checked", summary),
            _guide(guide),
            *(node for file, one in versions for node in _shown(file, one)),
            *self._definitions(versions),
            *self._missing(label),
            _close(),
        ]

    def _definitions(self, versions: Formal) -> list[nodes.Node]:
        used = definitions_used(self.files, versions)
        if not used:
            return []
        shown = [node for one in used for node in (_words(one.words), _code(one.text))]
        return [_open("formal-proof", "Definitions that it uses"), *shown, _close()]

    def _missing(self, label: str) -> list[nodes.Node]:
        texts = ["the Python code, which the tests check", *self.not_covered(label)]
        return [_words("Not covered: " + "; ".join(text.rstrip(".") for text in texts) + ".")]


def _shown(file: ProofFile, statement: FormalStatement) -> list[nodes.Node]:
    """Words, what is given, statement, and the proof, folded."""
    given = f"{statement.given}\n\n" if statement.given else ""
    summary = f"Proof, {statement.lines} lines ({file.path.name}, line {statement.line})"
    return [
        _words(statement.words),
        _code(given + statement.text),
        _open("formal-proof", summary),
        _code(statement.proof),
        _close(),
    ]


def _guide(address: str) -> nodes.paragraph:
    text = nodes.paragraph("", "Checked by Coq. ")
    text += nodes.reference("", "How to read it", refuri=address, internal=True)
    text += nodes.Text(".")
    return text


def _words(text: str) -> nodes.paragraph:
    return nodes.paragraph("", text)


def _code(text: str) -> nodes.literal_block:
    return nodes.literal_block(text, text, language="coq")


def _open(kind: str, summary: str) -> nodes.raw:
    return nodes.raw("", f'<details class="{kind}"><summary>{summary}</summary>', format="html")


def _close() -> nodes.raw:
    return nodes.raw("", "</details>", format="html")
