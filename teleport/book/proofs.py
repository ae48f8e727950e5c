"""The machine-checked proofs: compiled with Coq, and audited by what Coq itself has seen.

`check_proofs` copies the files into a folder of their own, compiles them there on all cores, and
asks Coq for the assumptions of everything that it has compiled (``Print Assumptions``). None is
allowed: an axiom, a parameter or an ``Admitted`` is an error, whether a theorem uses it or not.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from teleport.book.coq_source import (
    LIBRARY,
    FormalStatement,
    ProofFile,
    read_proofs,
    required,
    with_needed,
)
from teleport.book.ledger import theorems
from teleport.errors import BookError
from teleport.report import text_table

PACKAGES = (
    "coq libcoq-mathcomp-ssreflect libcoq-mathcomp-algebra libcoq-mathcomp-real-closed "
    "libcoq-mathcomp-multinomials"
)
INSTALL = (
    "the proofs need Coq 8.16 and MathComp 1.15; on Debian 12: "
    f"apt-get install --no-install-recommends {PACKAGES}"
)
CLOSED = "Closed under the global context"
"""What Coq says of something that rests on no assumption."""

EXERCISES = "exercises/exercises.v"
"""Statements whose proofs are left to the reader, below the folder of the proofs."""

_HOLE = re.compile(
    r"^(?P<head>Theorem (?P<name>[\w']+).*?)^Proof\..*?^Admitted\.", re.MULTILINE | re.DOTALL
)
_GLOB = re.compile(r"^(?P<kind>[a-z]+) \d+:\d+ (?P<scope>\S+) (?P<name>\S+)$", re.M)
_PROVED = {"prf", "def", "inst", "ax"}
"""The kinds in Coq's own index of a file that may rest on assumptions."""


@dataclass(frozen=True)
class Audited:
    """A statement of the book in its formal version, and what it rests on: nothing, or names."""

    label: str
    file: ProofFile
    statement: FormalStatement
    assumptions: str


def coq_tool(name: str) -> str:
    """The path of a program of Coq; BookError if it is not installed, with what installs it."""
    found = shutil.which(name)
    if found is None:
        raise BookError(f"{name} is not installed: {INSTALL}")
    return found


def check_proofs(
    folder: Path, out: Path, workers: int, done: Callable[[str], None] = lambda name: None
) -> list[Audited]:
    """Compile all files of a folder in ``out`` and audit them.

    Args:
        folder: Where the files are; nothing is written there.
        out: A folder for what Coq writes.
        workers: How many files are compiled at once.
        done: Called with the name of each file that was compiled.

    Returns:
        Every statement that verifies a theorem of the book, once for each theorem.

    Raises:
        BookError: Coq or MathComp is missing, a proof fails, something rests on an assumption, or
            a statement verifies a theorem that no chapter states.
    """
    files = read_proofs(folder)
    if not files:
        raise BookError(f"{folder} holds no proofs (*.v)")
    _check_labels(files, folder.parent)
    compile_proofs([file.path for file in files], out, workers, done)
    assumed = assumptions(out, [file.name for file in files])
    faults = [f"{name} rests on: {what}" for name, what in assumed.items() if what]
    if faults:
        raise BookError("\n".join([f"{len(faults)} of the proofs rest on assumptions", *faults]))
    return [
        Audited(label, file, statement, assumed[f"{file.name}.{statement.name}"])
        for file in files
        for statement in file.statements
        for label in statement.verifies
    ]


def _check_labels(files: list[ProofFile], chapters: Path) -> None:
    known = {theorem.label for theorem in theorems(chapters)}
    for file in files:
        named = {label: s.name for s in file.statements for label in s.verifies}
        named |= dict.fromkeys(file.not_covered, "a comment")
        for label, name in named.items():
            if label not in known:
                raise BookError(
                    f"{file.path.name}: {name} verifies {label}, which no chapter states: the "
                    f"book has {', '.join(sorted(known))}"
                )


def compile_proofs(
    paths: Iterable[Path], out: Path, workers: int, done: Callable[[str], None]
) -> None:
    """Compile files in ``out``, each as soon as those it needs are there.

    Raises:
        BookError: Coq or MathComp is missing or a file fails, with what Coq says.
    """
    coqc = coq_tool("coqc")
    out.mkdir(parents=True, exist_ok=True)
    sources = {path.stem: path.read_text(encoding="utf-8") for path in paths}
    for name, text in sources.items():
        (out / f"{name}.v").write_text(text, encoding="utf-8")
    needs = {name: required(text) & set(sources) for name, text in sources.items()}
    running: dict[Future[None], str] = {}
    ready: set[str] = set()
    with ThreadPoolExecutor(workers) as pool:
        while needs or running:
            for name in [name for name, before in needs.items() if before <= ready]:
                del needs[name]
                running[pool.submit(_compile, coqc, out, name)] = name
            if not running:
                raise BookError(f"these proofs need each other in a circle: {', '.join(needs)}")
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name = running.pop(future)
                future.result()
                ready.add(name)
                done(name)


def _compile(coqc: str, out: Path, name: str) -> None:
    said = run_coq(coqc, out, f"{name}.v")
    if said.returncode == 0:
        return
    if re.search(
        r"Cannot find a physical path.*(mathcomp|SsrMultinomials)", said.stderr, re.DOTALL
    ):
        raise BookError(f"MathComp is not installed: {INSTALL}\n{said.stderr.strip()}")
    raise BookError(f"the proof {name}.v fails:\n{said.stderr.strip()}")


def run_coq(program: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of Coq in a folder of compiled files; its warnings are left out."""
    quiet = ("-w", "none") if program.endswith("coqc") else ()
    command = [program, *quiet, "-Q", ".", LIBRARY, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def assumptions(out: Path, names: list[str]) -> dict[str, str]:
    """What everything in compiled files rests on: ``file.name`` → nothing, or what Coq says.

    The names come from Coq's own index of each file, not from reading the source.
    """
    found = {f"{name}.{one}": "" for name in names for one in _indexed(out / f"{name}.glob")}
    if all(said == CLOSED for said in _ask(out, names, [list(found)])):
        return found
    every = _ask(out, names, [[name] for name in found])
    return {
        name: "" if said == CLOSED else " ".join(said.split())
        for name, said in zip(found, every, strict=True)
    }


def _indexed(glob: Path) -> Iterator[str]:
    """Constants of a file, with the modules they lie in; variables of sections are none."""
    for entry in _GLOB.finditer(glob.read_text(encoding="utf-8")):
        if entry["kind"] in _PROVED:
            inside = "" if entry["scope"] == "<>" else f"{entry['scope']}."
            yield f"{inside}{entry['name']}"


def _ask(out: Path, names: list[str], groups: list[list[str]]) -> list[str]:
    """``Print Assumptions`` of groups of constants; one answer each.

    A group is asked for as one definition that mentions all of it: its assumptions are theirs.
    """
    lines = [f"From {LIBRARY} Require {' '.join(names)}."]
    for number, group in enumerate(groups):
        parts = " ".join(f"let _ := @{LIBRARY}.{name} in" for name in group)
        lines += [
            f"Definition asked_{number} := {parts} tt.",
            f'Goal True. idtac "== {number}". Abort.',
            f"Print Assumptions asked_{number}.",
        ]
    (out / "audit.v").write_text("\n".join(lines) + "\n", encoding="utf-8")
    said = run_coq(coq_tool("coqc"), out, "audit.v")
    if said.returncode != 0:
        raise BookError(f"the audit of the proofs fails:\n{said.stderr.strip()}")
    answers = re.split(r"^== \d+$", said.stdout, flags=re.M)[1:]
    if len(answers) != len(groups):
        raise BookError(f"the audit of the proofs has no answer for each question:\n{said.stdout}")
    return [answer.strip() for answer in answers]


def recheck(out: Path, names: list[str]) -> None:
    """Check compiled files once more with Coq's small independent checker, ``coqchk``.

    MathComp's own files are taken as they are.

    Raises:
        BookError: it is not installed or refuses a file.
    """
    modules = (part for name in names for part in ("-norec", f"{LIBRARY}.{name}"))
    said = run_coq(coq_tool("coqchk"), out, "-silent", *modules)
    if said.returncode != 0:
        raise BookError(f"coqchk refuses the proofs:\n{said.stdout.strip()}\n{said.stderr.strip()}")


def check_exercise(folder: Path, answer: Path, out: Path, workers: int) -> str:
    """Check a learner's copy of the exercises: every statement as it was, every proof complete.

    Raises:
        BookError: a proof fails or is missing, or a statement is another one.
    """
    if not answer.is_file():
        raise BookError(f"{answer} is no file: copy {folder / EXERCISES} and fill in the proofs")
    pristine = folder / EXERCISES
    text, questions = (path.read_text(encoding="utf-8") for path in (answer, pristine))
    names = [found["name"] for found in _HOLE.finditer(questions)]
    files = with_needed(read_proofs(folder), required(text) | required(questions))
    compile_proofs([file.path for file in files], out, workers, lambda name: None)
    (out / "answer.v").write_text(text, encoding="utf-8")
    _compile(coq_tool("coqc"), out, "answer")
    asked = _HOLE.sub(
        lambda found: f"{found['head']}Proof. exact: {LIBRARY}.answer.{found['name']}. Qed.",
        questions,
    )
    (out / "asked.v").write_text(f"From {LIBRARY} Require answer.\n{asked}", encoding="utf-8")
    said = run_coq(coq_tool("coqc"), out, "asked.v")
    if said.returncode != 0:
        raise BookError(f"{answer}: a statement is not that of {pristine}:\n{said.stderr.strip()}")
    assumed = {n: a for n, a in assumptions(out, ["answer"]).items() if a}
    if assumed:
        unproved = (f"{name.split('.')[1]} rests on: {what}" for name, what in assumed.items())
        raise BookError("\n".join([f"{answer}: not all is proved", *unproved]))
    return f"{answer}: {', '.join(names)} proved"


def audit_table(rows: list[Audited]) -> str:
    """The statements as text: theorem, file, name, lines, assumptions."""
    head = ("theorem", "file", "statement", "lines", "assumptions")
    lines = [head]
    for row in sorted(rows, key=lambda row: row.label):
        name, length = row.statement.name, str(row.statement.lines)
        lines.append((row.label, row.file.path.name, name, length, row.assumptions or "none"))
    return "\n".join(text_table(lines))
