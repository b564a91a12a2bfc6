"""What the contract's tests run on: NumPy and Numba on the CPU, and the CUDA kernels on a device.

The device is a real one, with the engine "cupy", or else the emulated one, with "cuda-on-cpu": CuPy itself and the
kernels as NVRTC compiles them, interpreted. Where there is neither, the tests are skipped with the reason.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest

import gpurms
from gpurms import backend
from gpurms.kernels import cpu

CPU = ("numpy", "numba")
DEVICE = ("cuda-on-cpu", pytest.param("cupy", marks=pytest.mark.gpu))


class Engine:
    """Where the arrays of a test live; `xp` is their library. An emulated device is slow."""

    def __init__(self, name: str, xp: ModuleType, is_emulated: bool = False) -> None:
        self.name = name
        self.xp = xp
        self.is_emulated = is_emulated

    def put(self, x: Any) -> Any:
        """A NumPy array, or an `IndexedSlices` of them, for this engine, in the same memory layout.

        NumPy's engines take the array itself.
        """
        if self.xp is np:
            return x
        if isinstance(x, gpurms.IndexedSlices):
            return gpurms.IndexedSlices(self.put(x.values), self.put(x.indices), x.dense_shape)
        return _on_device(self.xp, np.asarray(x))

    def variable(self, x: Any, name: str | None = None, **options: Any) -> gpurms.Variable:
        """A variable on `put(x)`."""
        return gpurms.Variable(self.put(x), name, **options)


def _on_device(cupy: Any, array: np.ndarray) -> Any:
    """A copy with the strides of the array; where its address is odd, 16-byte alignment is missing."""
    if array.size == 0:
        return cupy.empty(array.shape, array.dtype)
    low, high = np.lib.array_utils.byte_bounds(array)
    shift = 0 if array.flags.aligned else array.itemsize
    at = cupy.empty(high - low + shift, np.uint8).data + (array.ctypes.data - low + shift)
    bits = np.dtype(f"u{array.itemsize}")
    cupy.ndarray(array.shape, bits, at, array.strides)[...] = cupy.array(array.view(bits))
    return cupy.ndarray(array.shape, array.dtype, at, array.strides)


@contextmanager
def running(name: str) -> Iterator[Engine]:
    """Run the block on an engine; skips the test where it cannot be had."""
    if name in CPU:
        with cpu.use_engine(name), _array_module("numpy"):
            yield Engine(name, np)
        return
    backend._cupy.cache_clear()  # which may be of a device that was emulated
    real, problem = backend._cupy()
    if name == "cupy":
        if real is None:
            pytest.skip(f"no usable device: {problem}")
        with _array_module("cupy"):
            yield Engine(name, real)
    elif real is not None:
        pytest.skip("the tests run on the real device")
    else:
        with emulated():
            yield Engine(name, sys.modules["cupy"], is_emulated=True)


@contextmanager
def emulated(n_devices: int = 1, **options: Any) -> Iterator[Any]:
    """`cupy_on_cpu` under the library, which forgets what it knows of other devices. Yields the machine."""
    if problem := _cannot_emulate():
        pytest.skip(f"no device can be emulated: {problem}")
    from tests.device.cupy_on_cpu import cupy_on_cpu

    _forget()
    try:
        with cupy_on_cpu(n_devices, **options) as machine, _array_module("cupy"):
            yield machine
    finally:
        _forget()


def _array_module(name: str) -> Any:
    return mock.patch.dict(os.environ, GPURMS_BACKEND=name)


@cache
def _cannot_emulate() -> str:
    try:
        import cupy

        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # CuPy and what is below it fail in many ways
        return f"{type(error).__name__}: {error}"
    return ""


def _forget() -> None:
    """Drop what the library has cached of a device: whether it answers, its backend, kernels and limits."""
    backend._cupy.cache_clear()
    backend._cupy_backend.cache_clear()
    for kind in [kind for kind, home in backend._backends.items() if home is not None and home.name == "CuPy"]:
        del backend._backends[kind]
    if launch := sys.modules.get("gpurms.kernels.launch"):
        for cached in (launch.kernel, launch.elementwise, launch.parameter_bytes):
            cached.cache_clear()
