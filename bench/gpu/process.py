"""A question in a process of its own: it cannot outlast its time, nor can what it breaks reach the others."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench.answer import Answer
from bench.machine import ROOT

COMMAND = [sys.executable, "-m", "bench.gpu"]
REST = "the rest"
"""What an answer that is not complete says it has skipped."""


def ask(name: str, quick: bool, seconds: float) -> Answer:
    """The answer as far as it was known when the process ended, which is killed after ``seconds``."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "answer.json"), Path(folder, "log")
        problem = _run([*COMMAND, name, str(path), *(["--quick"] if quick else [])], log, seconds)
        if path.exists():
            answer = Answer.from_json(json.loads(path.read_text(encoding="utf-8")))
        else:
            answer = Answer(name, "no answer", "")
        if problem:
            answer.skipped[REST] = problem
        return answer


def save(answer: Answer, path: Path) -> None:
    """Write what is known so far: whoever reads the file finds this answer or the one before."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(asdict(answer)), encoding="utf-8")
    new.replace(path)


def _run(command: list[str], log: Path, seconds: float) -> str:
    """Run to the end or for ``seconds``; returns what went wrong."""
    if seconds <= 0:
        return "no time is left"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=output,
            stderr=output,
            process_group=0,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"cut after {seconds:.0f} s"
        finally:
            _end(process)
    if status == 0:
        return ""
    *_, last = ["nothing was written", *filter(str.strip, log.read_text(errors="replace").splitlines())]
    return f"the process ended with status {status}: {last.strip()}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and those it started."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
