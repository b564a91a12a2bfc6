"""Questions in processes of their own, and what is written when they or the whole run end early."""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import chart, gpu, machine
from bench.answer import Answer, Goal
from bench.gpu import __main__ as question
from bench.gpu import process
from bench.gpu import tests as gpu_tests
from gpurms import backend

SAVED = """
import sys, json, subprocess, time
from pathlib import Path
from bench.answer import Answer
from bench.gpu.process import save
answer = Answer("name", "title", "setting")
answer.add("figure", "x", [2.0])
save(answer, Path(sys.argv[2]))
"""


def answer_of(code: str, monkeypatch: pytest.MonkeyPatch, seconds: float = 60) -> Answer:
    monkeypatch.setattr(process, "COMMAND", [sys.executable, "-c", code])
    return process.ask("name", True, seconds)


# --- one question -------------------------------------------------------------------------------------------


def test_complete_answer(monkeypatch: pytest.MonkeyPatch):
    answer = answer_of(SAVED, monkeypatch)
    assert (answer.title, answer.figures[0].median, answer.skipped) == ("title", 2.0, {})


def test_too_long_an_answer_is_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    child = tmp_path / "child"
    sleep = f"p = subprocess.Popen(['sleep', '60']); Path({str(child)!r}).write_text(str(p.pid)); time.sleep(60)"
    start = time.monotonic()
    answer = answer_of(SAVED + sleep, monkeypatch, 5)
    assert time.monotonic() - start < 30
    assert (answer.figures[0].median, answer.skipped) == (2.0, {"the rest": "cut after 5 s"})
    assert ended(int(child.read_text()))


def ended(pid: int) -> bool:
    """Whether a process that was killed is gone, or dead and only not yet collected by whoever adopted it."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise ValueError('wrong')", "the process ended with status 1: ValueError: wrong"),
        ("import os; os.kill(os.getpid(), 9)", "the process ended with status -9: nothing was written"),
    ],
)
def test_process_that_dies(code: str, problem: str, monkeypatch: pytest.MonkeyPatch):
    assert answer_of(code, monkeypatch) == Answer("name", "no answer", "", skipped={"the rest": problem})
    assert answer_of(SAVED + code, monkeypatch).figures[0].median == 2.0
    assert answer_of(SAVED + code, monkeypatch).skipped == {"the rest": problem}


def test_no_time_is_left(monkeypatch: pytest.MonkeyPatch):
    assert answer_of(SAVED, monkeypatch, 0).skipped == {"the rest": "no time is left"}


def test_question_that_fails_keeps_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def run(quick: bool) -> Iterator[Answer]:
        answer = Answer("name", "title", "setting")
        yield answer
        answer.add("figure", "x", [2.0])
        raise MemoryError("all of it")

    monkeypatch.setattr(gpu_tests, "run", run)
    question.main(["tests", str(tmp_path / "answer"), "--quick"])
    saved = Answer.from_json(json.loads((tmp_path / "answer").read_text()))
    assert (saved.figures[0].median, saved.skipped) == (2.0, {"the rest": "MemoryError: all of it"})


def test_answer_survives_json():
    answer = Answer("name", "title", "setting", skipped={"a": "b"}, notes=["note"])
    answer.measured("s", [1.0, 2.0], "ours", size="1K")
    answer.measured("s", [3.0, 8.0], "theirs", size="1K")
    answer.compare("theirs", "ours", Goal(">=", 2), size="1K")
    answer.compare("others", "ours", Goal(">=", 2), size="1K")
    ratio, missing = answer.figures
    assert (ratio.what, ratio.median, ratio.best, ratio.met) == ("1K: theirs / ours", 5.5 / 1.5, 3.0, True)
    assert (ratio.low, ratio.high) == (4.25 / 1.75, 6.75 / 1.25)
    assert (missing.what, missing.skipped) == ("1K: others / ours", "others, 1K")
    assert Answer.from_json(json.loads(json.dumps(asdict(answer)))) == answer


# --- the tests that need a GPU ------------------------------------------------------------------------------

TESTS = {
    "test_a.py": """
import pytest
pytestmark = pytest.mark.gpu
def test_passes(): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("nothing to do")
""",
    "test_b.py": "import a_library_that_is_missing",
    "test_c.py": "def test_of_something_else(): assert False",
}


def outcome(folder: Path, files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Answer:
    for name, text in {"pytest.ini": "[pytest]\nmarkers = gpu\naddopts = -ra\n", **files}.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(gpu_tests, "TARGET", str(folder))
    *_, answer = gpu_tests.run(quick=True)
    return answer


@pytest.mark.parametrize("processes", [[], ["-p", "xdist", "-n", "2"]], ids=["one process", "several"])
def test_outcome_of_tests(processes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_tests, "_processes", lambda: processes)
    answer = outcome(tmp_path, TESTS, monkeypatch)
    found = {figure.what: (figure.median, figure.met) for figure in answer.figures}
    assert found == {"passed": (1, True), "failed": (1, False), "error": (1, False), "skipped": (1, None)}
    assert answer.notes[0].startswith("exit status 1: 1 failed, 1 passed, 1 skipped, ")
    reasons = "\n".join(answer.notes[1:])
    assert "test_a.py::test_fails - assert 1 == 2" in reasons
    assert "nothing to do" in reasons
    assert "test_b.py" in reasons
    assert answer.skipped == {}


def test_no_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answer = outcome(tmp_path, {"test_c.py": TESTS["test_c.py"]}, monkeypatch)
    assert answer.skipped == {"tests": "none was selected"}
    assert answer.notes[0].startswith("exit status 5: ")


def test_tests_that_take_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_tests, "SECONDS", 4)
    slow = "import pytest, time\npytestmark = pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): time.sleep(60)"
    answer = outcome(tmp_path, {"test_d.py": slow}, monkeypatch)
    assert answer.skipped == {"tests": "cut after 4 s"}
    assert answer.notes == ["until then: 1 passed, 0 failed, 0 skipped"]


def test_no_pytest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_tests, "COMMAND", (sys.executable, "-m", "no_such_module"))
    answer = outcome(tmp_path, {}, monkeypatch)
    assert answer.figures == []
    assert "No module named no_such_module" in answer.skipped["tests"]


# --- the whole run ------------------------------------------------------------------------------------------


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    monkeypatch.setattr(backend, "report", lambda: [("cuda", False, "no driver answers"), ("numpy", True, "")])
    assert command.main(["gpu", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr() == ("", "python -m bench gpu: needs an NVIDIA GPU: no driver answers\n")
    assert list(tmp_path.iterdir()) == []


GPU = {
    "name": "Some GPU",
    "compute_capability": "9.0",
    "memory_GiB": 1.0,
    "driver": "1.2",
    "cuda_runtime": "13.0",
    "nvrtc": "13.0",
    "copy_GB_per_s": None,
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """A GPU that answers at once: the names and time limits of the questions that it is asked."""
    log: list[tuple[str, float]] = []

    def ask(name: str, quick: bool, seconds: float) -> Answer:
        if name == "dense":
            raise KeyboardInterrupt
        log.append((name, seconds))
        answer = Answer(name, "title", "setting")
        answer.measured("GB/s", [100.0, 300.0, 200.0], "copy", time="wall", size="1K")
        answer.add("figure", "x", [2.0], Goal(">=", 3))
        return answer

    monkeypatch.setattr(gpu, "problem", lambda: "")
    monkeypatch.setattr(machine, "describe_gpu", lambda: {**GPU})
    monkeypatch.setattr(process, "ask", ask)
    return log


def written(folder: Path) -> tuple[dict[str, Any], str]:
    (data,), (page,) = folder.glob("*.json"), folder.glob("*.md")
    return json.loads(data.read_text()), page.read_text()


def test_a_run_that_is_interrupted_leaves_its_rows(asked: list[tuple[str, float]], tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        command.main(["gpu", "--out", str(tmp_path)])
    record, page = written(tmp_path)
    assert [question["name"] for question in record["questions"]] == ["bandwidth", "tests", "bits"]
    assert [name for name, _ in asked] == ["bandwidth", "tests", "bits"]
    assert record["machine"]["gpu"]["copy_GB_per_s"] == 200.0
    assert page.splitlines()[2].startswith(
        "Some GPU (compute capability 9.0, 1.0 GiB, copies 200 GB/s), driver 1.2, CUDA"
    )


def test_the_table_comes_last(
    asked: list[tuple[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gpu, "QUESTIONS", {"bandwidth": 20, "sizes": 30})
    monkeypatch.setattr(gpu, "TOTAL", 40)
    assert command.main(["gpu", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    end = lines.index("missed: bandwidth: figure: 2x (goal >= 3x)")
    assert lines[end + 1 : end + 6] == [
        "missed: sizes: figure: 2x (goal >= 3x)",
        "  question   met  missed  not judged  skipped",
        "  bandwidth    0       1           0",
        "  sizes        0       1           0",
        "goals: 0 met, 2 missed, 0 not judged",
    ]
    assert {line.removeprefix("written: ") for line in lines[end + 6 :]} == {str(path) for path in tmp_path.iterdir()}
    assert [(name, round(seconds)) for name, seconds in asked] == [("bandwidth", 20), ("sizes", 30)]


def test_no_question_gets_more_than_what_is_left(asked: list[tuple[str, float]]):
    described = {"gpu": {**GPU}, "seconds": {"tests": gpu.TOTAL - 7.5}}
    gpu.ask("sizes", True, described)
    assert asked == [("sizes", 7.5)]
    assert described["seconds"].keys() == {"tests", "sizes"}


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    answer = Answer("sizes", "title", "setting")
    answer.measured("s", [1.0], "gpurms", size="1K", time="wall")
    drawn = chart.draw(tmp_path / "gpu", [answer])
    assert drawn is not None
    assert drawn.markdown.startswith("\nchart: skipped: ModuleNotFoundError: import of matplotlib.figure halted")
    assert drawn.paths == []
    assert chart.draw(tmp_path / "gpu", [Answer("bits", "title", "setting")]) is None
    assert list(tmp_path.iterdir()) == []
