"""Hypothesis profiles, a torch that uses one thread and known seeds, and the theorem ledger."""

import functools
import importlib
import os
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

COMMON = {
    "deadline": None,
    "max_examples": 30,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow],
}
settings.register_profile("local", **COMMON)
settings.register_profile("ci", derandomize=True, **COMMON)
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


class Ledger:
    """``--ledger``: counts the examples of tests marked ``verifies`` and writes them down.

    The package is imported late: before pytest is configured, its annotations are not checked.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.examples: Counter[str] = Counter()
        self.sources: dict[str, str] = {}

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Take the digest of the file as it is now: it may be edited while the tests run."""
        from teleport.book import ledger

        if item.get_closest_marker("verifies") and str(item.path) not in self.sources:
            self.sources[str(item.path)] = ledger.file_digest(item.path)

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
        item.user_properties.append(("source", self.sources[str(item.path)]))
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up the parameters of one function; reports also come from other processes."""
        properties = dict(report.user_properties)
        if report.when == "call" and report.passed and "examples" in properties:
            test = report.nodeid.split("[")[0]
            self.examples[test] += properties["examples"]
            self.sources[test] = properties["source"]

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the ledger if all tests passed."""
        if hasattr(self.config, "workerinput"):
            return
        from teleport.book import ledger

        say = self.config.get_terminal_writer().line
        if exitstatus != pytest.ExitCode.OK:
            say("\nThe ledger is left as it was: not all tests passed.")
            return
        results = {test: (count, self.sources[test]) for test, count in self.examples.items()}
        rows = ledger.update(self.config.rootpath, results)
        say(f"\n{ledger.LEDGER_PATH}: {len(self.examples)} tests of {len(rows)} written.")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ledger", action="store_true", help="write chapters/ledger.json")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--ledger"):
        return
    if config.option.keyword or any("::" in argument for argument in config.args):
        raise pytest.UsageError("--ledger counts all parameters of a test: name whole files, no -k")
    settings.load_profile("ci")  # the same examples, and so the same ledger, every time
    config.pluginmanager.register(Ledger(config), "ledger")
