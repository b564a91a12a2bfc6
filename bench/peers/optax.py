"""Optax: ``rmsprop`` under ``jax.jit``, variables and state donated."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes three quarters of the device's memory

import jax
import optax

from bench.measure import Ready, Step
from bench.peers import EPSILON, LR, RHO

PLATFORM = "gpu"
if jax.default_backend() != PLATFORM:
    raise RuntimeError(f"JAX {jax.__version__} finds no CUDA device; it runs on {jax.default_backend()}")

Wait = Callable[[], object]


def noise(n: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (n,))


def _updater(params: list[jax.Array]) -> tuple[Callable[[list[jax.Array]], None], Wait]:
    """A step, and a function that waits for the last one."""
    optimizer = optax.rmsprop(LR, decay=RHO, eps=EPSILON)
    state = optimizer.init(params)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(update, donate_argnums=(0, 1))

    def step(grads: list[jax.Array]) -> None:
        nonlocal params, state
        params, state = run(params, state, grads)

    return step, lambda: jax.block_until_ready((params, state))


def rotating(n: int, n_grads: int) -> tuple[Step, Wait]:
    """One variable of n elements, whose gradients take turns."""
    step, wait = _updater([noise(n)])
    grads, at = [[noise(n, 1 + i)] for i in range(n_grads)], 0

    def turn() -> None:
        nonlocal at
        step(grads[at])
        at = (at + 1) % n_grads

    return turn, wait


def fresh(count: int, n: int) -> tuple[Ready, Wait]:
    """Variables with new gradients at every step."""
    step, wait = _updater([noise(n, i) for i in range(count)])
    source = [noise(n, count + i) for i in range(count)]
    copied: Callable[[Sequence[jax.Array]], list[jax.Array]] = jax.jit(lambda arrays: [array + 0.5 for array in arrays])

    def ready() -> Step:
        grads = jax.block_until_ready(copied(source))
        return lambda: step(grads)

    return ready, wait
