"""One step made ready: hyperparameters read, missing slots made, updates handed to their libraries.

``RMSprop.apply_gradients`` calls these in order, and only then changes anything: all that can fail has happened before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurms import aliasing, clipping
from gpurms.aliasing import Pair
from gpurms.backend import Backend
from gpurms.clipping import Clip
from gpurms.kernels.rule import Flags, Rule, Step, Update, release
from gpurms.slots import Entry
from gpurms.variable import Variable

if TYPE_CHECKING:
    from gpurms.rmsprop import RMSprop

NewSlot = tuple[Entry, str, Variable]


def read(optimizer: RMSprop, iterations: int) -> Step:
    """Every hyperparameter, read once and checked, for the step that follows ``iterations`` steps."""
    if iterations < 0:
        raise ValueError(f"iterations must be >= 0; got {iterations}")
    kind = type(optimizer)
    lr, rho, momentum, epsilon, decay = (
        setting.at(optimizer, iterations)
        for setting in (kind.learning_rate, kind.rho, kind.momentum, kind.epsilon, kind.decay)
    )
    if decay > 0:
        lr = lr / (1.0 + decay * iterations)
    weight_decay = optimizer.weight_decay or 0.0
    decoupled = optimizer.decoupled_weight_decay
    flags = Flags(
        clip_value=optimizer.clipvalue is not None,
        has_factor=optimizer.clipnorm is not None or optimizer.global_clipnorm is not None,
        maximize=optimizer.maximize,
        l2=weight_decay > 0 and not decoupled,
        decoupled=weight_decay > 0 and decoupled,
        centered=optimizer.centered,
        has_momentum=momentum > 0 or callable(optimizer._settings["momentum"]),
        nesterov=optimizer.nesterov,
        eps_in_sqrt=optimizer.eps_in_sqrt,
        lr_in_momentum=optimizer.lr_in_momentum,
    )
    live = optimizer._capture.live if optimizer.capturable else None
    return Step(lr, rho, momentum, epsilon, weight_decay, optimizer.clipvalue, flags, live)


def missing_slots(optimizer: RMSprop, pairs: Sequence[Pair], flags: Flags) -> list[NewSlot]:
    """The slots that a step needs and its variables lack, in the order of ``weights``."""
    starts = {"rms": optimizer.initial_accumulator_value}
    if flags.has_momentum:
        starts["momentum"] = 0.0
    if flags.centered:
        starts["mg"] = 0.0
    return [
        (entry, name, optimizer._new_slot(entry, name, start))
        for name, start in starts.items()
        for entry in dict.fromkeys(entry for entry, _, _ in pairs)
        if name not in entry.slots
    ]


def plan(optimizer: RMSprop, pairs: Sequence[Pair], now: Step, new_slots: Sequence[NewSlot]) -> Plan:
    """Slots and rules of each variable, in batches, handed to their libraries."""
    pending = {(entry, name): slot for entry, name, slot in new_slots}
    rules: dict[tuple[np.dtype[Any], bool], Rule] = {}
    updates = []
    fresh: dict[Entry, Update] = {}
    filled: set[Entry] = set()
    for (entry, grad, indices), factor in zip(pairs, clipping.factors(pairs, clip(optimizer))):
        update = entry.update
        if update is None or pending or entry in filled or (update.mg is not None) != now.flags.centered:
            update = fresh[entry] = _new_update(entry, pending, now)
        filled.add(entry)
        key = (entry.compute, update.mom is not None)
        rule = rules.get(key)
        if rule is None:
            rule = rules[key] = now.rule(*key)
        update.rule, update.grad, update.indices, update.factor = rule, grad, indices, factor
        updates.append(update)
    batches = _batches(optimizer, [entry for entry, _, _ in pairs])
    try:
        plans = [home.plan([updates[i] for i in at] if len(batches) > 1 else updates) for home, at in batches]
    except BaseException:
        release(updates)
        raise

    return Plan(plans, updates, fresh)


class Plan:
    """The step made ready: called, it changes the arrays and does nothing else. ``plans``: of each batch."""

    def __init__(
        self, plans: Sequence[Callable[[], None]], updates: Sequence[Update], fresh: Mapping[Entry, Update]
    ) -> None:
        self.plans = plans
        self._updates = updates
        self._fresh = fresh

    def __call__(self) -> None:
        """Apply it, once."""
        for planned in self.plans:
            planned()
        release(self._updates)

    def settle(self) -> None:
        """Leave what was prepared to the next step; after new slots have been added, which undoes that."""
        for entry, update in self._fresh.items():
            entry.update = update


def _new_update(entry: Entry, pending: Mapping[tuple[Entry, str], Variable], now: Step) -> Update:
    slots = [entry.slots.get(name) or pending.get((entry, name)) for name in ("rms", "momentum", "mg")]
    rms, mom, mg = (None if slot is None else slot._array for slot in slots)
    rule = now.rule(entry.compute, mom is not None)
    return Update(entry.view, rms, mom, mg if now.flags.centered else None, rule, grad=None)


def clip(optimizer: RMSprop) -> Clip | None:
    """The limit of norms, if there is one."""
    over_all = optimizer.global_clipnorm is not None
    limit = optimizer.global_clipnorm if over_all else optimizer.clipnorm
    return None if limit is None else Clip(limit, over_all, optimizer.clipvalue)


def _batches(optimizer: RMSprop, entries: list[Entry]) -> list[tuple[Backend, list[int]]]:
    """Positions of updates that may run together, per library; on memory already updated in the call, a later batch.

    Kept from step to step, as loops pass the same variables again and again.
    """
    if entries != optimizer._batches[0]:
        batches: dict[tuple[int, str], tuple[Backend, list[int]]] = {}
        for i, number in enumerate(aliasing.rounds(entries)):
            home = entries[i].backend
            batches.setdefault((number, home.name), (home, []))[1].append(i)
        optimizer._batches = (entries, [batches[key] for key in sorted(batches)])
    return optimizer._batches[1]
