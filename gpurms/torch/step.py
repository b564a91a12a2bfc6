"""One step of one parameter group: everything is checked and prepared, then applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gpurms import backend
from gpurms.kernels.rule import SCALARS, Step
from gpurms.torch import state, tensors
from gpurms.torch.members import Members
from gpurms.torch.scaling import LossScale
from gpurms.torch.state import State
from gpurms.torch.tensors import TYPES, array, array_type

States = MutableMapping[Tensor, State]
_device = attrgetter("device")
KEPT = 4
"""Sets of parameters with gradients that a group remembers: some loops use one part of a model, then another."""
FIRST_STEP = "take one step with these parameters before capturing one: it makes their state, or brings it beside them"


class GroupStep:
    """What the steps of a parameter group keep for those that follow."""

    def __init__(self) -> None:
        self._known: list[Members] = []  # the latest first
        self._live: dict[tuple[int, torch.dtype], Tensor] = {}

    def prepare(
        self, group: Mapping[str, Any], parameters: list[Tensor], states: States, scale: LossScale, capturing: bool
    ) -> Callable[[], Any]:
        """Check everything; the function returned changes things, and returns what a captured graph needs, or None.

        ``parameters`` are those with gradients, at least one. ``capturing``: the step goes into a graph.
        """
        if capturing and not group["capturable"]:
            raise RuntimeError("a step can be captured in a graph only with capturable=True in all parameter groups")
        own = tensors.local(parameters)
        devices = sorted(device.index for device in set(map(_device, own)) if device.type == "cuda")
        live = self._live_scalars(group["lr"], own)
        skip = scale.skip(devices)
        now = state.read_step(group, scale.grad_scale is not None, live, skip)
        names = state.slot_names(now.flags)

        slots, steps = _slots(parameters, states, names)
        if capturing and (steps is None or list(map(_device, steps)) != list(map(_device, own))):
            raise RuntimeError(FIRST_STEP)
        fitting = (each for each in self._known if slots is not None and each.fit(parameters, own, slots, now.flags))
        members, added = next(fitting, None), {}
        if members is None:
            added = {each: state.missing(each, states.get(each), names) for each in parameters}
            merged = {each: {**states.get(each, {}), **new} for each, new in added.items()}
            slots, steps = _slots(parameters, merged, names)
            assert slots is not None
            members = Members(parameters, own, slots, now)
        if capturing and any(added.values()):
            raise RuntimeError(FIRST_STEP)
        factors = scale.factors(devices)
        launches = members.plan(tensors.gradients(parameters), now, factors)
        counts = _by_device(steps)

        def apply() -> Any:
            others = [each for each in self._known if each is not members and not each.are(parameters)]
            self._known = [members, *others][:KEPT]
            for each, new in added.items():
                if new:
                    states[each].update(new)
            if live:
                _send(live, self._live, now, group)
            for launch in launches:
                launch()
            for device, some in counts.items():
                torch._foreach_add_(some, scale.counted(device), alpha=1.0)
            torch.autograd.graph.increment_version(parameters)
            return (launches, counts, scale, group["lr"]) if capturing else None

        return apply

    def _live_scalars(self, lr: Any, own: Sequence[Tensor]) -> dict[Any, Any] | None:
        """By (device, compute type) the scalars of the step on each GPU, for an ``lr`` that is on one; else None."""
        if not (isinstance(lr, Tensor) and lr.is_cuda):
            return None
        for each in own:
            if not each.is_cuda:
                raise RuntimeError("an lr on a GPU needs parameters on GPUs; this group has some on the CPU")
            key = (each.device.index, TYPES[each.dtype])
            if key not in self._live:
                self._live[key] = torch.empty(len(SCALARS), dtype=key[1], device=each.device)
        return {(device, array_type(compute)): array(place) for (device, compute), place in self._live.items()}


def _slots(parameters: Sequence[Tensor], states: Mapping[Tensor, State], names: Sequence[str]) -> Any:
    """This rank's part of the slots, by name, then by parameter; and the numbers of steps. None if one is missing."""
    found: Any = [states.get(each) for each in parameters]
    try:
        return [tensors.local([each[name] for each in found]) for name in names], [each["step"] for each in found]
    except (KeyError, TypeError):
        return None, None


def _send(live: Mapping[Any, Any], places: Mapping[Any, Tensor], now: Step, group: Mapping[str, Any]) -> None:
    """The scalars of the step to where the kernels read them; what depends on ``lr`` is made there."""
    backend.require(next(iter(live.values()))).send_scalars(live, now.scalars)
    lr = group["lr"].to(torch.float64).reshape(())
    for place in places.values():
        place[SCALARS.index("lr")].copy_(lr, non_blocking=True)
        place[SCALARS.index("lr_weight_decay")].copy_(lr * now.weight_decay, non_blocking=True)


def _by_device(some: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for each in some:
        found.setdefault(each.device, []).append(each)
    return found
