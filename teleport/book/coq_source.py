"""What stands in the machine-checked proofs: statements of Coq files, read line by line.

The files keep to a form that is easy to read for people too. A statement begins at the start of a
line with ``Theorem``, ``Lemma``, ``Definition``, … and ends with a full stop at the end of a line;
its proof ends with ``Qed.``. The comment ``(** … *)`` before it says in words what it states, and,
as ``verifies: thm-span thm-fixed``, of which theorems of the book it is a formal version. A comment
``(** not covered: thm-span: … *)`` says what of a theorem is not proved.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROOFS_FOLDER = "proofs"
"""Where the files lie, in the folder of the chapters."""

LIBRARY = "Teleport"
"""The name under which the files know each other."""

_KINDS = "Theorem|Lemma|Corollary|Definition|Fixpoint|Inductive|Record"
_STATEMENT = re.compile(rf"^(?P<kind>{_KINDS})\s+(?P<name>[\w']+)")
_CONTEXT = re.compile(r"^(Variables?|Hypothes[ei]s|Let|Implicit Types?|Notation)\b")
_SECTION = re.compile(r"^(?P<what>Section|End)\s+(?P<name>\w+)\.")
_PROOF_END = re.compile(r"(Qed|Defined|Admitted|Abort)\.$")
_REQUIRES = re.compile(rf"^From {LIBRARY} Require (?:Import |Export )?(?P<names>[\w\s]+)\.", re.M)
_VERIFIES = re.compile(r"\s*verifies:\s*(?P<labels>.*)$")
_NOT_COVERED = re.compile(r"not covered:\s*(?P<label>[\w-]+):\s*(?P<text>.*)$", re.DOTALL)


@dataclass(frozen=True)
class FormalStatement:
    """One definition, lemma or theorem.

    Attributes:
        kind: the word it begins with.
        words: what the comment before it says.
        verifies: labels of the book's theorems.
        proof: from ``Proof.`` to ``Qed.``; empty for a definition.
        given: what the sections around it assume.
        lines: how many lines it has, with its proof.
    """

    kind: str
    name: str
    words: str
    verifies: tuple[str, ...]
    text: str
    proof: str
    given: str
    line: int
    lines: int


@dataclass
class ProofFile:
    """One file: its statements in their order, and what it says that it does not cover."""

    path: Path
    statements: list[FormalStatement] = field(default_factory=list)
    not_covered: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's name without the suffix, which is the module's name."""
        return self.path.stem


def read_proofs(folder: Path) -> list[ProofFile]:
    """All files of a folder, in the order of their names."""
    return [read_proof_file(path) for path in sorted(folder.glob("*.v"))]


def read_proof_file(path: Path) -> ProofFile:
    """One file."""
    found, words = ProofFile(path), ""
    verifies: tuple[str, ...] = ()
    sections: list[list[str]] = [[]]
    for number, sentence in _sentences(path.read_text(encoding="utf-8")):
        if sentence.startswith("(**"):
            words, verifies = _comment(sentence, found)
        elif section := _SECTION.match(sentence):
            sections = [*sections, []] if section["what"] == "Section" else sections[:-1]
        elif _CONTEXT.match(sentence):
            sections[-1].append(sentence)
        elif statement := _STATEMENT.match(sentence):
            text, proof = _split(sentence)
            verified, lines = verifies if proof else (), sentence.count("\n") + 1
            given = "\n".join(line for section in sections for line in section)
            kind, name = statement.group("kind", "name")
            found.statements.append(
                FormalStatement(kind, name, words, verified, text, proof, given, number, lines)
            )
        if not sentence.strip():
            words, verifies = "", ()
    return found


def _sentences(text: str) -> Iterator[tuple[int, str]]:
    """Comments, statements with their proofs, other sentences and empty lines, with their lines."""
    lines, start = text.splitlines(), 0
    while start < len(lines):
        stop = start + 1
        end = _end_of(lines[start])
        while end and stop < len(lines) and not re.search(end, lines[stop - 1]):
            stop += 1
        if re.match(r"Proof\.", lines[stop] if stop < len(lines) else ""):
            while stop < len(lines) and not _PROOF_END.search(lines[stop]):
                stop += 1
            stop += 1
        yield start + 1, "\n".join(lines[start:stop])
        start = stop


def _end_of(line: str) -> str:
    """How the sentence that begins with a line ends; nothing, if it is that line."""
    if line.lstrip().startswith("(*"):
        return r"\*\)\s*$"
    return r"\.\s*$" if line.strip() else ""


def _comment(sentence: str, found: ProofFile) -> tuple[str, tuple[str, ...]]:
    """The words of a comment and the labels it names; what is not covered goes into the file."""
    lines = [line.strip() for line in sentence[3 : sentence.rindex("*)")].splitlines()]
    text = " ".join(line for line in lines if line)
    if missing := _NOT_COVERED.match(text):
        found.not_covered[missing["label"]] = missing["text"].strip()
        return "", ()
    if named := _VERIFIES.search(text):
        return text[: named.start()].strip(), tuple(named["labels"].split())
    return text, ()


def _split(sentence: str) -> tuple[str, str]:
    text, found, proof = sentence.partition("\nProof.")
    return (text, "Proof." + proof) if found else (sentence, "")


def required(text: str) -> set[str]:
    """The names of the files that a file needs, directly."""
    return {name for found in _REQUIRES.finditer(text) for name in found["names"].split()}


def definitions_used(
    files: list[ProofFile], versions: list[tuple[ProofFile, FormalStatement]]
) -> list[FormalStatement]:
    """The definitions whose names occur in statements, and in these definitions, in their order.

    A name means what it does in the statement's own file or in one that this needs.
    """
    home = {id(one): file for file in files for one in file.statements}
    found: dict[int, FormalStatement] = {}
    todo = [statement for _, statement in versions]
    while todo:
        one = todo.pop()
        words = set(re.findall(r"[\w']+", f"{one.given}\n{one.text}"))
        for file in with_needed(files, {home[id(one)].name}):
            for other in file.statements:
                if not other.proof and other.name in words and id(other) not in found:
                    found[id(other)] = other
                    todo.append(other)
    first = {id(statement) for _, statement in versions}
    order = [one for file in files for one in file.statements]
    return [one for one in order if id(one) in found and id(one) not in first]


def with_needed(files: list[ProofFile], names: set[str]) -> list[ProofFile]:
    """The files of these names, and all that they need, directly or not."""
    found, new = set[str](), set(names)
    while new:
        found |= new
        texts = (file.path.read_text(encoding="utf-8") for file in files if file.name in new)
        new = {name for text in texts for name in required(text)} - found
    return [file for file in files if file.name in found]


def formal_versions(files: list[ProofFile]) -> dict[str, list[tuple[ProofFile, FormalStatement]]]:
    """The statements that verify each theorem of the book: label → files and statements.

    Those of the file that is named like the theorem come first.
    """
    found: dict[str, list[tuple[ProofFile, FormalStatement]]] = {}
    for file in files:
        for statement in file.statements:
            for label in statement.verifies:
                found.setdefault(label, []).append((file, statement))
    for label, versions in found.items():
        own = [v for v in versions if v[0].name == label.removeprefix("thm-")]
        found[label] = own + [v for v in versions if v not in own]
    return found
