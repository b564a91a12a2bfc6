"""Arrays of one call, checked by themselves: what the optimizer checks again is not repeated here."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpurms import backend
from gpurms.gradients import INDEX_TYPES
from gpurms.hyper import FLOAT_NAMES, is_supported
from gpurms.kernels.rule import FLOAT32
from gpurms.slots import array_of
from gpurms.variable import Array, IndexedSlices, Variable


class Shard(Variable):
    """Rows of a ``ShardedTable``: other ranks have other rows, so there is nothing to average over them."""

    __slots__ = ()
    is_part = True  # optimizers refuse to clip it by a norm


def own_array(array: Any, home: backend.Backend, where: str, hint: str) -> Array:
    """The array as a plain one of the library ``home``."""
    found = array_of(array)
    of = backend.of(found)
    if of is None:
        found = home.scalar(found)
        if found is None:
            raise TypeError(f"{where}: expected a {home.name} array; got {backend.type_name(array)}")
    elif of is not home:
        raise TypeError(f"{where}: expected a {home.name} array; got a {of.name} array ({hint})")
    return home.view(found)


def floats(array: Any, home: backend.Backend, where: str, hint: str) -> Array:
    """The same, of a type that gradients have."""
    found = own_array(array, home, where, hint)
    if not is_supported(found.dtype):
        raise TypeError(f"{where}: expected {FLOAT_NAMES}; got {found.dtype}")
    return found


def rows_of(slices: IndexedSlices, home: backend.Backend, where: str, hint: str) -> tuple[Array, Array]:
    """Values and indices of equal length."""
    values = floats(slices.values, home, f"{where}: gradient's values", hint)
    indices = own_array(slices.indices, home, f"{where}: indices", hint)
    if indices.dtype not in INDEX_TYPES:
        raise TypeError(f"{where}: expected indices of int32 or int64; got {indices.dtype}")
    if indices.ndim != 1:
        raise ValueError(f"{where}: expected 1-D indices; got shape {indices.shape}")
    if values.shape[:1] != indices.shape:
        raise ValueError(f"{where}: expected gradient values for {len(indices)} indices; got shape {values.shape}")
    return values, indices


def sum_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """What gradients are summed and divided in: float32 for 16-bit ones, whose variables take that too."""
    return FLOAT32 if dtype.itemsize == 2 else dtype


def mean(values: Array, size: int) -> Array:
    """Each value divided by the number of ranks, in ``sum_type``; in place where the values are of that type."""
    wide = sum_type(values.dtype)
    values = values.astype(wide, copy=False)
    np.divide(values, wide.type(size), out=values)
    return values
