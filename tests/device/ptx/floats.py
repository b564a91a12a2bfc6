"""Floating-point arithmetic as the GPU rounds it: to nearest, subnormals flushed where the instruction says so.

Results of 16 and 32 bits that are NaN have the one pattern the GPU gives; in 64 bits it keeps a payload, as NumPy does.
"""

from collections.abc import Callable
from fractions import Fraction

import numpy as np

Function = Callable[..., np.ndarray]

_SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
_NAN = {
    np.dtype(np.float16): np.array([0x7FFF], np.uint16).view(np.float16),
    np.dtype(np.float32): np.array([0x7FFFFFFF], np.uint32).view(np.float32),
}


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormals become zeros of their sign, in float32."""
    small = np.abs(x) < _SMALLEST_NORMAL
    return np.where(small, np.copysign(np.float32(0), x), x) if np.count_nonzero(small) else x


def canonical(x: np.ndarray) -> np.ndarray:
    """Every NaN becomes the one NaN of its type, if the type has one."""
    pattern = _NAN.get(x.dtype)
    if pattern is None:
        return x
    nan = x != x
    return np.where(nan, pattern, x) if np.count_nonzero(nan) else x


def rounded(function: Function, flushes: bool) -> Function:
    """The function with the NaN of the GPU, and with .ftz if it flushes."""
    if flushes:
        return lambda *operands: canonical(flush(function(*map(flush, operands))))
    return lambda *operands: canonical(function(*operands))


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The number if one operand is NaN; -0 is below +0."""
    return _signed_zeros(np.fmin(a, b), a, b, np.bitwise_or)


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The number if one operand is NaN; +0 is above -0."""
    return _signed_zeros(np.fmax(a, b), a, b, np.bitwise_and)


def minimum_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """NaN if one operand is NaN; -0 is below +0."""
    return _signed_zeros(np.minimum(a, b), a, b, np.bitwise_or)


def maximum_nan(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """NaN if one operand is NaN; +0 is above -0."""
    return _signed_zeros(np.maximum(a, b), a, b, np.bitwise_and)


def _signed_zeros(result: np.ndarray, a: np.ndarray, b: np.ndarray, combine: np.ufunc) -> np.ndarray:
    bits = f"u{a.itemsize}"
    equal = a == b
    return np.where(equal, combine(a.view(bits), b.view(bits)).view(a.dtype), result) if equal.any() else result


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once."""
    if a.dtype == np.float64:
        return np.array([_fma_exact(*map(float, abc)) for abc in np.broadcast(a, b, c)])
    # The product is exact in float64. The sum is rounded to odd there, so that rounding it again does no harm.
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    return _add_to_odd(product, addend).astype(a.dtype)


def _add_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    inexact = (error != 0) & even & np.isfinite(total)
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)


def _fma_exact(a: float, b: float, c: float) -> float:
    plain = a * b + c
    if not np.isfinite((a, b, c)).all():
        return plain
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if not exact:
        return a * b + c if a * b == 0 else 0.0
    try:
        nearest = float(exact)
    except OverflowError:
        nearest = np.inf
    return float(np.copysign(nearest, 1 if exact > 0 else -1))


def compare(relation: str) -> Function:
    """The comparison that setp names: ordered, with a final u unordered, or of unsigned integers."""
    if relation in ("num", "nan"):
        expected = relation == "nan"
        return lambda a, b: ((a != a) | (b != b)) == expected
    function = _RELATIONS[relation[:2]]
    if len(relation) == 3:
        return lambda a, b: function(a, b) | (a != a) | (b != b)
    if relation == "ne":
        return lambda a, b: (a < b) | (a > b)
    return function


_RELATIONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def of_flushed(test: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A comparison that takes subnormal operands for zeros."""
    return lambda a, b: test(flush(a), flush(b))
