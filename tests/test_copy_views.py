"""Copies and pickles of an optimizer over views of one buffer: whichever arrays the caller goes on with have slots."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, Variable
from tests.engines import Engine, emulated
from tests.support import assert_same_bits

CLONES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}
VIEWS: dict[str, Callable[[Any], Any]] = {
    "first": lambda flat: flat[:4],
    "matrix": lambda flat: flat[4:10].reshape(2, 3),
    "transposed": lambda flat: flat[4:10].reshape(2, 3).T,
    "strided": lambda flat: flat[10::3],
    "backwards": lambda flat: flat[15:9:-1],
    "of a view": lambda flat: flat[2:14][3:9],
    "of another type": lambda flat: flat.view(np.float32)[3:8],
}


@pytest.fixture(params=CLONES)
def clone(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return CLONES[request.param]


def grow(library: Engine, opt: RMSprop, view: Any) -> None:
    gradient = np.arange(1, 1 + view.size).reshape(view.shape).astype(view.dtype)
    opt.apply_gradients([(library.put(gradient), view)])


@pytest.mark.parametrize("goes_on_with", ["the copied view", "its place in the copied buffer"])
@pytest.mark.parametrize("name", VIEWS)
def test_slots_are_found(library: Engine, clone: Callable[[Any], Any], name: str, goes_on_with: str) -> None:
    flat = library.put(np.linspace(-1, 1, 16).copy())
    opt, view = RMSprop(0.1, momentum=0.5), VIEWS[name](flat)
    grow(library, opt, view)
    opt2, flat2, view2 = clone((opt, flat, view))
    if goes_on_with != "the copied view":
        view2 = VIEWS[name](flat2)
    n_weights = len(opt2.weights)
    for slot in ("rms", "momentum"):
        assert_same_bits(opt2.get_slot(view2, slot), opt.get_slot(view, slot))
        assert opt2.get_slot(view2, slot) is not opt.get_slot(view, slot)
    before = flat.copy()
    grow(library, opt2, view2)
    assert_same_bits(flat, before)
    grow(library, opt, view)
    assert_same_bits(view2, view)
    assert len(opt2.weights) == n_weights


def test_views_share_one_copy_of_their_buffer(library: Engine, clone: Callable[[Any], Any]) -> None:
    flat = library.put(np.linspace(-1, 1, 16).copy())
    opt, views = RMSprop(0.1), [flat[:8], flat[8:]]
    for view in views:
        grow(library, opt, view)
    opt2, flat2 = clone((opt, flat))
    for half, view in ((flat2[:8], views[0]), (flat2[8:], views[1])):
        assert_same_bits(opt2.get_slot(half, "rms"), opt.get_slot(view, "rms"))
        grow(library, opt2, half)
    assert opt2.iterations.numpy() == 4
    assert len(opt2.weights) == 3


def test_a_buffer_in_another_order(library: Engine, clone: Callable[[Any], Any]) -> None:
    """CuPy copies it into the order of C, where the place is another: the copied view has the slots."""
    buffer = library.put(np.asfortranarray(np.linspace(-1, 1, 16).reshape(4, 4)))
    opt, view = RMSprop(0.1), buffer[:2]
    grow(library, opt, view)
    opt2, buffer2, view2 = clone((opt, buffer, view))
    assert_same_bits(opt2.get_slot(view2, "rms"), opt.get_slot(view, "rms"))
    assert_same_bits(buffer2, buffer)
    grow(library, opt2, view2)
    grow(library, opt, view)
    assert_same_bits(view2, view)


def test_variables_on_views(library: Engine, clone: Callable[[Any], Any]) -> None:
    flat = library.put(np.linspace(-1, 1, 16).copy())
    opt, var = RMSprop(0.1), Variable(flat[3:7], name="part")
    grow(library, opt, var.value)
    opt2, var2 = clone((opt, var))
    assert var2.name == "part"
    assert_same_bits(opt2.get_slot(var2, "rms"), opt.get_slot(var, "rms"))


def test_a_deep_copy_stays_on_its_devices() -> None:
    with emulated(2):
        import cupy

        arrays = []
        for number in (0, 1):
            with cupy.cuda.Device(number):
                arrays.append(cupy.ones(8))
        views = [array[2:6] for array in arrays]
        opt = RMSprop(0.1)
        gradients = []
        for number in (0, 1):
            with cupy.cuda.Device(number):
                gradients.append(cupy.ones(4))
        opt.apply_gradients(zip(gradients, views))
        opt2, arrays2 = copy.deepcopy((opt, arrays))
        opt2.apply_gradients([(gradient, array[2:6]) for gradient, array in zip(gradients, arrays2)])
        opt.apply_gradients(zip(gradients, views))
        assert [array.device.id for array in arrays2] == [0, 1]
        assert [slot.value.device.id for slot in opt2.weights[1:]] == [0, 1]
        for array, copied in zip(arrays, arrays2):
            assert_same_bits(copied, array)
