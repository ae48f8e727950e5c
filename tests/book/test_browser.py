"""The book of this repository in a real browser: every page, on a desk and on a phone."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from teleport.book import Book, build, check_links, read_book
from teleport.book.interactive import MIME
from teleport.book.links import built_pages
from teleport.book.serve import server
from tests.support.waiting import HANG

pytestmark = pytest.mark.slow

if shutil.which("chromium") is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)

ROOT = Path(__file__).parents[2]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
SCREENSHOTS = "TELEPORT_SCREENSHOTS"
"""Environment variable: a folder where the screenshots are to stay."""

# MathJax has set every equation, and made none of them an error; no TeX is left outside of code.
TYPESET = "window.MathJax?.startup?.promise?.then(() => null)"
EQUATIONS = """() => [...document.querySelectorAll('.math')]
  .filter(e => !e.querySelector('mjx-container') || e.querySelector('mjx-merror'))
  .map(e => e.textContent)"""
RAW_TEX = """() => {
  const body = document.querySelector('main').cloneNode(true);
  for (const e of body.querySelectorAll('pre, code, script, mjx-container')) e.remove();
  const tex = /\\$[^$]*\\$|\\\\\\(|\\\\\\[|\\\\begin|:::|\\{(prf|eq|cite)/g;
  return body.textContent.match(tex) || [];
}"""
IMAGES = """() => [...document.querySelectorAll('main img')].map(e =>
  ({alt: e.alt, loaded: e.complete && e.naturalWidth > 0, src: e.src.split('/').pop()}))"""
# The theme makes them reachable a moment after the window has changed.
SCROLLED = """async () => {
  const scrolled = () =>
    [...document.querySelectorAll('main mjx-container, main pre, main table')]
      .filter(e => e.scrollWidth > e.clientWidth + 1)
      .filter(e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX))
      .map(e => [e.tagName, e.tabIndex, e.textContent.slice(0, 40)]);
  for (let wait = 0; wait < 60 && scrolled().some(e => e[1] < 0); wait++)
    await new Promise(done => setTimeout(done, 50));
  return scrolled();
}"""
WIDER_THAN_ITS_WINDOW = "() => document.documentElement.scrollWidth - window.innerWidth"


@dataclass
class Visit:
    """What the browser had to say about one page."""

    console: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    equations: list[str] = field(default_factory=list)
    raw_tex: list[str] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    too_wide: int = 0
    scrolled: list[tuple[str, int, str]] = field(default_factory=list)


@pytest.fixture(scope="module")
def book() -> Book:
    return read_book(ROOT / "book.toml")


@pytest.fixture(scope="module")
def pages(book: Book, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in TELEPORT_BOOK, where the book was built just now, or else built here."""
    if built := os.environ.get("TELEPORT_BOOK"):
        return Path(built)
    return build(book.file, tmp_path_factory.mktemp("book") / "out").parent


@pytest.fixture(scope="module")
def address(pages: Path) -> Iterator[str]:
    with server(pages, 0) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()


def opened(browser: Any, url: str, size: dict[str, int] = DESK, scheme: str = "light") -> Any:
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.set_default_timeout(1000 * HANG)
    page.goto(url)
    page.evaluate(TYPESET)
    return page


@pytest.fixture(scope="module")
def visits(browser: Any, pages: Path, address: str) -> dict[str, Visit]:
    """Every page, opened once, by one reader: scripts and styles are loaded once."""
    found, context = {}, browser.new_context()

    def hear(visit: Visit, message: Any) -> None:
        if message.type in ("error", "warning"):
            visit.console.append(message.text)

    for file in built_pages(pages):
        name = file.relative_to(pages).as_posix()
        visit = found[name] = Visit()
        page = context.new_page()
        page.set_default_timeout(1000 * HANG)
        page.set_viewport_size(DESK)
        page.on("console", lambda message, v=visit: hear(v, message))
        page.on("pageerror", lambda error, v=visit: v.console.append(str(error)))
        page.on("requestfailed", lambda request, v=visit: v.failed.append(request.url))
        page.on("response", lambda r, v=visit: r.status >= 400 and v.failed.append(r.url))
        page.on(
            "request",
            lambda r, v=visit: r.url.startswith((address, "data:")) or v.outside.append(r.url),
        )
        page.goto(address + name)
        page.evaluate(TYPESET)
        visit.equations = page.evaluate(EQUATIONS)
        visit.raw_tex = page.evaluate(RAW_TEX)
        visit.images = page.evaluate(IMAGES)
        page.set_viewport_size(PHONE)
        visit.too_wide = page.evaluate(WIDER_THAN_ITS_WINDOW)
        visit.scrolled = page.evaluate(SCROLLED)
        page.close()
    context.close()
    return found


def said(visits: dict[str, Visit], what: str) -> dict[str, Any]:
    """The pages that have something of a kind, and what."""
    return {name: getattr(visit, what) for name, visit in visits.items() if getattr(visit, what)}


def test_every_chapter_and_page_is_there(book: Book, visits: dict[str, Visit]) -> None:
    files = [book.front, *(chapter.file for chapter in book.chapters), *book.pages]
    assert {f"{book.document(file)}.html" for file in files} <= set(visits)


def test_no_page_has_anything_on_its_console(visits: dict[str, Visit]) -> None:
    assert said(visits, "console") == {}


def test_no_request_fails_or_leaves_the_book(visits: dict[str, Visit]) -> None:
    assert said(visits, "failed") == {}
    assert said(visits, "outside") == {}


def test_every_equation_is_set(visits: dict[str, Visit]) -> None:
    assert said(visits, "equations") == {}
    assert said(visits, "raw_tex") == {}


def test_every_image_is_shown_and_has_alternative_text(visits: dict[str, Visit]) -> None:
    images = [(name, image) for name, visit in visits.items() for image in visit.images]
    assert images
    assert [each for each in images if not each[1]["loaded"]] == []
    paths = re.compile(r"^\s*$|\.(png|svg|jpg)$")  # Sphinx puts the path where text is missing
    assert [each for each in images if paths.search(each[1]["alt"])] == []


def test_no_page_is_wider_than_a_phone(visits: dict[str, Visit]) -> None:
    assert said(visits, "too_wide") == {}


def test_every_link_in_the_book_resolves(pages: Path) -> None:
    assert check_links(pages) == []


def test_search_finds_a_theorem(browser: Any, address: str) -> None:
    page = opened(browser, f"{address}search.html?q=finite+invariance")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(a => a.href)")
    assert any("03_mlp.html" in link for link in found)


def test_each_chapter_leads_to_the_next_and_back(
    browser: Any, address: str, pages: Path, book: Book
) -> None:
    names = [f"{book.document(chapter.file)}.html" for chapter in book.chapters]
    for before, after in pairwise(names):
        for page, way, name in ((before, "right-next", after), (after, "left-prev", before)):
            links = re.findall(rf'<a class="{way}"\s+href="([^"]+)"', (pages / page).read_text())
            assert links == [name]
    page = opened(browser, address + names[0])
    page.click(".prev-next-area a.right-next")
    page.wait_for_url(f"**/{names[1]}")


def test_the_notebook_of_a_chapter_can_be_had(browser: Any, address: str, book: Book) -> None:
    chapter = book.chapters[0]
    page = opened(browser, f"{address}{book.document(chapter.file)}.html")
    with page.expect_download() as download:
        page.evaluate("document.querySelector('.run-it-yourself a').setAttribute('download', '')")
        page.click(".run-it-yourself a")
    assert Path(download.value.path()).read_bytes() == chapter.file.read_bytes()


def test_in_the_dark_figures_stand_on_white(browser: Any, address: str, book: Book) -> None:
    page = opened(browser, f"{address}{book.document(book.chapters[0].file)}.html", scheme="dark")
    style = """() => {
      const image = getComputedStyle(document.querySelector('main img'));
      return [image.backgroundColor, image.filter, document.documentElement.dataset.theme,
              getComputedStyle(document.body).backgroundColor];
    }"""
    figure, changed, theme, ground = page.evaluate(style)
    assert (figure, changed, theme) == ("rgb(255, 255, 255)", "none", "dark")
    assert max(map(int, re.findall(r"\d+", ground)[:3])) < 64


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names(browser: Any, address: str, book: Book, scheme: str) -> None:
    """Some rules of axe-core, for all but equations, which have thousands of parts."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    rules = ["button-name", "color-contrast", "html-has-lang", "image-alt", "link-name", "tabindex"]
    found = {}
    first, moving = (
        book.document(book.chapters[0].file),
        with_figures(book)[0].removesuffix(".html"),
    )
    for name in ("index", first, moving, "pages/glossary", "search"):
        page = opened(browser, f"{address}{name}.html", size=PHONE, scheme=scheme)
        options = {"runOnly": rules, "resultTypes": ["violations"]}
        result = axe.run(page, {"exclude": [["mjx-container"]]}, options)
        for violation in result.response["violations"]:
            found[name, violation["id"]] = [node["html"][:200] for node in violation["nodes"]]
        page.close()
    assert found == {}


def test_the_keyboard_reaches_what_can_be_scrolled(visits: dict[str, Visit]) -> None:
    """On a phone."""
    found = [each for visit in visits.values() for each in visit.scrolled]
    assert found
    assert [each for each in found if each[1] < 0] == []


def test_the_keyboard_opens_a_solution(browser: Any, address: str, book: Book) -> None:
    page = opened(browser, f"{address}{book.document(book.chapters[0].file)}.html")
    solution = page.locator(".solution.dropdown").first
    text = solution.locator("p").nth(1)
    assert not text.is_visible()
    solution.locator("button.toggle-button").focus()
    page.keyboard.press("Enter")
    assert text.is_visible()


def with_figures(book: Book) -> list[str]:
    """Pages of chapters that have something to move."""
    has = [chapter.file for chapter in book.chapters if MIME in chapter.file.read_text("utf-8")]
    return [f"{book.document(file)}.html" for file in has]


def with_script(browser: Any, url: str, **options: Any) -> Any:
    """A page as soon as its own scripts have run, whether or not its equations are set."""
    page = browser.new_page(viewport=DESK, **options)
    page.set_default_timeout(1000 * HANG)
    page.goto(url, wait_until="domcontentloaded")
    return page


STATE = """root => ({
  drawn: [...root.querySelectorAll('.panel > svg')].map(e => e.innerHTML).join(),
  said: root.querySelector('output').textContent,
  told: root.querySelector('input').getAttribute('aria-valuetext'),
})"""


def test_every_slider_moves_its_figure_by_the_keyboard(
    browser: Any, address: str, book: Book
) -> None:
    names = with_figures(book)
    assert len(names) >= 4
    for name in names:
        page = with_script(browser, address + name)
        for figure in page.locator(".interactive-figure").all():
            data = json.loads(figure.locator("script").text_content())
            slider = figure.get_by_label(data["control"], exact=True)
            slider.focus()
            page.keyboard.press("Home")
            seen = [figure.evaluate(STATE)]
            for _ in data["positions"][1:]:
                page.keyboard.press("ArrowRight")
                seen.append(figure.evaluate(STATE))
            assert [each["told"] for each in seen] == [f"{p}" for p in data["positions"]]
            for each, says in zip(seen, data["says"], strict=True):
                assert each["said"] == f"{data['control']} {each['told']}: {says}"
            assert len({each["drawn"] for each in seen}) == len(seen), name
            assert "NaN" not in "".join(each["drawn"] for each in seen)
            picture = figure.locator("xpath=ancestor::*[contains(@class, 'cell_output')]//img")
            assert not picture.is_visible()
            page.emulate_media(media="print")
            assert picture.is_visible()
            assert not figure.is_visible()
            page.emulate_media(media="screen")
        page.close()


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_a_figure_walks_by_itself_unless_motion_is_to_be_reduced(
    browser: Any, address: str, book: Book, motion: str
) -> None:
    page = with_script(browser, address + with_figures(book)[0], reduced_motion=motion)
    figure = page.locator(".interactive-figure").first
    last = len(json.loads(figure.locator("script").text_content())["positions"]) - 1
    slider, button = figure.locator("input"), figure.get_by_role("button")
    slider.focus()
    page.keyboard.press("Home")
    button.click()
    if motion == "reduce":
        assert (slider.input_value(), button.inner_text()) == (str(last), "Play")
        return
    assert button.inner_text() == "Stop"
    page.wait_for_function("slider => slider.value >= 2", arg=slider.element_handle())
    button.click()
    stopped = slider.input_value()
    assert 2 <= int(stopped) < last
    page.wait_for_timeout(500)
    assert (slider.input_value(), button.inner_text()) == (stopped, "Play")


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_screenshots_for_the_eye(
    browser: Any, address: str, book: Book, size: dict[str, int], tmp_path: Path
) -> None:
    folder = Path(os.environ.get(SCREENSHOTS, tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    chapter = book.document(book.chapters[0].file)
    for name in ("index", chapter, "pages/api"):
        page = opened(browser, f"{address}{name}.html", size=size)
        file = folder / f"{name.replace('/', '-')}-{size['width']}.png"
        page.screenshot(path=file)
        assert file.stat().st_size > 10_000  # a page of one colour is smaller
        page.close()


def test_a_printed_chapter_has_its_text_and_no_side_bars(
    browser: Any, address: str, book: Book
) -> None:
    (chapter,) = [c.file for c in book.chapters if c.number == 1]
    page = opened(browser, f"{address}{book.document(chapter)}.html")
    page.emulate_media(media="print")
    title = page.locator("h1").filter(has_text="Level sets")
    assert any(each.is_visible() for each in title.all())
    for what in (".bd-sidebar-primary", ".prev-next-footer", ".run-it-yourself"):
        assert not page.locator(what).first.is_visible()
    assert len(page.pdf()) > 10_000
