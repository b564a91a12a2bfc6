"""Work on streams: operations, the queues they wait in, and captures of them."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from cupy.cuda.runtime import CUDARuntimeError

CAPTURE_UNSUPPORTED, CAPTURE_UNMATCHED, CAPTURE_UNJOINED, CAPTURE_ISOLATION, CAPTURE_IMPLICIT = 900, 902, 904, 905, 906


class Launch(NamedTuple):
    """A kernel submitted to a stream. NumPy stands in for CuPy's own kernels: they have no grid."""

    name: str
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    device: int = 0


@dataclass(eq=False)
class Operation:
    """One piece of work on a stream; `launch` is set if it is a kernel, `copy` if it moves memory."""

    name: str
    work: Callable[[], None] | None = None
    after: list["Operation"] = field(default_factory=list)
    launch: Launch | None = None
    copy: bool = False
    capture: "Capture | None" = None
    done: bool = False

    def run(self) -> None:
        """Do the work, and let go of the memory it refers to."""
        work, self.work, self.done = self.work, None, True
        self.after.clear()
        if work is not None:
            work()


@dataclass(eq=False)
class Queue:
    """The operations of one stream that have not run yet, oldest first."""

    device: int
    blocking: bool = True  # waits for the legacy default stream, and it for this one
    legacy: bool = False
    waiting: deque[Operation] = field(default_factory=deque)
    last: Operation | None = None
    capture: "Capture | None" = None

    def refuses(self, captures: Iterable["Capture"]) -> int | None:
        """The error code if the queue cannot be waited for: it is capturing, or the default stream of one that is."""
        if self.capture is not None:
            return CAPTURE_UNSUPPORTED
        return CAPTURE_IMPLICIT if self.entangled(captures) else None

    def entangled(self, captures: Iterable["Capture"]) -> bool:
        """Work on the legacy default stream would have to follow work that is only being captured."""
        others = (queue for capture in captures for queue in capture.newest)
        return self.legacy and any(other.blocking and other.device == self.device for other in others)


@dataclass(eq=False)
class Capture:
    """A graph being recorded: its operations in the order of submission, and the newest one of every stream in it."""

    origin: Queue
    branches: list[list[Operation]] = field(default_factory=list)
    newest: dict[Queue, Operation | None] = field(default_factory=dict)

    def join(self, queue: Queue) -> None:
        queue.capture = self
        self.newest[queue] = None
        self.branches.append([])

    def record(self, queue: Queue, operation: Operation) -> None:
        operation.capture = self
        if (newest := self.newest[queue]) is not None:
            operation.after.append(newest)
        self.newest[queue] = operation
        self.branches[list(self.newest).index(queue)].append(operation)

    def finish(self) -> None:
        """Give the streams back.

        Raises:
            CUDARuntimeError: a stream that joined by an event was not joined again to the first one.
        """
        for queue in self.newest:
            queue.capture = None
        reached = ancestors([self.newest[self.origin]])
        if any(newest is not None and newest not in reached for newest in self.newest.values()):
            raise CUDARuntimeError(CAPTURE_UNJOINED)


def ancestors(operations: Iterable[Operation | None]) -> set[Operation]:
    """The operations, and everything that must run before them."""
    found: set[Operation] = set()
    todo = [operation for operation in operations if operation is not None]
    while todo:
        operation = todo.pop()
        if operation not in found:
            found.add(operation)
            todo.extend(operation.after)
    return found
