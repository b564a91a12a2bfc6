"""NVRTC, which needs no device, called the way CuPy calls it for a RawKernel."""

import io
import re
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from cupy._core import core
from cupy.cuda import compiler


def compile(source: str, options: Iterable[str] = (), arch: str = "90", kind: str = "ptx") -> bytes:
    """The PTX or cubin of `source`; raises cupy.cuda.compiler.CompileException with NVRTC's log."""
    if kind not in ("ptx", "cubin"):
        raise ValueError(f"kind must be 'ptx' or 'cubin', got {kind!r}")
    return _compile(source, tuple(options), arch, kind)


@cache
def _compile(source: str, options: tuple[str, ...], arch: str, kind: str) -> bytes:
    target = {"ptx": "compute", "cubin": "sm"}[kind]
    program = compiler._NVRTCProgram(source, "kernel.cu", method=kind)
    code, _ = program.compile((*_as_cupy(options), f"-arch={target}_{arch}"))
    # CuPy drops the last byte of a cubin, without which cuobjdump does not read it.
    return code + b"\0" if kind == "cubin" else code


class Resources(NamedTuple):
    """What a kernel takes of a multiprocessor; of `stack` and `spills`, bytes a thread."""

    registers: int
    stack: int
    spills: int
    shared: int


_RESOURCES = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)


@cache
def machine_code(source: str, options: tuple[str, ...], arch: str) -> tuple[bytes, dict[str, Resources]]:
    """The cubin of `source`, and what the assembler says of each of its kernels."""
    program, log = compiler._NVRTCProgram(source, "kernel.cu", method="cubin"), io.StringIO()
    code, _ = program.compile((*_as_cupy(options), f"-arch=sm_{arch}", "--ptxas-options=-v"), log)
    found = {
        name: Resources(int(registers), int(stack), int(stores) + int(loads), int(shared or 0))
        for name, stack, stores, loads, registers, shared in _RESOURCES.findall(log.getvalue())
    }
    return code + b"\0", found


def _as_cupy(options: tuple[str, ...]) -> tuple[str, ...]:
    return (*core.assemble_cupy_compiler_options(options), "-ftz=true", "--device-as-default-execution-space")
