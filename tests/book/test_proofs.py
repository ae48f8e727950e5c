"""Machine-checked proofs: compiled, audited, tied to Python; and every way to cheat is refused."""

import re
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from typer.testing import CliRunner

from teleport.book import ledger, proofs
from teleport.book.commands import app
from teleport.book.coq_source import definitions_used, formal_versions, read_proofs
from teleport.errors import BookError
from tests.support.graphs import Graph, coq_agreement, graphs, run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "chapters" / "proofs"

coq = pytest.mark.skipif(
    shutil.which("coqc") is None, reason=f"coqc is not installed: {proofs.INSTALL}"
)

CHAPTER = """\
# Chapter

:::{prf:theorem} Something
:label: thm-something
:::
"""

GOOD = """\
(** Two files, so that one needs the other. *)
From Teleport Require Import base.

(** not covered: thm-something: the rest. *)

Section Something.
Variable n : nat.

(** Twice a number. *)
Definition double := n + n.

(** It is what it is.

    verifies: thm-something *)
Theorem something : double = double.
Proof.
reflexivity.
Qed.
End Something.
"""
BASE = "(** The truth. *)\nDefinition base := True.\n"


def book(folder: Path, text: str = GOOD, base: str = BASE) -> Path:
    """A small book's proofs."""
    (folder / "chapters" / "proofs").mkdir(parents=True)
    (folder / "chapters" / "a.md").write_text(CHAPTER)
    (folder / "chapters" / "proofs" / "base.v").write_text(base)
    (folder / "chapters" / "proofs" / "one.v").write_text(text)
    return folder / "chapters" / "proofs"


def check(folder: Path) -> list[proofs.Audited]:
    return proofs.check_proofs(folder, folder.parents[1] / "out", 2)


def test_statements_are_read_with_their_words_and_what_they_use(tmp_path: Path) -> None:
    files = read_proofs(book(tmp_path))
    ((file, statement),) = formal_versions(files)["thm-something"]
    assert (file.name, statement.name, statement.words) == ("one", "something", "It is what it is.")
    assert statement.text == "Theorem something : double = double."
    assert statement.proof == "Proof.\nreflexivity.\nQed."
    assert statement.given == "Variable n : nat."
    assert [one.name for one in definitions_used(files, [(file, statement)])] == ["double"]
    assert file.not_covered == {"thm-something": "the rest."}


@coq
def test_proofs_are_compiled_elsewhere_in_the_order_of_their_needs(tmp_path: Path) -> None:
    folder = book(tmp_path)
    done: list[str] = []
    rows = proofs.check_proofs(folder, tmp_path / "out", 2, done.append)
    assert done == ["base", "one"]
    assert [(row.label, row.statement.name, row.assumptions) for row in rows] == [
        ("thm-something", "something", "")
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["base.v", "one.v"]
    assert re.search(r"thm-something +one\.v +something +4 +none", proofs.audit_table(rows))


PROOF = "reflexivity.\nQed."
BROKEN = {
    "broken proof": (GOOD.replace("reflexivity", "discriminate"), r"the proof one\.v fails:"),
    "no proof": (GOOD.replace(PROOF, "Admitted."), r"one\.something rests on: .*something"),
    "an axiom that is used": (
        GOOD.replace("(** It is", "Axiom easy : forall m : nat, m = m.\n\n(** It is").replace(
            "reflexivity", "apply easy"
        ),
        r"one\.something rests on: .*easy",
    ),
    "an axiom that nothing uses": (GOOD + "Axiom easy : 0 = 1.\n", r"one\.easy rests on: .*easy"),
    "a parameter": (GOOD + "Parameter easy : 0 = 1.\n", r"one\.easy rests on: .*easy"),
    "a conjecture": (GOOD + "Conjecture easy : 0 = 1.\n", r"one\.easy rests on: .*easy"),
    "a hypothesis outside of a section": (GOOD + "Hypothesis easy : 0 = 1.\n", r"rests on: .*easy"),
    "a loop": (
        GOOD + "Unset Guard Checking.\nFixpoint easy (n : nat) : 0 = 1 := easy n.\n",
        r"one\.easy rests on: .*easy",
    ),
    "an axiom in a module": (
        GOOD + "Module Inner.\nAxiom easy : 0 = 1.\nEnd Inner.\n",
        r"rests on: .*easy",
    ),
    "a theorem that no chapter states": (
        GOOD.replace("verifies: thm-something", "verifies: thm-other"),
        r"one\.v: something verifies thm-other, which no chapter states: .* thm-something",
    ),
    "a gap of a theorem that no chapter states": (
        GOOD.replace("covered: thm-something", "covered: thm-other"),
        r"thm-other, which no chapter states",
    ),
}


@coq
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_proved_is_refused(tmp_path: Path, name: str) -> None:
    text, message = BROKEN[name]
    assert text != GOOD
    with pytest.raises(BookError, match=message):
        check(book(tmp_path, text))


@coq
def test_proofs_that_need_each_other_are_named(tmp_path: Path) -> None:
    folder = book(tmp_path, base=BASE + "From Teleport Require Import one.\n")
    with pytest.raises(BookError, match="need each other in a circle"):
        check(folder)


def test_without_coq_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    done = CliRunner().invoke(app, ["proofs", "--book", str(ROOT / "book.toml")])
    assert done.exit_code != 0
    assert isinstance(done.exception, BookError)
    assert "coqc is not installed" in str(done.exception)
    assert "apt-get install --no-install-recommends coq libcoq-mathcomp" in str(done.exception)


@coq
def test_without_mathcomp_it_says_so(tmp_path: Path) -> None:
    text = GOOD.replace("base.\n", "base.\nFrom mathcomp Require Import no_such_file.\n", 1)
    with pytest.raises(BookError, match=r"MathComp is not installed: .*apt-get install"):
        check(book(tmp_path, text))


def test_every_definition_and_theorem_of_the_book_has_words() -> None:
    files = read_proofs(FOLDER)
    assert len(formal_versions(files)) >= 17
    without = [
        f"{file.name}.{one.name}"
        for file in files
        for one in file.statements
        if one.kind != "Lemma" and not one.words
    ]
    assert without == []


def test_the_ledger_has_the_proofs_as_they_are_and_tells_when_it_has_not(tmp_path: Path) -> None:
    assert ledger.proof_rows(ROOT) == ledger.read_proof_rows(ROOT / ledger.LEDGER_PATH)
    folder = book(tmp_path)
    (fault,) = ledger._stale_proofs(tmp_path, ledger.theorems(tmp_path / "chapters"))
    assert "chapters/proofs/one.v: chapters/ledger.json is older than the file" in fault
    ledger.record_proofs(tmp_path, ledger.proof_rows(tmp_path))
    assert not [*ledger._stale_proofs(tmp_path, ledger.theorems(tmp_path / "chapters"))]
    ledger.update(tmp_path, {})  # of tests: the proofs stay
    assert not [*ledger._stale_proofs(tmp_path, ledger.theorems(tmp_path / "chapters"))]
    (folder / "one.v").write_text(GOOD.replace("thm-something *)", "thm-other *)"))
    faults = [*ledger._stale_proofs(tmp_path, ledger.theorems(tmp_path / "chapters"))]
    assert any("verifies thm-other, which no chapter states" in fault for fault in faults)


SOLUTIONS = [
    "move=> orthonormal; rewrite mulmxBl mul1mx mulmxBr mulmx1.\n"
    "by rewrite -mulmxA (mulmxA B^T) orthonormal mul1mx subrr subr0.\nQed.",
    "exists (delta_mx 0 0), (delta_mx 1 0), (delta_mx 0 0).\n"
    "split; first by rewrite mul_delta_mx_0.\n"
    "by rewrite mul_delta_mx; apply/eqP => /matrixP /(_ 0 0); rewrite !mxE.\nQed.",
]
"""Of the exercises, in their order."""


@coq
@pytest.mark.slow
def test_exercises_are_refused_unless_all_is_proved_as_it_was_asked(tmp_path: Path) -> None:
    text, answer = (FOLDER / proofs.EXERCISES).read_text(), tmp_path / "mine.v"
    answer.write_text(text)
    with pytest.raises(BookError, match=r"not all is proved\nidempotent rests on"):
        proofs.check_exercise(FOLDER, answer, tmp_path / "a", 2)
    for solution in SOLUTIONS:
        text = text.replace("Admitted.\n", f"{solution}\n", 1)
    answer.write_text(text)
    said = proofs.check_exercise(FOLDER, answer, tmp_path / "b", 2)
    assert said.endswith("idempotent, broken proved")
    weaker = text.replace("  B^T *m B = 1%:M ->", "  B = 0 -> B^T *m B = 1%:M ->")
    answer.write_text(weaker.replace("move=> orthonormal", "move=> _ orthonormal"))
    with pytest.raises(BookError, match="a statement is not that of"):
        proofs.check_exercise(FOLDER, answer, tmp_path / "c", 2)


@coq
@pytest.mark.slow
def test_python_and_coq_compute_the_same_of_every_graph(tmp_path: Path) -> None:
    """Both definitions of a computation graph, without rounding; one call of Coq for all graphs."""
    drawn: list[Graph] = []

    @given(graphs())
    def draw(graph: Graph) -> None:
        drawn.append(graph)

    draw()
    claims = [coq_agreement(graph, run(graph)) for graph in drawn]
    wrong = [number + Fraction(1) for number in run(drawn[0])]
    needed = [FOLDER / f"{name}.v" for name in ("frobenius", "graph", "compute")]
    proofs.compile_proofs(needed, tmp_path, 1, lambda name: None)
    (tmp_path / "tie.v").write_text(
        "From mathcomp Require Import all_ssreflect all_algebra.\n"
        "From Teleport Require Import compute.\n"
        f"Eval vm_compute in [:: {'; '.join([*claims, coq_agreement(drawn[0], wrong)])}].\n"
    )
    said = proofs.run_coq(proofs.coq_tool("coqc"), tmp_path, "tie.v")
    assert said.returncode == 0, said.stderr
    found = re.findall(r"\b(true|false)\b", said.stdout)
    assert len(found) == len(drawn) + 1
    assert [graph for graph, same in zip(drawn, found, strict=False) if same != "true"] == []
    assert found[-1] == "false"  # the control: the comparison can fail
