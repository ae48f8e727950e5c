"""Figures with something to move: what a cell stores, and what the web book makes of it."""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from teleport.book.interactive import MIME, Interactive, Line, Panel, frontier, page_part

ROOT = Path(__file__).parents[2]
LINE = Line("all of it", [1, 2, 3], [1.0, 4.0, 9.0])
PANEL = Panel("Squares", "x", "y", [LINE])
FIGURE = Interactive("n", ["one", "two", "three"], ["1", "4", "9"], [PANEL], at=1)


def stored() -> list[tuple[str, dict[str, Any]]]:
    """Every figure that a chapter holds, by the chapter's name."""
    found = []
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        data = ["".join(o["data"][MIME]) for o in outputs if MIME in o.get("data", {})]
        found += [(path.stem, json.loads(each)) for each in data]
    return found


def test_a_cell_stores_a_picture_a_sentence_and_all_positions() -> None:
    bundle = FIGURE._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"] == "n two: 4"
    data = json.loads(bundle[MIME])
    assert data["says"] == ["1", "4", "9"]
    assert data["panels"][0]["curves"][0]["y"] == [1, 4, 9]


def test_what_is_seen_at_a_position() -> None:
    assert LINE.at(0) == ([1, 2, 3], [1, 4, 9])
    assert replace(LINE, shown="mark").at(1) == LINE.at(0)
    assert replace(LINE, shown="first", counts=[0, 2, 3]).at(1) == ([1, 2], [1, 4])
    own = Line("", [[1], [2, 3]], [[4], [5, 6]], "own")
    assert own.at(1) == ([2, 3], [5, 6])


def test_numbers_are_short_and_of_any_kind() -> None:
    torch = pytest.importorskip("torch")
    curve = Line("", torch.tensor([1.0, 2.0]), (1 / 3, 123456.7))
    figure = Interactive("n", [1, 0.25], ["a", "b"], [Panel("t", "x", "y", [curve])])
    data = json.loads(figure.data())
    assert data["positions"] == [1, 0.25]
    assert data["panels"][0]["curves"][0]["x"] == [1, 2]
    assert data["panels"][0]["curves"][0]["y"] == [0.3333, 123500]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": 3}, "at must be from 0 to 2, got 3"),
        ({"at": -1}, "at must be from 0 to 2, got -1"),
        ({"says": ["1"]}, "says: 1 entries for 3 positions"),
        ({"positions": ["one"], "at": 0}, "says: 3 entries for 1 positions"),
        ({"panels": [Panel("", "", "", [replace(LINE, shown="some")])]}, "one of all, mark, first"),
        (
            {"panels": [Panel("", "", "", [replace(LINE, shown="mark", x=[1], y=[1])])]},
            "curve 'all of it': 1 entries for 3",
        ),
        (
            {"panels": [Panel("", "", "", [replace(LINE, shown="first", counts=[1])])]},
            "counts of curve 'all of it': 1 entries for 3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(FIGURE, **changes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    curve = Line("", [1.0], [value])
    with pytest.raises(ValueError, match="finite numbers only"):
        Interactive("n", ["a"], ["b"], [Panel("t", "x", "y", [curve])]).data()


def test_a_frontier_marks_every_method_at_the_setting() -> None:
    made = {"kept": [(0.1, 0.9), (0.2, 0.8)], "replay": [(0.3, 0.95), (0.4, 0.7)]}
    figure = frontier("tau", [0.9, 1.0], made, "old loss", "new accuracy")
    assert figure.says[1] == (
        "kept: old loss 0.2, new accuracy 0.8; replay: old loss 0.4, new accuracy 0.7"
    )
    kept, replay = figure.panels[0].curves
    assert (kept.shown, list(kept.x), list(replay.y)) == ("mark", [0.1, 0.2], [0.95, 0.7])
    assert kept.color != replay.color
    assert kept.style != replay.style
    with pytest.raises(ValueError, match="1 to 4 methods, got 0"):
        frontier("tau", [1.0], {}, "x", "y")
    with pytest.raises(ValueError, match="entries for 2 positions"):
        frontier("tau", [0.9, 1.0], {**made, "short": [(0.1, 0.2)]}, "x", "y")


def test_text_cannot_end_the_script() -> None:
    part = page_part(replace(FIGURE, says=["</script>", "", ""]).data())
    assert part.count("</script>") == 1
    assert json.loads(re.search(r"json\">(.*)</script>", part)[1])["says"][0] == "</script>"  # type: ignore[index]


def test_chapters_hold_figures_whose_lists_fit() -> None:
    found = stored()
    assert {name[:2] for name, _ in found} >= {"01", "02", "07"}
    for _, data in found:
        panels = [
            Panel(**{**panel, "curves": [Line(**curve) for curve in panel["curves"]]})
            for panel in data["panels"]
        ]
        Interactive(**{**data, "panels": panels})  # asks all that is asked of a new one
        assert len(set(data["says"])) > len(data["says"]) / 2, "nothing to be read off"


def test_the_script_is_small_and_asks_for_nothing() -> None:
    script = (ROOT / "teleport/book/static/interactive.js").read_text(encoding="utf-8")
    assert len(script.splitlines()) <= 160
    assert "prefers-reduced-motion" in script
    assert (
        re.findall(r"fetch\(|import |XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)", script)
        == []
    )
