"""Where tensors are, and whether they are what they were: checks of lists, at a fraction of a microsecond each."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, eq, is_
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]

_look = attrgetter("dtype", "shape", "device")


class Looks:
    """How strided tensors looked: all about them but their addresses.

    Compared one by one: lists of what they look like now would be so many objects that each step collected garbage.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._looks = list(map(_look, tensors))
        self._strides = list(map(Tensor.stride, tensors))
        self._negative = list(map(Tensor.is_neg, tensors))

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these, of the same number, look the same."""
        return (
            all(map(eq, map(_look, tensors), self._looks))
            and all(map(eq, map(Tensor.stride, tensors), self._strides))
            and all(map(is_, map(Tensor.is_neg, tensors), self._negative))
        )


def addresses(tensors: Sequence[Tensor]) -> Array:
    """Where they begin, int64."""
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


def reach(tensor: Tensor) -> int:
    """Bytes from its first element to behind its last."""
    if tensor.numel() == 0:
        return 0
    return tensor.element_size() * (1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride())))


class Memory:
    """The memory that a step writes to: parameters and slots, as ``members`` of tensors that belong together."""

    def __init__(self, members: Sequence[Sequence[Tensor]]) -> None:
        spans = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + reach(tensor), place)
            for place, written in enumerate(members)
            for tensor in written
            if tensor.numel()
        )
        self.overlapping: set[int] = set()
        """Places of members that share memory with others."""
        furthest, holder = 0, -1
        for start, end, place in spans:
            if start < furthest:
                self.overlapping |= {place, holder}
            if end > furthest:
                furthest, holder = end, place
        self._starts = np.array([start for start, _, _ in spans], np.int64)
        self._ends = np.maximum.accumulate(np.array([0, *(end for _, end, _ in spans)], np.int64))

    def met_by(self, starts: Array, n_bytes: Array) -> Array:
        """Which of these stretches of memory lie in it, in part or whole; or nowhere, as a ZeroTensor of torch does."""
        before = np.searchsorted(self._starts, starts + n_bytes)
        found: Array = ((self._ends[before] > starts) | (starts == 0)) & (n_bytes > 0)
        return found
