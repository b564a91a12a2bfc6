"""The device as a stopwatch: what a step takes on the host, on the device, and both together.

CuPy and PyTorch work on the legacy default stream, so CuPy's events time both. JAX has streams of its own, which no
event of ours can see.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cupy
import numpy as np

from bench.answer import Answer
from bench.measure import WARM_UP, Missing, Ready, Step
from gpurms.kernels.launch import Kernel

Array = Any  # cupy.ndarray
Wait = Callable[[], object]

EVICT = 1 << 28
"""Bytes, at least, of the copies that empty the cache."""
TRIES = 3
MAX_COPIES = 800
"""More would fill the device's queue, in which the host then has to wait."""
AT_ONCE = 8
"""Copies timed together: the host's delay in sending the first one does not count."""
BLOCKS = 7
"""Blocks of steps that a wall time is taken over."""


class Stage:
    """Times steps on the current device. ``quick`` does everything, with nothing in it."""

    def __init__(self, quick: bool = False) -> None:
        self.quick = quick
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
        n_bytes = 1 << 12 if quick else max(EVICT, 4 * properties.get("l2CacheSize", 0))
        self._blocks: dict[tuple[str, int], Array] = {}
        self._source, self._target = self.noise(n_bytes // 4), cupy.empty(n_bytes // 4, np.float32)
        self._copy = min(_elapsed(self._evict) for _ in range(3))

    def noise(self, n: int, dtype: Any = np.float32, seed: int = 0) -> Array:
        """Normally distributed numbers: a block of random ones, repeated."""
        key, bits = (np.dtype(dtype).name, seed), np.dtype(f"u{np.dtype(dtype).itemsize}")
        if key not in self._blocks:
            numbers = np.random.default_rng(seed).standard_normal(1 << (12 if self.quick else 20), np.float32)
            self._blocks[key] = cupy.asarray(numbers.astype(dtype).view(bits))
        block = self._blocks[key]
        filled, whole = cupy.empty(n, bits), n - n % block.size
        filled[:whole].reshape(-1, block.size)[...] = block
        filled[whole:] = block[: n - whole]
        return filled.view(dtype)

    def copy_rates(self) -> list[float]:
        """GB/s of large device-to-device copies, read and written bytes counted."""
        n_bytes = 1 << 12 if self.quick else min(1 << 31, cupy.cuda.Device().mem_info[0] // 4)
        source, target = self.noise(n_bytes // 4), cupy.empty(n_bytes // 4, np.float32)

        def copies() -> None:
            for _ in range(AT_ONCE):
                target.data.copy_from_device_async(source.data, source.nbytes)

        copies()
        return [AT_ONCE * 2e-9 * source.nbytes / _elapsed(copies) for _ in range(3 if self.quick else 15)]

    def busy(self, seconds: float) -> None:
        """Keep the current stream busy for at least so long, and the L2 cache full of something else."""
        for _ in range(2 if self.quick else min(MAX_COPIES, math.ceil(seconds / self._copy))):
            self._evict()

    def device_times(self, ready: Ready, rounds: int) -> list[float]:
        """Seconds from the beginning to the end of a step's work on the device, which never waits for the host.

        The step is handed over while copies keep the device busy; if it comes too late, there are more of them in a
        second try.

        Raises:
            Missing: the host is too slow.
        """
        slack = 3 * _host_time(ready)
        for _ in range(TRIES):
            found = [self._device_time(ready, slack) for _ in range(rounds)]
            if self.quick or sum(late for _, late in found) <= rounds // 4:
                return [seconds for seconds, late in found if self.quick or not late]
            slack *= 3
        raise Missing(f"the device waited for the host however long it was kept busy, {slack / 3 * 1e3:.0f} ms at last")

    def _device_time(self, ready: Ready, slack: float) -> tuple[float, bool]:
        step = ready()
        self.busy(slack)
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        step()
        late = start.done
        end.record()
        end.synchronize()
        return cupy.cuda.get_elapsed_time(start, end) * 1e-3, late

    def host_times(self, ready: Ready, rounds: int, wait: Wait | None = None) -> list[float]:
        """Seconds until a step returns, the device being idle before it; with ``wait``, until its work is done."""
        seconds = []
        for _ in range(rounds):
            step = ready()
            synchronize()
            start = time.perf_counter()
            step()
            if wait is not None:
                wait()
            seconds.append(time.perf_counter() - start)
            synchronize()
        return seconds

    def wall_times(self, step: Step, wait: Wait, seconds: float = 0.04) -> list[float]:
        """Seconds per step of blocks of steps; only the last of a block is waited for."""
        for _ in range(3):
            step()
        wait()
        start = time.perf_counter()
        step()
        wait()
        once = time.perf_counter() - start
        count = 2 if self.quick else max(3, min(500, int(seconds / once)))
        found = []
        for _ in range(2 if self.quick else BLOCKS):
            start = time.perf_counter()
            for _ in range(count):
                step()
            wait()
            found.append((time.perf_counter() - start) / count)
        return found

    def returns_early(self, ready: Ready) -> bool:
        """Whether a step returns while the device still does what it did before."""
        step = ready()
        synchronize()
        self.busy(max(0.05, 20 * _host_time(ready)))
        before = cupy.cuda.Event()
        before.record()
        step()
        early = not before.done
        synchronize()
        return early

    def _evict(self) -> None:
        self._target.data.copy_from_device_async(self._source.data, self._source.nbytes)


def synchronize() -> None:
    """Wait for all work on the current device."""
    cupy.cuda.Device().synchronize()


@contextmanager
def attempt(answer: Answer, name: str) -> Iterator[None]:
    """Note by name what cannot be measured, and why; whatever happens, give its memory back."""
    gc.collect()
    gc.disable()
    try:
        yield
    except Missing as missing:
        answer.skipped[name] = str(missing)
    except Exception as error:  # what is measured may fail in as many ways as there are libraries below it
        answer.skipped[name] = f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]
    finally:
        gc.enable()
        release()


def release() -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    if (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of gpurms's own kernels as they are launched."""
    names: list[str] = []
    original = Kernel.__call__

    def call(self: Kernel, *arguments: Any) -> None:
        names.append(self._raw.name)
        original(self, *arguments)

    Kernel.__call__ = call
    try:
        yield names
    finally:
        Kernel.__call__ = original


def _host_time(ready: Ready) -> float:
    """Of the slowest of three steps, when it is warm."""
    found = []
    for _ in range(2 * WARM_UP + 1):
        step = ready()
        synchronize()
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    synchronize()
    return max(found[WARM_UP:])


def _elapsed(step: Step) -> float:
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    step()
    end.record()
    end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) * 1e-3
