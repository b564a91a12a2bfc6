"""CUDA text to kernels, and kernels to the GPU: the only place that compiles and launches.

The text of a kernel is complete in itself, because CuPy's cache on disk knows a kernel by its text alone: ``#define``
lines for types, sizes and flags, then the files below, one after the other. Each combination is a module of its own,
compiled when it is first needed, per device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from gpurms.kernels.rule import SCALARS, Flags, Update

OPTIONS = ("--fmad=false",)
"""No contraction: a fused multiply-add rounds once where the CPU rounds twice."""
TYPES = {"float16": "float16_t", "bfloat16": "bfloat16_t", "float32": "float", "float64": "double"}
"""Element types by the names of their dtypes."""

Defines = tuple[tuple[str, str], ...]
Kind = Any  # a NumPy scalar type, a structured dtype, or POINTER
POINTER = "pointer"


@cache
def text(*files: str) -> str:
    """The files of this folder, joined."""
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in files)


def flags(on: Flags) -> dict[str, Any]:
    """The flags of a rule as macros: ``CENTERED 1``."""
    return {name.upper(): int(value) for name, value in on._asdict().items()}


def types(compute: np.dtype[Any], **elements: np.dtype[Any]) -> dict[str, Any]:
    """Element types as macros, and how many elements of the smallest a thread moves at once: 16 bytes."""
    names = {"compute_t": TYPES[compute.name], **{name: TYPES[dtype.name] for name, dtype in elements.items()}}
    return {**names, "VECTOR": 16 // min(dtype.itemsize for dtype in (compute, *elements.values()))}


def element_types(update: Update) -> dict[str, np.dtype[Any]]:
    """The types of the variable and of the slots it has, by the names that they have in the kernels."""
    arrays = {"var_t": update.var, "rms_t": update.rms, "mom_t": update.mom, "mg_t": update.mg}
    return {name: array.dtype for name, array in arrays.items() if array is not None}


def defines(*macros: Mapping[str, Any]) -> Defines:
    """Macros in a form that can be a key."""
    return tuple((name, str(value)) for each in macros for name, value in each.items())


@cache
def scalars_type(compute: np.dtype[Any]) -> np.dtype[Any]:
    """``Scalars`` of rmsprop.cuh: a rule's scalars, passed by value."""
    return np.dtype([(name, compute) for name in SCALARS])


def table_type(n_bytes: int) -> np.dtype[Any]:
    """A struct of 64-bit members, passed by value."""
    return np.dtype([("words", np.int64, (n_bytes // 8,))])


class Kernel:
    """A kernel and the kinds of its parameters, which CuPy does not know and would not check."""

    def __init__(self, raw: Any, kinds: tuple[Kind, ...]) -> None:
        self._raw = raw
        self._kinds = kinds
        self._compiled: set[int] = set()

    def compile(self) -> None:
        """Compile and load for the current device, once, so that a launch cannot fail for it."""
        device = cupy.cuda.runtime.getDevice()
        if device not in self._compiled:
            self._raw.compile()
            self._compiled.add(device)

    def __call__(self, n_blocks: int, n_threads: int, *arguments: Any) -> None:
        """Launch on the current stream of the current device."""
        packed = tuple(_pack(kind, value) for kind, value in zip(self._kinds, arguments, strict=True))
        self._raw((n_blocks,), (n_threads,), packed)


def _pack(kind: Kind, value: Any) -> Any:
    """A value as CuPy passes it on unchanged: NumPy scalars and structs by their own bytes, addresses as integers."""
    if kind is POINTER:
        return np.uint64(0 if value is None else value if isinstance(value, int) else address(value))
    if isinstance(kind, np.dtype):
        if value.dtype != kind or value.size != 1:
            raise TypeError(f"expected one {kind} as a kernel parameter; got {value.size} of {value.dtype}")
        return value
    return kind(value)


def address(array: Any) -> int:
    """Where an array begins; a kernel takes it for contiguous memory of the current device."""
    if not array.flags.c_contiguous:
        raise ValueError(f"expected a contiguous array as a kernel parameter; got strides {array.strides}")
    if array.size and array.data.device_id != cupy.cuda.runtime.getDevice():
        raise ValueError(
            f"expected an array on the current device {cupy.cuda.runtime.getDevice()} as a kernel parameter; "
            f"got one on device {array.data.device_id}"
        )
    return int(array.data.ptr)


@cache
def kernel(files: tuple[str, ...], name: str, macros: Defines, kinds: tuple[Kind, ...]) -> Kernel:
    """The kernel ``name`` of the joined files."""
    lines = "".join(f"#define {macro} {value}\n" for macro, value in macros)
    return Kernel(cupy.RawKernel(lines + text(*files), name, options=OPTIONS, backend="nvrtc"), kinds)


@cache
def elementwise(arguments: str, results: str, operation: str, macros: Defines, files: tuple[str, ...]) -> Any:
    """A ``cupy.ElementwiseKernel`` with the files as preamble, in a namespace that keeps their names from CuPy's."""
    lines = "".join(f"#define {macro} {value}\n" for macro, value in macros)
    preamble = f"{lines}namespace gpurms {{\n{text(*files)}\n}}\n"
    return cupy.ElementwiseKernel(arguments, results, operation, "rmsprop", preamble=preamble, options=OPTIONS)


@cache
def parameter_bytes(device: int) -> int:
    """How many bytes of parameters a kernel may have: more since CUDA 12.1, on Volta and later."""
    large = (
        cupy.cuda.nvrtc.getVersion() >= (12, 1)
        and cupy.cuda.runtime.driverGetVersion() >= 12010
        and int(cupy.cuda.Device(device).compute_capability) >= 70
    )
    return 32764 if large else 4096


def is_capturing() -> bool:
    """Whether the current stream records a graph instead of running."""
    return bool(cupy.cuda.get_current_stream().is_capturing())


Planned = Callable[[], None]
