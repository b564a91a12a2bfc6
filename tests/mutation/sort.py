"""Row ids: their sort, and the check of their range."""

from typing import Any
from unittest import mock

import numpy as np

from tests.cuda_support import assert_bits
from tests.device_support import cupy
from tests.mutation.machine import device

from gpurms.kernels import cuda_rows  # isort: skip - it imports CuPy


def sort(ids: np.ndarray, n_rows: int) -> None:
    """The library's sort against NumPy's, ids out of range last."""
    key = np.dtype(np.uint32 if n_rows < 1 << 32 else np.uint64)
    n = ids.size
    with device():
        memory = [cupy.empty(n, dtype) for dtype in (key, np.int32, key, np.int32)]
        counts = cupy.empty(cuda_rows.DIGITS * (cuda_rows.n_tiles(n) + 1), np.int32)
        run_sort = cuda_rows._Sort(cupy.array(ids), n_rows, [m.data.ptr for m in memory], counts.data.ptr)
        run_sort()
        where = next(i for i, m in enumerate(memory) if m.data.ptr == run_sort.keys)
        wide = ids.astype(object)
        keys = np.array([int(i) if 0 <= i < n_rows else n_rows for i in wide], key)
        order = np.argsort(keys, kind="stable")
        assert_bits(memory[where].get(), keys[order])
        assert_bits(memory[where + 1].get().view(np.uint32), order.astype(np.uint32))


def some_ids(n: int, n_rows: int, dtype: Any, seed: int) -> np.ndarray:
    """Ids of which many are equal, with some outside."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, n_rows, n)
    ids[rng.random(n) < 0.3] = rng.integers(0, min(n_rows, 9))
    outside = [-1, n_rows, n_rows - 1, 0, n_rows + 1, np.iinfo(dtype).max, np.iinfo(dtype).min]
    ids[rng.permutation(n)[: 2 * len(outside)]] = np.clip(outside * 2, np.iinfo(dtype).min, np.iinfo(dtype).max)
    return ids.astype(dtype)


def one_tile() -> None:
    sort(some_ids(1500, 70_000, np.int32, 0), 70_000)


def full_tile() -> None:
    sort(some_ids(cuda_rows.TILE, 255, np.int32, 1), 255)


def three_tiles() -> None:
    sort(some_ids(2 * cuda_rows.TILE + 77, 300, np.int64, 2), 300)


def tile_of_large_ids() -> None:
    sort(some_ids(300, 1 << 40, np.int64, 3), 1 << 40)


def many_tiles() -> None:
    """More than 256 tiles; only their counts are summed."""
    n_tiles = 600
    counts = np.random.default_rng(5).integers(0, 4096, (256, n_tiles)).astype(np.int32)
    with device():
        there, totals = cupy.array(counts), cupy.empty(256, np.int32)
        ids = cupy.zeros(cuda_rows.TILE + 1, np.int32)
        memory = [cupy.empty(ids.size, np.int32) for _ in range(4)]
        room = cupy.empty(256 * 3, np.int32)
        add = cuda_rows._Sort(ids, 9, [m.data.ptr for m in memory], room.data.ptr).kernels[1]
        add(256, cuda_rows.THREADS, there, n_tiles, totals)
        assert_bits(there.get().view(np.uint32).ravel(), (counts.cumsum(1) - counts).astype(np.uint32).ravel())
        assert_bits(totals.get().view(np.uint32), counts.sum(1).astype(np.uint32))


def ids_outside() -> None:
    """With fewer blocks than ids need; the lowest offset is found, and none where there is none."""
    with device(), mock.patch.object(cuda_rows, "min", lambda blocks, limit: min(blocks, 2), create=True):
        for dtype in (np.int32, np.int64):
            ids = np.arange(1700) % 50
            none = cuda_rows.find_outside([(cupy.array(ids.astype(dtype)), 50)])
            outside = ids.astype(np.int64)
            large = [2**32, -(2**32), 50] if dtype == np.int64 else [51, -(2**31), 50]
            outside[[900, 1200, 1699]] = large
            requests = [outside, outside[901:], outside[1201:], outside[900:901]]
            found = cuda_rows.find_outside([(cupy.array(each.astype(dtype)), 50) for each in requests])
            assert (none, found) == ([None], [900, 299, 498, 0])
