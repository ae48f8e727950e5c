"""The examples of the page on trainers do what it says, with the real libraries."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

from teleport.book.manifest import read_book

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "chapters" / "examples").glob("*.py"))
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' advice


def output(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(ROOT / "chapters" / "examples" / f"with_{name}.py"))
    return printed.getvalue()


def test_an_example_is_short_and_the_page_shows_it() -> None:
    page = (ROOT / "chapters" / "pages" / "trainers.md").read_text(encoding="utf-8")
    shown = re.findall(r"```{literalinclude} (\S+)", page)
    assert [f"../examples/{path.name}" for path in EXAMPLES] == sorted(shown)
    assert len(EXAMPLES) == 3
    for path in EXAMPLES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path.name
    assert ROOT / "chapters" / "pages" / "trainers.md" in read_book(ROOT / "book.toml").pages


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="pip install '.[test]' brings it")
    told = output("lightning", tmp_path, monkeypatch)
    assert "after step 50: teleported: gradient norm reached 1.5 x its start" in told
    assert re.search(r"^net\.2 .* moved$", told, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="pip install '.[test]' brings it")
    told = output("transformers", tmp_path, monkeypatch)
    assert re.findall(r"after step (\d+): teleported", told) == ["50", "64"]
    assert re.search(r"^classifier .* moved$", told, re.MULTILINE)


def test_avalanche(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of the page."""
    pytest.importorskip("avalanche", reason="pip install '.[avalanche]' brings it")
    told = output("avalanche", tmp_path, monkeypatch)
    found = [float(number) for number in re.findall(r"^\w+ (0\.\d+)$", told, re.MULTILINE)]
    assert found == pytest.approx([0.275, 0.928, 0.857, 0.679], abs=0.03)
