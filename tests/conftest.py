"""Fixtures shared by all tests."""

from collections.abc import Iterator

import pytest

from gpurms.demo import corpus
from gpurms.kernels import cpu
from tests.planted import planted_text

ENGINES = ("numpy", "numba")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per CPU engine."""
    with cpu.use_engine(request.param):
        yield request.param


@pytest.fixture
def numpy_engine() -> Iterator[None]:
    """The engine that compiles nothing, for tests of what does not depend on the engine."""
    with cpu.use_engine("numpy"):
        yield


@pytest.fixture(scope="module")
def planted() -> corpus.Corpus:
    """A small corpus of two topics."""
    return corpus.build([planted_text()], 1, "planted")


@pytest.fixture(scope="module")
def documentation() -> list[str]:
    """The demo's own texts."""
    return corpus.python_documentation()
