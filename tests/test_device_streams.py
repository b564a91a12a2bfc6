"""Work on the emulated device runs in any order that its streams, events and graphs allow, and in no other."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tests.device_support import CUDARuntimeError, Fault, Machine, cupy, cupy_on_cpu, raw, results, saxpy


@pytest.fixture
def machine() -> Iterator[Machine]:
    with cupy_on_cpu() as machine:
        yield machine


def produce_and_consume(*, wait: bool, non_blocking: bool = True) -> float:
    first, second = (cupy.cuda.Stream(non_blocking=non_blocking) for _ in range(2))
    a = cupy.zeros(4)
    cupy.cuda.Device().synchronize()
    with first:
        a += 1
        event = first.record()
    with second:
        if wait:
            second.wait_event(event)
        a *= 10
        value = a[0].item()
    cupy.cuda.Device().synchronize()
    return value


def test_streams_are_ordered_by_events_only() -> None:
    assert results(lambda: produce_and_consume(wait=True)) == {10.0}
    assert results(lambda: produce_and_consume(wait=False)) >= {0.0, 10.0}


def through_the_default_stream(*, non_blocking: bool) -> float:
    stream = cupy.cuda.Stream(non_blocking=non_blocking)
    a = cupy.zeros(4)
    cupy.cuda.Device().synchronize()
    with stream:
        a += 1
    a *= 10
    with stream:
        a += 2
        value = a[0].item()
    cupy.cuda.Device().synchronize()
    return value


def test_the_default_stream_is_ordered_with_blocking_streams() -> None:
    assert results(lambda: through_the_default_stream(non_blocking=False)) == {12.0}
    assert len(results(lambda: through_the_default_stream(non_blocking=True))) > 1


def test_nothing_runs_before_somebody_waits() -> None:
    with cupy_on_cpu(deferred=True) as machine:
        stream = cupy.cuda.Stream()
        with stream:
            a = cupy.zeros(3)
            event = stream.record()
            assert not event.done
            assert not stream.done
            event.synchronize()
            assert event.done
            assert machine.synchronisations == ["event.synchronize"]
        x, y = cupy.zeros(4, "f4"), cupy.zeros(4, "f4")
        raw("saxpy")((1,), (8,), (np.float32(1), x, y, 8))
        with pytest.raises(Fault, match="out of bounds"):
            cupy.cuda.Device().synchronize()
        assert a.tolist() == [0, 0, 0]


def test_a_fault_that_nobody_waited_for_is_raised_at_the_end() -> None:
    def end_without_waiting() -> None:
        with cupy_on_cpu(deferred=True):
            raw("store_double")((1,), (1,), (np.uint64(512), 1.0))

    with pytest.raises(Fault):
        end_without_waiting()


def test_host_memory_is_read_at_the_call_if_pageable_and_later_if_pinned() -> None:
    with cupy_on_cpu(deferred=True):
        a = cupy.empty(4)
        pageable = np.ones(4)
        a.set(pageable)
        pageable[:] = 2
        assert a.tolist() == [1, 1, 1, 1]
        pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(32), np.float64, 4)
        pinned[:] = 1
        a.set(pinned)
        pinned[:] = 2
        assert a.tolist() == [2, 2, 2, 2]
        a.fill(5)
        a.get(out=pinned, blocking=False)
        assert pinned.tolist() == [2, 2, 2, 2]
        cupy.cuda.get_current_stream().synchronize()
        assert pinned.tolist() == [5, 5, 5, 5]


def test_memory_is_freed_in_the_order_of_its_own_stream() -> None:
    def temporary(*, synchronise: bool) -> float:
        out, stream = cupy.zeros(4), cupy.cuda.Stream(non_blocking=True)
        temporary = cupy.ones(4)
        cupy.cuda.Device().synchronize()
        with stream:
            out += temporary
        if synchronise:
            stream.synchronize()
        del temporary
        cupy.cuda.Device().synchronize()
        return out[0].item()

    assert results(lambda: temporary(synchronise=True)) == {1.0}
    with pytest.raises(Fault, match="was freed before the work that uses it ran"):
        results(lambda: temporary(synchronise=False))


def test_current_stream_is_per_thread_and_per_device() -> None:
    with cupy_on_cpu(n_devices=2):
        stream, seen = cupy.cuda.Stream(), []
        with stream:
            assert cupy.cuda.get_current_stream() is stream
            with cupy.cuda.Device(1):
                assert cupy.cuda.get_current_stream() == cupy.cuda.Stream.null
                with pytest.raises(RuntimeError, match="does not match with the current device"):
                    stream.use()
            worker = threading.Thread(target=lambda: seen.append(cupy.cuda.get_current_stream()))
            worker.start()
            worker.join()
        assert seen == [cupy.cuda.Stream.null]
        assert cupy.cuda.get_current_stream() == cupy.cuda.Stream.null
        stream.use()
        assert cupy.cuda.get_current_stream() is stream


def test_devices() -> None:
    with cupy_on_cpu(n_devices=2) as machine:
        a = cupy.zeros(3, "f4")
        with cupy.cuda.Device(1) as device:
            b = cupy.ones(3, "f4")
            assert cupy.cuda.runtime.getDevice() == device.id == 1
            c = a.copy()
        assert cupy.cuda.runtime.getDevice() == 0
        assert [x.device.id for x in (a, b, c)] == [0, 1, 1]
        assert b.device == cupy.cuda.Device(1) != a.device
        assert machine.copies[-1] == "device to device"
        with pytest.raises(ValueError, match=r"where the array resides \(1\) is different from the current device"):
            a + b
        with pytest.raises(Fault, match="a kernel on device 0 was given an array of device 1"):
            saxpy(1, a, b)
        with pytest.raises(Fault):
            raw("saxpy")((1,), (3,), (np.float32(1), a, np.uint64(b.data.ptr), 3))
        assert b.get().tolist() == [1, 1, 1]
        with pytest.raises(CUDARuntimeError, match="cudaErrorInvalidDevice"):
            cupy.cuda.Device(2).use()


def test_streams_and_events_belong_to_a_device() -> None:
    with cupy_on_cpu(n_devices=2):
        stream, event = cupy.cuda.Stream(), cupy.cuda.Event()
        with cupy.cuda.Device(1):
            with pytest.raises(CUDARuntimeError, match="cudaErrorInvalidResourceHandle"):
                event.record()
            with pytest.raises(cupy.cuda.driver.CUDADriverError, match="a stream of device 0"):
                saxpy(1, cupy.zeros(3, "f4"), cupy.zeros(3, "f4"), stream)
            cupy.cuda.get_current_stream().wait_event(stream.record(event))


def copy_between_devices(*, wait: bool) -> float:
    a = cupy.zeros(4)
    a[2:] = 7
    written = cupy.cuda.get_current_stream().record()
    with cupy.cuda.Device(1):
        b = cupy.zeros(2)
        if wait:
            cupy.cuda.get_current_stream().wait_event(written)
        b.data.copy_from_device_async(a[2:].data, b.nbytes)
        value = b[0].item()
    cupy.cuda.Device().synchronize()
    return value


def test_copies_between_devices_wait_for_events_only() -> None:
    assert results(lambda: copy_between_devices(wait=True), n_devices=2) == {7.0}
    assert len(results(lambda: copy_between_devices(wait=False), n_devices=2) - {7.0}) > 0


def test_elapsed_time(machine: Machine) -> None:
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    cupy.zeros(3)
    with pytest.raises(CUDARuntimeError):
        cupy.cuda.get_elapsed_time(start, end)
    end.record()
    assert cupy.cuda.get_elapsed_time(start, end) >= 0


@pytest.mark.parametrize("deferred", [False, True], ids=["eager", "deferred"])
def test_a_graph_replays_its_kernels(deferred: bool) -> None:
    with cupy_on_cpu(deferred=deferred) as machine:
        x, y = cupy.ones(4, "f4"), cupy.zeros(4, "f4")
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        machine.forget()
        with stream:
            stream.begin_capture()
            assert stream.is_capturing()
            saxpy(2, x, y)
            y += 1
            graph = stream.end_capture()
            assert not stream.is_capturing()
            assert machine.launches == []
            assert y.tolist() == [0, 0, 0, 0]
            x.fill(3)
            graph.launch()
        graph.launch(stream)
        stream.synchronize()
        assert y.tolist() == [14, 14, 14, 14]
        assert [launch.name for launch in machine.launches] == ["cupy_fill"] + ["saxpy", "cupy_add"] * 2
        assert machine.graph_launches == 2


def test_capture_forbids_waiting_and_copies_to_the_host(machine: Machine) -> None:
    a, stream, host = cupy.zeros(3), cupy.cuda.Stream(non_blocking=True), np.zeros(3)
    with stream:
        stream.begin_capture()
        for action in (
            a.get,
            a[0].item,
            stream.synchronize,
            cupy.cuda.Device().synchronize,
            lambda: a.set(host),
            lambda: a[a > 0],
            lambda: cupy.nonzero(a),
            stream.begin_capture,
        ):
            with pytest.raises(CUDARuntimeError, match="cudaErrorStreamCaptureUnsupported"):
                action()
        cupy.empty(3)
        machine.allocate_in_capture = False
        with pytest.raises(CUDARuntimeError, match="cudaErrorStreamCaptureUnsupported"):
            cupy.empty(3)
        stream.end_capture()
        cupy.empty(3)
    with pytest.raises(RuntimeError, match="cannot capture on the default"):
        cupy.cuda.Stream.null.begin_capture()
    with pytest.raises(CUDARuntimeError):
        stream.end_capture()


def test_the_default_stream_may_not_be_used_while_a_blocking_stream_captures(machine: Machine) -> None:
    a, stream = cupy.zeros(3), cupy.cuda.Stream()
    stream.begin_capture()
    with pytest.raises(CUDARuntimeError, match="cudaErrorStreamCaptureImplicit"):
        a += 1
    stream.end_capture()
    a += 1


def capture_a_fork(*, joined: bool) -> float:
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    a, b = cupy.ones(2), cupy.ones(2)
    cupy.cuda.Device().synchronize()
    first.begin_capture()
    with first:
        a += 1
        forked = first.record()
    with second:
        second.wait_event(forked)
        assert second.is_capturing()
        b += a
        done = second.record()
    with first:
        a *= 2
        if joined:
            first.wait_event(done)
        a += b
        graph = first.end_capture()
    graph.launch(first)
    first.synchronize()
    return a[0].item()


def test_a_captured_fork_runs_in_any_order_its_events_allow() -> None:
    found = results(lambda: capture_a_fork(joined=True))
    assert found == {7.0, 9.0}
    with cupy_on_cpu(), pytest.raises(CUDARuntimeError, match="cudaErrorStreamCaptureUnjoined"):
        capture_a_fork(joined=False)


def test_a_graph_may_not_outlive_its_memory(machine: Machine) -> None:
    a, stream = cupy.zeros(3), cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        a += 1
        graph = stream.end_capture()
    del a
    with pytest.raises(Fault, match="was freed before the work that uses it ran"):
        graph.launch(stream)


class Foreign:
    """A stream as another library hands it over."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def through_another_library(*, same: bool) -> float:
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    a = cupy.zeros(4)
    cupy.cuda.Device().synchronize()
    with first:
        a += 1
    with cupy.cuda.Stream.from_external(Foreign((first if same else second).ptr)):
        a *= 10
    cupy.cuda.Device().synchronize()
    return a[0].item()


def test_a_stream_of_another_library_is_the_one_it_names() -> None:
    assert results(lambda: through_another_library(same=True)) == {10.0}
    assert results(lambda: through_another_library(same=False)) >= {1.0, 10.0}


def test_a_stream_of_another_library_is_checked() -> None:
    with cupy_on_cpu(2):
        with pytest.raises(TypeError, match="int has no __cuda_stream__"):
            cupy.cuda.Stream.from_external(5)
        with pytest.raises(CUDARuntimeError, match="InvalidResourceHandle"):
            cupy.cuda.Stream.from_external(Foreign(5))
        stream = cupy.cuda.Stream()
        with cupy.cuda.Device(1), pytest.raises(RuntimeError, match="does not match"):
            cupy.cuda.Stream.from_external(Foreign(stream.ptr)).use()
        assert cupy.cuda.Stream.from_external(Foreign(0)) == cupy.cuda.Stream.null
