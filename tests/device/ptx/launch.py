"""Running a launch: batches of blocks, and in each the groups of lanes that stand at the same instruction.

The group furthest behind runs first, so that groups meet again where their paths join.
"""

from collections.abc import Iterable, Sequence
from typing import NoReturn

import numpy as np

from tests.device.ptx import warp
from tests.device.ptx.decode import Program, program
from tests.device.ptx.fault import Fault
from tests.device.ptx.frame import WARP, Frame, Launch, Shape
from tests.device.ptx.memory import Memory
from tests.device.ptx.program import Active, Instruction
from tests.device.ptx.text import Kernel

BATCH_LANES = 4096  # registers of so many lanes stay in the cache
SHARED_LIMIT = 48 << 10  # more needs an attribute of the function
_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_BLOCK_LIMITS = (1024, 1024, 64)


def run(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[bytes],
    memory: Memory,
    *,
    shared_bytes: int = 0,
    blocks: Iterable[int] | None = None,
    races: bool = True,
    step_limit: int = 1_000_000,
) -> None:
    """Launch a kernel; a Fault tells of the first misuse.

    `blocks` runs only these blocks, by number, of a grid that is too large to run. `races` turns the search for data
    races off. `step_limit` bounds the instructions that a batch of blocks may take.
    """
    decoded = program(kernel)
    sizes = _check_shapes(kernel, grid, block)
    _check_arguments(kernel, arguments)
    shared = decoded.static_shared_bytes + shared_bytes
    if shared > SHARED_LIMIT:
        raise Fault(f"kernel {kernel.name!r}: {shared} bytes of shared memory, allowed are {SHARED_LIMIT}")
    every = np.arange(np.prod(sizes[0])) if blocks is None else np.asarray(list(blocks))
    for variable in kernel.module.variables:
        storage = kernel.module.storage[variable.name]
        memory.add(storage.ctypes.data, variable.nbytes, variable.name, variable.space == "global")
    try:
        launch = Launch(decoded, *sizes, arguments, memory.table, shared_bytes, races, every)
        with np.errstate(all="ignore"):
            _run_batches(launch, step_limit)
    finally:
        for variable in kernel.module.variables:
            memory.remove(kernel.module.storage[variable.name].ctypes.data)


def _check_shapes(kernel: Kernel, grid: Sequence[int], block: Sequence[int]) -> tuple[Shape, Shape]:
    shapes = []
    for what, shape, limits in (("grid", grid, _GRID_LIMITS), ("block", block, _BLOCK_LIMITS)):
        full = (*map(int, shape), 1, 1, 1)[:3]
        if len(shape) > 3 or not all(1 <= n <= limit for n, limit in zip(full, limits)):
            raise Fault(f"kernel {kernel.name!r}: {what} {tuple(shape)} outside of 1 to {limits}")
        shapes.append(full)
    threads = int(np.prod(shapes[1]))
    if threads > kernel.max_threads:
        raise Fault(f"kernel {kernel.name!r}: {threads} threads a block, allowed are {kernel.max_threads}")
    return shapes[0], shapes[1]


def _check_arguments(kernel: Kernel, arguments: Sequence[bytes]) -> None:
    if len(arguments) != len(kernel.parameters):
        raise Fault(f"kernel {kernel.name!r}: {len(kernel.parameters)} parameters, {len(arguments)} arguments")
    for number, (parameter, argument) in enumerate(zip(kernel.parameters, arguments)):
        if len(argument) != parameter.nbytes:
            raise Fault(
                f"kernel {kernel.name!r}: parameter {number} has {parameter.nbytes} bytes, "
                f"the argument {len(argument)} bytes"
            )


def _run_batches(launch: Launch, step_limit: int) -> None:
    count = max(1, BATCH_LANES // launch.block_lanes)
    frame = None
    for first in range(0, len(launch.blocks), count):
        size = min(count, len(launch.blocks) - first)
        if frame is None or size < count:
            frame = Frame(launch, first, size)
        else:
            frame.start(first)
        _Scheduler(frame, launch.program, step_limit).run()


class _Scheduler:
    """Runs the blocks of a frame to their ends."""

    def __init__(self, frame: Frame, program: Program, step_limit: int) -> None:
        self.frame = frame
        self.code = program.instructions
        self.steps_left = step_limit
        self.ready: dict[int, np.ndarray] = {0: frame.exists.copy()}  # instruction -> lanes that can go on there
        self.waiting: dict[int, np.ndarray] = {}  # instruction -> lanes that wait there for others

    def run(self) -> None:
        while self.ready:
            start = min(self.ready)
            self._run_group(start, self.ready.pop(start))
            if not self.ready:
                self._release_from_exited()
        if self.waiting:
            self._report_stuck()

    def _release_from_exited(self) -> None:
        """Lanes no longer wait for those of their warp that have exited since."""
        for pc in list(self.waiting):
            self._wait(pc, self.code[pc], self.waiting.pop(pc))

    def _run_group(self, pc: int, mask: np.ndarray) -> None:
        """Run until the group splits, waits, exits, or comes to where another group stands or is left behind."""
        frame, code = self.frame, self.code
        horizon = min(self.ready, default=len(code))
        active = Active(mask, not self.ready and not self.waiting)
        while pc < horizon:
            instruction = code[pc]
            self.steps_left -= 1
            if self.steps_left < 0:
                frame.text = instruction.text
                raise frame.fault(int(np.argmax(mask)), "too many instructions, is this an endless loop?")
            if not instruction.control:
                frame.text = instruction.text
                self._step(instruction, active)
                pc += 1
            elif instruction.control == "branch" and instruction.predicate is None:
                pc = instruction.target
            else:
                self._control(pc, instruction, mask)
                return
        if pc < len(code):
            self._arrive(pc, mask)
        else:
            frame.live &= ~mask

    def _step(self, instruction: Instruction, active: Active) -> None:
        if instruction.predicate is None:
            instruction.step(self.frame, active)
            return
        chosen = active.mask & (self.frame.values[instruction.predicate] != instruction.negate)
        if np.count_nonzero(chosen):
            instruction.step(self.frame, Active(chosen, False))

    def _arrive(self, pc: int, mask: np.ndarray) -> None:
        if pc in self.ready:
            mask = mask | self.ready[pc]
        self.ready[pc] = mask

    def _control(self, pc: int, instruction: Instruction, mask: np.ndarray) -> None:
        """Branches, exits and waits end a group; whoever can go on is made ready."""
        if instruction.control in ("block", "warp"):
            self._wait(pc, instruction, mask)
            return
        taken = mask
        if instruction.predicate is not None:
            taken = mask & (self.frame.values[instruction.predicate] != instruction.negate)
            rest = mask & ~taken
            if np.count_nonzero(rest):
                self._arrive(pc + 1, rest)
        if np.count_nonzero(taken):
            if instruction.control == "exit":
                self.frame.live &= ~taken
            else:
                self._arrive(instruction.target, taken)

    def _wait(self, pc: int, instruction: Instruction, mask: np.ndarray) -> None:
        frame = self.frame
        frame.text = instruction.text
        earlier = self.waiting.pop(pc, None)
        if earlier is not None:
            mask = mask | earlier
        if instruction.control == "block":
            released = warp.arrived_at_barrier(frame, mask)
        else:
            released = warp.arrived_in_warp(frame, instruction, mask)
        rest = mask & ~released
        if np.count_nonzero(rest):
            self.waiting[pc] = rest
        if np.count_nonzero(released):
            frame.order(released, instruction.control == "block")
            if instruction.step is not None:
                instruction.step(frame, Active(released, False))
            self._arrive(pc + 1, released)

    def _report_stuck(self) -> NoReturn:
        frame = self.frame
        pc, mask = min(self.waiting.items())
        instruction = self.code[pc]
        frame.text = instruction.text
        lane = int(np.argmax(mask))
        if instruction.control == "block":
            size = frame.launch.block_lanes
            wanted = frame.exists & (frame.lanes // size == lane // size) & ~mask
        else:
            members = np.broadcast_to(frame.values[instruction.members], mask.shape)[lane]
            named = (members >> (frame.lanes % WARP).astype(np.uint32)) & 1 != 0
            wanted = frame.live & (frame.lanes // WARP == lane // WARP) & named & ~mask
        missing = int(np.argmax(wanted))
        state = "has exited"
        if frame.live[missing]:
            state = "waits at " + next(self.code[p].text for p, m in self.waiting.items() if m[missing])
        other = frame.thread_name(frame.first_thread + missing)
        raise frame.fault(lane, f"waits for {other}, which {state}")
