"""Helpers shared by the contract tests: bits, snapshots of the state, an optimizer with exact arithmetic."""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

import gpurms

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64))

OPTIONS: dict[str, Any] = {  # option beyond those of the page -> a value that is not its default
    "weight_decay": 0.25,
    "decoupled_weight_decay": False,
    "eps_in_sqrt": False,
    "lr_in_momentum": False,
    "nesterov": True,
    "maximize": True,
    "initial_accumulator_value": 1.0,
    "slot_dtype": "float64",
    "check_indices": False,
    "capturable": True,
    "dense_only": True,
}


def host(x: Any) -> np.ndarray:
    """A NumPy copy of a variable or array."""
    if isinstance(x, gpurms.Variable):
        return x.numpy()
    return np.array(x.get() if hasattr(x, "get") else x)  # CuPy copies to the host only when asked


def assert_same_bits(got: Any, want: Any) -> None:
    """Shape, dtype and every bit agree; NaN payloads and the sign of zero count."""
    got, want = host(got), host(want)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert got.tobytes() == want.tobytes(), f"got {got}, want {want}"


def sign_sgd(**kwargs: Any) -> gpurms.RMSprop:
    """An optimizer whose first step moves a variable by exactly -0.5 * sign(grad), in every dtype.

    With rho 0 and epsilon 0 the denominator is |grad|. Gradients must not be 0.
    """
    return gpurms.RMSprop(**{"learning_rate": 0.5, "rho": 0.0, "epsilon": 0.0, **kwargs})


def full_rmsprop(**kwargs: Any) -> gpurms.RMSprop:
    """An optimizer with every kind of slot."""
    return gpurms.RMSprop(0.1, **{"momentum": 0.5, "centered": True, **kwargs})


def step(opt: gpurms.RMSprop, *variables: Any) -> None:
    """One call with gradients of ones, beside the variables."""
    opt.apply_gradients([(np.ones_like(v.value if isinstance(v, gpurms.Variable) else v), v) for v in variables])


@dataclass(frozen=True)
class Snapshot:
    """All state that a call of the optimizer may change, and the identity of its weights."""

    variables: list[bytes]
    weights: list[gpurms.Variable]
    contents: list[bytes]
    slot_names: list[str]

    @classmethod
    def of(cls, opt: gpurms.RMSprop, variables: Iterable[Any]) -> "Snapshot":
        # `opt.iterations` would create the counter; it is weights[0] once it exists.
        return cls(
            variables=[host(v).tobytes() for v in variables],
            weights=list(opt.weights),
            contents=[w.numpy().tobytes() for w in opt.weights],
            slot_names=list(opt.get_slot_names()),
        )

    def assert_equal(self, other: "Snapshot") -> None:
        assert other.variables == self.variables, "a variable changed"
        assert len(other.weights) == len(self.weights), "the list of weights changed its length"
        assert all(a is b for a, b in zip(self.weights, other.weights)), "a weight was replaced"
        assert other.contents == self.contents, "the counter or a slot changed"
        assert other.slot_names == self.slot_names, "the slot names changed"


@contextmanager
def unchanged(opt: gpurms.RMSprop, *variables: Any) -> Iterator[None]:
    """Assert that the block leaves the variables and the whole state of `opt` as they were, to the bit."""
    before = Snapshot.of(opt, variables)
    yield
    before.assert_equal(Snapshot.of(opt, variables))


def dense(slices: gpurms.IndexedSlices, shape: tuple[int, ...]) -> np.ndarray:
    """The dense array that an `IndexedSlices` stands for, duplicates summed."""
    out = np.zeros(shape, np.float64)
    np.add.at(out, host(slices.indices), host(slices.values).astype(np.float64))
    return out


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in a process of its own, with changes to the environment."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=os.environ | environment, check=False
    )
