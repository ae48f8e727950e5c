"""The configuration of Sphinx, made from ``book.toml``; there is no ``conf.py`` to keep in step."""

from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from teleport.book.manifest import Book

EXTENSIONS = (
    "myst_nb",
    "sphinx_proof",
    "sphinx_exercise",
    "sphinx_togglebutton",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "teleport.book.extension",
)
LEDGER_NAME = "ledger.json"
"""The record that the page of verified theorems is made from, in the book's source folder."""

STATIC = Path(__file__).parent / "static"

# Without the menu an equation is no stop of the tab key, and nothing can ask for parts of MathJax
# that are not copied. Screen readers get the equations as MathML.
_MATHJAX = {"options": {"enableMenu": False}}

_SLIDES = {
    # The order in which MyST-NB looks for what a cell shows; it has none for this builder.
    "nb_mime_priority_overrides": [("revealjs", "image/png", 10), ("revealjs", "text/plain", 20)],
    "revealjs_static_path": [str(STATIC)],
    "revealjs_css_files": ["revealjs/dist/theme/white.css", "slides.css"],
    "revealjs_script_files": ["revealjs/dist/reveal.js"],
    "revealjs_script_plugins": [{"name": "RevealNotes", "src": "revealjs/plugin/notes/notes.js"}],
    "revealjs_script_conf": {"center": False, "hash": True, "slideNumber": True, "width": 1200},
}

FORMATS = {"html": "html", "slides": "revealjs", "epub": "epub"}
"""What can be made of the book, with the names of Sphinx's builders."""


def sphinx_settings(book: Book, form: str = "html") -> dict[str, Any]:
    """All of Sphinx's settings for this book, as ``confoverrides`` takes them.

    Args:
        book: The book.
        form: One of `FORMATS`.
    """
    settings = _common(book)
    if form == "slides":
        settings |= _SLIDES
        settings["extensions"].append("sphinx_revealjs")
    if form == "epub":
        settings |= {"html_math_renderer": "mathml", "epub_show_urls": "no", "version": "1"}
        settings |= {"epub_css_files": ["ebook.css"], "epub_description": book.title}
        authors = ", ".join(book.authors)
        named = uuid5(NAMESPACE_URL, f"{book.title} {authors}").urn
        settings |= {"epub_uid": "book", "epub_identifier": named, "epub_contributor": authors}
    return settings


def _common(book: Book) -> dict[str, Any]:
    exercises = [c.exercises for c in book.chapters if c.exercises is not None]
    files = [book.front, *(c.file for c in book.chapters), *exercises, *book.pages]
    ledger = ["teleport.book.ledger_page"] if (book.source / LEDGER_NAME).is_file() else []
    return {
        "project": book.title,
        "author": ", ".join(book.authors),
        "copyright": f"{', '.join(book.authors)}, {book.licence}",
        "language": book.language,
        "root_doc": book.document(book.front),
        "include_patterns": [file.relative_to(book.source).as_posix() for file in files],
        "extensions": [*EXTENSIONS, *ledger],
        "teleport_book": book,
        "bibtex_bibfiles": [book.bibliography.relative_to(book.source).as_posix()],
        "bibtex_reference_style": "author_year",
        "default_role": "py:obj",
        "autodoc_member_order": "bysource",
        "autodoc_typehints_format": "short",
        "napoleon_use_ivar": True,
        "napoleon_use_rtype": False,
        "python_maximum_signature_line_length": 80,
        "numfig": True,
        "nb_execution_mode": "off",
        "myst_enable_extensions": ["amsmath", "colon_fence", "deflist", "dollarmath"],
        "myst_heading_anchors": 3,
        "html_math_renderer": "mathjax",
        "mathjax_path": "mathjax/tex-chtml.js",
        "mathjax_options": {"async": "async"},
        "mathjax3_config": _MATHJAX,
        "togglebutton_hint": "Show",
        "togglebutton_hint_hide": "Hide",
        "copybutton_exclude": ".linenos, .gp, .go",
        "html_theme": "sphinx_book_theme",
        "html_theme_options": _theme_options(book),
        "html_title": book.title,
        "html_favicon": str(STATIC / "favicon.svg"),
        "html_context": {"default_mode": "auto"},
        "html_static_path": [str(STATIC)],
        "html_css_files": ["book.css"],
        "html_js_files": [(name, {"defer": "defer"}) for name in ("book.js", "interactive.js")],
        "html_copy_source": True,
        "html_sourcelink_suffix": "",
        "html_show_sphinx": False,
    }


def _theme_options(book: Book) -> dict[str, Any]:
    links = (f'<a href="{address}">{text}</a>' for text, address in book.links.items())
    return {
        "extra_footer": f"<p>{' · '.join(links)}</p>" if book.links else "",
        "home_page_in_toc": True,
        "launch_buttons": {},
        "logo": {"text": book.title},
        "navbar_persistent": [],
        "pygments_dark_style": "a11y-high-contrast-dark",
        "pygments_light_style": "a11y-high-contrast-light",
        "show_toc_level": 2,
        "use_download_button": True,
        "use_edit_page_button": False,
        "use_fullscreen_button": False,
        "use_issues_button": False,
        "use_repository_button": False,
    }
