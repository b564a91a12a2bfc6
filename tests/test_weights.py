"""`get_weights` and `set_weights`."""

from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, Variable
from tests.engines import Engine
from tests.support import assert_same_bits, full_rmsprop, step, unchanged

F32 = np.float32


pytestmark = pytest.mark.usefixtures("numpy_engine")


def stepped(library: Engine) -> tuple[RMSprop, Variable, Variable]:
    opt, a, b = full_rmsprop(), library.variable(np.array([1, 2, 3], F32)), library.variable(np.ones((2, 2)))
    step(opt, a, b)
    step(opt, a)
    return opt, a, b


def test_get_weights_are_host_copies(library: Engine):
    opt, a, b = stepped(library)
    weights = opt.get_weights()
    assert [type(w) for w in weights] == [np.ndarray] * 7
    assert_same_bits(weights[0], np.array(2, np.int64))
    for got, want in zip(weights, opt.weights, strict=True):
        assert_same_bits(got, want)
    with unchanged(opt, a, b):
        for w in weights:
            w[...] = 9


def test_get_weights_before_the_first_step():
    assert RMSprop().get_weights() == []


@pytest.mark.parametrize("form", [list, tuple, lambda w: [x.tolist() for x in w]], ids=["list", "tuple", "lists"])
def test_set_weights_restores(form: Any, library: Engine):
    opt, a, b = stepped(library)
    saved, values = opt.get_weights(), (a.numpy(), b.numpy())
    identities, arrays = list(opt.weights), [w.value for w in opt.weights]
    step(opt, a, b)
    after = [x.numpy() for x in (a, b, *opt.weights)]
    opt.set_weights(form(saved))
    for got, want in zip(opt.weights, saved, strict=True):
        assert_same_bits(got, want)
    assert opt.weights == identities
    assert all(w.value is array for w, array in zip(opt.weights, arrays, strict=True))
    a.assign(values[0])
    b.assign(values[1])
    step(opt, a, b)
    for got, want in zip((a, b, *opt.weights), after, strict=True):
        assert_same_bits(got, want)


def test_set_weights_into_another_optimizer(library: Engine):
    opt, a, b = stepped(library)
    other, c, d = full_rmsprop(), library.variable(a.numpy()), library.variable(b.numpy())
    step(other, c, d)
    other.set_weights(opt.get_weights())
    c.assign(a.numpy())
    d.assign(b.numpy())
    step(opt, a, b)
    step(other, c, d)
    assert_same_bits(a, c)
    assert_same_bits(b, d)
    assert other.iterations.numpy() == 3


def test_set_weights_without_the_counter_sets_it_to_0(library: Engine):
    opt, _, _ = stepped(library)
    slots = [w + 1 for w in opt.get_weights()[1:]]
    opt.set_weights(slots)
    assert_same_bits(opt.iterations, np.array(0, np.int64))
    for got, want in zip(opt.weights[1:], slots, strict=True):
        assert_same_bits(got, want)


def test_set_weights_of_a_fresh_optimizer():
    opt = RMSprop()
    opt.set_weights([])
    assert opt.weights == []
    opt.iterations.assign(5)
    opt.set_weights([])
    assert opt.iterations.numpy() == 0


@pytest.mark.parametrize("count", [0, 1, 5, 8, 20])
def test_set_weights_of_a_wrong_length(count: int, library: Engine):
    opt, a, b = stepped(library)
    weights = (opt.get_weights() * 3)[:count]
    with unchanged(opt, a, b), pytest.raises(ValueError, match="but the optimizer was expecting 7 weights"):
        opt.set_weights(weights)


def test_set_weights_on_an_optimizer_without_weights():
    with pytest.raises(ValueError, match="but the optimizer was expecting 0 weights"):
        RMSprop().set_weights([np.ones(2)])


def test_set_weights_of_a_wrong_shape(library: Engine):
    opt, a, b = stepped(library)
    weights = [w + 1 for w in opt.get_weights()]
    weights[3] = np.ones(2, F32)
    message = r"Optimizer weight shape \(3,\) not compatible with provided weight shape \(2,\)"
    with unchanged(opt, a, b), pytest.raises(ValueError, match=message):
        opt.set_weights(weights)


@pytest.mark.parametrize("bad", ["text", None, [[1.0], [1.0, 2.0]], 1j], ids=repr)
def test_set_weights_that_are_no_numbers(bad: Any, library: Engine):
    opt, a, b = stepped(library)
    weights = [w + 1 for w in opt.get_weights()]
    weights[3] = bad
    with unchanged(opt, a, b), pytest.raises((TypeError, ValueError)):
        opt.set_weights(weights)
