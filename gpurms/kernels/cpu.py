"""NumPy arrays: variables cut into blocks, blocks put on threads, each block handed to an engine.

The engine is Numba where it is installed, else NumPy; ``GPURMS_ENGINE=auto|numpy|numba`` forces one. Both give the same
bits. Contiguous arrays of a type that the engine takes go to it as they are; the rest pass block by block through
buffers of the compute type.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol, cast

import numpy as np

from gpurms.kernels import numpy as numpy_engine
from gpurms.kernels import pool
from gpurms.kernels.numpy import BLOCK, Array, Workspace
from gpurms.kernels.rule import FLOAT32, FLOAT64, SCALARS, Flags, Rule, Update, compute_dtype, is_bfloat16

SMALL = 1 << 15
"""Variables up to this size stay on the calling thread: their kernel is shorter than a change of threads."""
CHUNK = 1 << 19
"""Elements of one unit of work: some 0.2 ms at memory speed, so that a slow core does not hold up the rest."""
SUM_CHUNK = 1 << 16
"""Elements of one partial sum of squares. Part of the contract of equal bits, unlike the sizes above."""
ROW_COST = 12
"""What updating a row costs, in values summed (measured)."""

ENGINES = ("auto", "numpy", "numba")


Types = tuple[np.dtype[Any], np.dtype[Any], np.dtype[Any]]  # of variable, gradient and slots


class Engine(Protocol):
    """What ``numpy.py`` and ``numba.py`` provide.

    ``multi`` is None where arrays are not taken by address, ``rows`` where sums and update are separate passes.
    """

    storage: Callable[[np.dtype[Any], np.dtype[Any]], np.dtype[Any] | None]
    dense: Callable[[Flags, np.dtype[Any], Types], Callable[..., None]]
    multi: Callable[[Flags, np.dtype[Any], Types], Callable[..., None]] | None
    row_sums: Callable[[Rule, np.dtype[Any]], Callable[..., None]]
    rows: Callable[[Rule, Types], Callable[..., None]] | None
    sort_rows: Callable[[Array, Workspace], tuple[Array, Array, Array]]
    square_sum: Callable[[Array], np.float64]


_chosen: Engine | None = None
_choosing = pool.fork_safe_lock()


def engine() -> Engine:
    """The engine in use, chosen at the first call."""
    global _chosen
    if _chosen is None:
        with _choosing:
            _chosen = _load(os.environ.get("GPURMS_ENGINE") or "auto")
    return _chosen


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Run a block with the engine ``name``, for tests and benchmarks. Not for use by several threads at once."""
    global _chosen
    before, _chosen = _chosen, _load(name)
    try:
        yield
    finally:
        _chosen = before


def engine_report() -> list[tuple[str, bool, str]]:
    """Rows (engine, usable, detail) in order of preference."""
    asked = os.environ.get("GPURMS_ENGINE") or "auto"
    rows = []
    for name, found in (("numba", _numba_problem()), ("numpy", "")):
        if asked not in ENGINES:
            found = f"GPURMS_ENGINE must be one of {', '.join(ENGINES)}; got {asked!r}"
        elif asked not in ("auto", name):
            found = f"GPURMS_ENGINE={asked}"
        rows.append((name, not found, found or f"{pool.n_threads()} threads"))
    return rows


def _load(name: str) -> Engine:
    if name not in ENGINES:
        raise ValueError(f"GPURMS_ENGINE must be one of {', '.join(ENGINES)}; got {name!r}")
    problem = _numba_problem() if name != "numpy" else ""
    if name == "numba" and problem:
        raise RuntimeError(f"the numba engine was asked for but cannot run: {problem}")
    if name == "numpy" or problem:
        return cast(Engine, numpy_engine)
    from gpurms.kernels import numba as numba_engine

    return cast(Engine, numba_engine)


def _numba_problem() -> str:
    """Why the Numba engine cannot run, or an empty string."""
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed: pip install numba"
    try:
        importlib.import_module("gpurms.kernels.numba")
    except ImportError as error:  # Numba refuses NumPy versions newer than itself in this way
        return f"Numba does not import: {error}"
    return ""


def plan(updates: Sequence[Update]) -> Callable[[], None]:
    """Compile, sort and allocate all that the updates need; the function returned applies them, in place.

    Each variable may occur once. What can fail fails here, before anything has changed.
    """
    dense = [update for update in updates if update.indices is None]
    plans = [_plan_rows(update) for update in updates if update.indices is not None]
    if dense:
        plans.append(_plan_dense(dense))

    def apply() -> None:
        for planned in plans:
            planned()

    return apply


Unit = tuple[Callable[..., None], tuple[Any, ...]]  # a function and its arguments


def _call(unit: Unit) -> None:
    function, arguments = unit
    function(*arguments)


def _plan_dense(updates: Sequence[Update]) -> Callable[[], None]:
    """One unit for each small update, on this thread; units of one chunk for large ones, on all threads."""
    chosen = engine()
    kernels: dict[Any, Callable[..., None]] = {}
    small: list[Unit] = []
    chunks: list[Unit] = []
    for update in updates:
        rule = update.rule
        state = prepared(update, chosen)
        factor = state.one if update.factor is None else update.factor
        grad = flat(update.grad, state.compute, chosen) if state.views else None
        key = (id(rule), state.key, None if grad is None else grad.dtype)
        kernel = kernels.get(key)
        if kernel is None:
            types = state.types(grad)
            kernel = kernels[key] = chosen.dense(rule.flags, state.compute, types)
        n, scalars = state.size, rule.scalars
        if grad is None:
            spans = [(lo, min(lo + CHUNK, n)) for lo in range(0, n, CHUNK)]
            units: list[Unit] = [(_strided, (kernel, update, lo, hi, factor, scalars)) for lo, hi in spans]
            (small if n <= SMALL else chunks).extend(units)
            continue
        var, rms, mom, mg = state.views
        if n <= SMALL:
            small.append((kernel, (var, grad, rms, mom, mg, factor, scalars)))
        else:
            for lo in range(0, n, CHUNK):
                parts = (a[lo : lo + CHUNK] for a in (var, grad, rms, mom, mg))
                chunks.append((kernel, (*parts, factor, scalars)))

    def apply() -> None:
        for function, arguments in small:
            function(*arguments)
        if chunks:
            pool.run(_call, chunks)

    return apply


class State:
    """What stays the same from step to step: variable and slots as an engine takes them.

    ``views`` are 1-D and of the engine's types; empty if one of the arrays is strided, unaligned or of another type.
    """

    __slots__ = ("compute", "engine", "key", "one", "size", "views", "workspace")

    def __init__(self, update: Update, chosen: Engine) -> None:
        self.engine = chosen
        self.compute = compute = update.rule.compute
        self.one = compute.type(1)
        self.workspace = Workspace()
        self.size: int = update.var.size
        slots = [slot for slot in (update.rms, update.mom, update.mg) if slot is not None]
        views = [flat(array, compute, chosen) for array in (update.var, *slots)]
        types = {slot.dtype for slot in slots}
        self.views: tuple[Array, ...] = ()
        self.key: Any = None
        if len(types) == 1 and not any(view is None for view in views):
            var, rms, *rest = cast(list[Array], views)
            absent = np.empty(0, rms.dtype)
            mom = rest.pop(0) if update.mom is not None else absent
            mg = rest.pop(0) if update.mg is not None else absent
            self.views = (var, rms, mom, mg)
            self.key = (var.dtype, rms.dtype)

    def types(self, grad: Array | None) -> Types:
        """Of the arrays that the kernel will see; through buffers, all are of the compute type."""
        if grad is None:
            return self.compute, self.compute, self.compute
        var, rms, _, _ = self.views
        return var.dtype, grad.dtype, rms.dtype


def prepared(update: Update, chosen: Engine) -> State:
    """The state of an update, made at its first step."""
    state: State | None = update.prepared
    if state is None or state.engine is not chosen:
        state = update.prepared = State(update, chosen)
    return state


_ABSENT: dict[np.dtype[Any], Array] = {FLOAT32: np.empty(0, FLOAT32), FLOAT64: np.empty(0, FLOAT64)}


def flat(array: Array, compute: np.dtype[Any], chosen: Engine) -> Array | None:
    """A 1-D view of a contiguous, aligned array of a type that the engine takes, or None."""
    flags = array.flags
    if not flags.c_contiguous or not flags.aligned:
        return None
    dtype = array.dtype
    if dtype != compute:
        taken = chosen.storage(dtype, compute)
        if taken is None:
            return None
        array = array.view(taken)
    return array if array.ndim == 1 else array.reshape(-1)


def _strided(kernel: Callable[..., None], update: Update, lo: int, hi: int, factor: Any, scalars: Array) -> None:
    """Elements lo to hi, in memory order of the variable, through buffers of the compute type."""
    compute = scalars.dtype
    arrays = [a for a in (update.var, update.grad, update.rms, update.mom, update.mg) if a is not None]
    access: Any = [["readonly" if i == 1 else "readwrite", "contig", "aligned"] for i in range(len(arrays))]
    with (
        np.errstate(all="ignore"),
        np.nditer(
            arrays,
            flags=["external_loop", "buffered", "ranged", "delay_bufalloc"],
            op_flags=access,
            op_dtypes=[_buffer_dtype(a, compute) for a in arrays],
            casting="unsafe",
            buffersize=BLOCK,
        ) as blocks,
    ):
        blocks.iterrange = (lo, hi)  # type: ignore[misc]  # settable, whatever NumPy's stubs say
        blocks.reset()
        for buffers in blocks:
            views = [buffer.astype(compute, copy=False) for buffer in buffers]
            var, grad, rms, *rest = views
            mom = rest.pop(0) if update.mom is not None else _ABSENT[compute]
            mg = rest.pop(0) if update.mg is not None else _ABSENT[compute]
            kernel(var, grad, rms, mom, mg, factor, scalars)
            for buffer, view in zip(buffers, views):
                if buffer is not view and view is not grad:
                    buffer[...] = round_to_odd(view)


def _buffer_dtype(array: Array, compute: np.dtype[Any]) -> np.dtype[Any]:
    """The compute type, except for bfloat16 slots of float64 variables: their conversion goes through float32."""
    return FLOAT32 if compute == FLOAT64 and is_bfloat16(array.dtype) else compute


def round_to_odd(x: Array) -> Array:
    """float64 -> float32 such that rounding the result to bfloat16 rounds x once, to nearest even.

    ml_dtypes rounds float64 to float32 first, and two roundings to nearest are not one. Inexact results get an odd last
    bit here, so the second rounding never meets a tie that was not one.
    """
    near = x.astype(np.float32)
    inexact = near.astype(np.float64) != x
    away = np.abs(near.astype(np.float64)) > np.abs(x)
    bits = near.view(np.uint32)
    odd = ((bits - away.astype(np.uint32)) | inexact.astype(np.uint32)).view(np.float32)
    return np.where(np.isnan(x), near, odd)


def _plan_rows(update: Update) -> Callable[[], None]:
    if update.indices.size == 0 or update.var.size == 0:
        return lambda: None
    rule, chosen = update.rule, engine()
    compute = rule.compute
    factor = compute.type(1) if update.factor is None else update.factor
    state = prepared(update, chosen)
    order, rows, starts = chosen.sort_rows(update.indices, state.workspace)
    row_size = update.var.size // update.var.shape[0]
    ranges = _row_ranges(starts, row_size)
    values = flat(update.grad, compute, chosen)
    if values is None:
        with np.errstate(all="ignore"):
            values = np.ascontiguousarray(update.grad.astype(compute)).reshape(-1)
    values = values.reshape(order.size, row_size)

    if chosen.rows is not None and state.views:
        kernel = chosen.rows(rule, state.types(values))
        var, rms, mom, mg = (view.reshape(-1, row_size) for view in state.views)

        def fused(span: slice) -> None:
            ends = starts[span.start : span.stop + 1]
            kernel(var, values, rms, mom, mg, order, rows[span], ends, factor)

        return lambda: pool.run(fused, ranges)

    sums = np.empty((rows.size, row_size), compute)
    add = chosen.row_sums(rule, values.dtype)

    def sum_range(span: slice) -> None:
        first = starts[span.start]
        ends = starts[span.start : span.stop + 1]
        add(values, order[first : ends[-1]], ends - first, factor, sums[span])

    pool.run(sum_range, ranges)
    flags = rule.flags._replace(clip_value=False, has_factor=False)  # the sums are of clipped values
    dense = chosen.dense(flags, compute, (compute, compute, compute))
    return lambda: pool.run(lambda span: _update_rows(dense, update, rows[span], sums[span]), ranges)


def add_rows(var: Array, indices: Array, values: Array) -> None:
    """Sums of values onto the rows of an array, with the sums of a sparse update."""
    if indices.size == 0 or var.size == 0:
        return
    compute = compute_dtype(var.dtype)
    order, rows, starts = numpy_engine.sort_rows(indices, Workspace())
    sums = np.empty((rows.size, var.size // var.shape[0]), compute)
    add = numpy_engine.row_sums(Rule(Flags(), np.zeros(len(SCALARS), compute)), values.dtype)
    add(values.reshape(order.size, -1), order, starts, compute.type(1), sums)
    var[rows] = var[rows].astype(compute) + sums.reshape(rows.shape + var.shape[1:])


def _row_ranges(starts: Array, row_size: int) -> list[slice]:
    """Ranges of rows that take about equally long; one range where threads would not pay."""
    n_rows, n_values = starts.size - 1, int(starts[-1])
    n_units = max(1, min(n_rows, 4 * pool.n_threads(), n_values * row_size // SMALL))

    def cost(row: int) -> int:
        return int(starts[row]) + ROW_COST * row

    every = cost(n_rows) / n_units
    cuts = [bisect_left(range(n_rows), nth * every, key=cost) for nth in range(n_units)] + [n_rows]
    return [slice(lo, hi) for lo, hi in pairwise(cuts) if lo < hi]


def _update_rows(dense: Callable[..., None], update: Update, rows: Array, sums: Array) -> None:
    """The rule on gathered rows, scattered back: for tables of any layout and type."""
    scalars = update.rule.scalars
    compute = scalars.dtype
    n = max(1, BLOCK // sums.shape[1])
    with np.errstate(all="ignore"):
        for lo in range(0, rows.size, n):
            at = rows[lo : lo + n]
            tables = [update.var, update.rms, update.mom, update.mg]
            blocks: list[Array] = [_ABSENT[compute] if t is None else t[at].astype(compute).reshape(-1) for t in tables]
            var, rms, mom, mg = blocks
            dense(var, sums[lo : lo + n].reshape(-1), rms, mom, mg, compute.type(1), scalars)
            for table, block in zip(tables, blocks):
                if table is not None:
                    if _buffer_dtype(table, compute) != compute:
                        block = round_to_odd(block)
                    table[at] = block.reshape(at.shape + table.shape[1:])


def square_sum(grad: Array, compute: np.dtype[Any], clipvalue: float | None) -> np.float64:
    """Sum of squares of a gradient, each element first limited to [-clipvalue, clipvalue], in float64.

    Elements in C order, in chunks of 65,536, each summed by the engine, their sums by ``fold``: the same bits on every
    engine and for every memory layout.
    """
    add = engine().square_sum
    flags = grad.flags
    if grad.size <= SUM_CHUNK and grad.dtype == compute and flags.c_contiguous and flags.aligned and clipvalue is None:
        return add(grad.reshape(-1))
    flat = grad.reshape(-1) if flags.c_contiguous else grad.flat
    starts = range(0, grad.size, SUM_CHUNK)
    sums = np.zeros(len(starts))

    def sum_chunk(i: int) -> None:
        with np.errstate(all="ignore"):
            chunk = np.require(flat[starts[i] : starts[i] + SUM_CHUNK], compute, ["C", "A"])
            if clipvalue is not None:
                chunk = numpy_engine.clamp(chunk, compute.type(clipvalue), np.empty_like(chunk))
            sums[i] = add(chunk)

    pool.run(sum_chunk, range(len(starts)))
    return numpy_engine.fold(sums)
