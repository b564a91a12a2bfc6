"""The dense gradients of one call in flat buffers, one per dtype, and what ranks compare of a call."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gpurms import backend
from gpurms.distributed.agreement import Intent
from gpurms.distributed.slices import Shard, floats, sum_type
from gpurms.distributed.transport import Data
from gpurms.slots import array_of
from gpurms.variable import Array, IndexedSlices, Variable

Pair = tuple[Any, Any]


class Segment(NamedTuple):
    """Gradients of one dtype, by their places in the call, and their part of a flat buffer."""

    places: Sequence[int]
    flat: Array


class Plan(NamedTuple):
    """How one call is packed."""

    signature: list[Any]
    intent: Intent
    segments: Sequence[Segment]
    flats: Sequence[Array]
    views: dict[int, Array]  # of the flat buffers, by place in the call


class Packing:
    """Buffers and the latest plan, both kept from call to call."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._buffers: dict[np.dtype[Any], Array] = {}
        self._plan: Plan | None = None

    def pack(self, items: list[Pair]) -> Plan:
        """Copy dense gradients into the buffers. A call whose pairs look like those of the one before is not checked.

        Raises:
            TypeError, ValueError: a gradient is no floating-point array of the right library and device.
        """
        signature = [_signature(grad, variable, place) for place, (grad, variable) in enumerate(items)]
        if self._plan is None or self._plan.signature != signature:
            self._plan = self._new_plan(items, signature)
        for segment in self._plan.segments:
            parts = [array_of(items[place][0]).reshape(-1) for place in segment.places]
            if parts[0].dtype == segment.flat.dtype:
                np.concatenate(parts, out=segment.flat)
            else:
                segment.flat[...] = np.concatenate(parts)
        return self._plan

    def _new_plan(self, items: list[Pair], signature: list[Any]) -> Plan:
        lines = ["an average of gradients"]
        by_type: dict[np.dtype[Any], dict[np.dtype[Any], list[int]]] = {}
        for place, (grad, variable) in enumerate(items):
            where = label(variable, place)
            lines.append(f"pair {place}: {where} with {_what(grad, variable, place)}")
            if is_dense(grad, variable):
                array = floats(grad, self._data.home, f"{where}: gradient", self._data.hint)
                check_place(self._data, where, array)
                by_type.setdefault(sum_type(array.dtype), {}).setdefault(array.dtype, []).append(place)
        segments, flats, views = [], [], {}
        for wide, groups in by_type.items():
            shapes = {place: np.shape(array_of(items[place][0])) for places in groups.values() for place in places}
            flat = self._buffer(sum(map(math.prod, shapes.values())), wide)
            end = 0
            for places in groups.values():
                start = end
                for place in places:
                    size = math.prod(shapes[place])
                    views[place] = flat[end : end + size].reshape(shapes[place])
                    end += size
                segments.append(Segment(places, flat[start:end]))
            if end:
                flats.append(flat)
        return Plan(signature, Intent.of(lines), segments, flats, views)

    def _buffer(self, n: int, dtype: np.dtype[Any]) -> Array:
        buffer = self._buffers.get(dtype)
        if buffer is None or len(buffer) < n:
            buffer = self._buffers[dtype] = self._data.empty(n, dtype)
        return buffer[:n]


def is_dense(grad: Any, variable: Any) -> bool:
    """Whether a flat buffer is the place for it."""
    return grad is not None and not isinstance(grad, IndexedSlices) and not isinstance(variable, Shard)


def is_sparse(grad: Any, variable: Any) -> bool:
    """Whether rows are to be gathered."""
    return isinstance(grad, IndexedSlices) and not isinstance(variable, Shard)


def check_place(data: Data, where: str, *arrays: Array) -> None:
    """ValueError for arrays on another device than the communicator's."""
    for array in arrays:
        found = data.home.device(array)
        if array.size and found != data.place():
            raise ValueError(f"{where}: gradient is on GPU {found}, the communicator on GPU {data.place()}")


def check_variables(items: list[Pair]) -> None:
    """TypeError for what no optimizer could update."""
    for place, (_, variable) in enumerate(items):
        array = array_of(variable)
        home = backend.of(array)
        if home is None:
            raise TypeError(f"variable {place}: expected a gpurms.Variable or an array; got {variable!r:.80}")
        if not home.writeable([array]):
            raise TypeError(f"{label(variable, place)}: expected to write to it; its array is read-only")


def label(variable: Any, place: int) -> str:
    """The variable by name, or by its place in the call; the same on all ranks, whatever its class there."""
    array = array_of(variable)
    if isinstance(variable, Shard):
        return f"shard {variable.name!r} ({array.dtype})"
    name = repr(variable.name) if isinstance(variable, Variable) else place
    return f"variable {name} ({array.dtype} of shape {array.shape})"


def _what(grad: Any, variable: Any, place: int) -> str:
    if isinstance(variable, Shard):
        return "a gradient of its own"
    if grad is None:
        return "no gradient"
    if isinstance(grad, IndexedSlices):
        values, indices = array_of(grad.values), array_of(grad.indices)
        shape = "" if grad.dense_shape is None else f", dense_shape {_dense_shape(grad, variable, place)}"
        return f"rows of {values.dtype}, shape {values.shape[1:]}, indices of {indices.dtype}{shape}"
    array = array_of(grad)
    return f"a gradient of {getattr(array, 'dtype', type(array).__name__)}, shape {np.shape(array)}"


def _dense_shape(slices: IndexedSlices, variable: Any, place: int) -> tuple[int, ...]:
    given: Any = slices.dense_shape
    try:
        return tuple(map(operator.index, given))
    except TypeError as error:
        raise TypeError(
            f"{label(variable, place)}: expected dense_shape as a tuple of integers; got {given!r}"
        ) from error


def _signature(grad: Any, variable: Any, place: int) -> Any:
    """Equal for pairs of which all that a plan reads is equal."""
    name = variable.name if isinstance(variable, Variable) else None
    of = array_of(variable)
    about = (type(variable), name, getattr(of, "dtype", None), getattr(of, "shape", None))
    if isinstance(grad, IndexedSlices):
        return about, _what(grad, variable, place)
    array = array_of(grad)
    home = backend.of(array)
    device = None if home is None else home.device(array)
    return about, type(array), getattr(array, "dtype", None), getattr(array, "shape", None), device
