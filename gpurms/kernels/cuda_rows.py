"""Sparse gradients of CuPy arrays: the check of row ids, their sort, sums and updates of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from gpurms.kernels.launch import (
    POINTER,
    Kernel,
    Planned,
    address,
    defines,
    element_types,
    flags,
    kernel,
    scalars_type,
    table_type,
    types,
)
from gpurms.kernels.rule import FLOAT32, SCALARS, Flags, Rule, Update

THREADS = 256
ITEMS = 16
TILE = THREADS * ITEMS
"""Ids that one block sorts."""
WARPS = 4
FAN_IN = 32
RADIX_BITS, DIGITS = 8, 256
MAX_BLOCKS = (1 << 31) - 1
MAX_IDS = 1 << 30
"""Places are 32-bit numbers in the kernels, which look beyond the last by up to 32 * span."""

SORT = ("storage.cuh", "sort.cu")
ROWS = ("storage.cuh", "rmsprop.cuh", "rows.cu")


class Workspace:
    """Device memory for the sparse gradients of a variable, kept from step to step."""

    def __init__(self) -> None:
        self._kept: Any = None

    def parts(self, sizes: Sequence[int]) -> tuple[Any, list[int]]:
        """The memory and the addresses of parts of ``sizes`` bytes in it, valid until the next call."""
        padded = [-(-size // 256) * 256 for size in sizes]
        needed = sum(padded)
        if self._kept is None or not needed <= self._kept.size <= 4 * needed:
            self._kept = cupy.empty(needed, np.uint8)
        start = int(self._kept.data.ptr)
        return self._kept, [start + sum(padded[:i]) for i in range(len(padded))]


# --------------------------------------------------------------------------------------------------- ids and their sort


def _sort_macros(ids: Any, n_rows: int) -> tuple[np.dtype[Any], Any]:
    """The type of keys, which must hold n_rows, and the macros of sort.cu."""
    key = np.dtype(np.uint32 if n_rows < 1 << 32 else np.uint64)
    names = {"key_t": "unsigned int" if key == np.uint32 else "unsigned long long"}
    names["id_t"] = "int" if ids.dtype == np.int32 else "long long"
    return key, defines(types(FLOAT32), names, {"THREADS": THREADS, "ITEMS": ITEMS})


def find_outside(requests: Sequence[tuple[Any, int]]) -> list[int | None]:
    """For each (ids, n_rows), all on the current device, the offset of the first id outside [0, n_rows), or None.

    Waits for the device once.
    """
    nothing = np.iinfo(np.uint64).max
    found = cupy.full(len(requests), nothing, np.uint64)
    for place, (ids, n_rows) in enumerate(requests):
        if ids.size:
            ids = cupy.ascontiguousarray(ids)
            _, macros = _sort_macros(ids, n_rows)
            check = kernel(SORT, "find_outside", macros, (POINTER, np.int64, np.uint64, POINTER))
            check(min(-(-ids.size // THREADS), 1 << 16), THREADS, ids, ids.size, n_rows, address(found) + 8 * place)
    return [None if offset == nothing else int(offset) for offset in found.get()]


class _Sort:
    """Ids sorted stably, with their positions, on the device; where the results will be is known before it runs."""

    def __init__(self, ids: Any, n_rows: int, buffers: Sequence[int], counts: int) -> None:
        """``buffers``: keys, order, keys, order, each of ids.size; ``counts``: DIGITS for each tile and one more."""
        self.ids, self.n_rows = ids, n_rows
        self.n_passes = max(1, -(-n_rows.bit_length() // RADIX_BITS))
        self.buffers = [tuple(buffers[:2]), tuple(buffers[2:])]
        self.counts, self.totals = counts, counts + 4 * DIGITS * n_tiles(ids.size)
        self.keys, self.order = self.buffers[(self.n_passes - 1) % 2]
        key, macros = _sort_macros(ids, n_rows)
        n, shift = np.int32, np.int32
        signatures: dict[str, tuple[Any, ...]] = {
            "sort_tile": (POINTER, n, key.type, np.int32, POINTER, POINTER, POINTER, POINTER),
            "count_digits": (POINTER, POINTER, n, key.type, shift, POINTER),
            "sum_counts": (POINTER, np.int32, POINTER),
            "scatter_items": (POINTER, POINTER, POINTER, n, key.type, shift, *[POINTER] * 4),
        }
        names = ["sort_tile"] if ids.size <= TILE else ["count_digits", "sum_counts", "scatter_items"]
        self.kernels: list[Kernel] = [kernel(SORT, name, macros, signatures[name]) for name in names]
        for each in self.kernels:
            each.compile()

    def __call__(self) -> None:
        n = self.ids.size
        if n <= TILE:
            self.kernels[0](1, THREADS, self.ids, n, self.n_rows, self.n_passes, *self.buffers[0], *self.buffers[1])
            return
        count, add, scatter = self.kernels
        tiles = n_tiles(n)
        ids, keys, order = self.ids, None, None
        for i in range(self.n_passes):
            shift, out = i * RADIX_BITS, self.buffers[i % 2]
            count(tiles, THREADS, ids, keys, n, self.n_rows, shift, self.counts)
            add(DIGITS, THREADS, self.counts, tiles, self.totals)
            scatter(tiles, THREADS, ids, keys, order, n, self.n_rows, shift, self.counts, self.totals, *out)
            ids, (keys, order) = None, out


def n_tiles(n: int) -> int:
    """Blocks of a sort of n ids."""
    return -(-n // TILE)


# ----------------------------------------------------------------------------------------------------------------- rows


class Tables:
    """Variable and slots as the struct ``Table`` of rows.cu, which stays the same from step to step."""

    def __init__(self, update: Update) -> None:
        var = update.var
        slots = [slot for slot in (update.rms, update.mom, update.mg) if slot is not None]
        arrays = [var, *slots]
        row_shape = var.shape[1:]
        self.row_size = int(np.prod(row_shape, dtype=np.int64))
        self.types = element_types(update)
        plain = all(_has_plain_rows(array) for array in arrays)
        self.dims = 0 if plain else len(row_shape)
        words: list[int] = []
        for array in arrays:
            strides = [stride // array.itemsize for stride in array.strides]
            words += [int(array.data.ptr), *(strides if self.dims else strides[:1]), 0]
        words += [var.shape[0], self.row_size, *(row_shape if self.dims else ()), 0]
        self.struct = np.array(words, np.int64).view(table_type(8 * len(words)))
        self.starts = [int(array.data.ptr) for array in arrays]
        self.row_bytes = [array.strides[0] for array in arrays]

    def aligned(self, others: Sequence[int], vector: int) -> bool:
        """Whether rows can be moved 16 bytes at a time, in pieces of ``vector`` elements."""
        numbers = (*self.starts, *self.row_bytes, *others)
        return not self.dims and self.row_size % vector == 0 and all(number % 16 == 0 for number in numbers)


def _has_plain_rows(array: Any) -> bool:
    """Whether the elements of a row follow one another."""
    return bool(array[:1].flags.c_contiguous)


def plan(update: Update, tables: Tables, live: Any, skip: Any, workspace: Workspace) -> Planned:
    """Sort, sum and update, in a few launches, none of which depends on what the ids are.

    ``live`` and ``skip`` are those of the rule on the device.
    """
    rule = update.rule
    n, n_rows, row_size = update.indices.size, update.var.shape[0], tables.row_size
    if n > MAX_IDS:
        raise ValueError(f"a sparse gradient on a GPU may have up to {MAX_IDS} indices; got {n}")
    ids, values = cupy.ascontiguousarray(update.indices), cupy.ascontiguousarray(update.grad)
    key, _ = _sort_macros(ids, n_rows)
    n_sums = n // 16 + 1 if n > FAN_IN else 0  # see `slot` in rows.cu
    sizes = [key.itemsize * n, 4 * n, key.itemsize * n, 4 * n, 4 * DIGITS * (n_tiles(n) + 1)]
    memory, (*buffers, counts, sums) = workspace.parts([*sizes, n_sums * row_size * rule.compute.itemsize])
    sort = _Sort(ids, n_rows, buffers, counts)

    elements = types(rule.compute, grad_t=values.dtype, **tables.types)
    vector = elements["VECTOR"]
    packed = tables.aligned([int(values.data.ptr)], vector)
    group = _group(row_size, vector)
    sizes_of: dict[str, Any] = {"PACKED": int(packed), "DIMS": tables.dims, "WARPS": WARPS}
    sizes_of["ADD_ROWS"] = int(update.rms is None)
    sizes_of["key_t"] = "unsigned int" if key == np.uint32 else "unsigned long long"
    n_units = -(-n // 32) * -(-row_size // (group * vector))
    read = (values, update.factor, memory, live, skip)
    return _Rows(rule, tables, sort, read, elements | sizes_of, group, n_units, sums)


def add_rows(var: Any, indices: Any, values: Any, compute: np.dtype[Any]) -> None:
    """Sums of values onto the rows of an array, with the sums of a sparse update."""
    rule = Rule(Flags(), np.zeros(len(SCALARS), compute))
    update = Update(var, None, None, None, rule, values, indices)
    plan(update, Tables(update), None, None, Workspace())()


def _group(row_size: int, vector: int) -> int:
    """Threads that share a row: a power of two up to a warp."""
    return min(32, 1 << (-(-row_size // vector) - 1).bit_length())


class _Rows:
    """The launches of one sparse gradient."""

    def __init__(
        self, rule: Rule, tables: Tables, sort: _Sort, read: tuple[Any, ...], macros: dict[str, Any],
        group: int, n_units: int, sums: int,
    ) -> None:  # fmt: skip
        self.sort, self.tables, self.read, self.group, self.sums = sort, tables, read, group, sums
        self.n = sort.ids.size
        self.n_blocks = min(-(-n_units // WARPS), MAX_BLOCKS)
        self.scalars = rule.scalars.view(scalars_type(rule.compute))
        all_macros = defines(flags(rule.flags), macros)
        scalars, table = scalars_type(rule.compute), tables.struct.dtype
        self.update = kernel(
            ROWS, "update_rows", all_macros,
            (scalars, *[POINTER] * 6, np.int32, np.int32, POINTER, table),
        )  # fmt: skip
        self.combine = kernel(
            ROWS, "combine_sums", all_macros,
            (scalars, *[POINTER] * 3, np.int32, np.int32, np.int32, POINTER, table),
        )  # fmt: skip
        self.update.compile()
        if self.n > FAN_IN:
            self.combine.compile()

    def __call__(self) -> None:
        values, factor, _, live, skip = self.read
        threads, n, keys = 32 * WARPS, self.n, self.sort.keys
        numbers, group, table = (self.scalars, live, skip), self.group, self.tables.struct
        at = None if factor is None else factor.address
        self.sort()
        self.update(self.n_blocks, threads, *numbers, at, values, keys, self.sort.order, n, group, self.sums, table)
        span = FAN_IN
        while span < n:
            self.combine(self.n_blocks, threads, *numbers, keys, n, span, group, self.sums, table)
            span *= FAN_IN
