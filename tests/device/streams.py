"""What stands in for CuPy's devices, streams, events, graphs and runtime calls, with CuPy's signatures."""

import time
from collections.abc import Callable
from typing import Any, Self

import cupy
from cupy.cuda.runtime import CUDARuntimeError

from tests.device.machine import active
from tests.device.operations import (
    CAPTURE_ISOLATION,
    CAPTURE_UNMATCHED,
    CAPTURE_UNSUPPORTED,
    Capture,
    Operation,
    Queue,
)

COMPUTE_CAPABILITY = "90"
CUDA_VERSION = 13000
INVALID_VALUE, INVALID_HANDLE, NOT_READY = 1, 400, 600

_Device = cupy.cuda.Device
_UnownedMemory = cupy.cuda.UnownedMemory


class Device(_Device):
    """A device of the active machine."""

    def __init__(self, device: Any = None) -> None:
        super().__init__(active().thread.device if device is None else device)
        self._previous: list[int] = []

    def use(self) -> None:
        active().set_device(self.id)

    def __enter__(self) -> Self:
        self._previous.append(active().thread.device)
        self.use()
        return self

    def __exit__(self, *args: object) -> None:
        active().set_device(self._previous.pop())

    def synchronize(self) -> None:
        active().synchronise_device(self.id)

    @property
    def compute_capability(self) -> str:
        return COMPUTE_CAPABILITY

    @property
    def mem_info(self) -> tuple[int, int]:
        """Free and total bytes."""
        heap = active().heap
        total = heap.limit if heap.limit is not None else 1 << 34
        return total - heap.used[self.id], total


class Event:
    """A place in a stream's order."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self._operation: Operation | None = None
        self._device = active().thread.device
        self._timed = not disable_timing
        self._time = 0.0

    @property
    def done(self) -> bool:
        return self._operation is None or self._operation.done

    def record(self, stream: "Stream | None" = None) -> None:
        machine = active()
        queue = machine.queue(stream)
        if queue.device != self._device:
            raise CUDARuntimeError(INVALID_HANDLE)
        self._operation = machine.submit(queue, Operation("event", self._stamp))

    def synchronize(self) -> None:
        if self._operation is not None:
            active().synchronise_event(self._operation)

    def _stamp(self) -> None:
        self._time = time.perf_counter()


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds between two events that have happened."""
    if not (start_event._timed and end_event._timed and start_event._operation and end_event._operation):
        raise CUDARuntimeError(INVALID_HANDLE)
    if not (start_event.done and end_event.done):
        raise CUDARuntimeError(NOT_READY)
    return (end_event._time - start_event._time) * 1e3


class Stream:
    """A stream of the active machine; `queue` is None for the default stream of whichever device is current."""

    null: "Stream"
    ptds: "Stream"

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        self.queue: Queue | None = None
        self.is_non_blocking = False
        self.priority = 0 if priority is None else priority
        if null or ptds:
            self.ptr, self.device_id = 0 if null else 2, -1
            return
        machine = active()
        self.ptr, self.device_id = next(machine.handles), machine.thread.device
        self.is_non_blocking = non_blocking
        self.queue = machine.streams[self.ptr] = Queue(self.device_id, blocking=not non_blocking)

    @classmethod
    def from_external(cls, obj: Any) -> Self:
        """The stream that another library names by its handle; it lives as long as one of the two objects."""
        if not hasattr(obj, "__cuda_stream__"):
            raise TypeError(f"{type(obj).__name__} has no __cuda_stream__")
        _, handle = obj.__cuda_stream__()
        if handle == 0:
            return cls(null=True)
        queue = active().streams.get(handle)
        if queue is None:
            raise CUDARuntimeError(INVALID_HANDLE)
        stream = cls(null=True)
        stream.queue, stream.ptr, stream.device_id = queue, handle, queue.device
        stream.is_non_blocking = not queue.blocking
        return stream

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return self.ptr

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.ptr} (device {self.device_id})>"

    def use(self) -> Self:
        self._make_current()
        return self

    def __enter__(self) -> Self:
        thread = active().thread
        previous = thread.streams.get(thread.device)
        self._make_current()
        thread.stack.append((thread.device, previous))
        return self

    def __exit__(self, *args: object) -> None:
        thread = active().thread
        device, previous = thread.stack.pop()
        thread.streams[device] = previous

    def _make_current(self) -> None:
        thread = active().thread
        if self.device_id not in (-1, thread.device):
            raise RuntimeError(
                f"The device that the stream is created on ({self.device_id})"
                f" does not match with the current device ({thread.device})"
            )
        thread.streams[thread.device] = self

    @property
    def done(self) -> bool:
        last = active().queue(self).last
        return last is None or last.done

    def synchronize(self) -> None:
        machine = active()
        machine.synchronise("stream.synchronize", [machine.queue(self)])

    def launch_host_func(self, callback: Callable[[Any], None], arg: Any) -> None:
        machine = active()
        machine.submit(machine.queue(self), Operation("host function", lambda: callback(arg)))

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Order the stream's later work after the event. Waiting for a captured event joins its capture."""
        if event._operation is None:
            return
        machine, capture = active(), event._operation.capture
        queue = machine.queue(self)
        if capture is not None and queue.capture is None and capture in machine.captures:
            capture.join(queue)
        if capture is not queue.capture:
            raise CUDARuntimeError(CAPTURE_ISOLATION)
        machine.submit(queue, Operation("wait", after=[] if event.done else [event._operation]))

    def begin_capture(self, mode: int | None = None) -> None:
        if self.queue is None:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self.queue.capture is not None:
            raise CUDARuntimeError(CAPTURE_UNSUPPORTED)
        capture = Capture(self.queue)
        capture.join(self.queue)
        active().captures.append(capture)

    def end_capture(self) -> "Graph":
        machine = active()
        capture = None if self.queue is None else self.queue.capture
        if capture is None or capture.origin is not self.queue:
            raise CUDARuntimeError(CAPTURE_UNMATCHED)
        machine.captures.remove(capture)
        capture.finish()
        return Graph(capture.branches)

    def is_capturing(self) -> bool:
        return active().queue(self).capture is not None


Stream.null = Stream(null=True)
Stream.ptds = Stream(ptds=True)


class Graph:
    """Captured work. Kernel arguments are those of the capture; memory is read and written when it runs."""

    def __init__(self, branches: list[list[Operation]]) -> None:
        self._branches = branches

    def launch(self, stream: Stream | None = None) -> None:
        machine = active()
        machine.submit_graph(machine.queue(stream), self._branches)

    def upload(self, stream: Stream | None = None) -> None:
        """Nothing has to be prepared."""


def get_current_stream(device_id: int = -1) -> Stream:
    thread = active().thread
    stream = thread.streams.get(thread.device if device_id == -1 else device_id)
    return Stream.null if stream is None else stream


class UnownedMemory(_UnownedMemory):
    """Memory of somebody else. CuPy asks the driver for its device."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        if device_id < 0:
            block = active().heap.block_at(ptr)
            if block is None:
                raise CUDARuntimeError(INVALID_VALUE)
            device_id = block.device
        super().__init__(ptr, size, owner, device_id)


def alloc_pinned_memory(size: int) -> Any:
    return active().heap.pin(size)


class MemoryPool:
    """The default pool's bookkeeping."""

    def used_bytes(self) -> int:
        machine = active()
        return machine.heap.used[machine.thread.device]

    def total_bytes(self) -> int:
        return self.used_bytes()

    def free_bytes(self) -> int:
        return 0

    def free_all_blocks(self, stream: Stream | None = None) -> None:
        """Nothing is kept for later."""


RUNTIME = {
    "getDevice": lambda: active().thread.device,
    "setDevice": lambda device: active().set_device(device),
    "getDeviceCount": lambda: len(active().default_queues),
    "driverGetVersion": lambda: CUDA_VERSION,
    "deviceSynchronize": lambda: Device().synchronize(),
    "memGetInfo": lambda: Device().mem_info,
    "getDeviceProperties": lambda device: {
        "name": b"emulated",
        "major": int(COMPUTE_CAPABILITY[:-1]),
        "minor": int(COMPUTE_CAPABILITY[-1]),
        "multiProcessorCount": 4,
        "warpSize": 32,
        "maxThreadsPerBlock": 1024,
        "sharedMemPerBlock": 49152,
        "totalGlobalMem": Device(device).mem_info[1],
    },
}
