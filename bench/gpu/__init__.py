"""What the GPU suite asks, in order, and how: each question in a process of its own, with a time limit."""

from __future__ import annotations

import statistics
import time
from typing import Any

from bench import machine
from bench.answer import Answer
from bench.gpu import process
from gpurms import backend

QUESTIONS = {"bandwidth": 20, "tests": 90, "bits": 50, "dense": 50, "sparse": 50, "many": 80, "clip": 25, "sizes": 105}
"""The questions, in order, and the seconds that each may take."""
TOTAL = 470
"""Seconds that all questions together may take."""
CUPY = ("cupy", "cupy-cuda12x", "cupy-cuda13x")
"""The names of one package."""
PEERS = ("torch", "triton", "jax", "jaxlib", "optax")
TOOLS = ("pytest", "hypothesis", "matplotlib")
PACKAGES = ("numpy", *CUPY, "numba", "ml_dtypes", "autograd", *PEERS, *TOOLS)


def problem() -> str:
    """Why nothing can be measured here; empty if it can."""
    (_, usable, detail), *_ = backend.report()
    return "" if usable else f"needs an NVIDIA GPU: {detail}"


def describe() -> dict[str, Any]:
    """The machine, its GPU, and versions; the copy bandwidth and the seconds of each question are filled in later."""
    described = machine.describe(PACKAGES)
    missing = [name for name in PACKAGES if name not in described["packages"] and name not in CUPY]
    gpu = machine.describe_gpu()
    return {**described, "missing": missing, "sources": machine.sources(), "gpu": gpu, "seconds": {}}


def ask(name: str, quick: bool, described: dict[str, Any]) -> Answer:
    """The answer to one question, or to as much of it as its time allows."""
    left = TOTAL - sum(described["seconds"].values())
    began = time.monotonic()
    answer = process.ask(name, quick, min(QUESTIONS[name], left))
    described["seconds"][name] = round(time.monotonic() - began, 1)
    if name == "bandwidth" and answer.series:
        described["gpu"]["copy_GB_per_s"] = statistics.median(answer.series[0].values)
    return answer
