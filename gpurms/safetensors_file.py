"""The safetensors format, streamed: a JSON header of types, shapes and offsets, then the bytes of the arrays.

The safetensors package needs each array in host memory, contiguous; here any array is written and read in place, by
blocks.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from io import BufferedIOBase, BufferedReader
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from gpurms import backend

Array = Any  # numpy.ndarray or cupy.ndarray

BLOCK = 4 << 20
"""Bytes that are copied at a time where an array cannot be written or read as it lies."""
PAGE = 4096
"""Bytes of memory that exist from the first time that one of them is written."""
MAX_HEADER = 100_000_000
"""Bytes; what the safetensors package reads."""
MAX_DIMENSIONS = 64
"""NumPy's."""

CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "int64": "I64"}
_TYPES = {code: (name, int(code[-2:]) // 8) for name, code in CODES.items()}


class Tensor(NamedTuple):
    """An array in a file: its type by NumPy's name, and the offset of its first byte from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def write(file: BufferedIOBase, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write arrays in C order.

    The widest types come first, so that every item is aligned for those who map the file.
    """
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    stop = 0
    for name, array in ordered:
        start, stop = stop, stop + array.nbytes
        header[name] = {"dtype": CODES[array.dtype.name], "shape": array.shape, "data_offsets": (start, stop)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"{len(arrays)} arrays need a header of {len(text)} bytes; safetensors allows {MAX_HEADER}")
    file.write(len(text).to_bytes(8, "little") + text)
    for _, array in ordered:
        for block in _blocks(array):
            home = backend.require(block)
            host = np.ascontiguousarray(block) if home.device(block) is None else home.host(block)
            file.write(host.data)


def read_into(file: BufferedReader, tensor: Tensor, array: Array, is_slot: bool = False) -> None:
    """Read a tensor into an array of its type and shape, in any layout.

    A table's slots occupy memory only where rows were touched; ``is_slot`` keeps it so.
    """
    file.seek(tensor.start)
    for block in _blocks(array):
        home = backend.require(block)
        in_place = home.device(block) is None and block.flags.c_contiguous
        has_untouched = is_slot and in_place and not _touched(block).all()
        host = block if in_place and not has_untouched else np.empty(block.shape, block.dtype)
        if file.readinto(host.data) != host.nbytes:
            raise OSError(errno.EIO, "the file has become shorter", file.name)
        if not in_place:
            home.write(block, home.convert(block, host, str(file.name)))
        elif has_untouched:
            _write_pages(block, host)


def _write_pages(array: Array, values: Array) -> None:
    """Write values, but not where zeros stay zeros."""
    touched = _touched(array) | _touched(values)
    _pages(array)[touched] = _pages(values)[touched]
    rest = slice(_pages(array).size, None)
    array[rest] = values[rest]


def _touched(bits: Array) -> Array:
    """Of each whole page, whether it is not all zeros."""
    return _pages(bits).max(axis=1, initial=0) > 0


def _pages(bits: Array) -> Array:
    """The whole pages, one a row."""
    n = PAGE // bits.itemsize
    return bits[: bits.size // n * n].reshape(-1, n)


def _blocks(array: Array) -> Iterator[Array]:
    """Views of at most ``BLOCK`` bytes that make up the array in C order, as unsigned integers: all bits count."""
    return _cut(backend.require(array).view(array).view(f"u{array.dtype.itemsize}"))


def _cut(bits: Array) -> Iterator[Array]:
    if bits.flags.c_contiguous:
        bits = bits.reshape(-1)
    if bits.nbytes <= BLOCK:
        yield bits
    elif n_rows := BLOCK // (bits.nbytes // len(bits)):
        for start in range(0, len(bits), n_rows):
            yield bits[start : start + n_rows]
    else:
        for row in bits:
            yield from _cut(row)


def read_header(file: BufferedReader) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors by name; everything is checked.

    Raises:
        ValueError: the file is no safetensors file, is damaged or truncated, or holds types unknown here.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError(
            f"{file.name}: no safetensors file, or a truncated one: {size} bytes, of which a header would be {length}"
        )
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_repeats)
        metadata = header.pop("__metadata__", {})
        spans = {name: _span(**fields) for name, fields in header.items()}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata other than strings")
        _check_cover(sorted((start, stop) for _, _, start, stop in spans.values()), size - 8 - length)
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{file.name}: no safetensors file, or a damaged or truncated one: {error!s:.200}") from error
    return metadata, {
        name: Tensor(dtype, shape, 8 + length + start) for name, (dtype, shape, start, _) in spans.items()
    }


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("the same name twice")
    return fields


def _span(dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[str, tuple[int, ...], int, int]:
    start, stop = data_offsets
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions; at most {MAX_DIMENSIONS} are possible")
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in (*shape, start, stop)):
        raise ValueError(f"shape {shape!r:.80}, offsets {data_offsets!r:.80}")
    if dtype not in _TYPES:
        raise ValueError(f"type {dtype!r:.80}; known are {', '.join(_TYPES)}")
    name, itemsize = _TYPES[dtype]
    too_large = math.prod(n or 1 for n in shape) * itemsize >= 1 << 63  # for NumPy, whether it is empty or not
    if too_large or stop - start != math.prod(shape) * itemsize:
        raise ValueError(f"{dtype} of shape {shape!r:.80} at offsets {data_offsets}")
    return name, tuple(shape), start, stop


def _check_cover(spans: list[tuple[int, int]], size: int) -> None:
    """ValueError unless the sorted spans follow each other from the first byte of the data to the last."""
    for (_, stop), (start, _) in pairwise([(0, 0), *spans, (size, size)]):
        if start != stop:
            raise ValueError(f"data expected at offset {stop} of {size}, found at {start}")
