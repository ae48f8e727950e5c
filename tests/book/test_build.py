import json
import posixpath
import re
import subprocess
import sys
import urllib.request
import zipfile
from html import unescape
from pathlib import Path
from threading import Thread
from types import ModuleType
from xml.etree import ElementTree

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

import teleport
from teleport import cli
from teleport.book import build, check_links, over_budget, read_book
from teleport.book.build import TIMES_NAME
from teleport.book.execute import run_notebook
from teleport.book.generated import citation, public_names
from teleport.book.places import key_lines
from teleport.book.serve import server
from teleport.errors import BookError
from tests.support.waiting import HANG

ROOT = Path(__file__).parents[2]

HEAD = """title = "A small book"
authors = ["One", "Two"]
language = "en"
licence = "MIT"
front = "texts/index.md"
bibliography = "texts/sources.bib"
"""
LINKS = '[links]\n"A link" = "https://example.org/"\n'
CHAPTER = '[[chapter]]\nfile = "texts/02_small.ipynb"\nseconds = 30\ndata = ["mnist-sample"]\n'
PAGE = '[[page]]\nfile = "texts/more.md"\n'
WHOLE = f"{HEAD}\n{LINKS}\n{CHAPTER}\n{PAGE}"

THEOREM = """# A small chapter

:::{prf:theorem} Squares
:label: thm-squares

For every $x$,

$$
x^2 \\ge 0 .
$$ (eq-squares)
:::

By {prf:ref}`thm-squares` and {eq}`eq-squares` nothing is negative.

:::{exercise} More
:label: ex-more

And $x^4$?
:::

:::{solution} ex-more
:class: dropdown

It is a square.
:::
"""
FIGURE = """import matplotlib.pyplot as plt

plt.plot([0, 1], [0, 1])
plt.show()"""
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)


def notebook(*code: str, text: str = THEOREM) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_markdown_cell(text), *map(nbformat.v4.new_code_cell, code)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def figure() -> nbformat.NotebookNode:
    """A chapter with a figure that has been run, and whose alternative text is known."""
    made = notebook(FIGURE)
    made.cells[1].metadata["mystnb"] = {"image": {"alt": "a line that rises"}}
    data = {"image/png": PIXEL, "text/plain": "<Figure>"}
    made.cells[1].outputs = [nbformat.v4.new_output("display_data", data=data)]
    made.cells[1].execution_count = 1
    return made


def small_book(folder: Path) -> Path:
    """Write a small book with one chapter, a page, a source and a link; return its book.toml."""
    texts = folder / "texts"
    texts.mkdir()
    texts.joinpath("index.md").write_text("# A small book\n\n<!-- contents -->\n")
    texts.joinpath("more.md").write_text("# More\n\n```{bibliography}\n:all:\n```\n")
    texts.joinpath("sources.bib").write_text("@misc{a, title={T}, author={A, B}, year={2000}}\n")
    nbformat.write(figure(), texts / "02_small.ipynb")
    folder.joinpath("book.toml").write_text(WHOLE)
    return folder / "book.toml"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return small_book(tmp_path)


def line_of(text: str, piece: str) -> int:
    return text[: text.index(piece)].count("\n") + 1


def change(file: Path, old: str, new: str) -> str:
    """Replace a piece of a file that is there once; return the new text."""
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    return text.replace(old, new)


# What book.toml may hold


def test_the_book_of_this_repository_is_read() -> None:
    book = read_book(ROOT / "book.toml")
    there = set((ROOT / "chapters").glob("*.ipynb"))
    assert {chapter.file for chapter in book.chapters} == there
    assert all(chapter.seconds <= 60 for chapter in book.chapters)


def test_a_small_book_is_read_as_written(small: Path) -> None:
    book = read_book(small)
    assert (book.title, book.authors, book.language) == ("A small book", ("One", "Two"), "en")
    assert book.links == {"A link": "https://example.org/"}
    (chapter,) = book.chapters
    assert (chapter.number, chapter.seconds, chapter.data) == (2, 30, ("mnist-sample",))
    assert chapter.exercises is None
    assert book.document(chapter.file) == "02_small"
    assert book.pages == (small.parent / "texts" / "more.md",)


WRONG_TYPES = {
    "title": "3",
    "authors": '"One"',
    "language": "[]",
    "licence": "true",
    "front": "1",
    "bibliography": "{}",
    "seconds": '"30"',
    "data": '"mnist-sample"',
}


@pytest.mark.parametrize("key", WRONG_TYPES)
def test_a_value_of_the_wrong_type_is_named_with_its_line(small: Path, key: str) -> None:
    lines = WHOLE.splitlines()
    (number,) = [i for i, line in enumerate(lines) if line.startswith(f"{key} =")]
    lines[number] = f"{key} = {WRONG_TYPES[key]}"
    small.write_text("\n".join(lines))
    with pytest.raises(BookError, match=rf"book\.toml:{number + 1}: '{key}'.* must be"):
        read_book(small)


@pytest.mark.parametrize("seconds", ["0", "-1", "true", "nan", "inf"])
def test_a_time_budget_is_a_positive_number(small: Path, seconds: str) -> None:
    text = change(small, "seconds = 30", f"seconds = {seconds}")
    with pytest.raises(BookError, match=rf":{line_of(text, 'seconds')}: 'seconds'"):
        read_book(small)


@pytest.mark.parametrize("key", ["title", "authors", "language", "licence", "front"])
def test_a_missing_key_of_the_book_is_named(small: Path, key: str) -> None:
    kept = [line for line in WHOLE.splitlines() if not line.startswith(f"{key} =")]
    small.write_text("\n".join(kept))
    with pytest.raises(BookError, match=rf"book\.toml:1: the key '{key}' is missing"):
        read_book(small)


@pytest.mark.parametrize("key", ["file", "seconds", "data"])
def test_a_missing_key_of_a_chapter_names_the_line_of_its_header(small: Path, key: str) -> None:
    second = CHAPTER.replace("02_small", "03_next")
    short = [line for line in second.splitlines() if not line.startswith(key)]
    text = WHOLE + "\n".join(short) + "\n"
    small.write_text(text)
    (small.parent / "texts" / "03_next.ipynb").write_bytes(
        (small.parent / "texts" / "02_small.ipynb").read_bytes()
    )
    line = text[: text.rindex("[[chapter]]")].count("\n") + 1
    with pytest.raises(BookError, match=rf"book\.toml:{line}: the key '{key}' is missing"):
        read_book(small)


@pytest.mark.parametrize(
    ("after", "allowed"),
    [(HEAD, "title, authors"), (CHAPTER, "file, seconds, data, exercises"), (PAGE, "file")],
)
def test_an_unknown_key_is_named_with_its_line_and_the_known_ones(
    small: Path, after: str, allowed: str
) -> None:
    text = change(small, after, f"{after}colour = 'red'\n")
    line = line_of(text, "colour")
    with pytest.raises(BookError, match=rf"book\.toml:{line}: unknown key 'colour'.*{allowed}"):
        read_book(small)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("texts/02_small.ipynb", "texts/02_none.ipynb", "there is no file 'texts/02_none.ipynb'"),
        ("texts/02_small.ipynb", "texts/more.md", "ends in .ipynb"),
        ("texts/more.md", "texts", "there is no file 'texts'"),
        ("texts/more.md", "texts/index.md", "'index.md' is listed twice"),
        ("texts/more.md", "other.md", "not in the folder of the front page"),
        ("texts/02_small.ipynb", "texts/small.ipynb", "NN_name.ipynb"),
        ('"mnist-sample"', '"mnits"', "unknown data set 'mnits'; there are: mnist-sample"),
        ("https://example.org/", "example.org", "begins with https"),
        ("https://example.org/", "javascript:alert(1)", "begins with https"),
    ],
)
def test_a_wrong_entry_is_named_with_its_line(
    small: Path, old: str, new: str, message: str
) -> None:
    (small.parent / "other.md").write_text("# Other\n")
    (small.parent / "texts" / "small.ipynb").write_text("{}")
    change(small, old, new)
    with pytest.raises(BookError) as caught:
        read_book(small)
    assert f"book.toml:{line_of(WHOLE, old)}: " in str(caught.value)
    assert message in str(caught.value)


def test_chapters_stand_in_the_order_of_their_numbers(small: Path) -> None:
    texts = small.parent / "texts"
    (texts / "01_first.ipynb").write_bytes((texts / "02_small.ipynb").read_bytes())
    small.write_text(WHOLE + CHAPTER.replace("02_small", "01_first"))
    with pytest.raises(BookError, match="chapter 1 stands after chapter 2"):
        read_book(small)


def test_a_book_without_chapters_is_none(small: Path) -> None:
    small.write_text(f"chapter = []\n{HEAD}")
    with pytest.raises(BookError, match=r"book\.toml:1: .*at least one"):
        read_book(small)


def test_broken_toml_and_a_missing_file_are_told_apart(small: Path) -> None:
    small.write_text("title = \n")
    with pytest.raises(BookError, match=r"is not TOML: .*line 1"):
        read_book(small)
    with pytest.raises(BookError, match="top folder of the repository"):
        read_book(small.parent / "none.toml")


KEYS = st.sampled_from(["a", "b c", "é", "chapter"])
VALUES = st.sampled_from(
    [
        "1",
        '"x"',
        "[\n  1,\n  2,\n]",
        '"""\n[[chapter]]\nfile = 1\n"""',
        "{ x = 1 }",
        "'''\na = 1'''",
    ]
)
NOISE = st.sampled_from(["", "# [chapter]", "  # file = 1", "\n\n"])


@given(st.data())
def test_places_are_the_lines_where_keys_were_written(data: st.DataObject) -> None:
    lines: list[str] = []
    expected = {}

    def write(statement: str, *keys: str | int) -> None:
        lines.extend(data.draw(NOISE).split("\n"))
        expected[keys] = len(lines) + 1
        lines.extend(statement.split("\n"))

    def write_keys(*table: str | int) -> None:
        for key in data.draw(st.lists(KEYS, unique=True, max_size=3)):
            value = data.draw(VALUES)
            write(f"{json.dumps(key, ensure_ascii=False)} = {value}", *table, key)
            if value.startswith("{"):
                expected[(*table, key, "x")] = expected[(*table, key)]

    if data.draw(st.booleans()):
        write("[top]", "top")
        write_keys("top")
    for index in range(data.draw(st.integers(0, 3))):
        write("[[table]]", "table", index)
        write_keys("table", index)
    assert key_lines("\n".join(lines)) == expected


# Building


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return build(small_book(folder), folder / "out").parent


def test_a_small_book_has_numbers_links_sources_and_alternative_text(built: Path) -> None:
    chapter = (built / "02_small.html").read_text()
    assert "Theorem 2.1" in chapter  # numbered as the file is, not from 1
    assert "(2.1)" in chapter
    assert 'alt="a line that rises"' in chapter
    shown = unescape(re.sub("<[^>]*>", "", chapter))
    assert "pip install '.[book]'\njupyter lab texts/02_small.ipynb" in shown
    assert "less than 30 s" in shown
    assert (built / "_sources" / "02_small.ipynb").is_file()
    assert 'href="https://example.org/"' in (built / "index.html").read_text()
    assert "2000" in (built / "more.html").read_text()
    assert check_links(built) == []


def test_a_built_book_is_replaced_and_nothing_else_is(built: Path, small: Path) -> None:
    out = small.parent / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(BookError, match="is not empty and holds no book"):
        build(small, out)
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]
    (built / "stale.html").write_text("")
    assert "colab" not in (built / "02_small.html").read_text()
    told: list[tuple[int, int]] = []
    again = {"repository": "some-one/a.book", "progress": lambda *each: told.append(each)}
    build(built.parent / "book.toml", built, **again)
    assert not (built / "stale.html").exists()
    assert {sum(done for done, _ in told)} == {of for _, of in told}
    chapter = (built / "02_small.html").read_text()
    colab = (
        "https://colab.research.google.com/github/some-one/a.book/blob/HEAD/texts/02_small.ipynb"
    )
    assert f'href="{colab}"' in chapter
    shown = unescape(re.sub("<[^>]*>", "", chapter))
    assert "[course] @ git+https://github.com/some-one/a.book'" in shown
    with pytest.raises(BookError, match=r"named as owner/name, got 'a b'"):
        build(small, built, repository="a b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# A\n\n{prf:ref}`thm-none`\n", "thm-none"),
        ("# A\n\n[there](none.md)\n", "none"),
        ("# A\n\n:::{nonsense}\n:::\n", "nonsense"),
        ("# A\n\n{cite:t}`none2000`\n", "none2000"),
    ],
)
def test_every_warning_is_an_error_that_names_the_file(
    small: Path, text: str, message: str
) -> None:
    nbformat.write(notebook(text=text), small.parent / "texts" / "02_small.ipynb")
    with pytest.raises(BookError, match="every warning is an error") as caught:
        build(small, small.parent / "out")
    assert "02_small" in str(caught.value)
    assert message in str(caught.value)


def test_executing_shows_new_outputs_and_leaves_the_notebook_alone(small: Path) -> None:
    file = small.parent / "texts" / "02_small.ipynb"
    nbformat.write(notebook("print(6 * 7, 'new')"), file)
    before = file.read_bytes()
    page = build(small, small.parent / "out", run=True)
    assert "42 new" in page.with_name("02_small.html").read_text()
    assert file.read_bytes() == before
    times = json.loads((page.parent / TIMES_NAME).read_text())
    assert 0 < times["02_small.ipynb"] < 30
    assert over_budget(read_book(small), page.parent) == []
    (page.parent / TIMES_NAME).write_text('{"02_small.ipynb": 31}')
    assert over_budget(read_book(small), page.parent) == [
        "02_small.ipynb took 31 s, its budget is 30 s"
    ]


@pytest.mark.parametrize(
    ("cells", "limit", "message"),
    [
        (["x = 1", "1 / 0"], HANG, "chapter 07_a.ipynb, cell 2: ZeroDivisionError"),
        (["import time; time.sleep(60)"], 2.0, "cell 1: the chapter takes longer than its 2 s"),
    ],
)
def test_a_failing_or_slow_cell_is_named_with_its_chapter(
    tmp_path: Path, cells: list[str], limit: float, message: str
) -> None:
    file = tmp_path / "07_a.ipynb"
    nbformat.write(notebook(*cells), file)
    with pytest.raises(BookError) as caught:
        run_notebook(file, limit)
    assert message in str(caught.value)


# Slides and e-book


def test_slides_hold_what_a_class_sees_and_the_rest_as_notes(tmp_path: Path) -> None:
    pytest.importorskip("sphinx_revealjs", reason="part of the extra `book`")
    out = build(small_book(tmp_path), tmp_path / "slides", form="slides").parent
    page = (out / "02_small.html").read_text()
    shown, notes = re.subn(r'<aside class="notes">.*?</aside>', "", page, flags=re.DOTALL)
    assert notes
    assert page.count("<section") >= 3
    assert "Theorem" in shown
    assert "<img" in shown
    assert "By Theorem" in page
    assert "By Theorem" not in shown  # prose is for the teacher
    assert "It is a square" not in page  # exercises and solutions are not for slides
    for name in re.findall(r'(?:src|href)="([^"#?]+)', page):
        assert not name.startswith(("http:", "https:", "//")), name
        assert (out / name).is_file(), name


def test_an_e_book_has_the_equations_as_mathml(tmp_path: Path) -> None:
    pytest.importorskip("latex2mathml", reason="part of the extra `book`")
    file = build(small_book(tmp_path), tmp_path / "epub", form="epub")
    with zipfile.ZipFile(file) as archive:
        text = archive.read("02_small.xhtml").decode()
        assert archive.read("mimetype") == b"application/epub+zip"
        assert "unknown" not in archive.read("content.opf").decode().replace("unknown-", "")
        assert "pre-wrap" in archive.read("_static/ebook.css").decode()
        for name in (n for n in archive.namelist() if n.endswith(("html", "opf", "ncx"))):
            page = ElementTree.fromstring(archive.read(name).replace(b"&nbsp;", b" "))
            found = [e.get(key) for e in page.iter() for key in ("href", "src") if e.get(key)]
            near = [str(f).split("#")[0] for f in found if "://" not in str(f)]
            there = {posixpath.normpath(posixpath.join(posixpath.dirname(name), f)) for f in near}
            assert there - {"."} <= set(archive.namelist()), name
    assert "<math" in text
    assert "<msup>" in text
    assert "\\ge" not in text.replace("\\ge 0 .</annotation>", "")


# Links


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ('<a href="b.html#there">', None),
        ('<a href="#here">', None),
        ('<a href="https://example.org/x">', None),
        ('<img src="data:image/png;base64,AA==">', None),
        ('<a href="c.html">', "no such file"),
        ('<a href="b.html#nowhere">', "no such anchor"),
        ('<a href="#nowhere">', "no such anchor"),
        ('<a href="../secret.txt">', "leads out of"),
        ('<script src="https://cdn.example.org/x.js">', "loaded from outside"),
        ('<link href="//fonts.example.org/x.css">', "loaded from outside"),
        ('<img src="http://example.org/x.png">', "loaded from outside"),
    ],
)
def test_links_of_pages(tmp_path: Path, link: str, problem: str | None) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "secret.txt").write_text("")
    (out / "a.html").write_text(f'<p id="here">\n{link}')
    (out / "b.html").write_text('<p id="there">')
    found = check_links(out)
    assert len(found) == (problem is not None)
    assert problem is None or (found[0].startswith("a.html:2: ") and problem in found[0])


# What is generated


def test_every_public_name_is_in_the_reference() -> None:
    text = public_names()
    for name in teleport.__all__:
        public = getattr(teleport, name)  # a module is documented where it lies
        place = public.__name__ if isinstance(public, ModuleType) else f"teleport.{name}"
        assert name == "__version__" or f":: {place}\n" in text


def test_the_citation_has_the_software_and_the_paper() -> None:
    yaml = pytest.importorskip("yaml", reason="part of the extra `book`")
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    text = citation(cff)
    assert "@misc{teleport-software,\n  author = {{The teleport authors}}," in text
    assert "author = {Wu, Zihao and Dong, Juncheng and Aloui, Ahmed and Tarokh, Vahid}" in text
    assert "arXiv:2502.11362" in text


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["book", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_build_and_check_from_the_command_line(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places_ = ["--book", str(small), "--out", str(small.parent / "out")]
    code, printed, _ = run(capsys, "check", *places_)
    assert (code, "not built" in printed) == (0, True)
    notebook = small.parent / "texts" / "02_small.ipynb"
    notebook.write_text(notebook.read_text().replace("plt.show()", 'plt.show(Path(\\"results\\"))'))
    code, printed, _ = run(capsys, "build", "--repository", "a/b", *places_)
    assert code == 0
    assert str(small.parent / "out" / "index.html") in printed
    chapter = unescape(re.sub("<[^>]*>", "", (small.parent / "out" / "02_small.html").read_text()))
    assert "!git clone --depth 1 https://github.com/a/b book && pip" in chapter
    assert "%cd book/texts" in chapter
    assert run(capsys, "check", *places_)[0] == 0
    (small.parent / "out" / "more.html").unlink()
    code, _, error = run(capsys, "check", *places_)
    assert code == 1
    assert "more.html: there is no such file" in error


def test_the_server_serves_the_book_on_this_machine_only(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(built, 0) as running:
        host, port = running.server_address[:2]
        assert host == "127.0.0.1"
        Thread(target=running.serve_forever, daemon=True).start()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
            assert b"A small book" in answer.read()
        code, _, error = run(capsys, "serve", "--out", str(built), "--port", str(port))
        assert (code, f"port {port}" in error) == (1, True)
        running.shutdown()
    code, _, error = run(capsys, "serve", "--out", str(tmp_path))
    assert (code, "run `teleport book build` first" in error) == (1, True)


WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"sphinx", "docutils", "yaml", "myst_nb", "nbformat"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
from teleport import cli
out = sys.argv[1]
print("check", cli.main(["book", "check", "--out", out]))
print("build", cli.main(["book", "build", "--out", out]))
"""


def test_without_the_extra_all_works_but_building(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert "check 0" in ended.stdout
    assert "build 1" in ended.stdout
    assert "pip install '.[book]'" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not out.exists()
