"""The real `cupy` package on a machine without GPU or driver.

    with cupy_on_cpu() as machine:
        x = cupy.arange(10, dtype="float32")
        kernel((1,), (32,), (x, np.int64(10)))
        assert machine.launches[-1].name == "saxpy"

Arrays are real cupy.ndarray over host memory, RawKernel and ElementwiseKernel are compiled by NVRTC and interpreted,
streams order work as on a device. Whatever is not replaced here is CuPy's own, and fails if it needs the driver.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np

from tests.device import arrays, compute, indexing, launch, streams
from tests.device.machine import Machine, running

METHODS_OF_NUMPY = """
    all any argmax argmin argsort cumprod cumsum max mean min prod ptp repeat round searchsorted std sum trace var
"""
FUNCTIONS_OF_NUMPY = """
    allclose array_equal average column_stack concatenate count_nonzero cumprod cumsum diag diff dot dstack einsum
    hstack inner isclose kron matmul outer pad roll sort stack tensordot tile tril triu vdot vstack
"""
METHODS = {name: compute.method(name, getattr(np, name)) for name in METHODS_OF_NUMPY.split()}
METHODS |= {
    "__cupy_override_elementwise_kernel__": compute.override_elementwise,
    "__deepcopy__": arrays.deepcopy,
    "__getitem__": indexing.getitem,
    "__matmul__": lambda self, other: (cupy if isinstance(other, cupy.ndarray) else np).matmul(self, other),
    "__reduce__": arrays.reduce,
    "__setitem__": indexing.setitem,
    "_scatter_op": indexing.scatter,
    "copy": arrays.copy,
    "device": arrays.device,
    "dot": lambda self, b, out=None: cupy.dot(self, b, out=out),
    "fill": arrays.fill,
    "get": arrays.get,
    "nonzero": lambda self: cupy.nonzero(self),
    "set": arrays.set_,
    "sort": arrays.sort,
    "take": indexing.take,
}
FUNCTIONS = {name: compute.device_function(name, getattr(np, name)) for name in FUNCTIONS_OF_NUMPY.split()}
FUNCTIONS |= {
    name: compute.synchronising(name, getattr(np, name))
    for name in ("argwhere", "bincount", "flatnonzero", "nonzero", "unique")
}
FUNCTIONS |= {
    "ElementwiseKernel": launch.ElementwiseKernel,
    "RawKernel": launch.RawKernel,
    "get_default_memory_pool": streams.MemoryPool,
}
CUDA = {
    "Device": streams.Device,
    "Event": streams.Event,
    "Graph": streams.Graph,
    "Stream": streams.Stream,
    "UnownedMemory": streams.UnownedMemory,
    "alloc_pinned_memory": streams.alloc_pinned_memory,
    "get_current_stream": streams.get_current_stream,
    "get_elapsed_time": streams.get_elapsed_time,
    "is_available": lambda: True,
}
PATCHES: list[tuple[Any, dict[str, Any]]] = [
    (cupy.ndarray, METHODS),
    (cupy, FUNCTIONS),
    (cupy.cuda, CUDA),
    (cupy.cuda.runtime, streams.RUNTIME),
    (cupy._core, {"array": arrays.array}),  # where cupy.array, asarray and others lead
    (cupy._core.core, {"array": arrays.array}),  # the name in a pickle
]


@contextlib.contextmanager
def cupy_on_cpu(n_devices: int = 1, *, deferred: bool = False, seed: int = 0) -> Iterator[Machine]:
    """Make CuPy work without a device inside the block, and leave it as it was.

    Args:
        n_devices: how many devices there are.
        deferred: run work only when the host waits for it, in a random order that the streams allow.
        seed: chooses that order.
    """
    machine = Machine(n_devices, deferred=deferred, seed=seed)
    allocator = cupy.cuda.get_allocator()
    with running(machine), contextlib.ExitStack() as undo:
        for owner, names in PATCHES:
            for name, value in names.items():
                undo.callback(_restore, owner, name, owner.__dict__.get(name, _ABSENT))
                setattr(owner, name, value)
        cupy.cuda.set_allocator(arrays.allocator)
        undo.callback(cupy.cuda.set_allocator, allocator)
        yield machine
        machine.synchronise("end")  # a fault in work that nobody waited for is a fault


_ABSENT = object()


def _restore(owner: Any, name: str, value: Any) -> None:
    if value is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)
