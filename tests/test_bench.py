"""The benchmarks run and say what they should, on tiny sizes and without any of the peers; no test looks at times."""

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import child, cpu, machine, measure, peers, report
from bench.answer import Answer, Goal
from bench.cpu import compiling, dense
from bench.measure import Missing, Race, always

PEERS = ("torch", "tensorflow", "tf_keras")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PAUSE", 0.0)


def hide(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    for name in libraries:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("bench.peers.")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, *PEERS)


def ask(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What a run writes: the JSON and the Markdown."""
    assert command.main(["cpu", "--quick", "--out", str(folder), *arguments]) == 0
    (data,), (page,) = folder.glob("*.json"), folder.glob("*.md")
    return json.loads(data.read_text()), page.read_text()


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_peers")
def test_every_question_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record, page = ask(tmp_path)
    printed = capsys.readouterr().out

    assert record.keys() == {"schema", "suite", "quick", "machine", "questions"}
    assert (record["schema"], record["suite"], record["quick"]) == (1, "cpu", True)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["machine"]["date"])
    assert record["machine"].keys() == machine.describe().keys()
    assert record["machine"]["packages"].keys() >= {"numpy", "autograd"}
    assert [question["name"] for question in record["questions"]] == list(cpu.QUESTIONS)
    for question in record["questions"]:
        check(question)
        assert f"## {question['name']}: {question['title']}" in page
        assert f"{question['name']}: {question['title']}" in printed
        for figure in question["figures"]:
            assert f"| {figure['what']} |" in page
            assert figure["what"] in printed
    assert {path.stem for path in tmp_path.iterdir()} == {f"cpu-{record['machine']['date'][:10]}"}


def check(question: dict[str, Any]) -> None:
    """The form that bench/README.md describes."""
    assert question.keys() == {"name", "title", "setting", "figures", "series", "skipped", "notes"}
    assert question["figures"]
    assert question["series"]
    for series in question["series"]:
        assert series.keys() == {"name", "unit", "values", "of"}
        assert series["values"]
        assert all(value > 0 for value in series["values"])
    for figure in question["figures"]:
        assert figure.keys() == {"what", "unit", "median", "low", "high", "best", "goal", "met", "skipped"}
        assert figure["met"] is None  # tiny sizes prove nothing
        assert (figure["median"] is None) == bool(figure["skipped"])
        if figure["low"] is not None:
            assert figure["low"] <= figure["median"] <= figure["high"]


@pytest.mark.usefixtures("no_peers")
def test_missing_peers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    record, page = ask(tmp_path, "--only", "dense", "--only", "sparse")
    printed = capsys.readouterr().out
    assert [question["name"] for question in record["questions"]] == ["dense", "sparse"]
    skipped = {name: why for question in record["questions"] for name, why in question["skipped"].items()}
    assert skipped.keys() == {
        "TF ResourceApplyRMSProp",
        "torch foreach",
        "tf_keras legacy",
        "tf_keras legacy in tf.function",
        "torch SparseAdam",
    }
    for name, why in skipped.items():
        library = "torch" if name.startswith("torch") else "tensorflow"
        assert f"import of {library} halted" in why
        assert f"skipped: {name}: {why}" in page
        assert f"skipped: {name}" in printed


def test_without_numba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hide(monkeypatch, "numba", *PEERS)
    record, _ = ask(tmp_path, "--only", "dense", "--only", "compiling")
    dense_answer, compiling_answer = record["questions"]
    assert [series["name"] for series in dense_answer["series"]] == ["gpurms NumPy", "naive NumPy"]
    assert "Numba is not installed" in dense_answer["skipped"]["gpurms Numba"]
    assert dense_answer["figures"][0]["skipped"] == "gpurms Numba, floor"
    assert compiling_answer["figures"] == []
    assert "Numba is not installed" in compiling_answer["skipped"]["gpurms Numba"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpus"], "invalid choice: 'gpus'"),
        (["cpu", "--only", "sparse", "--only", "speed"], "--only must be one of dense, rules, dtypes, small, sparse"),
        ([], "the following arguments are required: suite"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def stub(quick: bool) -> Answer:
    answer = Answer("dense", "title", "setting")
    answer.add("figure", "x", [2.0], Goal("<=", 3))
    return answer


@pytest.mark.parametrize(
    ("arguments", "written", "met"),
    [([], True, True), (["--only", "dense"], False, True), (["--quick"], False, None)],
)
def test_only_complete_runs_become_results(
    arguments: list[str], written: bool, met: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(cpu, "QUESTIONS", ("dense",))
    monkeypatch.setattr(dense, "run", stub)
    answers: list[Answer] = []
    monkeypatch.setattr(report, "verdict", lambda given: answers.extend(given) or "")
    assert command.main(["cpu", *arguments]) == 0
    assert len(list(tmp_path.iterdir())) == 2 * written
    assert answers[0].figures[0].met is met


# --- figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sense", "below", "equal", "above"),
    [("<=", True, True, False), ("<", True, False, False), (">=", False, True, True), (">", False, False, True)],
)
def test_goal(sense: str, below: bool, equal: bool, above: bool):
    goal = Goal(sense, 2)
    assert [goal.met(1.9), goal.met(2.0), goal.met(2.1)] == [below, equal, above]


def test_ratio_is_the_median_over_rounds():
    answer = Answer("name", "title", "setting")
    answer.add_times({"ours": [1.0, 4.0, 2.0, 1.0, 1.0], "peer": [2.0, 12.0, 3.0, 4.0, 5.0]}, {"other": "is broken"})
    answer.add_ratio("peer", "ours", Goal(">=", 3))
    answer.add_ratio("peer", "other", Goal(">=", 3))
    measured, missing = answer.figures
    assert (measured.median, measured.low, measured.high, measured.best) == (3.0, 2.0, 4.0, 2.0)
    assert measured.met is True
    assert (missing.median, missing.met, missing.skipped) == (None, None, "other")
    assert report.verdict([answer]) == "goals: 1 met, 0 missed, 1 not judged"
    assert report.as_text(answer).splitlines() == [
        "name: title",
        "setting",
        "  figure                median  quartiles  of minima   goal  met",
        "  peer / ours               3x     2 to 4         2x  >= 3x  yes",
        "  peer / other  skipped: other                        >= 3x",
        "  medians: ours 1000 ms; peer 4000 ms",
        "  skipped: other: is broken",
    ]


def test_missed_goal():
    answer = Answer("name", "title", "setting")
    answer.add("memory", "KiB", [1234.5], Goal("<", 0.25))
    assert report.verdict([answer]) == "goals: 0 met, 1 missed, 0 not judged"
    assert report.as_text(answer).splitlines()[-1].split() == ["memory", "1234", "KiB", "<", "0.25", "KiB", "NO"]
    assert report.unjudged(answer).figures[0].met is None


# --- races --------------------------------------------------------------------------------------------------


def test_contestants_take_turns():
    log: list[str] = []
    race = Race()
    for name in "ab":
        race.enter(name, lambda name=name: always(lambda: log.append(name)))
    seconds = race.run(3)
    assert "".join(log) == "abbaabbaab"  # two rounds of warm-up, three that count
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert all(value > 0 for values in seconds.values() for value in values)


def test_missing_contestant_does_not_run():
    def make() -> measure.Ready:
        raise Missing("out of order")

    race = Race()
    race.enter("broken", make)
    assert race.run(1) == {}
    assert race.skipped == {"broken": "out of order"}


def test_collector_is_back_after_an_error():
    race = Race()
    race.enter("failing", lambda: always(lambda: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        race.run(1)
    assert gc.isenabled()


@pytest.mark.usefixtures("no_peers")
def test_load_says_which_library_is_missing():
    with pytest.raises(Missing, match="ModuleNotFoundError: import of torch halted"):
        peers.load("torch")


# --- processes ----------------------------------------------------------------------------------------------


def test_child_returns_its_last_line():
    assert child.run("import gpurms, json, os; print('noise'); print(json.dumps(os.environ['X']))", X="y") == "y"


def test_child_that_fails():
    with pytest.raises(RuntimeError, match=r"a measuring process failed:\n(.|\n)*ValueError: wrong"):
        child.run("raise ValueError('wrong')")


def test_second_process_compiles_nothing():
    figures = {figure.what: figure.median for figure in compiling.run(quick=True).figures}
    assert figures["first process: functions compiled"] > 0
    assert figures["first process: functions loaded"] == 0
    assert figures["second process: functions compiled"] == 0
    assert figures["second process: functions loaded"] > 0
