"""Dense variables by their addresses: all that share types and rule in one call per thread, as ``multi.cu`` does it.

For callers to whom an address costs less than an array, such as those with tensors. NumPy's own arrays are faster to
hand over one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from gpurms.kernels import cpu, pool
from gpurms.kernels.cpu import CHUNK
from gpurms.kernels.numpy import Array
from gpurms.kernels.rule import Rule, Step, Update

ROW_COST = 1 << 6
"""What a row of the table costs, in elements (measured)."""


def by_address(updates: Sequence[Update]) -> Callable[..., None] | None:
    """``f(pointers, now, factor=None)`` applies dense gradients of the types and layouts of these, by their addresses.

    ``pointers``: of each update's gradient, int64. ``factor``: a number that all are multiplied by, where the flags of
    ``now`` say so. None if the engine takes no addresses, or not these arrays.
    """
    chosen = cpu.engine()
    groups: dict[Any, list[int]] = {}
    for i, update in enumerate(updates):
        state = cpu.prepared(update, chosen)
        grad = cpu.flat(update.grad, state.compute, chosen) if state.views else None
        if grad is None or chosen.multi is None:
            return None
        groups.setdefault((update.rule.flags, state.compute, state.key[0], grad.dtype, state.key[1]), []).append(i)
    tables = []
    for (flags, compute, *types), places in groups.items():
        assert chosen.multi is not None
        kernel = chosen.multi(flags, compute, (types[0], types[1], types[2]))
        views = [updates[i].prepared.views for i in places]
        tables.append((Table(kernel, views, types[1]), updates[places[0]].rule, np.array(places)))

    def apply(pointers: Array, now: Step, factor: Any = None) -> None:
        for table, rule, places in tables:
            table(Rule(rule.flags, now.scalars(rule.compute)), pointers[places], factor)

    return apply


class Table:
    """Addresses of a group of updates, cut into rows of up to ``CHUNK`` elements; gradients change each step."""

    def __init__(self, kernel: Callable[..., None], views: Sequence[Sequence[Array]], grad_type: np.dtype[Any]) -> None:
        """``kernel``: the engine's ``multi``; ``views``: var, rms, mom, mg of each update, 1-D."""
        self._kernel = kernel
        self._views = views  # kept, since addresses keep nothing
        sizes = np.array([var.size for var, *_ in views])
        n_rows = -(-sizes // CHUNK)
        self._update_of = np.repeat(np.arange(len(sizes)), n_rows)
        starts = CHUNK * (np.arange(n_rows.sum()) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows))
        addresses = np.array([[view.ctypes.data for view in arrays] for arrays in views], np.int64)
        itemsizes = [view.itemsize for view in views[0]]
        self._words = np.zeros((len(starts), 6), np.int64)
        self._words[:, [0, 2, 3, 4]] = addresses[self._update_of] + starts[:, None] * itemsizes
        self._words[:, 5] = np.minimum(sizes[self._update_of] - starts, CHUNK)
        self._grad_offsets = starts * grad_type.itemsize
        self._ranges = _ranges(self._words[:, 5])

    def __call__(self, rule: Rule, pointers: Array, factor: Any) -> None:
        """Update with the gradients at these addresses, on all threads where it pays."""
        self._words[:, 1] = pointers[self._update_of] + self._grad_offsets
        run = partial(self._run, rule.compute.type(1 if factor is None else factor), rule.scalars)
        if len(self._ranges) == 1:
            run(self._ranges[0])
        else:
            pool.run(run, self._ranges)

    def _run(self, factor: Any, scalars: Array, rows: tuple[int, int]) -> None:
        self._kernel(self._words, *rows, factor, scalars)


def _ranges(sizes: Array) -> list[tuple[int, int]]:
    """Consecutive rows that take about as long as ``CHUNK`` elements."""
    ends = np.cumsum(sizes + ROW_COST)
    total = int(ends[-1]) if sizes.size else 0
    n_units = max(1, total // CHUNK)
    cuts = [0, *np.searchsorted(ends, np.arange(1, n_units) * (total / n_units)).tolist(), len(sizes)]
    return [(lo, hi) for lo, hi in pairwise(cuts) if lo < hi]
