"""The emulated machine behind CuPy: devices, queues of operations, and a record of what was asked of them.

Every operation is a node that names the operations it must follow; each stream has a queue in which they also run in
order. An eager machine runs an operation when it is submitted. A deferred machine runs nothing before somebody
synchronises, and then picks at random among the queues whose next operation may run: whatever order the hardware may
choose, a test can meet, so a missing event shows.
"""

import contextlib
import itertools
import random
import threading
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

from cupy.cuda.runtime import CUDARuntimeError

from tests.device import ptx
from tests.device.memory import Allocation, Block, Heap
from tests.device.operations import CAPTURE_IMPLICIT, CAPTURE_UNSUPPORTED, Capture, Launch, Operation, Queue, ancestors

INVALID_DEVICE = 101


class ThreadState(threading.local):
    """CUDA keeps the current device per thread, CuPy the current stream per thread and device."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, Any] = {}
        self.stack: list[tuple[int, Any]] = []  # (device, stream to return to) of every `with stream`


class Machine:
    """Devices without hardware. Tests read its records and set its limits.

    Attributes:
        launches: the kernels that were submitted, alone or by a graph.
        copies: names of the memory copies and fills that were submitted.
        synchronisations: why the host waited, once per time.
        allocations: bytes of every allocation.
        graph_launches: how many graphs were launched.
        allocate_in_capture: False forbids allocations on a stream that is capturing.
        heap: the memory; `heap.limit` is what a device has.
        execute: what runs a kernel: `ptx.run`, or what a test puts in its place.
    """

    def __init__(self, n_devices: int, *, deferred: bool, seed: int) -> None:
        self.deferred = deferred
        self.random = random.Random(seed)
        self.lock = threading.RLock()  # a finaliser may release memory in the middle of any call
        self.thread = ThreadState()
        self.heap = Heap(n_devices)
        self.default_queues = [Queue(device, legacy=True) for device in range(n_devices)]
        self.busy: list[Queue] = []
        self.captures: list[Capture] = []
        self.handles = itertools.count(0x1000, 0x10)
        self.streams: WeakValueDictionary[int, Queue] = WeakValueDictionary()  # by handle
        self.allocate_in_capture = True
        self.execute = ptx.run
        self.forget()

    def forget(self) -> None:
        """Empty the records."""
        self.launches: list[Launch] = []
        self.copies: list[str] = []
        self.synchronisations: list[str] = []
        self.allocations: list[int] = []
        self.graph_launches = 0

    def set_device(self, device: int) -> None:
        if not 0 <= device < len(self.default_queues):
            raise CUDARuntimeError(INVALID_DEVICE)
        self.thread.device = device

    @contextlib.contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        previous = self.thread.device
        self.set_device(device)
        try:
            yield
        finally:
            self.thread.device = previous

    def queue(self, stream: Any = None) -> Queue:
        """The queue of a stream, or of the current one."""
        if stream is None:
            stream = self.thread.streams.get(self.thread.device)
        queue = None if stream is None else stream.queue
        return self.default_queues[self.thread.device] if queue is None else queue

    def allocate(self, nbytes: int) -> Allocation:
        """Memory of the current device, for the current stream.

        Raises:
            CUDARuntimeError: the stream is capturing and `allocate_in_capture` is False.
        """
        queue = self.queue()
        if queue.capture is not None and not self.allocate_in_capture:
            raise CUDARuntimeError(CAPTURE_UNSUPPORTED)
        self.allocations.append(nbytes)
        return self.reserve(nbytes, queue)

    def reserve(self, nbytes: int, queue: Queue) -> Allocation:
        """Memory of the current device for a stream, off the record: that of another library than CuPy."""

        def release(block: Block) -> None:
            self.heap.used[block.device] -= block.nbytes
            self._free_in_order(queue, block)

        return self.heap.allocate(nbytes, self.thread.device, release)

    # ---------------------------------------------------------------------------------------------- submission

    def submit(self, queue: Queue, operation: Operation) -> Operation:
        """Put an operation behind a stream's others; it is recorded instead if the stream is capturing."""
        with self.lock:
            if queue.capture is not None:
                queue.capture.record(queue, operation)
                return operation
            if queue.entangled(self.captures):
                raise CUDARuntimeError(CAPTURE_IMPLICIT)
            operation.after.extend(self._before(queue))
            self._log(operation)
            return self._append(queue, operation)

    def submit_graph(self, queue: Queue, branches: list[list[Operation]]) -> None:
        """Submit copies of a graph's operations: the first branch on the stream, others on queues of their own."""
        with self.lock:
            if queue.capture is not None:
                raise CUDARuntimeError(CAPTURE_UNSUPPORTED)
            self.graph_launches += 1
            before = self._before(queue)
            nodes = [node for branch in branches for node in branch]  # a branch may wait for a later one
            copies = {node: Operation(node.name, node.work, launch=node.launch, copy=node.copy) for node in nodes}
            for node, copy in copies.items():
                copy.after.extend([copies[earlier] for earlier in node.after] or before)
                self._log(copy)
            lanes = [queue, *(Queue(queue.device, blocking=False) for _ in branches[1:])]
            if self.deferred:
                for lane, branch in zip(lanes, branches, strict=True):
                    for node in branch:
                        self._append(lane, copies[node])
            else:
                self._run_in_order(list(copies.values()))

    def _free_in_order(self, queue: Queue, block: Block) -> None:
        """Free memory in the order of the stream it was allocated on, as CuPy's pool does: no other is waited for."""
        with self.lock:
            after = [] if queue.last is None or queue.last.done else [queue.last]
            self._append(queue, Operation("free", lambda: self.heap.free(block), after))

    def _before(self, queue: Queue) -> list[Operation]:
        """What a new operation must follow: its own stream, and by the legacy default stream's rule others too."""
        queues = [queue]
        if queue.legacy:
            queues += [other for other in self.busy if other.blocking and other.device == queue.device]
        elif queue.blocking:
            queues.append(self.default_queues[queue.device])
        return [other.last for other in queues if other.last is not None and not other.last.done]

    def _append(self, queue: Queue, operation: Operation) -> Operation:
        queue.last = operation
        if not self.deferred:
            operation.run()
            return operation
        queue.waiting.append(operation)
        if queue not in self.busy:
            self.busy.append(queue)
        return operation

    def _log(self, operation: Operation) -> None:
        if operation.launch is not None:
            self.launches.append(operation.launch)
        if operation.copy:
            self.copies.append(operation.name)

    # ----------------------------------------------------------------------------------------------- execution

    def synchronise(self, why: str, queues: list[Queue] | None = None) -> None:
        """Wait for the streams given, or for everything.

        Raises:
            CUDARuntimeError: a stream that would be waited for is capturing.
        """
        with self.lock:
            queues = list(self.busy) if queues is None else queues
            for queue in queues:
                if (error := queue.refuses(self.captures)) is not None:
                    raise CUDARuntimeError(error)
            self.synchronisations.append(why)
            self._run_until([operation for queue in queues for operation in self._before(queue)])

    def synchronise_event(self, operation: Operation) -> None:
        """Wait for one operation.

        Raises:
            CUDARuntimeError: it is part of a graph.
        """
        with self.lock:
            if operation.capture is not None:
                raise CUDARuntimeError(CAPTURE_UNSUPPORTED)
            self.synchronisations.append("event.synchronize")
            self._run_until([operation])

    def synchronise_device(self, device: int) -> None:
        if any(queue.device == device for capture in self.captures for queue in capture.newest):
            raise CUDARuntimeError(CAPTURE_UNSUPPORTED)
        queues = [queue for queue in self.busy if queue.device == device]
        self.synchronise("device.synchronize", queues)

    def _run_until(self, targets: list[Operation]) -> None:
        """Run until the targets are done: either nothing that they do not need, or anything that is ready."""
        needed = ancestors(targets) if self.random.random() < 0.5 else None
        while not all(target.done for target in targets):
            ready = [
                queue
                for queue in self.busy
                if all(earlier.done for earlier in queue.waiting[0].after)
                and (needed is None or queue.waiting[0] in needed)
            ]
            queue = self.random.choice(ready)
            operation = queue.waiting.popleft()
            if not queue.waiting:
                self.busy.remove(queue)
            operation.run()

    def _run_in_order(self, operations: list[Operation]) -> None:
        while operations:
            ready = next(one for one in operations if all(earlier.done for earlier in one.after))
            operations.remove(ready)
            ready.run()


_active: list[Machine] = []


def active() -> Machine:
    """The machine of the innermost `cupy_on_cpu()`.

    Raises:
        RuntimeError: there is none: something of an emulated device was used after it had ended.
    """
    if not _active:
        raise RuntimeError("no emulated device: this object was made inside cupy_on_cpu() and used outside it")
    return _active[-1]


@contextlib.contextmanager
def running(machine: Machine) -> Iterator[Machine]:
    """Make a machine the active one."""
    _active.append(machine)
    try:
        yield machine
    finally:
        _active.remove(machine)
