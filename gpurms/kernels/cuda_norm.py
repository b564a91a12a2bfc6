"""Clip factors of CuPy gradients: sums of squares, norms and factors, all on the device, nothing waited for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from gpurms.clipping import Clip
from gpurms.kernels.launch import (
    POINTER,
    defines,
    flags,
    kernel,
    parameter_bytes,
    scalars_type,
    table_type,
    types,
)
from gpurms.kernels.rule import FLOAT32, SCALARS, Flags

CHUNK = 1 << 16
THREADS = 256
FILES = ("storage.cuh", "rmsprop.cuh", "norm.cu")
HEADER = 96
COLUMNS = 4  # of the struct Gradient: data, n, first_tile, place
NO_SUM = -1.0
"""What stands where a device has made no sum: less than any sum of squares, so a maximum merges devices, NaN kept."""


class Factor(NamedTuple):
    """A clip factor on a device: one element of a contiguous array of the compute type."""

    factors: Any
    place: int
    made_from: Any
    """Arrays that its launches read and write: a captured graph goes on using their memory."""

    @property
    def address(self) -> int:
        """Where it is."""
        return int(self.factors.data.ptr) + self.place * int(self.factors.itemsize)

    @property
    def view(self) -> Any:
        """The element as an array."""
        return self.factors[self.place : self.place + 1]


class Sums:
    """Sums of squares on one device: ``array`` has one float64 per gradient of the call, ``NO_SUM`` for others'."""

    def __init__(self, device: int, n: int, start: float) -> None:
        self.device = device
        self.array = cupy.full(n, start, np.float64)
        self.made_from: list[Any] = []


def square_sums(grads: Sequence[Any], computes: Sequence[np.dtype[Any]], clipvalue: float | None) -> list[Sums]:
    """The sum of squares of each gradient, on its device."""
    by_device: dict[int, list[int]] = {}
    for place, grad in enumerate(grads):
        by_device.setdefault(grad.data.device_id, []).append(place)
    found = []
    for device, places in by_device.items():
        with cupy.cuda.Device(device):
            sums = Sums(device, len(grads), 0.0 if len(by_device) == 1 else NO_SUM)
            groups: dict[Any, list[int]] = {}
            for place in places:
                groups.setdefault((grads[place].dtype, computes[place]), []).append(place)
            for (dtype, compute), group in groups.items():
                _add_group(sums, [grads[place] for place in group], group, (dtype, compute, clipvalue))
            found.append(sums)
    return found


class _Squares:
    """The kernels for gradients of one type, of which one launch takes up to ``capacity``."""

    def __init__(self, dtype: np.dtype[Any], compute: np.dtype[Any], clipvalue: float | None) -> None:
        n_bytes = parameter_bytes(cupy.cuda.runtime.getDevice())
        self.capacity = (n_bytes - HEADER) // (8 * COLUMNS)
        self.table = table_type(8 * COLUMNS * self.capacity)
        on = flags(Flags(clip_value=clipvalue is not None))
        macros = defines(on, {**types(compute, grad_t=dtype), "CAPACITY": self.capacity})
        scalars = scalars_type(compute)
        self.squares = kernel(FILES, "square_sums", macros, (scalars, np.int32, POINTER, POINTER, self.table))
        self.fold = kernel(FILES, "fold", macros, (POINTER, POINTER, self.table))
        numbers = np.zeros(len(SCALARS), compute)
        numbers[SCALARS.index("clipvalue")] = 0.0 if clipvalue is None else clipvalue
        self.scalars = numbers.view(scalars)


class _Group:
    """Gradients of one type: their tables, in which only pointers change from step to step, and their launches."""

    def __init__(
        self, dtype: np.dtype[Any], compute: np.dtype[Any], clipvalue: float | None, sizes: Sequence[int],
        places: Sequence[int],
    ) -> None:  # fmt: skip
        self.kernels = _Squares(dtype, compute, clipvalue)
        self.launches = []  # place of the first gradient, rows of the table, the table, blocks, chunk sums
        capacity = self.kernels.capacity
        for left in range(0, len(sizes), capacity):
            words = np.zeros((capacity, COLUMNS), np.int64)
            rows = words[: len(sizes) - left]
            rows[:, 1] = sizes[left : left + capacity]
            n_chunks = np.maximum(-(-rows[:, 1] // CHUNK), 1)  # of an empty gradient, too: its sum is 0
            rows[:, 2] = np.cumsum(n_chunks) - n_chunks
            rows[:, 3] = places[left : left + capacity]
            n_blocks = int(n_chunks.sum())
            struct = words.reshape(-1).view(self.kernels.table)
            self.launches.append((left, rows, struct, n_blocks, cupy.empty(n_blocks, np.float64)))

    def __call__(self, pointers: np.ndarray[Any, Any], sums: Any) -> None:
        """Sums of squares of the gradients at these addresses, to their places in ``sums``."""
        for left, rows, struct, n_blocks, chunk_sums in self.launches:
            rows[:, 0] = pointers[left : left + len(rows)]
            self.kernels.squares(n_blocks, THREADS, self.kernels.scalars, len(rows), chunk_sums, sums, struct)
            if n_blocks > len(rows):
                self.kernels.fold(len(rows), THREADS, chunk_sums, sums, struct)


def _add_group(sums: Sums, grads: list[Any], places: list[int], types_of: tuple[Any, Any, Any]) -> None:
    some = [cupy.ascontiguousarray(grad) for grad in grads]
    group = _Group(*types_of, [grad.size for grad in some], places)
    group(np.array([grad.data.ptr for grad in some], np.int64), sums.array)
    sums.made_from += [some, group]


class Repeated:
    """Clip factors of gradients on one device that differ from those before in nothing but their addresses."""

    def __init__(self, device: int, n: int, clip: Clip) -> None:
        self.clip = clip
        self.sums = Sums(device, n, 0.0)
        self.factors = cupy.empty(n, np.float32), cupy.empty(n, np.float64)
        self.groups: list[tuple[_Group, np.ndarray[Any, Any]]] = []

    def add(
        self, dtype: np.dtype[Any], compute: np.dtype[Any], sizes: Sequence[int], places: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """Take gradients of one type into the call; returns where their factors will be."""
        self.groups.append((_Group(dtype, compute, self.clip.clipvalue, sizes, list(places)), places))
        factors = self.factors[compute != FLOAT32]
        addresses: np.ndarray[Any, Any] = factors.data.ptr + factors.itemsize * places
        return addresses

    def __call__(self, pointers: np.ndarray[Any, Any]) -> None:
        """Make the factors."""
        for group, places in self.groups:
            group(pointers[places], self.sums.array)
        _launch_factors(self.sums, self.clip.limit, self.clip.over_all, *self.factors)


def clip_factors(found: list[Sums], clip: float, over_all: bool) -> dict[int, tuple[Any, Any, Any]]:
    """By device: ``clip / max(norm, clip)`` for each gradient, in float32 and in float64, and what it is made from.

    ``over_all``: the norm is that of all gradients together.
    """
    if over_all and len(found) > 1:
        found = [_gathered(sums, found) for sums in found]
    return {sums.device: _factors(sums, clip, over_all) for sums in found}


def _factors(sums: Sums, clip: float, over_all: bool) -> tuple[Any, Any, Any]:
    with cupy.cuda.Device(sums.device):
        n = sums.array.size
        factors, double_factors = cupy.empty(n, np.float32), cupy.empty(n, np.float64)
        _launch_factors(sums, clip, over_all, factors, double_factors)
        return factors, double_factors, (sums, factors, double_factors)


def _launch_factors(sums: Sums, clip: float, over_all: bool, factors: Any, double_factors: Any) -> None:
    macros = defines(flags(Flags()), {**types(FLOAT32, grad_t=FLOAT32), "CAPACITY": 1})
    run = kernel(FILES, "clip_factors", macros, (POINTER, np.int32, np.float64, np.int32, POINTER, POINTER))
    run(1, THREADS, sums.array, sums.array.size, clip, over_all, factors, double_factors)


def _gathered(own: Sums, found: list[Sums]) -> Sums:
    """The sums of all devices on one: copies between devices, ordered by events of their current streams."""
    with cupy.cuda.Device(own.device):
        merged = Sums(own.device, own.array.size, NO_SUM)
        stream = cupy.cuda.get_current_stream()
        for sums in found:
            copy = cupy.empty(sums.array.size, np.float64)
            with cupy.cuda.Device(sums.device):
                theirs = cupy.cuda.get_current_stream()
                made = theirs.record()
            stream.wait_event(made)  # outside: the null stream is that of the current device
            copy.data.copy_from_device_async(sums.array.data, sums.array.nbytes)
            copied = stream.record()
            with cupy.cuda.Device(sums.device):
                theirs.wait_event(copied)  # their memory may be used again after that
            cupy.maximum(merged.array, copy, out=merged.array)
            merged.made_from += [copy, sums]
        return merged


def given_factors(devices: set[int], n: int, factor: float) -> dict[int, tuple[Any, Any, Any]]:
    """The same factor for n gradients, known on the host: of a norm over arrays of several libraries."""
    found = {}
    for device in devices:
        with cupy.cuda.Device(device):
            found[device] = (cupy.full(n, factor, np.float32), cupy.full(n, factor, np.float64), None)
    return found
