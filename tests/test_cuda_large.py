"""Launches past 2**31 elements: a few blocks of them run, on address space of which only touched pages are memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tests.device_support", reason="CuPy and NVRTC are needed")

from tests.cuda_large import TALL, TALL_IDS, check_of_ids, dense, long_rows, many_ids, norm, sparse
from tests.cuda_support import replaced
from tests.device.machine import Machine
from tests.device_support import Fault, cupy_on_cpu
from tests.support import BFLOAT16


@pytest.fixture
def machine() -> Iterator[Machine]:
    with cupy_on_cpu() as machine:
        yield machine


# -------------------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("past", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_dense_variables(machine: Machine, dtype: Any, past: int) -> None:
    dense(machine, dtype, past)


@pytest.mark.parametrize(
    ("old", "new", "past"),
    [
        ("int64 start = ", "int start = ", 0),
        ("int64 n = t.n - start;", "int n = t.n - start;", 1),
        (
            "(blockIdx.x - t.first_tile) * (THREADS * VECTOR)",
            "(int)(blockIdx.x - t.first_tile) * (THREADS * VECTOR)",
            0,
        ),
    ],
)
def test_a_planted_32_bit_index_into_dense_variables_is_seen(machine: Machine, old: str, new: str, past: int) -> None:
    with replaced("multi.cu", old, new), pytest.raises((Fault, AssertionError)):
        dense(machine, np.float32, past)


# --------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"past": 1}, {"columns": slice(None, None, 2)}, {"columns": slice(1, 60)}],
    ids=["packed", "unaligned", "strided", "parts of rows"],
)
def test_rows_of_a_table(machine: Machine, options: Any, dtype: Any) -> None:
    sparse(machine, (TALL, 64), TALL_IDS, dtype, **options)


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("T* at = rows.data + {};", {"columns": slice(0, 9, 2)}),
        ("read<PACKED>(rows.data + {} + left", {}),
        ("write<PACKED>(rows.data + {} + left", {}),
    ],
)
def test_a_planted_32_bit_row_offset_is_seen(machine: Machine, line: str, options: Any) -> None:
    place = "row * rows.stride"
    with (
        replaced("rows.cu", line.format(place), line.format(f"(int)({place})")),
        pytest.raises((Fault, AssertionError)),
    ):
        sparse(machine, (TALL, 64), TALL_IDS, **options)


@pytest.mark.parametrize("n_rows", [2**31 + 1, 2**32 - 1, 2**32, 2**33 + 3])
@pytest.mark.parametrize("repeats", [1, 900], ids=["one tile", "several tiles"])
def test_ids_near_2_32_rows(machine: Machine, n_rows: int, repeats: int) -> None:
    few = [
        n_rows - 1,
        0,
        n_rows,
        2**31 - 1,
        2**31,
        n_rows - 2,
        7,
        -1,
        n_rows - 1,
        2**32,
        2**32 - 1,
        -(2**63),
        2**63 - 1,
    ]
    sparse(machine, (n_rows,), few * (repeats // len(few) * 8 + 1))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("uint64 id = (uint64)(int64)ids[i];", "uint32 id = (uint32)ids[i];"),
        ("return id < n_rows ? (key_t)id : n_rows;", "return id < n_rows ? (key_t)(uint32)id : n_rows;"),
    ],
)
def test_planted_32_bit_ids_are_seen(machine: Machine, old: str, new: str) -> None:
    with replaced("sort.cu", old, new), pytest.raises((Fault, AssertionError)):
        sparse(machine, (2**33 + 3,), [2**33, 5, 2**32 + 5])


@pytest.mark.parametrize(
    "options",
    [{}, {"n": 1, "n_columns": 2**31 + 9000}, {"n": 1, "n_columns": 2**31 + 9001, "step": 2}],
    ids=["together", "in one row", "in one strided row"],
)
def test_values(machine: Machine, options: Any) -> None:
    long_rows(machine, **options)


def test_a_planted_32_bit_offset_into_values_is_seen(machine: Machine) -> None:
    old = "order[run.start + k] * row_size + left"
    with replaced("rows.cu", old, f"(int)({old})"), pytest.raises((Fault, AssertionError)):
        long_rows(machine)


def test_as_many_ids_as_there_may_be(machine: Machine) -> None:
    many_ids(machine, 2**30)


def test_more_ids_are_refused(machine: Machine) -> None:
    with pytest.raises(ValueError, match="may have up to"):
        many_ids(machine, 2**30 + 1)


@pytest.mark.parametrize(("dtype", "n"), [(np.int32, 2**31 + 9000), (np.int64, 2**31 + 9000), (np.int32, 2**32 + 77)])
def test_the_check_of_ids(machine: Machine, dtype: Any, n: int) -> None:
    check_of_ids(machine, dtype, n)


@pytest.mark.parametrize("old", ["for (int64 i = (int64)", "atomicMin(found, (uint64)i)"])
def test_a_planted_32_bit_place_of_an_id_is_seen(machine: Machine, old: str) -> None:
    new = {"for (int64 i = (int64)": "for (int i = (int64)"}.get(old, "atomicMin(found, (uint64)(uint32)i)")
    with replaced("sort.cu", old, new), pytest.raises((Fault, AssertionError)):
        check_of_ids(machine, np.int32, 2**32 + 77)


# -------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_norms(machine: Machine, dtype: Any) -> None:
    norm(machine, dtype)


def test_a_planted_32_bit_start_of_a_chunk_is_seen(machine: Machine) -> None:
    with replaced("norm.cu", "int64 start = ", "int start = "), pytest.raises((Fault, AssertionError)):
        norm(machine, np.float32)
