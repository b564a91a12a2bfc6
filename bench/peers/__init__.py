"""What gpurms is compared with: one module per library, imported when a question asks for it."""

from __future__ import annotations

import importlib
from types import ModuleType

from bench.measure import Missing

LR, RHO, MOMENTUM, EPSILON = 1e-3, 0.9, 0.9, 1e-7
"""The same hyperparameters for every contestant."""


def load(name: str) -> ModuleType:
    """The module of a peer.

    Raises:
        Missing: its library is not installed or does not import.
    """
    try:
        return importlib.import_module(f"bench.peers.{name}")
    except Exception as error:  # an installation can be broken in as many ways as there are libraries below it
        raise Missing(f"{type(error).__name__}: {error}") from error
