"""Rows in order: a stable radix sort over just the bits that the ids use, several times faster than ``argsort``."""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types

from gpurms.kernels import numpy as fallback
from gpurms.kernels.jit import compiling, contiguous, jit
from gpurms.kernels.numpy import Array, Workspace


def sort_rows(indices: Array, workspace: Workspace) -> tuple[Array, Array, Array]:
    """``order, rows, starts`` as ``numpy.sort_rows`` gives them; they live in the workspace.

    Row and position share one 64-bit word; where they do not fit, NumPy sorts.
    """
    n = indices.size
    position_bits, row_bits = n.bit_length(), int(indices.max()).bit_length()
    if position_bits + row_bits > 63:
        return fallback.sort_rows(indices, workspace)
    with compiling:
        kernel = _sort_rows(indices.dtype)
    order, rows, starts, words = workspace.integers(4, n + 1)
    n_rows = kernel(np.ascontiguousarray(indices), position_bits, row_bits, order, rows, starts, words)
    return order[:n], rows[:n_rows], starts[: n_rows + 1]


@cache
def _sort_rows(index_type: np.dtype[Any]) -> Any:
    integers = contiguous(types.int64)
    indices_ = contiguous(numba.from_dtype(index_type), readonly=True)
    signature = types.int64(indices_, types.int64, types.int64, integers, integers, integers, integers)

    @jit(signature, (index_type,))
    def sort_rows(indices, position_bits, row_bits, order, rows, starts, words):
        n = indices.size
        n_passes = max(1, (row_bits + 10) // 11)
        source, target = (rows, words) if n_passes % 2 == 0 else (words, rows)  # the last pass ends in ``rows``
        for nth in range(n_passes):
            low = nth * row_bits // n_passes
            digits = 1 << ((nth + 1) * row_bits // n_passes - low)
            ends = np.zeros(digits + 1, np.int64)
            for i in range(n):
                ends[((np.int64(indices[i]) >> low) & (digits - 1)) + 1] += 1
            for digit in range(digits):
                ends[digit + 1] += ends[digit]
            for i in range(n):
                word = source[i] if nth else (np.int64(indices[i]) << position_bits) | i
                digit = (word >> (position_bits + low)) & (digits - 1)
                target[ends[digit]] = word
                ends[digit] += 1
            source, target = target, source
        n_rows = 0
        for i in range(n):
            row = rows[i] >> position_bits
            order[i] = rows[i] & ((1 << position_bits) - 1)
            if n_rows == 0 or row != rows[n_rows - 1]:
                rows[n_rows] = row  # n_rows <= i: behind what is still to be read
                starts[n_rows] = i
                n_rows += 1
        starts[n_rows] = n
        return n_rows

    return sort_rows
