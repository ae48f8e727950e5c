"""The theorem ledger: book, tests and record agree, and every way to disagree is told clearly."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from teleport.book import ledger

ROOT = Path(__file__).parents[2]

CHAPTER = """\
# Chapter

:::{prf:theorem} First things first
:label: thm-first

Text, see {prf:ref}`thm-second`.
:::

````{prf:theorem} With a longer fence
:class: important
:label: thm-second
````

How to write one:

```markdown
:::{prf:theorem} Only shown
:label: thm-shown
:::
```
"""

TESTS = """\
import pytest
from hypothesis import given, settings, assume
from hypothesis import strategies as st

@pytest.mark.verifies("thm-first", exact=True)
@pytest.mark.parametrize("power", [2, 4])
@settings(max_examples=7)
@given(x=st.integers())
def test_drawn(power: int, x: int) -> None:
    assert x**power >= 0

@pytest.mark.verifies("thm-first")
@pytest.mark.verifies("thm-second")
@settings(max_examples=5)
@given(st.integers())
def test_refusing(x: int) -> None:
    assume(x % 2 == 0)

@pytest.mark.parametrize("x", [1, 2, 3])
@pytest.mark.verifies("thm-second")
def test_cases(x: int) -> None:
    assert x > 0

def test_of_no_theorem() -> None:
    pass
"""


def repository(folder: Path, chapter: str = CHAPTER, tests: str = TESTS) -> Path:
    """A small repository whose ledger is up to date."""
    (folder / "chapters").mkdir()
    (folder / "tests").mkdir()
    cells = [{"cell_type": "markdown", "source": chapter}, {"cell_type": "code", "source": ""}]
    (folder / "chapters" / "01_a.ipynb").write_text(json.dumps({"cells": cells}))
    (folder / "tests" / "test_a.py").write_text(tests)
    (folder / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\nmarkers = ["verifies"]\naddopts = ["-p", "no:cacheprovider"]\n'
    )
    record(folder)
    return folder


def record(root: Path, examples: int = 3, *, only: str = "") -> None:
    """Write as if all marked tests, or one, had run just now."""
    found = [test for test in ledger.marked(root) if only in test]
    digests = {test: ledger.file_digest(root / test.split("::")[0]) for test in found}
    ledger.update(root, {test: (examples, source) for test, source in digests.items()})


def test_the_book_its_tests_and_the_ledger_agree() -> None:
    assert ledger.ledger_faults(ROOT) == []


def test_agreement_is_no_fault(tmp_path: Path) -> None:
    assert ledger.ledger_faults(repository(tmp_path)) == []


def test_theorems_are_read_with_title_and_page_and_not_from_examples(tmp_path: Path) -> None:
    found = ledger.theorems(repository(tmp_path) / "chapters")
    assert found == [
        ledger.Theorem("thm-first", "First things first", "01_a.ipynb"),
        ledger.Theorem("thm-second", "With a longer fence", "01_a.ipynb"),
    ]


def test_marks_are_read_with_their_kind(tmp_path: Path) -> None:
    assert ledger.marked(repository(tmp_path)) == {
        "tests/test_a.py::test_drawn": {"thm-first": "exact"},
        "tests/test_a.py::test_refusing": {"thm-first": "numerical", "thm-second": "numerical"},
        "tests/test_a.py::test_cases": {"thm-second": "numerical"},
    }


CHAPTERS = {
    "theorem without a test": (
        CHAPTER + ":::{prf:theorem} New\n:label: thm-new\n:::\n",
        "01_a.ipynb states the theorem 'New', which no test verifies: mark one with "
        '@pytest.mark.verifies("thm-new")',
    ),
    "theorem of no chapter": (
        CHAPTER.replace("thm-second\n", "thm-other\n"),
        "tests/test_a.py::test_refusing and 1 more verifies thm-second, which no chapter states: "
        "the book has thm-first, thm-other",
    ),
    "stated twice": (
        CHAPTER + ":::{prf:theorem} Again\n:label: thm-first\n:::\n",
        "states the theorem 'Again' as thm-first, which 01_a.ipynb states already",
    ),
    "without a label": (
        CHAPTER + ":::{prf:theorem} Nameless\nText\n:::\n",
        "'Nameless' without a label: add the line `:label: thm-…`",
    ),
}


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_that_disagrees_with_the_tests_is_found(tmp_path: Path, name: str) -> None:
    chapter, message = CHAPTERS[name]
    found = ledger.ledger_faults(repository(tmp_path, chapter))
    assert any(message in fault for fault in found)
    assert len(found) == (2 if name == "theorem of no chapter" else 1)


def test_a_ledger_older_than_a_test_file_is_found_until_it_is_written_anew(tmp_path: Path) -> None:
    root = repository(tmp_path)
    path = root / "tests" / "test_a.py"
    path.write_text(TESTS.replace("x > 0", "x > -1"))
    assert ledger.ledger_faults(root) == [
        "tests/test_a.py: chapters/ledger.json is older than the file: run "
        "`pytest tests/test_a.py --ledger`, or `pytest tests -m verifies --ledger` for all"
    ]
    record(root, only="test_drawn")
    (fault,) = ledger.ledger_faults(root)  # of the other tests nothing is known yet
    assert "is older than the file" in fault
    record(root)
    assert ledger.ledger_faults(root) == []


def test_new_tests_and_rows_of_tests_that_are_gone_are_found(tmp_path: Path) -> None:
    root = repository(tmp_path)
    path = root / "tests" / "test_a.py"
    path.rename(path.with_name("test_b.py"))
    found = ledger.ledger_faults(root)
    assert "chapters/ledger.json has no row for test_drawn and 2 more: run `pytest" in found[0]
    assert found[1:] == [
        f"chapters/ledger.json has a row for tests/test_a.py::{name}, which is no marked test: run "
        "`pytest tests -m verifies --ledger`"
        for name in ("test_cases", "test_drawn", "test_refusing")
    ]
    record(root)
    assert ledger.ledger_faults(root) == []


def test_a_repository_without_a_ledger_is_told_how_to_make_one(tmp_path: Path) -> None:
    root = repository(tmp_path)
    (root / ledger.LEDGER_PATH).unlink()
    (fault,) = ledger.ledger_faults(root)
    assert ledger.REGENERATE in fault


def test_a_test_that_ran_no_example_verifies_nothing(tmp_path: Path) -> None:
    root = repository(tmp_path)
    record(root, 0, only="test_drawn")
    (fault,) = ledger.ledger_faults(root)
    assert "tests/test_a.py::test_drawn ran no example" in fault


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("assert torch.allclose(a, b)", "allclose"),
        ("assert a == pytest.approx(b)", "approx"),
        ("assert abs(a - b) < 1e-12", "1e-12"),
        ("assert close(a, b, rtol=0)", "rtol"),
    ],
)
def test_a_test_marked_as_exact_has_no_tolerance(tmp_path: Path, body: str, what: str) -> None:
    tests = TESTS.replace("assert x**power >= 0", body)
    (fault,) = ledger.ledger_faults(repository(tmp_path, tests=tests))
    assert f"test_drawn is marked as exact, but uses {what}:" in fault


@pytest.mark.parametrize(
    "mark",
    ["()", "(name)", "(7)", '("thm-first", exact=1)', '("thm-first", examples=3)', "(*both)"],
)
def test_marks_that_cannot_be_read_are_refused(tmp_path: Path, mark: str) -> None:
    tests = TESTS.replace('("thm-first", exact=True)', mark)
    with pytest.raises(ValueError, match=r"test_a\.py, line 5: a mark is written"):
        repository(tmp_path, tests=tests)


@pytest.mark.parametrize("content", ["{", "{}", '{"tests": []}', '{"tests": {"a": {"b": 1}}}'])
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: str) -> None:
    root = repository(tmp_path)
    (root / ledger.LEDGER_PATH).write_text(content)
    with pytest.raises(ValueError, match=r"ledger\.json is not a ledger .* run `pytest"):
        ledger.ledger_faults(root)


def run_pytest(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "tests" / "conftest.py", root / "tests")
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-p", "no:nbval", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_run_writes_the_examples_that_passed_summed_over_parameters(tmp_path: Path) -> None:
    root = repository(tmp_path)
    (root / ledger.LEDGER_PATH).unlink()
    done = run_pytest(root, "-m", "verifies", "--ledger")
    assert done.returncode == 0, done.stdout
    assert "chapters/ledger.json: 3 tests of 3 written" in done.stdout
    assert ledger.ledger_faults(root) == []
    rows = ledger.read_ledger(root / ledger.LEDGER_PATH)
    examples = {test.split("::")[1]: row.examples for test, row in rows.items()}
    assert examples == {"test_cases": 3, "test_drawn": 14, "test_refusing": 5}


@pytest.mark.slow
def test_a_file_that_is_edited_while_its_tests_run_is_newer_than_the_ledger(tmp_path: Path) -> None:
    edits = TESTS.replace("assert x > 0", "open(__file__, 'a').write('# edited\\n')")
    root = repository(tmp_path, tests=edits)
    assert run_pytest(root, "-m", "verifies", "--ledger").returncode == 0
    (fault,) = ledger.ledger_faults(root)
    assert "is older than the file" in fault


@pytest.mark.slow
def test_a_failing_run_and_a_part_of_a_test_leave_the_ledger_as_it_was(tmp_path: Path) -> None:
    root = repository(tmp_path)
    before = (root / ledger.LEDGER_PATH).read_bytes()
    (root / "tests" / "test_a.py").write_text(TESTS.replace("x > 0", "x < 0"))
    done = run_pytest(root, "--ledger")
    assert done.returncode == 1
    assert "The ledger is left as it was: not all tests passed." in done.stdout
    done = run_pytest(root, "--ledger", "-k", "drawn")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "name whole files, no -k" in done.stderr
    assert (root / ledger.LEDGER_PATH).read_bytes() == before


def test_the_page_shows_every_theorem_with_its_tests(tmp_path: Path) -> None:
    pytest.importorskip("sphinx_proof", reason="needs the extra book")
    root = repository(tmp_path)
    record(root, 9, only="test_refusing")
    html = build(root)
    assert "<summary>Verified by 2 tests, 1 of them exact; 12 examples</summary>" in html["a"]
    table = html["index"]
    assert '<a class="reference internal" href="a.html#thm-first">Theorem 1</a>' in table
    assert table.index("drawn (") < table.index(
        "refusing ("
    )  # exact ones first, even if of fewer examples
    assert "(With a longer fence)" in table
    assert "<summary>2 tests</summary>" in table  # of the second theorem, none exact


CONF = """\
extensions = ["myst_parser", "sphinx_proof", "teleport.book.ledger_page"]
myst_enable_extensions = ["colon_fence"]
html_theme = "basic"
"""


def build(root: Path) -> dict[str, str]:
    """The two pages of a book made of the chapter's text and the ledger's table."""
    source = root / "chapters"
    (source / "01_a.ipynb").unlink()
    (source / "conf.py").write_text(CONF)
    (source / "a.md").write_text(CHAPTER)
    (source / "index.md").write_text("# Book\n\n```{toctree}\na\n```\n\n```{theorem-ledger}\n```\n")
    command = [sys.executable, "-m", "sphinx", "-Wq", "-b", "html", "chapters", "out"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {page: (root / "out" / f"{page}.html").read_text() for page in ("a", "index")}
