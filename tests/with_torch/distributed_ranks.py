"""What each rank runs: ``python -m tests.with_torch.distributed_ranks FOLDER SHARED MODULE...``.

The outcome of each case goes to a file in FOLDER.
"""

import importlib
import json
import os
import re
import sys
import traceback
import warnings
from pathlib import Path

PREFIX = "case_"


def names(module_name: str) -> list[str]:
    """The cases of a module, in the order of its text; torch warns of itself where a module imports its engines."""
    return re.findall(rf"^def {PREFIX}(\w+)\(", Path(__file__).with_name(f"{module_name}.py").read_text(), re.MULTILINE)


def main(folder: Path, shared: Path, module_names: list[str]) -> None:
    import torch
    from torch import distributed

    from tests.with_torch.distributed_support import Ranks

    modules = {name: importlib.import_module(f"{__package__}.{name}") for name in module_names}
    warnings.simplefilter("error")  # from here on: torch's own modules warn of each other
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = distributed.FileStore(str(folder / "store"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    outcomes: dict[str, str] = {}
    path = folder / f"{rank}.json"
    for module_name, name in [(each, name) for each in modules for name in names(each)]:
        key = f"{module_name}:{name}"
        outcomes[key] = "did not come back"
        _write(path, outcomes)
        try:
            torch.manual_seed(0)
            getattr(modules[module_name], PREFIX + name)(Ranks(rank, size, shared))
            outcomes[key] = ""
        except BaseException:
            outcomes[key] = traceback.format_exc()
        _write(path, outcomes)
        if outcomes[key]:
            os._exit(1)  # the other ranks may wait for this one: the launcher stops them
        distributed.barrier()  # or a rank that is ahead would be stopped in a case that did not fail
    distributed.destroy_process_group()


def _write(path: Path, outcomes: dict[str, str]) -> None:
    """All or nothing: this process may be stopped at any time."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(outcomes))
    fresh.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
