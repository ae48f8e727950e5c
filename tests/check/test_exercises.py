"""The exercise notebooks: solutions get all points, wrong answers lose the right ones."""

import ast
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

import teleport
from teleport import check
from teleport.check.exercises import exercise_markdown
from teleport.check.grading import grade
from teleport.errors import CheckError
from tests.support.submissions import WRONG, functions_of

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

CHAPTERS = Path(__file__).parents[2] / "chapters"
NOTEBOOKS = sorted((CHAPTERS / "exercises").glob("*.ipynb"))
KINDS = {"recall", "derive", "implement", "experiment"}


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source_of(cell):
    return "".join(cell["source"])


def marks_of(cell):
    return cell["metadata"].get("nbgrader", {})


def automatic(cell):
    return cell["cell_type"] == "code" and marks_of(cell).get("grade", False)


def run(cells, names):
    """Run code cells; the ids of graded ones that failed, with their reasons."""
    failed = {}
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        try:
            exec(source_of(cell), names)
        except AssertionError as error:
            if not automatic(cell):
                raise
            failed[marks_of(cell)["grade_id"]] = str(error)
    return failed


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def solved(request):
    """A notebook's cells and the variables after its solutions."""
    names = {}
    cells = cells_of(request.param)
    return request.param, cells, names, run(cells, names)


def test_there_is_a_notebook_for_each_chapter_but_the_reading_guide():
    assert [path.name for path in NOTEBOOKS] == sorted(p.name for p in CHAPTERS.glob("*.ipynb"))[1:]


def test_solutions_get_all_points(solved):
    assert solved[3] == {}


def test_every_notebook_has_exercises_of_all_kinds_with_marks(solved):
    _, cells, _, _ = solved
    about = [cell["metadata"]["exercise"] for cell in cells if "exercise" in cell["metadata"]]
    assert len(about) >= 4
    assert {one["kind"] for one in about} == KINDS
    assert all(one["difficulty"] in (1, 2, 3) for one in about)
    points = [marks_of(cell).get("points", 0) for cell in cells if marks_of(cell).get("grade")]
    assert points == [one["points"] for one in about]
    ids = [marks_of(cell)["grade_id"] for cell in cells if marks_of(cell)]
    assert len(set(ids)) == len(ids)
    for cell in cells:
        source = source_of(cell)
        assert cell["cell_type"] == "markdown" or cell["outputs"] == []
        if cell["cell_type"] == "code" and marks_of(cell)["solution"]:
            assert source.count("### BEGIN SOLUTION") == source.count("### END SOLUTION") == 1
        if automatic(cell):
            assert source.count("### BEGIN HIDDEN TESTS") == source.count("### END HIDDEN") == 1
            assert re.search(r"check\.\w+\(", source)


def wrong_answers_to(cell, names):
    """Wrong values for the name that a graded cell checks, and words that have to be said."""
    (call,) = [
        node
        for node in ast.walk(ast.parse(source_of(cell)))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("check.")
        if ast.unparse(node.func) != "check.answer"
    ]
    name = ast.unparse(call.args[0])
    if call.func.attr in check.CHECKS:
        # That the others get their messages is tested with the checks.
        fn = functions_of(WRONG[0])[name]
        return name, [(fn, fn.__doc__.partition(" ")[2])]
    namespace = dict(names)
    exec(source_of(cell).rpartition("verdict =")[0], namespace)
    wrong = [*namespace["why"].items(), ("zz", "Set the variable"), (1e9, "")]
    return name, [*wrong, (None, "Set the variable")] if call.func.attr == "value" else wrong


def test_wrong_answers_lose_their_points_and_get_the_message(solved):
    _, cells, names, _ = solved
    for cell in filter(automatic, cells):
        name, wrong = wrong_answers_to(cell, names)
        _, _, hidden = source_of(cell).partition("### BEGIN HIDDEN TESTS")
        graded = {**cell, "source": hidden} if "check.answer(" in source_of(cell) else cell
        assert len(wrong) >= 3 or name in check.CHECKS
        for answer, words in wrong:
            failed = run([graded], {**names, name: answer})
            if failed == {}:
                pytest.fail(f"{name} = {answer!r} passed")
            assert words in failed[marks_of(cell)["grade_id"]] or answer in (None, 1e9)


def called_right(seen, right):
    """Numbers at both ends of what a seal calls right: who hands them in gets the points."""
    ((digits, _),) = re.findall(r":(\d):(\w{16})", seen)
    if "." not in right:
        return []
    rounded = float(f"{float(right):.{int(digits) - 1}e}")
    half = 0.49 * 10 ** (math.floor(math.log10(rounded)) + 1 - int(digits))
    return [rounded - half, rounded + half]


def test_sealed_questions_answer_at_once_and_do_not_tell(solved):
    _, cells, names, _ = solved
    asked = [cell for cell in filter(automatic, cells) if "check.answer(" in source_of(cell)]
    questions = [
        c for c in filter(automatic, cells) if re.search(r"check\.(choice|value)", source_of(c))
    ]
    assert asked == questions
    for cell in asked:
        seen, hidden = source_of(cell).split("### BEGIN HIDDEN TESTS")
        name, wrong = wrong_answers_to(cell, names)
        for answer in (names[name], wrong[0][0], "zz"):  # a digest is slow on purpose
            namespace = {**names, name: answer}
            exec(seen, namespace)
            assert namespace["verdict"].passed == (answer is names[name])
            assert (
                namespace["verdict"].hint == ""
                or "hink of" in namespace["verdict"].hint
                or ("Set the variable" in namespace["verdict"].hint)
            )
        (right,) = re.findall(r"check\.(?:choice|value)\(\w+, ([^,]+),", hidden)
        assert all(run([cell], {**names, name: near}) == {} for near in called_right(seen, right))
        told = re.escape(right.strip('"'))
        assert not re.search(rf"(?<![\w.]){told}(?![\w.])", re.sub(r":\d:\w+", "", seen))


def test_the_page_of_the_book_asks_before_it_answers(solved):
    path, cells, _, _ = solved
    page = exercise_markdown(path)
    about = [cell["metadata"]["exercise"] for cell in cells if "exercise" in cell["metadata"]]
    assert page.count("{exercise}") == page.count("{solution}") == len(about)
    for one in about:
        question, answer = page.split(f":label: {one['label']}\n")[1].split("{solution}")[:2]
        answer = answer.split("{exercise}")[0]
        assert answer.startswith(f" {one['label']}\n:class: dropdown\n")
        assert "SOLUTION" not in question + answer
        assert "HIDDEN" not in question + answer
        assert len(answer.split(":class: dropdown")[1]) > 20  # a solution, and not in the question
        if one["kind"] == "implement":
            assert "    ...\n```" in question
            (code,) = re.findall(r"```python\n(.*?)```", answer, re.DOTALL)
            ast.parse(code)
            assert "return" in code
            assert "return" not in question
    assert page.startswith(f"# Exercises: {page.splitlines()[0].removeprefix('# Exercises: ')}")


def test_directives_are_fenced_longer_than_what_they_hold(tmp_path):
    path = tmp_path / "a.ipynb"
    head = {"exercise": {"label": "exercise-a"}}
    cells = [
        {"cell_type": "markdown", "metadata": head, "source": "## Title\n\n:::{note}\nx\n:::"},
        {"cell_type": "markdown", "metadata": {"nbgrader": {"solution": True}}, "source": ["yes"]},
    ]
    path.write_text(json.dumps({"cells": cells}))
    assert exercise_markdown(path) == (
        "::::{exercise} Title\n:label: exercise-a\n\n:::{note}\nx\n:::\n::::\n\n"
        ":::{solution} exercise-a\n:class: dropdown\n\nyes\n:::\n"
    )
    path.write_text("[]")
    with pytest.raises(CheckError, match="not a notebook of exercises"):
        exercise_markdown(path)


# With nbgrader itself.


def released(cells, replaced):
    """What a student hands in: the released notebook with answers filled in."""
    for cell in cells:
        identity = marks_of(cell).get("grade_id")
        if identity in replaced:
            cell["source"] = replaced[identity]
    return cells


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="nbgrader's command line is tested on Unix")
def test_a_course_with_nbgrader_from_source_to_points(tmp_path):
    source = CHAPTERS / "exercises" / "02_null_spaces.ipynb"
    cells = cells_of(source)
    solutions = {
        marks_of(cell)["grade_id"]: cell["source"]
        for cell in cells
        if marks_of(cell).get("solution")
    }
    (tmp_path / "source" / "sheet").mkdir(parents=True)
    (tmp_path / "source" / "sheet" / source.name).write_text(source.read_text())
    package = str(Path(teleport.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "JUPYTER_PLATFORM_DIRS": "1"}

    def nbgrader(*arguments):
        command = [sys.executable, "-m", "nbgrader", *arguments, f"--course-dir={tmp_path}"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]

    nbgrader("generate_assignment", "sheet", "--create")
    release = tmp_path / "release" / "sheet" / source.name
    text = release.read_text()
    for secret in ("BEGIN SOLUTION", "HIDDEN", "cumsum", "10^{-5}", "last_seen = max", "why = "):
        assert secret not in text
        assert secret in source.read_text().replace("BEGIN HIDDEN", "HIDDEN")
    assert "YOUR CODE HERE" in text
    assert "YOUR ANSWER HERE" in text
    assert grade(release).points == 0.0

    wrong = solutions | {
        "float32-rank": "float32_rank = 50",
        "rank": "def rank(matrix):\n    return int((torch.linalg.svdvals(matrix) > 0).sum())",
    }
    for student, answers in {"ada": solutions, "ben": wrong}.items():
        book = json.loads(text)
        book["cells"] = released(book["cells"], answers)
        handed = tmp_path / "submitted" / student / "sheet" / source.name
        handed.parent.mkdir(parents=True)
        handed.write_text(json.dumps(book))
    nbgrader("autograde", "sheet")

    with sqlite3.connect(tmp_path / "gradebook.db") as database:
        rows = database.execute(
            "select s.student_id, b.name, g.auto_score, c.max_score from grade g "
            "join grade_cells c on g.cell_id = c.id join base_cell b on b.id = c.id "
            "join submitted_notebook n on g.notebook_id = n.id "
            "join submitted_assignment s on n.assignment_id = s.id"
        ).fetchall()
    scores = {(student, cell): (score, most) for student, cell, score, most in rows}
    graded = {cell for _, cell in scores} - {"cumulated"}
    assert len(graded) == 4
    for cell in graded:
        score, most = scores["ada", cell]
        assert score == most
        score, most = scores["ben", cell]
        # His `last_seen` comes from his wrong `rank`.
        assert score == (most if cell == "energy-rank-check" else 0.0), cell
    feedback = (tmp_path / "autograded" / "ben" / "sheet" / source.name).read_text()
    assert "Rounding is never exactly 0" in feedback
    assert "matrix = torch.tensor" in feedback


def test_the_page_for_teachers_says_what_is_there():
    page = (CHAPTERS / "pages" / "teaching.md").read_text(encoding="utf-8")
    about = [
        cell["metadata"]["exercise"]
        for path in NOTEBOOKS
        for cell in cells_of(path)
        if "exercise" in cell["metadata"]
    ]
    assert f"{len(about)} exercises, {sum(one['points'] for one in about)} points" in page
    verdict = check.projection(named_projection(), quiet=True)
    assert str(verdict) in page
    for path in NOTEBOOKS:
        assert f"`{path.stem}`" in page


def named_projection():
    def projection(gradient, basis):
        return gradient @ basis @ basis.T

    return projection
