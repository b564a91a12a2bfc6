"""The command ``gpurms info``, as a user meets it."""

import re
import subprocess
import sys

import numpy as np
import pytest

import gpurms
from gpurms import info
from gpurms.__main__ import main
from tests.engines import emulated
from tests.support import python


def test_info_prints_aligned_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    for name in ("gpurms", "Python", "platform", "cores", "NumPy", "autograd", "Numba", "ml_dtypes", "CuPy", "torch"):
        assert name in rows
    for name in ("GPURMS_BACKEND", "GPURMS_ENGINE", "array_module()", "engine", "cuda", "numba", "numpy"):
        assert name in rows
    column = max(len(name) for name in rows) + 4
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in rows.values())
    assert rows["gpurms"].split()[1] == gpurms.__version__
    assert rows["NumPy"].split()[1] == np.__version__
    assert rows["array_module()"].split()[1] == gpurms.array_module().__name__


REPORT = [("cuda", True, "one GPU"), ("numba", True, "2 threads"), ("numpy", True, "2 threads")]


@pytest.mark.parametrize(
    ("asked", "report", "expected"),
    [
        (
            "auto",
            REPORT,
            ["cuda", "runs, with one GPU", "not chosen: cuda comes first", "not chosen: cuda comes first"],
        ),
        (
            "numpy",
            REPORT,
            ["numba", "not chosen: GPURMS_BACKEND=numpy", "runs, with 2 threads", "not chosen: numba comes first"],
        ),
        (
            "cupy",
            REPORT,
            ["cuda", "runs, with one GPU", "not chosen: GPURMS_BACKEND=cupy", "not chosen: GPURMS_BACKEND=cupy"],
        ),
        (
            "auto",
            [("cuda", False, "no driver"), ("numba", False, "too old"), REPORT[2]],
            ["numpy", "not chosen: no driver", "not chosen: too old", "runs, with 2 threads"],
        ),
    ],
)
def test_info_says_which_engine_runs_and_why_not_the_others(
    asked: str, report: list[tuple[str, bool, str]], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPURMS_BACKEND", asked)
    monkeypatch.setattr(info.backend, "report", lambda: report)
    rows = dict(info._choices())
    assert [rows[name] for name in ("engine", "cuda", "numba", "numpy")] == expected
    assert rows["GPURMS_BACKEND"] == asked
    assert info.engine().name == expected[0]


def test_info_without_the_gpu_that_was_asked_for() -> None:
    code = (
        "import sys; sys.modules['cupy'] = None\n"
        "from gpurms.__main__ import main; status = main(['info'])\n"
        "print(sorted({'matplotlib', 'sklearn', 'tqdm', 'torch'} & set(sys.modules)))\n"
        "sys.exit(status)"
    )
    done = python("-c", code, GPURMS_BACKEND="cupy", GPURMS_ENGINE="")
    assert done.returncode == 0
    assert done.stderr == ""
    assert re.search(r"array_module\(\) +raises RuntimeError: GPURMS_BACKEND=cupy, but no GPU", done.stdout)
    assert re.search(r"^  engine +none$", done.stdout, re.MULTILINE)
    assert re.search(r"^  cuda +not chosen: .*CuPy", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == "[]"


def test_info_names_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    with emulated(2):
        assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^  array_module\(\) +cupy$", out, re.MULTILINE)
    assert re.search(r"^  engine +cuda$", out, re.MULTILINE)
    assert re.search(r"^  cuda +runs, with 2 x emulated \(compute capability 9\.0, 16 GiB\)$", out, re.MULTILINE)


def test_info_for_a_reader_that_has_left() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gpurms", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) == 1
    process.stderr.close()


def test_the_library_does_not_import_its_commands() -> None:
    done = python("-c", "import sys, gpurms; print({'gpurms.demo', 'gpurms.info'} & set(sys.modules))")
    assert done.stdout == "set()\n"
