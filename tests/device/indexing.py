"""Indexing with arrays. Indexing with numbers and slices makes a view, which is CuPy's own."""

from typing import Any

import cupy
import numpy as np

from tests.device.compute import Operand, bind, compute, host, submit
from tests.device.machine import active

_ndarray = cupy.ndarray
_getitem, _setitem = _ndarray.__getitem__, _ndarray.__setitem__


def _is_advanced(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return any(isinstance(item, (list, np.ndarray, _ndarray, bool, np.bool_)) for item in items)


def _on_device(index: Any) -> tuple[Any, ...]:
    """The index with lists and host arrays on the device, where CuPy puts them."""
    items = index if isinstance(index, tuple) else (index,)
    return tuple(cupy.array(item) if isinstance(item, (list, np.ndarray)) else item for item in items)


def _wrapped(index: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Integer indices modulo the length of their axis: where NumPy raises, CuPy wraps around."""
    missing = len(shape) - sum(_axes(item) for item in index)
    wrapped, axis = [], 0
    for item in index:
        if isinstance(item, np.ndarray) and item.dtype != bool and shape[axis]:
            wrapped.append(item % shape[axis])
        else:
            wrapped.append(item)
        axis += missing if item is Ellipsis else _axes(item)
    return tuple(wrapped)


def _axes(item: Any) -> int:
    """How many axes of the array an item of an index consumes."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if isinstance(item, np.ndarray) and item.dtype == bool else 1


def _items(source: np.ndarray, index: tuple[Any, ...]) -> np.ndarray:
    return source[_wrapped(index, source.shape)]


def getitem(self: cupy.ndarray, slices: Any) -> cupy.ndarray:
    if not _is_advanced(slices):
        return _getitem(self, slices)
    index = _on_device(slices)
    if any(isinstance(item, _ndarray) and item.dtype == bool for item in index):  # how many are true?
        machine = active()
        operand, bound = Operand(self), bind(index)
        machine.synchronise("boolean index", [machine.queue()])
        return cupy.array(_items(operand.host(), host(bound)))
    return compute("cupy_take", _items, (self, index), {})


def take(self: cupy.ndarray, indices: Any, axis: int | None = None, out: Any = None) -> cupy.ndarray:
    index = indices if isinstance(indices, _ndarray) else cupy.array(indices)
    return compute("cupy_take", lambda source, where: np.take(source, where, axis, mode="wrap"), (self, index), {}, out)


def setitem(self: cupy.ndarray, slices: Any, value: Any) -> None:
    if _is_advanced(slices):
        scatter(self, slices, value, "update")
    elif isinstance(value, _ndarray):
        cupy._core.elementwise_copy(value, _getitem(self, slices))
    else:
        _setitem(self, slices, value)


SCATTERS = {"add": np.add.at, "max": np.maximum.at, "min": np.minimum.at, "update": np.ndarray.__setitem__}


def scatter(self: cupy.ndarray, slices: Any, value: Any, op: str) -> None:
    """`array[slices] op= value`, repeated indices included."""
    uploaded = _on_device(slices)  # freed behind the work that reads it
    target, index, operand = bind(self), bind(uploaded), bind(value)

    def work() -> None:
        place = target.host()
        SCATTERS[op](place, _wrapped(host(index), place.shape), host(operand))

    submit(f"cupy_scatter_{op}", work)
