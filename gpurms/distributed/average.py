"""Gradients averaged over ranks: one flat buffer per dtype, one reduction each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn, Self

import numpy as np

from gpurms.distributed.agreement import Control, Intent, agreed
from gpurms.distributed.options import settings_of
from gpurms.distributed.packing import Packing, Pair, Plan, check_place, check_variables, is_sparse, label
from gpurms.distributed.slices import mean, rows_of
from gpurms.distributed.transport import Data, MPITransport, NCCLTransport
from gpurms.gradients import check_items, read_items
from gpurms.rmsprop import RMSprop
from gpurms.variable import Array, IndexedSlices

Rows = tuple[Array, Array]


class Average:
    """A ``gradient_aggregator``; see ``MPIAverage`` and ``NCCLAverage``."""

    def __init__(self, control: Control, data: Data) -> None:
        self._control = control
        self._data = data
        self._packing = Packing(data)

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return self._control.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._control.size

    def __call__(self, grads_and_vars: Iterable[Pair]) -> list[Pair]:
        """The pairs with averaged gradients; collective.

        What is compared are the pairs. An optimizer that then refuses them on one rank alone, by a setting that only
        this rank has, raises there and nowhere else: see ``agree``.

        Raises:
            TypeError, ValueError: on every rank: a gradient of some rank is none, a variable is read-only, or ranks
                have different pairs.
            RuntimeError: a CUDA graph is being captured; on every rank where the host's exchange goes over MPI.
        """
        if isinstance(self._control, NCCLTransport):  # then nothing can be told to others while a graph is captured
            self._check_no_capture()

        def prepare() -> tuple[Intent, tuple[list[Pair], Plan, list[Rows]]]:
            self._check_no_capture()
            items = read_items(grads_and_vars)
            check_items(items)
            check_variables(items)
            with self._data.near():
                rows = self._rows(items)
                plan = self._packing.pack(items)
            return plan.intent, (items, plan, rows)

        items, plan, rows = agreed(self._control, prepare)
        # Before the sums: over NCCL, the host would wait for these, too.
        counts = self._counts(rows)
        with self._data.near():
            for flat in plan.flats:
                self._data.sum(flat)
                np.divide(flat, flat.dtype.type(self.size), out=flat)
            sparse = (self._gather(*pair, of_ranks) for pair, of_ranks in zip(rows, counts))
            return [
                (next(sparse) if is_sparse(grad, variable) else plan.views.get(place, grad), variable)
                for place, (grad, variable) in enumerate(items)
            ]

    def agree(self, optimizer: RMSprop) -> None:
        """Check that all ranks have equal settings; collective.

        Call it before training, and again where settings were changed. Compared are ``get_config()`` but for the name,
        the number of steps taken, and the type of ``gradient_aggregator``. Callables are called; what they return
        later may differ.

        Raises:
            TypeError, ValueError: on every rank: settings differ, or a hyperparameter of some rank is out of its range.
        """
        agreed(self._control, lambda: (Intent.of(["a check of settings", *settings_of(optimizer)]), None))

    def _check_no_capture(self) -> None:
        if self._data.home.is_capturing(self._data.place()):
            raise RuntimeError(
                "a step that averages over ranks cannot be captured in a graph: the host takes part in it"
            )

    def _rows(self, items: list[Pair]) -> list[Rows]:
        found = []
        for place, (grad, variable) in enumerate(items):
            if is_sparse(grad, variable):
                where = label(variable, place)
                found.append(rows_of(grad, self._data.home, where, self._data.hint))
                check_place(self._data, where, *found[-1])
        return found

    def _counts(self, rows: list[Rows]) -> list[list[int]]:
        """For each sparse gradient, how many rows each rank has."""
        if not rows:
            return []
        own = np.array([len(indices) for _, indices in rows], np.int64)
        found: list[list[int]] = self._control.gather_counts(own).T.tolist()
        return found

    def _gather(self, values: Array, indices: Array, of_ranks: list[int]) -> IndexedSlices:
        """The rows of all ranks, in their order."""
        all_values = mean(self._data.gather(values, of_ranks), self.size)
        return IndexedSlices(all_values, self._data.gather(indices, of_ranks))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself, as a function would be: copies of an optimizer average over the same ranks."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled: its communicator exists in these processes only. Set the "
            "optimizer's gradient_aggregator to None first, and anew after loading"
        )


class MPIAverage(Average):
    """Averages NumPy gradients over the ranks of an MPI communicator: ``RMSprop(gradient_aggregator=MPIAverage())``.

    Dense gradients are packed into one flat buffer per dtype, kept from call to call, summed by one ``Allreduce`` each
    and divided by the number of ranks. 16-bit gradients, which MPI does not know, are summed and handed on as float32,
    which the optimizer takes for 16-bit variables. The averages are views of the buffers, in C order, and hold until
    the next call. ``IndexedSlices`` are concatenated in the order of the ranks, their values divided: to the bit what
    one process would get that had the data of all. Gradients of ``None`` and those of a ``ShardedTable``'s ``shard``
    are handed on as they are. The caller's gradients are not modified.

    All ranks must make equally many calls, with the same variables (by name, shape and type) in the same order, and
    with the same kind and type of gradient for each: that is compared in each call, before data moves. The settings of
    the optimizers are not, but by ``agree(optimizer)``, once or whenever the program likes. It uses the caller's
    communicator, so other collectives on it must be in the same order on all ranks, too.

    Copies of an optimizer share its ``MPIAverage``; it cannot be pickled.

    Args:
        comm: an intracommunicator of mpi4py. Default None: ``MPI.COMM_WORLD``. mpi4py is imported here.

    Raises:
        ImportError: mpi4py or its MPI library is missing.
        TypeError: comm is something else.
    """

    def __init__(self, comm: Any = None) -> None:
        transport = MPITransport(comm)
        super().__init__(transport, transport)


class NCCLAverage(Average):
    """Averages CuPy gradients over GPUs, one per rank: as ``MPIAverage``, but the data stays on the devices.

    Sums and packing go to CuPy's current stream, with buffers that are allocated once. The comparison of what the ranks
    are about to do is the host's business, and so are the row counts of sparse gradients: they travel over NCCL on a
    stream of their own, where the host waits for them and thus for the sums of the step before, or over ``comm``, where
    it waits for no GPU. Steps that average cannot be captured in a CUDA graph.

    Making one is collective. Make it with the communicator's device current.

    Args:
        communicator: a ``cupyx.distributed.NCCLBackend``, or an object with its ``rank``, ``all_reduce`` and
            ``all_gather``.
        comm: an intracommunicator of mpi4py with the same ranks, for what the host exchanges. Default None: NCCL.

    Raises:
        TypeError: communicator or comm is something else.
        ValueError: their ranks differ.
    """

    def __init__(self, communicator: Any, comm: Any = None) -> None:
        data = NCCLTransport(communicator)
        super().__init__(data if comm is None else MPITransport(comm), data)
        agreed(self._control, lambda: (_same_ranks(self._control, data), None))


def _same_ranks(control: Control, data: NCCLTransport) -> Intent:
    if (control.rank, control.size) != (data.rank, data.size):
        raise ValueError(
            f"comm has this process as rank {control.rank} of {control.size}; the NCCL communicator as rank "
            f"{data.rank} of {data.size}"
        )
    return Intent.of(["making an NCCLAverage"])
