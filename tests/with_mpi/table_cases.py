"""`ShardedTable` against one process with the whole table."""

import copy
import pickle
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop, Variable
from gpurms.distributed import MPIAverage, ShardedTable
from tests.support import BFLOAT16, DTYPES, assert_same_bits, full_rmsprop, unchanged
from tests.with_mpi.support import OPTIONS, counting, raises_everywhere, random, slices, together

F32 = np.float32
N_ROWS = 21


def whole_table(dtype: Any = F32, row: tuple[int, ...] = (3,)) -> np.ndarray:
    return random("table").standard_normal((N_ROWS, *row)).astype(dtype)


def sharded(comm: Any, dtype: Any = F32, row: tuple[int, ...] = (3,)) -> ShardedTable:
    return ShardedTable(N_ROWS, row, dtype, whole_table(dtype, row), comm)


def case_initializers(comm: Any) -> None:
    whole = whole_table()
    own = whole[comm.rank :: comm.size]
    folder = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    path = Path(folder) / "table.npy"
    if comm.rank == 0:
        np.save(path, whole)
    comm.Barrier()
    mapped = np.load(path, mmap_mode="r")
    seen = []

    def rows_of(ids: np.ndarray) -> np.ndarray:
        seen.append(ids)
        return whole[ids]

    for initializer in (whole, mapped, whole.tolist(), rows_of, np.asfortranarray(whole), Variable(whole)):
        for dtype in DTYPES:
            table = ShardedTable(N_ROWS, 3, dtype, initializer, comm, "words")
            assert_same_bits(table.shard, own.astype(dtype))
            assert type(table.shard.value) is np.ndarray
            assert table.shard.value.flags.c_contiguous
            assert not np.shares_memory(table.shard.value, whole)
    assert [ids.tolist() for ids in seen] == [list(range(comm.rank, N_ROWS, comm.size))] * len(DTYPES)
    table = ShardedTable(N_ROWS, (2, 3), comm=comm)
    assert_same_bits(table.shard, np.zeros((len(own), 2, 3), F32))
    assert table.rows.tolist() == seen[0].tolist()
    assert table.name == table.shard.name == "table"
    assert repr(table) == (
        f"<gpurms.distributed.ShardedTable 'table' shape=(21, 2, 3) dtype=float32, {len(own)} rows here>"
    )
    comm.Barrier()
    if comm.rank == 0:
        path.unlink()
        path.parent.rmdir()


def case_gather(comm: Any) -> None:
    for dtype in DTYPES:
        for row in ((3,), (), (2, 2), (0,)):
            whole, table = whole_table(dtype, row), sharded(comm, dtype, row)
            for shape in ((7,), (2, 5), (), (0,), (3, 0, 2), (200,)):
                ids = random(comm.rank).integers(0, N_ROWS, shape)
                assert_same_bits(table.gather(ids), whole[ids])
            for some in ([4, 4, 0], np.array([20, 1], np.uint8), np.array([[3]], np.int32), np.int64(5), []):
                assert_same_bits(table.gather(some), whole[np.asarray(some, int)])
            one_sided = np.arange(N_ROWS) if comm.rank == 1 else []
            assert_same_bits(table.gather(one_sided), whole[one_sided] if comm.rank == 1 else whole[:0])


def case_each_distinct_row_travels_once(comm: Any) -> None:
    counted = counting(comm, "Alltoallv")
    table = sharded(counted)
    table.gather([5, 6, 5, 5, 6, 7])
    (ids, _), (_, rows) = counted.calls["Alltoallv"]
    assert ids[0].nbytes == 3 * 8
    assert rows[0].nbytes == 3 * 3 * 4
    assert sum(ids[1]) == 3  # counts are of rows


def case_more_rows_than_the_library_counts(comm: Any) -> None:
    table, average = sharded(comm), MPIAverage(comm)
    table._mpi._most_rows = average._data._most_rows = 4 * comm.size
    few = np.zeros(4, int)
    sent = np.arange(4 * comm.size + 1) % N_ROWS if comm.rank == 1 else few  # rank 1 sends more than it may
    received = np.zeros(5 if comm.rank == 1 else 4, int)  # rank 0 would receive more
    for ids in (sent, received):
        with raises_everywhere(comm, ValueError, f"at most {4 * comm.size} rows at once; got {4 * comm.size + 1}"):
            table.scatter(IndexedSlices(np.ones((len(ids), 3), F32), ids))
    rows = IndexedSlices(np.ones((5, 3), F32), np.zeros(5, int))
    with raises_everywhere(comm, ValueError, f"at most {4 * comm.size} rows at once; got {5 * comm.size}"):
        average([(rows, np.zeros((4, 3), F32))])
    assert_same_bits(table.gather(few), whole_table()[few])


def case_memory_of_initializers(comm: Any) -> None:
    n_rows, row = comm.size * 2**16, 64
    expected = 2**16 * row * 4

    whole = np.broadcast_to(np.arange(row, dtype=np.float64), (n_rows, row))
    calls: list[np.ndarray] = []

    def rows_of(ids: np.ndarray) -> np.ndarray:
        calls.append(ids[[0, -1]])
        return np.full((len(ids), row), ids[:, None], F32)

    for initializer in (rows_of, whole):
        tracemalloc.start()
        table = ShardedTable(n_rows, row, initializer=initializer, comm=comm)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert expected <= peak < expected + 2**22 * 2.5
        values = table.shard.value
        assert (values == (table.rows[:, None] if initializer is rows_of else np.arange(row))).all()
    assert len(calls) == expected // 2**22
    assert calls[0][0] == comm.rank
    assert calls[-1][1] == table.rows[-1]


def case_rows_are_in_the_callers_hands(comm: Any) -> None:
    table = sharded(comm)
    rows = table.gather([0, 1, 2, 3])
    rows[...] = 7
    assert_same_bits(table.gather(np.arange(N_ROWS)), whole_table())


def case_apply_equals_one_process_to_the_bit(comm: Any) -> None:
    for dtype in DTYPES:
        for name, options in OPTIONS.items():
            whole, table = whole_table(dtype), sharded(comm, dtype)
            opt, single = RMSprop(0.1, **options), RMSprop(0.1, **options)
            for step in range(3):
                grads = [np.float32, np.float64, dtype][step] if np.dtype(dtype).itemsize == 2 else dtype
                average = step != 1
                parts = [
                    slices(N_ROWS, (3,), grads, name, step, rank, n=0 if rank == step else 150)
                    for rank in range(comm.size)
                ]
                mine = parts[comm.rank]
                given = mine.values.copy()
                if step == 2:
                    mine = IndexedSlices(mine.values, mine.indices.astype(np.int32), (N_ROWS, 3))
                assert table.apply(opt, mine, average) == step + 1
                assert_same_bits(mine.values, given)
                summed = IndexedSlices(*(np.concatenate([getattr(p, x) for p in parts]) for x in ("values", "indices")))
                single.apply_gradients([(together(parts, comm.size) if average else summed, whole)])
            assert_same_bits(table.gather(np.arange(N_ROWS)), whole)
            for mine_slot, slot in zip(opt.weights[1:], single.weights[1:], strict=True):
                assert_same_bits(mine_slot, slot.numpy()[comm.rank :: comm.size])


def case_a_step_with_dense_variables_and_two_tables(comm: Any) -> None:
    a, b = sharded(comm), ShardedTable(5, (), initializer=np.ones(5, F32), comm=comm, name="b")
    whole_a, whole_b, w, single_w = whole_table(), np.ones(5, F32), np.zeros(4), np.zeros(4)
    opt, single = full_rmsprop(gradient_aggregator=MPIAverage(comm)), full_rmsprop()
    for step in range(3):
        of_a = [slices(N_ROWS, (3,), F32, "a", rank, step) for rank in range(comm.size)]
        of_b = [slices(5, (), F32, "b", rank, step) for rank in range(comm.size)]
        of_w = [np.arange(4.0) + rank for rank in range(comm.size)]
        rows_a, rows_b = a.scatter(of_a[comm.rank]), b.scatter(of_b[comm.rank])
        opt.apply_gradients([(rows_a, a.shard), (of_w[comm.rank], w), (rows_b, b.shard)])
        single.apply_gradients(
            [
                (together(of_a, comm.size), whole_a),
                (sum(of_w) / comm.size, single_w),
                (together(of_b, comm.size), whole_b),
            ]
        )
    assert_same_bits(a.gather(np.arange(N_ROWS)), whole_a)
    assert_same_bits(b.gather(np.arange(5)), whole_b)
    assert_same_bits(w, single_w)


def case_more_ranks_than_rows(comm: Any) -> None:
    table = ShardedTable(1, 2, comm=comm)
    assert table.shard.shape == ((1, 2) if comm.rank == 0 else (0, 2))
    opt = RMSprop(0.5, rho=0.0, epsilon=0.0)
    assert table.apply(opt, IndexedSlices(np.ones((1, 2), F32), np.array([0]))) == 1
    assert (table.gather([0, 0]) == -0.5).all()
    empty = ShardedTable(0, 2, comm=comm)
    nothing = IndexedSlices(np.ones((0, 2), F32), np.empty(0, int))
    assert empty.gather([]).shape == (0, 2)
    assert empty.apply(opt, nothing) == 2
    assert table.apply(opt, nothing) == 3


ROWS, ONES = np.array([3, 1]), np.ones((2, 3), F32)
BAD_IDS: list[tuple[Any, type[Exception], str]] = [
    ([0, 21], IndexError, r"table 'table': index 21 at offset 1 is outside \[0, 21\)"),
    ([[0, 1], [-1, 2]], IndexError, r"index -1 at offset 2 is outside \[0, 21\)"),
    (np.array([2**64 - 1], np.uint64), IndexError, "index 9223372036854775807 at offset 0"),
    ([0.5], TypeError, "indices must be integers; got float64"),
    (None, TypeError, "indices must be integers; got object"),
]
BAD_SLICES: list[tuple[Any, type[Exception], str]] = [
    (IndexedSlices(ONES, np.array([3, 21])), IndexError, r"table 'table': index 21 at offset 1 is outside \[0, 21\)"),
    (IndexedSlices(ONES, np.array([-1, 2])), IndexError, "index -1 at offset 0"),
    (IndexedSlices(ONES, np.array([1.0, 2.0])), TypeError, "expected indices of int32 or int64; got float64"),
    (IndexedSlices(ONES, np.array([1, 2], np.uint8)), TypeError, "expected indices of int32 or int64; got uint8"),
    (IndexedSlices(ONES.astype(np.float64), ROWS), TypeError, "expected gradient values of float32; got float64"),
    (IndexedSlices(ONES.astype(int), ROWS), TypeError, "values: expected float16, bfloat16, .*; got int64"),
    (IndexedSlices(ONES.tolist(), ROWS), TypeError, "values: expected a NumPy array; got list"),
    (IndexedSlices(ONES[:, :2], ROWS), ValueError, r"expected rows of shape \(3,\); got \(2,\)"),
    (IndexedSlices(ONES[:1], ROWS), ValueError, r"expected gradient values for 2 indices; got shape \(1, 3\)"),
    (IndexedSlices(ONES, ROWS, (20, 3)), ValueError, r"expected dense_shape \(21, 3\); got \(20, 3\)"),
    (ONES, TypeError, "expected an IndexedSlices; got numpy.ndarray"),
]


def case_bad_arguments_of_one_rank_are_errors_on_every_rank(comm: Any) -> None:
    table, opt, good = sharded(comm), full_rmsprop(), IndexedSlices(ONES, ROWS)
    table.apply(opt, good)
    with unchanged(opt, table.shard):
        for bad, kind, message in BAD_IDS:
            with raises_everywhere(comm, kind, f"^rank 1: .*{message}"):
                table.gather(bad if comm.rank == 1 else [0])
        for bad, kind, message in BAD_SLICES:
            with raises_everywhere(comm, kind, f"^rank 1: .*{message}"):
                table.apply(opt, bad if comm.rank == 1 else good)
            with raises_everywhere(comm, kind, f"^rank 1: .*{message}"):
                table.scatter(bad if comm.rank == 1 else good)
        for option in ("clipnorm", "global_clipnorm"):
            clipping = RMSprop(**{option: 1.0}) if comm.rank == 1 else opt
            with raises_everywhere(comm, ValueError, f"rank 1: a ShardedTable cannot be clipped by {option}"):
                table.apply(clipping, good)
        with raises_everywhere(comm, TypeError, "rank 1: average must be True or False; got 2"):
            table.scatter(good, average=2 if comm.rank == 1 else True)
        with raises_everywhere(comm, TypeError, r"rank 1: optimizer must be a gpurms\.RMSprop; got int"):
            table.apply(3 if comm.rank == 1 else opt, good)
    assert table.apply(opt, good) == 2


SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": 0.2}, ValueError, r"^ranks disagree: .*learning_rate=0\.1; rank 1 has .*learning_rate=0\.2"),
    ({"lr": lambda: float("nan")}, ValueError, "^rank 1: learning_rate must be >= 0; got nan"),
    ({"lr": lambda: 1 / 0}, RuntimeError, "^rank 1: ZeroDivisionError: division by zero"),
    ({"dense_only": True}, ValueError, "^rank 1: table 'table': dense_only is set; gradients .* are sparse"),
    ({"gradient_aggregator": list}, ValueError, "gradient_aggregator=NoneType; rank 1 has .*=type"),
]


def case_settings_of_one_rank_are_errors_on_every_rank(comm: Any) -> None:
    table, opt, good = sharded(comm), full_rmsprop(), IndexedSlices(ONES, ROWS)
    table.apply(opt, good)
    with unchanged(opt, table.shard):
        for bad, kind, message in SETTINGS:
            other = full_rmsprop(**bad) if comm.rank == 1 else full_rmsprop()
            with raises_everywhere(comm, kind, message):
                table.apply(other, good)
            assert other.weights == []
        for array in (table.shard.value, opt.weights[-1].value):
            array.flags.writeable = comm.rank != 1
            with raises_everywhere(comm, TypeError, "^rank 1: table 'table': expected to write to its shard and slots"):
                table.apply(opt, good)
            array.flags.writeable = True
        opt.iterations.value.flags.writeable = comm.rank != 1
        with raises_everywhere(comm, TypeError, "^rank 1: iterations has been made read-only"):
            table.apply(opt, good)
        opt.iterations.value.flags.writeable = True
        table.shard.constraint = abs if comm.rank == 1 else None
        with raises_everywhere(comm, RuntimeError, "^rank 1: table 'table': a constraint cannot be used"):
            table.apply(opt, good)
        table.shard.constraint = None
    assert table.apply(opt, good) == 2


def case_norms_of_parts_are_refused(comm: Any) -> None:
    table, w = sharded(comm), np.ones(4, F32)
    some = table.scatter(IndexedSlices(ONES, ROWS))
    for option in ("clipnorm", "global_clipnorm"):
        for aggregator in (None, MPIAverage(comm)):
            for grad in (some, np.ones(table.shard.shape, F32), None):
                for pairs in ([(grad, table.shard)], [(np.ones(4, F32), w), (grad, table.shard)]):
                    opt = RMSprop(0.1, gradient_aggregator=aggregator, **{option: 1.0})
                    kept = unchanged(opt, table.shard, w)
                    with kept, raises_everywhere(comm, ValueError, "^variable 'table': clipnorm and global_clipnorm"):
                        opt.apply_gradients(pairs)
    opt = RMSprop(0.1, gradient_aggregator=MPIAverage(comm), clipvalue=0.5)
    opt.apply_gradients([(np.ones(4, F32), w), (some, table.shard)])
    opt.clipvalue, opt.clipnorm = None, 1.0
    with unchanged(opt, table.shard, w), raises_everywhere(comm, ValueError, "^variable 'table': clipnorm"):
        opt.apply_gradients([(np.ones(4, F32), w), (some, table.shard)])


BAD_TABLES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"n_rows": -1}, ValueError, "n_rows must be an integer >= 0; got -1"),
    ({"n_rows": 2.0}, TypeError, r"n_rows must be an integer >= 0; got 2\.0"),
    ({"n_rows": True}, ValueError, "n_rows must be an integer >= 0; got True"),
    ({"row_shape": (3, -1)}, ValueError, "row_shape must be an integer >= 0; got -1"),
    ({"row_shape": "3"}, TypeError, "row_shape must be an integer >= 0; got '3'"),
    ({"dtype": int}, TypeError, "dtype must be .*float16, bfloat16, float32 or float64; got"),
    ({"name": 3}, TypeError, "name must be a string; got 3"),
    ({"initializer": "ones"}, ValueError, "initializer must be 'zeros', a function or an array; got 'ones'"),
    ({"initializer": np.zeros((8, 3))}, ValueError, r"initializer must have shape \(21, 3\); got \(8, 3\)"),
    ({"initializer": lambda ids: np.zeros((len(ids), 2))}, ValueError, r"initializer must return shape \(\d+, 3\)"),
    ({"initializer": lambda ids: [[0.0] * 3] * len(ids)}, TypeError, "must give an array of real numbers"),
    ({"initializer": np.zeros((21, 3), complex)}, TypeError, "initializer must give an array of real numbers"),
    ({"initializer": lambda ids: 1 / 0}, RuntimeError, "ZeroDivisionError: division by zero"),
]
OTHER_TABLES = {"n_rows": 20, "row_shape": (2,), "dtype": BFLOAT16, "name": "words"}


def case_bad_or_different_tables(comm: Any) -> None:
    usual = {"n_rows": N_ROWS, "row_shape": (3,), "comm": comm}
    for bad, kind, message in BAD_TABLES:
        with raises_everywhere(comm, kind, f"^rank 1: .*{message}"):
            ShardedTable(**usual | (bad if comm.rank == 1 else {}))
    for option, value in OTHER_TABLES.items():
        with raises_everywhere(comm, ValueError, "^ranks disagree: rank 0 has making it: table 'table' .*; rank 1 has"):
            ShardedTable(**usual | ({option: value} if comm.rank == 1 else {}))
    assert (ShardedTable(**usual).gather([0]) == 0).all()


def case_different_calls_are_errors_on_every_rank(comm: Any) -> None:
    if comm.rank == 1:  # a table that the others do not have; numbers agree all the same
        from mpi4py import MPI

        ShardedTable(3, comm=MPI.COMM_SELF)
    one, two, average, good = sharded(comm), sharded(comm), MPIAverage(comm), IndexedSlices(ONES, ROWS)
    calls = {
        "gather: table": lambda: one.gather([1]),
        "scatter of float32, averaged: table": lambda: one.scatter(good),
        "scatter of float32, summed: table": lambda: one.scatter(good, average=False),
        "an average of gradients": lambda: average([]),
        "making it: table": lambda: ShardedTable(3, comm=comm),
    }
    for mine, call in calls.items():
        with raises_everywhere(
            comm, ValueError, rf"^ranks disagree: rank 0 has {mine}.*; rank 1 has gather: .* number"
        ):
            if comm.rank == 1:
                two.gather([0])
            else:
                call()
    assert_same_bits(two.gather([2]), whole_table()[[2]])


def case_copies_and_pickles(comm: Any) -> None:
    table, opt, good = sharded(comm), full_rmsprop(), IndexedSlices(ONES, ROWS)
    table.apply(opt, good)
    twin, twin_opt = copy.deepcopy((table, opt))
    for each, optimizer in ((table, opt), (twin, twin_opt)):
        assert each.apply(optimizer, good) == 2
    assert_same_bits(twin.gather(np.arange(N_ROWS)), table.gather(np.arange(N_ROWS)))
    assert not np.shares_memory(twin.shard.value, table.shard.value)
    with pytest.raises(TypeError, match="a ShardedTable cannot be pickled"):
        pickle.dumps(table)


def case_save_and_load_per_rank(comm: Any) -> None:
    folder = Path(comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None))
    path = folder / f"{comm.rank}.safetensors"
    table, opt, good = sharded(comm), full_rmsprop(), IndexedSlices(ONES, ROWS)
    table.apply(opt, good)
    opt.save(path, [table.shard])
    table.apply(opt, good)
    loaded, loaded_opt = ShardedTable(N_ROWS, (3,), comm=comm), full_rmsprop()
    loaded_opt.load(path, [loaded.shard])
    path.unlink()
    assert loaded.apply(loaded_opt, good) == 2
    assert_same_bits(loaded.shard, table.shard)
    for one, two in zip(opt.weights, loaded_opt.weights, strict=True):
        assert_same_bits(one, two)
    comm.Barrier()
    if comm.rank == 0:
        folder.rmdir()
