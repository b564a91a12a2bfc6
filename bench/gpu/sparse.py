"""What do sparse steps of embedding tables cost, beside the bytes they must move and one sort?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cupy
import numpy as np

from bench.answer import Answer, Goal, Series, name_of
from bench.gpu.stage import Stage, attempt, counted, synchronize
from bench.measure import Step, always, spread
from bench.peers import EPSILON, LR, MOMENTUM, RHO, load
from gpurms import IndexedSlices, RMSprop
from gpurms.kernels import cuda_rows

OURS, UNCHECKED, SPARSE_ADAM = "gpurms", "gpurms, unchecked", "torch SparseAdam"
OWN_SORT, ARGSORT = "gpurms's sort", "cupy.argsort"
GOAL = Goal("<=", 1.5)


class Case(NamedTuple):
    """A table and the ids of one step."""

    name: str
    n_rows: int
    row_size: int
    n_ids: int
    momentum: float
    judged: bool = False


CASES = (
    Case("1M ids of 10M x 128", 10_000_000, 128, 1_000_000, 0.0, True),
    Case("1M ids of 10M x 128, momentum", 10_000_000, 128, 1_000_000, MOMENTUM, True),
    Case("65,536 ids of 1M x 64, momentum", 1_000_000, 64, 65_536, MOMENTUM),
    Case("1,000 ids of 100M x 16", 100_000_000, 16, 1_000, 0.0),
)
TINY = (
    Case("200 ids of 100 x 8", 100, 8, 200, 0.0, True),
    Case("50 ids of 100 x 4, momentum", 100, 4, 50, MOMENTUM),
)


def run(quick: bool) -> Iterator[Answer]:
    cases, rounds = (TINY, 2) if quick else (CASES, 15)
    setting = (
        "float32, int64 Zipf(1.2) ids; wall: time per step of blocks of steps; host: until the step returns; device: "
        "by events; unchecked: check_indices=False. Floor: ids, values, and rows of variable and slots that the step "
        "names, read and written, at the rate of copies in the same process, and one sort of the same ids"
    )
    answer = Answer("sparse", "embedding tables", setting)
    yield answer
    stage = Stage(quick)
    answer.series.append(Series("copy", "GB/s", stage.copy_rates()))
    for case in cases:
        ids = zipf(case.n_ids, case.n_rows)
        for who, measure in (
            (UNCHECKED, _unchecked),
            (OURS, _checked),
            (OWN_SORT, _own_sort),
            (ARGSORT, _argsort),
            (SPARSE_ADAM, _sparse_adam),
        ):
            with attempt(answer, name_of(who, case=case.name)):
                measure(answer, stage, case, ids, rounds)
            yield answer
        _compare(answer, case, ids)
        yield answer


def zipf(n: int, n_rows: int) -> np.ndarray:
    """Ids that repeat as words do."""
    ids: np.ndarray = (np.random.default_rng(0).zipf(1.2, n) - 1) % n_rows
    return ids


def n_bytes(case: Case, ids: np.ndarray) -> int:
    """What a step must move."""
    row = 4 * case.row_size
    touched = np.unique(ids).size * row * 2 * (2 + (case.momentum > 0))
    return ids.nbytes + case.n_ids * row + int(touched)


def _compare(answer: Answer, case: Case, ids: np.ndarray) -> None:
    device = name_of(UNCHECKED, case=case.name, time="device")
    seconds, rates = answer.values(device), answer.values("copy")
    for sort in (OWN_SORT, ARGSORT):
        what, goal = f"{case.name}: time / floor with {sort}", GOAL if case.judged else None
        alone = answer.values(name_of(sort, case=case.name, time="device"))
        if seconds is None or rates is None or alone is None:
            answer.add_skipped(what, "x", goal, device, name_of(sort, case=case.name, time="device"))
            continue
        floor = n_bytes(case, ids) / spread(rates).median / 1e9 + spread(alone).median
        answer.add(what, "x", [each / floor for each in seconds], goal, min(seconds) / floor)
    for who in (OURS, SPARSE_ADAM):
        answer.compare(who, UNCHECKED, case=case.name, time="wall")


def _unchecked(answer: Answer, stage: Stage, case: Case, ids: np.ndarray, rounds: int) -> None:
    step = _ours(stage, case, ids, check=False)
    _times(answer, stage, step, UNCHECKED, case, rounds)
    answer.measured("s", stage.device_times(always(step), rounds), UNCHECKED, case=case.name, time="device")


def _checked(answer: Answer, stage: Stage, case: Case, ids: np.ndarray, rounds: int) -> None:
    _times(answer, stage, _ours(stage, case, ids, check=True), OURS, case, rounds)


def _times(answer: Answer, stage: Stage, step: Step, who: str, case: Case, rounds: int) -> None:
    step()
    with counted() as names:
        step()
    answer.measured("", [len(names)], who, case=case.name, count="launches")
    answer.measured("s", stage.wall_times(step, synchronize), who, case=case.name, time="wall")
    answer.measured("s", stage.host_times(always(step), rounds), who, case=case.name, time="host")


def _ours(stage: Stage, case: Case, ids: np.ndarray, check: bool) -> Step:
    table = stage.noise(case.n_rows * case.row_size).reshape(case.n_rows, case.row_size)
    values = stage.noise(case.n_ids * case.row_size, seed=1).reshape(case.n_ids, case.row_size)
    optimizer = RMSprop(LR, RHO, case.momentum, EPSILON, check_indices=check)
    slices = IndexedSlices(values, cupy.asarray(ids))
    return lambda: optimizer.apply_gradients([(slices, table)])


def _own_sort(answer: Answer, stage: Stage, case: Case, ids: np.ndarray, rounds: int) -> None:
    found, step = own_sort(cupy.asarray(ids), case.n_rows)
    step()
    if not bool((found() == cupy.sort(cupy.asarray(ids))).all()):
        raise ValueError("the ids are not sorted")
    answer.measured("s", stage.device_times(always(step), rounds), OWN_SORT, case=case.name, time="device")


def own_sort(ids: Any, n_rows: int) -> tuple[Callable[[], Any], Step]:
    """The sort that a sparse step begins with, and what it has sorted."""
    key = np.dtype(np.uint32)
    n, counts = ids.size, 4 * cuda_rows.DIGITS * (cuda_rows.n_tiles(ids.size) + 1)
    sizes = [key.itemsize * n, 4 * n, key.itemsize * n, 4 * n, counts]
    memory, (*buffers, at) = cuda_rows.Workspace().parts(sizes)
    sort = cuda_rows._Sort(ids, n_rows, buffers, at)

    def found() -> Any:
        start = sort.keys - int(memory.data.ptr)
        return memory[start : start + key.itemsize * n].view(key)

    return found, sort


def _argsort(answer: Answer, stage: Stage, case: Case, ids: np.ndarray, rounds: int) -> None:
    on_device = cupy.asarray(ids)
    seconds = stage.device_times(always(lambda: cupy.argsort(on_device)), rounds)
    answer.measured("s", seconds, ARGSORT, case=case.name, time="device")


def _sparse_adam(answer: Answer, stage: Stage, case: Case, ids: np.ndarray, rounds: int) -> None:
    ready = load("torch_cuda").sparse_adam(case.n_rows, case.row_size, ids)
    ready()()
    answer.measured("s", stage.wall_times(lambda: ready()(), synchronize), SPARSE_ADAM, case=case.name, time="wall")
    answer.measured("s", stage.host_times(ready, rounds), SPARSE_ADAM, case=case.name, time="host")
