"""Several threads stepping at once, and children made by `os.fork`: the bits of a single thread."""

import hashlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop, Variable

LARGE = 1 << 20  # elements: enough for every engine to share the work among threads
F32 = np.float32


def train(seed: int, size: int, steps: int = 3) -> bytes:
    """All bits of a dense variable, a table and their slots after a few steps of a new optimizer."""
    random = np.random.default_rng(seed)
    opt = RMSprop(0.1, momentum=0.5)
    dense = Variable(random.normal(size=size).astype(F32))
    table = Variable(random.normal(size=(size // 16, 16)).astype(F32))
    grad = random.normal(size=size).astype(F32)
    values = random.normal(size=(size // 32, 16)).astype(F32)
    indices = random.integers(0, size // 64, size // 32)
    for _ in range(steps):
        opt.apply_gradients([(grad, dense), (IndexedSlices(values, indices), table)])
    return b"".join(x.numpy().tobytes() for x in (dense, table, *opt.weights))


# --- threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "steps"), [(1 << 10, 30), (LARGE, 2)], ids=["small", "large"])
def test_threads_give_the_bits_of_one(size: int, steps: int, cpu_engine: str):
    n = 4 if size < LARGE else 2
    alone = [train(seed, size, steps) for seed in range(n)]
    barrier, results = threading.Barrier(n), {}

    def work(seed: int) -> None:
        barrier.wait(10)
        results[seed] = train(seed, size, steps)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[seed] == alone[seed] for seed in range(n)] == [True] * n


def test_first_steps_of_several_threads_at_once(cpu_engine: str):
    """Whatever the engine prepares at a first step is prepared once, whoever comes first."""
    n, results = 4, []
    barrier = threading.Barrier(n)
    kwargs = {"momentum": 0.5, "centered": True, "nesterov": True, "maximize": True}

    def work() -> None:
        opt, var = RMSprop(0.1, **kwargs), Variable(np.ones(64, F32))
        barrier.wait(10)
        opt.apply_gradients([(np.full(64, 3, F32), var)])
        results.append(var.numpy().tobytes())

    threads = [threading.Thread(target=work) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == n
    assert len(set(results)) == 1


# --- fork ---------------------------------------------------------------------------------------------------


def in_child(check: Callable[[], bool], timeout: float = 60.0) -> str:
    """Run `check` in a forked child: "right", "wrong", "raised" or "hung"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork with threads
        pid = os.fork()
    if pid == 0:
        status = 2
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return {0: "right", 1: "wrong"}.get(os.waitstatus_to_exitcode(status), "raised")
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork on this system")


@needs_fork
@pytest.mark.parametrize("size", [1 << 10, LARGE], ids=["small", "large"])
def test_child_steps_after_the_parent_used_its_threads(size: int, cpu_engine: str):
    expected = train(0, size)
    assert in_child(lambda: train(0, size) == expected) == "right"
    assert train(0, size) == expected


@needs_fork
def test_child_continues_with_the_optimizer_of_the_parent(cpu_engine: str):
    opt, var, grad = RMSprop(0.1, momentum=0.5), Variable(np.ones(LARGE, F32)), np.ones(LARGE, F32)
    opt.apply_gradients([(grad, var)])

    def step() -> bytes:
        opt.apply_gradients([(grad, var)])
        return hashlib.sha256(b"".join(x.numpy().tobytes() for x in (var, *opt.weights))).digest()

    read, write = os.pipe()

    def child() -> bool:
        os.close(read)
        with os.fdopen(write, "wb") as pipe:
            pipe.write(step())
        return True

    assert in_child(child) == "right"
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read() == step()


@needs_fork
def test_grandchild(cpu_engine: str):
    expected = train(0, LARGE, 1)

    def child() -> bool:
        return train(0, LARGE, 1) == expected and in_child(lambda: train(0, LARGE, 1) == expected) == "right"

    assert in_child(child) == "right"


@needs_fork
def test_fork_while_another_thread_is_stepping(cpu_engine: str):
    expected, stop = train(0, LARGE, 1), threading.Event()

    def keep_stepping() -> None:
        opt, var, grad = RMSprop(0.1, momentum=0.5), Variable(np.ones(LARGE, F32)), np.ones(LARGE, F32)
        while not stop.is_set():
            opt.apply_gradients([(grad, var)])

    thread = threading.Thread(target=keep_stepping)
    thread.start()
    try:
        assert [in_child(lambda: train(0, LARGE, 1) == expected) for _ in range(4)] == ["right"] * 4
    finally:
        stop.set()
        thread.join()
