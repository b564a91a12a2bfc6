"""What each rank runs: ``python -m tests.with_mpi.ranks FOLDER MODULE``. The outcome of each case goes to a file."""

import importlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType

PREFIX = "case_"


def names(module: ModuleType) -> list[str]:
    """The cases of a module, in the order of its text."""
    return [name.removeprefix(PREFIX) for name in vars(module) if name.startswith(PREFIX)]


def main(folder: Path, module_name: str) -> None:
    from mpi4py import MPI

    warnings.simplefilter("error")
    comm = MPI.COMM_WORLD
    module = importlib.import_module(module_name)
    outcomes: dict[str, str] = {}
    path = folder / f"{comm.rank}.json"
    for name in names(module):
        outcomes[name] = "did not come back"
        _write(path, outcomes)
        try:
            getattr(module, PREFIX + name)(comm)
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
        _write(path, outcomes)
        if outcomes[name]:
            comm.Abort(1)  # the other ranks may wait for this one
            os._exit(1)  # which Abort may leave to the launcher, while this one goes on
        comm.Barrier()  # or a rank that is ahead would be stopped in a case that did not fail


def _write(path: Path, outcomes: dict[str, str]) -> None:
    """All or nothing: this process may be stopped at any time."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(outcomes))
    fresh.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
