"""Statements to instructions, once per kernel."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.device.ptx import access, instructions, warp
from tests.device.ptx.frame import Frame
from tests.device.ptx.memory import Extent
from tests.device.ptx.program import Active, Decoder, Instruction, Opcode, Slot, SpecialSlot, Step
from tests.device.ptx.text import Kernel, Statement

_STEPS: dict[str, Callable[[Decoder, Statement], Step]] = {
    "ld": access.decode_load,
    "ldu": access.decode_load,
    "st": access.decode_store,
    "atom": access.decode_atomic,
    "red": access.decode_atomic,
    "mov": instructions.decode_move,
    "cvta": instructions.decode_address_conversion,
    "cvt": instructions.decode_convert,
    "setp": instructions.decode_compare,
    "selp": instructions.decode_select,
    "slct": instructions.decode_select,
    "lop3": instructions.decode_lookup,
    "activemask": warp.decode_active_mask,
    **dict.fromkeys(instructions.OPERATIONS, instructions.decode_operation),
}
_WAITING: dict[str, Callable[[Decoder, Statement], Instruction]] = {
    "bar": warp.decode_barrier,
    "barrier": warp.decode_barrier,
    "vote": warp.decode_vote,
    "shfl": warp.decode_shuffle,
    "match": warp.decode_match,
    "redux": warp.decode_reduce,
}
# The lanes run one instruction at a time, so memory is always coherent.
_WITHOUT_EFFECT = frozenset(("membar", "fence", "prefetch", "prefetchu", "nop"))


@dataclass
class Program:
    """A decoded kernel."""

    kernel: Kernel
    instructions: list[Instruction]
    slots: list[Slot]
    extents: dict[str, list[Extent]]  # shared and local variables
    global_unit: int
    shared_unit: int

    def __post_init__(self) -> None:
        self.static_shared_bytes = sum(e.nbytes for e in self.extents["shared"])
        self.specials = [(n, s) for n, s in enumerate(self.slots) if isinstance(s, SpecialSlot)]


def program(kernel: Kernel) -> Program:
    """The kernel's program, decoded at the first call."""
    if kernel.program is None:
        decoder = Decoder(kernel)
        decoded = [_instruction(decoder, s) for s in kernel.statements]
        units = decoder.global_unit, decoder.shared_unit
        kernel.program = Program(kernel, decoded, decoder.slots, decoder.extents, *units)
    return kernel.program


def _instruction(decoder: Decoder, statement: Statement) -> Instruction:
    name = statement.opcode.split(".")[0]
    if name in _STEPS:
        instruction = Instruction(statement.text, _STEPS[name](decoder, statement))
    elif name in _WAITING:
        instruction = _WAITING[name](decoder, statement)
        if statement.predicate:
            raise NotImplementedError(f"PTX instruction {statement.text}: a predicate on what waits for other threads")
    elif name == "bra":
        target = statement.scope.label(statement.operands[0])
        instruction = Instruction(statement.text, None, "branch", target)
    elif name in ("ret", "exit"):
        instruction = Instruction(statement.text, None, "exit")
    elif name == "trap":
        instruction = Instruction(statement.text, _trap)
    elif name in _WITHOUT_EFFECT:
        instruction = Instruction(statement.text, lambda frame, active: None)
    else:
        raise Opcode.of(statement.opcode).unknown()
    if statement.predicate:
        instruction.predicate, _ = decoder.predicate(statement, statement.predicate)
        instruction.negate = statement.negate
    return instruction


def _trap(frame: Frame, active: Active) -> None:
    raise frame.fault(int(np.argmax(active.mask)), "the kernel gives up")
