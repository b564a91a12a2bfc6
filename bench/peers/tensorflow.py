"""TensorFlow: the fused C++ operations, and the RMSprop of tf.keras as tf_keras keeps it under ``legacy``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from bench.measure import Step
from bench.peers import EPSILON, LR, MOMENTUM, RHO
from gpurms.kernels import pool


@contextmanager
def _no_stderr() -> Iterator[None]:
    """TensorFlow's C++ code writes to file descriptor 2 as it starts, whatever its log level."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


with _no_stderr():
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(pool.n_threads())
    tf.constant(0)  # starts the runtime, which looks for GPUs

Array = np.ndarray


def fused(var: Array, grad: Array, momentum: bool = False, centered: bool = False) -> Step:
    """``ResourceApplyRMSProp`` or ``ResourceApplyCenteredRMSProp``; both always keep a momentum buffer."""
    slots = {"ms": tf.Variable(tf.zeros_like(var)), "mom": tf.Variable(tf.zeros_like(var))}
    if centered:
        slots["mg"] = tf.Variable(tf.zeros_like(var))
    apply = tf.raw_ops.ResourceApplyCenteredRMSProp if centered else tf.raw_ops.ResourceApplyRMSProp
    variable, gradient = tf.Variable(var), tf.constant(grad)
    numbers = {"lr": LR, "rho": RHO, "momentum": MOMENTUM if momentum else 0.0, "epsilon": EPSILON}
    scalars = {name: tf.constant(value, variable.dtype) for name, value in numbers.items()}

    def step(kept: object = (variable, slots)) -> None:  # a handle does not keep its variable alive
        apply(var=variable.handle, **{name: slot.handle for name, slot in slots.items()}, **scalars, grad=gradient)

    return step
