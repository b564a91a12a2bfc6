"""The progress bar, and the threads that run under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from threadpoolctl import threadpool_limits
from tqdm import tqdm


@contextmanager
def training(n_words: int) -> Iterator[Any]:
    """A tqdm bar that counts words, while NumPy's matrix products keep to one thread.

    More threads do not speed up products as small as the demo's, and make them crawl on a busy machine.
    """
    with (
        threadpool_limits(1, "blas"),
        tqdm(total=n_words, desc="training", unit=" words", unit_scale=True, dynamic_ncols=True) as bar,
    ):
        yield bar
