"""Integer instructions that NumPy has no function for. All wrap around."""

import numpy as np

from tests.device.ptx.floats import Function


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The quotient, towards zero."""
    quotient = a // b
    if a.dtype.kind == "u":
        return quotient
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0)))


def multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product."""
    half = 4 * a.itemsize
    mask = a.dtype.type((1 << half) - 1)
    shift = a.dtype.type(half)
    a_low, a_high = a & mask, a >> shift
    b_low, b_high = b & mask, b >> shift
    unsigned = f"u{a.itemsize}"
    low = ((a_low * b_low).view(unsigned) >> shift.view(unsigned)).view(a.dtype)
    middle = a_high * b_low + low
    cross = (middle & mask) + a_low * b_high
    return a_high * b_high + (middle >> shift) + (cross >> shift)


def wide(a: np.ndarray) -> np.ndarray:
    """The same value in twice the bits."""
    return a.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def shift(function: np.ufunc) -> Function:
    """Shifts by the width or more leave nothing but the sign."""
    return lambda a, count: function(a, np.minimum(count, 8 * a.itemsize).astype(a.dtype))


def count_leading_zeros(a: np.ndarray) -> np.ndarray:
    """As many as there are bits for 0."""
    return np.uint32(8 * a.itemsize) - bit_length(a)


def bit_length(a: np.ndarray) -> np.ndarray:
    """The position of the highest set bit, from 1; 0 for 0."""
    for step in (1, 2, 4, 8, 16, 32)[: 3 + a.itemsize.bit_length() - 1]:
        a = a | (a >> a.dtype.type(step))
    return np.bitwise_count(a).astype(np.uint32)


def reverse_bits(a: np.ndarray) -> np.ndarray:
    """The lowest bit becomes the highest."""
    octets = np.ascontiguousarray(a).view(np.uint8).reshape(-1, a.itemsize)
    bits = np.unpackbits(octets, axis=1, bitorder="little")[:, ::-1]
    return np.ascontiguousarray(np.packbits(bits, axis=1, bitorder="little")).view(a.dtype)[:, 0]


def find_highest(a: np.ndarray, shift_amount: bool) -> np.ndarray:
    """The number of the highest bit that differs from the sign, or how far to shift it to the top; all ones if none."""
    if a.dtype.kind == "i":
        a = (a ^ (a >> a.dtype.type(8 * a.itemsize - 1))).view(f"u{a.itemsize}")
    length = bit_length(a)
    found = np.uint32(8 * a.itemsize) - length if shift_amount else length - np.uint32(1)
    return np.where(length == 0, np.uint32(0xFFFFFFFF), found)


def extract_field(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: `length` bits from `start`, extended by their own highest bit if signed."""
    bits = 8 * a.itemsize
    start, length = (start & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
    taken = np.minimum(np.minimum(length, np.maximum(bits - start, 0)), bits)
    value = shift(np.right_shift)(a, start.astype(np.uint32))
    sign_bit = shift(np.right_shift)(a, np.clip(start + length - 1, 0, bits - 1).astype(np.uint32)) & a.dtype.type(1)
    keep = shift(np.left_shift)(np.ones_like(value), taken.astype(np.uint32)) - a.dtype.type(1)
    fill = ~keep if a.dtype.kind == "i" else np.zeros_like(keep)
    return np.where(length == 0, a.dtype.type(0), (value & keep) | np.where(sign_bit != 0, fill, a.dtype.type(0)))


def insert_field(field: np.ndarray, into: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfi: the low `length` bits of the field replace those of `into` from `start`."""
    one = np.ones_like(into)
    start, length = start & np.uint32(255), length & np.uint32(255)
    mask = shift(np.left_shift)(shift(np.left_shift)(one, length) - one, start)
    return (into & ~mask) | (shift(np.left_shift)(field, start) & mask)


def permute_bytes(a: np.ndarray, b: np.ndarray, selectors: np.ndarray) -> np.ndarray:
    """prmt: each nibble selects one of the eight bytes of b:a, or with its top bit that byte's sign eight times."""
    octets = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.uint32(0)
    for number in range(4):
        selector = (selectors >> np.uint32(4 * number)).astype(np.uint64)
        octet = (octets >> ((selector & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(octet >= 0x80, np.uint64(0xFF), np.uint64(0))
        octet = np.where((selector & np.uint64(8)) != 0, sign, octet)
        result = result | (octet.astype(np.uint32) << np.uint32(8 * number))
    return result


def funnel(left: bool, wrap: bool) -> Function:
    """shf: one word of the 64 bits high:low, shifted by up to 32."""

    def function(low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
        amount = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(np.uint64)
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        return ((both << amount) >> np.uint64(32) if left else both >> amount).astype(np.uint32)

    return function


def lookup(table: int) -> Function:
    """lop3: any function of three bits, given as its table of values."""

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                terms = [x if row >> bit & 1 else ~x for x, bit in ((a, 2), (b, 1), (c, 0))]
                result = result | (terms[0] & terms[1] & terms[2])
        return result

    return function
