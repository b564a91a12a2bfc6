"""In place of NCCL: the interface of `cupyx.distributed.NCCLBackend` over MPI, by copies through the host."""

from typing import Any

import cupy
import numpy as np
from mpi4py import MPI

NCCL_TYPES = "bBiIlLqQefd"  # characters of the types that NCCLBackend takes
OPERATIONS = {"sum": MPI.SUM, "prod": MPI.PROD, "max": MPI.MAX, "min": MPI.MIN}


class StandIn:
    """Results appear on the device in stream order, so whoever reads them must wait for that stream."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank = comm.rank
        self.calls: list[tuple[str, str, int, int]] = []  # method, type, elements, stream

    def all_reduce(self, in_array: Any, out_array: Any, op: str = "sum", stream: Any = None) -> None:
        own, stream = self._read("all_reduce", in_array, in_array.size, stream)
        assert out_array.dtype == in_array.dtype
        assert out_array.size == in_array.size
        found = np.empty_like(own)
        self._comm.Allreduce(own, found, OPERATIONS[op])
        self._write(out_array, found, stream)

    def all_gather(self, in_array: Any, out_array: Any, count: int, stream: Any = None) -> None:
        own, stream = self._read("all_gather", in_array, count, stream)
        assert out_array.dtype == in_array.dtype
        assert out_array.size == count * self._comm.size
        found = np.empty(out_array.size, own.dtype)
        self._comm.Allgather(own[:count], found)
        self._write(out_array, found, stream)

    def _read(self, method: str, array: Any, count: int, stream: Any) -> tuple[np.ndarray, Any]:
        assert isinstance(array, cupy.ndarray)
        assert array.dtype.char in NCCL_TYPES, f"NCCL has no {array.dtype}"
        assert array.flags.c_contiguous
        assert len(set(self._comm.allgather((method, array.dtype.char, count)))) == 1, "NCCL would hang"
        stream = cupy.cuda.get_current_stream() if stream is None else stream
        self.calls.append((method, array.dtype.char, count, stream.ptr))
        with stream:
            return array.get().reshape(-1), stream  # waits for the stream, and for no other

    def _write(self, array: Any, values: np.ndarray, stream: Any) -> None:
        with stream:
            array.reshape(-1)[...] = cupy.asarray(values)
