"""The number of steps: a variable, and what the host knows of it where the variable is on a GPU."""

from __future__ import annotations

import numpy as np

from gpurms import backend
from gpurms.variable import Variable


class Counter:
    """A 0-d int64 ``Variable``. One on a GPU is read once, and again only after somebody has assigned to it."""

    def __init__(self, variable: Variable) -> None:
        self.variable = variable
        self._home = backend.require(variable._array)
        self._known: int | None = None
        self._version = variable._version

    @property
    def on_device(self) -> bool:
        """Whether reading it means waiting for a GPU."""
        return self._home.device(self.variable._array) is not None

    def require_writeable(self) -> None:
        """TypeError if it cannot be counted up."""
        if not self._home.writeable([self.variable._array]):
            raise TypeError("iterations has been made read-only")

    @property
    def is_known(self) -> bool:
        """Whether it can be read without waiting."""
        return not self.on_device or (self._known is not None and self.variable._version == self._version)

    def forget(self) -> None:
        """Read it again the next time: replays may have counted."""
        self._known = None

    def read(self) -> np.int64:
        """The number of steps, replays counted by ``expect`` included."""
        if not self.on_device:
            return np.int64(self.variable._array)
        if self._known is None or not self.is_known:
            self._known = int(self.variable.numpy())
            self._version = self.variable._version
        return np.int64(self._known)

    def increment(self, captured: bool = False) -> None:
        """Count a step; a captured one runs, and is known, only when it is replayed."""
        self._home.increment(self.variable._array)
        if not captured:
            self.expect()

    def expect(self) -> None:
        """Know of a step that the device counts; other optimizers with the same variable see that it has changed."""
        was_known = self._known is not None and self.is_known
        self.variable._version += 1
        if self._known is not None and was_known:
            self._known += 1
            self._version = self.variable._version

    def __getstate__(self) -> Variable:
        return self.variable

    def __setstate__(self, variable: Variable) -> None:
        Counter.__init__(self, variable)
