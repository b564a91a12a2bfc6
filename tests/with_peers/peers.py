"""The RMSprop of other libraries behind one face: `step(grads)`, `values()`; and how far apart two runs may be."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

os.environ |= {"KERAS_BACKEND": "torch", "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import jax
    import keras
    import ml_dtypes
    import optax
    import tensorflow as tf
    import tf_keras
    import torch

import gpurms


@contextmanager
def floatx(dtype: Any) -> Iterator[None]:
    """Let Keras keep its own numbers in this type."""
    backends = (keras.config, tf_keras.backend)
    for backend in backends:
        backend.set_floatx(np.dtype(dtype).name)
    yield
    for backend in backends:
        backend.set_floatx("float32")


SHAPES = ((3, 2), (4,), ())
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.float32, np.float64)


class Problem:
    """Starting values and gradients, the same for both sides."""

    def __init__(self, dtype: Any, n_steps: int, shapes: Any = SHAPES, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.dtype = np.dtype(dtype)
        self.start = [np.asarray(rng.normal(size=shape), self.dtype) for shape in shapes]
        self.grads = [[np.asarray(rng.normal(size=shape), self.dtype) for shape in shapes] for _ in range(n_steps)]


class Torch:
    def __init__(self, start: list[np.ndarray], **arguments: Any) -> None:
        self.params = [torch.tensor(value, requires_grad=True) for value in start]
        self.optimizer = torch.optim.RMSprop(self.params, **arguments)

    def step(self, grads: list[np.ndarray]) -> None:
        for param, grad in zip(self.params, grads):
            param.grad = torch.tensor(grad, dtype=param.dtype)
        self.optimizer.step()

    def values(self) -> list[np.ndarray]:
        return [param.detach().numpy().copy() for param in self.params]


class TfKeras:
    make: Any = tf_keras.optimizers.RMSprop

    def __init__(self, start: list[np.ndarray], **arguments: Any) -> None:
        self.variables = [tf.Variable(value) for value in start]
        self.optimizer = type(self).make(**arguments)

    def step(self, grads: list[np.ndarray]) -> None:
        self.optimizer.apply_gradients(zip(map(tf.constant, grads), self.variables))

    def values(self) -> list[np.ndarray]:
        return [np.array(variable.numpy()) for variable in self.variables]


class Legacy(TfKeras):
    make = tf_keras.optimizers.legacy.RMSprop


class Keras3:
    def __init__(self, start: list[np.ndarray], **arguments: Any) -> None:
        self.variables = [keras.Variable(value, dtype=value.dtype.name) for value in start]
        self.optimizer = keras.optimizers.RMSprop(**arguments)

    def step(self, grads: list[np.ndarray]) -> None:
        self.optimizer.apply_gradients(zip(map(torch.tensor, grads), self.variables))

    def values(self) -> list[np.ndarray]:
        return [variable.value.detach().numpy().copy() for variable in self.variables]


class Optax:
    """Parameters as a dict, whose order of leaves is that of its keys."""

    def __init__(self, start: list[np.ndarray], **arguments: Any) -> None:
        self.params = self.tree(start)
        self.solver = optax.rmsprop(**arguments)
        self.state = self.solver.init(self.params)

    def tree(self, arrays: list[np.ndarray]) -> dict[str, Any]:
        return {f"p{i}": jax.numpy.asarray(array) for i, array in enumerate(arrays)}

    def step(self, grads: list[np.ndarray]) -> None:
        updates, self.state = self.solver.update(self.tree(grads), self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)

    def values(self) -> list[np.ndarray]:
        return [np.array(param) for param in self.params.values()]


class Comparison:
    """Steps an optimizer of this library beside one of another, and asserts that they stay together.

    A step makes at most 4 roundings in `rms` and in `mg` each, which last in all later steps, 4 in the normalised
    gradient and 2 in the momentum, half of the first behind a root. After n steps a normalised gradient is therefore
    wrong by less than 4n + 4 units, times the cancellation `rms / (rms - mg*mg)` if centered, a momentum by 2n more;
    and the variable by that share of the way it has gone, plus one unit of its own per step. Both sides err.
    """

    def __init__(self, optimizer: gpurms.RMSprop, variables: list[np.ndarray]) -> None:
        self.optimizer = optimizer
        self.variables = variables
        self.n_steps = 0
        self.largest = [np.abs(variable) for variable in variables]
        self.ways, self.moving, self.cancellations = ([np.zeros(v.shape) for v in variables] for _ in range(3))

    def step(self, grads: list[np.ndarray]) -> None:
        opt = self.optimizer
        before = [variable.copy() for variable in self.variables]
        momenta = [self.slot(i, "momentum") for i in range(len(before))]
        opt.apply_gradients(list(zip(grads, self.variables)))
        self.n_steps += 1
        for i, variable in enumerate(self.variables):
            if opt.momentum:
                scale = 1.0 if opt.lr_in_momentum else opt.learning_rate
                move = scale * np.abs(self.slot(i, "momentum") - opt.momentum * momenta[i])
                self.moving[i] = opt.momentum * self.moving[i] + move
                self.ways[i] += self.moving[i] * (1 + opt.nesterov) + np.abs(variable - before[i])
            else:
                self.ways[i] += np.abs(variable - before[i])
            rms, mg = self.slot(i, "rms"), self.slot(i, "mg")
            self.cancellations[i] = np.maximum(self.cancellations[i], rms / (rms - mg * mg))
            self.largest[i] = np.maximum(self.largest[i], np.abs(variable))

    def slot(self, i: int, name: str) -> np.ndarray:
        try:
            return self.optimizer.get_slot(self.variables[i], name).numpy().astype(np.float64)
        except KeyError:
            return np.zeros(self.variables[i].shape)

    def assert_close(self, values: list[np.ndarray]) -> None:
        n = self.n_steps
        for i, (ours, theirs) in enumerate(zip(self.variables, values, strict=True)):
            assert ours.dtype == theirs.dtype
            unit = np.finfo(ours.dtype).eps
            bound = unit * ((6 * n + 4) * self.cancellations[i] * self.ways[i] + n * self.largest[i])
            difference = np.abs(ours.astype(np.float64) - theirs)
            assert (difference <= 2 * bound).all(), (n, difference, 2 * bound)

    def restart(self) -> "Comparison":
        """Compare from here on."""
        return Comparison(self.optimizer, self.variables)

    def run(self, theirs: Any, grads: list[list[np.ndarray]]) -> None:
        for grad in grads:
            self.step(grad)
            theirs.step(grad)
            self.assert_close(theirs.values())
