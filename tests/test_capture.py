"""Steps captured in a CUDA graph: replays equal steps, with the right numbers, counter and memory."""

import copy
import gc
import pickle

import numpy as np
import pytest

import gpurms
from gpurms import schedules
from tests import engines
from tests.support import host

cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
RULES = {
    "default": {},
    "everything": {"momentum": 0.9, "centered": True, "nesterov": True, "weight_decay": 0.1},
    "clipnorm": {"clipnorm": 0.5, "clipvalue": 0.3},
    "global-clipnorm": {"global_clipnorm": 1.0, "momentum": 0.5},
}
DTYPES = ("float16", "float32", "float64")


class Scene:
    """A dense variable and a table on the GPU, and the same on the host, with gradients that stay where they are."""

    def __init__(self, device, dtype="float32", layout=np.array, **options):
        rng = np.random.default_rng(0)
        self.options = {"check_indices": False, **options}
        arrays = [rng.standard_normal(shape).astype(dtype) for shape in ((300, 7), (50, 3), (300, 7), (70, 3))]
        self.host_arrays = [np.array(x) for x in arrays]
        self.ids = rng.integers(0, 50, 70)
        w, table, grad, values = (device.put(layout(x)) for x in arrays)
        self.w, self.table, self.grad = w, table, grad
        self.pairs = [(grad, w), (gpurms.IndexedSlices(values, device.put(self.ids)), table)]
        self.opt = gpurms.RMSprop(**self.options, capturable=True)
        cupy.cuda.get_current_stream().synchronize()
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def capture(self):
        """One step, and a graph of another."""
        with self.stream:
            self.opt.apply_gradients(self.pairs)
            self.stream.begin_capture()
            assert self.opt.apply_gradients(self.pairs) == 1, "a captured step has not been taken"
            return self.stream.end_capture()

    def expect(self, n_steps, **options):
        """Compare with as many steps on the host."""
        self.stream.synchronize()
        w, table, grad, values = (np.array(x) for x in self.host_arrays)
        opt = gpurms.RMSprop(**{**self.options, **options})
        for _ in range(n_steps):
            opt.apply_gradients([(grad, w), (gpurms.IndexedSlices(values, self.ids), table)])
        for found, wanted in ((self.w, w), (self.table, table)):
            assert host(found).tobytes() == wanted.tobytes()
            for slot in opt.get_slot_names():
                assert host(self.opt.get_slot(found, slot)).tobytes() == host(opt.get_slot(wanted, slot)).tobytes()
        assert int(self.opt.iterations.numpy()) == n_steps


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_are_steps(rule, dtype, device):
    scene = Scene(device, dtype, **RULES[rule])
    graph = scene.capture()
    for _ in range(3):
        graph.launch(scene.stream)
    scene.expect(4)


@pytest.mark.parametrize("rule", RULES)
def test_a_schedule_is_evaluated_before_each_replay(rule, device):
    rate = schedules.ExponentialDecay(0.1, 2, 0.5)
    scene = Scene(device, learning_rate=rate, decay=0.25, **RULES[rule])
    graph = scene.capture()
    with scene.stream:
        for n_steps in (2, 3, 4):
            assert scene.opt.prepare_replay() == n_steps
            graph.launch(scene.stream)
    scene.expect(4)


def test_numbers_may_change_between_replays(device):
    rates = iter((0.1, 0.1, 0.3, 0.2))  # at the step, its capture, and two replays
    scene = Scene(device, learning_rate=lambda: next(rates), momentum=0.9)
    graph = scene.capture()
    with scene.stream:
        for _ in range(2):
            scene.opt.prepare_replay()
            graph.launch(scene.stream)
    expected = iter((0.1, 0.3, 0.2))
    scene.expect(3, learning_rate=lambda: next(expected))


def test_steps_between_replays(device):
    scene = Scene(device, learning_rate=schedules.PolynomialDecay(0.2, 10), momentum=0.9)
    graph = scene.capture()
    with scene.stream:
        scene.opt.prepare_replay()
        graph.launch(scene.stream)
        assert scene.opt.apply_gradients(scene.pairs) == 3
        scene.opt.prepare_replay()
        graph.launch(scene.stream)
    scene.expect(4)


def test_any_layout_can_be_captured(device):
    scene = Scene(device, layout=np.asfortranarray, momentum=0.9)
    graph = scene.capture()
    graph.launch(scene.stream)
    scene.expect(2)


def test_a_graph_keeps_the_memory_it_uses(device):
    """The gradients' owner and the plan of the step are gone; their memory must not be anybody else's."""
    scene = Scene(device, layout=np.asfortranarray, global_clipnorm=1.0)
    graph = scene.capture()
    scene.pairs = scene.grad = None
    gc.collect()
    others = [cupy.full(n, 7.0, np.float32) for n in (1, 2, 70, 210, 2100, 4200) for _ in range(4)]
    cupy.cuda.get_current_stream().synchronize()
    graph.launch(scene.stream)
    scene.expect(2)
    assert all((host(x) == 7).all() for x in others)


def test_assigning_the_counter_is_seen(device):
    scene = Scene(device, learning_rate=schedules.PiecewiseConstantDecay([5], [0.1, 0.0]))
    graph = scene.capture()
    with scene.stream:
        scene.opt.iterations.assign(9)
        before = host(scene.w)
        assert scene.opt.prepare_replay() == 10
        graph.launch(scene.stream)
        assert host(scene.w).tobytes() == before.tobytes(), "the rate is 0 from step 6 on"
    assert int(scene.opt.iterations.numpy()) == 10


def test_copies_start_without_captures(device):
    scene = Scene(device)
    scene.capture()
    for twin in (copy.deepcopy(scene.opt), pickle.loads(pickle.dumps(scene.opt))):
        assert twin.capturable
        assert int(twin.iterations.numpy()) == 1
        with pytest.raises(RuntimeError, match="no step has been captured"):
            twin.prepare_replay()


def test_a_strided_variable_with_a_clip_factor_keeps_its_memory(device):
    scene = Scene(device, layout=np.asfortranarray, clipnorm=0.5)
    scene.pairs = scene.pairs[:1]
    graph = scene.capture()
    scene.pairs = scene.grad = None
    gc.collect()
    others = [cupy.full(n, 7.0, np.float64) for n in (1, 1, 2, 4)]
    cupy.cuda.get_current_stream().synchronize()
    graph.launch(scene.stream)
    scene.stream.synchronize()
    assert all((host(x) == 7).all() for x in others)


def test_steps_after_unprepared_replays_count_on(device):
    scene = Scene(device, momentum=0.9)
    graph = scene.capture()
    with scene.stream:
        for _ in range(3):
            graph.launch(scene.stream)
        assert scene.opt.apply_gradients(scene.pairs) == 5
    scene.expect(5)


def test_two_captures_of_different_terms(device):
    scene = Scene(device)
    first = scene.capture()
    scene.opt.maximize = True
    with scene.stream:
        scene.stream.begin_capture()
        scene.opt.apply_gradients(scene.pairs)
        scene.stream.end_capture()
        scene.opt.maximize = False
        assert scene.opt.prepare_replay() == 2
        first.launch(scene.stream)
    scene.expect(2)


def test_a_counter_of_two_optimizers(device):
    counter = gpurms.Variable(device.put(np.array(0, np.int64)))
    arrays = [device.put(np.ones(3, np.float32)) for _ in range(2)]
    opts = [gpurms.RMSprop(), gpurms.RMSprop()]
    for opt in opts:
        opt.iterations = counter
    counts = [opt.apply_gradients([(array * 1, array)]) for _ in range(3) for opt, array in zip(opts, arrays)]
    assert counts == [1, 2, 3, 4, 5, 6]


# --- several devices (emulated) -------------------------------------------------------------------------------------


def on(number, x):
    with cupy.cuda.Device(number):
        return cupy.array(x)


def test_the_counter_is_beside_the_variables():
    with engines.emulated(n_devices=2):
        w, grad = on(1, np.ones(3, np.float32)), on(1, np.ones(3, np.float32))
        opt = gpurms.RMSprop(capturable=True)
        opt.apply_gradients([(grad, w)])
        with cupy.cuda.Device(1), cupy.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            opt.apply_gradients([(grad, w)])
            graph = stream.end_capture()
            for _ in range(3):
                graph.launch(stream)
            stream.synchronize()
        assert int(opt.iterations.numpy()) == 4


@pytest.mark.parametrize("other", ["GPU 1", "the host"])
def test_a_part_of_a_step(other):
    with engines.emulated(n_devices=2):
        start = np.ones(3, np.float32)
        variables = [on(0, start), on(1, start) if other == "GPU 1" else start.copy()]
        grads = [on(0, start), on(1, start) if other == "GPU 1" else start.copy()]
        pairs = list(zip(grads, variables))
        opt = gpurms.RMSprop(capturable=True)
        opt.apply_gradients(pairs)
        before = [host(variable).tobytes() for variable in variables]
        with cupy.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            with pytest.raises(RuntimeError, match=f"can only be captured whole, but {other} would run"):
                opt.apply_gradients(pairs)
            stream.end_capture()
        assert [host(variable).tobytes() for variable in variables] == before
        assert int(opt.iterations.numpy()) == 1


# --- what cannot be captured ----------------------------------------------------------------------------------------


def refused(scene, match):
    """The step raises during a capture, and the capture can still be ended."""
    with scene.stream:
        scene.stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match=match):
                scene.opt.apply_gradients(scene.pairs)
        finally:
            scene.stream.end_capture()


def test_the_first_step(device):
    refused(Scene(device), "take one step with these variables")


def test_a_new_slot(device):
    scene = Scene(device)
    scene.capture()
    scene.opt.momentum = 0.5
    refused(scene, "take one step with these variables")


def test_without_capturable(device):
    scene = Scene(device)
    scene.opt = gpurms.RMSprop(check_indices=False)
    for _ in range(2):
        scene.opt.apply_gradients(scene.pairs)
    refused(scene, "capturable=True")
    scene.pairs = scene.pairs[:1]
    for _ in range(2):
        scene.opt.apply_gradients(scene.pairs)
    refused(scene, "capturable=True")


def test_the_check_of_indices(device):
    scene = Scene(device, check_indices=True)
    with scene.stream:
        scene.opt.apply_gradients(scene.pairs)
    refused(scene, "check_indices=False")


def test_a_counter_on_the_host(device):
    scene = Scene(device)
    scene.opt.iterations = gpurms.Variable(np.array(0, np.int64))
    with scene.stream:
        scene.opt.apply_gradients(scene.pairs)
    refused(scene, "iterations is on the host")


def test_a_constraint(device):
    scene = Scene(device)
    variable = gpurms.Variable(scene.w, constraint=lambda w: w * 1)
    scene.pairs = [(scene.grad, variable)]
    with scene.stream:
        scene.opt.apply_gradients(scene.pairs)
    refused(scene, "a constraint cannot be captured")


@pytest.mark.parametrize("option", [{"momentum": 0.0}, {"clipnorm": 2.0}, {"maximize": True}, {"weight_decay": 0.1}])
def test_what_a_capture_fixes_may_not_change(option, device):
    scene = Scene(device, momentum=0.9)
    scene.capture()
    for name, value in option.items():
        setattr(scene.opt, name, value)
    with pytest.raises(RuntimeError, match="has its terms and norm limits fixed"):
        scene.opt.prepare_replay()


def test_a_counter_that_is_not_known(device):
    scene = Scene(device)
    scene.capture()
    scene.opt.iterations.assign(5)
    refused(scene, "iterations has been assigned to")


def test_numbers_of_a_failed_step_are_not_garbage(device, monkeypatch):
    """A step that fails after its scalars have got their place leaves numbers there."""
    scene = Scene(device, learning_rate=0.25)
    with scene.stream:
        scene.opt.apply_gradients(scene.pairs)
    assert scene.opt._capture.live
    wide = device.put(np.ones(4))
    scene.opt.add_slot(wide, "rms")

    def fail(*arguments):
        raise MemoryError("planted")

    with monkeypatch.context() as patch:
        patch.setattr("gpurms.kernels.cuda._plan_dense", fail)
        with scene.stream, pytest.raises(MemoryError, match="planted"):
            scene.opt.apply_gradients([(device.put(np.ones(4)), wide)])
    assert all(host(live)[0] == 0.25 for live in scene.opt._capture.live.values())


def test_nothing_captured(device):
    scene = Scene(device)
    with pytest.raises(RuntimeError, match="no step has been captured"):
        scene.opt.prepare_replay()


def test_capturable_on_the_host():
    w, twin, grad = np.ones(5, np.float32), np.ones(5, np.float32), np.full(5, 0.5, np.float32)
    one, other = gpurms.RMSprop(momentum=0.9, capturable=True), gpurms.RMSprop(momentum=0.9)
    for _ in range(3):
        assert one.apply_gradients([(grad, w)]) == other.apply_gradients([(grad, twin)])
    assert w.tobytes() == twin.tobytes()
