"""`IndexedSlices`: touched and untouched rows, empty slices, zero gradients, shapes."""

from typing import Any

import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop
from tests.engines import Engine
from tests.support import DTYPES, assert_same_bits, full_rmsprop, host, sign_sgd

F32 = np.float32
SLOTS = ("rms", "momentum", "mg")


pytestmark = pytest.mark.usefixtures("numpy_engine")


def test_fields():
    values, indices = np.ones((2, 3), F32), np.array([4, 1])
    slices = IndexedSlices(values, indices)
    assert slices.values is values
    assert slices.indices is indices
    assert slices.dense_shape is None
    assert IndexedSlices(values, indices, dense_shape=(5, 3)).dense_shape == (5, 3)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"clipnorm": 0.5}, {"maximize": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_rows_stay_as_they_are(dtype: np.dtype, options: dict[str, Any], library: Engine):
    opt, table = full_rmsprop(**options), library.variable(np.arange(10).reshape(5, 2).astype(dtype))
    opt.apply_gradients([(library.put(np.ones((5, 2), dtype)), table)])
    arrays = [table, *(opt.get_slot(table, name) for name in SLOTS)]
    before = [host(x) for x in arrays]
    for _ in range(3):
        slices = IndexedSlices(np.ones((3, 2), dtype), np.array([3, 1, 3]))
        opt.apply_gradients([(library.put(slices), table)])
    for array, old in zip(arrays, before, strict=True):
        assert_same_bits(host(array)[[0, 2, 4]], old[[0, 2, 4]])
        assert (host(array)[[1, 3]] != old[[1, 3]]).all()


def test_touched_rows_get_the_dense_rule(engine: Engine):
    opt, dense_opt = full_rmsprop(), full_rmsprop()
    table = engine.variable(np.arange(10, dtype=F32).reshape(5, 2))
    rows = engine.variable(np.array([[8, 9], [2, 3]], F32))
    for scale in (1, -2, 0.5):
        grad = np.array([[1, 2], [3, -4]], F32) * F32(scale)
        opt.apply_gradients([(engine.put(IndexedSlices(grad, np.array([4, 1]))), table)])
        dense_opt.apply_gradients([(engine.put(grad), rows)])
    assert_same_bits(table.numpy()[[4, 1]], rows)
    for name in SLOTS:
        assert_same_bits(opt.get_slot(table, name).numpy()[[4, 1]], dense_opt.get_slot(rows, name))


def test_values_of_a_shared_index_are_summed(library: Engine):
    opt, summed = RMSprop(0.1), RMSprop(0.1)
    a, b = library.variable(np.ones((3, 1))), library.variable(np.ones((3, 1)))
    slices = IndexedSlices(np.array([[1.0], [8.0], [2.0], [-4.0]]), np.array([2, 0, 2, 2]))
    opt.apply_gradients([(library.put(slices), a)])
    summed.apply_gradients([(library.put(IndexedSlices(np.array([[8.0], [-1.0]]), np.array([0, 2]))), b)])
    assert_same_bits(a, b)
    assert_same_bits(opt.get_slot(a, "rms"), summed.get_slot(b, "rms"))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2, 3), (4, 0), (4, 1, 1, 2, 1)], ids=str)
def test_shapes(shape: tuple[int, ...], engine: Engine):
    var = engine.variable(np.zeros(shape, F32))
    slices = IndexedSlices(np.full((2, *shape[1:]), 3, F32), np.array([2, 0]))
    sign_sgd().apply_gradients([(engine.put(slices), var)])
    expected = np.zeros(shape, F32)
    expected[[0, 2]] = -0.5
    assert_same_bits(var, expected)


def test_non_contiguous_table(engine: Engine):
    base = engine.put(np.zeros((4, 6), F32))
    slices = engine.put(IndexedSlices(np.ones((2, 2), F32), np.array([1, 3])))
    sign_sgd().apply_gradients([(slices, base[:, 1::3])])
    expected = np.zeros((4, 6), F32)
    expected[[1, 1, 3, 3], [1, 4, 1, 4]] = -0.5
    assert_same_bits(base, expected)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_int32_and_int64_indices_are_equal(size: int, library: Engine):
    tables = []
    for index_dtype in (np.int32, np.int64):
        table = library.variable(np.ones((9, 2), F32))
        indices = np.array([8, 0, 8, 3, 3, 8, 1, 0][:size], index_dtype)
        full_rmsprop().apply_gradients([(library.put(IndexedSlices(np.ones((size, 2), F32) / 3, indices)), table)])
        tables.append(table)
    assert_same_bits(*tables)


def empty_slices(row: tuple[int, ...] = (2,), dtype: Any = F32) -> IndexedSlices:
    return IndexedSlices(np.empty((0, *row), dtype), np.empty(0, np.int64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_slices_make_slots_and_move_the_counter_only(dtype: np.dtype, engine: Engine):
    opt = full_rmsprop(initial_accumulator_value=0.5, weight_decay=0.1)
    table = engine.variable(np.arange(6).reshape(3, 2).astype(dtype))
    before = table.numpy()
    assert opt.apply_gradients([(engine.put(empty_slices(dtype=dtype)), table)]) == 1
    assert_same_bits(table, before)
    assert opt.get_slot_names() == ["rms", "momentum", "mg"]
    assert (opt.get_slot(table, "rms").numpy() == 0.5).all()
    opt.apply_gradients([(engine.put(np.ones((3, 2), dtype)), table)])
    arrays = [table, *opt.weights[1:]]
    before_each = [host(x) for x in arrays]
    assert opt.apply_gradients([(engine.put(empty_slices(dtype=dtype)), table)]) == 3
    for array, old in zip(arrays, before_each, strict=True):
        assert_same_bits(array, old)


def test_empty_slices_of_an_empty_table(library: Engine):
    opt, table = full_rmsprop(), library.variable(np.empty((0, 3), F32))
    assert opt.apply_gradients([(library.put(empty_slices((3,))), table)]) == 1
    assert opt.get_slot(table, "rms").shape == (0, 3)


@pytest.mark.parametrize("option", [{"clipnorm": 1.0}, {"clipvalue": 1.0}, {"global_clipnorm": 1.0}], ids=str)
def test_empty_gradients_with_clipping(option: dict[str, float], library: Engine):
    opt, empty = full_rmsprop(**option), np.empty(0, F32)
    table, vector = library.variable(np.ones((3, 2), F32)), library.variable(empty)
    opt.apply_gradients([(library.put(empty_slices()), table), (library.put(empty), vector)])
    assert (table.numpy() == 1).all()


def test_zero_dense_gradients_decay_accumulators_and_move_by_momentum(engine: Engine):
    opt, var = RMSprop(0.5, rho=0.5, momentum=0.5, centered=True), engine.variable(np.zeros(3, F32))
    opt.apply_gradients([(engine.put(np.full(3, 2, F32)), var)])
    before, rms, mom, mg = (host(x) for x in (var, *(opt.get_slot(var, name) for name in SLOTS)))
    opt.apply_gradients([(engine.put(np.zeros(3, F32)), var)])
    assert_same_bits(opt.get_slot(var, "rms"), rms / 2)
    assert_same_bits(opt.get_slot(var, "momentum"), mom / 2)
    assert_same_bits(opt.get_slot(var, "mg"), mg / 2)
    assert_same_bits(var, before - mom / 2)


def test_zero_sparse_values_count_as_touched(library: Engine):
    opt, table = RMSprop(0.5, rho=0.5, momentum=0.5), library.variable(np.zeros((2, 1), F32))
    opt.apply_gradients([(library.put(np.full((2, 1), 2, F32)), table)])
    before, rms, mom = (host(x) for x in (table, opt.get_slot(table, "rms"), opt.get_slot(table, "momentum")))
    opt.apply_gradients([(library.put(IndexedSlices(np.zeros((1, 1), F32), np.array([1]))), table)])
    assert_same_bits(opt.get_slot(table, "rms"), rms * np.array([[1], [0.5]], F32))
    assert_same_bits(table, before - mom * np.array([[0], [0.5]], F32))
