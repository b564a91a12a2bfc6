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
        self._settings: set[tuple[Any, ...]] = set()

    def record(self, pairs: Sequence[Pair], apply: Callable[[], None], now: Step, clip: Clip | None) -> None:
        """Keep all that the graph uses, which is what ``apply`` refers to, for as long as the optimizer lives."""
        self._kept.append((pairs, apply))
        self._settings.add((now.flags, clip))

    def prepare(self, now: Step, clip: Clip | None) -> None:
        """Send the scalars of the next replay to where the captured step reads them.

        Raises:
            RuntimeError: nothing was captured, or what a capture fixes has changed since.
        """
        if not self._kept:
            raise RuntimeError("no step has been captured: see `capturable`")
        if (now.flags, clip) not in self._settings:
            raise RuntimeError(
                "a captured step has its terms and norm limits fixed; only lr, rho, momentum, epsilon and weight_decay "
                f"may change, and none of them from or to 0: captured {self._settings}, now {(now.flags, clip)}"
            )
        home = backend.require(next(iter(self.live.values())))
        if any(home.is_capturing(device) for device, _ in self.live):
            raise RuntimeError(
                "a replay cannot be prepared while a graph is captured"
            )  # which would send the same again
        home.send_scalars(self.live, now.scalars)

    def recount(self, counter: Counter) -> None:
        """Before a step outside of a capture: replays may have counted since the last."""
        if self._kept:
            counter.forget()


def is_capturing(pairs: Sequence[Pair]) -> bool:
    """Whether the step of these pairs is being recorded.

    Raises:
        RuntimeError: a part of it is, and the rest would run now, and never again.
    """
    places = {(entry.backend, entry.device) for entry, _, _ in pairs}
    capturing = {place: place[0].is_capturing(place[1]) for place in places}
    if any(capturing.values()) and not all(capturing.values()):
        running = ["the host" if device is None else f"GPU {device}" for (_, device), on in capturing.items() if not on]
        raise RuntimeError(
            f"a step can only be captured whole, but {' and '.join(sorted(running))} would run its part at once"
        )
    return any(capturing.values())


FIRST_STEP = "take one step with these variables before capturing one: it makes slots and the counter"


def check(counter: Counter | None, pairs: Sequence[Pair]) -> None:
    """RuntimeError if a graph of this step could not be replayed."""
    if counter is None:
        raise RuntimeError(FIRST_STEP)
    array = counter.variable._array
    home = backend.require(array)
    if not home.is_capturing(home.device(array)):
        raise RuntimeError(
            f"iterations is on {'GPU ' + str(home.device(array)) if counter.on_device else 'the host'}, where a "
            "captured step would not count: set capturable before the first step, or iterations to a Variable beside "
            "the variables"
        )
    if not counter.is_known:
        raise RuntimeError("iterations has been assigned to: take a step, or call prepare_replay, before capturing one")
    for entry, _, _ in pairs:
        if isinstance(entry.variable, Variable) and entry.variable.constraint is not None:
            raise RuntimeError(
                f"{label(entry.variable)}: a constraint cannot be captured, for the memory it works in would not "
                "outlive the capture"
            )
