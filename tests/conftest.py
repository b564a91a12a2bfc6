"""Fixtures shared by all tests."""

from collections.abc import Iterator

import pytest

from gpurms.kernels import cpu

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
