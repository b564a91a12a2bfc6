"""Do the tests pass that need a GPU?"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator

from bench.answer import Answer, Goal
from bench.machine import ROOT
from gpurms.kernels import pool

SECONDS = 80
COMMAND = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors")
OPTIONS = ("-p", "no:cacheprovider", "--color=no")
TARGET = "tests"
ENVIRONMENT = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "240"}
"""No plugins of whatever else is installed; what is cut has written all it knew; lines long enough for reasons."""
PROCESSES = 6
COUNTS = ("passed", "failed", "error", "skipped", "xfailed", "xpassed", "deselected")
NO_TESTS = 5
"""What pytest exits with if it has selected none."""


def run(quick: bool) -> Iterator[Answer]:
    answer = Answer("tests", "the tests that need a GPU", f"pytest -m gpu {TARGET}, at most {SECONDS} s")
    yield answer
    try:
        done = subprocess.run(
            [*COMMAND, *OPTIONS, *_processes(), TARGET],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        answer.skipped["tests"] = f"cut after {SECONDS} s"
        status, output = None, (late.stdout or b"").decode(errors="replace")
    _read(answer, status, output)
    yield answer


def _progress(lines: list[str]) -> str:
    """What pytest's progress lines say."""
    marks = "".join(found[1] for line in lines if (found := re.match(r"([.FEsxX]+)( +\[ *\d+%\])?$", line)))
    names = {".": "passed", "F": "failed", "s": "skipped"}
    return ", ".join(f"{marks.count(mark)} {name}" for mark, name in names.items())


def _processes() -> list[str]:
    """Most of the time goes into compiling, on one core each."""
    several = importlib.util.find_spec("xdist") is not None and pool.n_threads() > 1
    return ["-p", "xdist", "-n", str(min(PROCESSES, pool.n_threads()))] if several else []


def _read(answer: Answer, status: int | None, output: str) -> None:
    lines = [line for line in output.splitlines() if line.strip()]
    summary = lines[-1].strip("= ") if lines else "nothing was written"
    answer.notes.append(f"exit status {status}: {summary}" if status is not None else f"until then: {_progress(lines)}")
    counts = {what: int(count) for count, what in re.findall(r"(\d+) ([a-z]+?)s?\b", summary) if what in COUNTS}
    if status == NO_TESTS:
        answer.skipped["tests"] = "none was selected"
    elif counts and status is not None:
        goals = {"passed": Goal(">", 0), "failed": Goal("<=", 0), "error": Goal("<=", 0)}
        for what in ("passed", "failed", "error", "skipped"):
            answer.add(what, "", [counts.get(what, 0)], goals.get(what))
    elif status is not None:
        answer.skipped["tests"] = f"pytest did not run: {summary}"
    answer.notes += [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))][:100]
