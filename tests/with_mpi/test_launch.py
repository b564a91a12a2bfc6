"""The launcher itself: hangs and failures are found."""

import pytest

from tests.with_mpi.launch import launch


def test_a_hang_is_a_failure():
    outcomes = launch("tests.with_mpi.hanging_cases", 2, timeout=4)
    with pytest.raises(
        AssertionError, match=r"rank 0: did not come back\nrank 1: did not come back\n[^$]*stopped after"
    ):
        outcomes.check("wait")


def test_a_rank_that_fails_stops_all():
    outcomes = launch("tests.with_mpi.failing_cases", 2)
    outcomes.check("before")
    with pytest.raises(AssertionError, match=r"KeyError: 'lost'\n\nrank 1: did not come back"):
        outcomes.check("fail")
    with pytest.raises(AssertionError, match="rank 0: not reached: a case before it failed"):
        outcomes.check("after")
