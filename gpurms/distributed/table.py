"""An embedding table whose rows live on the ranks, each row on one."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np

from gpurms import backend, hyper
from gpurms.arguments import flag
from gpurms.distributed.agreement import Intent, Words, agreed
from gpurms.distributed.initial import Initializer, first_rows
from gpurms.distributed.options import settings_of
from gpurms.distributed.slices import Shard, mean, rows_of
from gpurms.distributed.transport import NUMPY, MPITransport
from gpurms.kernels.rule import FLOAT32, FLOAT64
from gpurms.rmsprop import RMSprop
from gpurms.slots import array_of
from gpurms.variable import Array, IndexedSlices


class Requests(NamedTuple):
    """What one rank asks of the owners: each distinct row once, as numbers in the owner's shard, grouped by owner."""

    rows: Words
    counts: Words  # per owner
    places: Words  # for each id, its place in rows
    shape: tuple[int, ...]  # of the ids


class ShardedTable:
    """A table of ``n_rows`` rows over the ranks of an MPI communicator; making one is collective.

    Row ``i`` lives on rank ``i % size``, so that ids sorted by frequency are spread evenly. ``gather`` and ``scatter``
    exchange only ids and rows, and ``gather`` each distinct row once. Updates equal, to the bit, those of one process
    that has the whole table and the gradients of all ranks, concatenated in their order.

    ``shard`` is a variable like any other, with slots in the optimizer of its rank; rows on a GPU pass through host
    memory on their way to other ranks. Save and load per rank: ``optimizer.save(path_of_rank, [table.shard])``. Where
    the number of ranks may change, save ``rows`` with it. A deep copy of (optimizer, table) together shares the
    communicator; a table cannot be pickled.

    Args:
        n_rows: number of rows of the whole table.
        row_shape: shape of a row, or its length. Default (): a number.
        dtype: float16, bfloat16, float32 or float64. Default float32.
        initializer: "zeros", in ``gpurms.array_module()``; a function of an array of row numbers that returns
            these rows, called several times, for one block of this rank's ``rows`` after the other; or the whole table,
            such as a ``numpy.memmap``, of which each rank reads its own rows. Only the shard itself is allocated in
            full, in the library of these arrays.
        comm: an intracommunicator of mpi4py. Default None: ``MPI.COMM_WORLD``.
        name: for messages. Default "table".

    Attributes:
        shard: the ``Variable`` with the rows of this rank; row ``k`` of it is row ``rows[k]`` of the table.

    Raises:
        ImportError: mpi4py or its MPI library is missing.
        TypeError, ValueError: a wrong argument on some rank, or different ones; raised on every rank.
    """

    _made = 0

    def __init__(
        self,
        n_rows: int,
        row_shape: int | Sequence[int] = (),
        dtype: Any = np.float32,
        initializer: Initializer = "zeros",
        comm: Any = None,
        name: str | None = None,
    ) -> None:
        self._mpi = MPITransport(comm)

        def prepare() -> tuple[Intent, Shard]:
            self.name = "table" if name is None else hyper.text("name", name)
            self.n_rows = _length("n_rows", n_rows)
            lengths = row_shape if isinstance(row_shape, Sequence) else (row_shape,)
            self.row_shape = tuple(_length("row_shape", length) for length in lengths)
            self.dtype: np.dtype[Any] = hyper.slot_type("dtype", np.float32 if dtype is None else dtype) or FLOAT32
            self._per_rank = max(1, -(-self.n_rows // self._mpi.size))  # the most rows that a rank has
            shape = (self.n_rows, *self.row_shape)
            own = range(self._mpi.rank, self.n_rows, self._mpi.size)
            return self._intent("making it"), Shard(first_rows(initializer, shape, self.dtype, own), self.name)

        self._number = 0
        self.shard = agreed(self._mpi, prepare)
        # Tables of equal names and shapes are told apart by a number, which ranks with other tables besides would not
        # agree on by themselves.
        self._number = int(self._mpi.greatest(np.array([ShardedTable._made + 1], np.int64))[0])
        ShardedTable._made = self._number

    @property
    def rows(self) -> Words:
        """The numbers in the whole table of the rows of this rank."""
        return np.arange(self._mpi.rank, self.n_rows, self._mpi.size)

    def gather(self, ids: Any) -> Array:
        """Rows of the table, for the ids of this rank; collective.

        Args:
            ids: integers of any shape, each in [0, n_rows). They may differ between the ranks, and be none.

        Returns:
            A new array of shape ``ids.shape + row_shape``, beside ``shard``.

        Raises:
            TypeError: ids of some rank are no integers; raised on every rank.
            IndexError: an id of some rank is outside the table; raised on every rank.
            ValueError: another rank makes another call.
        """
        wanted = agreed(self._mpi, lambda: (self._intent("gather"), self._requests(ids)))
        expected = self._mpi.swap(wanted.counts)
        asked = self._mpi.exchange(wanted.rows, wanted.counts, expected)
        rows = self._mpi.exchange(self._read(asked), expected, wanted.counts)
        return self._beside(rows[wanted.places].reshape(wanted.shape + self.row_shape))

    def scatter(self, slices: IndexedSlices, average: bool = True) -> IndexedSlices:
        """The gradients of the rows of this rank, out of the gradients of all ranks; collective.

        Pass it on with ``shard``, alone or with other pairs of the same step, also if it has no rows: then the counters
        of all ranks move alike. Norms to clip by would be those of the shards: an optimizer with ``clipnorm`` or
        ``global_clipnorm`` refuses ``shard``. Settings of the optimizers are compared by ``MPIAverage.agree`` and by
        ``apply``, not here.

        Args:
            slices: gradients by id of the whole table, in the library of ``shard``.
            average: divide the values by the number of ranks. 16-bit values become float32 by that.

        Returns:
            An ``IndexedSlices`` for ``shard``, in the order of the ranks and of their slices.

        Raises:
            TypeError, IndexError, ValueError: a wrong argument on some rank, or different calls; raised on every rank.
        """
        return self._scatter(slices, average, None)

    def apply(self, optimizer: RMSprop, slices: IndexedSlices, average: bool = True) -> np.int64:
        """``optimizer.apply_gradients([(self.scatter(slices, average), self.shard)])``; collective.

        Settings of the optimizers are compared as by ``MPIAverage.agree``, so that callables among them are called
        twice per step.

        Raises:
            TypeError, IndexError, RuntimeError, ValueError: besides what ``scatter`` raises, on every rank: optimizers
                have different settings; or that of some rank clips by norms, which no rank knows, has ``dense_only`` or
                a hyperparameter out of its range; or ``shard`` has a constraint, or it or a slot is read-only.
        """
        own = self._scatter(slices, average, optimizer)
        return optimizer.apply_gradients([(own, self.shard)])

    def _scatter(self, slices: IndexedSlices, average: bool, optimizer: RMSprop | None) -> IndexedSlices:
        def prepare() -> tuple[Intent, tuple[Array, Words, Words]]:
            settings = [] if optimizer is None else self._settings(optimizer)
            values, ids = self._read_slices(slices)
            owners = ids % self._mpi.size
            # Types of 16 bits and fewer are sorted by radix.
            order = np.argsort(owners.astype(np.min_scalar_type(self._mpi.size)), kind="stable")
            counts = np.bincount(owners, minlength=self._mpi.size)
            what = f"scatter of {values.dtype}, {'averaged' if flag('average', average) else 'summed'}"
            intent = self._intent(what, settings)
            return intent, (values[order], ids[order] // self._mpi.size, counts)

        values, rows, counts = agreed(self._mpi, prepare)
        expected = self._mpi.swap(counts)
        rows = self._mpi.exchange(rows, counts, expected)
        values = self._mpi.exchange(values, counts, expected)
        if average:
            values = mean(values, self._mpi.size)
        return IndexedSlices(self._beside(values), self._beside(rows))

    def _requests(self, ids: Any) -> Requests:
        array = array_of(ids)
        home = backend.of(array)
        at = NUMPY.indices(self.shard._array, array if home is None else home.host(array)).astype(np.int64)
        flat = at.reshape(-1)
        self._check_ids(flat)
        # Sorted by this key, rows are grouped by owner.
        keys, places = np.unique(flat % self._mpi.size * self._per_rank + flat // self._mpi.size, return_inverse=True)
        owners, rows = np.divmod(keys, self._per_rank)
        return Requests(rows, np.bincount(owners, minlength=self._mpi.size), places, at.shape)

    def _read_slices(self, slices: IndexedSlices) -> tuple[Array, Words]:
        if not isinstance(slices, IndexedSlices):
            raise TypeError(f"{self._label}: expected an IndexedSlices; got {backend.type_name(slices)}")
        home = backend.require(self.shard._array)
        values, indices = rows_of(slices, home, self._label, f"as the shard is a {home.name} array")
        if values.dtype not in {self.dtype, *((FLOAT32, FLOAT64) if self.dtype.itemsize == 2 else ())}:
            raise TypeError(f"{self._label}: expected gradient values of {self.dtype}; got {values.dtype}")
        if values.shape[1:] != self.row_shape:
            raise ValueError(f"{self._label}: expected rows of shape {self.row_shape}; got {values.shape[1:]}")
        shape = (self.n_rows, *self.row_shape)
        if slices.dense_shape is not None and not np.array_equal(slices.dense_shape, shape):
            raise ValueError(f"{self._label}: expected dense_shape {shape}; got {slices.dense_shape}")
        ids = home.host(indices).astype(np.int64)
        self._check_ids(ids)
        return home.host(values), ids

    def _check_ids(self, flat: Words) -> None:
        outside = NUMPY.first_outside([(flat, self.n_rows)])
        if outside is not None:
            offset = outside[1]
            raise IndexError(
                f"{self._label}: index {int(flat[offset])} at offset {offset} is outside [0, {self.n_rows})"
            )

    def _read(self, rows: Words) -> Array:
        array = self.shard._array
        home = backend.require(array)
        with home.near(array):
            return home.host(array[home.indices(array, rows)])

    def _beside(self, host: Array) -> Array:
        """An array in the library and on the device of the shard."""
        with backend.require(self.shard._array).near(self.shard._array):
            return np.asarray(host, like=self.shard._array)

    @property
    def _label(self) -> str:
        return f"table {self.name!r}"

    def _intent(self, what: str, settings: Sequence[str] = ()) -> Intent:
        number = f", number {self._number}" if self._number else ""
        rows = f"{self.n_rows} rows of {self.dtype}, shape {self.row_shape}{number}"
        return Intent.of([f"{what}: {self._label} ({rows})", *settings])

    def _settings(self, optimizer: RMSprop) -> list[str]:
        """Those of an optimizer that could update ``shard``."""
        found = settings_of(optimizer)
        for option in ("clipnorm", "global_clipnorm"):
            if getattr(optimizer, option) is not None:
                raise ValueError(f"a ShardedTable cannot be clipped by {option}: no rank has the whole gradient")
        if optimizer.dense_only:
            raise ValueError(f"{self._label}: dense_only is set; gradients of a ShardedTable are sparse")
        if self.shard.constraint is not None:
            raise RuntimeError(f"{self._label}: a constraint cannot be used with a sparse gradient")
        if optimizer._counter is not None:
            optimizer._counter.require_writeable()
        entry = optimizer._slots.find(self.shard)
        written = [self.shard._array] if entry is None else entry.written
        if not backend.require(self.shard._array).writeable(written):
            raise TypeError(f"{self._label}: expected to write to its shard and slots; one of them is read-only")
        return found

    def __repr__(self) -> str:
        return (
            f"<gpurms.distributed.ShardedTable {self.name!r} shape={(self.n_rows, *self.row_shape)} "
            f"dtype={self.dtype.name}, {self.shard.shape[0]} rows here>"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        found = memo[id(self)] = object.__new__(type(self))
        found.__dict__.update(self.__dict__)
        found.shard = copy.deepcopy(self.shard, memo)
        return found

    def __reduce__(self) -> NoReturn:
        raise TypeError("a ShardedTable cannot be pickled: its communicator exists in these processes only")


def _length(what: str, value: Any) -> int:
    try:
        length = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{what} must be an integer >= 0; got {value!r}") from error
    if length < 0 or isinstance(value, bool):
        raise ValueError(f"{what} must be an integer >= 0; got {value!r}")
    return length
