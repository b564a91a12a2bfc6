"""`MPIAverage` on NumPy arrays."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop, Variable
from gpurms.distributed import MPIAverage
from gpurms.schedules import ExponentialDecay, LearningRateSchedule
from tests.support import BFLOAT16, DTYPES, assert_same_bits, unchanged
from tests.with_mpi.support import OPTIONS, counting, raises_everywhere, random, slices, together

F32 = np.float32


def case_mean_of_every_type_shape_and_layout(comm: Any) -> None:
    average = MPIAverage(comm)
    assert (average.rank, average.size) == (comm.rank, comm.size)
    wholes = [np.arange(24.0), np.arange(24.0).reshape(4, 6), np.asfortranarray(np.arange(6.0).reshape(2, 3))]
    layouts = [lambda x: x, lambda x: x[::2], lambda x: x[..., ::-1], lambda x: x[:0], lambda x: x[(0,) * x.ndim]]
    grads = [
        layout((whole + 8 * comm.rank).astype(dtype)) for whole in wholes for layout in layouts for dtype in DTYPES
    ]
    variables = [np.zeros(np.shape(grad), grad.dtype) for grad in grads]
    before = [np.array(grad) for grad in grads]
    for _ in range(2):
        found = average(zip(grads, variables))
        assert [id(variable) for _, variable in found] == [id(variable) for variable in variables]
        for (mean, _), grad, old in zip(found, grads, before, strict=True):
            wide = np.dtype(F32) if grad.dtype.itemsize == 2 else grad.dtype
            assert_same_bits(mean, (grad.astype(wide) + wide.type(4 * (comm.size - 1) - 8 * comm.rank)).astype(wide))
            assert_same_bits(grad, old)


def case_one_reduction_per_type_into_buffers_that_stay(comm: Any) -> None:
    counted = counting(comm, "Allreduce", "Allgather", "Allgatherv")
    average = MPIAverage(counted)
    dtypes = [F32, np.float64, BFLOAT16, np.float16]
    pairs = [(np.full(5, comm.rank, dtypes[i % 4]), np.zeros(5, dtypes[i % 4])) for i in range(200)]
    first = average(pairs)
    assert len(counted.calls["Allreduce"]) == 1 + 2  # what the ranks are about to do, float32, float64
    assert not counted.calls["Allgather"] + counted.calls["Allgatherv"]
    addresses = [grad.ctypes.data for grad, _ in first]
    average(pairs[:7])
    assert [grad.ctypes.data for grad, _ in average(pairs)] == addresses
    assert len({grad.base.ctypes.data for grad, _ in first}) == 2


def case_sparse_equals_one_process_with_all_slices(comm: Any) -> None:
    average = MPIAverage(comm)
    for dtype in DTYPES:
        for name, options in OPTIONS.items():
            start = random("table", name).standard_normal((20, 3)).astype(dtype)
            table, whole = start.copy(), start.copy()
            opt, single = RMSprop(0.1, gradient_aggregator=average, **options), RMSprop(0.1, **options)
            for step in range(3):
                parts = [
                    slices(20, (3,), dtype, name, step, rank, n=0 if rank == step else 40 + rank)
                    for rank in range(comm.size)
                ]
                opt.apply_gradients([(parts[comm.rank], table)])
                single.apply_gradients([(together(parts, comm.size), whole)])
            assert_same_bits(table, whole)
            for mine, other in zip(opt.weights, single.weights, strict=True):
                assert_same_bits(mine, other)


def case_dense_and_sparse_in_one_call(comm: Any) -> None:
    average = MPIAverage(comm)
    a, b, c, d = (Variable(np.zeros((4, 2), F32), name) for name in "abcd")
    part = slices(4, (2,), F32, comm.rank)
    grads = [part, np.full((4, 2), comm.rank, F32), None, IndexedSlices(part.values[::2], part.indices[::2])]
    found = average(zip(grads, (a, b, c, d)))
    assert [variable for _, variable in found] == [a, b, c, d]
    parts = [slices(4, (2,), F32, rank) for rank in range(comm.size)]
    expected = together(parts, comm.size)
    assert_same_bits(found[0][0].values, expected.values)
    assert_same_bits(found[0][0].indices, expected.indices)
    assert (found[1][0] == (comm.size - 1) / 2).all()
    assert found[2][0] is None
    assert len(found[3][0].indices) == 20 * comm.size
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \[variable 'c'\]"):
        RMSprop(gradient_aggregator=average).apply_gradients(zip(grads, (a, b, c, d)))


def case_ranks_hold_the_same_bits(comm: Any) -> None:
    variables = [np.zeros(1000, F32), np.zeros((7, 11))]
    opt = RMSprop(0.01, centered=True, gradient_aggregator=MPIAverage(comm))
    for step in range(5):
        rng = random(comm.rank, step)
        opt.apply_gradients([(rng.standard_normal(v.shape).astype(v.dtype), v) for v in variables])
    assert (
        len(set(comm.allgather(b"".join(x.numpy().tobytes() for x in [*map(Variable, variables), *opt.weights])))) == 1
    )


X, W = np.ones(3, F32), np.zeros(3, F32)
READ_ONLY = np.zeros(3, F32)
READ_ONLY.flags.writeable = False
NAMED = Variable(np.zeros(3, F32), "w")
ROWS = IndexedSlices(np.ones((2, 3), F32), np.array([0, 1]))
TABLE = np.zeros((4, 3), F32)
DISAGREEMENTS: dict[str, tuple[Any, Any, str]] = {  # what rank 1 has, what the others have, and the message
    "an empty call": ([], [(X, W)], "rank 0 has pair 0: variable 0 .*; rank 1 has nothing more"),
    "one more": ([(X, W), (X, W)], [(X, W)], "rank 0 has nothing more; rank 1 has pair 1: variable 1"),
    "None": ([(None, W)], [(X, W)], "with a gradient of float32, shape .*; rank 1 .* with no gradient"),
    "shape": ([(X[:2], W[:2])], [(X, W)], r"shape \(3,\); rank 1 has .* shape \(2,\)"),
    "shape of the gradient": ([(X[:2], W)], [(X, W)], r"shape \(3,\); rank 1 has .* shape \(2,\)"),
    "dtype": ([(X.astype("f8"), W.astype("f8"))], [(X, W)], "float32, .* rank 1 has .* float64"),
    "name": ([(X, Variable(W, "v"))], [(X, NAMED)], "variable 'w' .* rank 1 has pair 0: variable 'v'"),
    "order": ([(X, W), (X, NAMED)], [(X, NAMED), (X, W)], "pair 0: variable 'w' .* rank 1 has pair 0: variable 0"),
    "sparse": ([(ROWS, TABLE)], [(np.ones((4, 3), F32), TABLE)], "with a gradient .* rank 1 .* with rows of float32"),
    "indices": (
        [(IndexedSlices(ROWS.values, ROWS.indices.astype(np.int32)), TABLE)],
        [(ROWS, TABLE)],
        "indices of int64; rank 1 has .* indices of int32",
    ),
    "dense_shape": (
        [(ROWS, TABLE)],
        [(IndexedSlices(ROWS.values, ROWS.indices, (4, 3)), TABLE)],
        r"dense_shape \(4, 3\)",
    ),
    "row": ([(IndexedSlices(X[:2], ROWS.indices), TABLE)], [(ROWS, TABLE)], r"shape \(3,\).* shape \(\)"),
}


def case_disagreement_is_an_error_on_every_rank(comm: Any) -> None:
    opt = RMSprop(0.1, gradient_aggregator=MPIAverage(comm))
    ours = np.ones(2, F32)
    opt.apply_gradients([(ours, ours)])
    for rank_1, others, message in DISAGREEMENTS.values():
        pairs = rank_1 if comm.rank == 1 else others
        kept = unchanged(opt, *(variable for _, variable in pairs))
        with kept, raises_everywhere(comm, ValueError, f"ranks disagree: .*{message}"):
            opt.apply_gradients(pairs)
        opt.apply_gradients([(ours, ours)])  # all can go on
    assert int(opt.iterations.numpy()) == 1 + len(DISAGREEMENTS)


def fails() -> Any:
    yield X, W
    raise KeyError("lost")


FAILURES: dict[str, tuple[Any, type[Exception], str]] = {  # what the last rank gives, and what every rank raises
    "no iterable": (None, TypeError, "grads_and_vars must be an iterable"),
    "no pair": ([(X, W, W)], TypeError, r"grads_and_vars\[0\] must be a \(gradient, variable\) pair"),
    "list": ([([1, 2, 3], W)], TypeError, "gradient: expected a NumPy array; got list"),
    "integers": ([(np.ones(3, int), W)], TypeError, "expected float16, bfloat16, float32 or float64; got int64"),
    "no variable": ([(X, "w")], TypeError, "variable 0: expected a gpurms.Variable or an array; got 'w'"),
    "read-only": ([(X, READ_ONLY)], TypeError, "variable 0 .*: expected to write to it; its array is read-only"),
    "read-only, no gradient": ([(None, Variable(READ_ONLY, "r"))], TypeError, "variable 'r' .* is read-only"),
    "dense_shape": (
        [(IndexedSlices(np.ones((2, 3), F32), np.array([0, 1]), "xy"), np.zeros((4, 3), F32))],
        TypeError,
        r"variable 0 \(float32 of shape \(4, 3\)\): expected dense_shape as a tuple of integers; got 'xy'",
    ),
    "iterable that raises": (fails, RuntimeError, "KeyError: 'lost'"),
    "index type": ([(IndexedSlices(X, X), W)], TypeError, "expected indices of int32 or int64; got float32"),
    "2-D indices": ([(IndexedSlices(X, np.zeros((3, 1), int)), W)], ValueError, r"1-D indices; got shape \(3, 1\)"),
    "lengths": ([(IndexedSlices(X, np.zeros(2, int)), W)], ValueError, r"values for 2 indices; got shape \(3,\)"),
    "0-d values": ([(IndexedSlices(X[0], np.zeros(2, int)), W)], ValueError, r"values for 2 indices; got shape \(\)"),
}


def case_failure_of_one_rank_is_an_error_on_every_rank(comm: Any) -> None:
    average = MPIAverage(comm)
    last = comm.size - 1
    for bad, kind, message in FAILURES.values():
        pairs = [(X, W)] if comm.rank != last else bad() if callable(bad) else bad
        with raises_everywhere(comm, kind, f"^rank {last}: .*{message}"):
            average(pairs)
        assert (average([(X, W)])[0][0] == 1).all()
        with raises_everywhere(comm, kind, f"^rank 0: .*{message}"):
            average(bad() if callable(bad) else bad)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {  # of rank 1, and what is said of rank 0
    "number": ({"learning_rate": 0.2}, r"learning_rate=0\.1; rank 1 has the optimizer's learning_rate=0\.2"),
    "callable": ({"rho": lambda: 0.5}, r"rho=0\.9; rank 1 has the optimizer's rho=0\.5"),
    "decay": ({"decay": 0.1}, r"decay=0\.0"),
    "norm": ({"clipnorm": 1.0}, "clipnorm=None"),
    "option": ({"nesterov": True}, "nesterov=False"),
    "slots": ({"slot_dtype": "float64"}, "slot_dtype=None"),
    "dense_only": ({"dense_only": True}, "dense_only=False"),
    "aggregator": ({"gradient_aggregator": list}, r"gradient_aggregator=\S+MPIAverage; .*=type"),
    "schedule": ({"learning_rate": ExponentialDecay(0.1, 10, 0.5)}, r"centered=False|learning_rate=0\.1"),
}


class Constant(LearningRateSchedule):
    """One that cannot be saved."""

    def __call__(self, step: int) -> float:
        return 0.1


def case_settings_are_compared(comm: Any) -> None:
    average = MPIAverage(comm)
    usual = {"learning_rate": 0.1, "gradient_aggregator": average}
    for each in (usual, {"learning_rate": lambda: 0.1}, {"learning_rate": Constant()}, OPTIONS["torch"]):
        average.agree(RMSprop(name=f"of rank {comm.rank}", **each))
    for mine, message in SETTINGS.values():
        opt = RMSprop(**usual | (mine if comm.rank == 1 else {}))
        with raises_everywhere(comm, ValueError, f"^ranks disagree: rank 0 has the optimizer's .*({message})"):
            average.agree(opt)
        assert opt.weights == []
    later = [ExponentialDecay(0.1, 10, 0.5), ExponentialDecay(0.1, 10, 0.25)]  # both 0.1 now
    with raises_everywhere(comm, ValueError, "schedule=.*'decay_rate': 0.5.*rank 1 has .*'decay_rate': 0.25"):
        average.agree(RMSprop(later[comm.rank == 1]))
    steps = RMSprop(0.1)
    if comm.rank == 1:
        steps.apply_gradients([(np.ones(2), np.ones(2))])
    with raises_everywhere(comm, ValueError, "iterations=0; rank 1 has the optimizer's iterations=1"):
        average.agree(steps)
    nan = RMSprop((lambda: float("nan")) if comm.rank == 1 else 0.1)
    with raises_everywhere(comm, ValueError, "^rank 1: learning_rate must be >= 0; got nan"):
        average.agree(nan)
    with raises_everywhere(comm, TypeError, r"^rank 1: optimizer must be a gpurms\.RMSprop; got int"):
        average.agree(3 if comm.rank == 1 else RMSprop())
    with raises_everywhere(comm, ValueError, "^ranks disagree: rank 0 has a check of settings; rank 1 has an average"):
        average([]) if comm.rank == 1 else average.agree(RMSprop())


def case_index_outside_is_an_error_on_every_rank(comm: Any) -> None:
    opt = RMSprop(gradient_aggregator=MPIAverage(comm))
    rows = IndexedSlices(np.ones((1, 3), F32), np.array([4 if comm.rank == 1 else 0]))
    table = np.zeros((4, 3), F32)
    with unchanged(opt, table), raises_everywhere(comm, IndexError, r"index 4 at offset 1 is outside \[0, 4\)"):
        opt.apply_gradients([(rows, table)])


def case_groups_of_ranks(comm: Any) -> None:
    group = comm.Split(comm.rank % 2)
    average = MPIAverage(group)
    for _ in range(1 + comm.rank % 2):
        found = average([(np.array([comm.rank], F32), np.zeros(1, F32))])[0][0]
    assert found == np.mean(range(comm.rank % 2, comm.size, 2))
    group.Free()


def case_copies_and_pickles(comm: Any) -> None:
    opt = RMSprop(0.1, gradient_aggregator=MPIAverage(comm))
    var = np.zeros(2)
    opt.apply_gradients([(np.ones(2), var)])
    twin, twin_var = copy.deepcopy((opt, var))
    assert twin.gradient_aggregator is opt.gradient_aggregator
    for each, variable in ((opt, var), (twin, twin_var)):
        each.apply_gradients([(np.full(2, float(comm.rank)), variable)])
    assert_same_bits(twin_var, var)
    with pytest.raises(TypeError, match=r"MPIAverage cannot be pickled: .*gradient_aggregator to None first"):
        pickle.dumps(opt)
    opt.gradient_aggregator = None
    assert pickle.loads(pickle.dumps(opt)).gradient_aggregator is None


def case_communicators(comm: Any) -> None:
    from mpi4py import MPI

    assert MPIAverage().size == comm.size
    for wrong in (3, MPI.COMM_NULL, comm.Get_group()):
        with pytest.raises(TypeError, match="comm must be an intracommunicator of mpi4py"):
            MPIAverage(wrong)
