"""The links of the built pages: all resolve, and nothing is loaded from outside the book."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself, as opposed to what a reader may follow.
_LOADED = {"audio", "embed", "iframe", "img", "link", "script", "source", "track", "video"}


@dataclass
class _Page(HTMLParser):
    """The anchors of a page and what it refers to, with the lines."""

    anchors: set[str] = field(default_factory=set)
    links: list[tuple[int, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        for name in ("href", "src"):
            if name in given:
                self.links.append((self.getpos()[0], tag, given[name]))


def check_links(folder: Path) -> list[str]:
    """What is wrong with the links of the pages in a folder, one line each; empty if nothing is.

    A link inside the folder needs its file and its anchor. Scripts, styles, images and fonts must
    not come from elsewhere. Addresses that a reader may follow out of the book are not asked.
    """
    folder = folder.resolve()
    pages = {file: _read(file) for file in built_pages(folder)}
    found = []
    for file, page in pages.items():
        for line, tag, link in page.links:
            problem = _problem(folder, pages, file, tag, link)
            if problem:
                found.append(f"{file.relative_to(folder)}:{line}: {link}: {problem}")
    return found


def built_pages(folder: Path) -> list[Path]:
    """The pages of a built book, without the templates that a theme leaves among its files."""
    static = folder / "_static"
    return [file for file in sorted(folder.rglob("*.html")) if not file.is_relative_to(static)]


def _read(file: Path) -> _Page:
    page = _Page()
    page.feed(file.read_text(encoding="utf-8"))
    return page


def _problem(folder: Path, pages: dict[Path, _Page], file: Path, tag: str, link: str) -> str:
    parts = urlsplit(link)
    if parts.scheme == "data":
        return ""
    if parts.scheme or parts.netloc:
        return "is loaded from outside the book" if tag in _LOADED else ""
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if not target.is_relative_to(folder):
        return "leads out of the book's folder"
    if not target.is_file():
        return "there is no such file"
    anchor = unquote(parts.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return "the page has no such anchor"
    return ""
