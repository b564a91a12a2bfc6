"""Sparse gradients: runs and their sums, layouts of rows."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from gpurms.kernels import cpu
from gpurms.kernels.rule import FLOAT32, Flags, Update
from tests.cuda_support import assert_bits, assert_updated, rule, update_on_cpu, update_on_gpu
from tests.device_support import cupy
from tests.mutation.dense import shifted
from tests.mutation.machine import device

from gpurms.kernels import cuda_norm, cuda_rows  # isort: skip - they import CuPy


def segments(lengths: list[int], n_rows: int, seed: int = 0) -> np.ndarray:
    """Ids in random order: of some rows as often as the lengths say, and a few outside."""
    rows = np.random.default_rng(seed).permutation(n_rows)[: len(lengths)]
    ids = np.concatenate([np.repeat(rows, lengths), [-1, n_rows, n_rows, 2**31 - 1]])
    return np.random.default_rng(seed + 1).permutation(ids).astype(np.int32)


def sparse(
    flags: Flags, shape: tuple[int, ...], ids: np.ndarray, *, layout: Callable[[Any], Any] = lambda x: x,
    blocks: int | None = None, past: int = 0, skip: float | None = None,
) -> None:  # fmt: skip
    """One step on some rows of a table."""
    rng = np.random.default_rng(1)
    the_rule = rule(flags, np.float32)
    names = ["var", "rms"] + ["mom"] * flags.has_momentum + ["mg"] * flags.centered
    host = {name: rng.standard_normal(shape).astype(np.float32) for name in names}
    host["rms"] = abs(host["rms"])
    values = rng.standard_normal((len(ids), *shape[1:])).astype(np.float32)
    none = {name: None for name in ("mom", "mg") if name not in names}
    inside = (ids >= 0) & (ids < shape[0])
    with device(), mock.patch.object(cuda_rows, "MAX_BLOCKS", blocks or cuda_rows.MAX_BLOCKS):
        there = {name: layout(shifted(array, past)) for name, array in host.items()}
        factors = cupy.array(np.array([3.0, 0.6], np.float32))
        placed = cuda_norm.Factor(factors, 1, None) if flags.has_factor else None
        if skip is not None:
            the_rule = the_rule._replace(skip={0: cupy.array([skip], np.float32)})
        got = Update(**there, **none, rule=the_rule, grad=cupy.array(values), indices=cupy.array(ids), factor=placed)
        update_on_gpu([got])
        factor = np.float32(0.6) if flags.has_factor else None
        chosen = {"grad": values[inside], "indices": ids[inside], "factor": factor}
        want = Update(**{k: v.copy() for k, v in host.items()}, **none, rule=the_rule, **chosen)
        if not skip:
            update_on_cpu([want])
        assert_updated(got, want)


def left_out() -> None:
    """The device knows whether the step happens: rows of few values, and of many."""
    for skip in (0.0, 1.0, -2.0):
        sparse(Flags(), (4, 3), segments([1, 2, 40], 4), skip=skip)


def strided(array: Any) -> Any:
    """The same elements, with gaps between them and the two axes of a row swapped in memory."""
    n, rows, columns = array.shape
    room = cupy.empty((n, 2 * columns, rows), array.dtype)
    view = room[:, ::2].swapaxes(1, 2)
    view[...] = array
    return view


def hot_rows() -> None:
    """Three levels of sums; rows of one, two, 31, 32, 33 and more values; one block takes several turns."""
    lengths = [1] * 41 + [2] * 9 + [31, 32, 33, 34, 63, 64, 65, 96, 97, 1024, 1025, 1089]
    ids = segments(lengths, 100)
    sparse(Flags(has_momentum=True, centered=True, has_factor=True, clip_value=True), (100, 3), ids, blocks=5)


def hottest_row() -> None:
    """Runs that begin at every place of a warp."""
    sparse(Flags(), (30, 1), segments([7, 2100, 45, 3, 1100, 64, 1, 33, 500], 30), past=1)


def rows_at_edges() -> None:
    """Long segments that begin at the last, the first and the second place of a warp; close ones; many ids outside."""
    lengths = [31, 1057, 1025, 1056, *[33] * 12, 2, 97]
    ids = np.concatenate([np.repeat(np.arange(len(lengths)), lengths), np.full(45, 50)]).astype(np.int32)
    sparse(Flags(), (len(lengths), 1), np.random.default_rng(1).permutation(ids))


def one_place_in_the_last_warp() -> None:
    sparse(Flags(), (40, 2), np.arange(33, dtype=np.int32))


def hottest() -> None:
    """Four levels of sums."""
    ids = np.full(32**3 + 40, 1, np.int32)
    ids[:3] = 0
    sparse(Flags(), (2, 1), ids)


def packed_rows() -> None:
    sparse(Flags(has_momentum=True, centered=True), (40, 24), segments([1] * 20 + [40, 3, 70], 40))


def packed_wide_rows() -> None:
    sparse(Flags(), (4, 256 + 8), segments([2, 40], 4), blocks=2)


def wide_rows() -> None:
    """Not aligned; the last row of the table, and the last of the values, too."""
    ids = np.array([5, 1, 3] + [4] * 34 + [3, 5], np.int32)
    sparse(Flags(), (6, 300), ids, blocks=3, past=1)


def strided_rows() -> None:
    flags = Flags(has_momentum=True, centered=True)
    sparse(flags, (20, 3, 5), segments([1, 1, 2, 5, 40], 20), layout=strided)


def added_rows() -> None:
    ids = segments([1, 2, 33, 100], 12)
    values = np.random.default_rng(3).standard_normal((len(ids), 5)).astype(np.float32)
    host = np.random.default_rng(4).standard_normal((12, 5)).astype(np.float32)
    inside = (ids >= 0) & (ids < 12)
    with device():
        there = cupy.array(host)
        cuda_rows.add_rows(there, cupy.array(ids), cupy.array(values), FLOAT32)
        with cpu.use_engine("numpy"):
            cpu.add_rows(host, ids[inside], values[inside])
        assert_bits(there.get().ravel(), host.ravel())
