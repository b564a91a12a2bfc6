"""One call of ``apply_gradients`` before anything changes: pairs read, variables found, gradients checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from gpurms import aliasing, backend
from gpurms.aliasing import Pair
from gpurms.slots import Entry, Slots, array_of, label
from gpurms.variable import Array, IndexedSlices, Variable

INDEX_TYPES = (np.dtype(np.int32), np.dtype(np.int64))


def read_items(grads_and_vars: Iterable[Any]) -> list[Any]:
    """The elements of any iterable, consumed once."""
    try:
        return list(grads_and_vars)
    except TypeError as error:
        if hasattr(grads_and_vars, "__iter__"):
            raise
        raise TypeError(
            f"grads_and_vars must be an iterable of (gradient, variable) pairs; got {grads_and_vars!r}"
        ) from error


def check_items(items: list[Any]) -> None:
    """TypeError unless all are (gradient, variable) pairs."""
    for position, item in enumerate(items):
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(f"grads_and_vars[{position}] must be a (gradient, variable) pair; got {item!r:.200}")


def check_pairs(
    slots: Slots, items: list[tuple[Any, Any]], check_indices: bool, dense_only: bool = False
) -> list[Pair]:
    """Find or make the entries and check the gradients; pairs without a gradient are left out, with a warning.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: see ``RMSprop.apply_gradients``.
    """
    made: dict[Any, Entry] = {}
    pairs: list[Pair] = []
    missing: list[str] = []
    for position, (grad, variable) in enumerate(items):
        entry = slots.find(variable)
        if entry is None:
            entry = Entry(variable, label(variable, position))
            entry = made.setdefault(entry.key, entry)
        if not entry.backend.writeable(entry.written):
            names = ["array", *(f"slot {name!r}" for name in entry.slots)]
            read_only = [name for name, array in zip(names, entry.written) if not entry.backend.writeable([array])]
            raise TypeError(f"{label(variable, position)}: expected to write to it; its {read_only[0]} is read-only")
        if grad is None:
            missing.append(label(variable, position))
        elif isinstance(grad, IndexedSlices):
            if dense_only:
                raise ValueError(f"{label(variable, position)}: dense_only is set; got a sparse gradient")
            pairs.append(_sparse(entry, variable, grad, position))
        else:
            pairs.append((entry, _dense(entry, variable, grad, position), None))
    if missing and not pairs:
        raise ValueError(f"No gradients provided for any variable: [{', '.join(missing)}]")
    if missing:
        warnings.warn(
            f"Gradients do not exist for variables [{', '.join(missing)}]; they are left as they are",
            UserWarning,
            stacklevel=4,  # the line that called the public method that called `_apply`
        )
    _check_devices(pairs)
    _check_indices(pairs, check_indices)
    return aliasing.detach(pairs, slots.owners | {entry.owner for entry in made.values()} if made else slots.owners)


def _dense(entry: Entry, variable: Any, grad: Any, position: int) -> Array:
    if type(grad) is not type(entry.view) or (grad.dtype is not entry.dtype and grad.dtype not in entry.accepts):
        grad = _same_library(entry, variable, grad, position, "gradient")
    if grad.shape != entry.shape:
        raise ValueError(
            f"{label(variable, position)}: expected a gradient of its shape {entry.shape}; got shape {grad.shape}"
        )
    return grad


def _same_library(entry: Entry, variable: Any, grad: Any, position: int, what: str) -> Array:
    """The gradient as a plain array of the variable's library, of a type the variable takes."""
    where = label(variable, position)
    array = array_of(grad)
    home = backend.of(array)
    if home is None:
        array = entry.backend.scalar(array)
        if array is None:
            got = backend.type_name(grad)
            raise TypeError(f"{where}: expected its {what} as a {entry.backend.name} array; got {got}")
    elif home is not entry.backend:
        raise TypeError(
            f"{where} is a {entry.backend.name} array, but its {what} a {home.name} array: transfer one of them"
        )
    array = entry.backend.view(array)
    if array.dtype not in entry.accepts:
        names = " or ".join(sorted(str(dtype) for dtype in entry.accepts))
        raise TypeError(f"{where}: expected a {what} of {names}; got {array.dtype}")
    return array


def _sparse(entry: Entry, variable: Any, grad: IndexedSlices, position: int) -> Pair:
    where = label(variable, position)
    if isinstance(variable, Variable) and variable.constraint is not None:
        raise RuntimeError(f"{where}: a constraint cannot be used with a sparse gradient")
    if not entry.shape:
        raise ValueError(f"{where} is 0-d and has no rows: expected a dense gradient; got {grad!r}")
    values = _same_library(entry, variable, grad.values, position, "gradient's values")
    indices = array_of(grad.indices)
    if backend.of(indices) is not entry.backend or indices.dtype not in INDEX_TYPES:
        got = getattr(indices, "dtype", backend.type_name(indices))
        raise TypeError(f"{where}: expected indices as a {entry.backend.name} array of int32 or int64; got {got}")
    indices = entry.backend.view(indices)
    if indices.ndim != 1:
        raise ValueError(f"{where}: expected 1-D indices; got shape {indices.shape}")
    expected = indices.shape + entry.shape[1:]
    if values.shape != expected:
        raise ValueError(f"{where}: expected gradient values of shape {expected}; got {values.shape}")
    if grad.dense_shape is not None and not np.array_equal(grad.dense_shape, entry.shape):
        raise ValueError(f"{where}: expected dense_shape {entry.shape}; got {grad.dense_shape}")
    return entry, values, indices


def _check_devices(pairs: list[Pair]) -> None:
    for entry, grad, indices in pairs:
        if entry.device is not None:
            for array in (grad,) if indices is None else (grad, indices):
                if array.size and entry.backend.device(array) != entry.device:
                    raise ValueError(
                        f"{label(entry.variable)} is on GPU {entry.device}, but its gradient on GPU "
                        f"{entry.backend.device(array)}: move one of them"
                    )


def _check_indices(pairs: list[Pair], on_devices: bool) -> None:
    """All indices at once, for on a GPU the answer has to be waited for; ``on_devices``: whether to wait there."""
    by_home: dict[backend.Backend, list[tuple[Entry, Array]]] = {}
    for entry, _, indices in pairs:
        if indices is not None and (entry.device is None or on_devices):
            by_home.setdefault(entry.backend, []).append((entry, indices))
    for home, some in by_home.items():
        found = home.first_outside([(indices, entry.shape[0]) for entry, indices in some])
        if found is not None:
            (entry, indices), offset = some[found[0]], found[1]
            raise IndexError(
                f"{label(entry.variable)}: index {int(indices[offset])} at offset {offset} is outside "
                f"[0, {entry.shape[0]})"
            )
