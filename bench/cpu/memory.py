"""What does a step allocate once the slots exist?

Two instruments, each in a process of its own. ``tracemalloc`` sees what NumPy and Python allocate, to the byte. The
peak of resident memory (Linux) also sees what Numba's loops allocate, but it counts whole pages, and those of the
interpreter too.
"""

from __future__ import annotations

import json
import mmap
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench import child, engines
from bench.answer import Answer, Goal, Series
from bench.engines import ENGINES, NUMBA, NUMPY
from bench.measure import Missing
from gpurms import IndexedSlices, RMSprop
from gpurms.kernels import cpu, pool

ROW_SIZE = 16
CLEAR_REFS = Path("/proc/self/clear_refs")
TEMPORARIES = {NUMBA: 1, NUMPY: 2}  # blocks per thread that a step may take: the rule in NumPy needs two, in Numba none


def run(quick: bool) -> Answer:
    n = 1 << 20 if quick else 1 << 24
    n_ids, tables = (1 << 10, (10_000, 100_000)) if quick else (1 << 16, (1_000_000, 10_000_000))
    setting = (
        f"float32; dense: plain rule, {n:,} elements, blocks of {cpu.BLOCK:,} elements per thread (Numba may take one, "
        f"NumPy two); sparse: momentum, {n_ids:,} ids and rows of {ROW_SIZE}, tables of {tables[0]:,} and "
        f"{tables[1]:,} rows"
    )
    answer = Answer("memory", "extra memory of a step once the slots exist", setting)
    for name, engine in ENGINES.items():
        for instrument in ("tracemalloc", "resident"):
            label = f"{name}, {instrument}"
            try:
                engines.require(engine)
                _require(instrument)
            except Missing as missing:
                answer.skipped[label] = str(missing)
                continue
            dense = _peak(engine, instrument, "dense", n)
            small, large = (_peak(engine, instrument, "sparse", rows, n_ids) for rows in tables)
            peaks = {"dense": dense, f"{tables[0]:,} rows": small, f"{tables[1]:,} rows": large}
            answer.series += [Series(f"{label}, {what}", "KiB", [peak / 1024]) for what, peak in peaks.items()]

            blocks = dense / (TEMPORARIES[name] * pool.n_threads() * cpu.BLOCK * 4)
            answer.add(f"{label}: dense / its blocks", "x", [blocks], Goal("<", 1.5))  # one temporary more is 1.5
            answer.add(f"{label}: sparse / its ids and values", "x", [large / (n_ids * (8 + 4 * ROW_SIZE))])
            answer.add(f"{label}: sparse / the same, table a tenth", "x", [large / small], Goal("<", 2))
    return answer


def _require(instrument: str) -> None:
    if instrument == "resident" and not CLEAR_REFS.exists():
        raise Missing(f"there is no {CLEAR_REFS} on {sys.platform}")


def _peak(engine: str, instrument: str, kind: str, *sizes: int) -> int:
    code = f"from bench.cpu import memory; memory.probe({engine!r}, {instrument!r}, {kind!r}, *{sizes!r})"
    return child.run(code, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")


def probe(engine: str, instrument: str, kind: str, *sizes: int) -> None:
    """In the measuring process: print the extra bytes of one step at its peak."""
    with cpu.use_engine(engine):
        step = _dense(*sizes) if kind == "dense" else _sparse(*sizes)
        print(json.dumps({"tracemalloc": _traced, "resident": _resident}[instrument](step)))


def _dense(n: int) -> Callable[[], object]:
    optimizer, var, grad = RMSprop(), np.ones(n, np.float32), np.ones(n, np.float32)
    optimizer.add_slot(var, "rms", "ones")
    tiny = np.ones(1, np.float32)
    # Compiles and imports in a thread of its own, for buffers are kept per thread, and are to be counted.
    warm_up = threading.Thread(target=optimizer.apply_gradients, args=([(tiny, tiny.copy())],))
    warm_up.start()
    warm_up.join()
    return lambda: optimizer.apply_gradients([(grad, var)])


def _sparse(n_rows: int, n_ids: int) -> Callable[[], object]:
    rng = np.random.default_rng(0)
    optimizer, table = RMSprop(momentum=0.9), np.zeros((n_rows, ROW_SIZE), np.float32)
    grad = IndexedSlices(np.ones((n_ids, ROW_SIZE), np.float32), rng.integers(n_rows, size=n_ids))
    optimizer.apply_gradients([(grad, table)])  # which also touches the rows: untouched ones take no memory
    return lambda: optimizer.apply_gradients([(grad, table)])


def _traced(step: Callable[[], object]) -> int:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    step()
    return tracemalloc.get_traced_memory()[1] - before


def _resident(step: Callable[[], object]) -> int:
    CLEAR_REFS.write_text("5")  # from proc(5): makes the peak what is resident now
    before = _status("VmRSS")
    step()
    return max(mmap.PAGESIZE, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
