"""Fixtures shared by all tests."""

from collections import Counter
from collections.abc import Iterator

import pytest

from gpurms.demo import corpus
from tests import engines
from tests.planted import planted_text


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Each reason for skipping once, and how many tests it skipped."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", ()))
    for reason, n_tests in reasons.most_common():
        terminalreporter.line(f"{n_tests} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(params=(*engines.CPU, *engines.DEVICE))
def engine(request: pytest.FixtureRequest) -> Iterator[engines.Engine]:
    """Run the test once per engine."""
    with engines.running(request.param) as engine:
        yield engine


@pytest.fixture(params=("numpy", *engines.DEVICE))
def library(request: pytest.FixtureRequest) -> Iterator[engines.Engine]:
    """Run the test once per array library, where it does not depend on the engine."""
    with engines.running(request.param) as engine:
        yield engine


@pytest.fixture(params=engines.DEVICE)
def device(request: pytest.FixtureRequest) -> Iterator[engines.Engine]:
    """A working CuPy: a real device, or an emulated one."""
    with engines.running(request.param) as engine:
        yield engine


@pytest.fixture(params=engines.CPU)
def cpu_engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per CPU engine."""
    with engines.running(request.param):
        yield request.param


@pytest.fixture
def numpy_engine() -> Iterator[None]:
    """The engine that compiles nothing, for tests of what does not depend on the engine."""
    with engines.running("numpy"):
        yield


@pytest.fixture(scope="module")
def planted() -> corpus.Corpus:
    """A small corpus of two topics."""
    return corpus.build([planted_text()], 1, "planted")


@pytest.fixture(scope="module")
def documentation() -> list[str]:
    """The demo's own texts."""
    return corpus.python_documentation()
