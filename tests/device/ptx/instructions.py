"""The instructions that compute a register from registers, as one table."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.device.ptx import floats, integers
from tests.device.ptx.convert import conversion
from tests.device.ptx.floats import Function
from tests.device.ptx.frame import Frame
from tests.device.ptx.program import Active, Decoder, Opcode, Step
from tests.device.ptx.text import TYPES, Statement

FLOATS = frozenset(("f16", "f32", "f64"))
INTEGERS = frozenset(f"{kind}{bits}" for kind in "bsu" for bits in (16, 32, 64))
_COUNT = TYPES["u32"]


@dataclass(frozen=True)
class Operation:
    """How one opcode computes its result.

    `sources` has a letter per operand: t the type of the instruction, c a 32-bit count, w twice the type's width.
    `target` is one such letter, too.
    """

    build: Callable[[Opcode], Function]
    sources: str
    types: frozenset[str]
    modifiers: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    target: str = "t"

    def accepts(self, opcode: Opcode) -> bool:
        return (
            len(opcode.types) == 1
            and opcode.type in self.types
            and self.required <= opcode.modifiers <= self.required | self.modifiers
        )


def _float(function: Function, sources: str, required: str = "", modifiers: str = "rn ftz") -> Operation:
    def build(opcode: Opcode) -> Function:
        return floats.rounded(function, "ftz" in opcode.modifiers and opcode.type == "f32")

    return Operation(build, sources, FLOATS, frozenset(modifiers.split()), frozenset(required.split()))


def _sign(function: Function) -> Operation:
    """Only the sign changes, of a NaN as well."""

    def build(opcode: Opcode) -> Function:
        return (lambda x: function(floats.flush(x))) if "ftz" in opcode.modifiers else function

    return Operation(build, "t", FLOATS, frozenset({"ftz"}))


def _integer(function: Function, sources: str, required: str = "", target: str = "t") -> Operation:
    return Operation(lambda _: function, sources, INTEGERS, frozenset(), frozenset(required.split()), target)


def _bits(function: Function, sources: str) -> Operation:
    return Operation(lambda _: function, sources, INTEGERS | {"pred"})


def _predicate(function: Function, sources: str) -> Operation:
    return Operation(lambda _: function, sources, frozenset({"pred"}))


def _find(opcode: Opcode) -> Function:
    return lambda a: integers.find_highest(a, "shiftamt" in opcode.modifiers)


def _funnel(opcode: Opcode) -> Function:
    return integers.funnel("l" in opcode.modifiers, "wrap" in opcode.modifiers)


# More than one entry for an opcode: the first that accepts the types and modifiers.
OPERATIONS: dict[str, tuple[Operation, ...]] = {
    "add": (_float(np.add, "tt"), _integer(np.add, "tt")),
    "sub": (_float(np.subtract, "tt"), _integer(np.subtract, "tt")),
    "mul": (
        _float(np.multiply, "tt"),
        _integer(np.multiply, "tt", "lo"),
        _integer(lambda a, b: integers.wide(a) * integers.wide(b), "tt", "wide", "w"),
        _integer(integers.multiply_high, "tt", "hi"),
    ),
    "mad": (
        _float(floats.fma, "ttt", "rn", "ftz"),
        _integer(lambda a, b, c: a * b + c, "ttt", "lo"),
        _integer(lambda a, b, c: integers.wide(a) * integers.wide(b) + c, "ttw", "wide", "w"),
        _integer(lambda a, b, c: integers.multiply_high(a, b) + c, "ttt", "hi"),
    ),
    "fma": (_float(floats.fma, "ttt", "rn", "ftz"),),
    "div": (_float(np.divide, "tt", "rn", "ftz"), _integer(integers.divide, "tt")),
    "rem": (_integer(np.fmod, "tt"),),
    "sqrt": (_float(np.sqrt, "t", "rn", "ftz"),),
    "rcp": (_float(np.reciprocal, "t", "rn", "ftz"),),
    "min": (
        _float(floats.minimum, "tt", "", "ftz"),
        _float(floats.minimum_nan, "tt", "NaN", "ftz"),
        _integer(np.minimum, "tt"),
    ),
    "max": (
        _float(floats.maximum, "tt", "", "ftz"),
        _float(floats.maximum_nan, "tt", "NaN", "ftz"),
        _integer(np.maximum, "tt"),
    ),
    "neg": (_sign(np.negative), _integer(np.negative, "t")),
    "abs": (_sign(np.abs), _integer(np.abs, "t")),
    "and": (_bits(np.bitwise_and, "tt"),),
    "or": (_bits(np.bitwise_or, "tt"),),
    "xor": (_bits(np.bitwise_xor, "tt"),),
    "not": (_bits(np.invert, "t"),),
    "cnot": (_integer(lambda a: (a == 0).astype(a.dtype), "t"),),
    "shl": (_integer(integers.shift(np.left_shift), "tc"),),
    "shr": (_integer(integers.shift(np.right_shift), "tc"),),
    "shf": (Operation(_funnel, "ttc", INTEGERS, frozenset({"l", "r", "wrap", "clamp"})),),
    "popc": (_integer(lambda a: np.bitwise_count(a).astype(np.uint32), "t", target="c"),),
    "clz": (_integer(integers.count_leading_zeros, "t", target="c"),),
    "brev": (_integer(integers.reverse_bits, "t"),),
    "bfind": (Operation(_find, "t", INTEGERS, frozenset({"shiftamt"}), target="c"),),
    "bfe": (_integer(integers.extract_field, "tcc"),),
    "bfi": (_integer(integers.insert_field, "ttcc"),),
    "prmt": (_integer(integers.permute_bytes, "ttt"),),
}


def elementwise(function: Function, sources: list[int], target: int) -> Step:
    """The step that puts a function of slots into a slot."""
    if isinstance(function, np.ufunc):
        return _in_place(function, sources, target)

    def step(frame: Frame, active: Active) -> None:
        values = frame.values
        frame.put(target, function(*[values[s] for s in sources]), active)

    return step


def _in_place(function: np.ufunc, sources: list[int], target: int) -> Step:
    def step(frame: Frame, active: Active) -> None:
        values = frame.values
        if active.where is None:
            function(*[values[s] for s in sources], out=values[target])
        else:
            np.copyto(values[target], function(*[values[s] for s in sources]), where=active.where)

    return step


def decode_operation(decoder: Decoder, statement: Statement) -> Step:
    """The step of an opcode of the table."""
    opcode = Opcode.of(statement.opcode)
    operation = next((o for o in OPERATIONS.get(opcode.name, ()) if o.accepts(opcode)), None)
    if operation is None or len(statement.operands) != 1 + len(operation.sources):
        raise opcode.unknown()
    types = {"t": opcode.dtype, "c": _COUNT}
    if "w" in operation.target:
        types["w"] = np.dtype(f"{opcode.dtype.kind}{2 * opcode.dtype.itemsize}")
    target, *operands = statement.operands
    sources = [decoder.source(statement, o, types[letter]) for o, letter in zip(operands, operation.sources)]
    step = elementwise(operation.build(opcode), sources, decoder.target(statement, target, types[operation.target]))
    if opcode.name in ("div", "rem") and opcode.type in INTEGERS:
        return _refuse_zero(step, sources[1])
    return step


def _refuse_zero(step: Step, divisor: int) -> Step:
    def checked(frame: Frame, active: Active) -> None:
        zero = (frame.values[divisor] == 0) & active.mask
        if np.count_nonzero(zero):
            raise frame.fault(int(np.argmax(zero)), "integer division by zero")
        step(frame, active)

    return checked


def decode_lookup(decoder: Decoder, statement: Statement) -> Step:
    """lop3.b32 d, a, b, c, table."""
    if statement.opcode != "lop3.b32":
        raise Opcode.of(statement.opcode).unknown()
    target, a, b, c, table = statement.operands
    word = TYPES["b32"]
    sources = [decoder.source(statement, o, word) for o in (a, b, c)]
    return elementwise(integers.lookup(int(table, 0)), sources, decoder.target(statement, target, word))


def decode_convert(decoder: Decoder, statement: Statement) -> Step:
    """cvt.target.source."""
    opcode = Opcode.of(statement.opcode)
    function = conversion(opcode.modifiers, *opcode.types) if len(opcode.types) == 2 else None
    if function is None:
        raise opcode.unknown()
    result, argument = (TYPES[t] for t in opcode.types)
    target, *operands = statement.operands
    sources = [decoder.source(statement, o, argument) for o in operands]
    return elementwise(function, sources, decoder.target(statement, target, result))


def decode_select(decoder: Decoder, statement: Statement) -> Step:
    """selp d, a, b, p and slct d, a, b, c, which asks for c >= 0."""
    opcode = Opcode.of(statement.opcode)
    dtype = TYPES[opcode.types[0]]
    target, a, b, chooser = statement.operands
    values = [decoder.source(statement, o, dtype) for o in (a, b)]
    into = decoder.target(statement, target, dtype)
    if opcode.name == "selp" and not opcode.modifiers:
        predicate, negate = decoder.predicate(statement, chooser)
        return elementwise(lambda x, y, p: np.where(p != negate, x, y), [*values, predicate], into)
    if opcode.name == "slct" and opcode.type in ("s32", "f32") and opcode.modifiers <= {"ftz"}:
        # A subnormal that .ftz makes a zero is >= 0, even with a sign.
        prepare = floats.flush if "ftz" in opcode.modifiers and opcode.type == "f32" else np.asarray
        sign = decoder.source(statement, chooser, opcode.dtype)
        return elementwise(lambda x, y, c: np.where(prepare(c) >= 0, x, y), [*values, sign], into)
    raise opcode.unknown()


_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def decode_compare(decoder: Decoder, statement: Statement) -> Step:
    """setp.relation[.combination][.ftz].type p[|q], a, b[, [!]c]."""
    opcode = Opcode.of(statement.opcode)
    _, relation, *rest = statement.opcode.split(".")
    combination = next((r for r in rest if r in _COMBINE), None)
    if opcode.modifiers - {relation, "ftz"} - _COMBINE.keys() or opcode.type not in FLOATS | INTEGERS:
        raise opcode.unknown()
    test = floats.compare(relation)
    if opcode.type not in FLOATS and relation == "ne":
        test = np.not_equal
    if "ftz" in opcode.modifiers and opcode.type == "f32":
        test = floats.of_flushed(test)
    targets, a, b, *third = statement.operands
    sources = [decoder.source(statement, o, opcode.dtype) for o in (a, b)]
    combine, negate = None, False
    if combination is not None:
        slot, negate = decoder.predicate(statement, third[0])
        sources.append(slot)
        combine = _COMBINE[combination]
    steps = [
        elementwise(_test(test, combine, negate, opposite), sources, decoder.target(statement, t, TYPES["pred"]))
        for t, opposite in zip(targets.split("|"), (False, True))
        if t != "_"
    ]
    if len(steps) > 1 and set(targets.split("|")) & {o.lstrip("!") for o in third}:
        raise opcode.unknown()
    return in_sequence(steps)


def _test(test: Function, combine: Function | None, negate: bool, opposite: bool) -> Function:
    if combine is None:
        return (lambda a, b: ~test(a, b)) if opposite else test
    return lambda a, b, c: combine(test(a, b) != opposite, c != negate)


def in_sequence(steps: list[Step]) -> Step:
    """One step out of several."""
    if len(steps) == 1:
        return steps[0]

    def step(frame: Frame, active: Active) -> None:
        for each in steps:
            each(frame, active)

    return step


def decode_move(decoder: Decoder, statement: Statement) -> Step:
    """mov, also to and from {parts}, the lowest first; cvta changes nothing, for all addresses are generic."""
    opcode = Opcode.of(statement.opcode)
    target, source = statement.operands
    if target.startswith("{"):
        return _unpack(decoder, statement, opcode.dtype, _parts(target), source)
    if source.startswith("{"):
        return _pack(decoder, statement, opcode.dtype, target, _parts(source))
    # As bits: a NaN keeps its payload.
    dtype = opcode.dtype if opcode.type == "pred" else np.dtype(f"u{opcode.dtype.itemsize}")
    slot, into = decoder.source(statement, source, dtype), decoder.target(statement, target, dtype)
    return lambda frame, active: frame.put(into, frame.values[slot], active)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}").split(",")]


def _unpack(decoder: Decoder, statement: Statement, dtype: np.dtype, parts: list[str], source: str) -> Step:
    part = np.dtype(f"u{dtype.itemsize // len(parts)}")
    slot = decoder.source(statement, source, np.dtype(f"u{dtype.itemsize}"))
    # Temporaries: a part may go to the register that is taken apart.
    targets = [None if p == "_" else decoder.target(statement, p, part) for p in parts]

    def step(frame: Frame, active: Active) -> None:
        pieces = np.array(frame.values[slot]).view(part).reshape(-1, len(parts))
        for number, target in enumerate(targets):
            if target is not None:
                frame.put(target, pieces[:, number], active)

    return step


def _pack(decoder: Decoder, statement: Statement, dtype: np.dtype, target: str, parts: list[str]) -> Step:
    whole = np.dtype(f"u{dtype.itemsize}")
    bits = 8 * dtype.itemsize // len(parts)
    sources = [decoder.source(statement, p, np.dtype(f"u{bits // 8}")) for p in parts]

    def join(*pieces: np.ndarray) -> np.ndarray:
        result = pieces[0].astype(whole)
        for number, piece in enumerate(pieces[1:], 1):
            result = result | (piece.astype(whole) << whole.type(number * bits))
        return result

    return elementwise(join, sources, decoder.target(statement, target, whole))


def decode_address_conversion(decoder: Decoder, statement: Statement) -> Step:
    """cvta: space to generic adds what tells the space; generic to space leaves it on."""
    opcode = Opcode.of(statement.opcode)
    if opcode.type != "u64":
        raise opcode.unknown()
    return decode_move(decoder, statement)
