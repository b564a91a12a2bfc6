"""The state of a batch of blocks: an array per register, with one lane per thread.

Every block is padded to whole warps; the lanes of the padding never run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.device.ptx.fault import Fault
from tests.device.ptx.memory import TAG_SHIFT, TAGS, Access, GlobalSpace, LocalSpace, ParameterSpace, Place
from tests.device.ptx.races import Clock, Shadow

if TYPE_CHECKING:
    from tests.device.ptx.decode import Program
    from tests.device.ptx.memory import Table
    from tests.device.ptx.program import Active

WARP = 32
Shape = tuple[int, int, int]


@dataclass
class Launch:
    """What all blocks of a launch have in common."""

    program: "Program"
    grid: Shape
    block: Shape
    arguments: Sequence[bytes]
    table: "Table"
    shared_bytes: int
    races: bool
    blocks: np.ndarray

    def __post_init__(self) -> None:
        self.threads = self.block[0] * self.block[1] * self.block[2]
        self.block_lanes = -(-self.threads // WARP) * WARP
        self.clock = Clock(self.block_lanes)
        dynamic = [replace(e, nbytes=e.nbytes or self.shared_bytes) for e in self.program.extents["shared"]]
        self.extents = {"shared": dynamic, "local": self.program.extents["local"]}
        self.parameters = ParameterSpace(list(self.arguments))
        shadow = Shadow(self.table.shadow_bytes, self.program.global_unit, self.clock) if self.races else None
        self.memory = GlobalSpace(self.table, shadow)

    def thread_name(self, number: int) -> str:
        """Thread and block of a lane, counted through all batches."""
        block, thread = divmod(int(number), self.block_lanes)
        block = int(self.blocks[block])
        return f"thread {_coordinates(thread, self.block)} of block {_coordinates(block, self.grid)}"


def _coordinates(number: int, shape: Shape) -> Shape:
    return (number % shape[0], number // shape[0] % shape[1], number // shape[0] // shape[1])


class Frame:
    """Registers and memories of the blocks that run together."""

    def __init__(self, launch: Launch, first: int, count: int) -> None:
        self.launch = launch
        self.text = ""
        lanes = count * launch.block_lanes
        self.lanes = np.arange(lanes)
        self.thread = self.lanes % launch.block_lanes
        self.exists = self.thread < launch.threads
        self.arguments = launch.arguments
        self.registers = {
            width: np.zeros((n, lanes), f"u{width}" if width else np.bool_)
            for width, n in launch.program.kernel.register_counts.items()
        }
        self.first = first
        self.blocks = launch.blocks[first : first + count]
        self.values: list[Any] = [slot.bind(self) for slot in launch.program.slots]
        self.start(first)

    def start(self, first: int) -> None:
        """Begin with the blocks from `first`, as many as before."""
        launch = self.launch
        count = len(self.lanes) // launch.block_lanes
        self.blocks = launch.blocks[first : first + count]
        self.first_thread = first * launch.block_lanes
        self.live = self.exists.copy()
        for number, slot in launch.program.specials:
            self.values[number] = slot.bind(self)
        launch.clock.start(self.first_thread, len(self.lanes))
        self.spaces: dict[str, Any] = {"global": launch.memory, "const": launch.memory, "param": launch.parameters}
        for name, owner in (("shared", self.lanes // launch.block_lanes), ("local", self.lanes)):
            self.spaces[name] = LocalSpace(name, launch.extents[name], owner, int(owner[-1]) + 1)
        shared = self.spaces["shared"]
        if launch.races and shared.nbytes:
            shared.shadow = Shadow(shared.nbytes, launch.program.shared_unit, launch.clock)

    def special(self, name: str) -> np.ndarray:
        """The value of a special register in every lane."""
        launch, (register, _, axis) = self.launch, name.partition(".")
        lane = self.lanes % WARP
        if register in ("%tid", "%ctaid", "%ntid", "%nctaid"):
            number = "xyz".index(axis)
            if register == "%ntid":
                return np.array([launch.block[number]])
            if register == "%nctaid":
                return np.array([launch.grid[number]])
            if register == "%tid":
                return _coordinate(self.thread, launch.block, number)
            return np.repeat(_coordinate(self.blocks, launch.grid, number), launch.block_lanes)
        if register.startswith("%lanemask_"):
            below, own = (1 << lane) - 1, 1 << lane
            every = (1 << WARP) - 1
            masks = {"eq": own, "lt": below, "le": below | own, "gt": every & ~(below | own), "ge": every & ~below}
            return masks[register.removeprefix("%lanemask_")]
        others = {
            "%laneid": lane,
            "%warpid": self.thread // WARP,
            "WARP_SZ": np.array([WARP]),
            "%dynamic_smem_size": np.array([launch.shared_bytes]),
        }
        if name not in others:
            raise NotImplementedError(f"PTX special register {name}")
        return others[name]

    def put(self, slot: int, value: np.ndarray, active: "Active") -> None:
        """Write the active lanes of a register; the value has all lanes, or one for all."""
        if active.where is None:
            self.values[slot][...] = value
        else:
            np.copyto(self.values[slot], value, casting="unsafe", where=active.where)

    def gather(self, slot: int, active: "Active") -> np.ndarray:
        """The active lanes of an operand."""
        value = self.values[slot]
        index = active.index
        return value[index] if len(value) == len(self.lanes) else np.broadcast_to(value, self.lanes[index].shape)

    def places(self, space: str, access: Access, address: np.ndarray, lanes: np.ndarray) -> list[tuple[Any, Place]]:
        """Where in memory the lanes' accesses go, checked; each with its choice of lanes, a slice if all."""
        if space:
            return [(slice(None), self._place(space, access, address, lanes))]
        tags = address >> TAG_SHIFT
        if not np.count_nonzero(tags):
            return [(slice(None), self._place("global", access, address, lanes))]
        found = []
        for name, tag in (("global", 0), *((name, tag >> TAG_SHIFT) for name, tag in TAGS.items())):
            chosen = np.flatnonzero(tags == tag)
            if len(chosen):
                found.append((chosen, self._place(name, access, address[chosen], lanes[chosen])))
        if sum(len(chosen) for chosen, _ in found) != len(lanes):
            wild = int(np.argmax((tags < 0) | (tags > max(TAGS.values()) >> TAG_SHIFT)))
            raise self.fault(lanes[wild], f"{access.verb} at {int(address[wild]):#x}, which is no address")
        return found

    def _place(self, name: str, access: Access, address: np.ndarray, lanes: np.ndarray) -> Place:
        space = self.spaces[name]
        place = space.place(self, access, address, lanes)
        if place.shadow is not None:
            place.shadow.access(self, space, access, place.shadow_bytes, lanes)
        return place

    def order(self, mask: np.ndarray, block: bool) -> None:
        """The lanes of the mask, of whole blocks or of warps, have waited for each other."""
        self.launch.clock.order(np.flatnonzero(mask), block)

    def fault(self, lane: int, what: str) -> Fault:
        """The exception for what a lane did."""
        thread = self.thread_name(self.first_thread + int(lane))
        return Fault(f"kernel {self.launch.program.kernel.name!r}, {thread}: {what} ({self.text})")

    def thread_name(self, number: int) -> str:
        return self.launch.thread_name(number)


def _coordinate(numbers: np.ndarray, shape: Shape, axis: int) -> np.ndarray:
    return _coordinates(numbers, shape)[axis]
