"""NumPy arrays under the optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from gpurms.clipping import Clip
from gpurms.clipping import factor as clip_factor
from gpurms.kernels import cpu, cpu_table
from gpurms.place import Place

Array = np.ndarray[Any, Any]


class NumPy:
    """NumPy arrays, updated by the engines of ``kernels/cpu.py``."""

    name = "NumPy"
    plan = staticmethod(cpu.plan)
    plan_unsent = staticmethod(cpu.plan)

    by_address = staticmethod(cpu_table.by_address)

    def repeat(self, plan: Callable[[], None], clip: Clip | None) -> None:
        """None: an array's address costs more than what could be spared."""

    def square_sums(
        self, grads: Sequence[Array], computes: Sequence[np.dtype[Any]], clipvalue: float | None
    ) -> list[float]:
        """In float64, in one order on all backends."""
        return [float(cpu.square_sum(grad, compute, clipvalue)) for grad, compute in zip(grads, computes)]

    def clip_factors(
        self, grads: Sequence[Array], computes: Sequence[np.dtype[Any]], clip: Clip, factor: float | None
    ) -> list[Any]:
        """Scalars of the compute types."""
        if factor is not None:
            return [compute.type(factor) for compute in computes]
        sums = self.square_sums(grads, computes, clip.clipvalue)
        if clip.over_all:
            sums = [sum(sums)] * len(sums)
        return [compute.type(clip_factor(each, clip.limit)) for each, compute in zip(sums, computes)]

    def view(self, array: Array) -> Array:
        """Memory-mapped arrays and other subclasses as plain ``numpy.ndarray``."""
        return np.asarray(array)

    def device(self, array: Array) -> int | None:
        """The host."""
        return None

    def near(self, array: Array) -> AbstractContextManager[Any]:
        """The host is everywhere the same."""
        return nullcontext()

    def owner(self, array: Array) -> int:
        """The array at the end of the chain of bases; none if another object is."""
        kind = type(array)
        while (base := array.base) is not None:
            if not isinstance(base, kind) and not isinstance(base, np.ndarray):
                return 0
            array = base
        return id(array)

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

    def find(self, place: Place) -> Array | None:
        """Through the owner's bytes."""
        if place.owner.strides != place.owner_strides:
            return None
        flat = place.owner.reshape(-1, order="A").view(np.uint8)
        return np.ndarray(place.shape, place.dtype, flat, place.offset, place.strides)

    def full(self, like: Array, value: float, dtype: np.dtype[Any]) -> Array:
        """Zeros come from calloc: a table's slots occupy memory only where rows have been touched."""
        order: Any = "F" if like.flags.f_contiguous and not like.flags.c_contiguous else "C"
        if value == 0:
            return np.zeros(like.shape, dtype, order)
        return np.full(like.shape, value, dtype, order)

    def copy(self, array: Array) -> Array:
        """A copy beside the array."""
        return np.array(array)

    def host(self, array: Array) -> np.ndarray[Any, Any]:
        """A copy."""
        return np.array(array)

    def numbers(self, value: Any, where: str) -> Array:
        """As NumPy reads them, or copied from a GPU; ragged lists are none."""
        cupy = sys.modules.get("cupy")
        if cupy is not None and isinstance(value, cupy.ndarray):
            value = cupy.asnumpy(value)
        return read_numbers(value, where)

    def convert(self, like: Array, value: Any, where: str) -> Array:
        """Numbers convert to any float type; floats do not convert to integers."""
        converted = self.numbers(value, where)
        check_fits(converted, like, where)
        return converted.astype(like.dtype)

    def write(self, array: Array, values: Array) -> None:
        """In place."""
        array[...] = values

    def is_capturing(self, device: int | None) -> bool:
        """The host runs what it is given."""
        return False

    def send_scalars(self, live: Mapping[Any, Array], scalars_of: Callable[[np.dtype[Any]], Any]) -> None:
        """Kernels on the host are handed their scalars."""

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
        """Repeated rows are summed as in a sparse update."""
        total = np.array(dense)
        cpu.add_rows(total, indices, values)
        return total

    def increment(self, counter: Array) -> None:
        """In place."""
        counter[...] += 1

    def first_outside(self, requests: Sequence[tuple[Array, int]]) -> tuple[int, int] | None:
        """One pass, in which negative numbers are huge ones; another only to name the culprit."""
        for i, (indices, n_rows) in enumerate(requests):
            if indices.size and indices.view(f"u{indices.itemsize}").max() >= n_rows:
                return i, int(np.flatnonzero((indices < 0) | (indices >= n_rows))[0])
        return None


def read_numbers(value: Any, where: str) -> Array:
    """An array-like as NumPy reads it; TypeError for a ragged list."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise TypeError(f"{where}: expected an array of numbers; got {value!r:.80}") from error


def check_fits(values: Any, like: Any, where: str) -> None:
    """ValueError for another shape, TypeError for numbers that do not convert: floats to integers, and no numbers."""
    if values.shape != like.shape:
        raise ValueError(f"{where}: expected shape {like.shape}; got {values.shape}")
    source, kinds = values.dtype, "biu" if like.dtype.kind in "iu" else "biuf"
    if source.kind not in kinds and not (source.name == "bfloat16" and "f" in kinds):
        raise TypeError(f"{where}: cannot convert {source} to {like.dtype}")
