"""NVRTC, which needs no device, called the way CuPy calls it for a RawKernel."""

from collections.abc import Iterable
from functools import cache

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


def _as_cupy(options: tuple[str, ...]) -> tuple[str, ...]:
    return (*core.assemble_cupy_compiler_options(options), "-ftz=true", "--device-as-default-execution-space")
