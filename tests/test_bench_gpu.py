"""``python -m bench gpu`` on the emulated device, at tiny sizes and without peers; no test looks at times."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.device_support import cupy  # skips this module where there is no CuPy to emulate
from tests.engines import emulated

from bench import gpu  # isort: skip
from bench.answer import Answer, Goal  # isort: skip
from bench.gpu import bits, clip, dense, many, sizes, sparse  # isort: skip
from bench.gpu.stage import Stage, attempt, counted  # isort: skip
from bench.machine import ROOT  # isort: skip
from bench.measure import Missing, always  # isort: skip

NO_TORCH = "ModuleNotFoundError: import of torch halted; None in sys.modules"
NO_JAX = "ModuleNotFoundError: import of jax halted; None in sys.modules"


def last(answers: Iterator[Answer]) -> Answer:
    *_, answer = answers
    return answer


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "jax"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("bench.peers.")]:
        monkeypatch.delitem(sys.modules, name)


# --- the command --------------------------------------------------------------------------------------------

SKIPPED = {
    "bandwidth": {},
    "bits": {},
    "dense": {},
    "sparse": {f"torch SparseAdam, {case.name}": NO_TORCH for case in sparse.TINY},
    "many": {"torch foreach": NO_TORCH, "torch.compile": NO_TORCH, "optax jit": NO_JAX, "profiler": NO_TORCH},
    "sizes": {"torch foreach": NO_TORCH, "torch.compile": NO_TORCH, "optax jit": NO_JAX},
}


@pytest.mark.parametrize("name", SKIPPED)
def test_question(name: str, tmp_path: Path):
    command = [sys.executable, "-m", "tests.bench_on_cpu", "gpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--only", name], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    (data,), (page,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
    record, text = json.loads(data.read_text()), page.read_text()
    assert record.keys() == {"schema", "suite", "quick", "machine", "questions"}
    assert (record["suite"], record["quick"]) == ("gpu", True)
    assert data.stem == f"gpu-{record['machine']['date'][:10]}"
    check_machine(record["machine"], name)
    (question,) = record["questions"]
    check(question)
    assert question["name"] == name
    assert question["skipped"] == SKIPPED[name]
    for figure in question["figures"]:
        assert f"| {figure['what']} |" in text
        assert figure["what"] in done.stdout
    for skipped, why in SKIPPED[name].items():
        assert f"skipped: {skipped}: {why}" in text
    drawn = name in ("dense", "many", "sizes")
    assert [path.name for path in tmp_path.glob("*.svg")] == [f"{data.stem}.svg"] * drawn
    assert text.endswith(f"![chart]({data.stem}.svg)\n") == drawn


def check_machine(machine: dict[str, Any], name: str) -> None:
    assert machine["packages"]["cupy-cuda13x"] == cupy.__version__
    assert not machine["packages"].keys() & set(machine["missing"])
    assert re.fullmatch(r"[0-9a-f]{12}", machine["sources"])
    assert machine["seconds"].keys() == {name}
    described = machine["gpu"]
    assert (described["name"], described["compute_capability"], described["memory_GiB"]) == ("emulated", "9.0", 16.0)
    assert described["nvrtc"] == ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    assert (described["copy_GB_per_s"] is not None) == (name == "bandwidth")


def check(question: dict[str, Any]) -> None:
    """The form that bench/README.md describes."""
    assert question.keys() == {"name", "title", "setting", "figures", "series", "skipped", "notes"}
    assert question["figures"]
    for series in question["series"]:
        assert series.keys() == {"name", "unit", "values", "of"}
        assert all(value > 0 for value in series["values"])
        if series["of"]:
            assert series["name"] == ", ".join(series["of"].values())
    for figure in question["figures"]:
        assert figure.keys() == {"what", "unit", "median", "low", "high", "best", "goal", "met", "skipped"}
        assert figure["met"] is None  # tiny sizes prove nothing
        assert (figure["median"] is None) == bool(figure["skipped"])


# --- questions ----------------------------------------------------------------------------------------------


def test_bits_are_compared():
    with emulated():
        answer = last(bits.run(quick=True))
    assert {figure.what: figure.median for figure in answer.figures} == {
        f"{kind}, {rule}, {dtype}": 0.0
        for dtype in ("float32", "bfloat16")
        for rule in ("plain", "both")
        for kind in ("dense", "strided", "sparse")
    }
    assert all(figure.met for figure in answer.figures)


@pytest.mark.parametrize("kind", [bits.dense, bits.strided, bits.sparse])
def test_bits_that_differ_are_counted(kind: Any, monkeypatch: pytest.MonkeyPatch):
    on_device = bits._on_device

    def disturbed(value: Any) -> Any:
        copied = on_device(value)
        if isinstance(value, np.ndarray) and value.size > 20:
            copied[(2,) * value.ndim] += np.float32(0.25)
        return copied

    monkeypatch.setattr(bits, "_on_device", disturbed)
    monkeypatch.setattr(bits, "SHAPES", ((900,),))
    with emulated():
        assert bits.different(kind(np.dtype(np.float32), quick=True), {}) > 0


def test_one_bit_and_the_payload_of_a_nan():
    a = np.array([1, np.nan, 2, 0.0], np.float32)
    b = np.array([1, -np.nan, np.nextafter(np.float32(2), np.float32(3)), -0.0], np.float32)
    assert bits._unequal(a, b) == 2


def test_whether_a_step_waits():
    with emulated(deferred=True):
        answer = last(clip.run(quick=True))
    waits = {figure.what: figure.median for figure in answer.figures if figure.what.startswith("waits")}
    assert len(waits) == 7
    assert set(waits.values()) == {0.0}


def test_a_step_that_waits_is_seen():
    answer = Answer("clip", "", "")
    with emulated(deferred=True):
        stage = Stage(quick=True)
        array = cupy.zeros(3)
        clip._watch(answer, stage, "gets", lambda: array.get)
        clip._watch(answer, stage, "adds", lambda: lambda: cupy.add(array, 1, out=array))
    assert {figure.what: (figure.median, figure.met) for figure in answer.figures} == {
        "gets": (1.0, False),
        "adds": (0.0, True),
    }


def test_waiting_that_cannot_be_seen_is_not_judged():
    with emulated(), pytest.raises(Missing, match="cannot be told apart here"):
        clip._watch(Answer("clip", "", ""), Stage(quick=True), "adds", lambda: lambda: None)


def test_launches_are_counted():
    with emulated() as machine:
        step = many._ours(Stage(quick=True), 5)()
        step()
        machine.forget()
        with counted() as names:
            step()
        assert names == [launch.name for launch in machine.launches] == ["multi"]
        with counted() as others:
            pass
        assert others == []


@pytest.mark.usefixtures("no_peers")
def test_what_does_not_fit_is_a_row():
    with emulated() as machine:
        answer = Answer("sizes", "", "")
        stage = Stage(quick=True)
        machine.heap.limit = machine.heap.used[0] + 400_000
        for n in (1 << 10, 1 << 20):
            with attempt(answer, f"gpurms, {n}"):
                sizes._measure(answer, stage, "gpurms", str(n), n, 2)
    assert [series.name for series in answer.series] == ["gpurms, 1024, wall", "gpurms, 1024, device"]
    assert answer.skipped.keys() == {"gpurms, 1048576"}
    assert answer.skipped["gpurms, 1048576"].startswith("OutOfMemoryError: Out of memory allocating 4,194,304 bytes")


@pytest.mark.usefixtures("no_peers")
@pytest.mark.parametrize("question", [many, sizes])
def test_what_is_known_is_judged_at_once(question: Any):
    with emulated():
        known = []
        for answer in question.run(quick=True):
            known.append([figure.median is not None for figure in answer.figures])
    assert known[0] == []
    assert {len(each) for each in known[1:]} == {len(known[-1])}
    assert all(sum(before) <= sum(after) for before, after in itertools.pairwise(known))
    assert sum(known[1]) < sum(known[-1])


def test_a_capture_that_fails_is_closed():
    with emulated():
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream, pytest.raises(ZeroDivisionError):
            many.capture(stream, lambda: 1 / 0)
        assert not stream.is_capturing()


def test_a_host_that_is_too_slow_is_said_so():
    with emulated():
        stage = Stage(quick=True)
        stage.quick = False
        stage._copy = 1.0
        with pytest.raises(Missing, match="the device waited for the host however long it was kept busy"):
            stage.device_times(always(lambda: None), 2)


# --- arithmetic of the figures ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rule", "expected"),
    [
        ("float32", "plain", 20),
        ("float32", "momentum", 28),
        ("float32", "both", 36),
        ("bfloat16", "plain", 14),
        ("float16", "centered", 22),
        ("float64", "both", 72),
    ],
)
def test_bytes_of_a_dense_step(dtype: str, rule: str, expected: int):
    assert dense.bytes_moved(dtype, rule) == expected


def test_percent_of_the_copy_bandwidth():
    answer = Answer("dense", "", "")
    conditions = {"dtype": "float32", "rule": "plain", "size": "64M", "layout": "one variable"}
    answer.measured("s", [2e-3, 1e-3, 4e-3], "gpurms", **conditions)
    dense._add_fraction(answer, conditions, 2_000_000_000)
    (skipped,) = answer.figures
    assert (skipped.median, skipped.goal) == (None, dense.GOAL)
    answer.series.append(type(answer.series[0])("copy", "GB/s", [1000.0]))
    dense._add_fraction(answer, conditions, 2_000_000_000)
    figure = answer.figures[-1]
    assert (figure.median, figure.best, figure.met) == (pytest.approx(100), pytest.approx(200), True)


def test_bytes_of_a_sparse_step():
    case = sparse.Case("", 100, 8, 5, 0.9)
    ids = np.array([3, 3, 7, 0, 3])
    assert sparse.n_bytes(case, ids) == 5 * 8 + 5 * 32 + 3 * 32 * 2 * 3


def test_ragged_sizes():
    parts = dense.ragged(1 << 26, 200)
    assert (len(parts), sum(parts), min(parts) > 0) == (200, 1 << 26, True)
    assert sum(part % 2 for part in parts) >= 199


def test_goals_beside_the_peers():
    small, large = 1 << 18, 1 << 20
    goals = {who: (sizes._goal(who, small), sizes._goal(who, large)) for who in sizes.PEERS}
    assert goals == {
        "torch foreach": (Goal(">=", 1), Goal(">=", 2.5)),
        "torch.compile": (Goal(">=", 1), Goal(">=", 1)),
        "optax jit": (Goal(">=", 1), Goal(">=", 1)),
        "naive CuPy": (None, None),
    }
    first, *_, end = sizes.SIZES.items()
    assert (first, end) == (("1K", 1 << 10), ("1G", 1 << 30))


def test_time_of_all_questions():
    assert sum(gpu.QUESTIONS.values()) <= gpu.TOTAL <= 480
