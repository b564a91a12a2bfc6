"""A call like the one before takes a short cut: same results, and anything that differs leaves it."""

import weakref

import numpy as np
import pytest

import gpurms
from gpurms import repeat
from tests.support import assert_same_bits, host

SHAPES = ((5,), (3, 4), (), (2000,))
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "everything": {"momentum": 0.9, "centered": True, "nesterov": True, "weight_decay": 0.1, "clipvalue": 0.5},
    "clipnorm": {"clipnorm": 0.5, "momentum": 0.9},
    "global-clipnorm": {"global_clipnorm": 1.0, "clipvalue": 0.5},
    "schedule": {"learning_rate": gpurms.schedules.ExponentialDecay(0.1, 2, 0.5), "decay": 0.1},
}


@pytest.fixture
def taken(monkeypatch):
    """For each call of an optimizer with a call before, whether it took the short cut."""
    found = []
    pointers = repeat.Repeat.pointers

    def recorded(*arguments):
        result = pointers(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(repeat.Repeat, "pointers", recorded)
    return found


class Scene:
    """The same variables on the GPU and on the host, updated alike."""

    def __init__(self, device, dtypes=("float32",), **options):
        self.device, self.rng = device, np.random.default_rng(0)
        self.host = [self.rng.standard_normal(shape).astype(dtype) for dtype in dtypes for shape in SHAPES]
        self.arrays = [device.put(x) for x in self.host]
        self.opt, self.host_opt = gpurms.RMSprop(**options), gpurms.RMSprop(**options)

    def step(self, change=lambda pairs: pairs):
        """A step of both, with new gradients; ``change`` makes other pairs of them."""
        grads = [np.array(self.rng.standard_normal(x.shape)).astype(x.dtype) for x in self.host]
        on_device = change(list(zip([self.device.put(g) for g in grads], self.arrays)))
        count = self.opt.apply_gradients(on_device)
        assert count == self.host_opt.apply_gradients(change(list(zip(grads, self.host))))
        self.compare()

    def compare(self):
        for found, wanted in zip(self.arrays, self.host):
            assert_same_bits(host(found), wanted)
        for slot, wanted in zip(self.opt.weights, self.host_opt.weights, strict=True):
            assert_same_bits(host(slot), host(wanted))


@pytest.mark.parametrize("options", OPTIONS)
def test_repeated_calls_equal_the_host(options, device, taken):
    scene = Scene(device, ("float32", "float16", "float64"), **OPTIONS[options])
    for _ in range(4):
        scene.step()
    assert taken == [True] * 3


def test_numbers_may_change(device, taken):
    scene = Scene(device, momentum=0.9)
    for rate in (0.1, 0.2, 0.0, 0.3):
        for opt in (scene.opt, scene.host_opt):
            opt.learning_rate, opt.rho = rate, 1 - rate
        scene.step()
    assert taken == [True] * 3


CHANGES = {
    "order": lambda pairs: pairs[::-1],
    "fewer": lambda pairs: pairs[1:],
    "twice": lambda pairs: [*pairs, pairs[0]],
    "layout": lambda pairs: [(g[::-1], v) if g.ndim == 1 else (g, v) for g, v in pairs],
    "lists": lambda pairs: [list(pair) for pair in pairs],
    "none": lambda pairs: [(None, pairs[0][1]), *pairs[1:]],
    "own memory": lambda pairs: [(v, v) for _, v in pairs],
    "another's memory": lambda pairs: [(pairs[1][1], pairs[1][1].copy()), *pairs[:1], *pairs[2:]],
}


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("change", CHANGES)
def test_another_call(change, device, taken):
    scene = Scene(device, momentum=0.9)
    scene.step()
    scene.step()
    scene.step(CHANGES[change])
    scene.step()
    assert taken[:2] == [True, False]


def test_gradients_that_are_the_variables(device, taken):
    scene = Scene(device)
    scene.step()
    pairs = [(array, array) for array in scene.arrays]
    host_pairs = [(array, array) for array in scene.host]
    for _ in range(2):
        scene.opt.apply_gradients(pairs)
        scene.host_opt.apply_gradients(host_pairs)
        scene.compare()
    assert taken == [False, False]


SETTINGS = {
    "clipnorm": 0.5,
    "global_clipnorm": 0.5,
    "clipvalue": 0.1,
    "momentum": 0.5,
    "centered": True,
    "weight_decay": 0.1,
    "maximize": True,
    "nesterov": True,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_another_rule(setting, device):
    scene = Scene(device, momentum=0.25 if setting == "nesterov" else 0.0)
    scene.step()
    scene.step()
    for opt in (scene.opt, scene.host_opt):
        setattr(opt, setting, SETTINGS[setting])
    scene.step()
    scene.step()


def test_a_slot_made_by_hand(device):
    scene = Scene(device)
    scene.step()
    for opt, arrays in ((scene.opt, scene.arrays), (scene.host_opt, scene.host)):
        opt.add_slot(arrays[0], "momentum", "ones")
    scene.step()
    scene.step()


def test_a_constraint_set_later(device):
    w = gpurms.Variable(device.put(np.ones(4, np.float32)))
    opt, grad = gpurms.RMSprop(), device.put(np.ones(4, np.float32))
    opt.apply_gradients([(grad, w)])
    w.constraint = lambda x: x * 0
    opt.apply_gradients([(grad, w)])
    assert not host(w).any()


def test_errors_are_those_of_any_call(device):
    scene = Scene(device)
    scene.step()
    pairs = [(device.put(np.ones(x.shape, x.dtype)), array) for x, array in zip(scene.host, scene.arrays)]
    pairs[0] = (device.put(np.ones(6, np.float32)), scene.arrays[0])
    with pytest.raises(ValueError, match=r"expected a gradient of its shape \(5,\); got shape \(6,\)"):
        scene.opt.apply_gradients(pairs)
    scene.opt.learning_rate = lambda: -1.0
    with pytest.raises(ValueError, match="learning_rate must be >= 0"):
        scene.opt.apply_gradients(
            [(device.put(np.ones(x.shape, x.dtype)), a) for x, a in zip(scene.host, scene.arrays)]
        )
    scene.compare()


def test_no_memory_for_the_short_cut_changes_nothing(device, monkeypatch):
    scene = Scene(device, clipnorm=0.5)

    def fail(*arguments):
        raise MemoryError("planted")

    grads = [device.put(np.ones(x.shape, x.dtype)) for x in scene.host]
    with monkeypatch.context() as patch:
        patch.setattr("gpurms.kernels.cuda_norm.Repeated", fail)
        with pytest.raises(MemoryError, match="planted"):
            scene.opt.apply_gradients(zip(grads, scene.arrays))
    for found, wanted in zip(scene.arrays, scene.host):
        assert_same_bits(host(found), wanted)
    assert scene.opt.weights == []
    scene.step()
    scene.step()


def test_gradients_do_not_outlive_the_call(device):
    scene = Scene(device)
    for _ in range(3):
        grads = [device.put(np.ones(x.shape, x.dtype)) for x in scene.host]
        left = [weakref.ref(grad) for grad in grads]
        scene.opt.apply_gradients(zip(grads, scene.arrays))
        del grads
        assert not any(ref() is not None for ref in left)
