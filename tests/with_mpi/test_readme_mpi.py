"""The README's code for several processes runs, on one."""

import subprocess
import sys
from pathlib import Path

from tests.test_readme import code

BEFORE = """
import numpy as np
import gpurms

w = np.zeros((1000, 64), np.float32)
ids = np.array([3, 17, 3])
"""


def test_code_runs():
    (block,) = code("mpi4py")
    mpiexec = Path(sys.executable).parent / "mpiexec"
    program = BEFORE + block + "print(int(opt.iterations.numpy()), sorted(set(words.rows) & {3, 17}))"
    done = subprocess.run(
        [mpiexec, "-n", "2", sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert set(done.stdout.splitlines()) == {"1 []", "1 [3, 17]"}
