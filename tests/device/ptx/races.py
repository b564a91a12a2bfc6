"""Data races: for every unit of memory, who touched it last and whether an ordering came since.

A record packs into 64 bits (0 is "never"):

    epoch << 34 | flag << 33 | level << 31 | thread

`epoch` counts the orderings of the launch; an access is ordered after another of the same block, or warp, when both
threads went through an ordering of the block, or warp, in between. `level` says how many threads the record stands
for: 0 `thread` alone, 1 several of its warp, 2 several of its block, 3 several blocks; these are never ordered, for
nothing orders blocks but the end of the launch. `flag` marks atomics among the writes and ld.global.nc among the reads.
"""

from typing import Any

import numpy as np

from tests.device.ptx.memory import Access, zeroed

_THREAD = (1 << 31) - 1
_FLAG = 1 << 33


class Clock:
    """When the threads of the running blocks were last ordered; it goes on from batch to batch of blocks."""

    def __init__(self, block_lanes: int) -> None:
        self.block_lanes = block_lanes
        self.epoch = 1
        self.first_thread = 0

    def start(self, first_thread: int, lanes: int) -> None:
        """A new batch of blocks runs."""
        self.first_thread = first_thread
        self.block_start = np.arange(lanes) // self.block_lanes * self.block_lanes + first_thread
        self.warp = np.zeros(lanes, np.int64)
        self.block = np.zeros(lanes, np.int64)

    def order(self, lanes: np.ndarray, block: bool) -> None:
        """These lanes have waited for each other."""
        self.epoch += 1
        self.warp[lanes] = self.epoch
        if block:
            self.block[lanes] = self.epoch

    def stamp(self, lanes: np.ndarray) -> np.ndarray:
        return (lanes + self.first_thread) | (self.epoch << 34)

    def distance(self, threads: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """From the lanes to threads: 0 the same thread, 1 the same warp, 2 the same block, 3 neither."""
        from_block = threads - self.block_start[lanes]
        own = lanes + self.first_thread
        distance = np.full(threads.shape, 3)
        distance -= (from_block >= 0) & (from_block < self.block_lanes)
        distance -= (threads ^ own) < 32  # warps begin at multiples of 32
        distance -= threads == own
        return distance

    def ordered(self, records: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Whether the lanes may rely on what the records stand for; true for "never"."""
        thread = records & _THREAD
        distance = np.maximum(self.distance(thread, lanes), (records >> 31) & 3)
        epoch = records >> 34
        in_warp = distance <= 1
        mate = np.where(in_warp, thread - self.first_thread, lanes)
        in_warp &= (self.warp[lanes] > epoch) & (self.warp[mate] > epoch)
        in_block = (distance <= 2) & (self.block[lanes] > epoch)
        return (distance == 0) | in_warp | in_block | (records == 0)


class Shadow:
    """The records of one space, by units of `unit` bytes, the narrowest access that the kernel has."""

    def __init__(self, nbytes: int, unit: int, clock: Clock) -> None:
        self.unit = unit
        self.clock = clock
        units = -(-nbytes // unit) + 16  # those behind the last belong to read-only buffers
        self.writes = zeroed(8 * units).view(np.int64)
        self.reads = zeroed(8 * units).view(np.int64)

    def access(self, frame: Any, space: Any, access: Access, byte: np.ndarray, lanes: np.ndarray) -> None:
        """Raise a Fault if the access races with an earlier one; note it down."""
        unit = byte // self.unit
        if access.nbytes > self.unit:
            steps = access.nbytes // self.unit
            unit = (unit[:, None] + np.arange(steps)).ravel()
            lanes = np.repeat(lanes, steps)
        self._check(frame, space, access, unit, lanes)
        records = self.writes if access.writes else self.reads
        winner = self._note(records, access, unit, lanes)
        if winner is not None and access.verb == "store" and not access.unordered:
            alone = winner == lanes + self.clock.first_thread
            self._require(frame, space, alone, winner, unit, lanes, "written")

    def _check(self, frame: Any, space: Any, access: Access, unit: np.ndarray, lanes: np.ndarray) -> None:
        written = self.writes[unit]
        if np.count_nonzero(written):
            fine = self.clock.ordered(written, lanes)
            if access.unordered:
                fine |= (written & _FLAG) != 0
            if access.constant:
                fine = written == 0
            self._require(frame, space, fine, written, unit, lanes, "written")
        if access.writes:
            read = self.reads[unit]
            if np.count_nonzero(read):
                fine = self.clock.ordered(read, lanes) & ((read & _FLAG) == 0)
                self._require(frame, space, fine, read, unit, lanes, "read")

    def _require(self, frame: Any, space: Any, fine: np.ndarray, records: Any, unit: Any, lanes: Any, did: str) -> None:
        if not fine.all():
            bad = int(np.argmin(fine))
            self._report(frame, space, did, lanes[bad], int(unit[bad]), int(records[bad]) & _THREAD)

    def _report(self, frame: Any, space: Any, did: str, lane: int, unit: int, other: int) -> None:
        place = space.describe(unit * self.unit)
        raise frame.fault(lane, f"race on {place}, which {frame.thread_name(other)} has {did}")

    def _note(self, records: np.ndarray, access: Access, unit: np.ndarray, lanes: np.ndarray) -> np.ndarray | None:
        """Record the access; returns a thread for each unit that now has it recorded, None if no unit has two."""
        stamp = self.clock.stamp(lanes)
        before = records[unit]
        if access.constant or (access.writes and access.unordered):
            stamp |= _FLAG
        records[unit] = stamp
        winner = records[unit]
        alone = not np.count_nonzero(winner != stamp)
        if alone and not np.count_nonzero(before):
            return None
        if not access.writes:
            stamp |= before & _FLAG
        former = np.maximum(self.clock.distance(before & _THREAD, lanes), (before >> 31) & 3)
        level = np.where(self.clock.ordered(before, lanes), 0, former)
        level = np.maximum(level, self.clock.distance(winner & _THREAD, lanes))
        records[unit] = stamp
        for number in (1, 2, 3):  # ascending, so that the highest level of a unit stays
            chosen = level == number
            if np.count_nonzero(chosen):
                records[unit[chosen]] = stamp[chosen] | (number << 31)
        return None if alone else winner & _THREAD
