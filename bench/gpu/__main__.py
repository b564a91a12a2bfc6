"""One question, in the process that ``process.ask`` starts for it: ``python -m bench.gpu NAME ANSWER [--quick]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from bench.gpu.process import REST, save


def main(argv: Sequence[str]) -> None:
    """Save the answer whenever the question yields it, and as it stands when the question fails."""
    name, path, *options = argv
    answer = None
    try:
        for answer in import_module(f"bench.gpu.{name}").run("--quick" in options):
            save(answer, Path(path))
    except Exception as error:
        if answer is None:
            raise
        answer.skipped[REST] = f"{type(error).__name__}: {error}"
        save(answer, Path(path))


if __name__ == "__main__":
    main(sys.argv[1:])
