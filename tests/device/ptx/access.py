"""Loads, stores and atomics."""

from typing import Any

import numpy as np

from tests.device.ptx.frame import Frame
from tests.device.ptx.memory import Access
from tests.device.ptx.program import Active, Decoder, Opcode, ParameterSlot, Step
from tests.device.ptx.text import Statement

_SPACES = frozenset(("global", "shared", "local", "param", "const"))
# Hints for caches, and scopes of what is coherent anyway.
_HINTS = frozenset(("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "cta", "cluster", "gpu", "sys", "weak"))
_STRONG = frozenset(("volatile", "relaxed", "acquire", "release"))
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}


def _memory_opcode(statement: Statement, others: frozenset[str]) -> tuple[Opcode, str, int]:
    """The opcode, the space that it names ("" is generic) and the elements it moves."""
    opcode = Opcode.of(statement.opcode)
    known = _SPACES | _HINTS | _STRONG | _VECTORS.keys() | others
    # Cache hints such as L1::no_allocate and shared::cta.
    words = {m.partition("::")[0] if m.startswith("shared::cta") else m for m in opcode.modifiers}
    if any(w not in known and not w.startswith(("L1::", "L2::")) for w in words) or len(opcode.types) != 1:
        raise opcode.unknown()
    space = "".join(words & _SPACES)
    return opcode, space, next((n for v, n in _VECTORS.items() if v in words), 1)


def _access(decoder: Decoder, opcode: Opcode, space: str, verb: str, count: int) -> Access:
    width = opcode.dtype.itemsize
    if space in ("", "global"):
        decoder.global_unit = min(decoder.global_unit, width)
    if space in ("", "shared"):
        decoder.shared_unit = min(decoder.shared_unit, width)
    strong = bool(opcode.modifiers & _STRONG) or verb == "atomic"
    return Access(verb, width, count, strong, "nc" in opcode.modifiers)


def _elements(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}").split(",")]


class _Addresses:
    """Computes the addresses of one operand."""

    def __init__(self, decoder: Decoder, statement: Statement, text: str) -> None:
        self.slot, self.offset = decoder.address(statement, text)

    def __call__(self, frame: Frame, active: Active) -> np.ndarray:
        if self.slot is None:
            return np.full(frame.lanes[active.index].shape, self.offset, np.int64)
        return frame.gather(self.slot, active).astype(np.int64) + self.offset


def decode_load(decoder: Decoder, statement: Statement) -> Step:
    """ld[.space][.vector].type register or {registers}, [address]."""
    opcode, space, count = _memory_opcode(statement, frozenset())
    target, operand = statement.operands
    dtype = opcode.dtype
    targets = [None if t == "_" else decoder.target(statement, t, dtype) for t in _elements(target)]
    addresses = _Addresses(decoder, statement, operand)
    if space == "param" and addresses.slot is None:
        return _load_parameter(decoder, statement, operand, dtype, targets)
    access = _access(decoder, opcode, space, "load", count)

    def step(frame: Frame, active: Active) -> None:
        address = addresses(frame, active)
        lanes = frame.lanes[active.index]
        for chosen, place in frame.places(space, access, address, lanes):
            index = active.index if isinstance(chosen, slice) else lanes[chosen]
            for number, target in enumerate(targets):
                if target is not None:
                    frame.values[target][index] = place.words[place.position + number].view(dtype)

    return step


def _load_parameter(
    decoder: Decoder, statement: Statement, operand: str, dtype: np.dtype, targets: list[int | None]
) -> Step:
    base = operand.strip("[ ]").partition("+")[0]
    number = [p.name for p in decoder.kernel.parameters].index(base)
    start = decoder.address(statement, operand)[1] - decoder.addresses[base]
    sources = [decoder.add(ParameterSlot(number, start + n * dtype.itemsize, dtype)) for n in range(len(targets))]

    def step(frame: Frame, active: Active) -> None:
        for source, target in zip(sources, targets):
            if target is not None:
                frame.put(target, frame.values[source], active)

    return step


def decode_store(decoder: Decoder, statement: Statement) -> Step:
    """st[.space][.vector].type [address], register or {registers}."""
    opcode, space, count = _memory_opcode(statement, frozenset())
    operand, source = statement.operands
    dtype = np.dtype(f"u{opcode.dtype.itemsize}")
    sources = [decoder.source(statement, s, dtype) for s in _elements(source)]
    addresses = _Addresses(decoder, statement, operand)
    access = _access(decoder, opcode, space, "store", count)

    def step(frame: Frame, active: Active) -> None:
        address = addresses(frame, active)
        for chosen, place in frame.places(space, access, address, frame.lanes[active.index]):
            for number, source in enumerate(sources):
                place.words[place.position + number] = frame.gather(source, active)[chosen]

    return step


_COMBINE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: np.where(old == expected, new, old),
    "inc": lambda old, limit: np.where(old >= limit, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, limit: np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1)),
}


def decode_atomic(decoder: Decoder, statement: Statement) -> Step:
    """atom.operation d, [address], operands and red.operation [address], operand; lanes take turns in their order."""
    operations = frozenset(_COMBINE)
    opcode, space, count = _memory_opcode(statement, operations | {"acq_rel", "noftz"})
    dtype = opcode.dtype
    if (dtype.kind == "f" and not opcode.modifiers & {"add", "exch"}) or dtype.itemsize < 4 or count != 1:
        raise opcode.unknown()
    combine = _COMBINE[next(iter(opcode.modifiers & operations))]
    target, operand, *rest = statement.operands if opcode.name == "atom" else ("_", *statement.operands)
    sources = [decoder.source(statement, s, dtype) for s in rest]
    into = None if target == "_" else decoder.target(statement, target, dtype)
    addresses = _Addresses(decoder, statement, operand)
    access = _access(decoder, opcode, space, "atomic", 1)

    def step(frame: Frame, active: Active) -> None:
        address = addresses(frame, active)
        lanes = frame.lanes[active.index]
        for chosen, place in frame.places(space, access, address, lanes):
            operands = [frame.gather(s, active)[chosen] for s in sources]
            old = _take_turns(place.words.view(dtype), place.position, combine, operands, into is not None)
            if into is not None:
                frame.values[into][lanes[chosen]] = old

    return step


def _take_turns(
    words: np.ndarray, position: np.ndarray, combine: Any, operands: list[np.ndarray], wanted: bool
) -> np.ndarray | None:
    """What each lane finds, if that is wanted, when the lanes change their words one after another."""
    order = np.argsort(position, kind="stable")
    ranked = position[order]
    first = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1])))
    turn = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
    old = np.empty(len(order), words.dtype)
    associative = isinstance(combine, np.ufunc) and words.dtype.kind in "iu"
    if associative and (combine is np.add or not wanted):
        added, start = operands[0][order], words[ranked]
        words[ranked[first]] = combine(start[first], combine.reduceat(added, first))
        if not wanted:
            return None
        old[order] = _running_sums(start, added, turn)
        return old
    for number in range(int(turn.max()) + 1):
        lanes = order[turn == number]
        old[lanes] = words[position[lanes]]
        words[position[lanes]] = combine(old[lanes], *[o[lanes] for o in operands])
    return old


def _running_sums(start: np.ndarray, added: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """The sums before each addition; additions to one word stand together, and count their turns from 0."""
    before = np.cumsum(added, dtype=added.dtype) - added
    return start + before - before[np.arange(len(turn)) - turn]
