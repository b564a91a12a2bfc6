"""Arrays of one call that share memory: gradients are values from before the call, updates happen in order.

Both matter in practice: ``apply_gradients([(b, a), (a, b)])`` is the hand-written gradient of a product, and views of
one flat buffer are common. Whether arrays may share memory at all is a question of their owners, one look-up each;
only where owners meet are addresses compared.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise

from gpurms.slots import Entry
from gpurms.variable import Array

Pair = tuple[Entry, Array, Array | None]
"""A variable and its checked gradient: dense, or the values of rows and their indices."""

Span = tuple[int, int]  # first address, address behind the last


def detach(pairs: list[Pair], owners: set[int]) -> list[Pair]:
    """The pairs with copies of those gradients that the updates of the call would change before they are used up.

    ``owners`` are those of all memory that the call writes to.
    """
    if not any((owner := entry.backend.owner(grad)) == 0 or owner in owners for entry, grad, _ in pairs):
        return pairs
    entries = [entry for entry, _, _ in pairs]
    written = sorted({span for entry in entries for span in _written(entry)})
    starts = [start for start, _ in written]
    ends = list(accumulate((end for _, end in written), max))
    detached = []
    for entry, grad, indices in pairs:
        span = entry.backend.bounds(grad)
        before = bisect_left(starts, span[1])
        if before and ends[before - 1] > span[0] and not _reads_itself(entry, grad, indices, entries):
            grad = entry.backend.copy(grad)
        detached.append((entry, grad, indices))
    return detached


def _written(entry: Entry) -> list[Span]:
    return [entry.bounds, *(entry.backend.bounds(slot._array) for slot in entry.slots.values())]


def _reads_itself(entry: Entry, grad: Array, indices: Array | None, entries: Sequence[Entry]) -> bool:
    """A dense gradient that is just its variable's array is safe: each element is read before it is written."""
    others = (_written(other) for other in entries if other is not entry)
    return (
        indices is None
        and entry.backend.key(grad) == entry.key
        and sum(other is entry for other in entries) == 1
        and not any(_overlap(span, entry.bounds) for spans in others for span in spans)
    )


def rounds(entries: Sequence[Entry]) -> list[int]:
    """For each update of a call the round in which it may run: later than those before it on the same memory."""
    owners = {entry.owner for entry in entries}
    if len(owners) == len(entries) and 0 not in owners:
        return [0] * len(entries)
    by_address = sorted(entry.bounds for entry in entries)
    if not any(_overlap(a, b) for a, b in pairwise(by_address)):
        return [0] * len(entries)
    numbers: list[int] = []
    for i, entry in enumerate(entries):
        before = (numbers[j] for j in range(i) if entries[j] is entry or _overlap(entries[j].bounds, entry.bounds))
        numbers.append(max(before, default=-1) + 1)
    return numbers


def _overlap(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]
