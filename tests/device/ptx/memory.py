"""The memory of a launch: buffers of the host, and the shared, local and parameter spaces of its threads.

A generic address carries its space above bit 48, where addresses of the host are zero. In instructions that name
their space only the low 32 bits count, for registers of 32 bits hold such addresses as well.
"""

import ctypes
import mmap
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TAG_SHIFT = 48
TAGS = {"shared": 1 << TAG_SHIFT, "local": 2 << TAG_SHIFT, "param": 3 << TAG_SHIFT}
_OFFSET = (1 << 32) - 1


@dataclass
class Buffer:
    """One allocation that kernels may touch."""

    start: int
    nbytes: int
    name: str
    writeable: bool

    @property
    def end(self) -> int:
        return self.start + self.nbytes


class Memory:
    """The allocations of the device, by the addresses they have on the host."""

    def __init__(self) -> None:
        self.buffers: dict[int, Buffer] = {}
        self._starts: list[int] = []  # sorted
        self._table: Table | None = None

    def add(self, address: int, nbytes: int, name: str, writeable: bool = True) -> None:
        """Let kernels touch [address, address + nbytes)."""
        if nbytes <= 0:
            raise ValueError(f"buffer {name!r}: a size above 0 expected, got {nbytes}")
        place = bisect_right(self._starts, address)
        for start in self._starts[max(place - 1, 0) : place + 1]:
            other = self.buffers[start]
            if address < other.end and other.start < address + nbytes:
                raise ValueError(f"buffer {name!r} overlaps buffer {other.name!r}")
        self._starts.insert(place, address)
        self.buffers[address] = Buffer(address, nbytes, name, writeable)
        self._table = None

    def remove(self, address: int) -> None:
        """From now on an access there is a fault."""
        del self.buffers[address]
        del self._starts[bisect_right(self._starts, address) - 1]
        self._table = None

    def freeze(self, address: int) -> None:
        """From now on a store there is a fault."""
        self._set_writeable(address, False)

    def thaw(self, address: int) -> None:
        """Allow stores again."""
        self._set_writeable(address, True)

    def _set_writeable(self, address: int, writeable: bool) -> None:
        self.buffers[address].writeable = writeable
        self._table = None

    @property
    def table(self) -> "Table":
        if self._table is None:
            self._table = Table([self.buffers[start] for start in self._starts])
        return self._table


class Table:
    """The buffers as sorted arrays, and one window over them all, of which only checked places may be touched.

    The window spans memory that is not there: index it, but never let NumPy copy it, as ufunc.at may.
    """

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers = buffers
        self.keys = [b.start for b in buffers]
        self.starts = np.array(self.keys, np.int64)
        self.ends = np.array([b.end for b in buffers], np.int64)
        self.writeable = np.array([b.writeable for b in buffers], bool)
        self.origin = self.keys[0] & -16 if buffers else 0
        span = (self.ends[-1] - self.origin + 15) & -16 if buffers else 0
        window = np.frombuffer((ctypes.c_uint8 * int(span)).from_address(self.origin), np.uint8) if span else _NOTHING
        self.words = {size: window.view(f"u{size}") for size in (1, 2, 4, 8)}
        # Where the shadow of a buffer begins, were the shadows of all writeable buffers laid end to end.
        # Both ends are rounded to 16 bytes, the widest access.
        base = self.starts & -16
        extent = np.where(self.writeable, ((self.ends + 15) & -16) - base, 0)
        self.shadow_base = np.concatenate(([0], np.cumsum(extent)[:-1])).astype(np.int64) - base if buffers else base
        self.shadow_bytes = int(extent.sum())

    def find(self, address: int) -> int:
        """The number of the last buffer that starts at or below the address; -1 is none."""
        return bisect_right(self.keys, address) - 1

    def nearest(self, address: int, nbytes: int) -> str:
        """Where an address outside of all buffers lies."""
        number = self.find(address)
        near = []
        if number >= 0:
            buffer = self.buffers[number]
            past = address + nbytes - buffer.end
            near.append((past, f"{past} bytes past the end of buffer {buffer.name!r} of {buffer.nbytes} bytes"))
        if number + 1 < len(self.buffers):
            buffer = self.buffers[number + 1]
            before = buffer.start - address
            near.append((before, f"{before} bytes before buffer {buffer.name!r}"))
        return min(near)[1] if near else "there are no buffers"


_NOTHING = np.zeros(0, np.uint8)


@dataclass(frozen=True)
class Access:
    """What one load, store or atomic does, the same for all threads."""

    verb: str  # "load", "store", "atomic"
    width: int  # bytes of one element
    count: int  # elements
    unordered: bool = False  # an atomic, volatile or relaxed access never races with its like
    constant: bool = False  # ld.global.nc: the data must not change during the launch

    @property
    def nbytes(self) -> int:
        return self.width * self.count

    @property
    def writes(self) -> bool:
        return self.verb != "load"


@dataclass
class Place:
    """The elements that an access touches: a position in `words` per lane, and in the shadow of the space."""

    words: np.ndarray
    position: np.ndarray
    shadow: Any = None
    shadow_bytes: np.ndarray = field(default_factory=lambda: _NOTHING)


class GlobalSpace:
    """Buffers of the host, the module's variables among them."""

    def __init__(self, table: Table, shadow: Any) -> None:
        self.table = table
        self.shadow = shadow

    def place(self, frame: Any, access: Access, address: np.ndarray, lanes: np.ndarray) -> Place:
        table = self.table
        low, high = int(address.min()), int(address.max()) + access.nbytes
        which: Any = table.find(low)
        if which < 0 or high > table.buffers[which].end:
            which = self._search(frame, access, address, lanes)
        _check_alignment(frame, access, address, lanes)
        writeable = table.writeable[which]
        if access.writes and not np.all(writeable):
            self._read_only(frame, access, address, lanes, which)
        place = Place(table.words[access.width], (address - table.origin) // access.width)
        if self.shadow is not None and np.any(writeable):
            place.shadow = self.shadow
            place.shadow_bytes = address + table.shadow_base[which]
            if not np.all(writeable):
                # Nothing is ever written there: all such reads share the unit behind the last.
                place.shadow_bytes[~writeable] = table.shadow_bytes
        return place

    def _search(self, frame: Any, access: Access, address: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        table = self.table
        which = np.searchsorted(table.starts, address, "right") - 1
        outside = which < 0
        if len(table.ends):
            outside |= address + access.nbytes > table.ends[which]
        if np.count_nonzero(outside):
            bad = int(np.argmax(outside))
            where = table.nearest(int(address[bad]), access.nbytes)
            raise frame.fault(lanes[bad], f"{access.nbytes}-byte {access.verb} out of bounds, {where}")
        return which

    def _read_only(self, frame: Any, access: Access, address: np.ndarray, lanes: np.ndarray, which: Any) -> None:
        which = np.broadcast_to(which, address.shape)
        bad = int(np.argmin(self.table.writeable[which]))
        buffer = self.table.buffers[which[bad]]
        offset = int(address[bad]) - buffer.start
        raise frame.fault(lanes[bad], f"{access.verb} to read-only buffer {buffer.name!r} at byte {offset}")

    def describe(self, position: int) -> str:
        """The place of a byte of the shadow."""
        for number, buffer in enumerate(self.table.buffers):
            offset = position - self.table.shadow_base[number] - buffer.start
            if buffer.writeable and -16 < offset < buffer.nbytes:
                return f"buffer {buffer.name!r} at byte {max(offset, 0)}"
        raise AssertionError(f"no buffer has shadow byte {position}")


@dataclass(frozen=True)
class Extent:
    """Where a variable lies in shared or local memory."""

    name: str
    start: int
    nbytes: int


class LocalSpace:
    """Variables that every owner, a block or a thread, has for itself; they start as NaN.

    They lie so far apart that an index past the end of one does not reach the next.
    """

    GAP = 1024

    def __init__(self, name: str, extents: list[Extent], owner: np.ndarray, owners: int) -> None:
        self.name = name
        self.extents = extents
        self.starts = np.array([e.start for e in extents], np.int64)
        self.ends = np.array([e.start + e.nbytes for e in extents], np.int64)
        self.stride = (int(self.ends.max(initial=0)) + 15) & -16
        self.base = owner * self.stride
        storage = np.full(owners * self.stride, 0xFF, np.uint8)
        self.words = {size: storage.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.nbytes = len(storage)
        self.shadow: Any = None

    def place(self, frame: Any, access: Access, address: np.ndarray, lanes: np.ndarray) -> Place:
        offset = address & _OFFSET
        if not self.extents:
            raise frame.fault(lanes[0], f"{access.verb} in {self.name} memory, of which there is none")
        which = np.searchsorted(self.starts, offset, "right") - 1
        outside = offset + access.nbytes > self.ends[which]
        if np.count_nonzero(outside):
            bad = int(np.argmax(outside))
            extent = self.extents[which[bad]]
            where = f"offset {_signed(offset[bad] - extent.start)} of {self._name(extent)} of {extent.nbytes} bytes"
            raise frame.fault(lanes[bad], f"{access.nbytes}-byte {access.verb} out of bounds, {where}")
        _check_alignment(frame, access, offset, lanes)
        byte = offset + self.base[lanes]
        return Place(self.words[access.width], byte // access.width, self.shadow, byte)

    def _name(self, extent: Extent) -> str:
        return f"{self.name} variable {extent.name!r}"

    def describe(self, position: int) -> str:
        """The place of a byte of the shadow."""
        offset = position % self.stride
        extent = self.extents[int(np.searchsorted(self.starts, offset, "right")) - 1]
        return f"{self._name(extent)} at byte {offset - extent.start}"


class ParameterSpace:
    """The parameters, far enough apart that an index past the end of one does not reach the next."""

    GAP = 1 << 16

    def __init__(self, arguments: list[bytes]) -> None:
        self.starts = np.arange(len(arguments), dtype=np.int64) * self.GAP
        self.ends = self.starts + np.array([len(a) for a in arguments], np.int64)
        storage = zeroed(len(arguments) * self.GAP)
        for start, argument in zip(self.starts, arguments):
            storage[start : start + len(argument)] = np.frombuffer(argument, np.uint8)
        self.words = {size: storage.view(f"u{size}") for size in (1, 2, 4, 8)}

    def place(self, frame: Any, access: Access, address: np.ndarray, lanes: np.ndarray) -> Place:
        offset = address & _OFFSET
        which = np.minimum(offset // self.GAP, len(self.ends) - 1)
        outside = offset + access.nbytes > self.ends[which]
        if access.writes or np.count_nonzero(outside):
            bad = int(np.argmax(outside))
            where = f"offset {_signed(offset[bad] - self.starts[which[bad]])} of parameter {which[bad]}"
            raise frame.fault(lanes[bad], f"{access.nbytes}-byte {access.verb} out of bounds, {where}")
        _check_alignment(frame, access, offset, lanes)
        return Place(self.words[access.width], offset // access.width)


def zeroed(nbytes: int) -> np.ndarray:
    """Zero bytes that take memory only where they are touched."""
    if nbytes < mmap.PAGESIZE:
        return np.zeros(nbytes, np.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), np.uint8)


def _check_alignment(frame: Any, access: Access, address: np.ndarray, lanes: np.ndarray) -> None:
    low_bits = access.nbytes - 1
    if int(np.bitwise_or.reduce(address)) & low_bits:
        bad = int(np.argmax((address & low_bits) != 0))
        raise frame.fault(
            lanes[bad],
            f"misaligned {access.nbytes}-byte {access.verb}, address {int(address[bad]) & low_bits} "
            f"past a multiple of {access.nbytes}",
        )


def _signed(offset: int) -> int:
    return int(np.int64(offset).astype(np.int32))
