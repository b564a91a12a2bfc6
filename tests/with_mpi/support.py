"""Helpers of the cases."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from gpurms import IndexedSlices

OPTIONS: dict[str, dict[str, Any]] = {  # every rule, in few optimizers
    "plain": {},
    "momentum": {"momentum": 0.5, "nesterov": True},
    "centered": {"momentum": 0.5, "centered": True, "clipvalue": 0.5},
    "torch": {"momentum": 0.5, "eps_in_sqrt": False, "lr_in_momentum": False, "maximize": True},
    "l2": {"weight_decay": 0.1, "decoupled_weight_decay": False, "initial_accumulator_value": 0.5},
    "decoupled": {"weight_decay": 0.1, "slot_dtype": "float64"},
}


def random(*key: Any) -> np.random.Generator:
    """Numbers that every rank can draw for every rank."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def slices(n_rows: int, row: tuple[int, ...], dtype: Any, *key: Any, n: int = 40) -> IndexedSlices:
    """Slices of a rank: hot rows, enough of them for sums of sums."""
    rng = random(*key)
    ids = np.minimum(rng.zipf(1.5, n) - 1, n_rows - 1)
    return IndexedSlices(rng.standard_normal((n, *row)).astype(dtype), ids)


def together(parts: list[IndexedSlices], size: int) -> IndexedSlices:
    """What one process would get, values averaged over ranks in float32 or wider."""
    values = np.concatenate([part.values for part in parts])
    wide = values.astype(np.float32) if values.itemsize == 2 else values
    return IndexedSlices(wide / wide.dtype.type(size), np.concatenate([part.indices for part in parts]))


@contextmanager
def raises_everywhere(comm: Any, kind: type[Exception], match: str) -> Iterator[None]:
    """The block raises on this rank, and all ranks raise the same."""
    with pytest.raises(kind, match=match) as caught:
        yield
    assert type(caught.value) is kind
    assert len(set(comm.allgather(str(caught.value)))) == 1


def counting(comm: Any, *methods: str) -> Any:
    """The communicator, with a `calls` dict of the arguments of calls to some of its methods."""
    calls: dict[str, list[Any]] = {method: [] for method in methods}

    def counted(method: str) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any) -> Any:
            calls[method].append(arguments)
            return getattr(super(kind, self), method)(*arguments)

        return call

    kind = type("Counting", (type(comm),), {method: counted(method) for method in methods})
    found = kind(comm)
    found.calls = calls
    return found
