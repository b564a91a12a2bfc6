"""The state of an optimizer: its accumulators, one set per variable, and the order in which they were made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from gpurms import backend
from gpurms.hyper import FLOAT_NAMES, is_supported
from gpurms.kernels.rule import FLOAT32, FLOAT64, Update, compute_dtype
from gpurms.place import Place
from gpurms.variable import Array, Variable


class Entry:
    """A variable as one optimizer knows it: its array, checked once, and its slots by name."""

    __slots__ = (
        "accepts",
        "array",
        "backend",
        "bounds",
        "compute",
        "device",
        "dtype",
        "key",
        "owner",
        "shape",
        "slots",
        "update",
        "variable",
        "view",
        "written",
    )

    def __init__(self, variable: Any, where: str) -> None:
        self.variable = variable
        self.array = array_of(variable)
        home = backend.of(self.array)
        if home is None:
            raise TypeError(
                f"{where}: expected a gpurms.Variable or a writeable array of {FLOAT_NAMES}; got {self.array!r:.80}"
            )
        self.backend = home
        self.dtype: np.dtype[Any] = self.array.dtype
        if not is_supported(self.dtype):
            raise TypeError(f"{where}: expected {FLOAT_NAMES}; got {self.dtype}")
        self.shape: tuple[int, ...] = self.array.shape
        self.compute = compute_dtype(self.dtype)
        self.accepts = {self.dtype, FLOAT32, FLOAT64} if self.dtype.itemsize == 2 else {self.dtype}
        self.view = home.view(self.array)
        self.key = home.key(self.array)
        self.owner = home.owner(self.view)
        self.device = home.device(self.view)
        self.bounds = home.bounds(self.view)
        self.slots: dict[str, Variable] = {}
        self.written: list[Array] = [self.array]  # and the slots' arrays: what a step writes to
        self.update: Update | None = None  # of the latest step, for the next one to fill in again

    def add(self, name: str, slot: Variable) -> None:
        """Add a slot."""
        self.slots[name] = slot
        self.written.append(slot._array)
        self.update = None


def array_of(variable: Any) -> Any:
    """The array of a ``Variable``, or the argument itself."""
    return variable._array if isinstance(variable, Variable) else variable


def label(variable: Any, position: int | None = None) -> str:
    """How messages name a variable."""
    if isinstance(variable, Variable):
        return f"variable {variable.name!r}"
    at = "" if position is None else f" {position}"
    shape, dtype = getattr(variable, "shape", None), getattr(variable, "dtype", None)
    kind = type(variable).__name__
    return f"variable{at} ({kind})" if dtype is None else f"variable{at} ({dtype} {kind} of shape {shape})"


class Slots:
    """All entries of an optimizer, and its weights: the counter, then slots in the order they were made.

    Entries are found by the identity of the array object or, for a new view on known memory, by the backend's key
    (pointer, shape, strides, type). Entries keep their arrays alive, so neither is ever reused by another array.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.weights: list[Variable] = []
        self.owners: set[int] = set()  # of all memory that steps write to
        self.entries: dict[Any, Entry] = {}
        self._by_id: dict[int, Entry] = {}
        self._before_counter: list[Variable] = []

    def all(self) -> list[Variable]:
        """All slots, in the order they were made."""
        return self.weights[1:] or self._before_counter

    def find(self, variable: Any) -> Entry | None:
        """The entry of a known variable."""
        array = variable._array if type(variable) is Variable else array_of(variable)
        entry = self._by_id.get(id(array))
        if (
            entry is not None
            and array.shape == entry.shape
            and (array.dtype is entry.dtype or array.dtype == entry.dtype)
        ):
            return entry  # shape and type as they were: both can be set in place
        home = backend.of(array)
        return None if home is None else self.entries.get(home.key(array))

    def adopt(self, entry: Entry) -> None:
        """Add an entry; known ones stay."""
        if self.entries.setdefault(entry.key, entry) is entry:
            self._by_id[id(entry.array)] = entry
            self.owners.add(entry.owner)

    def add(self, entry: Entry, name: str, slot: Variable) -> None:
        """Add a slot to an adopted entry."""
        entry.add(name, slot)
        self.owners.add(entry.backend.owner(slot._array))
        if name not in self.names:
            self.names.append(name)
        (self.weights if self.weights else self._before_counter).append(slot)

    def set_counter(self, counter: Variable) -> None:
        """Put the counter in front of the weights."""
        self.weights += [counter, *self._before_counter]
        self._before_counter = []

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("names", "weights", "_before_counter")}
        entries = [(entry.variable, entry.slots, entry.backend.place(entry.array)) for entry in self.entries.values()]
        return {**kept, "entries": entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Keys are made anew, for copies have new addresses.

        A view is copied apart from the array it was a view of. Whichever of the two the caller goes on with finds the
        slots: the copied view, and its place in the copied array.
        """
        Slots.__init__(self)
        entries: Iterable[tuple[Any, dict[str, Variable], Place | None]] = state.pop("entries")
        self.__dict__.update(state)
        for variable, slots, place in entries:
            for each in (variable, None if place is None else backend.require(place.owner).find(place)):
                if each is not None:
                    entry = Entry(each, label(each))
                    for name, slot in slots.items():
                        entry.add(name, slot)
                    entry.slots = slots
                    self.adopt(entry)
            self.owners.update(backend.require(slot._array).owner(slot._array) for slot in slots.values())
