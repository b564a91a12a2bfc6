"""A kernel decoded: every operand a slot of the frame, every instruction a function on the frame's lanes."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.device.ptx.memory import TAGS, Extent, LocalSpace, ParameterSpace
from tests.device.ptx.text import TYPES, Kernel, Register, Statement, immediate

# A step changes registers or memory for the active lanes of a frame.
Step = Callable[[Any, "Active"], None]


class Active:
    """The lanes that execute an instruction.

    Registers of lanes that have exited may take any value, so `where` is None, for all, when no other lane is left.
    """

    __slots__ = ("_index", "mask", "where")

    def __init__(self, mask: np.ndarray, alone: bool) -> None:
        self.mask = mask
        self.where = None if alone else mask
        self._index: Any = None

    @property
    def index(self) -> Any:
        """For memory, which only these lanes may touch: their numbers, or a slice if that is all."""
        if self._index is None:
            count = np.count_nonzero(self.mask)
            self._index = slice(None) if count == len(self.mask) else np.flatnonzero(self.mask)
        return self._index


@dataclass(frozen=True)
class RegisterSlot:
    """A register seen as a type; a narrower type sees its low part."""

    register: Register
    dtype: np.dtype[Any]

    def bind(self, frame: Any) -> np.ndarray:
        lanes = frame.registers[self.register.width][self.register.number]
        if self.register.width == 0:
            return lanes
        return lanes.view(self.dtype)[:: self.register.width // self.dtype.itemsize]


@dataclass(frozen=True)
class ConstantSlot:
    """A value known from the text."""

    value: np.ndarray

    def bind(self, frame: Any) -> np.ndarray:
        return self.value


@dataclass(frozen=True)
class ParameterSlot:
    """A value within a parameter, the same for all lanes."""

    number: int
    offset: int
    dtype: np.dtype[Any]

    def bind(self, frame: Any) -> np.ndarray:
        return np.frombuffer(frame.arguments[self.number], self.dtype, 1, self.offset)


@dataclass(frozen=True)
class SpecialSlot:
    """A special register such as %tid.x."""

    name: str
    dtype: np.dtype[Any]

    def bind(self, frame: Any) -> np.ndarray:
        return frame.special(self.name).astype(self.dtype)


Slot = RegisterSlot | ConstantSlot | ParameterSlot | SpecialSlot


@dataclass
class Instruction:
    """One instruction; `control` tells the scheduler what it does besides its step."""

    text: str
    step: Step | None = None
    control: str = ""  # "", "branch", "exit", "block" (a barrier), "warp" (waits for the lanes of a mask)
    target: int = 0
    predicate: int | None = None
    negate: bool = False
    members: int = 0  # slot of the mask that a "warp" instruction waits for


@dataclass(frozen=True)
class Opcode:
    """add.rn.ftz.f32 is name add, modifiers rn and ftz, type f32."""

    text: str
    name: str
    modifiers: frozenset[str]
    types: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> "Opcode":
        name, *rest = text.split(".")
        return cls(text, name, frozenset(r for r in rest if r not in TYPES), tuple(r for r in rest if r in TYPES))

    @property
    def type(self) -> str:
        return self.types[-1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return TYPES[self.types[-1]]

    def unknown(self) -> NotImplementedError:
        return NotImplementedError(f"PTX instruction {self.text}")


@dataclass
class Decoder:
    """Collects the slots of a kernel while its statements are decoded."""

    kernel: Kernel
    slots: list[Slot] = field(default_factory=list)
    _numbers: dict[Any, int] = field(default_factory=dict)
    global_unit: int = 16
    shared_unit: int = 16

    def __post_init__(self) -> None:
        self.addresses, self.extents = _layout(self.kernel)

    def add(self, slot: Slot) -> int:
        """The number of a slot; equal registers share one."""
        if isinstance(slot, ConstantSlot):
            self.slots.append(slot)
            return len(self.slots) - 1
        if slot not in self._numbers:
            self._numbers[slot] = len(self.slots)
            self.slots.append(slot)
        return self._numbers[slot]

    def source(self, statement: Statement, text: str, dtype: np.dtype[Any]) -> int:
        """The slot of an operand that is read as the type."""
        register = statement.scope.register(text)
        if register is not None:
            return self.add(RegisterSlot(register, dtype))
        if text in self.addresses:
            return self.add(ConstantSlot(np.array([self.addresses[text]], np.uint64).astype(dtype)))
        if text.startswith("%") or text == "WARP_SZ":
            return self.add(SpecialSlot(text, dtype))
        return self.add(ConstantSlot(immediate(text, dtype)))

    def target(self, statement: Statement, text: str, dtype: np.dtype[Any]) -> int:
        """The slot of an operand that is written; a register wider than the type takes the value extended."""
        register = statement.scope.register(text)
        if register is None:
            raise NotImplementedError(f"PTX destination {text} in {statement.text}")
        if register.width > dtype.itemsize and dtype.kind in "iu":
            dtype = np.dtype(f"{dtype.kind}{register.width}")
        return self.add(RegisterSlot(register, dtype))

    def predicate(self, statement: Statement, text: str) -> tuple[int, bool]:
        """The slot of a predicate operand, and whether it stands negated."""
        return self.source(statement, text.lstrip("!"), TYPES["pred"]), text.startswith("!")

    def address(self, statement: Statement, text: str) -> tuple[int | None, int]:
        """[base + offset]: the slot of the base, None for a known address, and the offset."""
        base, offset = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
        constant = int(offset, 0) if offset else 0
        if base in self.addresses:
            return None, self.addresses[base] + constant
        register = statement.scope.register(base)
        if register is None:
            raise NotImplementedError(f"PTX address {text} in {statement.text}")
        return self.add(RegisterSlot(register, np.dtype(f"i{register.width}"))), constant


def _layout(kernel: Kernel) -> tuple[dict[str, int], dict[str, list[Extent]]]:
    """Generic addresses of everything with a name, and where the variables lie in shared and local memory.

    Dynamic shared memory, declared without a size, comes last; all its declarations begin together.
    """
    addresses = {name: array.ctypes.data for name, array in kernel.module.storage.items()}
    addresses |= {p.name: TAGS["param"] + n * ParameterSpace.GAP for n, p in enumerate(kernel.parameters)}
    extents: dict[str, list[Extent]] = {"shared": [], "local": []}
    end = {"shared": 0, "local": 0}
    for variable in sorted(kernel.variables, key=lambda v: v.nbytes == 0):
        start = -(-end[variable.space] // variable.align) * variable.align
        addresses[variable.name] = TAGS[variable.space] + start
        if variable.nbytes:
            end[variable.space] = start + variable.nbytes + LocalSpace.GAP
        extents[variable.space].append(Extent(variable.name, start, variable.nbytes))
    return addresses, extents
