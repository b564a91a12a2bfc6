"""The update rule in NumPy: the engine that is always there.

Every function works on one block at a time, so that its temporaries stay in the cache; ``cpu.py`` cuts variables
into blocks and puts them on threads. ``numba.py`` has the same functions under the same names.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gpurms.kernels.rule import Flags, Rule

Array = np.ndarray[Any, Any]

BLOCK = 1 << 16
"""Elements the rule takes at once: large enough to hide the calls, small enough for the cache (measured)."""
FAN_IN = 32
LANES = 1024

_scratch = threading.local()


def _temporaries(n: int, compute: np.dtype[Any]) -> tuple[Array, Array]:
    """Two arrays of n elements, kept per thread up to one block."""
    if n > BLOCK:
        return np.empty(n, compute), np.empty(n, compute)
    kept = _scratch.__dict__.get(compute.char)
    if kept is None:
        kept = _scratch.__dict__[compute.char] = np.empty((2, BLOCK), compute)
    return kept[0, :n], kept[1, :n]


def storage(dtype: np.dtype[Any], compute: np.dtype[Any]) -> np.dtype[Any] | None:
    """The type under which ``dense`` takes arrays of ``dtype``: the compute type or none."""
    return dtype if dtype == compute else None


def dense(flags: Flags, compute: np.dtype[Any], storages: Any) -> Callable[..., None]:
    """``f(var, grad, rms, mom, mg, factor, scalars)``: one update of 1-D contiguous arrays, in place.

    All ``storages`` are the compute type: ``storage`` names no other.
    """

    def blocks(var: Array, grad: Array, rms: Array, mom: Array, mg: Array, factor: Any, scalars: Array) -> None:
        for i in range(0, var.size, BLOCK):
            j = i + BLOCK
            update(flags, var[i:j], grad[i:j], rms[i:j], mom[i:j], mg[i:j], factor, scalars)

    return blocks


def update(on: Flags, var: Array, grad: Array, rms: Array, mom: Array, mg: Array, factor: Any, scalars: Array) -> None:
    """THE rule, in place. Each call is one IEEE operation in the compute type; ``a`` and ``b`` are temporaries."""
    lr, one_minus_rho, momentum, epsilon, weight_decay, lr_weight_decay, clipvalue = scalars
    a, b = _temporaries(var.size, var.dtype)
    with np.errstate(all="ignore"):
        g = grad
        if on.clip_value:
            g = clamp(g, clipvalue, a)
        if on.has_factor:
            g = np.multiply(g, factor, out=a)
        if on.maximize:
            g = np.negative(g, out=a)
        if on.l2:
            g = np.add(g, np.multiply(weight_decay, var, out=b), out=a)
        if on.decoupled:
            if g is grad:  # which may be var itself
                np.copyto(a, grad)
                g = a
            var -= np.multiply(lr_weight_decay, var, out=b)

        t = np.multiply(g, g, out=b)
        t -= rms
        t *= one_minus_rho
        rms += t
        d = rms
        if on.centered:
            t = np.subtract(g, mg, out=b)
            t *= one_minus_rho
            mg += t
            d = np.multiply(mg, mg, out=b)
            d = np.subtract(rms, d, out=b)
            d = np.maximum(d, 0, out=b)  # keeps NaN
        if on.eps_in_sqrt:
            den = np.add(d, epsilon, out=b)
            den = np.sqrt(den, out=b)
        else:
            den = np.sqrt(d, out=b)
            den += epsilon

        if on.lr_in_momentum:
            g = np.multiply(lr, g, out=a)
        u = np.divide(g, den, out=a)
        step = u
        if on.has_momentum:
            mom *= momentum
            mom += u
            step = mom
            if on.nesterov:
                step = np.multiply(momentum, mom, out=b)
                step += u
        if not on.lr_in_momentum:
            step = np.multiply(step, lr, out=b)
        var -= step


def clamp(g: Array, clipvalue: Any, out: Array) -> Array:
    """``g`` limited to [-clipvalue, clipvalue], NaN kept. minimum and maximum would leave the sign of 0 open."""
    if out is not g:
        np.copyto(out, g)
    np.copyto(out, clipvalue, where=g > clipvalue)
    np.copyto(out, -clipvalue, where=g < -clipvalue)
    return out


def load(values: Array, rule: Rule, factor: Any) -> Array:
    """Gradient values as the sparse sums take them: a new array of the compute type, clipped one by one."""
    values = values.astype(rule.compute)
    if rule.flags.clip_value:
        clamp(values, rule.scalars[-1], values)
    if rule.flags.has_factor:
        values *= factor
    return values


class Workspace:
    """Memory for the ids of a variable's sparse gradients, kept from step to step: new pages cost like sorting."""

    def __init__(self) -> None:
        self._kept = np.empty(0, np.int64)

    def integers(self, count: int, n: int) -> Array:
        """An int64 array of shape (count, n), valid until the next call. Not kept where far more than needed."""
        if not count * n <= self._kept.size <= 4 * count * n:
            self._kept = np.empty(count * n, np.int64)
        return self._kept[: count * n].reshape(count, n)


def sort_rows(indices: Array, workspace: Workspace) -> tuple[Array, Array, Array]:
    """``order, rows, starts``: positions sorted by row, stably; the rows named, rising; where each one's run starts.

    ``order[starts[k]:starts[k + 1]]`` are the positions of ``rows[k]`` in order of occurrence.
    """
    order = np.argsort(indices, kind="stable")
    ids = indices[order]
    first = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))
    return order, ids[first].astype(np.int64), np.append(first, ids.size)


def row_sums(rule: Rule, value_type: Any) -> Callable[..., None]:
    """``f(values, order, starts, factor, out)``: ``out[k]`` = sum of the values of the k-th row.

    values (n, row_size) of any float type, order (n,), starts (n_rows + 1,), out (n_rows, row_size) of the compute
    type. In the contract's order: occurrences 32 at a time from left to right, then those sums 32 at a time, ...
    """

    def add(values: Array, order: Array, starts: Array, factor: Any, out: Array) -> None:
        with np.errstate(all="ignore"):
            lengths = np.diff(starts)
            runs, run_starts = _runs(starts[:-1], lengths)
            sums = _run_sums(lambda at: load(values[order[at]], rule, factor), run_starts, runs)
            while (lengths > FAN_IN).any():
                lengths = -(-lengths // FAN_IN)
                firsts = np.cumsum(lengths) - lengths
                runs, run_starts = _runs(firsts, lengths)
                sums = _run_sums(partial(sums.take, axis=0), run_starts, runs)
            out[:] = sums

    return add


def _runs(firsts: Array, lengths: Array) -> tuple[Array, Array]:
    """Lengths and starts of the runs of at most 32 into which segments (first, length) fall."""
    n_runs = -(-lengths // FAN_IN)
    segment = np.repeat(np.arange(lengths.size), n_runs)
    nth = np.arange(segment.size) - np.repeat(np.cumsum(n_runs) - n_runs, n_runs)
    return np.minimum(lengths[segment] - nth * FAN_IN, FAN_IN), firsts[segment] + nth * FAN_IN


def _run_sums(take: Callable[[Array], Array], starts: Array, lengths: Array) -> Array:
    """Sum of each run, left to right: all runs at once, one occurrence a step, longest runs first."""
    by_length = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[by_length], lengths[by_length]
    sums = take(starts)
    for k in range(1, int(lengths[0])):
        longer = np.searchsorted(-lengths, -k)
        sums[:longer] += take(starts[:longer] + k)
    unsorted = np.empty_like(sums)
    unsorted[by_length] = sums
    return unsorted


def square_sum(x: Array) -> np.float64:
    """Sum of squares of at most one chunk, in float64: lane i adds elements i, i + 1024, ... in order; see ``fold``."""
    with np.errstate(all="ignore"):
        return fold(np.square(x, dtype=np.float64))


def fold(terms: Array) -> np.float64:
    """Sum of float64 terms: 1,024 lanes from left to right, then the upper half of the lanes onto the lower, to one."""
    rows = max(1, -(-terms.size // LANES))
    padded = np.zeros(rows * LANES)
    padded[: terms.size] = terms
    table = padded.reshape(rows, LANES)
    lanes = table[0]
    for row in table[1:]:
        lanes += row
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return np.float64(lanes[0])


rows = None
"""Sums and update of rows are separate passes here; ``cpu.py`` makes them."""
multi = None
"""NumPy takes arrays, not addresses."""
