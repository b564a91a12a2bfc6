"""Steps recorded in CUDA graphs: what they read, and what has to stay as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpurms import backend
from gpurms.aliasing import Pair
from gpurms.clipping import Clip
from gpurms.counter import Counter
from gpurms.kernels.rule import Step
from gpurms.slots import label
from gpurms.variable import Variable


class Capture:
    """The captured steps of one optimizer."""

    def __init__(self) -> None:
        self.live: dict[Any, Any] = {}
        """The scalars of capturable steps in device memory, by (device, compute type)."""
        self._kept: list[Any] = []
        self._settings: tuple[Any, ...] = ()

    def record(self, pairs: Sequence[Pair], apply: Callable[[], None], now: Step, clip: Clip | None) -> None:
        """Keep all that the graph uses, which is what ``apply`` refers to, for as long as the optimizer lives."""
        self._kept.append((pairs, apply))
        self._settings = (now.flags, clip)

    def prepare(self, now: Step, clip: Clip | None) -> None:
        """Send the scalars of the next replay to where the captured step reads them.

        Raises:
            RuntimeError: nothing was captured, or what a capture fixes has changed since.
        """
        if not self._kept:
            raise RuntimeError("no step has been captured: see `capturable`")
        if self._settings != (now.flags, clip):
            raise RuntimeError(
                "a captured step has its terms and norm limits fixed; only lr, rho, momentum, epsilon, weight_decay "
                f"and clipvalue may change, and none of them from or to off: captured {self._settings}, now "
                f"{(now.flags, clip)}"
            )
        home = backend.require(next(iter(self.live.values())))
        home.send_scalars(self.live, now.scalars)


def is_capturing(pairs: Sequence[Pair]) -> bool:
    """Whether the step of these pairs is being recorded."""
    places = {(entry.backend, entry.device) for entry, _, _ in pairs}
    return any(home.is_capturing(device) for home, device in places)


def check(counter: Counter | None, pairs: Sequence[Pair], makes_slots: bool) -> None:
    """RuntimeError if a graph of this step could not be replayed."""
    if counter is None or makes_slots:
        raise RuntimeError("take one step with these variables before capturing one: it makes slots and the counter")
    if not counter.on_device:
        raise RuntimeError(
            "iterations is on the host, where a captured step cannot count: set capturable before the first step, or "
            "iterations to a Variable on the GPU"
        )
    for entry, _, _ in pairs:
        if isinstance(entry.variable, Variable) and entry.variable.constraint is not None:
            raise RuntimeError(
                f"{label(entry.variable)}: a constraint cannot be captured, for the memory it works in would not "
                "outlive the capture"
            )
