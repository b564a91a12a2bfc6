"""The RMSprop of TensorFlow r2.0 as tf_keras keeps it, under ``legacy``."""

from __future__ import annotations

import numpy as np

from bench.measure import Step
from bench.peers import EPSILON, LR, MOMENTUM, RHO
from bench.peers import tensorflow as _threads  # noqa: F401  # first: it sets the number of threads

import tensorflow as tf  # isort: skip
import tf_keras  # isort: skip

Array = np.ndarray


def sparse(table: Array, values: Array, ids: Array, compiled: bool = False) -> Step:
    """``IndexedSlices``, with momentum: the fused operation on rows; ``compiled`` by ``tf.function`` or eager."""
    optimizer = tf_keras.optimizers.legacy.RMSprop(LR, RHO, MOMENTUM, EPSILON)
    variable = tf.Variable(table)
    dense_shape = tf.constant(table.shape, tf.int64)

    def apply(rows: tf.Tensor, indices: tf.Tensor) -> None:
        optimizer.apply_gradients([(tf.IndexedSlices(rows, indices, dense_shape), variable)])

    if compiled:
        optimizer._create_all_weights([variable])  # a compiled function may not create variables at every call
        apply = tf.function(apply)
    rows, indices = tf.constant(values), tf.constant(ids)
    return lambda: apply(rows, indices)
