"""`NCCLAverage` on an emulated GPU per rank, whose streams run late and in any order, with a stand-in for NCCL."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop, Variable
from gpurms.distributed import MPIAverage, NCCLAverage, ShardedTable
from tests import engines
from tests.support import BFLOAT16, DTYPES, assert_same_bits, unchanged
from tests.with_mpi.average_cases import DISAGREEMENTS
from tests.with_mpi.support import OPTIONS, raises_everywhere, random, slices, together

F32 = np.float32


def on_device(case: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(case)
    def emulated(comm: Any) -> None:
        with engines.emulated(deferred=True, seed=comm.rank):
            case(comm)

    return emulated


def put(x: Any) -> Any:
    import cupy

    if isinstance(x, IndexedSlices):
        return IndexedSlices(put(x.values), put(x.indices), x.dense_shape)
    if isinstance(x, Variable):
        return Variable(put(x.value), x.name)
    return cupy.asarray(x) if isinstance(x, np.ndarray) else x


def averages(comm: Any) -> list[NCCLAverage]:
    """What the host exchanges goes over NCCL in the first, over MPI in the second."""
    from tests.with_mpi.stand_in import StandIn

    return [NCCLAverage(StandIn(comm)), NCCLAverage(StandIn(comm), comm)]


@on_device
def case_mean_of_every_type_shape_and_layout(comm: Any) -> None:
    for average in averages(comm):
        assert (average.rank, average.size) == (comm.rank, comm.size)
        wholes = [np.arange(24.0).reshape(4, 6), np.arange(5.0)]
        layouts = [lambda x: x, lambda x: x[::2], lambda x: x.T, lambda x: x[:0], lambda x: x[(0,) * x.ndim]]
        hosts = [(whole + 8 * comm.rank).astype(dtype) for whole in wholes for dtype in DTYPES]
        grads = [layout(put(host)) for host in hosts for layout in layouts]
        before = [np.array(layout(host)) for host in hosts for layout in layouts]
        for _ in range(2):
            found = average([(grad, grad) for grad in grads])
            for (mean, _), grad, old in zip(found, grads, before, strict=True):
                wide = np.dtype(F32) if old.dtype.itemsize == 2 else old.dtype
                shift = wide.type(4 * (comm.size - 1) - 8 * comm.rank)
                assert_same_bits(mean.get(), (old.astype(wide) + shift).astype(wide))
                assert_same_bits(grad.get(), old)


@on_device
def case_one_reduction_per_type_into_buffers_that_stay(comm: Any) -> None:
    import cupy

    from tests.with_mpi.stand_in import StandIn

    for over_mpi in (False, True):
        nccl = StandIn(comm)
        average = NCCLAverage(nccl, comm if over_mpi else None)
        dtypes = [F32, np.float64, BFLOAT16, np.float16]
        pairs = [(put(np.full(5, comm.rank, dtypes[i % 4])), put(np.zeros(5, dtypes[i % 4]))) for i in range(40)]
        cupy.cuda.Device().synchronize()
        addresses = set()
        for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)):
            with stream:
                nccl.calls.clear()
                found = average(pairs)
                sums = [call[:3] for call in nccl.calls if call[3] == stream.ptr]
                assert sums == [("all_reduce", "f", 150), ("all_reduce", "d", 50)]
                others = [call[:3] for call in nccl.calls if call[3] != stream.ptr]
                assert others == ([] if over_mpi else [("all_reduce", "l", 5)])
                addresses.add(tuple(grad.data.ptr for grad, _ in found))
                assert all((grad.get() == (comm.size - 1) / 2).all() for grad, _ in found)
        assert len(addresses) == 1


@on_device
def case_sparse_equals_one_process_with_all_slices(comm: Any) -> None:
    for average in averages(comm):
        for dtype, name in zip(DTYPES, OPTIONS):
            options = OPTIONS[name]
            start = random("table", name).standard_normal((6, 2)).astype(dtype)
            table, whole = put(start), start.copy()
            opt, single = RMSprop(0.1, gradient_aggregator=average, **options), RMSprop(0.1, **options)
            for step in range(3):
                parts = [
                    slices(6, (2,), dtype, name, step, rank, n=(0 if rank == step else 8 if step == 2 else 5 + rank))
                    for rank in range(comm.size)
                ]
                opt.apply_gradients([(put(parts[comm.rank]), table)])
                single.apply_gradients([(together(parts, comm.size), whole)])
            assert_same_bits(table.get(), whole)
            for mine, other in zip(opt.weights, single.weights, strict=True):
                assert_same_bits(mine, other)


@on_device
def case_the_host_waits_for_nothing_after_the_first_sum(comm: Any) -> None:
    from tests.with_mpi.stand_in import StandIn

    nccl = StandIn(comm)
    average = NCCLAverage(nccl)
    nccl.calls.clear()
    rows, table = put(slices(6, (2,), F32, comm.rank, n=3)), put(np.zeros((6, 2), F32))
    average([(table, table), (rows, table)])
    assert [call[:2] for call in nccl.calls] == [
        ("all_reduce", "l"),  # what the ranks are about to do
        ("all_gather", "l"),  # counts
        ("all_reduce", "f"),
        ("all_gather", "B"),
        ("all_gather", "B"),
    ]


@on_device
def case_no_rows_at_all(comm: Any) -> None:
    for average in averages(comm):
        nothing = put(IndexedSlices(np.ones((0, 2), F32), np.empty(0, int)))
        found = average([(nothing, put(np.zeros((3, 2), F32)))])[0][0]
        assert found.values.shape == (0, 2)
        assert found.indices.shape == (0,)


@on_device
def case_rows_that_are_not_contiguous(comm: Any) -> None:
    for average in averages(comm):
        values, ids = put(np.arange(24, dtype=F32).reshape(6, 4) * comm.size), put(np.arange(6) + comm.rank)
        found = average([(IndexedSlices(values[::2, ::2], ids[::2]), put(np.zeros((9, 2), F32)))])[0][0]
        assert found.values.get().tolist() == [[0, 2], [8, 10], [16, 18]] * comm.size
        assert found.indices.get().tolist() == [i + rank for rank in range(comm.size) for i in (0, 2, 4)]


@on_device
def case_training_equals_that_on_the_cpu(comm: Any) -> None:
    for average in averages(comm):
        host = MPIAverage(comm)
        start = np.arange(6, dtype=F32)
        w, host_w = put(start), start.copy()
        opt = RMSprop(0.1, momentum=0.9, gradient_aggregator=average)
        host_opt = RMSprop(0.1, momentum=0.9, gradient_aggregator=host)
        for step in range(4):  # the third and fourth take the optimizer's short cut
            grad = random(step, comm.rank).standard_normal(6).astype(F32)
            opt.apply_gradients([(put(grad), w)])
            host_opt.apply_gradients([(grad, host_w)])
        assert_same_bits(w.get(), host_w)


@on_device
def case_disagreement_is_an_error_on_every_rank(comm: Any) -> None:
    for average in averages(comm):
        opt = RMSprop(0.1, gradient_aggregator=average)
        ours = put(np.ones(2, F32))
        opt.apply_gradients([(ours, ours)])
        for rank_1, others, message in DISAGREEMENTS.values():
            pairs = [(put(grad), put(variable)) for grad, variable in (rank_1 if comm.rank == 1 else others)]
            kept = unchanged(opt, *(variable for _, variable in pairs))
            with kept, raises_everywhere(comm, ValueError, f"ranks disagree: .*{message}"):
                opt.apply_gradients(pairs)
            opt.apply_gradients([(ours, ours)])


@on_device
def case_arrays_of_the_other_library(comm: Any) -> None:
    host, device = np.ones(3, F32), put(np.ones(3, F32))
    sparse = IndexedSlices(host, put(np.array([0, 1, 2])))
    for average in averages(comm):
        with raises_everywhere(
            comm, TypeError, r"^rank 1: .*expected a CuPy array; got a NumPy array \(MPIAverage tak"
        ):
            average([(host if comm.rank == 1 else device, device)])
        with raises_everywhere(comm, TypeError, "^rank 1: .* values: expected a CuPy array; got a NumPy array"):
            average([(sparse, device)] if comm.rank == 1 else [])
        assert (average([(device, device)])[0][0].get() == 1).all()
    with raises_everywhere(comm, TypeError, r"^rank 1: .*expected a NumPy array; got a CuPy array \(NCCLAverage takes"):
        MPIAverage(comm)([(device if comm.rank == 1 else host, host)])


def case_gradient_on_another_gpu(comm: Any) -> None:
    with engines.emulated(n_devices=2):
        import cupy

        for average in averages(comm):
            with cupy.cuda.Device(1):
                elsewhere = cupy.ones(3, F32)
            with raises_everywhere(comm, ValueError, "^rank 1: .*gradient is on GPU 1, the communicator on GPU 0"):
                average([(elsewhere if comm.rank == 1 else cupy.ones(3, F32), cupy.ones(3, F32))])


@on_device
def case_a_capture_is_refused(comm: Any) -> None:
    import cupy

    for average in averages(comm):
        pairs = [(put(np.ones(3, F32)), put(np.ones(3, F32)))]
        with cupy.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            with raises_everywhere(comm, RuntimeError, "a step that averages over ranks cannot be captured in a graph"):
                average(pairs)
            stream.end_capture()
    cupy.cuda.Device().synchronize()  # the pairs are written
    with cupy.cuda.Stream(non_blocking=True) as stream:  # on one rank only, with a host that can tell the others
        if comm.rank == 1:
            stream.begin_capture()
        with raises_everywhere(comm, RuntimeError, "^rank 1: a step that averages over ranks cannot be captured"):
            average(pairs)
        if comm.rank == 1:
            stream.end_capture()
        assert (average(pairs)[0][0].get() == 1).all()


@on_device
def case_communicators(comm: Any) -> None:
    from tests.with_mpi.stand_in import StandIn

    with pytest.raises(TypeError, match=r"communicator must be a cupyx\.distributed\.NCCLBackend; got 3"):
        NCCLAverage(3)
    reverse = comm.Split(0, -comm.rank)
    with raises_everywhere(comm, ValueError, rf"rank 0: comm has this process as rank 0 of {comm.size}; the NCCL"):
        NCCLAverage(StandIn(comm), reverse)
    reverse.Free()


@on_device
def case_a_sharded_table_on_gpus(comm: Any) -> None:
    import cupy

    for dtype in DTYPES:
        start = random("table").standard_normal((9, 2)).astype(dtype)
        table, whole = ShardedTable(9, 2, dtype, put(start), comm), start.copy()
        zeros = ShardedTable(9, 2, dtype, comm=comm)
        assert isinstance(zeros.shard.value, cupy.ndarray)
        opt, single = RMSprop(0.1, momentum=0.9), RMSprop(0.1, momentum=0.9)
        for step in range(2):
            parts = [slices(9, (2,), dtype, step, rank, n=6) for rank in range(comm.size)]
            table.apply(opt, put(parts[comm.rank]))
            single.apply_gradients([(together(parts, comm.size), whole)])
        ids = np.array([[8, 0], [3, 8]])
        for each in (ids, put(ids)):
            rows = table.gather(each)
            assert isinstance(rows, cupy.ndarray)
            assert_same_bits(rows.get(), whole[ids])
        with raises_everywhere(
            comm, TypeError, r"^rank 0: .*expected a CuPy array; got a NumPy array \(as the shard is"
        ):
            table.scatter(parts[0])
