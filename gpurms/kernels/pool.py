"""Threads for loops that release the GIL: NumPy's and Numba's alike.

Numba's own ``parallel=True`` is not used: its workqueue layer aborts the process when two threads enter it, and
GNU OpenMP refuses a forked child. Here any number of threads may call ``run`` at once, and a child made by
``os.fork`` starts a pool of its own.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


def fork_safe_lock() -> threading.RLock:
    """A lock that no child of ``os.fork`` finds held: a fork waits until it is free."""
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


_lock = fork_safe_lock()
_pool: ThreadPoolExecutor | None = None


def n_threads() -> int:
    """Cores this process may run on, or ``OMP_NUM_THREADS`` if that is less: launchers of many processes set it."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = _cores()
    return min(cores, int(asked)) if asked.isdigit() and int(asked) > 0 else cores


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(work: Callable[[T], None], units: Sequence[T]) -> None:
    """Call ``work(unit)`` for every unit, in any order, on the calling thread and the pool's.

    Returns when all units are done. The first exception is raised after the units already begun have ended.
    """
    todo = deque(units)

    def drain() -> None:
        while True:
            try:
                unit = todo.popleft()
            except IndexError:
                return
            work(unit)

    helpers = _submit(drain, min(n_threads(), len(units)) - 1)
    try:
        drain()
    finally:
        todo.clear()
        helpers = [helper for helper in helpers if not helper.cancel()]  # another call may hold the pool
        wait(helpers)
    for helper in helpers:
        helper.result()


def _submit(task: Callable[[], None], count: int) -> list[Future[None]]:
    global _pool
    if count < 1:
        return []
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, n_threads() - 1), thread_name_prefix="gpurms")
        pool = _pool
    submitted: list[Future[None]] = []
    try:
        while len(submitted) < count:
            submitted.append(pool.submit(task))
    except RuntimeError:  # no thread to be had, or the interpreter is shutting down: the caller does the rest
        pass
    return submitted


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
