"""Files of answers as editors and learners leave them: nothing changes the points silently."""

import json
import shutil
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from nbgrader.utils import compute_checksum

from teleport.check import worker
from teleport.check.grading import Grades, _graded, _Run, grade
from teleport.check.submission import read_submission
from teleport.cli import main
from teleport.errors import CheckError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Do not use the `random` module"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

SHEETS = Path(__file__).parents[2] / "chapters" / "exercises"

IMPORTS = "from teleport import check\nimport torch\n"
GOOD = "def projection(g, b):\n    return g - g @ b @ b.T\n"
TEST = "assert check.projection(projection)"
WRONG = "assert check.rows(None)"


@pytest.fixture
def graded(monkeypatch, tmp_path_factory):
    """Grades a file in this process, whose ``__main__`` is put back afterwards."""

    def graded(path):
        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
        monkeypatch.setattr(sys, "argv", sys.argv)
        monkeypatch.setattr(sys, "path", list(sys.path))
        told = tmp_path_factory.mktemp("told") / "results"
        with told.open("w", encoding="utf-8") as results:
            worker.run_pieces(path, results, set())
        messages = [json.loads(line) for line in told.read_text().split("\n") if line]
        run = _Run(ended={message["end"]: message for message in messages if "end" in message})
        return Grades(str(path), tuple(_graded(read_submission(path).units, run)))

    return graded


def cell(source, worth=None, name="", kind="code", **marks):
    nbgrader = {"grade": True, "solution": False, "locked": True, "points": worth}
    nbgrader |= {"grade_id": name or "e", "cell_type": "code", "schema_version": 3, **marks}
    metadata = {} if worth is None else {"nbgrader": nbgrader}
    return {"cell_type": kind, "metadata": metadata, "source": source}


def book(*cells, **fields):
    cells = [one if isinstance(one, dict) else cell(one) for one in cells]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5, **fields}


def written(path, content):
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# How the bytes of a file become code.

ACCENT = "# é\n" + GOOD
BYTES = {
    "a byte order mark": b"\xef\xbb\xbf" + GOOD.encode(),
    "a byte order mark and a coding line": b"\xef\xbb\xbf# coding: utf-8\n" + ACCENT.encode(),
    "a coding line": b"# -*- coding: latin-1 -*-\n" + ACCENT.encode("latin-1"),
    "a coding line below": b"#!/usr/bin/env python\n# vim: set fileencoding=cp1252 :\n"
    + ACCENT.encode("cp1252"),
    "CR LF": GOOD.replace("\n", "\r\n").encode(),
    "CR": GOOD.replace("\n", "\r").encode(),
    "mixed line ends": b"x = 1\r\ny = 2\r" + GOOD.encode(),
    "no line end at the end": GOOD.rstrip().encode(),
    "a line continued": b"x = \\\n    1\n" + GOOD.encode(),
    "a string of several lines": b'x = """\n\x0c\n# not code\n"""\n' + GOOD.encode(),
    "two statements on a line": b"x = 1; y = 2; z = 3\n" + GOOD.encode(),
    "form feeds": b"x = 1\n\x0c\n\x0cy = 2\n\x0c\n" + GOOD.encode(),
    **{
        f"U+{ord(end):04X} in a string": f'x = "one{end}two"\n{GOOD}'.encode()
        for end in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    },
    **{
        f"U+{ord(end):04X} in a comment": f"# one{end}return\n{GOOD}".encode()
        for end in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    },
}


@pytest.mark.parametrize("how", BYTES)
def test_a_file_that_python_runs_is_graded(how, tmp_path, graded):
    grades = graded(written(tmp_path / "answers.py", BYTES[how]))
    assert (grades.points, grades.possible) == (1.0, 1.0)
    last = max(number for number, line in enumerate(BYTES[how].splitlines(), 1) if b"def" in line)
    (exercise,) = grades.exercises
    assert exercise.place == f"line {last}" or how.startswith(("U+", "form", "a string"))


def test_statements_of_one_line_are_graded_on_their_own(tmp_path, graded):
    text = IMPORTS + GOOD + "check.rows(None); check.projection(projection)\n"
    found = {e.name: e for e in graded(written(tmp_path / "a.py", text)).exercises}
    assert [found[name].points for name in ("rows", "projection")] == [0.0, 1.0]
    assert len(found["projection"].verdicts) == 1


NOT_PYTHON = {
    "UTF-16": (GOOD.encode("utf-16"), "UTF-8"),
    "UTF-32": (GOOD.encode("utf-32"), "UTF-8"),
    "an accent of Windows": ("x = 'é'\n".encode("cp1252"), "utf-8"),
    "an unknown coding": (b"# coding: nope\n" + GOOD.encode(), "unknown encoding"),
    "a coding that is not the file's": (b"\xef\xbb\xbf# coding: latin-1\nx = 1", "BOM"),
    "brackets without end": (b"(" * 1000, "nested"),
    "a sum without end": (b"x = " + b"+".join([b"1"] * 20_000), "nested too deeply"),
    "signs without end": (b"x = " + b"-" * 100_000 + b"1", "nested too deeply"),
    "a null byte": (b"x = 1\0", "null byte"),
}


@pytest.mark.parametrize("how", NOT_PYTHON)
def test_a_file_that_python_does_not_run_ends_with_2(how, tmp_path, capsys):
    content, words = NOT_PYTHON[how]
    assert main(["check", str(written(tmp_path / "a.py", content))]) == 2
    error = capsys.readouterr().err
    assert "is not Python: " in error
    assert words in error


ONE = book(IMPORTS, "# é \u2028 \x85\n" + GOOD, cell(TEST, 2))


@pytest.mark.parametrize(
    "content",
    [
        *(json.dumps(ONE, ensure_ascii=False).encode(coding) for coding in ("utf-8", "utf-8-sig")),
        *(json.dumps(ONE).encode(coding) for coding in ("utf-16", "utf-16-le", "utf-32")),
        json.dumps(ONE, indent=1).replace("\n", "\r\n").encode(),
        json.dumps(book(IMPORTS, GOOD.replace("\n", "\r\n"), cell(TEST + "\r\n", 2))).encode(),
        json.dumps(book(IMPORTS, GOOD.replace("\n", "\r"), cell("\ufeff" + TEST, 2))).encode(),
        json.dumps(book(IMPORTS, GOOD.splitlines(keepends=True), cell([TEST], 2))).encode(),
        json.dumps(book(IMPORTS, GOOD, cell(TEST, 2), "", [], "\n")).encode(),
    ],
)
def test_a_notebook_is_read_in_every_form_that_editors_leave(content, tmp_path, graded):
    for name in ("sheet.ipynb", "SHEET (1).IPYNB"):
        grades = graded(written(tmp_path / name, content))
        assert (grades.points, grades.possible, grades.passed) == (2.0, 2.0, True)


# Marks and cells that are not what they have to be.


def changed(**marks):
    return book(IMPORTS, GOOD, cell(TEST, 2, **marks))


def without(key):
    whole = changed()
    del whole["cells"][2]["metadata"]["nbgrader"][key]
    return whole


def with_cell(change):
    whole = changed()
    whole["cells"].insert(1, change)
    return whole


ODD = {
    "points null": (changed(points=None), "points are null"),
    "points text": (changed(points="2"), 'points are "2"'),
    "points negative": (changed(points=-1), "points are -1"),
    "points NaN": (changed(points=float("nan")), "points are NaN"),
    "points infinite": (changed(points=float("inf")), "points are Infinity"),
    "points true": (changed(points=True), "points are true"),
    "points a list": (changed(points=[2]), "points are [2]"),
    "points missing": (without("points"), "points are null"),
    "grade_id missing": (without("grade_id"), "grade_id is null"),
    "grade_id null": (changed(grade_id=None), "grade_id is null"),
    "grade_id a number": (changed(grade_id=7), "grade_id is 7"),
    "grade_id empty": (changed(grade_id=" "), "grade_id is"),
    "grade null": (changed(grade=None), "grade is null"),
    "grade text": (changed(grade="true"), 'grade is "true"'),
    "solution a number": (changed(solution=0), "solution is 0"),
    "nbgrader null": (with_cell({**cell(""), "metadata": {"nbgrader": None}}), "nbgrader is null"),
    "nbgrader a list": (with_cell({**cell(""), "metadata": {"nbgrader": []}}), "nbgrader is []"),
    "metadata null": (with_cell({**cell(""), "metadata": None}), "metadata is null"),
    "metadata text": (with_cell({**cell(""), "metadata": "a"}), 'metadata is "a"'),
    "a cell of text": (with_cell([1]), "cell 2: not a notebook cell"),
    "source missing": (with_cell({"cell_type": "code", "metadata": {}}), "source is null"),
    "source a number": (with_cell(cell(7)), "source is 7"),
    "source of numbers": (with_cell(cell([7])), "source is [7]"),
    "kind missing": (with_cell({"source": "", "metadata": {}}), "cell_type is null"),
    "kind unknown": (with_cell(cell("", kind="Code")), 'cell_type is "Code"'),
    "cells null": (book() | {"cells": None}, "no list of cells"),
    "cells missing": ({"nbformat": 4}, "no list of cells"),
    "cells an object": (book() | {"cells": {}}, "no list of cells"),
    "format 3": ({"worksheets": [{"cells": []}], "nbformat": 3}, "format 3"),
    "format null": (book(nbformat=None), "format None"),
    "two worths": (book(IMPORTS, cell("1", 2), cell("1", 3)), "cell 2 and cell 3 both grade 'e'"),
    "deep": ("[" * 100_000, "not a notebook"),
    "a long number": ('{"nbformat": ' + "9" * 5000 + "}", "not a notebook"),
    "bytes": (b"\xff\xfe\xff", "not a notebook"),
    "nothing": (b" \n", "is empty: save"),
}


@pytest.mark.parametrize("how", ODD)
def test_marks_that_cannot_be_read_end_with_2(how, tmp_path, capsys):
    content, words = ODD[how]
    assert main(["check", str(written(tmp_path / "sheet.ipynb", content))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "sheet.ipynb" in error
    assert words in error


def test_what_may_be_missing_is_no_error(tmp_path, graded):
    bare = {
        "cells": [{"cell_type": "code", "source": IMPORTS}, *book(GOOD, cell(TEST, 2))["cells"]]
    }
    bare["cells"] += [{"cell_type": "raw", "source": ["x"], "metadata": {"nbgrader": {}}}]
    bare["cells"][2]["metadata"]["nbgrader"] |= {"points": 0.5, "grade_id": "[/b] a name"}
    grades = graded(written(tmp_path / "sheet.ipynb", bare))
    assert (grades.points, grades.possible) == (0.5, 0.5)


def test_an_exercise_without_points_fails_like_another(tmp_path, capsys):
    name = "[/red] a name"
    path = written(tmp_path / "sheet.ipynb", book(cell("assert 1 == 2, '\\ud800'", 0, name)))
    assert main(["check", str(path)]) == 1
    assert name in capsys.readouterr().out


# Exercises that are lost, and exercises that are there more than once.


LOST = {
    "markdown": lambda one: {**one, "cell_type": "markdown"},
    "raw": lambda one: {**one, "cell_type": "raw"},
    "empty": lambda one: {**one, "source": ""},
    "only a comment": lambda one: {**one, "source": f"# {TEST}"},
    "a shell script": lambda one: {**one, "source": f"%%bash\n{TEST}"},
    "a file": lambda one: {**one, "source": f"%%writefile a.py\n{TEST}"},
    "timed": lambda one: {**one, "source": f"%%timeit\n{TEST}"},
    "not Python": lambda one: {**one, "source": f"{TEST} ("},
}


@pytest.mark.parametrize("how", LOST)
def test_a_graded_cell_that_is_not_tried_gets_nothing_and_is_named(how, tmp_path, graded, capsys):
    lost = LOST[how](cell(TEST, 2, "lost"))
    path = written(tmp_path / "a.ipynb", book(IMPORTS, GOOD, lost, cell(TEST, 3, "kept")))
    grades = graded(path)
    assert (grades.points, grades.possible, grades.passed) == (3.0, 5.0, False)
    (exercise,) = (e for e in grades.exercises if not e.passed)
    assert (exercise.name, exercise.place) == ("lost", "cell 3")
    assert exercise.reason


def test_a_lost_exercise_is_not_all_right(tmp_path, capsys):
    lost = cell(TEST, 2, "lost", kind="markdown")
    path = written(tmp_path / "a.ipynb", book(IMPORTS, GOOD, cell(TEST, 3, "kept"), lost))
    assert main(["check", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "lost (cell 4)" in printed
    assert "is markdown now" in printed


def test_cells_that_a_person_grades_stay_out_of_it(tmp_path, graded):
    by_hand = cell("An essay.", 5, "essay", kind="markdown", solution=True)
    path = written(tmp_path / "a.ipynb", book(IMPORTS, GOOD, by_hand, cell(TEST, 3, "kept")))
    assert graded(path).possible == 3.0


def test_a_graded_cell_that_was_deleted_is_missed_under_its_heading(tmp_path, graded):
    """Our sheets say in the heading of an exercise how many points it has."""
    sheet = json.loads((SHEETS / "02_null_spaces.ipynb").read_text(encoding="utf-8"))
    whole = graded(written(tmp_path / "whole.ipynb", sheet))
    assert whole.passed
    name = "rank-check"
    kept = [
        one
        for one in sheet["cells"]
        if one["metadata"].get("nbgrader", {}).get("grade_id") not in (name, "cumulated")
    ]
    grades = graded(written(tmp_path / "less.ipynb", {**sheet, "cells": kept}))
    assert (grades.possible, grades.points) == (whole.possible, whole.points - 3.0)
    (exercise,) = (e for e in grades.exercises if not e.passed)
    assert (exercise.name, exercise.possible) == ("exercise-null-rank", 3.0)
    assert "not there any more" in exercise.reason
    none = [one for one in sheet["cells"] if not one["metadata"].get("nbgrader", {}).get("grade")]
    grades = graded(written(tmp_path / "none.ipynb", {**sheet, "cells": none}))
    assert (grades.possible, grades.points) == (whole.possible, 0.0)
    moved = [*(c for c in sheet["cells"] if c not in kept), *kept]
    grades = graded(written(tmp_path / "moved.ipynb", {**sheet, "cells": moved}))
    assert grades.possible == whole.possible
    copied = [*sheet["cells"], *(c for c in sheet["cells"] if "exercise" in c["metadata"])]
    assert graded(written(tmp_path / "copied.ipynb", {**sheet, "cells": copied})).passed


def copies(*sources):
    return [cell(source, 2, "copied") for source in sources]


COPIES = {
    "once": ([GOOD, *copies(TEST)], 2.0),
    "below": ([GOOD, *copies(TEST, TEST, TEST, TEST)], 2.0),
    "above the answer": ([*copies(TEST), GOOD, *copies(TEST)], 2.0),
    "with an empty line more": ([GOOD, *copies(TEST, TEST + "\n\n")], 2.0),
    "with another content that passes": ([GOOD, *copies(TEST, "assert True")], 2.0),
    "made into text": ([GOOD, *copies(TEST), {**copies(TEST)[0], "cell_type": "markdown"}], 2.0),
    "wrong": ([GOOD, *copies(WRONG, WRONG)], 0.0),
    "a wrong one, with another content that passes": ([GOOD, *copies(WRONG, "pass")], 0.0),
    "above a wrong one": ([GOOD, *copies("assert True", WRONG)], 0.0),
    "emptied": ([GOOD, *copies(TEST, "")], 2.0),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_graded_cell_that_is_copied_counts_once(how, tmp_path, graded):
    cells, points = COPIES[how]
    path = written(tmp_path / "a.ipynb", book(IMPORTS, *cells, cell(TEST, 3, "other")))
    grades = graded(path)
    assert grades.possible == 5.0
    assert {e.name: e.points for e in grades.exercises}["copied"] == points
    note = next(e.note for e in grades.exercises if e.name == "copied")
    assert bool(note) == (how not in ("once", "made into text", "emptied"))
    if note:
        assert "it counts once" in note
        assert f"cell {len(cells) + 1}" in note


def handed_out(path, cells):
    """A notebook as nbgrader hands it out, with what its cells are now."""
    read = nbformat.from_dict(book(*cells))
    for one in read["cells"]:
        if one.metadata:
            one.metadata.nbgrader["checksum"] = compute_checksum(one)
    return written(path, json.loads(json.dumps(read)))


CHANGED = {
    "not": (TEST, True, ""),
    "the end of a line": (TEST + "\n", True, ""),
    "made better": ("v = check.projection(projection)\nassert v, v", True, "as it was handed out"),
    "a function": (GOOD, False, "as it was handed out"),
    "no call": ("verdict = True", False, "as it was handed out"),
    "a look": ("print(projection(torch.eye(2), torch.eye(2)))", False, "as it was handed out"),
}


@pytest.mark.parametrize("how", CHANGED)
def test_a_graded_cell_is_as_nbgrader_handed_it_out(how, tmp_path, graded):
    now, passes, words = CHANGED[how]
    path = handed_out(tmp_path / "a.ipynb", [IMPORTS, GOOD, cell(TEST, 2)])
    sheet = json.loads(path.read_text())
    sheet["cells"][2]["source"] = now
    (exercise,) = graded(written(path, sheet)).exercises
    assert exercise.passed == passes
    assert words in exercise.note
    assert bool(words) == bool(exercise.note)
    assert passes or "nothing is tried" in exercise.reason


def test_a_graded_cell_may_be_split(tmp_path, graded):
    path = handed_out(tmp_path / "a.ipynb", [IMPORTS, GOOD, cell(f"mine = projection\n{TEST}", 2)])
    sheet = json.loads(path.read_text())
    first, second = (
        sheet["cells"][2],
        {**sheet["cells"][2], "source": "assert check.projection(mine)"},
    )
    sheet["cells"][2:] = [{**first, "source": "mine = projection"}, second]
    (exercise,) = graded(written(path, sheet)).exercises
    assert exercise.passed, exercise.reason


def test_a_name_that_is_made_below_is_found(tmp_path, graded):
    path = written(tmp_path / "a.ipynb", book(IMPORTS, cell(TEST, 2), GOOD, cell(TEST, 2, "f")))
    first, second = graded(path).exercises
    assert "projection is only made in cell 3, and cells run in order" in first.reason
    assert second.passed


def test_a_process_that_was_killed_is_said_to_be(tmp_path):
    kill = "import os\nos.kill(os.getpid(), 9)"
    path = written(tmp_path / "a.ipynb", book(IMPORTS + GOOD, cell(kill, 1), cell(TEST, 2, "f")))
    killed, other = grade(path).exercises
    assert killed.reason == "it ended the process (killed, as where the memory does not suffice)"
    assert other.passed


@pytest.mark.slow
def test_a_copy_is_named_where_points_are_printed(tmp_path, capsys):
    path = written(tmp_path / "a.ipynb", book(IMPORTS, GOOD, *copies(TEST, TEST)))
    assert main(["check", str(path)]) == 0
    assert "cell 3 and cell 4 grade this exercise: it counts once" in capsys.readouterr().out


def test_an_answer_that_is_written_twice_is_one_answer(tmp_path, graded):
    grades = graded(written(tmp_path / "a.py", "def projection(g, b):\n    return g\n\n" + GOOD))
    assert [(e.name, e.place, e.points) for e in grades.exercises] == [
        ("projection", "line 4", 1.0)
    ]


@pytest.mark.parametrize(
    "call",
    [
        "if False:\n    check.projection(projection)",
        "for fn in []:\n    check.projection(fn)",
        "try:\n    1 / 0\n    check.projection(projection)\nexcept ZeroDivisionError:\n    pass",
        "check.projection = lambda fn: True\ncheck.projection(projection)",
        "async def later():\n    check.projection(projection)\nlater()",
    ],
)
@pytest.mark.parametrize("kind", ["py", "ipynb"])
def test_a_check_that_is_not_called_earns_nothing(call, kind, tmp_path, graded, monkeypatch):
    from teleport import check

    monkeypatch.setattr(check, "projection", check.projection)
    wrong = "def projection(g, b):\n    return g\n"
    content = f"{IMPORTS}{wrong}{call}\n" if kind == "py" else book(IMPORTS + wrong, call, TEST)
    grades = graded(written(tmp_path / f"a.{kind}", content))
    assert grades.points == 0.0
    assert not grades.passed


def test_the_main_part_of_a_file_is_run(tmp_path, graded):
    for answer, points in ((GOOD, 1.0), ("def projection(g, b):\n    return g\n", 0.0)):
        text = f'{IMPORTS}{answer}if __name__ == "__main__":\n    check.projection(projection)\n'
        grades = graded(written(tmp_path / "a.py", text))
        assert (grades.points, grades.possible) == (points, 1.0)


# IPython's syntax.

IPYTHON = {
    "a line magic": "%matplotlib inline\n%config InlineBackend.figure_format = 'svg'",
    "an unknown magic": "%no_such_magic at all",
    "a magic in a block": "if True:\n    %cd somewhere\n    x = 1",
    "a magic in the answer": "def projection(g, b):\n    %time h = g @ b @ b.T\n    return g - h",
    "a magic that gives a value": "x = %time 3\nassert x == 3\ny = %pwd",
    "%time": "%time t = 7\nassert t == 7",
    "%timeit": "%timeit -n 1 projection",
    "%%time": "%%time\n" + GOOD + "u = 8",
    "%%time after empty lines": "\n\n%%time\n" + GOOD,
    "%%capture": "%%capture out --no-stderr\n" + GOOD,
    "%%time in %%capture": "%%capture\n%%time\n" + GOOD,
    "%%prun": "%%prun -s cumulative\n" + GOOD,
    "%%bash": "%%bash\ntouch SHELL\nexit 1",
    "%%html": "%%html\n<b>bold</b>",
    "%%javascript": "%%javascript\nalert(1)",
    "%%writefile": "%%writefile a.py\nx = (",
    "shell": "!touch SHELL",
    "shell with a value": "files = !touch SHELL\nassert len(files) == 0",
    "shell with output": "!!touch SHELL",
    "shell in a block": "for i in range(2):\n    !touch SHELL\n    x = i",
    "pip": "%pip install no-such-package\n!pip install -q no-such-package",
    "colab": "%load_ext tensorboard\n%tensorflow_version 2.x\n#@title A form\nx = 1 #@param",
    "autoreload": "%load_ext autoreload\n%autoreload 2",
    "help": "?projection",
    "help behind": "projection?",
    "more help": "torch.eye??\nx = 1",
    "help on a method": "torch.nn.Linear.forward?",
    "a session": ">>> x = 1\n>>> x + 1",
    "a numbered session": "In [1]: import math",
    "an indented cell": "    x = 1\n    y = 2",
    "await": "import asyncio\nawait asyncio.sleep(0)\nx = 3",
    "async with": (
        "import contextlib\n@contextlib.asynccontextmanager\nasync def c():\n    yield 4\n"
        "async with c() as x:\n    pass\nassert x == 4"
    ),
    "async for": (
        "async def numbers():\n    yield 1\nseen = [n async for n in numbers()]\nassert seen == [1]"
    ),
    "a running loop": "import asyncio\nasyncio.get_running_loop().call_soon(print)",
    "get_ipython": "ip = get_ipython()\nip.run_line_magic('matplotlib', 'inline')",
    "in a comment": "# %time x\n# !touch SHELL\nx = '%d' % 3",
    "in a string": 'x = """\n%%bash\n!touch SHELL\n?\n"""\nassert len(x) > 10',
}


@pytest.mark.parametrize("how", IPYTHON)
def test_what_jupyter_runs_is_graded(how, tmp_path, graded, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    after = f"# the cell before raised nothing\nassert done == {len(how)}"
    path = written(
        tmp_path / "a.ipynb",
        book(
            IMPORTS + GOOD,
            IPYTHON[how],
            f"done = {len(how)}",
            cell(TEST, 2),
            cell(after, 1, "after"),
            cell(f"%%time\n{TEST}", 1, "timed"),
        ),
    )
    grades = graded(path)
    assert (grades.points, grades.possible) == (4.0, 4.0)
    assert list(work.iterdir()) == []
    # As a graded cell it is run, and passes if its code is run at all.
    path = written(tmp_path / "b.ipynb", book(IMPORTS + GOOD, cell(IPYTHON[how], 1, "this")))
    (exercise,) = graded(path).exercises
    skipped = how in ("%%bash", "%%html", "%%javascript", "%%writefile")
    assert exercise.passed != skipped, exercise.reason


@pytest.mark.parametrize("head", ["%%time", "%%capture", "%%prun -s time", "%%time\n%%capture x"])
def test_a_wrong_answer_is_wrong_behind_a_magic(head, tmp_path, graded):
    path = written(tmp_path / "a.ipynb", book(IMPORTS, cell(f"{head}\n{WRONG}", 2)))
    assert graded(path).points == 0.0
    plain = book(IMPORTS + GOOD, f"{head}\ncheck.projection(projection)\ncheck.rows(None)")
    grades = graded(written(tmp_path / "b.ipynb", plain))
    assert (grades.points, grades.possible) == (0.0, 2.0)
    timed = book(IMPORTS + GOOD, "%time check.projection(projection)\nv = %time check.rows(None)")
    assert graded(written(tmp_path / "c.ipynb", timed)).possible == 2.0


def test_without_ipython_its_syntax_ends_with_2_and_says_what_to_install(
    tmp_path, monkeypatch, capsys, graded
):
    monkeypatch.setitem(sys.modules, "IPython.core.inputtransformer2", None)
    path = written(tmp_path / "a.ipynb", book("%matplotlib inline", cell(TEST, 2)))
    assert main(["check", str(path)]) == 2
    error = capsys.readouterr().err
    assert "cell 1" in error
    assert "nullspace-teleport[course]" in error
    assert graded(written(tmp_path / "b.ipynb", book(IMPORTS + GOOD, cell(TEST, 2)))).passed


# What answers may be made of.

ANSWERS = {
    "dataclass": """
        from dataclasses import dataclass, field, replace
        @dataclass
        class Kept:
            basis: torch.Tensor
            names: list[str] = field(default_factory=list)
            def of(self, g):
                return g @ self.basis @ self.basis.T
        def projection(g, b):
            return g - replace(Kept(b), names=["x"]).of(g)
        """,
    "slots and order": """
        import dataclasses
        @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
        class Kept:
            basis: "torch.Tensor"
        def projection(g, b):
            return g - g @ Kept(basis=b).basis @ b.T
        """,
    "a callable dataclass": """
        from dataclasses import dataclass
        @dataclass
        class Projection:
            sign: float = 1.0
            def __call__(self, g, b):
                return g - self.sign * g @ b @ b.T
        projection = Projection()
        """,
    "NamedTuple": """
        from typing import NamedTuple
        class Pair(NamedTuple):
            g: torch.Tensor
            b: "torch.Tensor"
        def projection(g, b):
            pair = Pair(g, b)
            return pair.g - pair.g @ pair.b @ pair.b.T
        """,
    "enum": """
        import enum
        class Side(enum.Enum):
            LEFT = enum.auto()
            RIGHT = enum.auto()
        def projection(g, b):
            return g - g @ b @ b.T if Side["RIGHT"] is Side(2) else g
        """,
    "pickle": """
        import pickle
        class Kept:
            def __init__(self, b): self.b = b
        def helper(g, b): return g @ b @ b.T
        def projection(g, b):
            kept = pickle.loads(pickle.dumps(Kept(b)))
            return g - pickle.loads(pickle.dumps(helper))(g, kept.b)
        """,
    "deepcopy": """
        import copy
        class Net(torch.nn.Module):
            def forward(self, g, b): return g - g @ b @ b.T
        net = Net()
        def projection(g, b):
            return copy.deepcopy(net)(copy.deepcopy(g), b)
        """,
    "torch.save": """
        import io
        class Kept:
            def __init__(self, b): self.b = b
        def projection(g, b):
            file = io.BytesIO()
            torch.save(Kept(b), file)
            file.seek(0)
            return g - g @ torch.load(file, weights_only=False).b @ b.T
        """,
    "scripted": """
        @torch.jit.script
        def projection(g: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return g - g @ b @ b.T
        """,
    "scripted module": """
        class Net(torch.nn.Module):
            def forward(self, g: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
                return g - g @ b @ b.T
        projection = torch.jit.script(Net())
        """,
    "a helper that is scripted": """
        def helper(g: torch.Tensor, b: torch.Tensor):
            return g @ b @ b.T
        def projection(g, b):
            return g - torch.jit.script(helper)(g, b)
        """,
    "looked up by the module's name": """
        import importlib, sys
        def helper(g, b): return g @ b @ b.T
        def projection(g, b):
            one = getattr(sys.modules[__name__], "helper")
            two = importlib.import_module(helper.__module__).helper
            assert one is two is sys.modules[projection.__module__].helper
            return g - one(g, b)
        """,
    "type hints": """
        import typing
        class Kept:
            basis: "torch.Tensor"
            next: "typing.Optional[Kept]"
        def projection(g: "torch.Tensor", b: "Kept") -> "torch.Tensor":
            assert typing.get_type_hints(Kept)["next"] == typing.Optional[Kept]
            assert typing.get_type_hints(projection)["b"] is Kept
            return g - g @ b @ b.T
        """,
    "its own source": """
        import inspect
        class Marked:
            mark = "a mark of the class"
        def projection(g, b):
            assert "a mark of the function" in inspect.getsource(projection)
            assert "a mark of the class" in inspect.getsource(Marked)
            assert inspect.getsource(projection).startswith("def projection")
            return g - g @ b @ b.T
        """,
    "cached": """
        import functools
        @functools.lru_cache(maxsize=None)
        def eye(n): return torch.eye(n, dtype=torch.float64)
        @functools.wraps(eye)
        def projection(g, b): return g @ (eye(len(b)) - b @ b.T)
        del projection.__wrapped__
        """,
    "async": """
        import asyncio
        async def later(g, b): return g @ b @ b.T
        def projection(g, b):
            loop = asyncio.new_event_loop()
            coroutine = later(g, b)
            try:
                coroutine.send(None)
            except StopIteration as end:
                return g - end.value
        """,
    "lambda": "projection = lambda g, b: g - g @ b @ b.T",
}


FUTURE = pytest.param("from __future__ import annotations\n", marks=pytest.mark.slow)


@pytest.mark.parametrize("future", ["", FUTURE])
@pytest.mark.parametrize("kind", ["py", "ipynb"])
@pytest.mark.parametrize("how", ANSWERS)
def test_an_answer_may_be_made_of_anything(how, kind, future, tmp_path, graded):
    if future and how.startswith("scripted") and kind == "py":
        pytest.skip("torch.jit.script does not take annotations that are text")
    answer = textwrap.dedent(ANSWERS[how])
    if kind == "py":
        content = f"{future}{IMPORTS}{answer}\ncheck.projection(projection)\n"
    else:
        content = book(f"{future}{IMPORTS}", "x = 1\n\n\ny = 2", answer, cell(TEST, 1))
    grades = graded(written(tmp_path / f"a.{kind}", content))
    (exercise,) = grades.exercises
    assert exercise.passed, "\n".join([exercise.reason, *map(str, exercise.verdicts)])


@pytest.mark.slow
def test_what_a_file_of_answers_uses_is_there_in_its_own_process_too(tmp_path):
    """All kinds of answers at once, run as `teleport check` runs them."""
    parts = [
        textwrap.dedent(answer) + "\ncheck.projection(projection)" for answer in ANSWERS.values()
    ]
    grades = grade(written(tmp_path / "a.py", IMPORTS + "\n".join(parts)), time_limit=60.0)
    assert [(e.place, e.reason) for e in grades.exercises if not e.passed] == []
    assert grades.points == len(ANSWERS)
    cells = [cell(part, 1, f"e{number}") for number, part in enumerate(parts)]
    cells = [one | {"source": "%%time\n" + one["source"]} for one in cells]
    grades = grade(written(tmp_path / "a.ipynb", book(IMPORTS, *cells)), time_limit=60.0)
    assert [(e.place, e.reason) for e in grades.exercises if not e.passed] == []


def test_a_future_statement_holds_for_what_follows(tmp_path, graded):
    answer = "def projection(g: Unknown, b: Unknown):\n    return g - g @ b @ b.T\n"
    future = "from __future__ import annotations\n"
    assert graded(written(tmp_path / "a.py", future + answer)).passed
    assert graded(
        written(tmp_path / "a.ipynb", book(future + IMPORTS, answer, cell(TEST, 1)))
    ).passed
    assert not graded(written(tmp_path / "b.py", answer)).passed


def test_folders_and_names_are_no_obstacle(tmp_path, capsys):
    (tmp_path / "a.py").mkdir()
    assert main(["check", str(tmp_path / "a.py")]) == 2
    assert "cannot read" in capsys.readouterr().err
    with pytest.raises(CheckError, match="neither a notebook"):
        read_submission(tmp_path / "py")
    folder = tmp_path / "Übung 1 (Kopie)"
    folder.mkdir()
    shutil.copy(written(tmp_path / "b.py", GOOD), folder / "answers (1).PY")
    assert read_submission(folder / "answers (1).PY").units[-1].exercise == "projection"
