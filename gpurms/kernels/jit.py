"""How kernels are compiled: names, disk cache, array types."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import carray, types  # type: ignore[attr-defined]  # which Numba exports by a list of strings
from numba.extending import intrinsic

from gpurms.kernels import pool

# Numba finds a cached kernel by the values in its closure. Those are plain tuples here: a jitted function among them
# would be new in every process and never be found, so all functions that kernels call are globals.

compiling = pool.fork_safe_lock()

_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()[:12]
"""Of all modules here: Numba looks only at the file of the kernel, not at what the kernel calls."""


def jit(signature: Any, *key: Any) -> Callable[[Any], Any]:
    """``numba.njit`` for a kernel that is compiled once per ``key``, kept on disk where a folder can be written.

    Key and sources become part of the function's name. Numba tells symbols apart by name and a counter of the process:
    a kernel loaded from disk and one just compiled for other flags would have the same.
    """

    def compile_(function: Any) -> Any:
        function.__qualname__ += "_".join(["", *map(_spell, key), _SOURCES])
        options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except Exception:  # no folder, a full disk, a damaged file: the cache fails in many ways. Bad code fails again
            return numba.njit(signature, **options)(function)

    return compile_


def _spell(part: Any) -> str:
    return "".join(str(int(each)) if isinstance(each, bool) else each.name for each in part)


def inline(function: Any) -> Any:
    """For the bodies of the loops: LLVM inlines them into each kernel and folds the flags ``on``, constants there."""
    return numba.njit(error_model="numpy", forceinline=True)(function)


@intrinsic
def _pointer(context, address, like):
    """An address as a pointer to elements of an array like ``like``."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), generate


@inline
def array_at(address, n, like):
    """The 1-D array of n elements at an address, of the type of ``like``."""
    return carray(_pointer(address, like), (n,))  # type: ignore[call-arg]  # Numba passes the context


def contiguous(dtype: Any, ndim: int = 1, readonly: bool = False) -> types.Array:
    """The type of C-contiguous, aligned arrays."""
    return types.Array(dtype, ndim, "C", readonly=readonly)
