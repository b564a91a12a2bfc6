"""Programs under `mpiexec`, each with a time limit: a hang is a failure."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.outcomes import Outcomes

ROOT = Path(__file__).resolve().parents[2]
MPIEXEC = Path(sys.executable).parent / "mpiexec"


def launch(module: str, n_ranks: int, timeout: float = 120, **environment: str) -> Outcomes:
    """Run the cases of a module on ranks of their own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [MPIEXEC, "-n", str(n_ranks), sys.executable, "-m", "tests.with_mpi.ranks", folder, module]
        threads = {"GPURMS_ENGINE": "numpy", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | threads | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\nstopped after {timeout} s"
        files = [Path(folder, f"{rank}.json") for rank in range(n_ranks)]
        return Outcomes([json.loads(file.read_text()) if file.exists() else {} for file in files], output)
