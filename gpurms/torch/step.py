"""One step of one parameter group: everything is checked and prepared, then applied."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gpurms import backend
from gpurms.kernels.rule import SCALARS, Flags, Step
from gpurms.torch import state, tensors
from gpurms.torch.members import KEPT, Launch, Members, Parts
from gpurms.torch.scaling import LossScale
from gpurms.torch.state import State
from gpurms.torch.tensors import TYPES, array, array_type

States = MutableMapping[Tensor, State]
_device = attrgetter("device")
FIRST_STEP = "take one step with these parameters before capturing one: it makes their state, or brings it beside them"


@dataclass(frozen=True)
class Prepared:
    """A step of one group that can no longer fail."""

    members: Members
    added: dict[Tensor, State]  # what the state of each parameter lacked
    launches: list[Launch]
    kept: Any  # what a captured graph needs besides

    def apply(self, states: States) -> None:
        """Change state and parameters."""
        for parameter, new in self.added.items():
            if new:
                states[parameter].update(new)
        for launch in self.launches:
            launch()


class GroupStep:
    """What the steps of a parameter group keep for those that follow."""

    def __init__(self) -> None:
        self._known: list[Members] = []  # the latest first: some loops use one part of a model, then another
        self._live: dict[tuple[int, torch.dtype], Tensor] = {}

    def prepare(
        self, group: Mapping[str, Any], parameters: list[Tensor], states: States, scale: LossScale, capturing: bool
    ) -> Prepared:
        """Check everything. ``parameters`` are those with gradients, at least one.

        ``capturing``: the step goes into a graph.
        """
        if capturing and not group["capturable"]:
            raise RuntimeError("a step can be captured in a graph only with capturable=True in all parameter groups")
        own = tensors.local(parameters)
        devices = sorted(device.index for device in set(map(_device, own)) if device.type == "cuda")
        live = self._live_scalars(group["lr"], own)
        now = state.read_step(group, scale.grad_scale is not None, live, scale.skip(devices))
        members, added = self._members(parameters, own, states, now.flags, capturing)
        launches = members.plan(tensors.gradients(parameters), now, scale.factors(devices))
        if live:
            launches = [lambda: _send(live, self._live, now, group), *launches]
        return Prepared(members, added, launches, (scale, group["lr"]))

    def _members(
        self, parameters: list[Tensor], own: Sequence[Tensor], states: States, flags: Flags, capturing: bool
    ) -> tuple[Members, dict[Tensor, State]]:
        """The parameters with their slots, and what the state of each lacks."""
        names = state.slot_names(flags)
        parts = _parts(parameters, own, states, names)
        if parts is not None:
            for known in self._known:
                if known.fit(parts, flags):
                    return known, {}
        if capturing and (parts is None or list(map(_device, parts.steps)) != list(map(_device, own))):
            raise RuntimeError(FIRST_STEP)
        added = {each: state.missing(each, states.get(each), names) for each in parameters}
        if capturing and any(added.values()):
            raise RuntimeError(FIRST_STEP)
        merged = {each: {**states.get(each, {}), **new} for each, new in added.items()}
        parts = _parts(parameters, own, merged, names)
        assert parts is not None
        members = Members(parts, flags)
        # What is no longer where it was would be kept alive for nothing.
        self._known = [members, *(each for each in self._known if _is_up_to_date(each, states))][:KEPT]
        return members, added

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


def _parts(
    parameters: list[Tensor], own: Sequence[Tensor], states: Mapping[Tensor, State], names: Sequence[str]
) -> Parts | None:
    """The parameters with their slots and counts; None if one of these is missing or no tensor."""
    found: Any = [states.get(each) for each in parameters]
    try:
        slots = [[each[name] for each in found] for name in names]
        steps = [each["step"] for each in found]
    except (KeyError, TypeError):
        return None
    if not all(issubclass(kind, Tensor) for some in (*slots, steps) for kind in set(map(type, some))):
        return None
    return Parts(parameters, own, list(map(tensors.local, slots)), steps)


def _is_up_to_date(members: Members, states: States) -> bool:
    own = tensors.local(members.parameters)
    parts = _parts(members.parameters, own, states, state.slot_names(members.flags))
    return parts is not None and members.fit(parts, members.flags)


def _send(live: Mapping[Any, Any], places: Mapping[Any, Tensor], now: Step, group: Mapping[str, Any]) -> None:
    """The scalars of the step to where the kernels read them; what depends on ``lr`` is made there."""
    backend.require(next(iter(live.values()))).send_scalars(live, now.scalars)
    lr = group["lr"].to(torch.float64).reshape(())
    for place in places.values():
        place[SCALARS.index("lr")].copy_(lr, non_blocking=True)
        place[SCALARS.index("lr_weight_decay")].copy_(lr * now.weight_decay, non_blocking=True)
