"""Arrays between host and device: creation, copies in both directions and between devices."""

import functools
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
from cupy._core import core
from cupy.cuda.runtime import CUDARuntimeError

from tests.device.compute import Operand, bind, compute, host, store, submit
from tests.device.machine import active
from tests.device.operations import CAPTURE_UNSUPPORTED, Operation
from tests.device.streams import Device

_ndarray = cupy.ndarray


@functools.wraps(core.array)
def array(
    obj: Any,
    dtype: Any = None,
    copy: bool = True,
    order: Any = "K",
    subok: bool = False,
    ndmin: int = 0,
    blocking: bool = False,
) -> cupy.ndarray:
    """What cupy.array, asarray and others, and a pickle, make an array with."""
    if isinstance(obj, _ndarray):
        result = _from_device(obj, obj.dtype if dtype is None else dtype, copy, order)
        return result if ndmin <= result.ndim else result.reshape((1,) * (ndmin - result.ndim) + result.shape)
    if isinstance(obj, (list, tuple)) and any(isinstance(item, _ndarray) for item in obj):
        return array(compute("cupy_concatenate", np.array, (obj,), {}), dtype, False, order, ndmin=ndmin)
    values = np.array(obj, dtype=dtype, copy=None, order=order or "K", ndmin=ndmin)
    if values.dtype.kind not in "biufc" and values.dtype.name != "bfloat16":
        raise ValueError(f"Unsupported dtype {values.dtype}")
    result = cupy.empty(values.shape, values.dtype, "F" if values.flags.fnc else "C")
    if values.ndim:
        _upload(values, result)
    else:
        result.fill(values)
    if blocking:
        machine = active()
        machine.synchronise("array", [machine.queue()])
    return result


def _from_device(source: cupy.ndarray, dtype: Any, copy: bool, order: Any) -> cupy.ndarray:
    if source.data.device_id == active().thread.device:
        return source.astype(dtype, order=order or "K", copy=copy)
    return source.copy(order=order or "K").astype(dtype, copy=False)


def reduce(self: cupy.ndarray) -> tuple[Any, ...]:
    """A pickle holds the host's copy, whoever reads it."""
    return core.array, (self.get(),)


def get(self: cupy.ndarray, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
    machine = active()
    if out is not None:
        _check_host_array(self, out)
    result = np.empty(self.shape, self.dtype, "F" if order == "F" else "C") if out is None else out
    source, pinned = Operand(self), out is not None and machine.heap.is_pinned(out)
    with machine.on_device(self.data.device_id):
        queue = machine.queue(stream)
        if queue.capture is not None and (blocking or not pinned):
            raise CUDARuntimeError(CAPTURE_UNSUPPORTED)
        machine.submit(queue, Operation("device to host", lambda: np.copyto(result, source.host()), copy=True))
        if blocking or not pinned:
            machine.synchronise("get", [queue])
    return result


def _check_host_array(array: cupy.ndarray, out: Any) -> None:
    if not isinstance(out, np.ndarray):
        raise TypeError(f"Only numpy.ndarray can be obtained from cupy.ndarray, got {type(out)}")
    if array.dtype != out.dtype:
        raise TypeError(f"{out.dtype} array cannot be obtained from {array.dtype} array")
    if array.shape != out.shape:
        raise ValueError(f"Shape mismatch. Expected shape: {array.shape}, actual shape: {out.shape}")


def set_(self: cupy.ndarray, arr: np.ndarray, stream: Any = None) -> None:
    if not isinstance(arr, np.ndarray):
        raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
    if self.dtype != arr.dtype:
        raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
    if self.shape != arr.shape:
        raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
    if not (self.flags.c_contiguous or self.flags.f_contiguous):
        raise RuntimeError("Cannot set to non-contiguous array")
    _upload(arr, self, stream)


def _upload(source: np.ndarray, target: cupy.ndarray, stream: Any = None) -> None:
    """Copy to the device. Pageable memory is read at the call, pinned memory when the copy runs."""
    machine = active()
    place = Operand(target)
    with machine.on_device(target.data.device_id):
        queue = machine.queue(stream)
        pinned = machine.heap.is_pinned(source)
        if queue.capture is not None and not pinned:
            raise CUDARuntimeError(CAPTURE_UNSUPPORTED)
        staged = source if pinned else source.copy()
        machine.submit(queue, Operation("host to device", lambda: np.copyto(place.host(), staged), copy=True))


def fill(self: cupy.ndarray, value: Any) -> None:
    if isinstance(value, (_ndarray, np.ndarray)) and value.shape != ():
        module = "cupy" if isinstance(value, _ndarray) else "numpy"
        raise ValueError(f"non-scalar {module}.ndarray cannot be used for fill")
    if isinstance(value, np.ndarray):
        value = value.astype(self.dtype)[()]
    place, scalar = Operand(self), bind(value)
    if not isinstance(scalar, Operand) and value == 0 and self.flags.c_contiguous:
        _submit("memset", lambda: place.host().fill(0), None)
    else:
        submit("cupy_fill", lambda: store(host(scalar), place))


class Pointer(cupy.cuda.MemoryPointer):
    """What `array.data` is: CuPy's pointer, with the operations that need the driver."""

    def __add__(self, offset: int) -> "Pointer":
        return Pointer(self.mem, self.ptr - self.mem.ptr + offset)

    def memset_async(self, value: int, size: int, stream: Any = None) -> None:
        if size:
            place = _bytes(self, size)
            _submit("memset", lambda: place().fill(value), stream)

    def copy_from_device_async(self, src: cupy.cuda.MemoryPointer, size: int, stream: Any = None) -> None:
        if size:
            place, source = _bytes(self, size), _bytes(src, size)
            _submit("device to device", lambda: np.copyto(place(), source()), stream)


def _submit(name: str, work: Callable[[], None], stream: Any) -> None:
    machine = active()
    machine.submit(machine.queue(stream), Operation(name, work, copy=True))


def _bytes(pointer: cupy.cuda.MemoryPointer, size: int) -> Callable[[], np.ndarray]:
    """The memory behind a pointer, when the work runs."""
    return Operand(cupy.ndarray((size,), np.uint8, pointer)).host


def allocator(nbytes: int) -> Pointer:
    """What CuPy calls for every new array."""
    return Pointer(active().allocate(nbytes), 0)


def copy(self: cupy.ndarray, order: str = "C") -> cupy.ndarray:
    machine = active()
    here, there = machine.thread.device, self.data.device_id
    if here == there or self.size == 0:
        return self.astype(self.dtype, order=order)
    with machine.on_device(there):
        source = self.astype(self.dtype, order=order, copy=False)
    if not (source.flags.c_contiguous or source.flags.f_contiguous):
        raise NotImplementedError("CuPy cannot copy non-contiguous array between devices.")
    result = cupy.empty(source.shape, source.dtype, "C" if source.flags.c_contiguous else "F")
    result.data.copy_from_device_async(source.data, source.nbytes)
    return result


def deepcopy(self: cupy.ndarray, memo: Any) -> cupy.ndarray:
    with active().on_device(self.data.device_id):
        return copy(self)


def sort(self: cupy.ndarray, axis: int = -1, kind: Any = None) -> None:
    place = bind(self)
    submit("cupy_sort", lambda: place.host().sort(axis))


device = property(lambda self: Device(self.data.device_id), doc="The device on which the array lives.")
