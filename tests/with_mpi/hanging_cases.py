"""What must be reported: a rank that waits for one that never comes."""

import time
from typing import Any


def case_wait(comm: Any) -> None:
    if comm.rank == 0:
        comm.Barrier()
    time.sleep(600)
