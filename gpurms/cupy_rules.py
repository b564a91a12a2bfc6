"""Gradients of operations on CuPy arrays, where autograd's own would make NumPy arrays on the way.

Written with ``autograd.numpy``, so that the gradients can be differentiated again. Imported with the first CuPy array
that is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import autograd.numpy as anp
import cupy
import numpy as np
from autograd import core, tracer
from autograd.extend import SparseObject, VSpace, defvjp, primitive
from autograd.numpy import numpy_wrapper
from autograd.numpy.numpy_boxes import ArrayBox
from autograd.numpy.numpy_vjps import unbroadcast_f
from autograd.numpy.numpy_vspaces import ArrayVSpace

from gpurms import tracing

Array = Any  # cupy.ndarray, or autograd's box around one
Gradient = Callable[[Array], Array]


class CuPyVSpace(ArrayVSpace):  # type: ignore[misc]  # autograd has no types
    """The arrays of one shape and type, on the current device."""

    def __init__(self, value: Array) -> None:
        self.shape = value.shape
        self.dtype = value.dtype

    def zeros(self) -> Array:
        """An array of zeros."""
        return cupy.zeros(self.shape, self.dtype)

    def ones(self) -> Array:
        """An array of ones."""
        return cupy.ones(self.shape, self.dtype)


# --------------------------------------------------------------------------------------------------- reductions


def _reduced(x: Array, axis: Any) -> tuple[tuple[int, ...], int]:
    """The shape of a reduction of ``x`` with its axes kept, and how many elements made one."""
    shape = anp.shape(x)
    axes = range(len(shape)) if axis is None else np.atleast_1d(axis) % len(shape)
    kept = tuple(1 if i in axes else length for i, length in enumerate(shape))
    return kept, math.prod(shape) // max(math.prod(kept), 1)


def _spread(reduced: Array, x: Array, axis: Any) -> Array:
    """The result of a reduction repeated to the shape of ``x``."""
    return anp.broadcast_to(anp.reshape(reduced, _reduced(x, axis)[0]), anp.shape(x))


def _sum(argnum: int, ans: Array, x: Array, axis: Any = None, *_: Any, **__: Any) -> Gradient:
    return lambda g: _spread(g, x, axis)


def _mean(argnum: int, ans: Array, x: Array, axis: Any = None, *_: Any, **__: Any) -> Gradient:
    return lambda g: _spread(g / _reduced(x, axis)[1], x, axis)


def _prod(argnum: int, ans: Array, x: Array, axis: Any = None, *_: Any, **__: Any) -> Gradient:
    return lambda g: _spread(g * ans, x, axis) / x


def _extreme(argnum: int, ans: Array, x: Array, axis: Any = None, *_: Any, **__: Any) -> Gradient:
    """Of max and min: equal elements share the gradient."""

    def gradient(g: Array) -> Array:
        chosen = (x == _spread(ans, x, axis)).astype(x.dtype)
        return _spread(g, x, axis) * chosen / chosen.sum(axis=axis, keepdims=True)

    return gradient


def _var(argnum: int, ans: Array, x: Array, axis: Any = None, *_: Any, ddof: Any = 0, **__: Any) -> Gradient:
    def gradient(g: Array) -> Array:
        count = _reduced(x, axis)[1]
        return _spread(g, x, axis) * (x - anp.mean(x, axis=axis, keepdims=True)) * (2 / (count - ddof))

    return gradient


def _std(argnum: int, ans: Array, x: Array, axis: Any = None, *_: Any, ddof: Any = 0, **__: Any) -> Gradient:
    def gradient(g: Array) -> Array:
        count = _reduced(x, axis)[1]
        if count <= 1:
            return _spread(g * 0, x, axis)
        return _spread(g / ans, x, axis) * (x - anp.mean(x, axis=axis, keepdims=True)) / (count - ddof)

    return gradient


# -------------------------------------------------------------------------------------------------- elementwise


def _unbroadcast(x: Array, gradient: Gradient) -> Gradient:
    """A gradient summed over the axes along which ``x`` was repeated."""
    summed: Gradient = unbroadcast_f(x, gradient)
    return summed


def _power(argnum: int, ans: Array, x: Array, y: Array) -> Gradient:
    if argnum == 1:
        return _unbroadcast(y, lambda g: g * anp.log(anp.where(x, x, 1)) * ans)
    is_number = isinstance(y, int | float | np.generic)

    def gradient(g: Array) -> Array:
        lower = (y - 1 if y else 1) if is_number else anp.where(y, y - 1, 1)
        return g * (y * x**lower)

    return _unbroadcast(x, gradient)


def _where(argnum: int, ans: Array, condition: Array, x: Array = None, y: Array = None) -> Gradient:
    if argnum == 1:
        return _unbroadcast(x, lambda g: anp.where(condition, g, 0))
    return _unbroadcast(y, lambda g: anp.where(condition, 0, g))


# ------------------------------------------------------------------------------------------ indices and shapes


def _reshape(argnum: int, ans: Array, x: Array, shape: Any = None, order: str | None = None, **_: Any) -> Gradient:
    return lambda g: anp.reshape(g, anp.shape(x), order=order or "C")


def _ravel(argnum: int, ans: Array, x: Array, order: str | None = None) -> Gradient:
    return _reshape(argnum, ans, x, order=order)


def _getitem(argnum: int, ans: Array, x: Array, index: Any) -> Gradient:
    return lambda g: _untake(g, index, core.vspace(x))


@primitive  # type: ignore[untyped-decorator]  # as above
def _untake(g: Array, index: Any, space: CuPyVSpace) -> SparseObject:
    """Zeros but for ``g`` at an index, which autograd adds to the gradient of the whole."""
    parts = index if isinstance(index, tuple) else (index,)
    repeats = any(isinstance(part, list | np.ndarray | cupy.ndarray) for part in parts)

    def add_to(total: Array) -> Array:
        if repeats:
            cupy.add.at(total, index, g)
        else:
            part = total[index]
            part += g
        return total

    return SparseObject(space, add_to)


defvjp(_untake, lambda ans, g, index, space: lambda h: h[index])

# ----------------------------------------------------------------------------------------------------- products


def _dot(argnum: int, ans: Array, a: Array, b: Array) -> Gradient:
    if anp.ndim(a) and anp.ndim(b):
        return _contraction(argnum, a, b, [anp.ndim(a) - 1], [max(anp.ndim(b) - 2, 0)])
    if argnum == 0:
        return _unbroadcast(a, lambda g: g * b)
    return _unbroadcast(b, lambda g: g * a)


def _inner(argnum: int, ans: Array, a: Array, b: Array) -> Gradient:
    if anp.ndim(a) and anp.ndim(b):
        return _contraction(argnum, a, b, [anp.ndim(a) - 1], [anp.ndim(b) - 1])
    return _dot(argnum, ans, a, b)


def _tensordot(argnum: int, ans: Array, a: Array, b: Array, axes: Any = 2) -> Gradient:
    n = anp.ndim(a)
    a_axes, b_axes = (range(n - axes, n), range(axes)) if isinstance(axes, int) else axes
    a_axes, b_axes = ((each,) if isinstance(each, int) else each for each in (a_axes, b_axes))
    return _contraction(argnum, a, b, [i % n for i in a_axes], [i % anp.ndim(b) for i in b_axes])


def _contraction(argnum: int, a: Array, b: Array, a_axes: list[int], b_axes: list[int]) -> Gradient:
    """Of a tensor product, whose axes are the free ones of ``a``, then those of ``b``."""
    a_free = [i for i in range(anp.ndim(a)) if i not in a_axes]
    b_free = [i for i in range(anp.ndim(b)) if i not in b_axes]
    n = len(a_free)

    def gradient(g: Array) -> Array:
        if argnum == 0:
            product = anp.tensordot(g, b, (tuple(range(n, n + len(b_free))), tuple(b_free)))
            order = a_free + [a_axes[b_axes.index(i)] for i in sorted(b_axes)]
        else:
            product = anp.tensordot(a, g, (tuple(a_free), tuple(range(n))))
            order = [b_axes[a_axes.index(i)] for i in sorted(a_axes)] + b_free
        return anp.transpose(product, tuple(order.index(i) for i in range(len(order))))

    return gradient


def _einsum(argnum: int, ans: Array, subscripts: Any, *operands: Array) -> Gradient:
    """For subscripts as a string."""
    if not isinstance(subscripts, str):
        raise NotImplementedError("the gradient of einsum needs its subscripts as a string")
    shapes = [anp.shape(operand) for operand in operands]
    inputs, output, _ = anp.parse_einsum_input(subscripts, *(np.broadcast_to(0.0, shape) for shape in shapes))
    terms = inputs.split(",")
    place = argnum - 1
    own, others = terms[place], terms[:place] + terms[place + 1 :]
    known = [letter for letter in own if letter in output or any(letter in term for term in others)]
    expanded = tuple(length if letter in known else 1 for letter, length in zip(own, shapes[place]))

    def gradient(g: Array) -> Array:
        rest = operands[:place] + operands[place + 1 :]
        product = anp.einsum(f"{','.join([output, *others])}->{''.join(known)}", g, *rest)
        return anp.broadcast_to(anp.reshape(product, expanded), shapes[place])

    return gradient


# --------------------------------------------------------------------------------------------- rules for autograd


def _maker(rule: Callable[..., Gradient]) -> Callable[..., Any]:
    """A rule in the form of autograd's table: for several arguments at once."""

    def make(argnums: Sequence[int], ans: Array, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        gradients = [rule(argnum, ans, *args, **kwargs) for argnum in argnums]
        return lambda g: [gradient(g) for gradient in gradients]

    return make


RULES = {
    tracer.trace_primitives_map[function]: _maker(rule)
    for function, rule in (
        (np.sum, _sum), (np.mean, _mean), (np.prod, _prod), (np.var, _var), (np.std, _std),
        (np.max, _extreme), (np.min, _extreme), (np.amax, _extreme), (np.amin, _extreme),
        (np.reshape, _reshape), (np.ravel, _ravel), (np.power, _power), (np.where, _where),
        (np.dot, _dot), (np.inner, _inner), (np.tensordot, _tensordot), (np.einsum, _einsum),
    )
}  # fmt: skip
RULES[ArrayBox.__getitem__] = _maker(_getitem)

# ------------------------------------------------------------------------------------------ arrays made of others
#
# autograd's own functions insist on a NumPy array. These take their places, with the gradients of those.


def _concatenate(axis: int, *args: Array) -> Array:
    result = np.concatenate(args, axis)
    return result.view(np.ndarray) if isinstance(result, np.ndarray) else result


def _array(args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> Array:
    return tracing.module_of(value).array(value, *args, **kwargs)


def _array_of(args: Sequence[Any], kwargs: Mapping[str, Any], *values: Any) -> Array:
    library = cupy if any(tracing.is_cupy(value) for value in values) else np
    return library.array(values, *args, **kwargs)


def _replace(name: str, function: Callable[..., Array]) -> None:
    old, new = getattr(numpy_wrapper, name), primitive(function)
    for table in (core.primitive_vjps, core.primitive_jvps):
        if old in table:
            table[new] = table[old]
    setattr(numpy_wrapper, name, new)


_replace("concatenate_args", _concatenate)
_replace("_array_from_scalar_or_array", _array)
_replace("array_from_args", _array_of)
VSpace.register(cupy.ndarray, CuPyVSpace)
ArrayBox.register(cupy.ndarray)
