"""cvt: from any type to any other."""

import numpy as np

from tests.device.ptx.floats import Function, canonical, flush
from tests.device.ptx.text import TYPES

_TO_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def conversion(modifiers: frozenset[str], target: str, source: str) -> Function | None:
    """The function of one cvt; None if it is not known."""
    if target == "bf16" or source == "bf16":
        return _bfloat16(modifiers, target, source)
    if target in ("f16x2", "bf16x2"):
        return _packed(modifiers, target[:-2], source)
    if target not in _KINDS or source not in _KINDS:
        return None
    return _FUNCTIONS[_KINDS[source], _KINDS[target]](modifiers, target, source)


_KINDS = {
    name: "f" if dtype.kind == "f" else "i" for name, dtype in TYPES.items() if name[0] in "fsu" and "x" not in name
}


def _integer_to_integer(modifiers: frozenset[str], target: str, source: str) -> Function | None:
    dtype, limits = TYPES[target], np.iinfo(TYPES[target])
    if modifiers == {"sat"}:
        known = np.iinfo(TYPES[source])
        low, high = max(limits.min, known.min), min(limits.max, known.max)
        return lambda x: np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)
    return None if modifiers else lambda x: x.astype(dtype)


def _integer_to_float(modifiers: frozenset[str], target: str, source: str) -> Function | None:
    if not modifiers <= {"rn", "ftz"}:
        return None
    dtype = TYPES[target]
    return lambda x: x.astype(dtype)


def _float_to_integer(modifiers: frozenset[str], target: str, source: str) -> Function | None:
    roundings = [m for m in modifiers if m in _TO_INTEGRAL]
    if len(roundings) != 1 or modifiers - {"ftz", "sat", *roundings}:
        return None
    integral = _TO_INTEGRAL[roundings[0]]
    dtype, limits = TYPES[target], np.iinfo(TYPES[target])
    nan = dtype.type(0)
    if source == "f64" or dtype.itemsize == 8:
        nan = np.array([1 << (limits.bits - 1)], f"u{dtype.itemsize}").view(dtype)
    flushes = "ftz" in modifiers and source == "f32"

    def function(x: np.ndarray) -> np.ndarray:
        whole = integral(flush(x) if flushes else x).astype(np.float64)
        inside = (whole >= limits.min) & (whole < float(limits.max) + (limits.bits < 64))
        clamped = np.where(whole < 0, dtype.type(limits.min), dtype.type(limits.max))
        result = np.where(inside, np.where(inside, whole, 0).astype(dtype), clamped)
        return np.where(x != x, nan, result)

    return function


def _float_to_float(modifiers: frozenset[str], target: str, source: str) -> Function | None:
    integral = [m for m in modifiers if m in _TO_INTEGRAL]
    truncating = "rz" in modifiers and (target, source) == ("f32", "f64")
    roundings = ["rz"] if truncating else ["rn"]
    if modifiers - {"ftz", "sat", *roundings, *integral} or len(integral) > 1:
        return None
    dtype = TYPES[target]
    flush_in = "ftz" in modifiers and source == "f32"
    flush_out = "ftz" in modifiers and target == "f32"

    def function(x: np.ndarray) -> np.ndarray:
        if flush_in:
            x = flush(x)
        if integral:
            x = _TO_INTEGRAL[integral[0]](x)
        x = canonical(_toward_zero(x) if truncating else x.astype(dtype))
        if flush_out:
            x = flush(x)
        return np.where(x > 0, np.minimum(x, dtype.type(1)), dtype.type(0)) if "sat" in modifiers else x

    return function


def _toward_zero(x: np.ndarray) -> np.ndarray:
    """float64 to the float32 next to it on the side of zero."""
    nearest = x.astype(np.float32)
    return np.where(abs(nearest) > abs(x), np.nextafter(nearest, np.float32(0)), nearest)


_FUNCTIONS = {
    ("i", "i"): _integer_to_integer,
    ("i", "f"): _integer_to_float,
    ("f", "i"): _float_to_integer,
    ("f", "f"): _float_to_float,
}


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The upper half of a float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _bfloat16(modifiers: frozenset[str], target: str, source: str) -> Function | None:
    if (target, source) == ("f32", "bf16") and modifiers <= {"rn", "ftz"}:
        return (lambda x: flush(from_bfloat16(x))) if "ftz" in modifiers else from_bfloat16
    if (target, source) == ("bf16", "f32") and modifiers == {"rn"}:
        return to_bfloat16
    return None


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    tie_break = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    nearest = ((bits + tie_break) >> np.uint32(16)).astype(np.uint16)
    return np.where(x != x, np.uint16(0x7FFF), nearest)


def _packed(modifiers: frozenset[str], half: str, source: str) -> Function | None:
    """Two float32 become two halves of a word, the first operand the upper one."""
    if source != "f32" or modifiers != {"rn"}:
        return None

    def function(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
        if half == "bf16":
            words = [to_bfloat16(x) for x in (upper, lower)]
        else:
            words = [canonical(x.astype(np.float16)).view(np.uint16) for x in (upper, lower)]
        return (words[0].astype(np.uint32) << np.uint32(16)) | words[1]

    return function
