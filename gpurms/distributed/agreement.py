"""What ranks tell each other before data moves: what each is about to do, or that it cannot.

A rank that raised by itself would leave the others waiting in a collective that it never enters. So whatever can fail
on one rank alone runs inside ``agreed``, and its failure becomes everybody's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

Words = np.ndarray[Any, np.dtype[np.int64]]
T = TypeVar("T")

FORWARDED = {kind.__name__: kind for kind in (IndexError, RuntimeError, TypeError, ValueError)}


class Control(Protocol):
    """Small collectives on host values, each of which waits for all ranks."""

    rank: int
    size: int

    def greatest(self, words: Words) -> Words:
        """The elementwise maximum over the ranks."""
        ...

    def gather_counts(self, counts: Words) -> Words:
        """The counts of all ranks, of shape (size, n)."""
        ...

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """The data of all ranks."""
        ...


class Intent(NamedTuple):
    """What a rank is about to do, line by line, and a hash of that."""

    lines: Sequence[str]
    words: Words

    @classmethod
    def of(cls, lines: Sequence[str]) -> Intent:
        """Lines are compared by place."""
        digest = blake2b(json.dumps(lines).encode(), digest_size=16).digest()
        return cls(lines, np.frombuffer(digest, "<i8").astype(np.int64))


def agreed(control: Control, prepare: Callable[[], tuple[Intent, T]]) -> T:
    """What ``prepare`` returns beside its intent, once all ranks have the same intent; collective.

    ``prepare`` does all that may fail on one rank alone, and communicates nothing.

    Raises:
        IndexError, RuntimeError, TypeError, ValueError: ``prepare`` did on some rank; raised on every rank.
        RuntimeError: it raised something else on some rank.
        ValueError: the intents differ; names the first line where they do.
    """
    failure = result = None
    intent = Intent.of([])
    try:
        intent, result = prepare()
    except Exception as error:  # whatever it is, the others must not wait for this rank
        failure = error
    low_and_high = control.greatest(np.array([*intent.words, *~intent.words, failure is not None], np.int64))
    if low_and_high[4] or (low_and_high[:2] != ~low_and_high[2:4]).any():
        _raise_on_all(control, intent, failure)
    return result  # type: ignore[return-value]  # None only after a failure


def _raise_on_all(control: Control, intent: Intent, failure: Exception | None) -> None:
    trouble = None if failure is None else (type(failure).__name__, str(failure))
    told = control.gather_bytes(json.dumps([trouble, intent.lines]).encode())
    troubles, lines = zip(*map(json.loads, told))
    for rank, trouble in enumerate(troubles):
        if trouble is not None:
            name, message = trouble
            if name in FORWARDED:
                raise FORWARDED[name](f"rank {rank}: {message}") from failure
            raise RuntimeError(f"rank {rank}: {name}: {message}") from failure
    for claims in zip_longest(*lines, fillvalue="nothing more"):
        for rank, claim in enumerate(claims):
            if claim != claims[0]:
                raise ValueError(f"ranks disagree: rank 0 has {claims[0]}; rank {rank} has {claim}")
