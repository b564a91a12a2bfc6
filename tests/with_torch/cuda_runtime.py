"""What stands in for torch.cuda where no device is: streams, events, graphs and queries of the emulated machine."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Self
from unittest import mock

import cupy
import torch
from torch import Tensor

from tests.device.machine import Machine, active
from tests.device.memory import Allocation
from tests.device.operations import Capture, Queue


class State:
    """Of one emulation: torch's current streams, what graphs being captured keep, and whether waiting is an error."""

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}
        self.kept: dict[Capture, list[Allocation]] = {}
        self.sync_debug_mode = "default"


_states: dict[Machine, State] = {}


def state() -> State:
    return _states.setdefault(active(), State())


def index(device: Any = None) -> int:
    """The number of a device, the current one if none is named."""
    if device is None:
        return active().thread.device
    if isinstance(device, int):
        return device
    number = torch.device(device).index
    return active().thread.device if number is None else number


@contextlib.contextmanager
def on(device: int) -> Iterator[tuple[Machine, Queue]]:
    """Make the device current; yields the queue of torch's current stream there."""
    machine = active()
    with machine.on_device(device):
        yield machine, machine.queue(current_stream(device))


def keep(capture: Capture, memory: Allocation) -> None:
    """Memory of a graph, which lives as long as that."""
    state().kept[capture].append(memory)


def forbid_waiting(why: str) -> None:
    """RuntimeError if torch has been told not to wait."""
    if state().sync_debug_mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {why}")


class Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._event: Any = None

    def record(self, stream: "Stream | None" = None) -> None:
        stream = current_stream() if stream is None else stream
        with active().on_device(stream.device.index):
            self._event = cupy.cuda.Event(disable_timing=True)
            self._event.record(stream)

    def wait(self, stream: "Stream | None" = None) -> None:
        (current_stream() if stream is None else stream).wait_event(self)

    def query(self) -> bool:
        return self._event is None or bool(self._event.done)

    def synchronize(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class Stream:
    """torch.cuda.Stream: one that does not wait for the default stream. ``queue`` is what the machine asks for."""

    def __init__(self, device: Any = None, priority: int = 0, *, default: bool = False) -> None:
        self.device = torch.device("cuda", index(device))
        with active().on_device(self.device.index):
            self._stream = cupy.cuda.Stream(null=True) if default else cupy.cuda.Stream(non_blocking=True)
        self.cuda_stream: int = self._stream.ptr
        self.queue = self._stream.queue

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (self.device, self.cuda_stream) == (other.device, other.cuda_stream)

    def __hash__(self) -> int:
        return hash((self.device, self.cuda_stream))

    def wait_event(self, event: Event) -> None:
        if event._event is not None:
            with active().on_device(self.device.index):
                self._stream.wait_event(event._event)

    def wait_stream(self, stream: Self) -> None:
        event = Event()
        event.record(stream)
        self.wait_event(event)

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        with active().on_device(self.device.index):
            return bool(self._stream.done)

    def synchronize(self) -> None:
        with active().on_device(self.device.index):
            self._stream.synchronize()


class CUDAGraph:
    """torch.cuda.CUDAGraph, with a memory pool of its own."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._graph: Any = None
        self._memory: list[Allocation] = []

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **options: Any) -> None:
        if pool is not None or options.get("check_input_liveness"):
            raise NotImplementedError("pool and check_input_liveness are not emulated")
        machine, stream = active(), current_stream()
        stream._stream.begin_capture()
        self._memory = state().kept[stream._stream.queue.capture] = []
        machine.allocate_in_capture = capture_error_mode == "relaxed"  # cudaMalloc, which CuPy's pool may call

    def capture_end(self) -> None:
        stream = current_stream()
        capture = stream._stream.queue.capture
        del state().kept[capture]
        if not any(capture.branches):
            warnings.warn("The CUDA Graph is empty", stacklevel=3)
        self._graph = stream._stream.end_capture()

    def replay(self) -> None:
        self._graph.launch(current_stream())

    def reset(self) -> None:
        self._graph, self._memory = None, []


@contextlib.contextmanager
def stream(new: Stream | None) -> Iterator[None]:
    """torch.cuda.stream: the stream is current, and so is its device."""
    if new is None:
        yield
        return
    here, streams = new.device.index, state().streams
    with active().on_device(here):
        former, streams[here] = current_stream(here), new
        try:
            yield
        finally:
            streams[here] = former


def current_stream(device: Any = None) -> Stream:
    return state().streams.get(index(device)) or default_stream(device)


def default_stream(device: Any = None) -> Stream:
    return Stream(device, default=True)


def set_stream(new: Stream) -> None:
    active().set_device(new.device.index)
    state().streams[new.device.index] = new


def synchronize(device: Any = None) -> None:
    active().synchronise_device(index(device))


def is_current_stream_capturing() -> bool:
    with on(index()) as (_, queue):
        return queue.capture is not None


def set_sync_debug_mode(mode: str) -> None:
    state().sync_debug_mode = mode


NAMES = {
    "CUDAGraph": CUDAGraph,
    "Event": Event,
    "Stream": Stream,
    "_lazy_init": lambda: None,
    "current_device": index,
    "current_stream": current_stream,
    "default_stream": default_stream,
    "device": lambda device: active().on_device(index(device)),
    "device_count": lambda: len(active().default_queues),
    "empty_cache": lambda: None,
    "get_sync_debug_mode": lambda: ("default", "warn", "error").index(state().sync_debug_mode),
    "is_available": lambda: True,
    "is_current_stream_capturing": is_current_stream_capturing,
    "set_device": lambda device: active().set_device(index(device)),
    "set_stream": set_stream,
    "set_sync_debug_mode": set_sync_debug_mode,
    "stream": stream,
    "synchronize": synchronize,
}


_getitem = Tensor.__getitem__


def getitem(self: Tensor, items: Any) -> Tensor:
    """By numbers and slices."""
    if not self.is_cuda:
        return _getitem(self, items)
    axis = 0
    for item in items if isinstance(items, tuple) else (items,):
        if isinstance(item, int):
            self = self.select(axis, item)
        elif isinstance(item, slice):
            self = torch.ops.aten.slice.Tensor(self, axis, item.start, item.stop, item.step or 1)
            axis += 1
        else:
            raise NotImplementedError(f"an index of type {type(item)}")
    return self


METHODS: dict[str, Any] = {  # those that turn to a part of torch for the device, which its build does not have
    "__float__": lambda self: float(self.item()),
    "__getitem__": getitem,
    "contiguous": lambda self, *, memory_format=torch.contiguous_format: torch.ops.aten.contiguous(
        self, memory_format=memory_format
    ),
    "copy_": lambda self, src, non_blocking=False: torch.ops.aten.copy_(self, src, non_blocking),
}


@contextlib.contextmanager
def torch_cuda_on(machine: Machine) -> Iterator[None]:
    """torch.cuda is that of the machine, which is the active one."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(mock.patch.multiple(torch.cuda, **NAMES))
        undo.enter_context(mock.patch.multiple(Tensor, **METHODS))
        undo.enter_context(mock.patch.object(torch.cuda.graph, "default_capture_stream", None))
        undo.enter_context(mock.patch.object(torch._C, "_host_emptyCache", create=True))
        undo.callback(_states.pop, machine, None)
        yield
