"""What the CPU suite asks, in order, and how."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from bench import machine
from bench.answer import Answer

QUESTIONS = ("dense", "rules", "dtypes", "small", "sparse", "memory", "imports", "compiling")

describe = machine.describe


def problem() -> str:
    """Why nothing can be measured here; empty if it can."""
    return ""


def ask(name: str, quick: bool, described: Mapping[str, Any]) -> Answer:
    """The answer to one question, in this process."""
    answer: Answer = import_module(f"bench.cpu.{name}").run(quick)
    return answer
