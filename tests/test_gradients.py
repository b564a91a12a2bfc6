"""`GradientTape` and `gather`: what is differentiated, in which form, and what a failing loss leaves open."""

import threading
from typing import Any

import autograd.numpy as anp
import numpy as np
import pytest

from gpurms import GradientTape, IndexedSlices, RMSprop, Variable, gather
from tests.engines import Engine
from tests.support import DTYPES, assert_same_bits, dense

F32 = np.float32


def table_of(library: Engine, rows: int, dtype: Any = F32) -> Variable:
    return library.variable(np.arange(2 * rows).reshape(rows, 2).astype(dtype), "table")


# --- tape ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_has_the_dtype_of_the_variable(library: Engine, dtype: np.dtype):
    var = library.variable(np.array([1, 2, -3], dtype))
    with GradientTape() as tape:
        loss = anp.sum(var.value * var.value)
    grad = tape.gradient(loss, var)
    assert type(grad) is library.xp.ndarray
    assert_same_bits(grad, np.array([2, 4, -6], dtype))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 1, 2)], ids=str)
def test_gradient_has_the_shape_of_the_variable(library: Engine, shape: tuple[int, ...]):
    var = library.variable(np.ones(shape, F32))
    with GradientTape() as tape:
        loss = anp.sum(var.value * 3)
    assert_same_bits(tape.gradient(loss, var), np.full(shape, 3, F32))


def test_dtype_follows_the_variable_not_the_loss(library: Engine):
    var = library.variable(np.array([1, 2], np.float16))
    with GradientTape() as tape:
        loss = anp.sum(var.value * library.put(np.array([0.5, 3.0])))
    assert_same_bits(tape.gradient(loss, var), np.array([0.5, 3], np.float16))


def test_one_entry_per_source(library: Engine):
    a, b, unused = Variable(2.0), Variable(3.0), Variable(4.0)
    with GradientTape() as tape:
        loss = a.value * a.value * b.value
    grads = tape.gradient(loss, [b, unused, a])
    assert isinstance(grads, list)
    assert [None if g is None else float(g) for g in grads] == [4.0, None, 12.0]


def test_single_source_gives_a_single_entry(library: Engine):
    a, unused = Variable(2.0), Variable(3.0)
    with GradientTape() as tape:
        loss = a.value**2
        constant = np.float32(1.0)
    assert tape.gradient(loss, unused) is None
    assert tape.gradient(loss, a) == 4.0
    assert tape.gradient(constant, a) is None


def test_non_scalar_target_is_summed(library: Engine):
    var = library.variable(np.array([1, 2, 3], F32))
    with GradientTape() as tape:
        target = var.value**2
    assert_same_bits(tape.gradient(target, var), np.array([2, 4, 6], F32))


def test_output_gradients_weigh_the_target(library: Engine):
    var = library.variable(np.array([1, 2, 3], F32))
    with GradientTape() as tape:
        target = var.value**2
    weights = library.put(np.array([1, 0, -1], F32))
    assert_same_bits(tape.gradient(target, var, output_gradients=weights), np.array([2, 0, -6], F32))


def test_autograd_functions(library: Engine):
    w, x = library.variable(np.array([[0.5, -1.0], [2.0, 1.0]])), library.put(np.array([1.0, 2.0]))
    with GradientTape() as tape:
        loss = anp.sum(anp.maximum(anp.dot(w.value, x), 0.0) ** 2)
    assert_same_bits(tape.gradient(loss, w), np.array([[0.0, 0], [8, 16]]))


def test_value_used_outside_the_tape_is_not_recorded(library: Engine):
    var = Variable(3.0)
    before = var.value * 2
    with GradientTape() as tape:
        loss = before + 1
    assert tape.gradient(loss, var) is None


def test_tape_leaves_the_variable_alone(library: Engine):
    array = library.put(np.array([1, 2], F32))
    var = Variable(array)
    with GradientTape() as tape:
        loss = anp.sum(var.value * 2)
    grad = tape.gradient(loss, var)
    assert var.value is array
    assert array.tolist() == [1, 2]
    grad += 1
    assert array.tolist() == [1, 2]


def test_successive_tapes_are_independent(library: Engine):
    var = Variable(3.0)
    grads = []
    for power in (2, 3):
        with GradientTape() as tape:
            loss = var.value**power
        grads.append(float(tape.gradient(loss, var)))
    assert grads == [6.0, 27.0]


def test_loss_that_raises_leaves_no_tape_open(library: Engine):
    array = library.put(np.array([1, 2], F32))
    var = Variable(array)
    with pytest.raises(ZeroDivisionError), GradientTape():
        raise ZeroDivisionError(var.value)
    assert var.value is array
    with GradientTape() as tape:
        loss = anp.sum(var.value)
    assert_same_bits(tape.gradient(loss, var), np.ones(2, F32))
    assert var.value is array


def test_a_tape_records_its_own_thread_only(library: Engine):
    array, inside, failures = library.put(np.array([1, 2], F32)), threading.Event(), []
    var = Variable(array)

    def other_thread() -> None:
        inside.wait(10)
        if var.value is not array:
            failures.append("the tape of another thread traced this one")

    thread = threading.Thread(target=other_thread)
    thread.start()
    with GradientTape() as tape:
        loss = anp.sum(var.value * 3)
        inside.set()
        thread.join()
    assert failures == []
    assert_same_bits(tape.gradient(loss, var), np.full(2, 3, F32))


def test_threads_with_their_own_tapes(library: Engine):
    var, barrier, results = library.variable(np.array([1, 2], F32)), threading.Barrier(4), {}

    def differentiate(factor: int) -> None:
        for _ in range(20):
            barrier.wait(10)
            with GradientTape() as tape:
                loss = anp.sum(var.value * factor) + anp.sum(gather(var, np.array([1])))
                barrier.wait(10)
            results.setdefault(factor, []).append(tape.gradient(loss, var).tolist())

    threads = [threading.Thread(target=differentiate, args=(factor,)) for factor in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {factor: [[factor, factor + 1]] * 20 for factor in range(4)}


# --- gather -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("plain", [False, True], ids=["Variable", "array"])
def test_gather_takes_rows(library: Engine, plain: bool, index_dtype: Any):
    table = table_of(library, 4)
    indices = np.array([3, 0, 3], index_dtype)
    rows = gather(table.value if plain else table, indices)
    assert_same_bits(rows, np.array([[6, 7], [0, 1], [6, 7]], F32))
    rows += 1
    assert table.numpy().tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_gather_of_no_rows(library: Engine):
    table = table_of(library, 4)
    with GradientTape() as tape:
        loss = anp.sum(gather(table, np.empty(0, np.int64)))
    assert loss == 0
    grad = tape.gradient(loss, table)
    assert isinstance(grad, IndexedSlices)
    assert grad.values.shape == (0, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plain", [False, True], ids=["Variable", "array"])
def test_gradient_of_gather_is_indexed_slices(library: Engine, plain: bool, dtype: np.dtype):
    table = table_of(library, 4, dtype)
    source = table.value if plain else table
    with GradientTape() as tape:
        loss = anp.sum(gather(source, np.array([3, 0, 3])) * library.put(np.array([[1], [2], [4]], dtype)))
    grad = tape.gradient(loss, source)
    assert isinstance(grad, IndexedSlices)
    assert grad.values.dtype == dtype
    assert grad.indices.ndim == 1
    assert grad.indices.dtype in (np.int32, np.int64)
    assert grad.values.shape == (*grad.indices.shape, 2)
    np.testing.assert_array_equal(dense(grad, (4, 2)), [[2, 2], [0, 0], [0, 0], [5, 5]])


def test_several_gathers_concatenate(library: Engine):
    table = table_of(library, 5)
    with GradientTape() as tape:
        loss = anp.sum(gather(table, np.array([1, 4])) * 2) + anp.sum(gather(table, np.array([4])) * 3)
    grad = tape.gradient(loss, table)
    assert isinstance(grad, IndexedSlices)
    assert sorted(zip(grad.indices.tolist(), grad.values.tolist())) == [(1, [2, 2]), (4, [2, 2]), (4, [3, 3])]


def test_gather_and_dense_use_give_the_dense_sum(library: Engine):
    table = table_of(library, 3)
    with GradientTape() as tape:
        loss = anp.sum(table.value * 2) + anp.sum(gather(table, np.array([1, 1])))
    assert_same_bits(tape.gradient(loss, table), np.array([[2, 2], [4, 4], [2, 2]], F32))


def test_gather_from_a_vector(library: Engine):
    var = library.variable(np.array([1, 2, 3], F32))
    with GradientTape() as tape:
        loss = anp.sum(gather(var, np.array([2, 0])) ** 2)
    grad = tape.gradient(loss, var)
    assert isinstance(grad, IndexedSlices)
    np.testing.assert_array_equal(dense(grad, (3,)), [2, 0, 6])


def test_gather_of_an_unused_variable(library: Engine):
    used, unused = table_of(library, 3), table_of(library, 3)
    with GradientTape() as tape:
        loss = anp.sum(gather(used, np.array([1])))
        gather(unused, np.array([1]))
    assert tape.gradient(loss, [used, unused])[1] is None


def test_plain_array_takes_part_only_through_gather(library: Engine):
    array, var = library.put(np.ones((3, 2), F32)), Variable(2.0)
    with GradientTape() as tape:
        loss = anp.sum(array * var.value)
    assert tape.gradient(loss, array) is None
    assert tape.gradient(loss, var) == 6


@pytest.mark.parametrize("indices", [[4], [0, -1], [2**40], [1, 2, 99]], ids=str)
@pytest.mark.parametrize("taped", [False, True], ids=["no tape", "tape"])
def test_gather_index_out_of_range(library: Engine, indices: list[int], taped: bool):
    table = table_of(library, 4)
    if not taped:
        with pytest.raises(IndexError):
            gather(table, np.array(indices))
        return
    with pytest.raises(IndexError), GradientTape():
        gather(table, np.array(indices))
    assert type(table.value) is library.xp.ndarray


def test_gather_through_a_computation(library: Engine):
    """d/d row of a loss that reads a gathered row and dense weights together."""
    table, weights = table_of(library, 3, np.float64), library.variable(np.array([1.0, -1.0]))
    with GradientTape() as tape:
        scores = anp.dot(gather(table, np.array([2, 1])), weights.value)
        loss = anp.sum(scores**2)
    rows, dense_grad = tape.gradient(loss, (table, weights))
    np.testing.assert_array_equal(dense(rows, (3, 2)), [[0, 0], [-2, 2], [-2, 2]])
    assert_same_bits(dense_grad, np.array([-2.0 * (4 + 2), -2.0 * (5 + 3)]))


def test_gradient_feeds_apply_gradients(library: Engine):
    table = table_of(library, 4)
    opt = RMSprop(0.5, rho=0.0, epsilon=0.0)
    with GradientTape() as tape:
        loss = anp.sum(gather(table, np.array([1, 3])))
    opt.apply_gradients([(tape.gradient(loss, table), table)])
    assert table.numpy().tolist() == [[0, 1], [1.5, 2.5], [4, 5], [5.5, 6.5]]
