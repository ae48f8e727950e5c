"""The question bank: what a course system reads is what the sheets say, and its right answer."""

import json
import re
import sys
import xml.etree.ElementTree as ET
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from teleport.book.questions import package
from teleport.check.exercises import exercises
from teleport.cli import main
from teleport.errors import BookError

pytest.importorskip("text2qti", reason="the extra questions is not installed")
ROOT = Path(__file__).parents[2]
SHEETS = ROOT / "chapters" / "exercises"
NS = {"q": "http://www.imsglobal.org/xsd/ims_qtiasiv1p2"}
HIDDEN = ("### BEGIN HIDDEN TESTS\n", "\n### END HIDDEN TESTS")


def items(content: bytes) -> dict[str, ET.Element]:
    """The items of a package by their title."""
    with zipfile.ZipFile(BytesIO(content)) as packed:
        assert packed.testzip() is None
        manifest = ET.fromstring(packed.read("imsmanifest.xml"))
        files = [file.get("href", "") for file in manifest.iter() if file.tag.endswith("}file")]
        assert set(files) <= set(packed.namelist())
        (quiz,) = (name for name in files if not name.endswith("meta.xml"))
        found = ET.fromstring(packed.read(quiz)).findall(".//q:item", NS)
    return {item.get("title", ""): item for item in found}


def scored(item: ET.Element) -> ET.Element:
    """The one condition that gives all points."""
    (found,) = (
        c for c in item.findall(".//q:respcondition", NS) if c.find("q:setvar", NS) is not None
    )
    setvar = found.find("q:setvar", NS)
    assert setvar is not None
    assert setvar.text == "100"
    return found


def text_of(element: ET.Element | None) -> str:
    assert element is not None
    return "".join(element.itertext()).strip()


def accepted(item: ET.Element, number: float) -> bool:
    """Whether a number gets the points, as a course system compares."""
    condition = scored(item)
    low, high = (float(text_of(condition.find(f".//q:{tag}", NS))) for tag in ("vargte", "varlte"))
    exact = float(text_of(condition.find(".//q:varequal", NS)))
    return number == exact or low <= number <= high


def sheet(folder: Path, graded: str, question: str = "## Title\n\nHow many?") -> Path:
    """A sheet of one exercise."""
    about = {"exercise": {"label": "exercise-a", "kind": "recall", "difficulty": 1, "points": 2}}
    marks = {"nbgrader": {"grade": True, "grade_id": "a-check", "points": 2}}
    cells: list[dict[str, Any]] = [
        {"cell_type": "markdown", "metadata": about, "source": question},
        {"cell_type": "code", "metadata": marks, "source": graded.join(HIDDEN)},
    ]
    path = folder / "01_a.ipynb"
    path.write_text(json.dumps({"nbformat": 4, "cells": cells}), encoding="utf-8")
    return path


def test_a_choice_has_its_options_the_right_one_marked_and_a_reason_for_each_wrong_one() -> None:
    content, count = package(SHEETS / "01_level_sets.ipynb")
    found = items(content)
    assert len(found) == count == 3
    item = found["Which weights have the same loss?"]
    options = {
        label.get("ident"): text_of(label) for label in item.findall(".//q:response_label", NS)
    }
    shown = [re.findall(r'data-equation-content="(.*?)"', text)[0] for text in options.values()]
    assert shown == ["(-2, -3)", "(3, 2)", "(2, -3)", "(4, 6)"]
    right = text_of(scored(item).find(".//q:varequal", NS))
    assert 'data-equation-content="(3, 2)"' in options.pop(right)
    feedback = {each.get("ident"): text_of(each) for each in item.findall("q:itemfeedback", NS)}
    assert {f"{ident}_fb" for ident in options} | {"general_incorrect_fb"} == set(feedback)
    reasons = [feedback[f"{ident}_fb"] for ident in options]
    assert [reason[3:20] for reason in reasons] == [
        "With w₁ &lt; 0 an", "The product chang", "The product is 24"
    ]  # fmt: skip
    assert "the product of the two weights" in feedback["general_incorrect_fb"]
    question = text_of(item.find("q:presentation/q:material", NS))
    assert "Set <code>same_loss" not in question
    assert "Recall" not in question


def test_a_number_is_accepted_within_the_tolerance_of_the_sheet() -> None:
    found = items(package(SHEETS / "01_level_sets.ipynb")[0])
    ratio, dip = found["How much is there to gain?"], found["Where Newton climbs"]
    assert [accepted(ratio, x) for x in (2.99, 2.995, 3, 3.005, 3.01, 9)] == [0, 1, 1, 1, 0, 0]
    assert [accepted(dip, x) for x in (1.2, 1.26, 1.3, 1.37, 1.4)] == [0, 1, 1, 1, 0]
    (said,) = (text_of(each) for each in ratio.findall("q:itemfeedback", NS))
    assert "9: That is the ratio of the squares" in said
    assert "`thm-newton`" not in text_of(dip.find("q:presentation", NS))
    whole = items(package(SHEETS / "03_mlp.ipynb")[0])["Who moves?"]
    assert [accepted(whole, x) for x in (1.9999, 2, 2.0001)] == [0, 1, 0]
    assert "model = nn.Sequential(" in text_of(whole.find("q:presentation", NS))


@pytest.mark.parametrize(
    ("right", "tolerance", "inside", "outside"),
    [
        ("-8.0", "tolerance=0.01", [-8.07, -7.93], [-8.09, 8]),
        ("0.00123", "tolerance=1e-9", [0.00123], [0.0015]),
        ("math.pi", "tolerance=1e-9", [3.14159265], [3.142]),
        ("1000", "tolerance=0.01", [991, 1009], [989, 1011]),
        ("12", "tolerance=1e-9", [12], [11.999, 12.001]),
    ],
)
def test_numbers_of_every_kind(
    right: str, tolerance: str, inside: list[float], outside: list[float], tmp_path: Path
) -> None:
    path = sheet(tmp_path, f"verdict = check.value(a, {right}, {tolerance})\nassert verdict")
    (item,) = items(package(path)[0]).values()
    assert all(accepted(item, number) for number in inside)
    assert not any(accepted(item, number) for number in outside)


def test_a_function_is_no_question(tmp_path: Path) -> None:
    assert package(sheet(tmp_path, "verdict = check.rows(a)"))[1] == 0


@pytest.mark.parametrize(
    ("graded", "said"),
    [
        ('check.choice(a, "e")', "correct"),
        ("check.value(a, 0)", "magnitude"),
        ("check.value(a, best)", "best"),
        ("check.value(a)", "right"),
        ("check.value(a, 1", "SyntaxError"),
    ],
)
def test_what_cannot_be_a_question_is_named(graded: str, said: str, tmp_path: Path) -> None:
    options = "## A title\n\nWhich?\n\n- **a**: one\n- **b**: two"
    with pytest.raises(BookError, match="'A title' cannot be made a question") as caught:
        package(sheet(tmp_path, graded, options))
    assert said in str(caught.value)


def test_a_question_that_stands_twice_is_named(tmp_path: Path) -> None:
    path = sheet(tmp_path, "check.value(a, 1)")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["cells"] *= 2
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BookError, match="'Title' cannot be made a question"):
        package(path)


def test_the_command_writes_all_sheets_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "bank"
    command = ["book", "questions", "--book", str(ROOT / "book.toml"), "--out", str(out)]
    assert main(command) == 0
    sheets = sorted(SHEETS.glob("*.ipynb"))
    kinds = [e.about["kind"] for path in sheets for e in exercises(path)]
    wanted = kinds.count("recall") + kinds.count("experiment")
    assert sorted(file.stem for file in out.iterdir()) == [path.stem for path in sheets]
    assert list(out.parent.iterdir()) == [out]
    banks = [items(file.read_bytes()) for file in out.iterdir()]
    assert sum(map(len, banks)) == wanted
    texts = [
        text_of(m) for bank in banks for i in bank.values() for m in i.iter(f"{{{NS['q']}}}mattext")
    ]
    for text in texts:
        prose = re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert not re.search(r"\$|\*\*|\{prf|=\"[^\"<>]*<", prose), text
    shown = capsys.readouterr().out
    assert sum(map(int, re.findall(r"(\d+) questions", shown))) == wanted
    assert main(command) == 1
    assert f"{out} exists" in capsys.readouterr().err


def test_without_text2qti_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("text2qti.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "text2qti", None)
    out = tmp_path / "bank"
    command = ["book", "questions", "--book", str(ROOT / "book.toml"), "--out", str(out)]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "needs the package text2qti" in error
    assert "run `pip install '.[questions]'`" in error
    assert not out.exists()
