"""Rows in order: a stable radix sort over just the bits that the ids use, several times faster than ``argsort``."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from gpurms.kernels import numpy as fallback
from gpurms.kernels.jit import compiling, contiguous, jit
from gpurms.kernels.numpy import Array


def sort_rows(indices: Array) -> tuple[Array, Array, Array]:
    """``order, rows, starts`` as ``numpy.sort_rows`` gives them, by a radix sort over the bits that the ids use.

    Row and position share one 64-bit word; where they do not fit, NumPy sorts.
    """
    n = indices.size
    position_bits, row_bits = n.bit_length(), int(indices.max()).bit_length()
    if position_bits + row_bits > 63:
        return fallback.sort_rows(indices)
    with compiling:
        kernel = _sort_rows()
    order, rows, starts = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n + 1, np.int64)
    n_rows = kernel(indices.astype(np.int64), position_bits, row_bits, order, rows, starts)
    return order, rows[:n_rows], starts[: n_rows + 1]


@cache
def _sort_rows() -> Any:
    integers = contiguous(types.int64)
    signature = types.int64(integers, types.int64, types.int64, integers, integers, integers)

    @jit(signature)
    def sort_rows(words, position_bits, row_bits, order, rows, starts):
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
