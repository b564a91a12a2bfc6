"""What all conversions share: slots in host memory, and settings held against a dialect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpurms import backend, hyper, settings
from gpurms.arguments import flag
from gpurms.checkpoint import callables
from gpurms.dialects import Dialect
from gpurms.kernels.rule import is_bfloat16
from gpurms.rmsprop import RMSprop
from gpurms.schedules import LearningRateSchedule
from gpurms.slots import Entry, label
from gpurms.variable import Variable

Array = np.ndarray[Any, Any]

SLOTS = ("rms", "momentum", "mg")
_PAGE = {"learning_rate": 0.001, "rho": 0.9, "momentum": 0.0, "epsilon": 1e-7, "centered": False}
_NO_MATTER = {
    "check_indices",
    "capturable",
    "slot_dtype",
    "dense_only",
    "gradient_aggregator",
    "initial_accumulator_value",
}
"""Options that say nothing about the next step of variables that have their slots."""


def entries_of(variables: Iterable[Any]) -> list[Entry]:
    """The variables, checked: arrays that can be updated, none of them twice."""
    if isinstance(variables, Variable) or backend.of(variables) is not None:
        raise TypeError(f"variables must be a list of variables; got {label(variables)}")
    entries = [Entry(variable, label(variable, i)) for i, variable in enumerate(variables)]
    first: dict[Any, int] = {}
    for i, entry in enumerate(entries):
        if first.setdefault(entry.key, i) != i:
            raise ValueError(f"variable {i} is variable {first[entry.key]} again: {label(entry.variable)}")
    return entries


def required_slots(momentum: Any, centered: Any) -> list[str]:
    """Names of the slots in use, in their order among weights; TypeError or ValueError unless that can be told."""
    in_use = (True, hyper.fraction("momentum", momentum) > 0, flag("centered", centered))
    return [name for name, used in zip(SLOTS, in_use) if used]


def numbers(value: Any, where: str) -> Array:
    """An array of real numbers in host memory, of float32 or float64."""
    array: Array = np.asarray(value)
    if is_bfloat16(array.dtype) or array.dtype == np.float16:
        array = array.astype(np.float32)
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{where}: expected an array of real numbers; got {array.dtype}")
    return array


def count(value: Any, where: str) -> int:
    """A number of steps."""
    array = np.asarray(value)
    if array.shape != () or array.dtype.kind not in "iuf" or not float(array) >= 0 or float(array) % 1:
        raise ValueError(f"{where}: expected a number of steps; got {value!r:.80}")
    return int(array)


def split(values: Sequence[Any], entries: Sequence[Entry], names: Sequence[str], where: str) -> list[dict[str, Array]]:
    """The slots of each variable in a list of all rms, all momentum, all mg."""
    if len(values) != len(entries) * len(names):
        raise ValueError(
            f"{where}: expected {', '.join(names)} of {len(entries)} variables, {len(entries) * len(names)} arrays; "
            f"got {len(values)}"
        )
    arrays = [numbers(value, f"{where}[{i}]") for i, value in enumerate(values)]
    return [dict(zip(names, arrays[i :: len(entries)])) for i in range(len(entries))]


def restore(
    options: Mapping[str, Any], entries: Sequence[Entry], slots: Sequence[Mapping[str, Array]], iterations: int
) -> RMSprop:
    """An optimizer with these options, slots and number of steps; shapes are checked."""
    for i, (entry, found) in enumerate(zip(entries, slots, strict=True)):
        for name, array in found.items():
            if array.shape != entry.shape:
                raise ValueError(
                    f"{label(entry.variable, i)}: expected its {name} in shape {entry.shape}; got shape {array.shape}"
                )
    optimizer = RMSprop(**options)
    optimizer.iterations.assign(iterations)
    for name in SLOTS:
        for entry, found in zip(entries, slots):
            if name in found:
                optimizer.add_slot(entry.variable, name, found[name])
    return optimizer


def has_slots(optimizer: RMSprop, entry: Entry) -> bool:
    """Whether the optimizer has updated the variable, or been given a slot for it."""
    return optimizer._slots.find(entry.variable) is not None


def slots_of(optimizer: RMSprop, entry: Entry, position: int, names: Sequence[str]) -> dict[str, Array]:
    """The named slots of a variable in host memory, as float32 or float64."""
    try:
        return {name: numbers(optimizer.get_slot(entry.variable, name).numpy(), name) for name in names}
    except KeyError as error:
        raise ValueError(
            f"{label(entry.variable, position)}: expected slots {', '.join(names)}; {error.args[0]}"
        ) from None


def narrow(array: Array, dtype: np.dtype[Any]) -> Array:
    """In the variable's type, in which the other libraries keep slots; their own NumPy may know no bfloat16."""
    return array if dtype.itemsize == 2 and dtype != np.float16 else array.astype(dtype)


def require_same_steps(optimizer: RMSprop, dialect: Dialect, arguments: Mapping[str, Any]) -> None:
    """ValueError unless the other library, with these arguments, makes the steps that this optimizer makes."""
    if found := sorted(callables(optimizer)):
        raise ValueError(
            f"{dialect.source} would go on with the present value of what is a function here: {', '.join(found)}; set "
            "it to a number first"
        )
    theirs = _effective(_PAGE | settings.DEFAULTS | dialect.options(**arguments))
    ours = _effective({name: getattr(optimizer, name) for name in (*_PAGE, *settings.DEFAULTS)})
    differing = [
        f"{name} is {ours[name]!r} here, {theirs[name]!r} there"
        for name in ours.keys() - _NO_MATTER
        if not _same(ours[name], theirs[name])
    ]
    if differing:
        raise ValueError(f"{dialect.source} cannot go on as this optimizer does: {'; '.join(sorted(differing))}")


def _effective(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, those that have no effect beside the others at their defaults."""
    effective = dict(options)
    without_effect: list[str] = []
    if not options["momentum"]:
        without_effect += ["nesterov", "lr_in_momentum"]
    if not options["weight_decay"]:
        without_effect += ["weight_decay", "decoupled_weight_decay"]
    if options["epsilon"] == 0:
        without_effect += ["eps_in_sqrt"]
    return effective | {name: settings.DEFAULTS[name] for name in without_effect}


def _same(a: Any, b: Any) -> bool:
    """Equal, for numbers in float32, to which some libraries round them."""
    if a == b:
        return True
    return isinstance(a, float) and isinstance(b, float) and bool(np.float32(a) == np.float32(b))


def rate_of_now(optimizer: RMSprop, library: str) -> float:
    """The learning rate as a number, for libraries that have no schedules in their state."""
    rate = optimizer.learning_rate
    if isinstance(rate, LearningRateSchedule):
        raise ValueError(
            f"{library} keeps the learning rate as a number, and this optimizer has the schedule {rate!r}: set "
            "optimizer.learning_rate to the rate of the next step first"
        )
    return float(rate)
