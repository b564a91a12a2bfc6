"""What memory allows: a Numba loop that reads three arrays and writes two, on the threads that gpurms uses."""

from __future__ import annotations

import numba
import numpy as np
from numba import types

from bench.measure import Step
from gpurms.kernels import cpu, pool

Array = np.ndarray

_arrays = types.Array(types.float32, 1, "C")


@numba.njit(types.void(_arrays, _arrays, _arrays), nogil=True)
def _pass(var, grad, rms):
    for i in range(var.size):
        g = grad[i]
        var[i] -= g
        rms[i] += g


def floor(var: Array, grad: Array) -> Step:
    """One addition per array written."""
    rms = np.ones_like(var)

    def part(lo: int) -> None:
        hi = lo + cpu.CHUNK
        _pass(var[lo:hi], grad[lo:hi], rms[lo:hi])

    return lambda: pool.run(part, range(0, var.size, cpu.CHUNK))
