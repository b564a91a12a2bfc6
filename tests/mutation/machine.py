"""The device that cases run on."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np

from tests import cuda_large
from tests.device import ptx
from tests.device.machine import Machine, active
from tests.device_support import cupy, cupy_on_cpu

from gpurms.kernels import cuda_rows  # isort: skip - it imports CuPy

STEPS = 40_000  # instructions of a batch of blocks; the longest case takes half


@contextmanager
def device(steps: int = STEPS) -> Iterator[Machine]:
    with cupy_on_cpu() as machine, mock.patch.object(cuda_rows.Workspace, "parts", _parts):
        machine.execute = partial(ptx.run, step_limit=steps)
        yield machine


def _parts(workspace: Any, sizes: Sequence[int]) -> tuple[Any, list[int]]:
    """Parts that are allocations of their own: an access past the end of one does not end in another."""
    parts = [_memory(size) for size in sizes]
    return parts, [int(part.data.ptr) for part in parts]


def _memory(size: int) -> Any:
    return cupy.empty(size, np.uint8) if size < 1 << 28 else cuda_large.Space(active(), (size,), np.uint8).array
