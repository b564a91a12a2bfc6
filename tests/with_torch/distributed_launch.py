"""Ranks in processes of their own, with a time limit: a hang is a failure."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.outcomes import Outcomes

ROOT = Path(__file__).resolve().parents[2]


def launch(modules: list[str], n_ranks: int, shared: Path, timeout: float = 240, **environment: str) -> Outcomes:
    """Run the cases of modules, one after the other. ``shared``: a folder for what they leave to other launches."""
    settings = {"WORLD_SIZE": str(n_ranks), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"} | environment
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.with_torch.distributed_ranks", folder, str(shared), *modules]
        outputs = [Path(folder, f"{rank}.txt") for rank in range(n_ranks)]
        processes = []
        for rank, path in enumerate(outputs):
            with path.open("w") as output:
                env = os.environ | settings | {"RANK": str(rank)}
                processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT))
        stopped = wait(processes, timeout)
        files = [Path(folder, f"{rank}.json") for rank in range(n_ranks)]
        found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        said = [f"output of rank {rank}:\n{path.read_text()}" for rank, path in enumerate(outputs)]
        return Outcomes(found, "\n".join([*said, stopped]))


def wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> str:
    """Until all are through or one has failed; what still runs then is stopped, and so said."""
    end = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                return "stopped after the failure of a rank"
            if time.monotonic() > end:
                return f"stopped after {timeout} s"
            time.sleep(0.02)
        return ""
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)  # with PYTHONFAULTHANDLER it says where it is
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            if process.poll() is None:
                process.kill()
            process.wait()
