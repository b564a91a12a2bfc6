"""``python -m bench gpu`` on the emulated device: ``python -m tests.bench_on_cpu gpu ...``.

The processes that it starts for questions run this module, too.
"""

import sys

from bench import __main__ as command
from bench.gpu import __main__ as question
from bench.gpu import process
from tests.device.cupy_on_cpu import cupy_on_cpu

PEERS = ("torch", "jax")


def main(argv: list[str]) -> int:
    for library in PEERS:
        sys.modules[library] = None
    process.COMMAND = [sys.executable, "-m", "tests.bench_on_cpu", "question"]
    with cupy_on_cpu():
        if argv[0] != "question":
            return command.main(argv)
        question.main(argv[1:])
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
