#!/usr/bin/env python3
"""Set up and run gpurms from a clone: ``python3 dev.py demo``, ``python3 dev.py test``, ``python3 dev.py --help``.

Needs Python 3.11 or newer and nothing else: it makes a virtual environment in ``.venv`` and installs into it what the
task needs (the extras of ``pyproject.toml``), once. Further arguments go to the task.
"""

import hashlib
import os
import signal
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
PYTEST = ["pytest", "--numprocesses", "auto"]
BY_FILE = [*PYTEST, "--dist", "loadfile"]  # some files start processes once, for all of their tests
TASKS = {  # name: (extra, commands of Python modules, what it does)
    "demo": ("demo", [["gpurms", "demo"]], "train word embeddings on Python's own documentation"),
    "info": ("cpu", [["gpurms", "info"]], "print versions and the engine that would run"),
    "test": ("test", [PYTEST], "run all tests that need no other framework, on all cores"),
    "test-torch": ("test-torch", [[*BY_FILE, "tests/with_torch", "gpurms/torch"]], "run the tests of gpurms.torch"),
    "test-peers": ("test-peers", [[*BY_FILE, "tests/with_peers"]], "compare with torch, TensorFlow, Keras and Optax"),
    "test-mpi": ("test-mpi", [["pytest", "tests/with_mpi"]], "run the tests of several processes, under mpiexec"),
    "lint": ("dev", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], "check style and types"),
    "bench": ("cpu", [["bench"]], "run benchmarks; peers that are not installed are skipped by name"),
}


def main(arguments: list[str]) -> int:
    """Run one task; returns its exit code."""
    if sys.version_info < (3, 11):
        print(f"dev.py: error: needs Python 3.11 or newer; this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\ntasks:")
        for name, (_, _, what) in TASKS.items():
            print(f"  {name:10} {what}")
        return 0
    task, *rest = arguments
    if task not in TASKS:
        print(f"dev.py: error: no task {task!r}; choose from {', '.join(TASKS)}", file=sys.stderr)
        return 2
    extra, commands, _ = TASKS[task]
    python = install(extra)
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the task, which may have a result to save
    for command in commands:
        folder = None if command[0] == "gpurms" else ROOT
        code = subprocess.call([python, "-m", *command, *rest], cwd=folder)
        if code:
            return code
    return 0


def install(extra: str) -> str:
    """The environment's Python, with the project and one extra installed as ``pyproject.toml`` now asks."""
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        print(f"making the virtual environment {ENVIRONMENT}", file=sys.stderr)
        try:
            venv.create(ENVIRONMENT, with_pip=True, clear=True)
        except subprocess.CalledProcessError:
            sys.exit("dev.py: error: no virtual environment could be made (Debian, Ubuntu: install python3-venv)")
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    stamp = ENVIRONMENT / f"installed-{extra}"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing gpurms[{extra}]", file=sys.stderr)
        options = ["--quiet", "--disable-pip-version-check", "--editable", f"{ROOT}[{extra}]"]
        if subprocess.call([python, "-m", "pip", "install", *options]):
            sys.exit("dev.py: error: the installation failed; pip's message is above")
        stamp.write_text(wanted)
    return str(python)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
