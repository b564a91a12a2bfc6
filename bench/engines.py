"""gpurms as a contestant: one per CPU engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench.measure import Missing, Race, Ready
from gpurms.kernels import cpu

NUMBA, NUMPY = "gpurms Numba", "gpurms NumPy"
ENGINES = {NUMBA: "numba", NUMPY: "numpy"}


def enter(race: Race, name: str, make: Callable[[], Ready], suffix: str = "") -> None:
    """Add gpurms with the engine that ``name`` stands for, as ``name + suffix``."""
    engine = ENGINES[name]

    def made() -> Ready:
        require(engine)
        return make()

    race.enter(name + suffix, made, partial(cpu.use_engine, engine))


def require(engine: str) -> None:
    """Raise ``Missing`` where the engine cannot run."""
    for name, usable, detail in cpu.engine_report():
        if name == engine and not usable:
            raise Missing(detail)
