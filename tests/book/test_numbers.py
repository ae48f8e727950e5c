"""Numbers in prose that look measured are ones that a cell or a record gives.

Looked at are decimals, percentages, "so many of so many", and "so many" times, runs, comparisons,
arms or folders, in digits or in words up to twenty. In a chapter each must stand in an output of
its section or of the section before, or in the chapter's code; both of "so many of so many" in one
line. On a page without cells each must stand in its tables or code, or in the file that the same
paragraph points to. `GIVEN` has the rest: what is cited, or worked out in the text.

So no digits come from nowhere, and a sentence is told when its output has changed. That the *right*
number was taken is not seen here; `tests/test_readme.py` has the sentences that count arms.
``python -m tests.book.test_numbers`` lists what is wrong, with the words to change.
"""

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from teleport.book.notebook_form import joined, load_notebook, outside_of_code
from tests.support.notebooks import Cell, code, printed, prose, saved
from tests.support.words import WORDS

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "chapters").glob("*.md"))]
PAGES += sorted((ROOT / "chapters" / "pages").glob("*.md"))
RESULTS = ROOT / "chapters" / "results.md"
BEHIND = {"README.md": RESULTS, "results.md": ROOT / "chapters" / "results" / "matrix.md"}
"""A page all of whose numbers may come from one other."""

GIVEN = {
    "README.md": {"seven of twelve": "tests/test_readme.py counts them"},
    "00_reading_guide.ipynb": {"1.5": "worked out in the solution"},
    "01_level_sets.ipynb": {
        "0.011": "worked out: (1 - .8) / 18",
        "16.25": "worked out in the solution",
    },
    "02_null_spaces.ipynb": {"1.5": "square root of double epsilon", "3.5": "of single epsilon"},
    "03_mlp.ipynb": {"45 of 49": "printed by the solution's own code"},
    "04_convolution.ipynb": {"118 of 145": "printed by the solution's own code"},
    "05_attention.ipynb": {
        "18 of 32": "tests/layers/test_state.py finds it",
        "64 of 65": "printed by the solution's own code",
        "128 of 129": "printed by the solution's own code",
    },
    "09_experiments_mlp_cnn.ipynb": {
        "95 %": "Student's t",
        ".975": "Student's t",
        "2.25": "1.5 squared",
    },
    "10_experiments_transformers.ipynb": {"95 %": "Student's t", "1 %": "default of max_drift"},
    "11_what_is_true.ipynb": {"0.975": "1 - .025", "0.64": "worked out in the solution"},
    "13_fine_tuning_real_models.ipynb": {".99": "the records' tau"},
    "scaling.md": {
        "1.5": "the growth that was asked for",
        "1.2": "12 x 2048 x 2048 x 24",
        "9.7": "8 x 1.2e9",
    },
    "trainers.md": dict.fromkeys(
        ("0.275", "0.928", "0.857", "0.679"), "tests/integrations/test_examples.py"
    ),
    "results.md": {
        "93.91": "cited",
        "0.16 %": "cited",
        ".939": "cited",
        **dict.fromkeys(
            (".528", ".937", ".927", ".924", ".963", "5.7", "5.8"),
            "tests/test_readme.py, from the record",
        ),
    },
    "use.md": dict.fromkeys(
        ("0.835", "0.915", "0.719", "0.283", "0.902"), "tests/test_readme.py runs the example"
    ),
    "changelog.md": {
        "1.2": "the version of a format",
        "0.999": "teleport.keeping.leading.ENOUGH",
        **dict.fromkeys(("1e-15", "1e15"), "tests/core/test_range.py"),
    },
    "teaching.md": {"1.2": "the version of a format"},
}

_COUNT = rf"(?:\d[\d,]*|(?:{'|'.join(WORDS)})\b)"
_DECIMAL = r"(?:(?:\d[\d,]*)?\.\d+(?:e-?\d+)?|\d+e-?\d+)"
_PERCENT = r" ?(?:%|percent\b)"
MEASURED = re.compile(
    rf"(?<![\w.^/:-])(?:{_COUNT} of (?:the |these )?{_COUNT}|{_DECIMAL}(?:{_PERCENT})?"
    rf"|{_COUNT}{_PERCENT}|{_COUNT}(?= to {_COUNT}{_PERCENT})"
    r"|(?!one\b)(?!two\b)(?!three\b)"
    rf"{_COUNT}(?= (?:times|runs|comparisons|arms|folders)\b))(?!\w)",
    re.IGNORECASE,
)
_PRINTED = re.compile(r"(?<![\w.])(?:\d[\d,]*\.?\d*|\.\d+)(?:e[+-]?\d+)?(?: ?%)?")
_NAMED = re.compile(
    r"\b(?:arXiv|section|table|chapters?|figures?|version|before|Python|Coq|MathComp|Avalanche)"
    r" [\d.]+(?: (?:to|and) [\d.]+)?",
    re.IGNORECASE,
)
_NO_PROSE = re.compile(
    r"(?s:<!--.*?-->)|^\s*\|.*$|^#.*$|(?<=\])\([^)]*\)|(?:\{[\w:]+\})?`[^`]*`|<https?:[^>]*>",
    re.MULTILINE,
)
Line = list[tuple[float, bool]]
"""The numbers of a line that is printed, each with whether it is a percentage."""


def lines_of(text: str) -> list[Line]:
    return [line for line in map(_numbers, text.splitlines()) if line]


def _numbers(line: str) -> Line:
    found = ((re.sub(r"[,% ]", "", n), "%" in n) for n in _PRINTED.findall(line))
    return [(float(number), percent) for number, percent in found]


def outputs(cell: Cell) -> str:
    parts: list[str | list[str]] = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        parts += [output.get("text", ""), data.get("text/plain", ""), data.get("text/markdown", "")]
    return "\n".join(map(joined, parts))


def claims(markdown: str) -> Iterator[tuple[str, str]]:
    """What looks measured in a text, and the words around it."""
    text = "\n".join(outside_of_code(markdown))
    text = " ".join(_NAMED.sub("", _NO_PROSE.sub("", text)).split())
    for found in MEASURED.finditer(text):
        yield found[0], text[max(0, found.start() - 60) : found.end() + 40]


def is_told(claim: str, lines: list[Line]) -> bool:
    """Whether a line has the number, as precisely as it is claimed."""
    if re.search(" of ", claim):
        some, of = map(_value, re.split(r" of (?:the |these )?", claim))
        return any({some, of} <= {number for number, _ in line} for line in lines)
    bare = re.sub(r" ?(%|percent)", "", claim)
    value, digits = _value(bare), len(re.sub(r"e.*|^[^.]*\.?", "", bare.lower()))
    for number, percent in (pair for line in lines for pair in line):
        if "e-" in bare:
            if f"{number:.{digits}e}" == f"{value:.{digits}e}":
                return True
        else:
            shown = 100 * number if bare != claim and not percent else number
            if abs(shown - value) <= 0.5001 * 10**-digits:
                return True
    return False


def _value(text: str) -> float:
    text = text.lower().replace(",", "")
    return WORDS.index(text) if text in WORDS else float(text)


def untold_in_chapter(path: Path) -> list[tuple[str, str]]:
    """Claims of a chapter that none of its cells gives, with where they stand."""
    told: dict[int, list[Line]] = {}
    section, texts = 0, []
    cells = load_notebook(path)["cells"]
    written = lines_of("\n".join(joined(c["source"]) for c in cells if c["cell_type"] == "code"))
    for number, cell in enumerate(cells):
        source = joined(cell["source"])
        if cell["cell_type"] == "markdown":
            section += bool(re.search("^## ", source, re.MULTILINE))
            texts.append((number, section, source))
        told.setdefault(section, []).extend(lines_of(outputs(cell)))
    return [
        (claim, f"{path.name}, cell {number}: ...{around}...")
        for number, section, source in texts
        for claim, around in claims(source)
        if not is_told(claim, told.get(section - 1, []) + told.get(section, []) + written)
    ]


@cache
def told_by(path: Path) -> list[Line]:
    """The numbers in the outputs of a chapter, or in the tables and code of a page."""
    if path.suffix == ".ipynb":
        return lines_of("\n".join(map(outputs, load_notebook(path)["cells"])))
    text = path.read_text(encoding="utf-8")
    spoken = set(outside_of_code(text))
    return lines_of(
        "\n".join(
            line
            for line in text.splitlines()
            if line.lstrip().startswith("|") or line not in spoken
        )
    )


def untold_on_page(path: Path) -> list[tuple[str, str]]:
    """Claims of a page that neither its tables and code nor what it points to gives."""
    behind = [BEHIND[path.name]] if path.name in BEHIND else []
    found = []
    text = "\n".join(outside_of_code(path.read_text(encoding="utf-8")))
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*] )", text):
        named = re.findall(r"\]\(([^)#]+)|`([\w/.-]+\.md)`", paragraph)
        linked = [base / "".join(n) for n in named for base in (path.parent, ROOT)]
        files = [f for f in linked if f.is_file() and f.suffix in (".md", ".ipynb")]
        told = [line for file in (path, *behind, *files) for line in told_by(file.resolve())]
        found += [
            (claim, f"{path.name}: ...{around}...")
            for claim, around in claims(paragraph)
            if not is_told(claim, told)
        ]
    return found


def untold(path: Path) -> list[tuple[str, str]]:
    return untold_in_chapter(path) if path.suffix == ".ipynb" else untold_on_page(path)


def faults(path: Path) -> list[str]:
    """What to mend on a chapter or page."""
    found, given = untold(path), GIVEN.get(path.name, {})
    wrong = [
        f"{place} {claim!r} is in no output near it: change the number, print it in a cell, or say "
        f"in GIVEN where it is from"
        for claim, place in found
        if claim not in given
    ]
    needed = {claim for claim, _ in found}
    return wrong + [f"{path.name}: GIVEN need not have {n!r}" for n in given if n not in needed]


@pytest.mark.parametrize("path", [*CHAPTERS, *PAGES], ids=lambda path: path.name)
def test_numbers_in_prose_are_given_by_cells_and_records(path: Path) -> None:
    wrong = faults(path)
    assert not wrong, "\n".join(wrong)


TOLD = printed("ratio 0.853, 14% of 120 runs\nlower in 5 of 34\nrest 3.2e-16, share 0.0421\n")


@pytest.mark.parametrize(
    "said",
    [
        *("ratio .85", "14 percent", "in 5 of 34", "in five of the 34", "3e-16", "4 %", "120 runs"),
        *("4.2 percent", "section 9.9", "`9.9`", "of width 512", "growth 1.5", "[it](9.9.md)"),
    ],
)
def test_a_number_that_a_cell_gives_is_let_pass(tmp_path: Path, said: str) -> None:
    assert (
        untold(saved(tmp_path, code("growth = 1.5\nprint(x)", TOLD), prose(f"It is {said}."))) == []
    )


@pytest.mark.parametrize(
    ("said", "claim"),
    [
        *((said, said) for said in (".86", "15 percent", "0.8534", "2e-16", "14 of 34", "3.2 %")),
        *(("six of 34", "six of 34"), ("six to 14 percent", "six"), ("121\nruns", "121")),
    ],
)
def test_a_number_from_nowhere_is_found(tmp_path: Path, said: str, claim: str) -> None:
    chapter = saved(tmp_path, code("print(x)", TOLD), prose(f"It is {said}."))
    ((found, place),) = untold(chapter)
    assert found == claim
    assert "01_x.ipynb, cell 1: ...It is" in place


def test_a_number_must_be_given_near_by(tmp_path: Path) -> None:
    near, far = prose("## Next\n\nIt is 0.853."), prose("## Then\n\nIt is 0.853.")
    found = untold(saved(tmp_path, code("print(x)", TOLD), near, far))
    assert [place.split(":")[0] for _, place in found] == ["01_x.ipynb, cell 2"]


def test_a_page_may_take_a_number_from_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "told.md").write_text("| a |\n|---|\n| 0.853 |\n\nNot 0.777.\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text("By [it](told.md) 0.85 and 0.777.\n\nAnd 0.85.\n", encoding="utf-8")
    assert [claim for claim, _ in untold(page)] == ["0.777", "0.85"]


if __name__ == "__main__":
    sys.stdout.writelines(f"{fault}\n" for path in (*CHAPTERS, *PAGES) for fault in faults(path))
