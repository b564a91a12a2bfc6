"""Deep copies and pickles of the pair (optimizer, variables)."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop, Variable
from gpurms.schedules import ExponentialDecay
from tests.engines import Engine
from tests.support import BFLOAT16, Snapshot, assert_same_bits, unchanged

CLONES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "pickle protocol 2": lambda pair: pickle.loads(pickle.dumps(pair, protocol=2)),
}
KWARGS = {"momentum": 0.5, "centered": True, "clipnorm": 1.0, "weight_decay": 0.01, "decay": 0.1}


pytestmark = pytest.mark.usefixtures("numpy_engine")


@pytest.fixture(params=CLONES)
def clone(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return CLONES[request.param]


def at_most_one(x: np.ndarray) -> np.ndarray:
    return np.minimum(x, 1)


def make_variables(library: Engine) -> list[Any]:
    values = np.random.default_rng(0).normal
    return [
        library.variable(values(size=3).astype(np.float32), "a"),
        library.variable(values(size=(4, 2)), "table"),
        library.variable(np.array(0.5, BFLOAT16), "b", constraint=at_most_one),
        library.variable(np.empty((0, 2), np.float32), "empty"),
        library.variable(values(size=(3, 4))[:, ::2], "view"),
        library.put(values(size=(2, 2)).astype(np.float32)),
    ]


def step(library: Engine, opt: RMSprop, variables: list[Any]) -> None:
    grads = [
        np.array([1, -2, 3], np.float32),
        IndexedSlices(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1, 1])),
        np.float32(-4.0),
        np.empty((0, 2), np.float32),
        np.ones((3, 2)),
        np.ones((2, 2), np.float32),
    ]
    opt.apply_gradients(zip(map(library.put, grads), variables))


def assert_same_state(opt: RMSprop, variables: list[Any], other: RMSprop, others: list[Any]) -> None:
    assert len(opt.weights) == len(other.weights)
    for x, y in zip([*opt.weights, *variables], [*other.weights, *others], strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_copy_continues_like_the_original(clone: Callable[[Any], Any], steps: int, library: Engine):
    opt, variables = RMSprop(ExponentialDecay(0.1, 10, 0.5), **KWARGS), make_variables(library)
    for _ in range(steps):
        step(library, opt, variables)
    opt2, variables2 = clone((opt, variables))
    assert_same_state(opt, variables, opt2, variables2)
    for _ in range(2):
        step(library, opt, variables)
        step(library, opt2, variables2)
    assert_same_state(opt, variables, opt2, variables2)


def test_copy_is_independent(clone: Callable[[Any], Any], library: Engine):
    opt, variables = RMSprop(0.1, **KWARGS), make_variables(library)
    step(library, opt, variables)
    opt2, variables2 = clone((opt, variables))
    opt2.learning_rate = 0.5
    assert opt.learning_rate == 0.1
    with unchanged(opt, *variables):
        step(library, opt2, variables2)
    with unchanged(opt2, *variables2):
        step(library, opt, variables)


def test_slots_belong_to_the_copied_variables(clone: Callable[[Any], Any], library: Engine):
    opt, variables = RMSprop(0.1, **KWARGS), make_variables(library)
    step(library, opt, variables)
    opt2, variables2 = clone((opt, variables))
    for var, var2 in zip(variables, variables2, strict=True):
        for name in ("rms", "momentum", "mg"):
            assert_same_bits(opt2.get_slot(var2, name), opt.get_slot(var, name))
            assert opt2.get_slot(var2, name) is not opt.get_slot(var, name)
            with pytest.raises(KeyError):
                opt2.get_slot(var, name)
    count = len(opt2.weights)
    step(library, opt2, variables2)
    assert len(opt2.weights) == count


def test_copy_keeps_names_and_configuration(clone: Callable[[Any], Any], library: Engine):
    opt, variables = RMSprop(0.1, name="mine", **KWARGS), make_variables(library)
    step(library, opt, variables)
    opt2, variables2 = clone((opt, variables))
    assert opt2.get_config() == opt.get_config()
    assert opt2.get_slot_names() == opt.get_slot_names()
    assert [w.name for w in opt2.weights] == [w.name for w in opt.weights]
    assert [v.name for v in variables2[:-1]] == ["a", "table", "b", "empty", "view"]


def test_counter_of_a_copy(clone: Callable[[Any], Any], library: Engine):
    opt, variables = RMSprop(0.1), make_variables(library)
    step(library, opt, variables)
    opt2, variables2 = clone((opt, variables))
    assert opt2.weights is opt2.variables()
    assert opt2.weights[0] is opt2.iterations
    with pytest.raises(RuntimeError, match="Cannot set `iterations`"):
        opt2.iterations = Variable(np.array(5))
    step(library, opt2, variables2)
    assert opt2.iterations.numpy() == 2
    assert opt.iterations.numpy() == 1


def test_copy_before_the_first_step_has_no_weights(clone: Callable[[Any], Any], library: Engine):
    opt2, variables2 = clone((RMSprop(0.1), make_variables(library)))
    assert opt2.weights == []
    step(library, opt2, variables2)
    assert len(opt2.weights) == 1 + len(variables2)


def test_copying_changes_nothing(clone: Callable[[Any], Any], library: Engine):
    opt, variables = RMSprop(0.1, **KWARGS), make_variables(library)
    step(library, opt, variables)
    before = Snapshot.of(opt, variables)
    clone((opt, variables))
    before.assert_equal(Snapshot.of(opt, variables))


def test_constraint_of_a_copy_acts(clone: Callable[[Any], Any], library: Engine):
    opt, variables = RMSprop(10.0), make_variables(library)
    opt2, variables2 = clone((opt, variables))
    step(library, opt2, variables2)
    assert variables2[2].numpy() == 1
