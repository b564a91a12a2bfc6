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

from gpurms.kernels.jit import array_at, compiling, contiguous, inline, jit
from gpurms.kernels.numpy import FAN_IN, LANES, Array
from gpurms.kernels.prefetch import prefetch_row
from gpurms.kernels.radix import sort_rows as sort_rows
from gpurms.kernels.rule import FLOAT32, FLOAT64, Flags, Rule
from gpurms.kernels.storage import VIEWS, narrow, widen

COLUMNS = 1024
"""Columns of a row that are summed at once: seven levels of them stay in the cache whatever the row size."""
SUMS = 1 << 16
"""Elements of row sums that are made before they are used: they stay in the cache."""
VALUES_AHEAD, ROWS_AHEAD = 16, 8
"""How far before their use values and rows are asked for (measured; no effect on results)."""
LEVELS = 8  # of sums by 32: more than 2**40 occurrences of one row


@inline
def load(on, g, factor, clipvalue):
    """One gradient value as the rule takes it: limited to [-clipvalue, clipvalue] and times the clip factor."""
    clip_value, has_factor = on[0], on[1]
    if clip_value:
        if g > clipvalue:
            g = clipvalue
        elif g < -clipvalue:
            g = -clipvalue
    if has_factor:
        g = g * factor
    return g


@inline
def update(on, g, var, rms, mom, mg, scalars):
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


@inline
def update_all(on, var, grad, rms, mom, mg, factor, scalars):
    """The rule over 1-D arrays of any storage type, the loop of dense variables and of rows."""
    has_momentum, centered = on[6], on[5]
    zero = scalars.dtype.type(0)
    numbers = (scalars[0], scalars[1], scalars[2], scalars[3], scalars[4], scalars[5], zero)
    clipvalue = scalars[6]
    for i in range(var.size):
        new_var, new_rms, new_mom, new_mg = update(
            on,
            load(on, widen(grad[i], zero), factor, clipvalue),
            widen(var[i], zero),
            widen(rms[i], zero),
            widen(mom[i], zero) if has_momentum else zero,
            widen(mg[i], zero) if centered else zero,
            numbers,
        )
        var[i] = narrow(new_var, var[i])
        rms[i] = narrow(new_rms, rms[i])
        if has_momentum:
            mom[i] = narrow(new_mom, mom[i])
        if centered:
            mg[i] = narrow(new_mg, mg[i])


@inline
def add_run(on, values, order, start, stop, left, factor, clipvalue, run):
    """Sum of up to 32 values of one row over columns [left, left + run.size), left to right, into ``run``."""
    zero = run.dtype.type(0)
    value = values[order[start], left : left + run.size]
    for c in range(run.size):
        run[c] = load(on, widen(value[c], zero), factor, clipvalue)
    for i in range(start + 1, stop):
        value = values[order[i], left : left + run.size]
        for c in range(run.size):
            run[c] += load(on, widen(value[c], zero), factor, clipvalue)


@numba.njit(error_model="numpy")
def carry(sums, level, item, width):
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
def add_tree(on, values, order, start, stop, left, width, factor, clipvalue, sums):
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


def storage(dtype: np.dtype[Any], compute: np.dtype[Any]) -> np.dtype[Any] | None:
    """The type under which the kernels take arrays of ``dtype``, or None if they do not.

    Not 16-bit slots of float64 variables: their values would be rounded twice on the way through float32.
    """
    if dtype in (FLOAT32, FLOAT64):
        return dtype
    return VIEWS.get(dtype.name) if compute == FLOAT32 else None


Types = tuple[np.dtype[Any], np.dtype[Any], np.dtype[Any]]


@cache
def _dense(flags: tuple[bool, ...], compute: np.dtype[Any], storages: Types) -> Any:
    scalar = numba.from_dtype(compute)
    var_type, grad_type, slot_type = map(numba.from_dtype, storages)
    slot = contiguous(slot_type)
    grad = contiguous(grad_type, readonly=True)
    signature = types.void(contiguous(var_type), grad, slot, slot, slot, scalar, contiguous(scalar))

    @jit(signature, flags, (compute, *storages))
    def dense(var, grad, rms, mom, mg, factor, scalars):
        update_all(flags, var, grad, rms, mom, mg, factor, scalars)

    return dense


def dense(flags: Flags, compute: np.dtype[Any], storages: Types) -> Callable[..., None]:
    """``f(var, grad, rms, mom, mg, factor, scalars)``: one update of 1-D contiguous arrays, in place.

    ``storages`` are the types of variable, gradient and slots, as ``storage`` names them.
    """
    with compiling:
        kernel: Callable[..., None] = _dense(tuple(flags), compute, storages)
    return kernel


@cache
def _multi(flags: tuple[bool, ...], compute: np.dtype[Any], storages: Types) -> Any:
    centered, has_momentum = flags[5], flags[6]
    scalar = numba.from_dtype(compute)
    like_var, like_grad, like_slot = (np.empty(0, storage) for storage in storages)
    var_type, grad_type, slot_type = (contiguous(numba.from_dtype(storage)) for storage in storages)
    table = contiguous(types.int64, 2)
    signature = types.void(table, types.intp, types.intp, scalar, contiguous(scalar), var_type, grad_type, slot_type)

    @jit(signature, flags, (compute, *storages))
    def multi(table, first, last, factor, scalars, like_var, like_grad, like_slot):
        for i in range(first, last):
            n = table[i, 5]
            rms = array_at(table[i, 2], n, like_slot)
            update_all(
                flags,
                array_at(table[i, 0], n, like_var),
                array_at(table[i, 1], n, like_grad),
                rms,
                array_at(table[i, 3], n, like_slot) if has_momentum else rms,
                array_at(table[i, 4], n, like_slot) if centered else rms,
                factor,
                scalars,
            )

    def run(table: Array, first: int, last: int, factor: Any, scalars: Array) -> None:
        multi(table, first, last, factor, scalars, like_var, like_grad, like_slot)

    return run


def multi(flags: Flags, compute: np.dtype[Any], storages: Types) -> Callable[..., None]:
    """``f(table, first, last, factor, scalars)``: updates of 1-D arrays given by their addresses, in place.

    table (n, 6) int64 has the addresses of var, grad, rms, mom and mg, and their length; rows [first, last) are
    updated. ``storages`` as in ``dense``.
    """
    with compiling:
        kernel: Callable[..., None] = _multi(tuple(flags), compute, storages)
    return kernel


@cache
def _row_sums(flags: tuple[bool, ...], compute: np.dtype[Any], value_type: np.dtype[Any]) -> Any:
    scalar = numba.from_dtype(compute)
    order = contiguous(types.int64, readonly=True)
    table, values = contiguous(scalar, 2), contiguous(numba.from_dtype(value_type), 2, readonly=True)
    signature = types.void(values, order, order, scalar, scalar, table, table)

    @jit(signature, flags, (compute, value_type))
    def row_sums(values, order, starts, factor, clipvalue, sums, out):
        n_rows, row_size = out.shape
        for left in range(0, row_size, COLUMNS):
            width = min(COLUMNS, row_size - left)
            for k in range(n_rows):
                start, stop = starts[k], starts[k + 1]
                run = out[k, left : left + width]
                for i in range(start + VALUES_AHEAD, min(stop + VALUES_AHEAD, order.size)):
                    prefetch_row(values, order[i], left, left + width)
                if stop - start <= FAN_IN:
                    add_run(flags, values, order, start, stop, left, factor, clipvalue, run)
                else:
                    level = add_tree(flags, values, order, start, stop, left, width, factor, clipvalue, sums)
                    total = sums[level, :width]
                    for c in range(width):
                        run[c] = total[c]

    return row_sums


def row_sums(rule: Rule, value_type: np.dtype[Any]) -> Callable[..., None]:
    """``f(values, order, starts, factor, out)``: ``out[k]`` = sum of the values of the k-th row, in tree order.

    values (n, row_size) contiguous and of a storage type; the rest as in ``numpy.row_sums``.
    """
    clips = Flags(*rule.flags[:2])  # nothing else matters to a sum
    with compiling:
        kernel = _row_sums(tuple(clips), rule.compute, value_type)
    clipvalue = rule.scalars[-1]

    def loop(values: Array, order: Array, starts: Array, factor: Any, out: Array) -> None:
        kernel(values, order, starts, factor, clipvalue, _levels(out.shape[1], rule.compute), out)

    return loop


def _levels(row_size: int, compute: np.dtype[Any]) -> Array:
    return np.empty((LEVELS, min(row_size, COLUMNS)), compute)


@cache
def _update_rows(flags: tuple[bool, ...], compute: np.dtype[Any], storages: Types) -> Any:
    has_momentum, centered = flags[6], flags[5]
    scalar = numba.from_dtype(compute)
    var_type, grad_type, slot_type = map(numba.from_dtype, storages)
    slot, positions = contiguous(slot_type, 2), contiguous(types.int64, readonly=True)
    grads = contiguous(grad_type, 2, readonly=True)
    signature = types.void(contiguous(var_type, 2), grads, slot, slot, slot, positions, contiguous(scalar))

    @jit(signature, flags, (compute, *storages))
    def update_rows(var, sums, rms, mom, mg, rows, scalars):
        factor = scalars.dtype.type(1)
        for k in range(rows.size):
            row = rows[k]
            if k + ROWS_AHEAD < rows.size:
                ahead, width = rows[k + ROWS_AHEAD], var.shape[1]
                prefetch_row(var, ahead, 0, width)
                prefetch_row(rms, ahead, 0, width)
                if has_momentum:
                    prefetch_row(mom, ahead, 0, width)
                if centered:
                    prefetch_row(mg, ahead, 0, width)
            update_all(
                flags,
                var[row],
                sums[k],
                rms[row],
                mom[row] if has_momentum else rms[row],
                mg[row] if centered else rms[row],
                factor,
                scalars,
            )

    return update_rows


def rows(rule: Rule, storages: Types) -> Callable[..., None]:
    """``f(var, values, rms, mom, mg, order, rows, starts, factor)``: rows summed and updated while in the cache.

    Tables (n, row_size) and values contiguous, of the ``storages`` of variable, values and slots; order, rows, starts
    from ``sort_rows``.
    """
    compute, scalars = rule.compute, rule.scalars
    var_type, value_type, slot_type = storages
    add = row_sums(rule, value_type)
    unclipped = rule.flags._replace(clip_value=False, has_factor=False)  # the sums are of clipped values
    with compiling:
        kernel = _update_rows(tuple(unclipped), compute, (var_type, compute, slot_type))

    def loop(
        var: Array, values: Array, rms: Array, mom: Array, mg: Array,
        order: Array, rows: Array, starts: Array, factor: Any,
    ) -> None:  # fmt: skip
        n = max(1, SUMS // var.shape[1])
        sums = np.empty((min(n, rows.size), var.shape[1]), compute)
        for lo in range(0, rows.size, n):
            some = rows[lo : lo + n]
            add(values, order, starts[lo : lo + n + 1], factor, sums[: some.size])
            kernel(var, sums[: some.size], rms, mom, mg, some, scalars)

    return loop


def square_sum(x: Array) -> np.float64:
    """Sum of squares of one contiguous chunk, as ``numpy.square_sum`` adds it."""
    with compiling:
        kernel = _square_sum(x.dtype)
    return np.float64(kernel(x))


@cache
def _square_sum(compute: np.dtype[Any]) -> Any:
    @jit(types.float64(contiguous(numba.from_dtype(compute), readonly=True)), (compute,))
    def square_sum(x):
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
