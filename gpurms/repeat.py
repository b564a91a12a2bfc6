"""The call before, to recognise one like it: the usual case, and the one in which looking things up costs most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, eq, is_
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurms import step
from gpurms.aliasing import Pair
from gpurms.kernels.rule import Step
from gpurms.slots import array_of
from gpurms.variable import Variable

if TYPE_CHECKING:
    from gpurms.rmsprop import RMSprop

Launch = Callable[[np.ndarray[Any, Any], Step], None]
"""Apply gradients that look like those before: where they are, and the numbers of the step."""

_look = attrgetter("dtype", "shape", "strides")
_shape = attrgetter("shape")
_data, _memory, _device, _pointer = map(attrgetter, ("data", "mem", "device_id", "ptr"))


class Repeat:
    """Variables of a call, in order, whose gradients were all dense and on one GPU, and how those looked.

    A call of the same variables with such gradients needs no look-ups and no checks one by one: what they would find is
    known, and only pointers and scalars of its launches are new. Everything is compared as lists, at a fraction of a
    microsecond per variable.
    """

    def __init__(
        self, optimizer: RMSprop, items: Sequence[tuple[Any, Any]], pairs: Sequence[Pair], now: Step, launch: Launch
    ) -> None:
        self.launch = launch
        self._variables = [variable for _, variable in items]
        self._constrained = [variable for variable in self._variables if isinstance(variable, Variable)]
        self._arrays = [array_of(variable) for variable in self._variables]
        self._shapes = list(map(_shape, self._arrays))
        self._kind = type(pairs[0][1])
        self._looks = [_look(grad) for _, grad, _ in pairs]
        self._device = pairs[0][0].device
        self._home: Any = pairs[0][0].backend
        self._n_slots = len(optimizer._slots.weights)
        self._clip = step.clip(optimizer)
        self.flags = now.flags

    def pointers(self, optimizer: RMSprop, items: Sequence[Any]) -> np.ndarray[Any, Any] | None:
        """Where the gradients are, if the call is like the one before; else None."""
        if len(items) != len(self._variables) or set(map(type, items)) != {tuple} or set(map(len, items)) != {2}:
            return None
        grads, variables = zip(*items)
        if not all(map(is_, variables, self._variables)) or set(map(type, grads)) != {self._kind}:
            return None
        data = list(map(_data, grads))
        memory = list(map(_memory, data))
        fits = (
            all(map(eq, map(_look, grads), self._looks))  # one by one: lists would be garbage to collect
            and all(map(eq, map(_shape, self._arrays), self._shapes))
            and set(map(_device, data)) == {self._device}
            and optimizer._slots.owners.isdisjoint((0, *map(id, memory)))
            and not any(variable.constraint for variable in self._constrained)
            and len(optimizer._slots.weights) == self._n_slots
            and step.clip(optimizer) == self._clip
            and not optimizer.capturable
            and all(map(self._home.is_owned, set(map(type, memory))))
        )
        return np.fromiter(map(_pointer, data), np.int64, len(data)) if fits else None


def launch_of(
    optimizer: RMSprop, items: Sequence[Any], pairs: Sequence[Pair], now: Step, planned: step.Plan
) -> Launch | None:
    """How to launch the next call like this one, or None. It allocates, so it is asked before anything changes."""
    plain = len(pairs) == len(items) and now.live is None
    if not plain or len(planned.plans) != 1:
        return None
    return pairs[0][0].backend.repeat(planned.plans[0], step.clip(optimizer))
