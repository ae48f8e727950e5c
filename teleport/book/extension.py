"""What the book adds to Sphinx: generated parts, the box above each chapter, MathJax's files.

A page asks for a generated part by its name in a comment line: ``<!-- contents -->`` on the first
page, ``<!-- public names -->`` on that of the reference, ``<!-- refusals -->`` on that of what the
library refuses, ``<!-- citation -->`` on that of how to cite.
"""

import json
import re
import shutil
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.builders import Builder
from sphinx.environment import BuildEnvironment
from sphinx.environment.collectors.toctree import TocTreeCollector
from sphinx.writers.html5 import HTML5Translator

from teleport.book.extras import needed
from teleport.book.generated import citation, contents, public_names
from teleport.book.interactive import MIME, page_part
from teleport.book.manifest import Book, Chapter
from teleport.book.notebook_form import joined
from teleport.book.refusals import read_refusals, refusals_page
from teleport.book.slides import make_slides
from teleport.check.exercises import exercise_markdown
from teleport.data import SOURCES

MATHJAX_FILES = ("tex-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_config_value("teleport_book", None, "")
    app.add_config_value("teleport_repository", "", "")
    app.connect("source-read", _fill_in)
    app.connect("doctree-read", _add_box)
    app.connect("doctree-resolved", make_slides)
    app.connect("html-page-context", _style_e_book)
    app.connect("build-finished", _copy_mathjax)
    app.add_env_collector(ChapterNumbers)
    app.add_html_math_renderer("mathml", (_visit_mathml, None), (_visit_mathml, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


class ChapterNumbers(TocTreeCollector):
    """Numbers the chapters as their files' names do; Sphinx by itself counts from 1.

    It works after Sphinx's own collector, which has collected the tables of contents already.
    """

    def clear_doc(self, app: Sphinx, env: BuildEnvironment, docname: str) -> None:
        """Sphinx's own collector does it."""

    def merge_other(
        self, app: Sphinx, env: BuildEnvironment, docnames: Set[str], other: BuildEnvironment
    ) -> None:
        """Sphinx's own collector does it."""

    def process_doc(self, app: Sphinx, doctree: nodes.document) -> None:
        """Sphinx's own collector does it."""

    def assign_section_numbers(self, env: BuildEnvironment) -> list[str]:
        """Number the sections of the chapters; return the documents to write again."""
        changed = super().assign_section_numbers(env)
        book: Book = env.config.teleport_book
        for chapter in book.chapters:
            name = book.document(chapter.file)
            sections = env.toc_secnumbers.get(name, {})
            for anchor, number in sections.items():
                sections[anchor] = (chapter.number, *number[1:])
            links = env.tocs[name].findall(nodes.reference)
            for node in (*links, env.titles[name], env.longtitles[name]):
                if "secnumber" in node:
                    node["secnumber"] = (chapter.number, *node["secnumber"][1:])
        return changed


def _fill_in(app: Sphinx, document: str, source: list[str]) -> None:
    book: Book = app.config.teleport_book
    for chapter in book.chapters:
        if chapter.exercises is not None and book.document(chapter.exercises) == document:
            source[0] = _one_cell(exercise_markdown(chapter.exercises))
        if book.document(chapter.file) == document:
            source[0] = _with_sliders(source[0], shown=app.builder.name == "html")
    for name, made in _GENERATED.items():
        if (mark := f"<!-- {name} -->") in source[0]:
            source[0] = source[0].replace(mark, made(book))


_GENERATED: dict[str, Callable[[Book], str]] = {
    "contents": contents,
    "public names": lambda book: public_names(),
    "refusals": lambda book: refusals_page(read_refusals(book.source / "refusals.toml")),
    "citation": lambda book: citation(
        yaml.safe_load((book.file.parent / "CITATION.cff").read_text(encoding="utf-8"))
    ),
}


def _one_cell(text: str) -> str:
    """A notebook of one cell of text: the form in which Sphinx expects the file's content."""
    cell = {"cell_type": "markdown", "id": "exercises", "metadata": {}, "source": text}
    return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def _with_sliders(text: str, shown: bool) -> str:
    """A chapter in which the still picture of every interactive figure is followed by the other.

    If the pages cannot show them, the still pictures are all there is.
    """
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        found = [o["data"].pop(MIME) for o in cell.get("outputs", []) if MIME in o.get("data", {})]
        for data in found if shown else []:
            html = {"text/html": page_part(joined(data))}
            cell["outputs"].append({"output_type": "display_data", "metadata": {}, "data": html})
    return json.dumps(notebook)


def _add_box(app: Sphinx, doctree: nodes.document) -> None:
    """Put the box 'Run it yourself' below the title of a chapter."""
    book: Book = app.config.teleport_book
    for chapter in book.chapters:
        if book.document(chapter.file) == app.env.docname:
            title = next(iter(doctree.findall(nodes.title)))
            box = _box(book, chapter, app.builder)
            if app.config.teleport_repository:
                box += _in_colab(book, chapter, app.config.teleport_repository)
            title.parent.insert(title.parent.index(title) + 1, box)


def _in_colab(book: Book, chapter: Chapter, repository: str) -> list[nodes.Node]:
    """A link to the notebook in Colab, and what is to be run there first."""
    host, name = f"https://github.com/{repository}", chapter.file.relative_to(book.file.parent)
    colab = f"https://colab.research.google.com/github/{repository}/blob/HEAD/{name.as_posix()}"
    link = nodes.reference("", "Open it in Colab", refuri=colab)
    commands = f"%pip install 'nullspace-teleport[course] @ git+{host}'"
    if re.search(r'\(\\"results\b', chapter.file.read_text(encoding="utf-8")):  # records of runs
        commands = (
            f"!git clone --depth 1 {host} book && pip install './book[course]'\n"
            f"%cd book/{name.parent.as_posix()}"
        )
    return [
        nodes.paragraph("", "", link, nodes.Text(", with this as its first cell:")),
        nodes.literal_block(commands, commands, language="ipython"),
    ]


def _box(book: Book, chapter: Chapter, builder: Builder) -> nodes.Node:
    name = chapter.file.relative_to(book.file.parent).as_posix()
    document = book.document(chapter.file)
    fetch = [f"teleport data fetch {data}" for data in chapter.data if SOURCES[data].folder]
    commands = ["pip install '.[book]'", *fetch, f"jupyter lab {name}"]
    box = nodes.admonition("", classes=["run-it-yourself"])
    box += nodes.title("", "Run it yourself")
    box += nodes.paragraph("", "In the top folder of the repository:")
    box += nodes.literal_block("\n".join(commands), "\n".join(commands), language="bash")
    about = nodes.paragraph("", f"It takes less than {chapter.seconds:g} s on two cores. ")
    if not fetch:
        about += nodes.Text("It needs no network: its data come with the package. ")
    if builder.name != "epub":  # which does not hold the notebooks
        about += nodes.reference("", "Download the notebook", refuri=f"_sources/{document}.ipynb")
        about += nodes.Text(".")
    box += about
    if chapter.exercises is not None:
        page = builder.get_target_uri(book.document(chapter.exercises))
        exercises = nodes.reference("", "its exercises", refuri=page)
        box += nodes.paragraph(
            "", "", nodes.Text("There is a notebook with "), exercises, nodes.Text(".")
        )
    return box


def _visit_mathml(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """E-book readers run no scripts: equations as MathML."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    convert = needed("latex2mathml.converter").convert
    translator.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def _style_e_book(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Other extensions style web pages, by files that an e-book does not hold."""
    if app.builder.name == "epub":
        own = ("pygments.css", "epub.css", "ebook.css")
        context["css_files"] = [s for s in context["css_files"] if Path(s.filename).name in own]


def _copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """MathJax and its fonts lie in a package of their own, so that no page has to fetch them."""
    if error is not None or app.builder.name == "epub":
        return
    origin = Path(str(needed("sphinx-mathjax-offline").__file__)).parent / "static" / "mathjax"
    target = Path(app.outdir) / "_static" / "mathjax"
    for name in MATHJAX_FILES:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (origin / name).is_dir():
            shutil.copytree(origin / name, target / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(origin / name, target / name)
