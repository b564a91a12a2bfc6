"""The PTX interpreter computes what a GPU computes."""

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.device import ptx
from tests.ptx_support import assert_bits, compute, hard_floats, nearest, pairs

FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
INTEGERS = {f"{k}{8 * size}": np.dtype(f"{c}{size}") for k, c in (("u", "u"), ("s", "i")) for size in (2, 4, 8)}
EXACT: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "add.rn": operator.add,
    "sub.rn": operator.sub,
    "mul.rn": operator.mul,
    "div.rn": operator.truediv,
}


def hard_integers(dtype: np.dtype[Any]) -> np.ndarray:
    info = np.iinfo(dtype)
    values = [0, 1, 2, 3, 7, 100, info.max, info.max - 1, info.min, info.min + 1, info.max // 3, info.min // 3]
    return np.array(values, dtype)


def wrapped(value: int, dtype: np.dtype[Any]) -> int:
    value &= (1 << 8 * dtype.itemsize) - 1
    return value - (1 << 8 * dtype.itemsize) if dtype.kind == "i" and value > np.iinfo(dtype).max else value


def each(function: Callable[..., int], dtype: np.dtype[Any], *operands: np.ndarray) -> np.ndarray:
    """The function on Python's integers, wrapped around."""
    return np.array([wrapped(function(*map(int, o)), dtype) for o in zip(*operands)], dtype)


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("opcode", EXACT)
def test_arithmetic_rounds_once(opcode: str, kind: str) -> None:
    values = hard_floats(FLOATS[kind], 6)
    a, b = pairs(values[np.isfinite(values) & (values != 0)])
    want = np.array(
        [nearest(EXACT[opcode](Fraction(float(x)), Fraction(float(y))), FLOATS[kind]) for x, y in zip(a, b)]
    )
    got = compute(f"{opcode}.{kind} y, x0, x1;", FLOATS[kind], a, b)
    nonzero = want != 0  # the sign of zeros is tested apart
    assert_bits(got[nonzero], want[nonzero])
    assert not got[~nonzero].any()


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize(("opcode", "function"), [("add.rn", np.add), ("mul.rn", np.multiply), ("div.rn", np.divide)])
def test_arithmetic_of_zeros_infinities_and_nan(opcode: str, function: np.ufunc, kind: str) -> None:
    a, b = pairs(np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan], FLOATS[kind]))
    with np.errstate(all="ignore"):
        assert_bits(compute(f"{opcode}.{kind} y, x0, x1;", FLOATS[kind], a, b), function(a, b))


@pytest.mark.parametrize("kind", FLOATS)
def test_square_root(kind: str) -> None:
    a = hard_floats(FLOATS[kind], 50)
    with np.errstate(all="ignore"):
        assert_bits(compute(f"sqrt.rn.{kind} y, x0;", FLOATS[kind], a), np.sqrt(a))


@pytest.mark.parametrize(("kind", "pattern"), [("f16", 0x7FFF), ("f32", 0x7FFFFFFF)])
def test_nan_has_one_pattern(kind: str, pattern: int) -> None:
    bits = f"u{np.dtype(FLOATS[kind]).itemsize}"
    a = np.array([-np.nan, np.inf], FLOATS[kind])
    got = compute(f"sub.rn.{kind} y, x0, x0;", FLOATS[kind], a)
    assert got.view(bits).tolist() == [pattern, pattern]


def test_a_move_keeps_the_payload_of_a_nan() -> None:
    a = np.array([0x7F800001, 0xFFC12345], np.uint32).view(np.float32)
    assert compute("mov.f32 y, x0;", "u4", a).tolist() == a.view(np.uint32).tolist()


@pytest.mark.parametrize("kind", FLOATS)
def test_fused_multiply_add_rounds_once(kind: str) -> None:
    values = hard_floats(FLOATS[kind], 960)
    rng = np.random.default_rng(1)
    a, b = (rng.permutation(values[np.isfinite(values)])[:900] for _ in "ab")
    with np.errstate(all="ignore"):
        c = np.where(np.arange(900) % 2 == 0, rng.permutation(values)[:900], -(a * b)).astype(FLOATS[kind])
    c[~np.isfinite(c)] = 1
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c)]
    want = np.array([nearest(e, FLOATS[kind]) for e in exact])
    got = compute(f"fma.rn.{kind} y, x0, x1, x2;", FLOATS[kind], a, b, c)
    assert_bits(got[want != 0], want[want != 0])
    assert not got[want == 0].any()


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("opcode", ["min", "max", "min.NaN", "max.NaN"])
def test_minimum_and_maximum(opcode: str, kind: str) -> None:
    a, b = pairs(np.array([0.0, -0.0, 2.0, -3.0, np.inf, -np.inf, np.nan], FLOATS[kind]))

    def expected(x: Any, y: Any) -> Any:
        if np.isnan(x) or np.isnan(y):
            return x if np.isnan(y) == ("NaN" not in opcode) else y
        chosen = min if opcode.startswith("min") else max
        return chosen(x, y, key=lambda v: (v, -np.signbit(v).astype(int)))

    want = np.array([expected(x, y) for x, y in zip(a, b)])
    want[np.isnan(a) & np.isnan(b)] = np.nan
    assert_bits(compute(f"{opcode}.{kind} y, x0, x1;", FLOATS[kind], a, b), want)


FLUSHED = np.array([1e-40, -1e-40, 1.1754942e-38, 1.1754944e-38, 1.0, -0.0], np.float32)


@pytest.mark.parametrize(
    ("instruction", "want"),
    [
        ("add.rn.ftz.f32 y, x0, 0f00000000;", [0.0, 0.0, 0.0, 1.1754944e-38, 1.0, 0.0]),
        ("mul.rn.ftz.f32 y, x0, 0f3F000000;", [0.0, -0.0, 0.0, 0.0, 0.5, -0.0]),
        ("mul.rn.ftz.f32 y, x0, 0f7E800000;", [0.0, -0.0, 0.0, 1.0, 2.0**126, -0.0]),
        ("div.rn.ftz.f32 y, x0, x0;", [np.nan, np.nan, np.nan, 1.0, 1.0, np.nan]),
        ("sqrt.rn.ftz.f32 y, x0;", [0.0, -0.0, 0.0, 2.0**-63, 1.0, -0.0]),
        ("max.ftz.f32 y, x0, x0;", [0.0, -0.0, 0.0, 1.1754944e-38, 1.0, -0.0]),
        ("abs.ftz.f32 y, x0;", [0.0, 0.0, 0.0, 1.1754944e-38, 1.0, 0.0]),
        ("neg.f32 y, x0;", (-FLUSHED).tolist()),
        ("setp.gt.ftz.f32 %p0, x0, 0f00000000; selp.f32 y, 0f3F800000, 0f00000000, %p0;", [0, 0, 0, 1, 1, 0]),
        ("cvt.ftz.f64.f32 %w0, x0; cvt.rn.f32.f64 y, %w0;", [0.0, -0.0, 0.0, 1.1754944e-38, 1.0, -0.0]),
        ("cvt.f64.f32 %w0, x0; cvt.rn.ftz.f32.f64 y, %w0;", [0.0, -0.0, 0.0, 1.1754944e-38, 1.0, -0.0]),
        ("cvt.f64.f32 %w0, x0; cvt.rn.f32.f64 y, %w0;", FLUSHED.tolist()),
    ],
)
def test_subnormals_are_flushed_where_the_instruction_says_so(instruction: str, want: list[float]) -> None:
    assert_bits(compute(instruction, "f4", FLUSHED), np.array(want, np.float32))


RELATIONS = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt}
RELATIONS["ge"] = operator.ge


@pytest.mark.parametrize("relation", [*RELATIONS, *(f"{r}u" for r in RELATIONS), "num", "nan"])
def test_comparisons_of_floats(relation: str) -> None:
    a, b = pairs(np.array([0.0, -0.0, 1.0, -np.inf, np.nan], np.float32))
    unordered = np.isnan(a) | np.isnan(b)
    if relation in ("num", "nan"):
        want = unordered == (relation == "nan")
    else:
        want = np.where(unordered, len(relation) == 3, RELATIONS[relation[:2]](a, b))
    got = compute(f"setp.{relation}.f32 %p0, x0, x1; selp.u32 y, 1, 0, %p0;", "u4", a, b)
    assert got.tolist() == want.astype(int).tolist()


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("relation", RELATIONS)
def test_comparisons_of_integers(relation: str, kind: str) -> None:
    a, b = pairs(hard_integers(INTEGERS[kind]))
    got = compute(
        f"setp.{relation}.{kind} %p0|%p1, x0, x1; selp.u32 %r1, 1, 0, %p0; @%p1 add.u32 %r1, %r1, 2; mov.u32 y, %r1;",
        "u4",
        a,
        b,
    )
    assert got.tolist() == [1 if RELATIONS[relation](int(x), int(y)) else 2 for x, y in zip(a, b)]


def test_comparison_combined_with_a_predicate() -> None:
    a, b = pairs(np.arange(4, dtype=np.int32))
    got = compute("setp.lt.s32 %p0, x0, 2; setp.lt.and.s32 %p1, x1, 2, !%p0; selp.u32 y, 1, 0, %p1;", "u4", a, b)
    assert got.tolist() == [int(y < 2 and x >= 2) for x, y in zip(a, b)]


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add", operator.add),
        ("sub", operator.sub),
        ("mul.lo", operator.mul),
        ("min", min),
        ("max", max),
        ("div", quotient),
        ("rem", lambda a, b: a - quotient(a, b) * b),
    ],
)
def test_integer_arithmetic_wraps_around(opcode: str, function: Callable[..., int], kind: str) -> None:
    a, b = pairs(hard_integers(INTEGERS[kind]))
    if opcode in ("div", "rem"):
        a, b = a[b != 0], b[b != 0]
    got = compute(f"{opcode}.{kind} y, x0, x1;", INTEGERS[kind].str, a, b)
    assert got.tolist() == each(function, INTEGERS[kind], a, b).tolist()


@pytest.mark.parametrize("kind", INTEGERS)
def test_high_half_of_a_product(kind: str) -> None:
    dtype = INTEGERS[kind]
    a, b = pairs(hard_integers(dtype))
    got = compute(f"mul.hi.{kind} y, x0, x1;", dtype.str, a, b)
    assert got.tolist() == each(lambda x, y: x * y >> 8 * dtype.itemsize, dtype, a, b).tolist()


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind: str) -> None:
    twice = np.dtype(f"{INTEGERS[kind].kind}{2 * INTEGERS[kind].itemsize}")
    a, b = pairs(hard_integers(INTEGERS[kind]))
    got = compute(f"mul.wide.{kind} y, x0, x1; mad.wide.{kind} y, x0, x1, y;", twice.str, a, b)
    assert got.tolist() == each(lambda x, y: 2 * x * y, twice, a, b).tolist()


@pytest.mark.parametrize("kind", INTEGERS)
def test_shifts_past_the_width(kind: str) -> None:
    dtype = INTEGERS[kind]
    bits = 8 * dtype.itemsize
    a, count = (
        x.ravel() for x in np.meshgrid(hard_integers(dtype), np.array([0, 1, 15, 31, 32, 63, 64, 2**32 - 1], np.uint32))
    )
    left = compute(f"shl.b{bits} y, x0, x1;", dtype.str, a, count)
    right = compute(f"shr.{kind} y, x0, x1;", dtype.str, a, count)
    assert left.tolist() == each(lambda x, n: x << min(n, bits), dtype, a, count).tolist()
    assert right.tolist() == each(lambda x, n: x >> min(n, bits), dtype, a, count).tolist()


WORDS = np.array([0, 1, 2, 3, 0x80000000, 0xFFFFFFFF, 0x12345678, 0x00F0F000], np.uint32)


def reversed_bits(x: int) -> int:
    return int(f"{x:032b}"[::-1], 2)


@pytest.mark.parametrize(
    ("instruction", "function"),
    [
        ("not.b32 y, x0;", lambda x: ~x),
        ("cnot.b32 y, x0;", lambda x: x == 0),
        ("popc.b32 y, x0;", int.bit_count),
        ("clz.b32 y, x0;", lambda x: 32 - x.bit_length()),
        ("brev.b32 y, x0;", reversed_bits),
        ("bfind.u32 y, x0;", lambda x: x.bit_length() - 1),
        ("bfind.shiftamt.u32 y, x0;", lambda x: 32 - x.bit_length() if x else -1),
        ("bfe.u32 y, x0, 4, 12;", lambda x: x >> 4 & 0xFFF),
        ("bfe.s32 y, x0, 16, 16;", lambda x: (x >> 16) - (x >> 31 << 16)),
        ("bfi.b32 y, x0, 0xAAAAAAAA, 4, 8;", lambda x: 0xAAAAA00A | (x & 0xFF) << 4),
        ("prmt.b32 y, x0, 0x11223344, 0x0167;", lambda x: (x & 0xFF) << 24 | (x >> 8 & 0xFF) << 16 | 0x2211),
        ("prmt.b32 y, x0, 0, 0x888B;", lambda x: (x >> 7 & 1) * 0xFFFFFF00 | (x >> 31) * 0xFF),
        ("shf.l.wrap.b32 y, x0, 0x80000001, 36;", lambda x: 0x10 | x >> 28),
        ("shf.r.wrap.b32 y, x0, x0, 8;", lambda x: x >> 8 | x << 24),
        ("lop3.b32 y, x0, 0xFF00FF00, 0x0F0F0F0F, 0x96;", lambda x: x ^ 0xFF00FF00 ^ 0x0F0F0F0F),
        ("lop3.b32 y, x0, 0xFF00FF00, 0x0F0F0F0F, 0xCA;", lambda x: (x & 0xFF00FF00) | (~x & 0x0F0F0F0F)),
        ("mov.b32 {%h0, %h1}, x0; mov.b32 y, {%h1, %h0};", lambda x: x >> 16 | x << 16),
        ("mov.b32 {_, %h1}, x0; cvt.u32.u16 y, %h1;", lambda x: x >> 16),
        ("slct.u32.s32 y, 1, 2, x0;", lambda x: 1 + (x >> 31)),
    ],
)
def test_instructions_on_words(instruction: str, function: Callable[[int], int]) -> None:
    assert compute(instruction, "u4", WORDS).tolist() == each(function, np.dtype("u4"), WORDS).tolist()


def test_count_leading_zeros_of_64_bits() -> None:
    a = np.array([0, 1, 2**31, 2**32, 2**63, 2**64 - 1], np.uint64)
    assert compute("clz.b64 y, x0;", "u4", a).tolist() == [64, 63, 32, 31, 0, 0]


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_conversions_between_floats_round_once(target: str, source: str) -> None:
    values = hard_floats(FLOATS[source], 900)
    if np.dtype(FLOATS[target]).itemsize < np.dtype(FLOATS[source]).itemsize:
        # Halfway between neighbours, and a little beside: rounding to a third type on the way would show.
        half = np.nextafter(FLOATS[target](1), FLOATS[target](2)).astype(FLOATS[source]) / 2 + FLOATS[source](0.5)
        values = np.concatenate(
            (values, [half, np.nextafter(half, FLOATS[source](2)), np.nextafter(half, FLOATS[source](0))])
        )
    values = values.astype(FLOATS[source])
    rounding = ".rn" if np.dtype(FLOATS[target]).itemsize < np.dtype(FLOATS[source]).itemsize else ""
    got = compute(f"cvt{rounding}.{target}.{source} y, x0;", FLOATS[target], values)
    finite = np.isfinite(values) & (values != 0)
    want = np.array([nearest(Fraction(float(x)), FLOATS[target]) for x in values[finite]])
    assert_bits(np.abs(got[finite]), np.abs(want))
    with np.errstate(invalid="ignore"):
        assert_bits(got[~finite], values[~finite].astype(FLOATS[target]))
    assert (np.signbit(got) == np.signbit(values))[~np.isnan(values)].all()


def test_float64_to_float16_is_not_rounded_by_way_of_float32() -> None:
    a = np.array([1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-11, 1 + 3 * 2.0**-11 - 2.0**-40])
    assert compute("cvt.rn.f16.f64 y, x0;", "f2", a).tolist() == [1 + 2.0**-10, 1.0, 1 + 2.0**-10]


@pytest.mark.parametrize("target", ["u8", "s8", *INTEGERS])
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize(
    ("mode", "integral"), [("rzi", np.trunc), ("rni", np.rint), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_floats_to_integers_saturate(mode: str, integral: np.ufunc, source: str, target: str) -> None:
    dtype = np.dtype(("u" if target[0] == "u" else "i") + str(int(target[1:]) // 8))
    info = np.iinfo(dtype)
    values = np.array(
        [0.5, 1.5, 2.5, -0.5, -1.5, 3.7, -3.7, 126.9, 255.5, -300, 4e4, 3e9, -3e9, 1e19, 1e30, -1e30, np.inf, -np.inf]
    )
    with np.errstate(over="ignore"):
        values = values.astype(FLOATS[source])
    want = [
        info.max if x == np.inf else info.min if x == -np.inf else min(max(int(integral(x)), info.min), info.max)
        for x in values
    ]
    register = "%h0" if dtype.itemsize == 1 else "y"
    widen = f"cvt.{target[0]}16.{target} y, %h0;" if dtype.itemsize == 1 else ""
    got = compute(
        f"cvt.{mode}.{target}.{source} {register}, x0; {widen}", f"{dtype.kind}{max(2, dtype.itemsize)}", values
    )
    assert got.tolist() == want


@pytest.mark.parametrize(
    ("target", "source", "want"),
    [("s32", "f32", 0), ("u32", "f16", 0), ("s32", "f64", -(2**31)), ("u32", "f64", 2**31), ("s64", "f32", -(2**63))],
)
def test_nan_to_integer(target: str, source: str, want: int) -> None:
    a = np.array([np.nan], FLOATS[source])
    assert compute(f"cvt.rzi.{target}.{source} y, x0;", INTEGERS[target].str, a).tolist() == [want]


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", FLOATS)
def test_integers_to_floats(target: str, source: str) -> None:
    a = np.concatenate((hard_integers(INTEGERS[source]), np.array([2**k + 1 for k in range(15)], INTEGERS[source])))
    want = np.array([nearest(Fraction(int(x)), FLOATS[target]) for x in a])
    assert_bits(compute(f"cvt.rn.{target}.{source} y, x0;", FLOATS[target], a), want)


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_integers_to_integers(target: str, source: str) -> None:
    a, dtype = hard_integers(INTEGERS[source]), INTEGERS[target]
    info = np.iinfo(dtype)
    assert compute(f"cvt.{target}.{source} y, x0;", dtype.str, a).tolist() == each(int, dtype, a).tolist()
    saturated = [min(max(int(x), info.min), info.max) for x in a]
    assert compute(f"cvt.sat.{target}.{source} y, x0;", dtype.str, a).tolist() == saturated


def test_low_part_of_a_register_is_extended() -> None:
    a = np.array([0x1280, 0x127F, 0xFFFF], np.uint16)
    assert compute("cvt.s32.s8 y, x0;", "i4", a).tolist() == [-128, 127, -1]
    assert compute("cvt.u32.u8 y, x0;", "u4", a).tolist() == [0x80, 0x7F, 0xFF]


@pytest.mark.parametrize(
    ("opcode", "want"), [("rni", [2, -2, 2]), ("rzi", [1, -1, 2]), ("rmi", [1, -2, 2]), ("rpi", [2, -1, 3])]
)
def test_rounding_to_integral_floats(opcode: str, want: list[float]) -> None:
    a = np.array([1.5, -1.5, 2.5], np.float32)
    assert compute(f"cvt.{opcode}.f32.f32 y, x0;", "f4", a).tolist() == want


def test_saturating_float() -> None:
    a = np.array([-1.0, 0.25, 2.0, np.nan, -0.0], np.float32)
    assert_bits(compute("cvt.sat.f32.f32 y, x0;", "f4", a), np.array([0, 0.25, 1, 0, 0], np.float32))


def test_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    a = hard_floats(np.float32, 900)
    a = a[~np.isnan(a)]
    want = a.astype(ml_dtypes.bfloat16)
    assert compute("cvt.rn.bf16.f32 y, x0;", "u2", a).tolist() == want.view(np.uint16).tolist()
    assert_bits(compute("cvt.f32.bf16 y, x0;", "f4", want.view(np.uint16)), want.astype(np.float32))
    assert compute("cvt.rn.bf16.f32 y, x0;", "u2", np.array([-np.nan], np.float32)).tolist() == [0x7FFF]


@pytest.mark.parametrize(("kind", "one", "two"), [("f16x2", 0x3C00, 0x4000), ("bf16x2", 0x3F80, 0x4000)])
def test_packed_halves(kind: str, one: int, two: int) -> None:
    a = np.ones(3, np.float32)
    assert compute(f"cvt.rn.{kind}.f32 y, x0, 0f40000000;", "u4", a).tolist() == [one << 16 | two] * 3


@pytest.mark.parametrize(
    "instruction",
    [
        "rsqrt.approx.f32 y, x0;",
        "add.rz.f32 y, x0, x0;",
        "mul.rn.sat.f32 y, x0, x0;",
        "add.cc.u32 y, x0, x0;",
        "cvt.rm.f32.f64 y, x0;",
        "call f;",
        "ld.global.mystery.f32 y, [%at2];",
        "mov.u32 y, %clock;",
    ],
)
def test_what_is_not_known_is_refused(instruction: str) -> None:
    with pytest.raises(NotImplementedError, match=instruction.split()[0] if "%clock" not in instruction else "%clock"):
        compute(instruction, "f4", np.ones(1, np.float32))


def test_parameters_are_read_from_the_head_of_a_kernel() -> None:
    text = b".visible .entry k(.param .align 8 .b8 t[24], .param .f32 x, .param .u64 .ptr .global .align 4 p) { ret; }"
    kernel = ptx.Module(text).kernels["k"]
    assert [(p.name, p.nbytes, p.align) for p in kernel.parameters] == [("t", 24, 8), ("x", 4, 4), ("p", 8, 8)]
