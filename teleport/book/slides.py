"""Slides of the chapters: what a class looks at stays, what a teacher says goes into the notes.

The chapters are written to be read. For reveal.js, by way of sphinx-revealjs, every section becomes
a column of slides: theorems and definitions, equations with the sentence before them, code cells
with their output, figures with their captions, lists, tables, and the questions named *Try it*. All
other text becomes the speaker's notes of the slide before it (key S). Proofs and exercises are left
out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from docutils import nodes
from sphinx.application import Sphinx

_SHOWN = (nodes.bullet_list, nodes.enumerated_list, nodes.table, nodes.image)
_LEFT_OUT = ("proof", "exercise", "solution")


@dataclass
class Slide:
    """What is seen on a slide, and what is said to it."""

    seen: list[nodes.Node] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def make_slides(app: Sphinx, doctree: nodes.document, document: str) -> None:
    """Turn the sections of a chapter into columns of slides, in place."""
    book = app.config.teleport_book
    if app.builder.name != "revealjs":
        return
    if document not in {book.document(chapter.file) for chapter in book.chapters}:
        return
    top = next(doctree.findall(nodes.section))
    for part in [top, *(child for child in top.children if isinstance(child, nodes.section))]:
        title = next(child for child in part.children if isinstance(child, nodes.title))
        if title.astext().endswith("Exercises"):
            top.remove(part)
            continue
        below = [child for child in part.children if isinstance(child, nodes.section)]
        first, *others = list(_slides(_flat(part, nested=part is not top)))
        part.children = [title]
        part += _content(first)
        for number, slide in enumerate(others, start=2):
            name = f"{part['ids'][0]}-slide-{number}"
            again = nodes.rubric("", title.astext(), classes=["slide-title"])
            part += nodes.section("", again, *_content(slide), ids=[name])
        if part is top:
            part += below


def _flat(section: nodes.section, nested: bool) -> Iterator[nodes.Node]:
    """What a section holds without its title; with ``nested``, what its subsections hold, too."""
    for child in section.children:
        if isinstance(child, nodes.section):
            yield from _flat(child, nested) if nested else ()
        elif not isinstance(child, nodes.title):
            yield child


def _slides(parts: Iterator[nodes.Node]) -> Iterator[Slide]:
    slide = Slide()
    before: nodes.Node | None = None
    for part in parts:
        kind = type(part).__name__.removesuffix("_node")
        if kind in _LEFT_OUT or "run-it-yourself" in part.get("classes", []):
            before = None
        elif isinstance(part, nodes.target | nodes.comment):
            continue
        elif isinstance(part, nodes.paragraph) and _begins(part, nodes.emphasis, "Figure"):
            slide.seen.append(part)
        elif isinstance(part, nodes.paragraph) and not _begins(part, nodes.strong, ""):
            slide.said.append(part.astext())
            before = part
        else:
            with_sentence = isinstance(part, nodes.math_block) and before is not None
            seen = [before.deepcopy(), part] if with_sentence and before is not None else [part]
            if slide.seen and (isinstance(part, _SHOWN) or _is_definition(slide.seen)):
                slide.seen += seen
            else:
                if slide.seen:
                    yield slide
                    slide = Slide()
                slide.seen += seen
            before = None
    yield slide


def _begins(paragraph: nodes.paragraph, kind: type[nodes.Node], text: str) -> bool:
    first = next((part for part in paragraph.children if part.astext().strip()), None)
    return isinstance(first, kind) and first.astext().startswith(text)


def _is_definition(parts: list[nodes.Node]) -> bool:
    """Whether these are code cells that print and show nothing: the next one belongs to them."""
    return all("cell" in part.get("classes", []) and len(part.children) == 1 for part in parts)


def _content(slide: Slide) -> list[nodes.Node]:
    from sphinx_revealjs._ext.notes import revealjs_notes  # comes with the extra `book`

    for part in slide.seen:
        for inner in list(part.findall(nodes.section)):  # of a theorem: it would be a slide
            inner.replace_self(nodes.container("", *inner.children))
    notes = revealjs_notes("", *(nodes.paragraph("", text) for text in slide.said))
    return [*slide.seen, *([notes] if slide.said else [])]
