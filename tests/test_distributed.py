"""`gpurms.distributed` without MPI: ranks are threads, whose transport sums in the order of the ranks."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop
from gpurms.distributed import MPIAverage, initial
from gpurms.distributed.agreement import Intent, agreed
from gpurms.distributed.average import Average
from gpurms.distributed.slices import Shard, mean
from gpurms.distributed.transport import NUMPY
from tests import engines
from tests.support import DTYPES, assert_same_bits, python

pytestmark = pytest.mark.usefixtures("numpy_engine")
F32 = np.float32


class Thread:
    """Control and data of one rank."""

    home, hint = NUMPY, "hint"
    near = staticmethod(nullcontext)
    empty = staticmethod(np.empty)

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, barrier.parties
        self._shared = shared
        self._barrier = barrier

    def place(self) -> None:
        """The host."""

    def _all(self, mine: Any) -> list[Any]:
        self._shared[self.rank] = mine
        self._barrier.wait()
        found = list(self._shared)
        self._barrier.wait()
        return found

    gather_bytes = _all

    def greatest(self, words: np.ndarray) -> np.ndarray:
        return np.max(self._all(words), axis=0)

    def gather_counts(self, counts: np.ndarray) -> np.ndarray:
        return np.stack(self._all(counts))

    def sum(self, flat: np.ndarray) -> None:
        flat[...] = np.sum(self._all(flat.copy()), axis=0)

    def gather(self, rows: np.ndarray, counts: list[int]) -> np.ndarray:
        parts = self._all(rows)
        assert [len(part) for part in parts] == counts
        return np.concatenate(parts)


def on_ranks(n: int, program: Callable[[Thread], Any]) -> list[Any]:
    """What each rank returns, or the exception that it raises."""
    shared, barrier = [None] * n, threading.Barrier(n, timeout=20)

    def run(rank: int) -> Any:
        try:
            return program(Thread(rank, shared, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, range(n)))


def test_training():
    def train(rank: Thread) -> list[np.ndarray]:
        w, table = np.zeros(3, F32), np.zeros((4, 2))
        opt = RMSprop(0.1, momentum=0.5, gradient_aggregator=Average(rank, rank))
        for _ in range(3):
            rows = IndexedSlices(np.full((rank.rank, 2), 6.0), np.arange(rank.rank))
            opt.apply_gradients([(np.full(3, rank.rank, F32), w), (rows, table)])
        return [w, table]

    w, table = np.zeros(3, F32), np.zeros((4, 2))
    opt = RMSprop(0.1, momentum=0.5)
    for _ in range(3):
        opt.apply_gradients([(np.ones(3, F32), w), (IndexedSlices(np.full((3, 2), 2.0), np.array([0, 0, 1])), table)])
    for found in on_ranks(3, train):
        assert_same_bits(found[0], w)
        assert_same_bits(found[1], table)


def agreement(*lines_or_errors: list[str] | Exception) -> list[Any]:
    """What each rank gets that has these lines, or fails."""

    def prepare(rank: int) -> tuple[Intent, int]:
        mine = lines_or_errors[rank]
        if isinstance(mine, Exception):
            raise mine
        return Intent.of(mine), rank

    return on_ranks(len(lines_or_errors), lambda rank: agreed(rank, lambda: prepare(rank.rank)))


def test_ranks_that_agree():
    assert agreement(["a", "b"], ["a", "b"], ["a", "b"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([["a", "b"], ["a", "b"], ["a", "c"]], "ranks disagree: rank 0 has b; rank 2 has c"),
        ([["a", "b"], ["x", "b"], ["y", "c"]], "ranks disagree: rank 0 has a; rank 1 has x"),
        ([["a", "b"], ["a"], ["a"]], "ranks disagree: rank 0 has b; rank 1 has nothing more"),
        ([["a"], ["a"], ["a", "b"]], "ranks disagree: rank 0 has nothing more; rank 2 has b"),
        ([[], ["a\nb"], ["a", "b"]], "ranks disagree: rank 0 has nothing more; rank 1 has a\nb"),
    ],
)
def test_ranks_that_disagree(lines: list[list[str]], message: str):
    errors = agreement(*lines)
    assert [type(error) for error in errors] == [ValueError] * 3
    assert [str(error) for error in errors] == [message] * 3


def test_lines_are_told_apart_from_their_parts():
    assert isinstance(agreement(["a\nb"], ["a", "b"])[0], ValueError)


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (IndexError("5 is too much"), IndexError, "rank 1: 5 is too much"),
        (TypeError("no"), TypeError, "rank 1: no"),
        (ValueError("no"), ValueError, "rank 1: no"),
        (RuntimeError("no"), RuntimeError, "rank 1: no"),
        (MemoryError("1 GB"), RuntimeError, "rank 1: MemoryError: 1 GB"),
    ],
)
def test_rank_that_fails(failure: Exception, kind: type[Exception], message: str):
    for others in (["a"], TypeError("later")):
        errors = agreement(["a"], failure, others)
        assert [type(error) for error in errors] == [kind] * 3
        assert [str(error) for error in errors] == [message] * 3
        assert errors[1].__cause__ is failure
    assert [str(error) for error in agreement(failure, failure)] == [message.replace("1:", "0:", 1)] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_copies_only_what_has_another_type(dtype: np.dtype):
    values = np.arange(6).reshape(3, 2).astype(dtype)
    found = mean(values, 4)
    wide = np.promote_types(dtype, F32)
    assert_same_bits(found, (np.arange(6).reshape(3, 2) / 4).astype(wide))
    assert (found is values) == (dtype.itemsize > 2)


def test_a_part_is_not_clipped_by_a_norm():
    part = Shard(np.ones(3), "part")
    for option in ("clipnorm", "global_clipnorm"):
        opt = RMSprop(**{option: 1.0})
        with pytest.raises(ValueError, match="variable 'part': clipnorm and global_clipnorm cannot clip it"):
            opt.apply_gradients([(np.ones(3), part)])
        assert opt.weights == []
    assert RMSprop(clipvalue=1.0).apply_gradients([(np.ones(3), part)]) == 1


def test_a_function_gives_arrays_of_one_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(initial, "BLOCK_BYTES", 32)
    own = range(1, 10, 2)
    found = initial.first_rows(lambda ids: ids * 10, (10,), np.dtype(F32), own)
    assert found.tolist() == [10, 30, 50, 70, 90]
    monkeypatch.setattr(initial, "BLOCK_BYTES", 8)
    seen = []
    assert_same_bits(
        initial.first_rows(lambda ids: seen.append(ids.tolist()) or ids * 10, (10,), np.dtype(F32), own), found
    )
    assert seen == [[1, 3], [5, 7], [9]]
    with engines.emulated():
        import cupy

        with pytest.raises(TypeError, match="arrays of one library; got NumPy and CuPy arrays"):
            initial.first_rows(lambda ids: ids if ids[0] == 1 else cupy.asarray(ids), (10,), np.dtype(F32), own)
    with pytest.raises(ValueError, match=r"must return shape \(1,\) for these rows; got \(2,\)"):
        initial.first_rows(lambda ids: np.zeros(2), (10,), np.dtype(F32), own)
    with pytest.raises(ValueError, match=r"must return shape \(0, 3\) for these rows; got \(0,\)"):
        initial.first_rows(lambda ids: np.zeros(0), (0, 3), np.dtype(F32), range(0))


def test_import_is_light():
    code = "import sys, gpurms.distributed; print(*{'mpi4py', 'cupy', 'numba', 'autograd'} & sys.modules.keys())"
    result = python("-c", code)
    assert (result.stdout, result.stderr) == ("\n", "")


@pytest.mark.parametrize(
    "problem",
    ["ModuleNotFoundError('No module named mpi4py', name='mpi4py')", "RuntimeError('cannot load MPI library')"],
)
def test_without_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text(f"raise {problem}")
    for name in ("mpi4py", "mpi4py.MPI"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"gpurms\.distributed cannot use MPI \(.*\): pip install mpi4py, and an MPI"):
        MPIAverage()
