"""Where in its owner a view lies."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Place(NamedTuple):
    """A view as a place in the contiguous array that owns its memory, so that it can be found again in a copy of it."""

    owner: Any
    owner_strides: tuple[int, ...]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
