"""Arrays of one call that share memory: gradients are values from before the call, updates happen in order.

Both matter in practice: ``apply_gradients([(b, a), (a, b)])`` is the hand-written gradient of a product, and views of
one flat buffer are common. Arrays that share memory share its owner, so calls without shared owners, nearly all, cost
one set lookup per array.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from gpurms.slots import Entry, memory_owner
from gpurms.variable import Array


def detached(grad: Array, entry: Entry, dense: bool, entries: Sequence[Entry]) -> Array:
    """The gradient of ``entry``, copied if the updates of ``entries`` would change it before it is used up.

    A dense gradient that is the array of its own variable, once in the call, is safe: each element is read before it
    is written.
    """
    owner, home = memory_owner(grad), entry.backend
    span = (id(owner), *home.bounds(grad))
    safe = dense and home.key(grad) == entry.key and sum(other is entry for other in entries) == 1
    for other in entries:
        is_slot = any(memory_owner(slot._array) is owner for slot in other.slots.values())
        overlaps = _overlap(span, (id(other.owner), *home.bounds(other.view)))
        if is_slot or (overlaps and not (safe and other is entry)):
            return grad.copy()
    return grad


def rounds(entries: Sequence[Entry]) -> list[int]:
    """For each update of a call the round in which it may run: later than those before it on the same memory."""
    if len({id(entry.owner) for entry in entries}) == len(entries):
        return [0] * len(entries)
    bounds = [(id(entry.owner), *entry.backend.bounds(entry.view)) for entry in entries]
    by_address = sorted(bounds)
    if not any(_overlap(a, b) for a, b in pairwise(by_address)):
        return [0] * len(entries)
    numbers: list[int] = []
    for i, span in enumerate(bounds):
        before = (numbers[j] for j in range(i) if _overlap(bounds[j], span))
        numbers.append(max(before, default=-1) + 1)
    return numbers


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether two (owner, first address, address behind the last) share memory."""
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
