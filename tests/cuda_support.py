"""Helpers of the tests that launch the kernels: the same update on both sides, and kernels with another text."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from gpurms.kernels import cpu
from gpurms.kernels.rule import SCALARS, Flags, Rule, Update
from tests.device_support import cupy
from tests.ptx_support import assert_bits as assert_plain_bits

from gpurms.kernels import cuda, launch  # isort: skip - they import CuPy
from tests.device import launch as device_launch  # isort: skip

NUMBERS = {
    "lr": 0.07,
    "one_minus_rho": 0.2,
    "momentum": 0.7,
    "epsilon": 0.3,
    "weight_decay": 0.21,
    "lr_weight_decay": 0.13,
    "clipvalue": 0.8,
}
ARRAYS = ("var", "rms", "mom", "mg")


def rule(flags: Flags, compute: Any, live: Any = None) -> Rule:
    """A rule in which every number matters."""
    return Rule(flags, np.array([NUMBERS[name] for name in SCALARS]).astype(compute), live)


def update_on_cpu(updates: list[Update]) -> None:
    """What the kernels are compared with."""
    with cpu.use_engine("numpy"):
        cpu.plan(updates)()


def update_on_gpu(updates: list[Update]) -> None:
    """The same through the launcher."""
    cuda.Plan(updates)()


def assert_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Every bit agrees, NaN matches NaN; also where NumPy warns of NaN in bfloat16."""
    with np.errstate(invalid="ignore"):
        assert_plain_bits(got, want)


def assert_updated(got: Update, want: Update) -> None:
    """Variable and slots agree in every bit."""
    for name in ARRAYS:
        expected = getattr(want, name)
        if expected is not None:
            assert_bits(cupy.asnumpy(getattr(got, name)).ravel(), expected.ravel())


@contextmanager
def text_instead(file: str, text: str) -> Iterator[None]:
    """Another text for one file of the kernels."""
    real = launch.text

    def joined(*files: str) -> str:
        return "\n".join(text if name == file else real(name) for name in files)

    _forget_kernels()
    with mock.patch.object(launch, "text", joined):
        try:
            yield
        finally:
            _forget_kernels()


def _forget_kernels() -> None:
    for cache in (launch.kernel, launch.elementwise, device_launch._module):
        cache.cache_clear()


@contextmanager
def replaced(file: str, old: str, new: str) -> Iterator[None]:
    """One place of a file's text changed."""
    text = launch.text(file)
    assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
    with text_instead(file, text.replace(old, new)):
        yield
