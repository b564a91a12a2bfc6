"""Where tensors are, and whether they are what they were: checks of lists, at a fraction of a microsecond each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]

_look = attrgetter("dtype", "shape", "device")


class Looks:
    """How strided tensors looked: all about them but their addresses."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._looks = list(map(_look, tensors))
        self._strides = list(map(Tensor.stride, tensors))

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these look the same."""
        return list(map(_look, tensors)) == self._looks and list(map(Tensor.stride, tensors)) == self._strides


def addresses(tensors: Sequence[Tensor]) -> Array:
    """Where they begin, int64."""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


def reach(tensor: Tensor) -> int:
    """Bytes from its first element to behind its last."""
    if tensor.numel() == 0:
        return 0
    return tensor.element_size() * (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())))


class Memory:
    """The memory that a step writes to."""

    def __init__(self, written: Sequence[Tensor]) -> None:
        spans = sorted((tensor.data_ptr(), tensor.data_ptr() + reach(tensor)) for tensor in written if tensor.numel())
        self.overlaps = any(before[1] > after[0] for before, after in pairwise(spans))
        self._starts = np.array([start for start, _ in spans], np.int64)
        self._ends = np.maximum.accumulate(np.array([0, *(end for _, end in spans)], np.int64))  # of those before, too

    def met_by(self, starts: Array, n_bytes: Array) -> Array:
        """Which of these stretches of memory lie in it, in part or whole; or nowhere, as a ZeroTensor of torch does."""
        before = np.searchsorted(self._starts, starts + n_bytes)
        found: Array = ((self._ends[before] > starts) | (starts == 0)) & (n_bytes > 0)
        return found
