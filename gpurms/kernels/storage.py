"""16-bit storage types inside jitted loops: Numba has neither float16 nor bfloat16 on the CPU.

Arrays of them are handed over under integer types of the same size (``VIEWS``), and the type of an element says how to
convert it. Both directions are integer operations that LLVM vectorises, with the bits of NumPy's and ml_dtypes'
conversions: exact to float32, to nearest even back, subnormals included. NaN stays NaN; its payload is not kept.
"""

import numba
import numpy as np
from numba import types
from numba.extending import overload

VIEWS = {"float16": np.dtype(np.int16), "bfloat16": np.dtype(np.uint16)}
_FLOAT16, _BFLOAT16 = types.int16, types.uint16

U = np.uint32


@numba.njit(forceinline=True)
def number(bits):
    """The float32 of these bits."""
    return np.uint32(bits).view(np.float32)


@numba.njit(forceinline=True)
def bits_of(x):
    """The bits of a float32."""
    return np.float32(x).view(np.uint32)


def widen(x, zero):
    """A stored number as the type of ``zero``, the compute type."""
    raise NotImplementedError("only inside jitted code")


def narrow(x, like):
    """A number as the storage type of ``like``."""
    raise NotImplementedError("only inside jitted code")


@overload(widen, jit_options={"forceinline": True})
def _widen(x, zero):
    if x == _BFLOAT16:

        def convert(x, zero):
            return number(U(x) << U(16))

    elif x == _FLOAT16:

        def convert(x, zero):
            h = U(np.uint16(x))
            magnitude = U((h & U(0x7FFF)) << U(13))
            # The exponent's bias is corrected by a multiplication, which also normalises subnormals.
            finite = bits_of(number(magnitude) * np.float32(2.0**112))
            bits = U(magnitude | U(0x7F800000)) if magnitude >= U(0x0F800000) else finite
            return number(bits | U((h & U(0x8000)) << U(16)))

    else:

        def convert(x, zero):
            return type(zero)(x)

    return convert


@overload(narrow, jit_options={"forceinline": True})
def _narrow(x, like):
    if like == _BFLOAT16:

        def convert(x, like):
            bits = bits_of(x)
            rounded = U(U(bits + U(0x7FFF) + ((bits >> U(16)) & U(1))) >> U(16))
            quiet = U((bits >> U(16)) | U(0x40))
            return np.uint16(quiet if U(bits & U(0x7FFFFFFF)) > U(0x7F800000) else rounded)

    elif like == _FLOAT16:

        def convert(x, like):
            bits = bits_of(x)
            magnitude = U(bits & U(0x7FFFFFFF))
            normal = U(U(magnitude + U(0xC8000FFF) + ((magnitude >> U(13)) & U(1))) >> U(13))
            # Adding 0.5 aligns a subnormal's bits with the lowest of the sum, which the addition rounds.
            subnormal = U(bits_of(number(magnitude) + np.float32(0.5)) - U(0x3F000000))
            special = U(0x7E00) if magnitude > U(0x7F800000) else U(0x7C00)
            small_or_normal = subnormal if magnitude < U(0x38800000) else normal
            h = special if magnitude >= U(0x47800000) else small_or_normal
            return np.int16(np.uint16(h | U((bits >> U(16)) & U(0x8000))))

    else:

        def convert(x, like):
            return type(like)(x)

    return convert
