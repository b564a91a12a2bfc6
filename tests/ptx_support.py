"""Helpers of the tests of the PTX interpreter: launches on NumPy arrays, and exact rounding to compare with."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.device import ptx

Argument = np.ndarray | np.generic
INDEX = "long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;"


def find_nvrtc() -> Any:
    """The compiler; skips the test where it cannot be had."""
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from cupy.cuda import nvrtc as library

    from tests.device import nvrtc

    try:
        library.getVersion()
    except RuntimeError as error:
        pytest.skip(f"NVRTC cannot be loaded: {error}")
    return nvrtc


def kernel(parameters: str, body: str, before: str = "") -> ptx.Kernel:
    """The kernel of these parameters and body, compiled."""
    head = "typedef unsigned int u32; typedef unsigned long long u64; typedef unsigned short u16;"
    source = f'{head}\n{before}\nextern "C" __global__ void k({parameters}) {{ {body} }}'
    return ptx.Module(find_nvrtc().compile(source, ("--fmad=false",))).kernels["k"]


def launch(
    function: ptx.Kernel, grid: int, block: int, *arguments: Argument, read_only: Any = (), **options: Any
) -> None:
    """Run a kernel; arrays are passed by pointer, NumPy scalars and structures of no dimension by value.

    The buffers are called a0, a1, ... by the number of their argument.
    """
    memory = ptx.Memory()
    values = []
    for number, argument in enumerate(arguments):
        if isinstance(argument, np.ndarray) and argument.ndim:
            values.append(np.uint64(argument.ctypes.data).tobytes())
            memory.add(argument.ctypes.data, argument.nbytes, f"a{number}", number not in read_only)
        else:
            values.append(argument.tobytes())
    ptx.run(function, (grid,), (block,), values, memory, **options)


_REGISTERS = "".join(f".reg .b{8 * size} %{name}<8>; " for name, size in (("h", 2), ("r", 4), ("w", 8)))


def compute(instructions: str, result: Any, *operands: np.ndarray) -> np.ndarray:
    """What PTX instructions make of registers x0, x1, ..., one thread per element; y is the result, of this dtype.

    %p, %h, %r and %w are free registers: predicates, and 16, 32 and 64 bits.
    """
    out = np.zeros(operands[0].shape, result)
    arrays = [*operands, out]
    names = [*(f"x{n}" for n in range(len(operands))), "y"]
    widths = [max(2, a.itemsize) for a in arrays]
    lines = [
        f".reg .pred %p<4>; {_REGISTERS}",
        *(f".reg .b{8 * w} {name};" for name, w in zip(names, widths)),
        ".reg .u64 %at<4>; mov.u32 %r0, %tid.x;",
    ]
    for name, array in zip(names, arrays):
        lines.append(f"ld.param.u64 %at0, [{name}_at]; mul.wide.u32 %at1, %r0, {array.itemsize};")
        lines.append(f"add.s64 %at2, %at0, %at1; ld.global.{_type(array)} {name}, [%at2];")
    lines.append(f"{instructions} st.global.{_type(out)} [%at2], y; ret;")
    parameters = ", ".join(f".param .u64 {name}_at" for name in names)
    text = f".visible .entry compute({parameters}) {{ {' '.join(lines)} }}"
    launch(ptx.Module(text.encode()).kernels["compute"], 1, len(out), *arrays)
    return out


def _type(array: np.ndarray) -> str:
    return f"{'s' if array.dtype.kind == 'i' else 'u'}{8 * array.itemsize}"


def nearest(value: Fraction, dtype: Any) -> np.ndarray:
    """The value rounded once, to nearest, ties to even; a zero is positive."""
    info = np.finfo(dtype)
    if value == 0:
        return np.array(0, dtype)
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, int(info.minexp)) - info.nmant)
    rounded = round(value / unit) * unit
    if abs(rounded) > Fraction(float(info.max)):
        return np.array(np.inf if value > 0 else -np.inf, dtype)
    return np.array(float(rounded), dtype)


def hard_floats(dtype: Any, count: int = 0) -> np.ndarray:
    """Zeros, subnormals, limits, infinities, NaN, and random bits."""
    info = np.finfo(dtype)
    least, normal = info.smallest_subnormal, info.smallest_normal
    special = [0.0, least, 3 * least, normal - least, normal, 1.0, 1 + info.eps, 1.5, 3.0, info.max, np.inf, np.nan]
    bits = np.random.default_rng(count).integers(0, 256, count * info.dtype.itemsize, np.uint8)
    with np.errstate(all="ignore"):
        values = np.array([*special, *(-np.array(special))]).astype(dtype)
    return np.concatenate([values, bits.view(dtype)])


def pairs(values: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every value with every value."""
    first, second = np.meshgrid(values, values)
    return first.ravel(), second.ravel()


def assert_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Every bit agrees, except that any NaN of one matches any of the other."""
    assert got.dtype == want.dtype
    bits = f"u{got.itemsize}"
    same = (got.view(bits) == want.view(bits)) | ((got != got) & (want != want))
    bad = np.flatnonzero(~same)[:5]
    assert same.all(), f"at {bad}: got {got[bad]}, want {want[bad]}"
