"""One step made ready: hyperparameters read, missing slots made, updates handed to their libraries.

``RMSprop.apply_gradients`` calls these in order, and only then changes anything: all that can fail has happened before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurms import aliasing, clipping
from gpurms.backend import Backend
from gpurms.gradients import Pair
from gpurms.kernels.rule import Flags, Rule, Step, Update
from gpurms.slots import Entry
from gpurms.variable import Variable

if TYPE_CHECKING:
    from gpurms.rmsprop import RMSprop

NewSlot = tuple[Entry, str, Variable]


def read(optimizer: RMSprop, iterations: int) -> Step:
    """Every hyperparameter, read once and checked, for the step that follows ``iterations`` steps."""
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
        clip_norm=optimizer.clipnorm is not None or optimizer.global_clipnorm is not None,
        maximize=optimizer.maximize,
        l2=weight_decay > 0 and not decoupled,
        decoupled=weight_decay > 0 and decoupled,
        centered=optimizer.centered,
        has_momentum=momentum > 0 or callable(optimizer._settings["momentum"]),
        nesterov=optimizer.nesterov,
        eps_in_sqrt=optimizer.eps_in_sqrt,
        lr_in_momentum=optimizer.lr_in_momentum,
    )
    return Step(lr, rho, momentum, epsilon, weight_decay, optimizer.clipvalue, flags)


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
        for entry in dict.fromkeys(pair.entry for pair in pairs)
        if name not in entry.slots
    ]


def plan(optimizer: RMSprop, pairs: Sequence[Pair], now: Step, new_slots: Sequence[NewSlot]) -> Callable[[], None]:
    """The step as a function that changes the arrays and does nothing else."""
    pending = {(entry, name): slot._array for entry, name, slot in new_slots}
    rules: dict[tuple[np.dtype[Any], bool], Rule] = {}
    updates = []
    for pair, factor in zip(pairs, _clip_factors(optimizer, pairs)):
        entry = pair.entry
        rms, mom, mg = (
            entry.slot_array(name) if name in entry.slots else pending.get((entry, name))
            for name in ("rms", "momentum", "mg")
        )
        key = (entry.compute, mom is not None)
        rule = rules.get(key)
        if rule is None:
            rule = rules[key] = now.rule(*key)
        mg = mg if now.flags.centered else None
        updates.append(Update(rule, entry.view, pair.grad, rms, mom, mg, pair.indices, factor))
    plans = [home.plan(batch) for home, batch in _batches(optimizer, [pair.entry for pair in pairs], updates)]

    def apply() -> None:
        for planned in plans:
            planned()

    return apply


def _clip_factors(optimizer: RMSprop, pairs: Sequence[Pair]) -> list[Any]:
    clip = optimizer.clipnorm if optimizer.global_clipnorm is None else optimizer.global_clipnorm
    if clip is None:
        return [None] * len(pairs)
    clipvalue = optimizer.clipvalue
    sums = [pair.entry.backend.square_sum(pair.grad, pair.entry.compute, clipvalue) for pair in pairs]
    if optimizer.global_clipnorm is not None:
        sums = [sum(sums)] * len(sums)
    return [clipping.factor(each, clip, pair.entry.compute) for each, pair in zip(sums, pairs)]


def _batches(optimizer: RMSprop, entries: list[Entry], updates: list[Update]) -> list[tuple[Backend, list[Update]]]:
    """Updates that may run together, per library; those on memory already updated in the call come later."""
    if entries != optimizer._rounds[0]:
        optimizer._rounds = (entries, aliasing.rounds(entries))
    batches: dict[tuple[int, str], tuple[Backend, list[Update]]] = {}
    for number, entry, update in sorted(zip(optimizer._rounds[1], entries, updates), key=lambda each: each[0]):
        batches.setdefault((number, entry.backend.name), (entry.backend, []))[1].append(update)
    return list(batches.values())
