"""Which library an array belongs to, and what the optimizer asks of that library.

An array knows where it lives, so there is no current backend: ``of(array)`` looks its type up in one dict. CuPy, Numba
and PyTorch are never imported here before an array or the caller asks for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpurms.kernels import cpu
from gpurms.kernels.rule import Update

Array = Any


class Place(NamedTuple):
    """A view as a place in the array that owns its memory, so that it can be found again in a copy of the owner."""

    owner: np.ndarray[Any, Any]
    owner_strides: tuple[int, ...]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    def view(self) -> np.ndarray[Any, Any] | None:
        """The view, or None if the owner was copied into another layout."""
        if self.owner.strides != self.owner_strides:
            return None
        flat = self.owner.reshape(-1, order="A").view(np.uint8)
        return np.ndarray(self.shape, self.dtype, flat, self.offset, self.strides)


class Backend(Protocol):
    """One array library under the optimizer."""

    name: str

    def view(self, array: Array) -> Array:
        """The array as the plain array type of the library, sharing memory."""
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

    def full(self, like: Array, value: float, dtype: np.dtype[Any]) -> Array:
        """A new array beside ``like``, of its shape, contiguous, filled."""
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

    def write(self, array: Array, value: Any, where: str) -> None:
        """Convert and copy ``value`` into the array."""
        ...

    def out_of_range(self, indices: Array, n_rows: int) -> int | None:
        """Position of the first index outside [0, n_rows), or None."""
        ...

    def indices(self, array: Array, indices: Any) -> Array:
        """Integer indices beside ``array``, of any shape, as int32 or int64."""
        ...

    def add_rows(self, dense: Array, indices: Array, values: Array) -> Array:
        """``dense`` plus values at rows, repeated ones included."""
        ...

    def square_sum(self, grad: Array, compute: np.dtype[Any], clipvalue: float | None) -> Any:
        """Sum of squares as a float64 scalar of the library."""
        ...

    def plan(self, updates: Sequence[Update]) -> Callable[[], None]:
        """Prepare updates of distinct variables; the function returned applies them."""
        ...


class NumPy:
    """NumPy arrays, updated by the engines of ``kernels/cpu.py``."""

    name = "NumPy"
    plan = staticmethod(cpu.plan)
    square_sum = staticmethod(cpu.square_sum)

    def view(self, array: Array) -> Array:
        """Memory-mapped arrays and other subclasses as plain ``numpy.ndarray``."""
        return np.asarray(array)

    def writeable(self, arrays: Sequence[Array]) -> bool:
        """As the arrays' flags say."""
        for array in arrays:
            if not array.flags.writeable:
                return False
        return True

    def scalar(self, value: Any) -> Array | None:
        """NumPy's scalar types; Python's numbers have no type to check."""
        return np.asarray(value) if isinstance(value, np.generic) else None

    def key(self, array: Array) -> Any:
        """Pointer, shape, strides and type; the object of an empty array."""
        if array.size == 0:
            return id(array)
        return array.__array_interface__["data"][0], array.shape, array.strides, array.dtype

    def bounds(self, array: Array) -> tuple[int, int]:
        """As ``numpy.lib.array_utils.byte_bounds`` computes them."""
        return np.lib.array_utils.byte_bounds(array)

    def place(self, view: Array) -> Place | None:
        """Only views of arrays: other owners of memory, such as a memory map, are not copied with the array."""
        owner = view
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        contiguous = owner.flags.c_contiguous or owner.flags.f_contiguous
        if owner is view or owner.base is not None or view.size == 0 or not contiguous:
            return None
        offset = view.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        return Place(owner, owner.strides, offset, view.shape, view.strides, view.dtype)

    def full(self, like: Array, value: float, dtype: np.dtype[Any]) -> Array:
        """Zeros come from calloc: a table's slots occupy memory only where rows have been touched."""
        order: Any = "F" if like.flags.f_contiguous and not like.flags.c_contiguous else "C"
        if value == 0:
            return np.zeros(like.shape, dtype, order)
        return np.full(like.shape, value, dtype, order)

    def host(self, array: Array) -> np.ndarray[Any, Any]:
        """A copy."""
        return np.array(array)

    def numbers(self, value: Any, where: str) -> Array:
        """As NumPy reads them; ragged lists are none."""
        try:
            return np.asarray(value)
        except ValueError as error:
            raise TypeError(f"{where}: expected an array of numbers; got {value!r:.80}") from error

    def convert(self, like: Array, value: Any, where: str) -> Array:
        """Numbers convert to any float type; floats do not convert to integers."""
        converted = self.numbers(value, where)
        if converted.shape != like.shape:
            raise ValueError(f"{where}: expected shape {like.shape}; got {converted.shape}")
        if not _converts(converted.dtype, like.dtype):
            raise TypeError(f"{where}: cannot convert {converted.dtype} to {like.dtype}")
        return converted.astype(like.dtype)

    def write(self, array: Array, value: Any, where: str) -> None:
        """In place."""
        if not self.writeable([array]):
            raise TypeError(f"{where}: expected a writeable array; got a read-only one")
        array[...] = self.convert(array, value, where)

    def indices(self, array: Array, indices: Any) -> Array:
        """Integers of any type; an empty list has none."""
        found = np.asarray(indices)
        if found.size == 0:
            found = found.astype(np.int64)
        if found.dtype.kind not in "iu":
            raise TypeError(f"indices must be integers; got {found.dtype}")
        if found.dtype == np.uint64:  # beyond int64 they would turn negative
            found = np.minimum(found, np.uint64(np.iinfo(np.int64).max))
        return found if found.dtype == np.int32 else found.astype(np.int64, copy=False)

    def add_rows(self, dense: Array, indices: Array, values: Array) -> Array:
        """In order of occurrence."""
        total = np.array(dense)
        np.add.at(total, indices, values)
        return total

    def out_of_range(self, indices: Array, n_rows: int) -> int | None:
        """One pass, in which negative numbers are huge ones; another only to name the culprit."""
        if indices.size == 0 or indices.view(f"u{indices.itemsize}").max() < n_rows:
            return None
        return int(np.flatnonzero((indices < 0) | (indices >= n_rows))[0])


def _converts(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    if target.kind in "iu":
        return source.kind in "biu"
    return source.kind in "biuf" or source.name == "bfloat16"


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
        _backends[kind] = found
        return found


def require(array: Array) -> Backend:
    """The backend of an array that has one."""
    found = of(array)
    if found is None:
        raise TypeError(f"expected a NumPy array; got {type_name(array)}")
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
    _, problem = _cupy()
    cuda = ("cuda", False, problem or "the CUDA kernels are not part of this version")
    return [cuda, *cpu.engine_report()]
