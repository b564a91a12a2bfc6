"""CuPy arrays under the optimizer. Imported when the first of them is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import cupy
import numpy as np

from gpurms.clipping import Clip
from gpurms.host import check_fits, read_numbers
from gpurms.kernels import cuda, cuda_norm, cuda_rows
from gpurms.kernels.launch import is_capturing
from gpurms.kernels.rule import FLOAT32, compute_dtype
from gpurms.place import Place

Array = Any  # cupy.ndarray


class CuPy:
    """CuPy arrays, updated by the kernels of ``kernels/cuda.py`` on CuPy's current stream of their device."""

    name = "CuPy"
    plan = staticmethod(cuda.Plan)
    repeat = staticmethod(cuda.repeat)
    by_address = staticmethod(cuda.by_address)
    plan_unsent = staticmethod(partial(cuda.Plan, sends=False))

    def __init__(self) -> None:
        if not cupy.cuda.is_available():
            raise RuntimeError("a CuPy array was given, but no CUDA device or driver answers")

    def view(self, array: Array) -> Array:
        """The array itself."""
        return array

    def device(self, array: Array) -> int | None:
        """Its number."""
        return int(array.data.device_id)

    def near(self, array: Array) -> AbstractContextManager[Any]:
        """Makes the array's device the current one."""
        device: AbstractContextManager[Any] = cupy.cuda.Device(self.device(array))
        return device

    def owner(self, array: Array) -> int:
        """The allocation; none for memory that CuPy did not allocate."""
        memory = array.data.mem
        return id(memory) if self.is_owned(type(memory)) else 0

    def is_owned(self, memory: type) -> bool:
        """Whether memory of this type is CuPy's own, and not another library's."""
        return not issubclass(memory, cupy.cuda.UnownedMemory)

    def writeable(self, arrays: Sequence[Array]) -> bool:
        """Always: CuPy has no read-only arrays."""
        return True

    def scalar(self, value: Any) -> Array | None:
        """None: CuPy's scalars are 0-d arrays, and NumPy's belong to NumPy."""
        return None

    def key(self, array: Array) -> Any:
        """Pointer, shape, strides and type; the object of an empty array."""
        if array.size == 0:
            return id(array)
        return int(array.data.ptr), array.shape, array.strides, array.dtype

    def bounds(self, array: Array) -> tuple[int, int]:
        """From pointer, shape and strides."""
        start = int(array.data.ptr)
        if array.size == 0:
            return start, start
        reach = [(length - 1) * stride for length, stride in zip(array.shape, array.strides)]
        return start + sum(min(r, 0) for r in reach), start + sum(max(r, 0) for r in reach) + array.itemsize

    def place(self, view: Array) -> Place | None:
        """By CuPy's ``base``, which is the array that a view was first taken of."""
        owner = view.base
        if owner is None or view.size == 0 or not (owner.flags.c_contiguous or owner.flags.f_contiguous):
            return None
        return Place(owner, owner.strides, view.data.ptr - owner.data.ptr, view.shape, view.strides, view.dtype)

    def find(self, place: Place) -> Array | None:
        """Through the owner's memory; CuPy copies arrays in Fortran's order into C's."""
        if place.owner.strides != place.owner_strides:
            return None
        with self.near(place.owner):
            return cupy.ndarray(place.shape, place.dtype, place.owner.data + place.offset, place.strides)

    def full(self, like: Array, value: float, dtype: np.dtype[Any]) -> Array:
        """On the device of ``like``, in its order."""
        order = "F" if like.flags.f_contiguous and not like.flags.c_contiguous else "C"
        with cupy.cuda.Device(self.device(like)):
            if value == 0:
                return cupy.zeros(like.shape, dtype, order)
            return cupy.full(like.shape, value, dtype, order)

    def copy(self, array: Array) -> Array:
        """A copy beside the array."""
        with cupy.cuda.Device(self.device(array)):
            return array.copy()

    def host(self, array: Array) -> np.ndarray[Any, Any]:
        """A copy, which waits for the current stream of the array's device."""
        with cupy.cuda.Device(self.device(array)):
            return np.array(array.get())

    def numbers(self, value: Any, where: str) -> Array:
        """CuPy arrays as they are, everything else as NumPy reads it."""
        return value if isinstance(value, cupy.ndarray) else read_numbers(value, where)

    def convert(self, like: Array, value: Any, where: str) -> Array:
        """On the device of ``like``; numbers convert to any float type, floats do not convert to integers."""
        converted = self.numbers(value, where)
        check_fits(converted, like, where)
        if isinstance(converted, cupy.ndarray):
            with self.near(converted):  # CuPy copies only contiguous arrays from device to device
                converted = cupy.ascontiguousarray(converted, like.dtype)
        else:
            converted = converted.astype(like.dtype)
        with self.near(like):
            return cupy.array(converted)

    def write(self, array: Array, values: Array) -> None:
        """In place, on the array's device."""
        with cupy.cuda.Device(self.device(array)):
            array[...] = values

    def increment(self, counter: Array) -> None:
        """One kernel on the counter's device."""
        with cupy.cuda.Device(self.device(counter)):
            cupy.add(counter, 1, out=counter)

    def first_outside(self, requests: Sequence[tuple[Array, int]]) -> tuple[int, int] | None:
        """One kernel each; waits once per device.

        Raises:
            RuntimeError: while a graph is captured nothing can be waited for.
        """
        by_device: dict[int | None, list[int]] = {}
        for i, (indices, _) in enumerate(requests):
            by_device.setdefault(self.device(indices), []).append(i)
        outside = []
        for device, places in by_device.items():
            with cupy.cuda.Device(device):
                if is_capturing():
                    raise RuntimeError("a sparse step can be captured in a graph only with check_indices=False")
                found = cuda_rows.find_outside([requests[i] for i in places])
                outside += [(i, offset) for i, offset in zip(places, found) if offset is not None]
        return min(outside, default=None)

    def is_capturing(self, device: int | None) -> bool:
        """As the device's current stream says."""
        with cupy.cuda.Device(device):
            return is_capturing()

    def send_scalars(self, live: Mapping[Any, Array], scalars_of: Callable[[np.dtype[Any]], Any]) -> None:
        """One small launch per device and type."""
        cuda.send_scalars(live, scalars_of)

    def indices(self, array: Array, indices: Any) -> Array:
        """On the device of ``array``; integers of any type; an empty list has none."""
        found = indices if isinstance(indices, cupy.ndarray) else np.asarray(indices)
        if found.size == 0:
            found = found.astype(np.int64)
        if found.dtype.kind not in "iu":
            raise TypeError(f"indices must be integers; got {found.dtype}")
        if found.dtype == np.uint64:  # beyond int64 they would turn negative
            found = (cupy if isinstance(found, cupy.ndarray) else np).minimum(found, np.uint64(np.iinfo(np.int64).max))
        with cupy.cuda.Device(self.device(array)):
            return cupy.asarray(found if found.dtype == np.int32 else found.astype(np.int64, copy=False))

    def add_rows(self, dense: Array, indices: Array, values: Array) -> Array:
        """Repeated rows are summed as in a sparse update."""
        with cupy.cuda.Device(self.device(dense)):
            total = cupy.ascontiguousarray(dense).copy()
            if indices.size and total.size:
                cuda_rows.add_rows(total, indices, values, compute_dtype(total.dtype))
            return total

    def square_sums(
        self, grads: Sequence[Array], computes: Sequence[np.dtype[Any]], clipvalue: float | None
    ) -> list[float]:
        """Waits for every device."""
        sums = [self.host(each.array) for each in cuda_norm.square_sums(grads, computes, clipvalue)]
        return [float(each) for each in np.maximum.reduce(sums)]

    def clip_factors(
        self, grads: Sequence[Array], computes: Sequence[np.dtype[Any]], clip: Clip, factor: float | None
    ) -> list[Any]:
        """Elements of arrays on the gradients' devices; nothing is waited for."""
        devices = [grad.data.device_id for grad in grads]
        if factor is None:
            sums = cuda_norm.square_sums(grads, computes, clip.clipvalue)
            by_device = cuda_norm.clip_factors(sums, clip.limit, clip.over_all)
        else:
            by_device = cuda_norm.given_factors(set(devices), len(grads), factor)
        found = []
        for place, (device, compute) in enumerate(zip(devices, computes)):
            factors, double_factors, made_from = by_device[device]
            found.append(cuda_norm.Factor(factors if compute == FLOAT32 else double_factors, place, made_from))
        return found
