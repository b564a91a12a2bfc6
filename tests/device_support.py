# ruff: noqa: E402 - without CuPy the modules that import this one are skipped
"""Kernels and helpers for the tests of the emulated device."""

from collections.abc import Callable

import numpy as np
import pytest

cupy = pytest.importorskip("cupy", reason="the emulated device runs the real CuPy")
ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 arrays")

from tests.device import cupy_on_cpu as emulation
from tests.device.cupy_on_cpu import cupy_on_cpu
from tests.device.machine import Machine
from tests.device.ptx import Fault

try:
    cupy.cuda.nvrtc.getVersion()
except Exception as error:
    pytest.skip(f"NVRTC cannot be loaded: {error}", allow_module_level=True)

__all__ = [
    "CUDARuntimeError",
    "Fault",
    "Machine",
    "cupy",
    "cupy_on_cpu",
    "emulation",
    "ml_dtypes",
    "raw",
    "results",
    "saxpy",
]
CUDARuntimeError = cupy.cuda.runtime.CUDARuntimeError
SEEDS = range(12)

KERNELS = r"""
extern "C" __global__ void saxpy(float a, const float* x, float* y, long long n)
{
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}

struct Table { const float* source[3]; float* target; float scale; };

extern "C" __global__ void gather(const __grid_constant__ Table table, int n)
{
    int i = threadIdx.x;
    if (i < n) table.target[i] = table.scale * table.source[blockIdx.x][i];
}

extern "C" __global__ void block_sum(const double* x, double* sums, int n)
{
    __shared__ double part[64];
    int i = blockIdx.x * 64 + threadIdx.x;
    part[threadIdx.x] = i < n ? x[i] : 0.0;
    __syncthreads();
    for (int step = 32; step > 0; step /= 2) {
        if (threadIdx.x < step) part[threadIdx.x] += part[threadIdx.x + step];
        __syncthreads();
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = part[0];
}

extern "C" __global__ void store_int64(long long* out, long long value) { *out = value; }
extern "C" __global__ void store_double(double* out, double value) { *out = value; }
extern "C" __global__ void store_bool(signed char* out, bool value) { *out = value; }
extern "C" __global__ void store_null(long long* out, const float* value) { *out = (long long)value; }
"""


def raw(name: str) -> "cupy.RawKernel":
    return cupy.RawKernel(KERNELS, name, options=("--fmad=false",))


def saxpy(a: float, x: "cupy.ndarray", y: "cupy.ndarray", stream: object = None) -> None:
    raw("saxpy")((-(-x.size // 64),), (64,), (np.float32(a), x, y, x.size), stream=stream)


def results(action: Callable[[], float], **kwargs: int) -> set[float]:
    """What an action returns under many orders of the same work."""
    found = set()
    for seed in SEEDS:
        with cupy_on_cpu(deferred=True, seed=seed, **kwargs):
            found.add(action())
    return found
