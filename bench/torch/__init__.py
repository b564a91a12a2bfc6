"""What the suite of the torch drop-in asks, in order, and how."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from bench import machine
from bench.answer import Answer

QUESTIONS = ("large", "host", "rows", "cuda")

describe = machine.describe


def problem() -> str:
    """Why nothing can be measured here; empty if it can."""
    return "" if find_spec("torch") else "torch is not installed: pip install torch"


def ask(name: str, quick: bool, described: Mapping[str, Any]) -> Answer:
    """The answer to one question, in this process."""
    answer: Answer = import_module(f"bench.torch.{name}").run(quick)
    return answer
