"""What must be reported: a rank that fails while the others wait for it."""

from typing import Any


def case_before(comm: Any) -> None:
    """Nothing."""


def case_fail(comm: Any) -> None:
    if comm.rank == 0:
        raise KeyError("lost")
    comm.Barrier()


def case_after(comm: Any) -> None:
    """Nothing."""
