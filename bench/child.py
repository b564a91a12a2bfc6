"""Fresh Python processes, for what can be measured only once in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from bench.machine import ROOT


def run(code: str, **env: str) -> Any:
    """Run a program with this project on its path; returns the JSON that it prints as its last line.

    Raises:
        RuntimeError: the program failed; the message is what it wrote to stderr.
    """
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"a measuring process failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
