"""What is below the optimizer and not seen through it: storage types, the sort, compiled code on disk, threads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numba
import numpy as np
import pytest

import gpurms
from gpurms.kernels import numpy as numpy_engine
from gpurms.kernels import radix
from gpurms.kernels.cpu import round_to_odd
from gpurms.kernels.storage import VIEWS, narrow, widen

HALF_TYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@numba.njit(error_model="numpy")
def _widen_all(stored, out):
    zero = out.dtype.type(0)
    for i in range(out.size):
        out[i] = widen(stored[i], zero)


@numba.njit(error_model="numpy")
def _narrow_all(x, out):
    for i in range(x.size):
        out[i] = narrow(x[i], out[i])


def every_pattern(dtype: np.dtype) -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def same_floats(a: np.ndarray, b: np.ndarray) -> None:
    """Equal bits, but any NaN is like any other."""
    bits = f"u{a.itemsize}"
    nan = np.isnan(a.astype(np.float64))
    np.testing.assert_array_equal(nan, np.isnan(b.astype(np.float64)))
    np.testing.assert_array_equal(a.view(bits)[~nan], b.view(bits)[~nan])


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=lambda dtype: dtype.name)
def test_widen_is_exact_for_every_pattern(dtype):
    stored = every_pattern(dtype)
    out = np.empty(stored.size, np.float32)
    _widen_all(stored.view(VIEWS[dtype.name]), out)
    with np.errstate(all="ignore"):
        same_floats(out, stored.astype(np.float32))


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=lambda dtype: dtype.name)
def test_narrow_rounds_to_nearest_even(dtype):
    with np.errstate(all="ignore"):
        exact = every_pattern(dtype).astype(np.float32)
        finite = np.sort(exact[np.isfinite(exact)])
        ties = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)
        beside = [np.nextafter(ties, np.float32(towards)) for towards in (-np.inf, np.inf)]
        special = np.float32([65519.996, 65520, 65536, 1e38, 3.4e38, np.inf, -np.inf, np.nan, -0.0])
        anything = np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
        x = np.concatenate([exact, ties, *beside, special, anything])
        out = np.empty(x.size, VIEWS[dtype.name])
        _narrow_all(x, out)
        same_floats(out.view(dtype), x.astype(dtype))


def test_round_to_odd_makes_one_rounding_of_two():
    # Just above the tie between 1 and 1 + 2**-7: rounding to float32 first would make it the tie.
    above = np.array(
        [1 + 2.0**-8 + 2.0**-40, -(1 + 2.0**-8 + 2.0**-40), 1 + 3 * 2.0**-8 - 2.0**-40, np.nan, np.inf, 0.0]
    )
    stored = round_to_odd(above).astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(stored, [1 + 2.0**-7, -(1 + 2.0**-7), 1 + 2.0**-7, np.nan, np.inf, 0.0])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("n", "n_rows"),
    [
        (1, 1),
        (7, 1),
        (100, 3),
        (5000, 2048),
        (5000, 2049),
        (4097, 2**22 + 1),
        (300, 2**31 - 1),
        (300, 2**40),
        (300, 2**62),
    ],
)
def test_radix_sort_is_the_stable_sort(n, n_rows, dtype):
    if n_rows > np.iinfo(dtype).max:
        dtype = np.int64
    ids = np.random.default_rng(n).integers(0, n_rows, n).astype(dtype)
    ids[-1] = n_rows - 1
    for found, expected in zip(
        radix.sort_rows(ids, numpy_engine.Workspace()),
        numpy_engine.sort_rows(ids, numpy_engine.Workspace()),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


STEPS = """
import json, sys
import numpy as np, gpurms
from gpurms.kernels import cpu
for options in json.loads(sys.argv[1]):
    results = []
    for engine in ("numba", "numpy"):
        with cpu.use_engine(engine):
            opt, table, w = gpurms.RMSprop(**options), np.ones((9, 3), np.float32), np.ones(5)
            rows = gpurms.IndexedSlices(np.ones((4, 3), np.float32), np.array([1, 8, 1, 1]))
            for _ in range(2):
                opt.apply_gradients([(rows, table), (np.linspace(1, 2, 5), w)])
            results.append(table.tobytes() + w.tobytes())
    assert results[0] == results[1], options
"""
OPTIONS = [{}, {"momentum": 0.5}, {"centered": True, "clipnorm": 1.0}, {"nesterov": True, "momentum": 0.5}]


def steps(options: list[dict[str, object]], cache: Path, before: str = "") -> None:
    """A step per entry in a fresh process, checked between the engines."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", before + STEPS, json.dumps(options)],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_second_process_compiles_nothing_and_confuses_nothing(tmp_path: Path):
    def compiled() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb*")}

    steps(OPTIONS[1:2], tmp_path)
    assert compiled()
    steps(OPTIONS, tmp_path)  # kernels from disk beside new ones from the same source
    before = compiled()
    steps(OPTIONS, tmp_path)
    assert compiled() == before


def test_runs_where_no_cache_can_be_written(tmp_path: Path):
    steps(OPTIONS[1:2], tmp_path, before="import numba.core.caching as c; c.CacheImpl._locator_classes = []\n")
    assert not list(tmp_path.iterdir())


def test_a_change_of_any_kernel_source_compiles_anew(tmp_path: Path):
    package, cache = tmp_path / "gpurms", tmp_path / "cache"
    shutil.copytree(Path(gpurms.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    here = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"

    def names() -> set[str]:
        return {path.name for path in cache.rglob("*.nbi")}

    steps(OPTIONS[:1], cache, here)
    before = names()
    helper = package / "kernels" / "storage.py"
    helper.write_text(helper.read_text() + "\n# changed\n")
    steps(OPTIONS[:1], cache, here)
    assert len(names()) == 2 * len(before) > 0
