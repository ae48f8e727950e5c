"""The committed notebooks: what readers see is complete, in order, and not of one machine.

`notebook_rules.faults` reads files only; that the chapters run and print the same again is nbval's
part.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teleport.book import notebook_form, notebook_rules
from tests.support.notebooks import Cell, code, printed, prose, saved

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
FIGURE = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "iVBORw0KGgo="}}

ALT = {"image": {"alt": "a line that falls from left to right"}}
GOOD = {
    "prints": code("print(1)", printed("1\n")),
    "defines": code("def f():\n    print(1)"),
    "own underscore": code("class A:\n    def f(self):\n        return self._x"),
    "dunder": code("import teleport\nteleport.__version__\nfrom __future__ import annotations"),
    "public": code("import teleport\nfrom teleport.subspace import RowSpace\nteleport.Schedule"),
    "package": code("from teleport import data, rivals\nfrom teleport.data import batches"),
    "figures inline": code("%matplotlib inline\nimport teleport"),
    "figure": code("plt.show()", printed("slope 2"), FIGURE, mystnb=ALT),
    "division": code("print(a /b, 'https://example.org/home/x')", printed("3/tmp")),
    "20 lines": code("\n".join(["x = 1"] * 20)),
    "text": prose("See ![a level set](a.png) and 1/home.\n\n```python\n![](x)\n```\n"),
}
BAD = {
    "never run": (code("print(1)"), "no output is stored"),
    "shown and not stored": (code("for _ in x:\n    plt.show()"), "no output is stored"),
    "error": (
        code("f()", {"output_type": "error", "ename": "KeyError", "evalue": "", "traceback": []}),
        "ends with the error KeyError",
    ),
    "standard error": (code("f()", printed("Epoch 1", "stderr")), "standard error stream (Epoch 1"),
    "warning": (code("f()", printed("x.py:3: UserWarning: old\n")), "shows 'UserWarning:'"),
    "traceback": (code("f()", printed("Traceback (most recent call last)\n")), "shows 'Traceback"),
    "address": (code("f()", printed("<torch._C.Generator at 0x7f6cd81ad0d0>")), "another address"),
    "path in code": (code("open('/home/me/x')"), "path of one machine (open('/home/me/x'))"),
    "path in output": (code("f()", printed("in /tmp/x.py")), "path of one machine (in /tmp/x.py)"),
    "path in text": (prose("It is in `C:\\data`."), "path of one machine"),
    "absent module": (code("from teleport.nowhere import x"), "imports x from teleport.nowhere"),
    "absent name": (code("from teleport import nothing"), "imports nothing from teleport"),
    "passed on": (code("from teleport.subspace import torch"), "imports torch from teleport.sub"),
    "magic": (code("%timeit f()"), "is not plain Python"),
    "shell": (code("!pip install x"), "is not plain Python"),
    "behind a magic": (
        code("%matplotlib inline\nfrom teleport.subspace import torch"),
        "imports torch from teleport.sub",
    ),
    "21 lines": (code("\n".join(["x = 1"] * 21)), "has 21 lines, 20 are allowed"),
    "no number": (code("plt.show()", printed("True"), FIGURE, mystnb=ALT), "figure and no number"),
    "nothing printed": (code("plt.show()", FIGURE, mystnb=ALT), "figure and no number"),
    "no alternative": (code("plt.show()", printed("1"), FIGURE), "without alternative text"),
    "short alternative": (
        code("plt.show()", printed("1"), FIGURE, mystnb={"image": {"alt": "a line"}}),
        "without alternative text",
    ),
    "bare image": (prose("![](a.png)"), "image without a description"),
    "bare directive": (prose(":::{figure} a.png\nText\n:::"), "directive without :alt:"),
}


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_no_faults(chapter: Path) -> None:
    assert notebook_rules.faults(chapter) == []
    nbformat.validate(nbformat.read(chapter, as_version=4))


def test_there_are_chapters() -> None:
    assert len(CHAPTERS) >= 5


@pytest.mark.parametrize("name", GOOD)
def test_what_is_allowed_is_no_fault(tmp_path: Path, name: str) -> None:
    assert notebook_rules.faults(saved(tmp_path, GOOD[name])) == []


@pytest.mark.parametrize("name", BAD)
def test_every_fault_is_found_alone_and_named_with_its_cell(tmp_path: Path, name: str) -> None:
    cell, message = BAD[name]
    (fault,) = notebook_rules.faults(saved(tmp_path, prose("# Title"), cell))
    assert message in fault
    assert fault.startswith("01_x.ipynb, cell 1 (c1): ")


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import teleport._x\nteleport._x.f()", "SLF001"),
        ("from teleport.ascent import _x", "PLC2701"),
        ("model._modules", "SLF001"),
        ("%matplotlib inline\nmodel._modules", "SLF001"),
        ("import teleport\nteleport.__version__", ""),
        ("class A:\n    def f(self):\n        return self._x", ""),
    ],
)
def test_private_names_in_a_chapter_are_found_by_ruff(
    tmp_path: Path, source: str, rule: str
) -> None:
    if shutil.which("ruff") is None:
        pytest.skip("ruff is not installed")
    (tmp_path / "chapters").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = saved(tmp_path / "chapters", code(source))
    command = ["ruff", "check", "--no-cache", "--output-format", "json", str(path)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    codes = {fault["code"] for fault in json.loads(found.stdout)}
    assert codes & {"PLC2701", "SLF001"} == ({rule} if rule else set())


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((2, 3), "code cell 1 has the execution count 2"),
        ((1, 3), "code cell 2 has the execution count 3"),
        ((2, 1), "code cell 1 has the execution count 2"),
        ((1, None), "code cell 2 has the execution count None"),
    ],
)
def test_cells_run_out_of_order_are_found(
    tmp_path: Path, counts: tuple[int | None, ...], message: str
) -> None:
    path = saved(tmp_path, code("x = 1"), prose("text"), code("x = 2"), code(""))
    notebook = json.loads(path.read_text())
    for at, count in zip((0, 2, 3), (*counts, None), strict=True):
        notebook["cells"][at]["execution_count"] = count
    path.write_text(notebook_form.normal_form(notebook))
    (fault,) = notebook_rules.faults(path)
    assert message in fault


UNTIDY: dict[str, Callable[[Cell], object]] = {
    "layout": lambda n: n["cells"][0].update(source="plt.show()"),
    "metadata": lambda n: n["metadata"].update(widgets={}),
    "Python": lambda n: n["metadata"]["language_info"].update(version="3.11.2"),
    "editor": lambda n: n["cells"][0]["metadata"].update(collapsed=True),
    "output": lambda n: n["cells"][0]["outputs"][1].update(metadata={"needs_background": "light"}),
    "streams": lambda n: n["cells"][0]["outputs"].insert(0, printed("0\n")),
    "no id": lambda n: n["cells"][1].pop("id"),
    "end": lambda n: n["cells"][1].update(source="text\n"),
}


@pytest.mark.parametrize("name", UNTIDY)
def test_untidy_files_are_found_and_tidied(tmp_path: Path, name: str) -> None:
    cell = code("plt.show()", printed("1\n"), FIGURE, mystnb=ALT, tags=["nbval-ignore-output"])
    path = saved(tmp_path, cell, prose("text"))
    notebook = json.loads(path.read_text())
    UNTIDY[name](notebook)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    (fault,) = notebook_rules.faults(path)
    assert "not in normal form" in fault
    assert "python -m teleport.book.notebook_form" in fault
    assert notebook_form.main([str(path), "--check"]) == 1
    assert notebook_form.main([str(path)]) == 0
    assert notebook_form.main([str(path), "--check"]) == 0
    assert notebook_rules.main([str(path)]) == 0
    tidied = json.loads(path.read_text())
    assert tidied["cells"][0]["metadata"] == {"mystnb": ALT, "tags": ["nbval-ignore-output"]}
    nbformat.validate(nbformat.from_dict(tidied))


@given(
    st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.text("a\n", max_size=4))),
    st.integers(0, 5),
)
def test_tidying_keeps_every_printed_character_and_is_idempotent(
    streams: list[tuple[str, str]], figure_at: int
) -> None:
    outputs = [printed(text, name) for name, text in streams]
    outputs.insert(figure_at, FIGURE)
    notebook = {"cells": [code("f()", *outputs)]}
    text = notebook_form.normal_form(notebook)
    (cell,) = json.loads(text)["cells"]
    for name in ("stdout", "stderr"):
        after = [notebook_form.joined(o["text"]) for o in cell["outputs"] if o.get("name") == name]
        assert "".join(after) == "".join(text for stream, text in streams if stream == name)
    kinds = [output.get("name", "figure") for output in cell["outputs"]]
    assert all(a != b for a, b in pairwise(kinds))
    assert notebook_form.normal_form(json.loads(text)) == text


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_what_is_not_a_notebook_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.ipynb"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.ipynb is not a notebook"):
        notebook_rules.faults(path)
    assert path.read_text() == content


def test_without_notebooks_the_commands_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (notebook_form.main, notebook_rules.main):
        with pytest.raises(SystemExit):
            command([])
        assert "name the notebooks" in capsys.readouterr().err
