"""What a step on a device does: kernels, waits and memory; many variables, any alignment; streams."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop, Variable
from tests import engines
from tests.cases import RULES
from tests.engines import Engine
from tests.support import DTYPES, assert_same_bits, full_rmsprop, host

F32 = np.float32
pytestmark = pytest.mark.usefixtures("numpy_engine")

RAGGED = (0, 1, 2, 3, 5, 31, 127, 255, 256, 257, 0, 1023, 1024, 1025, 2047, 2048, 2049, 5000)
"""Sizes around those of warps, blocks and tiles."""


@pytest.fixture
def machine() -> Iterator[Any]:
    with engines.emulated() as machine:
        yield machine


def put(x: Any) -> Any:
    import cupy

    return Engine("cuda-on-cpu", cupy).put(x)


def names(machine: Any) -> list[str]:
    return [launch.name for launch in machine.launches]


# --- kernels, waits, memory ---------------------------------------------------------------------------------


def trained(n: int, **options: Any) -> tuple[RMSprop, list[tuple[Any, Any]]]:
    """An optimizer and its pairs, after a first step."""
    opt, pairs = RMSprop(**options), [(put(np.ones(10, F32)), put(np.ones(10, F32))) for _ in range(n)]
    opt.apply_gradients(pairs)
    return opt, pairs


@pytest.mark.parametrize("rule", ["default", "momentum", "centered", "clipvalue"])
def test_a_dense_step_is_one_launch(rule: str, machine: Any):
    opt, pairs = trained(100, **RULES[rule])
    machine.forget()
    opt.apply_gradients(pairs)
    assert names(machine) == ["multi"]
    assert machine.synchronisations == machine.copies == machine.allocations == []


def test_new_gradients_every_step_change_nothing(machine: Any):
    opt, pairs = trained(100)
    new = [(put(np.ones(10, F32)), variable) for _, variable in pairs]
    machine.forget()
    opt.apply_gradients(new)
    assert names(machine) == ["multi"]
    assert machine.synchronisations == machine.copies == machine.allocations == []


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_clipping_waits_for_nothing(clip: str, machine: Any):
    opt, pairs = trained(100, **{clip: 0.5})
    machine.forget()
    opt.apply_gradients(pairs)
    assert names(machine)[-3:] == ["square_sums", "clip_factors", "multi"]
    assert machine.synchronisations == []


def test_one_launch_per_type_and_layout(machine: Any):
    opt, pairs = RMSprop(), []
    for dtype in DTYPES:
        pairs += [(put(np.ones(5, dtype)), put(np.ones(5, dtype))) for _ in range(3)]
    pairs += [(put(np.ones(8, F32)[::2]), put(np.ones(4, F32)))]
    opt.apply_gradients(pairs)
    machine.forget()
    opt.apply_gradients(pairs)
    assert sorted(names(machine)) == ["multi"] * 4 + ["rmsprop"]
    assert machine.synchronisations == machine.allocations == []


@pytest.mark.parametrize("check", [True, False], ids=["checked", "check_indices=False"])
def test_a_sparse_step_waits_only_for_the_check(check: bool, machine: Any):
    tables = [put(np.ones((9, 2), F32)) for _ in range(3)]
    slices = put(IndexedSlices(np.ones((40, 2), F32), np.arange(40) % 9))
    opt = RMSprop(check_indices=check)
    opt.apply_gradients([(slices, table) for table in tables])
    machine.forget()
    opt.apply_gradients([(slices, table) for table in tables])
    assert machine.synchronisations == (["get"] if check else [])
    kernels = [name for name in names(machine) if not name.startswith("cupy_")]
    assert kernels == ["find_outside"] * 3 * check + ["sort_tile", "update_rows", "combine_sums"] * 3
    assert len(machine.allocations) == (1 if check else 0)


# --- many variables, of any size and alignment --------------------------------------------------------------


def both(options: dict[str, Any], device: Engine, starts: list[np.ndarray], grads: list[list[np.ndarray]]) -> None:
    """Take the steps on the device and in NumPy; all bits must agree."""
    opt, expected_opt = RMSprop(**options), RMSprop(**options)
    variables, expected = [device.variable(x) for x in starts], [Variable(x.copy()) for x in starts]
    for step in grads:
        opt.apply_gradients(zip(map(device.put, step), variables))
        expected_opt.apply_gradients(zip(step, expected))
    for found, wanted in zip([*variables, *opt.weights], [*expected, *expected_opt.weights], strict=True):
        assert_same_bits(found, wanted)


def normal(sizes: Any, dtype: Any = F32, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size).astype(dtype) for size in sizes]


def test_a_thousand_variables_are_two_launches(machine: Any):
    variables, expected = [put(x) for x in normal([7] * 1000)], normal([7] * 1000)
    grads = normal([7] * 1000, seed=1)
    opt, expected_opt = RMSprop(), RMSprop()
    for _ in range(2):
        machine.forget()
        opt.apply_gradients([(put(grad), variable) for grad, variable in zip(grads, variables)])
        expected_opt.apply_gradients(zip(grads, expected))
    assert names(machine).count("multi") == 2
    for found, wanted in zip(variables, expected):
        assert_same_bits(found, wanted)


@pytest.mark.parametrize(
    ("rule", "n"), [("default", 100), ("default", 101), ("default", 817), ("global-clipnorm", 1100)]
)
def test_any_number_of_variables(rule: str, n: int, device: Engine):
    sizes = [RAGGED[i % 12] for i in range(n)]
    both(RULES[rule], device, normal(sizes), [normal(sizes, seed=1)])


@pytest.mark.parametrize("rule", ["default", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_sizes(dtype: np.dtype, rule: str, device: Engine):
    grads = [[(np.round(x * 8) / 8).astype(dtype) for x in normal(RAGGED, seed=step)] for step in (1, 2)]
    both(RULES[rule], device, normal(RAGGED, dtype), grads)


def test_the_list_may_change_from_step_to_step(device: Engine):
    opt, expected_opt = full_rmsprop(), full_rmsprop()
    starts = normal([5, 3000, 7, 1, 64])
    variables, expected = [device.put(x) for x in starts], [x.copy() for x in starts]
    for step, order in enumerate([[0, 1, 2], [2, 1, 0], [3], [4, 3, 0, 1, 2], [1], [4, 3, 0, 1, 2], [0, 1, 2]]):
        grads = normal([starts[i].size for i in order], seed=step)
        opt.apply_gradients([(device.put(grad), variables[i]) for grad, i in zip(grads, order)])
        expected_opt.apply_gradients([(grad, expected[i]) for grad, i in zip(grads, order)])
        assert opt.iterations.numpy() == step + 1
    for found, wanted in zip(variables, expected):
        assert_same_bits(found, wanted)


@pytest.mark.parametrize("wide", [False, True], ids=["same type", "float32 gradients"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_views_of_flat_buffers(dtype: np.dtype, wide: bool, device: Engine):
    """As of a framework that keeps all parameters in one allocation: any alignment, gradients unlike variables."""
    sizes = (3, 1025, 1, 8, 2048, 5, 4099)
    ends = np.cumsum(sizes)
    flat, grads = normal([ends[-1]], dtype)[0], normal([ends[-1] + 1], F32 if wide else dtype, 1)[0]
    ours, our_grads = device.put(flat), device.put(grads)
    opt, expected_opt = full_rmsprop(), full_rmsprop()
    for _ in range(2):
        for optimizer, buffer, buffer_grads in ((opt, ours, our_grads), (expected_opt, flat, grads)):
            pairs = [(buffer_grads[end - n + 1 : end + 1], buffer[end - n : end]) for n, end in zip(sizes, ends)]
            optimizer.apply_gradients(pairs)
    assert_same_bits(ours, flat)
    assert len(opt.weights) == 1 + 3 * len(sizes)
    for found, wanted in zip(opt.weights, expected_opt.weights, strict=True):
        assert_same_bits(found, wanted)


# --- streams ------------------------------------------------------------------------------------------------

SEEDS = range(4)


def steps_on_streams(rule: str) -> list[np.ndarray]:
    """Gradients made on a side stream, the steps on another one, ordered by events."""
    import cupy

    side, main = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    with main:
        opt = RMSprop(**RULES[rule])
        dense, table = put(np.ones(100, F32)), put(np.ones((9, 3), F32))
        grad, values = cupy.zeros(100, F32), cupy.zeros((40, 3), F32)
        indices = put(np.arange(40) * 7 % 9)
    for step in range(3):
        side.wait_event(main.record())
        with side:
            grad += step + 1
            values += 1
            values *= -2
        main.wait_event(side.record())
        with main:
            opt.apply_gradients([(grad, dense), (IndexedSlices(values, indices), table)])
    with main:
        return [host(x) for x in (dense, table, *opt.weights[1:])]


@pytest.mark.parametrize("rule", ["default", "everything", "global-clipnorm"])
def test_steps_are_ordered_by_events(rule: str):
    with engines.emulated():
        expected = steps_on_streams(rule)
    for seed in SEEDS:
        with engines.emulated(deferred=True, seed=seed):
            for found, wanted in zip(steps_on_streams(rule), expected, strict=True):
                assert_same_bits(found, wanted)


def global_norm_of_two_devices() -> list[np.ndarray]:
    import cupy

    opt, pairs = RMSprop(global_clipnorm=0.5), []
    for place in (0, 1):
        with cupy.cuda.Device(place):
            cupy.cuda.Stream(non_blocking=True).use()
            pairs.append((put(np.arange(1, 9, dtype=F32)), put(np.ones(8, F32))))
    for _ in range(3):
        opt.apply_gradients(pairs)
    found = []
    for place in (0, 1):
        with cupy.cuda.Device(place):
            found.append(host(pairs[place][1]))
    return found


def test_a_norm_over_devices_is_ordered_by_events():
    with engines.emulated(2):
        expected = global_norm_of_two_devices()
    for seed in SEEDS:
        with engines.emulated(2, deferred=True, seed=seed):
            for found, wanted in zip(global_norm_of_two_devices(), expected, strict=True):
                assert_same_bits(found, wanted)


def test_memory_of_gradients_may_be_freed_after_the_call():
    for seed in SEEDS:
        with engines.emulated(deferred=True, seed=seed):
            opt, variable = RMSprop(clipnorm=1.0), put(np.ones(1000, F32))
            table = put(np.ones((50, 2), F32))
            for step in range(3):
                slices = IndexedSlices(np.ones((200, 2), F32), np.arange(200) % 50)
                opt.apply_gradients([(put(np.full(1000, step + 1, F32)), variable), (put(slices), table)])
            del opt
            assert (host(variable) < 1).all()
