"""The update rule as jitted loops: the fast CPU engine, with NumPy's bits.

No ``fastmath`` and no contraction, so each operation is the IEEE one of ``numpy.py``; ``error_model="numpy"`` because
Python's guards the division, and a guarded loop is not vectorised. Flags are constants of the kernels, so a term that
is off costs nothing. Signatures are explicit: everything is compiled before a step changes anything, and read-only
gradients fit. Compiled code is cached on disk; a second process compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types

from gpurms.kernels import numpy as fallback
from gpurms.kernels import pool
from gpurms.kernels.numpy import FAN_IN, LANES, Array
from gpurms.kernels.rule import Flags, Rule

COLUMNS = 1024
"""Columns of a row that are summed at once: seven levels of them stay in the cache whatever the row size."""
LEVELS = 8  # of sums by 32: more than 2**40 occurrences of one row

# Numba finds a cached kernel by its closure's values. Those are plain tuples here; functions among them would be new in
# every process, so all functions that kernels call are globals.

_compiling = pool.fork_safe_lock()


def _jit(signature: Any, **options: Any) -> Callable[[Any], Any]:
    """``numba.njit`` as this module needs it, cached on disk where a cache folder can be written."""

    def compile_(function: Any) -> Any:
        options_ = {"nogil": True, "error_model": "numpy", **options}
        try:
            return numba.njit(signature, cache=True, **options_)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return numba.njit(signature, **options_)(function)

    return compile_


def _inline(function: Any) -> Any:
    """For the bodies of the loops: LLVM inlines them into each kernel and folds the flags ``on``, constants there."""
    return numba.njit(error_model="numpy", forceinline=True)(function)


def _array(dtype: Any, ndim: int = 1, readonly: bool = False) -> types.Array:
    return types.Array(dtype, ndim, "C", readonly=readonly)


@_inline
def load(on, g, factor, clipvalue):  # type: ignore[no-untyped-def]
    """One gradient value as the rule takes it: limited to [-clipvalue, clipvalue] and times the clip factor."""
    clip_value, clip_norm = on[0], on[1]
    if clip_value:
        if g > clipvalue:
            g = clipvalue
        elif g < -clipvalue:
            g = -clipvalue
    if clip_norm:
        g = g * factor
    return g


@_inline
def update(on, g, var, rms, mom, mg, scalars):  # type: ignore[no-untyped-def]
    """THE rule, of scalars: returns var, rms, mom, mg. Each line is as in ``numpy.update``."""
    _, _, maximize, l2, decoupled, centered, has_momentum, nesterov, eps_in_sqrt, lr_in_momentum = on
    lr, one_minus_rho, momentum, epsilon, weight_decay, lr_weight_decay, zero = scalars
    if maximize:
        g = -g
    if l2:
        g = g + weight_decay * var
    if decoupled:
        var = var - lr_weight_decay * var

    rms = rms + (g * g - rms) * one_minus_rho
    d = rms
    if centered:
        mg = mg + (g - mg) * one_minus_rho
        d = rms - mg * mg
        if d < zero:  # keeps NaN
            d = zero
    if eps_in_sqrt:
        den = np.sqrt(d + epsilon)
    else:
        den = np.sqrt(d) + epsilon

    if lr_in_momentum:
        g = lr * g
    u = g / den
    step = u
    if has_momentum:
        mom = momentum * mom + u
        step = mom
        if nesterov:
            step = momentum * mom + u
    if not lr_in_momentum:
        step = step * lr
    return var - step, rms, mom, mg


@_inline
def update_all(on, clip, var, grad, rms, mom, mg, factor, scalars):  # type: ignore[no-untyped-def]
    """The rule over 1-D arrays: the loop of dense variables and of rows; gradients are clipped if ``clip``."""
    has_momentum, centered = on[6], on[5]
    zero = scalars.dtype.type(0)
    numbers = (scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5], zero)
    clipvalue = scalars[6]
    for i in range(var.size):
        new_var, new_rms, new_mom, new_mg = update(
            on,
            load(on, grad[i], factor, clipvalue) if clip else grad[i],
            var[i],
            rms[i],
            mom[i] if has_momentum else zero,
            mg[i] if centered else zero,
            numbers,
        )
        var[i] = new_var
        rms[i] = new_rms
        if has_momentum:
            mom[i] = new_mom
        if centered:
            mg[i] = new_mg


@_inline
def add_run(on, values, order, start, stop, left, factor, clipvalue, run):  # type: ignore[no-untyped-def]
    """Sum of up to 32 values of one row over columns [left, left + run.size), left to right, into ``run``."""
    value = values[order[start], left : left + run.size]
    for c in range(run.size):
        run[c] = load(on, value[c], factor, clipvalue)
    for i in range(start + 1, stop):
        value = values[order[i], left : left + run.size]
        for c in range(run.size):
            run[c] += load(on, value[c], factor, clipvalue)


@numba.njit(error_model="numpy")
def carry(sums, level, item, width):  # type: ignore[no-untyped-def]
    """Add the finished run ``sums[level]`` to the level above as its item-th, making room there first."""
    top = level + 1
    while item > 0 and item % FAN_IN == 0:
        item = item // FAN_IN - 1
        top += 1
    run, finished = sums[top, :width], sums[top - 1, :width]
    for c in range(width):
        run[c] = run[c] + finished[c] if item > 0 else finished[c]
    for below in range(top - 1, level, -1):
        run, finished = sums[below, :width], sums[below - 1, :width]
        for c in range(width):
            run[c] = finished[c]


@numba.njit(error_model="numpy")
def add_tree(on, values, order, start, stop, left, width, factor, clipvalue, sums):  # type: ignore[no-untyped-def]
    """Sum of a row that occurs more than 32 times, left in ``sums[level]``; returns that level.

    ``sums[k]`` holds the run being added at level k: up to 32 values at level 0, up to 32 sums of level k - 1 above.
    A run moves up only when the next one of its level begins, so the top level in use ends up with the total.
    """
    run = sums[0, :width]
    n = (stop - start + FAN_IN - 1) // FAN_IN
    for i in range(n):
        if i > 0:
            carry(sums, 0, i - 1, width)
        first = start + i * FAN_IN
        add_run(on, values, order, first, min(first + FAN_IN, stop), left, factor, clipvalue, run)
    level = 0
    while n > 1:
        carry(sums, level, n - 1, width)
        n = (n + FAN_IN - 1) // FAN_IN
        level += 1
    return level


@cache
def _dense(flags: tuple[bool, ...], compute: np.dtype[Any]) -> Any:
    scalar = numba.from_dtype(compute)
    array = _array(scalar)
    signature = types.void(array, _array(scalar, readonly=True), array, array, array, scalar, array)

    @_jit(signature)
    def dense(var, grad, rms, mom, mg, factor, scalars):  # type: ignore[no-untyped-def]
        update_all(flags, True, var, grad, rms, mom, mg, factor, scalars)

    return dense


def dense(flags: Flags, compute: np.dtype[Any]) -> Callable[..., None]:
    """``f(var, grad, rms, mom, mg, factor, scalars)``: one update of 1-D contiguous arrays of the compute type."""
    with _compiling:
        kernel: Callable[..., None] = _dense(tuple(flags), compute)
    return kernel


@cache
def _row_sums(flags: tuple[bool, ...], compute: np.dtype[Any]) -> Any:
    scalar = numba.from_dtype(compute)
    order = _array(types.int64, readonly=True)
    table = _array(scalar, 2)
    signature = types.void(_array(scalar, 2, readonly=True), order, order, scalar, scalar, table, table)

    @_jit(signature)
    def row_sums(values, order, starts, factor, clipvalue, sums, out):  # type: ignore[no-untyped-def]
        n_rows, row_size = out.shape
        for left in range(0, row_size, COLUMNS):
            width = min(COLUMNS, row_size - left)
            for k in range(n_rows):
                start, stop = starts[k], starts[k + 1]
                run = out[k, left : left + width]
                if stop - start <= FAN_IN:
                    add_run(flags, values, order, start, stop, left, factor, clipvalue, run)
                else:
                    level = add_tree(flags, values, order, start, stop, left, width, factor, clipvalue, sums)
                    total = sums[level, :width]
                    for c in range(width):
                        run[c] = total[c]

    return row_sums


def row_sums(rule: Rule) -> Callable[..., None]:
    """``f(values, order, starts, factor, out)``: ``out[k]`` = sum of the values of the k-th row, in tree order.

    values (n, row_size) contiguous and of the compute type; the rest as in ``numpy.row_sums``.
    """
    clips = Flags(*rule.flags[:2])  # nothing else matters to a sum
    with _compiling:
        kernel = _row_sums(tuple(clips), rule.compute)
    clipvalue = rule.scalars[-1]

    def loop(values: Array, order: Array, starts: Array, factor: Any, out: Array) -> None:
        kernel(values, order, starts, factor, clipvalue, _levels(out.shape[1], rule.compute), out)

    return loop


def _levels(row_size: int, compute: np.dtype[Any]) -> Array:
    return np.empty((LEVELS, min(row_size, COLUMNS)), compute)


@cache
def _rows(flags: tuple[bool, ...], compute: np.dtype[Any]) -> Any:
    has_momentum, centered = flags[6], flags[5]
    scalar = numba.from_dtype(compute)
    table, positions = _array(scalar, 2), _array(types.int64, readonly=True)
    values = _array(scalar, 2, readonly=True)
    tables = (table, values, table, table, table)
    signature = types.void(*tables, positions, positions, positions, scalar, _array(scalar), table)

    @_jit(signature)
    def rows_(var, values, rms, mom, mg, order, rows, starts, factor, scalars, sums):  # type: ignore[no-untyped-def]
        row_size, clipvalue = var.shape[1], scalars[6]
        for left in range(0, row_size, COLUMNS):
            right = min(left + COLUMNS, row_size)
            width = right - left
            run = unused = sums[0, :width]
            for k in range(rows.size):
                row, start, stop, level = rows[k], starts[k], starts[k + 1], 0
                if stop - start <= FAN_IN:
                    add_run(flags, values, order, start, stop, left, factor, clipvalue, run)
                else:
                    level = add_tree(flags, values, order, start, stop, left, width, factor, clipvalue, sums)
                update_all(
                    flags,
                    False,
                    var[row, left:right],
                    sums[level, :width],
                    rms[row, left:right],
                    mom[row, left:right] if has_momentum else unused,
                    mg[row, left:right] if centered else unused,
                    factor,
                    scalars,
                )

    return rows_


def rows(rule: Rule) -> Callable[..., None]:
    """``f(var, values, rms, mom, mg, order, rows, starts, factor)``: sums and update of rows in one pass, in place.

    Tables (n, row_size) and values contiguous and of the compute type; order, rows, starts from ``sort_rows``.
    """
    with _compiling:
        kernel = _rows(tuple(rule.flags), rule.compute)
    scalars = rule.scalars

    def loop(
        var: Array, values: Array, rms: Array, mom: Array, mg: Array,
        order: Array, rows: Array, starts: Array, factor: Any,
    ) -> None:  # fmt: skip
        sums = _levels(var.shape[1], rule.compute)
        kernel(var, values, rms, mom, mg, order, rows, starts, factor, scalars, sums)

    return loop


def sort_rows(indices: Array) -> tuple[Array, Array, Array]:
    """``order, rows, starts`` as ``numpy.sort_rows`` gives them, by a radix sort over the bits that the ids use.

    Row and position share one 64-bit word; where they do not fit, NumPy sorts.
    """
    n = indices.size
    position_bits, row_bits = n.bit_length(), int(indices.max()).bit_length()
    if position_bits + row_bits > 63:
        return fallback.sort_rows(indices)
    with _compiling:
        kernel = _sort_rows()
    order, rows, starts = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n + 1, np.int64)
    n_rows = kernel(indices.astype(np.int64), position_bits, row_bits, order, rows, starts)
    return order, rows[:n_rows], starts[: n_rows + 1]


@cache
def _sort_rows() -> Any:
    integers = _array(types.int64)
    signature = types.int64(integers, types.int64, types.int64, integers, integers, integers)

    @_jit(signature)
    def sort_rows(words, position_bits, row_bits, order, rows, starts):  # type: ignore[no-untyped-def]
        n = words.size
        for i in range(n):
            words[i] = (words[i] << position_bits) | i
        other = np.empty(n, np.int64)
        n_passes = (row_bits + 10) // 11
        for nth in range(n_passes):
            low = nth * row_bits // n_passes
            digits = 1 << ((nth + 1) * row_bits // n_passes - low)
            shift = position_bits + low
            ends = np.zeros(digits + 1, np.int64)
            for i in range(n):
                ends[((words[i] >> shift) & (digits - 1)) + 1] += 1
            for digit in range(digits):
                ends[digit + 1] += ends[digit]
            for i in range(n):
                digit = (words[i] >> shift) & (digits - 1)
                other[ends[digit]] = words[i]
                ends[digit] += 1
            words, other = other, words
        n_rows = 0
        for i in range(n):
            row = words[i] >> position_bits
            order[i] = words[i] & ((1 << position_bits) - 1)
            if i == 0 or row != rows[n_rows - 1]:
                rows[n_rows] = row
                starts[n_rows] = i
                n_rows += 1
        starts[n_rows] = n
        return n_rows

    return sort_rows


def square_sum(x: Array) -> np.float64:
    """Sum of squares of one contiguous chunk, as ``numpy.square_sum`` adds it."""
    with _compiling:
        kernel = _square_sum(x.dtype)
    return np.float64(kernel(x))


@cache
def _square_sum(compute: np.dtype[Any]) -> Any:
    @_jit(types.float64(_array(numba.from_dtype(compute), readonly=True)))
    def square_sum(x):  # type: ignore[no-untyped-def]
        lanes = np.zeros(LANES)
        for left in range(0, x.size, LANES):
            row = x[left : left + LANES]
            for lane in range(row.size):
                term = np.float64(row[lane])
                lanes[lane] += term * term
        while lanes.size > 1:
            upper = lanes[lanes.size // 2 :]
            lanes = lanes[: upper.size]
            for lane in range(upper.size):
                lanes[lane] += upper[lane]
        return lanes[0]

    return square_sum
