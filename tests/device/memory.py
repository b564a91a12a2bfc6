"""Device memory in host memory: aligned blocks between red zones, garbage when new, poison when freed."""

import itertools
from collections.abc import Callable

import cupy
import numpy as np

from tests.device import ptx

ALIGNMENT = 512
RED_ZONE = 512
GARBAGE = 0xFF  # NaN in every floating type, -1 in every integer

_UnownedMemory = cupy.cuda.UnownedMemory


class Block:
    """The host memory behind one allocation. It outlives the allocation while queued work still refers to it."""

    def __init__(self, device: int, nbytes: int, name: str) -> None:
        self.device, self.nbytes, self.name = device, nbytes, name
        self.room = np.full(nbytes + 2 * RED_ZONE + ALIGNMENT, GARBAGE, np.uint8)
        start = self.room.ctypes.data + RED_ZONE
        self.address = start + -start % ALIGNMENT
        offset = self.address - self.room.ctypes.data
        self.contents = self.room[offset : offset + nbytes]
        self.live = True

    def check(self) -> None:
        """Work that runs after the memory was freed is a fault.

        Raises:
            Fault: the block was freed.
        """
        if not self.live:
            raise ptx.Fault(f"{self.name} was freed before the work that uses it ran")

    def view(self, shape: tuple[int, ...], dtype: np.dtype, address: int, strides: tuple[int, ...]) -> np.ndarray:
        """A NumPy array over a part of the block; NumPy refuses one that is not inside."""
        return np.ndarray(shape, dtype, self.contents, address - self.address, strides)


class Allocation(_UnownedMemory):
    """What `array.data.mem` of an emulated array is. Its end releases the block."""

    def __init__(self, block: Block | None, device: int, release: Callable[[Block], None]) -> None:
        address, nbytes = (0, 0) if block is None else (block.address, block.nbytes)
        super().__init__(address, nbytes, block, device)
        self.block, self._release = block, release

    def __del__(self) -> None:
        if self.block is not None:
            self._release(self.block)


class PinnedBuffer(np.ndarray):
    """Page-locked host memory, as `cupy.cuda.alloc_pinned_memory` gives it: a buffer with an address."""

    @property
    def ptr(self) -> int:
        return self.ctypes.data


class Heap:
    """The memory of all devices. A kernel may touch the live blocks of its own device and nothing else.

    Attributes:
        kernel_memory: per device, what the interpreter lets kernels touch.
        limit: bytes a device has; beyond them CuPy's OutOfMemoryError. None: no limit.
        used: bytes allocated, per device.
    """

    def __init__(self, n_devices: int) -> None:
        self.kernel_memory = [ptx.Memory() for _ in range(n_devices)]
        self.limit: int | None = None
        self.used = [0] * n_devices
        self._blocks: dict[int, Block] = {}
        self._pinned: list[PinnedBuffer] = []  # kept: pageable memory must not be taken for them later
        self._count = itertools.count()

    def allocate(self, nbytes: int, device: int, release: Callable[[Block], None]) -> Allocation:
        """Memory of exactly this size, full of garbage.

        Raises:
            cupy.cuda.memory.OutOfMemoryError: the limit is reached.
        """
        if self.limit is not None and self.used[device] + nbytes > self.limit:
            raise cupy.cuda.memory.OutOfMemoryError(nbytes, self.used[device], self.limit)
        block = None
        if nbytes:
            block = Block(device, nbytes, f"allocation {next(self._count)} ({nbytes} bytes, device {device})")
            self._blocks[block.address] = block
            self.kernel_memory[device].add(block.address, nbytes, block.name)
            self.used[device] += nbytes
        return Allocation(block, device, release)

    def free(self, block: Block) -> None:
        """Poison a block, and forbid it to kernels."""
        self.kernel_memory[block.device].remove(block.address)
        del self._blocks[block.address]
        block.room.fill(GARBAGE)
        block.live = False

    def block_at(self, address: int) -> Block | None:
        """The live block that holds an address."""
        for block in self._blocks.values():
            if block.address <= address < block.address + block.nbytes:
                return block
        return None

    def pin(self, nbytes: int) -> PinnedBuffer:
        """Page-locked host memory, in whole units of the pool as in CuPy."""
        buffer = np.full(nbytes + -nbytes % ALIGNMENT, GARBAGE, np.uint8).view(PinnedBuffer)
        self._pinned.append(buffer)
        return buffer

    def is_pinned(self, array: np.ndarray) -> bool:
        return any(0 <= array.ctypes.data - buffer.ptr < buffer.nbytes for buffer in self._pinned)
