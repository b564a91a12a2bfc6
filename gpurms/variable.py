"""What is optimised: ``Variable``, a handle on one array, and ``IndexedSlices``, a gradient of some of its rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurms import backend
from gpurms.kernels.rule import is_bfloat16

if TYPE_CHECKING:
    from gpurms.tape import GradientTape

Array = Any  # numpy.ndarray or cupy.ndarray
Constraint = Callable[[Array], Array]


class _Recording(threading.local):
    """The gradient tapes open in this thread, outermost first."""

    def __init__(self) -> None:
        self.tapes: list[GradientTape] = []


recording = _Recording()


class Variable:
    """A handle on one array, which the optimizer updates in place.

    Args:
        initial_value: a NumPy or CuPy array of integers or floats, wrapped and not copied; anything else that NumPy
            can turn into a real array becomes a float32 array of ``gpurms.array_module()``. Any shape, 0-d included.
        name: used in messages and configs; "Variable" by default.
        trainable: a mark for the caller's own loops; the optimizer updates what it is given.
        constraint: function of the array that returns an array of equal shape, applied after each update.
        dtype: converts ``initial_value``, by a copy if it is an array of another type.

    Raises:
        TypeError: initial_value is no array of real numbers, or constraint is not callable.

    >>> v = Variable([1.0, 2.0], name="w")
    >>> v
    <gpurms.Variable 'w' shape=(2,) dtype=float32, value=[1. 2.]>
    >>> v.assign([3, 4]).numpy()
    array([3., 4.], dtype=float32)
    """

    __slots__ = ("__weakref__", "_array", "_version", "constraint", "name", "trainable")

    def __init__(
        self,
        initial_value: Any,
        name: str | None = None,
        trainable: bool = True,
        constraint: Constraint | None = None,
        dtype: Any = None,
    ) -> None:
        if constraint is not None and not callable(constraint):
            raise TypeError(f"constraint must be a function of an array; got {constraint!r}")
        if not isinstance(name, str | None):
            raise TypeError(f"name must be a string; got {name!r}")
        self.name = "Variable" if name is None else name
        self._array = _as_array(initial_value, dtype, f"variable {self.name!r}")
        self._version = 0  # of assigned values, for those who keep a copy
        self.trainable = trainable
        self.constraint = constraint

    @property
    def value(self) -> Array:
        """The array itself; inside a ``GradientTape`` a traced value, for the arithmetic to be differentiated."""
        value = self._array
        for tape in recording.tapes:
            value = tape._read(self, value)
        return value

    def numpy(self) -> np.ndarray[Any, Any]:
        """A copy of the array in host memory."""
        return backend.require(self._array).host(self._array)

    def assign(self, value: Any) -> Variable:
        """Write an array-like of equal shape into the array, in place; returns the variable.

        Raises:
            ValueError: another shape.
            TypeError: the values do not convert to the variable's type, or the array is read-only.
        """
        if isinstance(value, Variable):
            value = value._array
        where = f"variable {self.name!r}"
        home = backend.require(self._array)
        if not home.writeable([self._array]):
            raise TypeError(f"{where}: expected a writeable array; got a read-only one")
        self._overwrite(home.convert(self._array, value, where))
        return self

    def _overwrite(self, values: Array) -> None:
        """Copy converted values into the array."""
        backend.require(self._array).write(self._array, values)
        self._version += 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return tuple(self._array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        dtype: np.dtype[Any] = self._array.dtype
        return dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return int(self._array.ndim)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self._array.size)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if isinstance(self._array, np.ndarray):
            return np.array(self._array, dtype=dtype, copy=copy)
        if copy is False:
            raise ValueError(f"variable {self.name!r} is on a GPU: a NumPy array of it is always a copy")
        return np.asarray(self.numpy(), dtype=dtype)

    def __repr__(self) -> str:
        values = np.array2string(self.numpy(), threshold=10, separator=" ")
        return f"<gpurms.Variable {self.name!r} shape={self.shape} dtype={self.dtype.name}, value={values}>"


def _as_array(value: Any, dtype: Any, where: str) -> Array:
    if isinstance(value, Variable):
        value = value._array.copy()
    if backend.of(value) is None:
        array = _from_numbers(value, np.float32 if dtype is None else dtype, where)
    else:
        array = value if dtype is None else value.astype(dtype, copy=False)
    if not is_real(array.dtype):
        raise TypeError(
            f"{where}: expected an array of float16, bfloat16, float32, float64 or integers; got {array.dtype}"
        )
    return array


def _from_numbers(value: Any, dtype: Any, where: str) -> Array:
    try:
        host = np.asarray(value)
    except ValueError as error:
        raise TypeError(f"{where}: expected an array of numbers; got a {backend.type_name(value)} ({error})") from error
    if host.dtype.kind not in "biuf" and not is_real(host.dtype):
        raise TypeError(f"{where}: expected an array of real numbers, float32 by default; got {value!r:.80}")
    return backend.array_module().asarray(host.astype(dtype))


def is_real(dtype: np.dtype[Any]) -> bool:
    """Integers and floats of up to 64 bits, bfloat16 included."""
    return (dtype.kind in "iuf" and dtype.itemsize <= 8) or is_bfloat16(dtype)


class IndexedSlices:
    """A gradient that names rows: ``values[i]`` belongs to row ``indices[i]``; rows may occur more than once.

    Args:
        values: array of shape ``(n, *variable.shape[1:])``.
        indices: int32 or int64 array of shape ``(n,)``, each in [0, variable.shape[0]).
        dense_shape: the variable's shape, if given; checked when the gradient is applied.

    All other rows are zero, and their accumulators are left alone.

    >>> import numpy as np
    >>> IndexedSlices(np.ones((2, 3), np.float32), np.array([4, 1]))
    IndexedSlices(values of shape (2, 3), float32, indices of shape (2,), int64)
    """

    __slots__ = ("dense_shape", "indices", "values")

    def __init__(self, values: Array, indices: Array, dense_shape: tuple[int, ...] | None = None) -> None:
        self.values = values
        self.indices = indices
        self.dense_shape = dense_shape

    def __repr__(self) -> str:
        parts = (
            f"{name} of shape {tuple(np.shape(part))}, {getattr(part, 'dtype', type(part).__name__)}"
            for name, part in (("values", self.values), ("indices", self.indices))
        )
        return f"IndexedSlices({', '.join(parts)})"
