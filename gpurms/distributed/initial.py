"""The first values of a shard, written block by block: beside a shard there may be room for little else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpurms import backend
from gpurms.distributed.agreement import Words
from gpurms.slots import array_of
from gpurms.variable import Array, is_real

Initializer = str | Callable[[Words], Array] | Any
BLOCK_BYTES = 2**22


def first_rows(initializer: Initializer, shape: tuple[int, ...], dtype: np.dtype[Any], own: range) -> Array:
    """The rows ``own`` of a table of this shape, as a new array; ``initializer``: see ``ShardedTable``.

    A function is called once without row numbers where there are none, as its arrays say in which library to be.

    Raises:
        TypeError, ValueError: there are no such rows in it.
    """
    if isinstance(initializer, str):
        if initializer != "zeros":
            raise ValueError(f"initializer must be 'zeros', a function or an array; got {initializer!r}")
        return backend.array_module().zeros((len(own), *shape[1:]), dtype)
    rows_of = _called(initializer) if callable(initializer) else _sliced(initializer, shape)
    step = max(1, BLOCK_BYTES // max(1, dtype.itemsize * math.prod(shape[1:])))
    home, rows = rows_of(own[:step])
    with home.near(rows):
        shard = np.empty((len(own), *shape[1:]), dtype, like=rows)
    for start in range(0, max(1, len(own)), step):
        block = own[start : start + step]
        if start:
            of, rows = rows_of(block)
            if of is not home:
                raise TypeError(f"initializer must give arrays of one library; got {home.name} and {of.name} arrays")
        if rows.shape != (len(block), *shape[1:]):
            raise ValueError(
                f"initializer must return shape {(len(block), *shape[1:])} for these rows; got {rows.shape}"
            )
        with home.near(rows):
            home.write(shard[start : start + step], rows.astype(dtype, copy=False))
    return shard


RowsOf = Callable[[range], tuple[backend.Backend, Array]]


def _called(function: Callable[[Words], Array]) -> RowsOf:
    return lambda block: _real(function(np.arange(block.start, block.stop, block.step)))


def _sliced(table: Any, shape: tuple[int, ...]) -> RowsOf:
    array = array_of(table)
    home, whole = _real(array if backend.of(array) else np.asarray(array))
    if whole.shape != shape:
        raise ValueError(f"initializer must have shape {shape}; got {whole.shape}")
    return lambda block: (home, whole[block.start : block.stop : block.step])


def _real(found: Any) -> tuple[backend.Backend, Array]:
    array = array_of(found)
    home = backend.of(array)
    if home is None or not is_real(array.dtype):
        raise TypeError(f"initializer must give an array of real numbers; got {array!r:.80}")
    return home, home.view(array)
