"""Where in its owner a view lies."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Place(NamedTuple):
    """A view as a place in the array that owns its memory, so that it can be found again in a copy of the owner."""

    owner: np.ndarray[Any, Any]
    owner_strides: tuple[int, ...]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    def view(self) -> np.ndarray[Any, Any] | None:
        """The view, or None if the owner was copied into another layout."""
        if self.owner.strides != self.owner_strides:
            return None
        flat = self.owner.reshape(-1, order="A").view(np.uint8)
        return np.ndarray(self.shape, self.dtype, flat, self.offset, self.strides)
