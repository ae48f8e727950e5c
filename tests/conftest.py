"""What all tests share: the tiers, a torch that uses one thread, known seeds, the theorem ledger.

The plain command runs the quick tier, ``--slow`` adds the tests marked ``slow``, and ``--deep``
runs the tests of theorems alone, each with so many times its examples that all are 100,000.
"""

import contextlib
import functools
import importlib
import math
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.errors import InvalidArgument

COMMON = {
    "deadline": None,
    "max_examples": 30,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}
# By hand others every time, so that many short runs see more than a long one.
settings.register_profile("local", **{**COMMON, "max_examples": 20})
settings.register_profile("ledger", derandomize=True, **COMMON)
# The same examples every time: a second run finds nothing new, so half of them are drawn. Others
# come from those who run the tests by hand, and from `--deep`.
settings.register_profile("ci", derandomize=True, **{**COMMON, "max_examples": 15})
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")

# beartype draws which item of a list it checks: from a generator that no test looks at.
_shared, random.getrandbits = random.getrandbits, random.Random(0).getrandbits
importlib.import_module("beartype.door")
random.getrandbits = _shared

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # processes that tests start: same threads, same rounding


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    """Global random states are the same at the start of every test, and put back after it."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        yield
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The Chromium that is installed, driven by Playwright."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="part of the extra `test`")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        launched = playwright.chromium.launch(executable_path=chromium, args=options)
        yield launched
        launched.close()


class Examples:
    """Counts the examples of tests marked ``verifies``."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.examples: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Count how often the body of the test is passed: once, or once per Hypothesis example."""
        if item.get_closest_marker("verifies") is None:
            return (yield)
        given, passed = getattr(item.obj, "hypothesis", None), 0
        body = given.inner_test if given else None

        @functools.wraps(body or (lambda: None))
        def counted(*args: object, **options: object) -> object:
            nonlocal passed
            result = body(*args, **options)
            passed += 1  # not reached by examples that are refused or fail
            return result

        if given:
            given.inner_test = counted
        try:
            result = yield
        finally:
            if given:
                given.inner_test = body
        item.user_properties.append(("examples", passed if given else 1))
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up the parameters of one function; reports also come from other processes."""
        properties = dict(report.user_properties)
        if report.when == "call" and report.passed and "examples" in properties:
            self.passed(report.nodeid.split("[")[0], properties)

    def passed(self, test: str, properties: dict[str, object]) -> None:
        self.examples[test] += properties["examples"]

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if not hasattr(self.config, "workerinput"):
            self.finish(session, exitstatus)

    def finish(self, session: pytest.Session, exitstatus: int) -> None:
        """All tests were run."""

    def say(self, text: str) -> None:
        self.config.get_terminal_writer().line(f"\n{text}")


class Ledger(Examples):
    """``--ledger``: writes the counts down.

    The package is imported late: before pytest is configured, its annotations are not checked.
    """

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(config)
        self.digests: dict[Path, str] = {}
        self.sources: dict[str, str] = {}

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Take the digest of the file as it is now: it may be edited while the tests run."""
        from teleport.book import ledger

        if item.get_closest_marker("verifies"):
            source = self.digests.setdefault(item.path, ledger.file_digest(item.path))
            item.user_properties.append(("source", source))

    def passed(self, test: str, properties: dict[str, object]) -> None:
        super().passed(test, properties)
        self.sources[test] = properties["source"]

    def finish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the ledger if all tests passed."""
        from teleport.book import ledger

        if exitstatus != pytest.ExitCode.OK:
            self.say("The ledger is left as it was: not all tests passed.")
            return
        results = {test: (count, self.sources[test]) for test, count in self.examples.items()}
        rows = ledger.update(self.config.rootpath, results)
        self.say(f"{ledger.LEDGER_PATH}: {len(self.examples)} tests of {len(rows)} written.")


class Deep(Examples):
    """``--deep``: says how many examples were drawn, and fails if they are too few."""

    def finish(self, session: pytest.Session, exitstatus: int) -> None:
        """Tests that fail, or whose inputs are soon exhausted, take their examples along."""
        count = sum(self.examples.values())
        self.say(f"{count} examples of {len(self.examples)} tests of theorems, wanted {WANTED}.")
        whole = not self.config.option.keyword and not any(map(is_file, self.config.args))
        if whole and count < WANTED:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


WANTED = 100_000
"""Examples that a deep run draws, at least."""
MARGIN = 1.3
"""Not every test draws more when it may: some have a few inputs only."""


def deep_factor(root: Path) -> int:
    """By how much more a deep run draws than the ledger says was drawn."""
    from teleport.book import ledger

    drawn = sum(row.examples for row in ledger.read_ledger(root / ledger.LEDGER_PATH).values())
    return math.ceil(MARGIN * WANTED / drawn)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--deep", action="store_true", help=f"draw {WANTED} examples of the theorems")
    parser.addoption("--ledger", action="store_true", help="write chapters/ledger.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--ledger"):
        if config.option.keyword or any("::" in argument for argument in config.args):
            raise pytest.UsageError(
                "--ledger counts all parameters of a test: name whole files, no -k"
            )
        settings.load_profile("ledger")  # the same examples, and so the same ledger, every time
        config.pluginmanager.register(Ledger(config), "ledger")
    elif config.getoption("--deep"):
        examples = deep_factor(config.rootpath) * COMMON["max_examples"]
        settings.register_profile("deep", **{**COMMON, "max_examples": examples})
        settings.load_profile("deep")
        config.pluginmanager.register(Deep(config), "deep")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """As many as there are cores for this process, which in a container are not the machine's."""
    from teleport.runtime.cores import cores

    return cores()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("extra"):
        pytest.importorskip(mark.args[0], reason="of an extra that '.[test]' does not bring")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the tier; long files first, so that at the end no process waits for the other."""
    slow = {item for item in items if item.get_closest_marker("slow")}
    if config.getoption("--deep"):
        out = {item for item in items if not item.get_closest_marker("verifies")}
    elif every_tier(config):
        out = set()
    else:
        out = slow
    if out:
        config.hook.pytest_deselected(items=[item for item in items if item in out])
    halve_examples(item for item in items if not item.get_closest_marker("verifies"))
    long = {item.path for item in items if item in slow or item.path.suffix == ".ipynb"}
    kept = (item for item in items if item not in out)
    items[:] = sorted(kept, key=lambda item: item.path not in long)


def halve_examples(items: Iterable[pytest.Item]) -> None:
    """Theorems are tried on all examples of the profile; what says nothing else on half of them."""
    for test in {getattr(item, "function", None) for item in items}:
        if hasattr(test, "hypothesis"):
            with contextlib.suppress(InvalidArgument):  # it has settings of its own
                settings(max_examples=settings.default.max_examples // 2)(test)


def every_tier(config: pytest.Config) -> bool:
    """Whether slow tests run: if asked for, by their mark or where files are named."""
    asked = config.getoption("--slow") or config.getoption("--ledger")
    return asked or "slow" in config.option.markexpr or all(map(is_file, config.args))


def is_file(argument: str) -> bool:
    """Whether an argument names a file, or a test in one, and not a folder."""
    return Path(argument.split("::")[0]).is_file()
