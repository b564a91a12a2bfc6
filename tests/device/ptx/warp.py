"""Instructions that wait for other threads: barriers, votes, shuffles and matches."""

from collections.abc import Callable

import numpy as np

from tests.device.ptx.frame import WARP, Frame
from tests.device.ptx.program import Active, Decoder, Instruction, Opcode, Step
from tests.device.ptx.text import TYPES, Statement

_WORD = TYPES["b32"]
_BITS = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
_SOURCES: dict[str, Callable[..., np.ndarray]] = {
    "up": lambda lane, offset, segment: lane - offset,
    "down": lambda lane, offset, segment: lane + offset,
    "bfly": lambda lane, offset, segment: lane ^ offset,
    "idx": lambda lane, offset, segment: (lane & segment) | (offset & ~segment & (WARP - 1)),
}
_REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
ALL_LANES = np.uint32(0xFFFFFFFF)
UNDEFINED = np.uint32(0xFFFFFFFF)  # what a shuffle gives from a lane that takes no part: NaN as a float


def ballot(mask: np.ndarray) -> np.ndarray:
    """A bit per lane, for each warp."""
    return np.packbits(mask.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)[:, 0]


def arrived_at_barrier(frame: Frame, mask: np.ndarray) -> np.ndarray:
    """The lanes whose whole block waits."""
    waiting = (mask | ~frame.exists).reshape(-1, frame.launch.block_lanes).all(axis=1)
    return mask & np.repeat(waiting, frame.launch.block_lanes)


def arrived_in_warp(frame: Frame, instruction: Instruction, mask: np.ndarray) -> np.ndarray:
    """The lanes for which every thread of their mask waits here or has exited."""
    members = np.broadcast_to(frame.values[instruction.members], mask.shape)
    if not np.count_nonzero((frame.live & ~mask) | (mask & (members != ALL_LANES))):
        return mask
    outside = mask & ((members & np.tile(_BITS, len(mask) // WARP)) == 0)
    if np.count_nonzero(outside):
        lane = int(np.argmax(outside))
        raise frame.fault(lane, f"lane {lane % WARP} is not in its own mask {int(members[lane]):#010x}")
    missing = np.repeat(ballot(frame.live & ~mask), WARP)
    ready = mask & ((members & missing) == 0)
    _require_same_mask(frame, members, ready)
    return ready


def _require_same_mask(frame: Frame, members: np.ndarray, ready: np.ndarray) -> None:
    """Lanes that wait for each other must give the same mask."""
    by_warp = np.where(ready, members, 0).reshape(-1, WARP)
    highest = by_warp.max(axis=1, keepdims=True)
    if not np.count_nonzero((by_warp != highest) & (by_warp != 0)):
        return
    named = ((by_warp[:, :, None] & _BITS) != 0) & (by_warp[:, None, :] != 0)
    wrong = (named & (by_warp[:, :, None] != by_warp[:, None, :])).any(axis=2).ravel()
    if np.count_nonzero(wrong):
        lane = int(np.argmax(wrong))
        raise frame.fault(lane, f"another lane of its mask {int(members[lane]):#010x} has given a different mask")


def decode_barrier(decoder: Decoder, statement: Statement) -> Instruction:
    """bar.sync, barrier.sync, bar.warp.sync, and bar.red, which also counts or combines a predicate."""
    words = statement.opcode.split(".")
    opcode = Opcode.of(statement.opcode)
    opcode_words = opcode.modifiers - {"aligned", "cta"}
    if words[1] == "warp" and opcode_words == {"warp", "sync"}:
        members = decoder.source(statement, statement.operands[0], _WORD)
        return Instruction(statement.text, None, "warp", members=members)
    if opcode_words == {"sync"} and len(statement.operands) == 1:
        return Instruction(statement.text, None, "block")
    if "red" in opcode_words and len(statement.operands) == 3:
        return Instruction(statement.text, _barrier_reduction(decoder, statement, opcode), "block")
    raise opcode.unknown()


def _barrier_reduction(decoder: Decoder, statement: Statement, opcode: Opcode) -> Step:
    target, _, voted = statement.operands
    predicate, negate = decoder.predicate(statement, voted)
    operation = next(iter(opcode.modifiers & {"popc", "and", "or"}))
    into = decoder.target(statement, target, opcode.dtype)

    def step(frame: Frame, active: Active) -> None:
        votes = (frame.values[predicate] != negate) & active.mask
        count = votes.reshape(-1, frame.launch.block_lanes).sum(axis=1)
        results = {"popc": count, "and": count == frame.launch.threads, "or": count > 0}
        frame.put(into, np.repeat(results[operation], frame.launch.block_lanes), active)

    return step


def decode_vote(decoder: Decoder, statement: Statement) -> Instruction:
    """vote.sync.ballot.b32 and vote.sync.{any,all,uni}.pred."""
    opcode = Opcode.of(statement.opcode)
    mode = "".join(opcode.modifiers - {"sync"})
    if "sync" not in opcode.modifiers or mode not in ("ballot", "any", "all", "uni"):
        raise opcode.unknown()
    target, voted, mask = statement.operands
    predicate, negate = decoder.predicate(statement, voted)
    members = decoder.source(statement, mask, _WORD)
    into = decoder.target(statement, target, opcode.dtype)

    def step(frame: Frame, active: Active) -> None:
        votes = np.repeat(ballot((frame.values[predicate] != negate) & active.mask), WARP)
        present = np.repeat(ballot(active.mask), WARP) & frame.values[members]
        votes &= present
        results = {
            "ballot": lambda: votes,
            "any": lambda: votes != 0,
            "all": lambda: votes == present,
            "uni": lambda: (votes == 0) | (votes == present),
        }
        frame.put(into, results[mode](), active)

    return Instruction(statement.text, step, "warp", members=members)


def decode_shuffle(decoder: Decoder, statement: Statement) -> Instruction:
    """shfl.sync.mode.b32 d[|p], a, offset, clamp and segment, mask."""
    opcode = Opcode.of(statement.opcode)
    mode = "".join(opcode.modifiers - {"sync"})
    if "sync" not in opcode.modifiers or mode not in _SOURCES:
        raise opcode.unknown()
    targets, *operands = statement.operands
    value, offset, control, members = (decoder.source(statement, o, _WORD) for o in operands)
    into, *valid = (None if t == "_" else decoder.target(statement, t, d) for t, d in _shuffle_targets(targets))

    def step(frame: Frame, active: Active) -> None:
        values = frame.values
        lane = frame.lanes % WARP
        limits = values[control].astype(np.int64)
        segment, clamp = (limits >> 8) & (WARP - 1), limits & (WARP - 1)
        last = (lane & segment) | (clamp & ~segment)
        source = _SOURCES[mode](lane, values[offset].astype(np.int64) & (WARP - 1), segment)
        inside = source >= last if mode == "up" else source <= last
        source = frame.lanes - lane + np.where(inside, source, lane)
        takes_part = active.mask[source] & ((values[members] >> (source % WARP).astype(np.uint32)) & 1 != 0)
        given = np.broadcast_to(values[value], active.mask.shape)[source]
        if into is not None:
            frame.put(into, np.where(takes_part, given, UNDEFINED), active)
        for target in valid:
            if target is not None:
                frame.put(target, inside, active)

    return Instruction(statement.text, step, "warp", members=members)


def _shuffle_targets(text: str) -> list[tuple[str, np.dtype]]:
    return list(zip(text.split("|"), (_WORD, TYPES["pred"])))


def decode_match(decoder: Decoder, statement: Statement) -> Instruction:
    """match.any.sync: the lanes that have the same value."""
    opcode = Opcode.of(statement.opcode)
    if opcode.modifiers != {"any", "sync"}:
        raise opcode.unknown()
    target, operand, mask = statement.operands
    value = decoder.source(statement, operand, opcode.dtype)
    members = decoder.source(statement, mask, _WORD)
    into = decoder.target(statement, target, _WORD)

    def step(frame: Frame, active: Active) -> None:
        values = np.broadcast_to(frame.values[value], active.mask.shape).reshape(-1, WARP)
        present = active.mask.reshape(-1, 1, WARP)
        same = ((values[:, :, None] == values[:, None, :]) & present) @ _BITS
        frame.put(into, same.ravel().astype(np.uint32) & frame.values[members], active)

    return Instruction(statement.text, step, "warp", members=members)


def decode_reduce(decoder: Decoder, statement: Statement) -> Instruction:
    """redux.sync: one operation over the lanes of the mask."""
    opcode = Opcode.of(statement.opcode)
    operation = _REDUCTIONS.get("".join(opcode.modifiers - {"sync"}))
    if operation is None or opcode.dtype.kind == "f":
        raise opcode.unknown()
    target, operand, mask = statement.operands
    value = decoder.source(statement, operand, opcode.dtype)
    members = decoder.source(statement, mask, _WORD)
    into = decoder.target(statement, target, opcode.dtype)

    def step(frame: Frame, active: Active) -> None:
        values = np.broadcast_to(frame.values[value], active.mask.shape)
        masks = np.broadcast_to(frame.values[members], active.mask.shape)
        result = values.copy()
        for key in np.unique(np.stack((frame.lanes // WARP, masks))[:, active.mask], axis=1).T:
            lanes = np.flatnonzero(active.mask & (frame.lanes // WARP == key[0]) & (masks == key[1]))
            result[lanes] = operation.reduce(values[lanes])
        frame.put(into, result, active)

    return Instruction(statement.text, step, "warp", members=members)


def decode_active_mask(decoder: Decoder, statement: Statement) -> Step:
    """activemask: the lanes that execute this together."""
    into = decoder.target(statement, statement.operands[0], _WORD)
    return lambda frame, active: frame.put(into, np.repeat(ballot(active.mask), WARP), active)
