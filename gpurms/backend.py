"""Which library an array belongs to, and what the optimizer asks of that library.

An array knows where it lives, so there is no current backend: ``of(array)`` looks its type up in one dict. CuPy, Numba
and PyTorch are never imported here before an array or the caller asks for them.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from gpurms.clipping import Clip
from gpurms.host import NumPy
from gpurms.kernels import cpu
from gpurms.kernels.rule import Step, Update
from gpurms.place import Place

Array = Any


class Backend(Protocol):
    """One array library under the optimizer."""

    name: str

    def view(self, array: Array) -> Array:
        """The array as the plain array type of the library, sharing memory."""
        ...

    def device(self, array: Array) -> int | None:
        """The device that holds the array; None for the host."""
        ...

    def near(self, array: Array) -> AbstractContextManager[Any]:
        """Within this context, new arrays are made and work is done where the array is."""
        ...

    def owner(self, array: Array) -> int:
        """Equal for arrays that may share memory: the id of its owner, or 0 for all memory that none is known to own.

        Memory from outside (buffers, memory maps, tensors of other libraries) may come with a new owner at every
        export.
        """
        ...

    def writeable(self, arrays: Sequence[Array]) -> bool:
        """Whether all of the arrays may be written to."""
        ...

    def scalar(self, value: Any) -> Array | None:
        """A scalar object of the library, such as ``numpy.float32(1)``, as a 0-d array; None for anything else."""
        ...

    def key(self, array: Array) -> Any:
        """What tells variables apart: memory and layout, or the object itself where there is no memory."""
        ...

    def bounds(self, array: Array) -> tuple[int, int]:
        """First address of the array's memory and the address behind its last."""
        ...

    def place(self, view: Array) -> Place | None:
        """Where in its owner a view lies, or None for an array that is no view."""
        ...

    def find(self, place: Place) -> Array | None:
        """The view at a place, or None if the owner has been copied into another layout."""
        ...

    def full(self, like: Array, value: float, dtype: np.dtype[Any]) -> Array:
        """A new array beside ``like``, of its shape, contiguous, filled."""
        ...

    def copy(self, array: Array) -> Array:
        """A copy beside the array."""
        ...

    def host(self, array: Array) -> np.ndarray[Any, Any]:
        """A copy in host memory."""
        ...

    def numbers(self, value: Any, where: str) -> Array:
        """Array-likes as an array, of the library or of NumPy."""
        ...

    def convert(self, like: Array, value: Any, where: str) -> Array:
        """``value`` as an array that can be written into ``like``; errors name ``where``."""
        ...

    def write(self, array: Array, values: Array) -> None:
        """Copy what ``convert`` returned into the array."""
        ...

    def is_capturing(self, device: int | None) -> bool:
        """Whether work for the device is being recorded in a graph instead of running."""
        ...

    def send_scalars(self, live: Mapping[Any, Array], scalars_of: Callable[[np.dtype[Any]], Any]) -> None:
        """Write the scalars of each compute type to where captured steps read them."""
        ...

    def increment(self, counter: Array) -> None:
        """Add 1 to a 0-d array."""
        ...

    def first_outside(self, requests: Sequence[tuple[Array, int]]) -> tuple[int, int] | None:
        """Of (indices, n_rows), the first request with an index outside [0, n_rows), and the first such offset."""
        ...

    def indices(self, array: Array, indices: Any) -> Array:
        """Integer indices beside ``array``, of any shape, as int32 or int64."""
        ...

    def add_rows(self, dense: Array, indices: Array, values: Array) -> Array:
        """``dense`` plus values at rows, repeated ones included."""
        ...

    def square_sums(
        self, grads: Sequence[Array], computes: Sequence[np.dtype[Any]], clipvalue: float | None
    ) -> list[float]:
        """The sum of squares of each gradient, on the host."""
        ...

    def clip_factors(
        self, grads: Sequence[Array], computes: Sequence[np.dtype[Any]], clip: Clip, factor: float | None
    ) -> list[Any]:
        """The clip factor of each gradient, in its compute type and where it is; ``factor``: known already."""
        ...

    def plan(self, updates: Sequence[Update]) -> Callable[[], None]:
        """Prepare updates of distinct variables; the function returned applies them."""
        ...

    def repeat(self, plan: Any, clip: Clip | None) -> Callable[[np.ndarray[Any, Any], Step], None] | None:
        """A function that applies other gradients, of the same types and layouts, given by their addresses.

        It checks nothing but that no graph is captured. None if the library or this plan has no such short cut.
        """
        ...

    def plan_unsent(self, updates: Sequence[Update]) -> Callable[[], None]:
        """``plan`` for callers who send live scalars themselves, and who know what may be captured."""
        ...

    def by_address(self, updates: Sequence[Update]) -> Callable[..., None] | None:
        """``f(pointers, now, factor=None)`` applies dense gradients like these, by their addresses, one per update.

        ``factor``: what all are multiplied by, where the flags say so; on a GPU by device and compute type. None if the
        library does not take these arrays so.
        """
        ...


_backends: dict[type, Backend | None] = {np.ndarray: NumPy()}


def of(array: object) -> Backend | None:
    """The backend of an array, or None for anything that is not an array of a supported library."""
    kind = type(array)
    try:
        return _backends[kind]
    except KeyError:
        found = None
        if issubclass(kind, np.ndarray) and not issubclass(kind, np.ma.MaskedArray):
            found = _backends[np.ndarray]
        elif (cupy := sys.modules.get("cupy")) is not None and issubclass(kind, cupy.ndarray):
            found = _cupy_backend()
        _backends[kind] = found
        return found


@cache
def _cupy_backend() -> Backend:
    """One for all types of CuPy arrays; imported with the first of them.

    Raises:
        RuntimeError: no GPU answers; an array without one holds memory that no kernel can reach.
    """
    from gpurms.device import CuPy

    return CuPy()


def require(array: Array) -> Backend:
    """The backend of an array that has one."""
    found = of(array)
    if found is None:
        raise TypeError(f"expected a NumPy or CuPy array; got {type_name(array)}")
    return found


def type_name(thing: object) -> str:
    """The type of something as messages name it."""
    kind = type(thing)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def array_module() -> ModuleType:
    """The library for code that creates arrays: CuPy when a GPU is usable, else NumPy.

    The environment variable ``GPURMS_BACKEND`` (``auto``, ``numpy``, ``cupy``) overrides the choice.

    Raises:
        RuntimeError: ``GPURMS_BACKEND=cupy`` without a usable GPU, with the reason.
        ValueError: ``GPURMS_BACKEND`` has another value.

    >>> array_module().__name__ in ("numpy", "cupy")
    True
    """
    asked = os.environ.get("GPURMS_BACKEND") or "auto"
    if asked not in ("auto", "numpy", "cupy"):
        raise ValueError(f"GPURMS_BACKEND must be auto, numpy or cupy; got {asked!r}")
    if asked == "numpy":
        return np
    cupy, problem = _cupy()
    if cupy is not None:
        return cupy
    if asked == "cupy":
        raise RuntimeError(f"GPURMS_BACKEND=cupy, but no GPU is usable: {problem}")
    return np


@cache
def _cupy() -> tuple[ModuleType | None, str]:
    """CuPy if it can reach a GPU, else None and the reason. Importing CuPy does not prove that it can."""
    install = "pip install cupy-cuda13x (cupy-cuda12x for a CUDA 12 driver)"
    try:
        import cupy
    except ModuleNotFoundError as error:
        return None, f"CuPy is not installed ({error}): {install}"
    except Exception as error:  # a broken installation fails in as many ways as there are libraries below it
        return None, f"CuPy does not import ({type(error).__name__}: {error}): {install}"
    try:
        if cupy.cuda.is_available():
            return cupy, ""
        reason = "no CUDA device or driver answers"
    except Exception as error:  # CuPy raises errors of several unrelated types here, by what is broken
        reason = f"{type(error).__name__}: {error}"
    version = getattr(cupy, "__version__", "of unknown version")
    return None, f"CuPy {version} is installed, but {reason}; it needs an NVIDIA driver and CuPy for it: {install}"


def report() -> list[tuple[str, bool, str]]:
    """Rows (engine, usable, detail), the preferred first."""
    cupy, problem = _cupy()
    detail = problem if cupy is None else _devices(cupy.cuda.runtime)
    return [("cuda", cupy is not None, detail), *cpu.engine_report()]


def _devices(runtime: Any) -> str:
    """The GPUs in words, equal ones together: ``2 x NVIDIA H200 (compute capability 9.0, 140 GiB)``."""
    found: Counter[str] = Counter()
    for number in range(runtime.getDeviceCount()):
        device = runtime.getDeviceProperties(number)
        memory = f"{device['totalGlobalMem'] / 2**30:.0f} GiB"
        found[f"{device['name'].decode()} (compute capability {device['major']}.{device['minor']}, {memory})"] += 1
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in found.items())
