"""Does the GPU leave the same bits as NumPy?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import cupy
import numpy as np

from bench.answer import Answer, Goal
from bench.gpu.dense import DTYPES, as_dtype
from bench.gpu.stage import attempt
from gpurms import IndexedSlices, RMSprop
from gpurms.kernels import cpu

STEPS = 3
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "centered": {"centered": True},
    "both": {"momentum": 0.9, "centered": True},
    "as PyTorch": {"momentum": 0.9, "eps_in_sqrt": False, "lr_in_momentum": False, "nesterov": True},
    "L2, maximize": {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True},
    "weight decay": {"weight_decay": 0.1, "momentum": 0.9},
    "clipvalue": {"clipvalue": 0.3},
    "clipnorm": {"clipnorm": 1.0},
    "global_clipnorm": {"global_clipnorm": 1.0, "clipvalue": 0.9},
}
MAIN = ("plain", "both")
SHAPES = ((0,), (), (1,), (7,), (1000,), (33, 65), (3, 4, 5), (100_003,))
STRIDED = ((40, 9), (1000,))
ROWS = ((), (3,), (64,), (5, 7), (1000,))
Pairs = list[tuple[Any, Any]]


def run(quick: bool) -> Iterator[Answer]:
    rules, dtypes = (MAIN, DTYPES[:2]) if quick else (tuple(RULES), DTYPES)
    setting = (
        f"elements of variables and slots that differ from NumPy's after {STEPS} steps on the same numbers, NaN and "
        "infinity among them; strided: every second element of Fortran arrays; sparse: 500 rows, one of them named by "
        "half of the ids"
    )
    answer = Answer("bits", "the same bits as NumPy", setting)
    yield answer
    for dtype in dtypes:
        for rule in rules if dtype == "float32" else MAIN:
            for kind in (dense, strided, sparse):
                if kind is strided and rule not in MAIN:
                    continue
                what = f"{kind.__name__}, {rule}, {dtype}"
                with attempt(answer, what):
                    pairs = kind(as_dtype(dtype), quick)
                    answer.add(what, "", [float(different(pairs, RULES[rule]))], Goal("<=", 0))
                yield answer


def different(pairs: Pairs, options: Mapping[str, Any]) -> int:
    """Elements in which a run on the GPU differs from one of NumPy."""
    with cpu.use_engine("numpy"):
        expected = _outcome([(grad, var.copy(order="K")) for grad, var in pairs], options)
    found = _outcome([(_on_device(grad), _on_device(var)) for grad, var in pairs], options)
    if len(expected) != len(found):
        raise ValueError(f"NumPy has {len(expected)} arrays, the GPU {len(found)}")
    return sum(_unequal(a, b) for a, b in zip(expected, found))


def _outcome(pairs: Pairs, options: Mapping[str, Any]) -> list[np.ndarray]:
    optimizer = RMSprop(0.01, **options)
    for _ in range(STEPS):
        with np.errstate(all="ignore"):
            optimizer.apply_gradients(pairs)
    return [*(_host(var) for _, var in pairs), *optimizer.get_weights()[1:]]


def _host(array: Any) -> np.ndarray:
    """A copy in host memory, of bits: CuPy need not know the type for that."""
    if isinstance(array, np.ndarray):
        return array.copy()
    bits: np.ndarray = array.view(f"u{array.dtype.itemsize}").get()
    return bits.view(array.dtype)


def _unequal(a: np.ndarray, b: np.ndarray) -> int:
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    bits = [np.ascontiguousarray(each).reshape(-1).view(unsigned) for each in (a, b)]
    numbers = [np.ascontiguousarray(each).reshape(-1).astype(np.float64) for each in (a, b)]
    both_nan = np.isnan(numbers[0]) & np.isnan(numbers[1])
    return int(((bits[0] != bits[1]) & ~both_nan).sum())


def _on_device(value: Any) -> Any:
    """A copy in the same memory order; of a strided array, with the same strides."""
    if isinstance(value, IndexedSlices):
        return IndexedSlices(cupy.asarray(value.values), cupy.asarray(value.indices))
    if value.ndim and not value.flags.c_contiguous and not value.flags.f_contiguous:
        base = cupy.asarray(value.base)
        return base[tuple(slice(None, None, 2) for _ in value.shape)]
    return cupy.array(value)


def _numbers(shape: Any, dtype: Any, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def _gradient(shape: Any, dtype: Any, seed: int) -> np.ndarray:
    grad = _numbers(shape, dtype, seed)
    if grad.size > 500:
        grad.flat[[17, 250, 499]] = np.nan, np.inf, 0.0
    return grad


def dense(dtype: Any, quick: bool) -> Pairs:
    shapes = [shape for shape in SHAPES if not quick or np.prod(shape) < 1000]
    return [(_gradient(shape, dtype, seed), _numbers(shape, dtype, 100 + seed)) for seed, shape in enumerate(shapes)]


def strided(dtype: Any, quick: bool) -> Pairs:
    pairs = []
    for seed, shape in enumerate(STRIDED[:1] if quick else STRIDED):
        base = np.asfortranarray(_numbers([2 * n for n in shape], dtype, 100 + seed))
        pairs.append((_gradient(shape, dtype, seed), base[tuple(slice(None, None, 2) for _ in shape)]))
    return pairs


def sparse(dtype: Any, quick: bool) -> Pairs:
    n, n_rows = (100, 20) if quick else (6000, 500)
    pairs = []
    for seed, row in enumerate(ROWS[:2] if quick else ROWS):
        ids = np.random.default_rng(seed).integers(n_rows, size=n).astype(np.int32 if seed % 2 else np.int64)
        ids[::2] = n_rows // 3
        values = _numbers((n, *row), dtype, seed)
        pairs.append((IndexedSlices(values, ids), _numbers((n_rows, *row), dtype, 100 + seed)))
    return pairs
