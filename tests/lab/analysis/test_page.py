"""The page about runs: all of its numbers, nothing of others, whole at every moment."""

import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from teleport import cli
from teleport.errors import RunError
from teleport.lab.analysis.outcomes import folder_outcomes, matrix_rows
from teleport.lab.analysis.page import PANELS, watch_page, write_page
from teleport.lab.records.checkpoint import is_locked, locked
from teleport.lab.records.folders import is_going_on
from tests.support.records import LAYER, write_record
from tests.support.waiting import HANG

PACKED = Path(__file__).parents[3] / "chapters" / "results" / "matrix" / "mnist-mlp" / "sgd"
END = {"status": "finished", "step": 8}
VOID = {"meta", "link", "br", "input", "rect", "path", "line"}


class Tags(HTMLParser):
    """What is open at the end of a page, and what would be fetched."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        wanted = dict(attrs)
        if tag != "a":
            self.fetched += [v for k in ("src", "href") if (v := wanted.get(k)) and v != "data:,"]
        if tag not in VOID or (
            tag in ("path", "rect", "line") and self.get_starttag_text()[-2] != "/"
        ):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def two_arms(folder: Path, name: str = "lr 0.1", seeds: int = 2, end: Any = END) -> None:
    for seed in range(seeds):
        losses = {0: 2.0, 4: 1.0 + seed / 8, 8: 0.5}
        write_record(folder, name, losses, seed=seed, end=end)
        better = {0: 2.0, 4: 0.75, 8: 0.25 + seed / 8}
        kept = {"seed": seed, "baseline": name, "layers": [LAYER], "end": end, "order": 1}
        write_record(folder, f"{name} + teleport", better, **kept)


def test_a_page_of_a_packed_study_has_every_number_of_the_report() -> None:
    page = watch_page(PACKED)
    tags = Tags(page)
    assert tags.open == []
    assert tags.fetched == []
    (block,) = folder_outcomes(PACKED)
    for row in matrix_rows(block):
        for text in row:
            assert f">{text}</t" in page
    assert page.count("<figure>") == len(PANELS)
    assert page.count('class="mean plain" d="M0.0 ') == page.count('class="mean" d="M0.0 ') == 3 * 7
    assert "teleport after step 50, seed 0: gradient norm" in page
    assert "refresh" not in page


def test_a_page_names_values_teleports_and_layers(tmp_path: Path) -> None:
    two_arms(tmp_path)
    page = watch_page(tmp_path)
    assert "<b>0.5</b>" in page  # of the baseline, at the end
    assert "<b>0.3125</b>" in page  # mean of 0.25 and 0.375
    assert '"steps":[0,4,8]' in page
    assert '["2","0.75","0.3125"]' in page
    assert "teleport after step 1, seed 0: gradient norm 0.5 → 0.75" in page
    assert "lr 0.1 + teleport: layers of the teleport after step 1" in page
    assert "<td>body.2</td>" in page
    assert "Runs: 4 finished." in page


def test_the_mean_ends_where_the_first_seed_does_and_the_seeds_go_on(tmp_path: Path) -> None:
    write_record(tmp_path, "lr 0.1", {0: 2.0, 4: 1.0, 8: 0.5}, end=END)
    write_record(tmp_path, "lr 0.1", {0: 3.0}, seed=1)
    page = watch_page(tmp_path)
    assert '["2.5","-","-"]' in page
    (seed, *_) = re.findall(r'class="seed" d="([^"]+)"', page)
    assert seed.count("L") == 2
    assert "Runs: 1 finished, 1 unfinished." in page


@pytest.mark.parametrize(
    "losses",
    [{}, {0: 2.0}, {0: None}, {0: 0.0, 4: 0.0}, {0: 2.0, 4: None}, {0: 2.0, 4: 1e300}],
    ids=str,
)  # fmt: skip
def test_a_run_that_has_hardly_begun_or_diverged_is_shown(
    tmp_path: Path, losses: dict[int, float | None]
) -> None:
    end = {"status": "diverged", "reason": "loss <4> is too large"}
    write_record(tmp_path, "lr 0.1", losses, end=end)
    page = watch_page(tmp_path)
    assert Tags(page).open == []
    assert "lr 0.1, seed 0: loss &lt;4&gt; is too large" in page
    assert not re.search(r'(d|x|y|width|height)="[^"]*(nan|inf)', page)


def test_what_diverged_is_outside_of_the_linear_axis(tmp_path: Path) -> None:
    two_arms(tmp_path)
    write_record(tmp_path, "lr 9", {0: 2.0, 4: 1e9}, end={"status": "diverged"}, order=2)
    linear = re.findall(r'<svg class="lin".*?training step<', watch_page(tmp_path), re.DOTALL)[0]
    ticks = [float(tick) for tick in re.findall(r'text-anchor="end">([^<]+)<', linear)]
    assert max(ticks) == 2.0


def test_names_from_records_are_escaped(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script>\"'<i>"
    two_arms(tmp_path / "<b>", hostile)
    page = watch_page(tmp_path / "<b>")
    tags = Tags(page)
    assert tags.seen.count("script") == 2  # the data and ours
    assert not {"i", "b"} & set(tags.seen) - {"b"}
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in page


def test_several_folders_have_a_list_of_contents(tmp_path: Path) -> None:
    two_arms(tmp_path / "a")
    two_arms(tmp_path / "b", "lr 0.2")
    page = watch_page(tmp_path)
    assert page.count("<section") == page.count('<li><a href="#f') == 2
    assert page.count('name="axis0"') == page.count('name="axis1"') == 2


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no records of `teleport run`"):
        watch_page(tmp_path)


def test_the_command_writes_into_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_arms(tmp_path)
    assert cli.main(["watch", str(tmp_path)]) == 0
    page = tmp_path / "watch.html"
    assert str(page) in capsys.readouterr().out
    assert page.read_text("utf-8") == watch_page(tmp_path)
    assert cli.main(["watch", str(tmp_path / "nothing")]) == 1
    assert "no records" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    write_page(page, "old")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"page\.html: No space.*--out"):
        write_page(page, "new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_a_lock_is_seen_and_left_over_ones_are_not_held(tmp_path: Path) -> None:
    lock, below = tmp_path / ".lock", tmp_path / "sweep" / "sgd"
    below.mkdir(parents=True)
    assert not is_locked(lock)
    with locked(lock, "it"):
        assert is_locked(lock)
        os.utime(lock, (1, 1))
        assert is_locked(lock)
        assert is_going_on(tmp_path)
        assert is_going_on(below)
    assert not is_going_on(below)
    lock.touch()
    assert is_locked(lock)  # its maker may be about to take it
    os.utime(lock, (1, 1))
    assert not is_locked(lock)


def test_following_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sweep" / "run"  # deep, for pytest has a lock of its own
    folder.mkdir(parents=True)
    pages: list[str] = []
    held = locked(folder / ".lock", "it")
    held.__enter__()

    def sleep(seconds: float) -> None:
        assert seconds == 2.5
        page = folder / "watch.html"
        pages.append(page.read_text("utf-8") if page.exists() else "")
        if len(pages) == 1:
            write_record(folder, "lr 0.1", {0: 2.0})
        elif len(pages) == 2:
            write_record(folder, "lr 0.1", {0: 2.0, 4: 1.0}, end=END)
            held.__exit__(None, None, None)
        assert len(pages) < 3

    monkeypatch.setattr(time, "sleep", sleep)
    assert cli.main(["watch", str(folder), "--follow", "--every", "2.5"]) == 0
    nothing, going_on = pages
    assert nothing == ""
    assert 'http-equiv="refresh" content="2.5"' in going_on
    assert "1 unfinished" in going_on
    last = (folder / "watch.html").read_text("utf-8")
    assert "refresh" not in last
    assert "1 finished" in last


def test_following_ends_at_ctrl_c_with_a_page_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_arms(tmp_path)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with locked(tmp_path / ".lock", "it"):
        assert cli.main(["watch", str(tmp_path), "--follow"]) == 0
    assert "refresh" not in (tmp_path / "watch.html").read_text("utf-8")


RULES = ["button-name", "color-contrast", "html-has-lang", "label", "link-name", "tabindex"]
RULES += ["scrollable-region-focusable", "svg-img-alt"]


@pytest.mark.slow
class TestInABrowser:
    """The page of a real study in Chromium."""

    @pytest.fixture(scope="class")
    def address(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        path = tmp_path_factory.mktemp("page") / "watch.html"
        write_page(path, watch_page(PACKED))
        return path.as_uri()

    @staticmethod
    def opened(browser: Any, address: str, **options: Any) -> Any:
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        page.set_default_timeout(1000 * HANG)
        page.goto(address)
        return page

    def test_nothing_else_is_asked_for_and_the_console_is_empty(
        self, browser: Any, address: str
    ) -> None:
        page, said = browser.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        page.goto(address)
        assert [each for each in said if each != "data:,"] == [address]

    def test_the_keyboard_switches_arms_and_axes(self, browser: Any, address: str) -> None:
        page = self.opened(browser, address)
        curve = page.locator("figure svg.log g.a1").first
        assert curve.is_visible()
        page.get_by_label("lr 0.05 + teleport", exact=True).focus()
        page.keyboard.press("Space")
        assert not curve.is_visible()
        page.get_by_role("radio", name="logarithmic").focus()
        page.keyboard.press("ArrowRight")
        assert not page.locator("figure svg.log").first.is_visible()
        assert page.locator("figure svg.lin").first.is_visible()
        page.reload()
        assert not curve.is_visible()
        assert page.locator("figure svg.lin").first.is_visible()

    def test_keyboard_and_pointer_show_the_values_of_a_step(
        self, browser: Any, address: str
    ) -> None:
        page = self.opened(browser, address)
        value = page.locator("figure .values b").first
        last = value.inner_text()
        page.get_by_label("Values at step").focus()
        page.keyboard.press("Home")
        first = value.inner_text()
        assert 2.2 < float(first) < 2.4
        assert float(last) < 0.1
        assert page.locator(".at output").inner_text() == "0"
        chart = page.locator("figure svg.log").first.bounding_box()
        page.mouse.move(chart["x"] + 0.5 * chart["width"], chart["y"] + 50)
        assert 3000 < int(page.locator(".at output").inner_text()) < 4500
        assert float(last) < float(value.inner_text()) < float(first)

    def test_without_scripts_all_is_there(self, browser: Any, address: str) -> None:
        page = self.opened(browser, address, java_script_enabled=False)
        assert page.locator("figure svg.log g.a1").first.is_visible()
        page.get_by_label("lr 0.05 + teleport", exact=True).uncheck()
        assert not page.locator("figure svg.log g.a1").first.is_visible()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("width", [1280, 390])
    def test_everyone_can_use_it(
        self, browser: Any, address: str, scheme: str, width: int, tmp_path: Path
    ) -> None:
        axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
        size = {"width": width, "height": 900}
        page = self.opened(browser, address, viewport=size, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") == 0
        found = axe.run(page, options={"runOnly": RULES, "resultTypes": ["violations"]})
        assert [(v["id"], v["nodes"][0]["html"]) for v in found.response["violations"]] == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground))) < 64) == (scheme == "dark")
        folder = Path(os.environ.get("TELEPORT_SCREENSHOTS", tmp_path))
        page.screenshot(path=folder / f"watch-{scheme}-{width}.png", full_page=True)
        page.emulate_media(media="print")
        assert not page.locator("fieldset").first.is_visible()
        assert page.locator("figure").first.is_visible()

    def test_a_page_that_follows_reloads_itself_unless_it_is_paused(
        self, browser: Any, tmp_path: Path
    ) -> None:
        two_arms(tmp_path)
        path = tmp_path / "watch.html"
        write_page(path, watch_page(tmp_path, 0.2))
        page = self.opened(browser, path.as_uri())
        with page.expect_navigation():
            pass
        page.get_by_label("pause").check()
        write_page(path, "<title>new</title>")
        page.wait_for_timeout(600)
        assert page.title() != "new"
        page.get_by_label("pause").uncheck()
        page.wait_for_function("document.title === 'new'")
