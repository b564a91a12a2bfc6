"""Checkpoints: variables, slots, counter and settings in one safetensors file.

Its tensors are ``iterations``, ``variables/0``, ..., ``slots/0/rms``, ...; its metadata holds the name and version of
this format and, as JSON, what is no tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpurms import backend, hyper
from gpurms.atomic_file import replacing
from gpurms.counter import Counter
from gpurms.hyper import Hyperparameter
from gpurms.safetensors_file import Array, Tensor, read_header, read_into, write
from gpurms.schedules import LearningRateSchedule
from gpurms.slots import Entry, label
from gpurms.variable import Variable

if TYPE_CHECKING:
    from gpurms.rmsprop import RMSprop

Path = str | os.PathLike[str]

FORMAT = "gpurms"
VERSION = 1


class Target(NamedTuple):
    """What to read where."""

    tensor: Tensor
    array: Array
    is_slot: bool = False


class Saved(NamedTuple):
    """What the metadata says."""

    config: dict[str, Any]
    callables: list[str]  # hyperparameters for which config has what they returned
    variables: list[dict[str, Any]]  # name, which is None for a plain array, and trainable
    slots: list[tuple[int, str]]  # position of the variable and name of the slot, in the order of `weights`


def save(optimizer: RMSprop, path: Path, variables: Iterable[Any] | None) -> None:
    """``State.save``."""
    chosen = _chosen(optimizer, variables)
    entries = _entries(optimizer, chosen)
    places = {id(slot): (i, name) for i, entry in enumerate(entries) for name, slot in entry.slots.items()}
    slots = optimizer._slots.all()
    arrays = {_variable_tensor(i): entry.view for i, entry in enumerate(entries)}
    arrays |= {_slot_tensor(*places[id(slot)]): slot._array for slot in slots}
    if optimizer._counter is not None:
        arrays["iterations"] = optimizer._counter.variable._array
    saved = Saved(
        config=_json_config(optimizer),
        callables=sorted(callables(optimizer)),
        variables=[_description(variable) for variable in chosen],
        slots=[places[id(slot)] for slot in slots],
    )
    metadata = {"format": FORMAT, "version": str(VERSION), "state": json.dumps(saved._asdict())}
    with replacing(os.fsdecode(path)) as file:
        write(file, arrays, metadata)


def load(
    optimizer: RMSprop, path: Path, variables: Iterable[Any] | None, custom_objects: Mapping[str, Any] | None
) -> list[Any]:
    """``State.load``: everything is checked and allocated, then the data are read to where they belong."""
    with open(os.fsdecode(path), "rb") as file:
        metadata, tensors = read_header(file)
        saved = _read_state(metadata, tensors, file.name)
        staged = _configured(type(optimizer), saved.config, custom_objects, file.name)
        settings = dict(staged._settings)
        kept = callables(optimizer).intersection(saved.callables) | {"gradient_aggregator"}
        settings |= {name: optimizer._settings[name] for name in kept}
        if variables is None and not optimizer._slots.entries:
            variables = [_new_variable(tensors[_variable_tensor(i)], **each) for i, each in enumerate(saved.variables)]
        chosen = _chosen(optimizer, variables)
        targets = _stage(optimizer, staged, chosen, saved, tensors, file.name)
        counter, count = optimizer._counter, np.zeros((), np.int64)
        if "iterations" in tensors:
            read_into(file, tensors["iterations"], count)
            counter = counter or staged._new_counter([(each, None, None) for each in staged._slots.entries.values()])
        if counter is not None:
            counter.require_writeable()
        for target in targets:
            read_into(file, *target)
    optimizer._settings |= settings
    _take_slots(optimizer, staged, counter)
    if counter is not None:
        counter.variable.assign(count)
    return chosen


def _chosen(optimizer: RMSprop, variables: Iterable[Any] | None) -> list[Any]:
    """The given variables, or else all that the optimizer has met."""
    if variables is not None:
        if isinstance(variables, Variable) or backend.of(variables) is not None:
            raise TypeError(f"variables must be a list of variables; got {label(variables)}")
        return list(variables)
    entries = optimizer._slots.entries.values()
    if len({id(entry.slots) for entry in entries}) < len(entries):
        raise ValueError(
            "this optimizer was copied together with views of larger arrays, and may go on with either: "
            "give the variables"
        )
    return [entry.variable for entry in entries]


def _entries(optimizer: RMSprop, variables: Sequence[Any]) -> list[Entry]:
    """The optimizer's entries of variables, new ones for those it has not met; ValueError if they are not just all."""
    entries: dict[Any, Entry] = {}
    found: set[int] = set()  # of slots: an optimizer copied together with views has two entries for the slots of one
    for i, variable in enumerate(variables):
        entry = optimizer._slots.find(variable) or Entry(variable, label(variable, i))
        if entry.key in entries or id(entry.slots) in found:
            raise ValueError(f"variable {i} was given before: {label(variable)}")
        entries[entry.key] = entry
        found.add(id(entry.slots))
    for entry in optimizer._slots.entries.values():
        if id(entry.slots) not in found:
            raise ValueError(
                f"{label(entry.variable)} has slots in this optimizer and is not among the {len(variables)} variables "
                "given: they would be lost"
            )
    return list(entries.values())


def _variable_tensor(i: int) -> str:
    return f"variables/{i}"


def _slot_tensor(i: int, name: str) -> str:
    return f"slots/{i}/{name}"


def callables(optimizer: RMSprop) -> set[str]:
    """Hyperparameters that are functions of the caller's; a schedule is part of the config."""
    return {
        name
        for name, value in optimizer._settings.items()
        if isinstance(getattr(type(optimizer), name), Hyperparameter)
        and callable(value)
        and not isinstance(value, LearningRateSchedule)
    }


def _json_config(optimizer: RMSprop) -> dict[str, Any]:
    config = optimizer.get_config()
    for name, value in config.items():
        try:
            json.dumps(value)
        except (RecursionError, TypeError, ValueError) as error:
            raise TypeError(f"{name} cannot be saved as JSON: {error}; get_config gives {value!r:.200}") from error
    return config


def _configured(
    cls: type[RMSprop], config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None, where: str
) -> RMSprop:
    try:
        return cls.from_config(config, custom_objects)
    except Exception as error:  # of whatever kind: schedules may be the caller's
        raise ValueError(f"{where}: settings that cannot be restored: {error!s:.200}") from error


def _description(variable: Any) -> dict[str, Any]:
    if isinstance(variable, Variable):
        return {"name": variable.name, "trainable": bool(variable.trainable)}
    return {"name": None, "trainable": True}


def _new_variable(tensor: Tensor, name: str | None, trainable: bool) -> Any:
    array = backend.array_module().empty(tensor.shape, hyper.slot_type("dtype", tensor.dtype))
    return array if name is None else Variable(array, name, trainable)


def _read_state(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], where: str) -> Saved:
    """What the metadata says, checked against the tensors."""
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{where}: no checkpoint of gpurms: expected {FORMAT!r} as format in its metadata")
    if (version := metadata.get("version")) != str(VERSION):
        raise ValueError(f"{where}: checkpoint of format version {version!s:.20}; this gpurms reads version {VERSION}")
    try:
        saved = Saved(**json.loads(metadata["state"]))
        _check_state(saved, tensors)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: damaged checkpoint: {error!s:.200}") from error
    return saved


def _check_state(saved: Saved, tensors: Mapping[str, Tensor]) -> None:
    """One of many errors unless the parts are of their types and fit the tensors."""
    for each in saved.variables:
        if each.keys() != {"name", "trainable"} or not isinstance(each["name"], str | None):
            raise ValueError(f"variable described as {each}")
    if not saved.config.keys() >= set(saved.callables):
        raise ValueError(f"config {saved.config}, with callables {saved.callables}")
    expected = {_variable_tensor(i): _variable_tensor(i) for i in range(len(saved.variables))}
    expected |= {_slot_tensor(i, name): _variable_tensor(i) for i, name in saved.slots}
    if len(expected) < len(saved.variables) + len(saved.slots):
        raise ValueError("a slot is named twice")
    if differing := expected.keys() ^ (tensors.keys() - {"iterations"}):
        raise ValueError(f"missing or unexpected tensors: {', '.join(sorted(differing)):.200}")
    for name, variable in expected.items():
        if tensors[name].dtype == "int64" or tensors[name].shape != tensors[variable].shape:
            raise ValueError(f"{name} is {tensors[name].dtype} of shape {tensors[name].shape}")
    if tensors.get("iterations", _COUNT)[:2] != _COUNT[:2]:
        raise ValueError(f"iterations is {tensors['iterations']}")


_COUNT = Tensor("int64", (), 0)


def _stage(
    optimizer: RMSprop,
    staged: RMSprop,
    variables: Sequence[Any],
    saved: Saved,
    tensors: Mapping[str, Tensor],
    where: str,
) -> list[Target]:
    """Give ``staged`` the saved slots, those that ``optimizer`` has already where they will do; what to read into."""
    known = _entries(optimizer, variables)
    if len(known) != len(saved.variables):
        raise ValueError(f"{where} holds {len(saved.variables)} variables; got {len(known)}")
    entries = [Entry(variable, label(variable, i)) for i, variable in enumerate(variables)]
    targets = []
    for i, entry in enumerate(entries):
        tensor = tensors[_variable_tensor(i)]
        _check_variable(entry, tensor, f"{label(entry.variable, i)}, for {_variable_tensor(i)} of {where}")
        targets.append(Target(tensor, entry.view))
    for i, name in saved.slots:
        tensor = tensors[_slot_tensor(i, name)]
        kept = known[i].slots.get(name)
        if kept is not None and _holds(kept, tensor):
            slot = kept
        else:
            staged.slot_dtype = tensor.dtype
            slot = staged._new_slot(entries[i], name)
        staged._slots.adopt(entries[i])
        staged._slots.add(entries[i], name, slot)
        targets.append(Target(tensor, slot._array, is_slot=True))
    if optimizer._capture._kept and {*map(id, optimizer._slots.all())} != {*map(id, staged._slots.all())}:
        raise RuntimeError(
            f"{where} has other slots than this optimizer, whose captured steps would go on with the old ones: load "
            "before capturing"
        )
    return targets


def _check_variable(entry: Entry, tensor: Tensor, what: str) -> None:
    if entry.dtype.name != tensor.dtype:
        raise TypeError(f"{what}: expected {tensor.dtype}; got {entry.dtype}")
    if entry.shape != tensor.shape:
        raise ValueError(f"{what}: expected shape {tensor.shape}; got {entry.shape}")
    if not entry.backend.writeable([entry.array]):
        raise TypeError(f"{what}: expected a writeable array; got a read-only one")


def _holds(slot: Variable, tensor: Tensor) -> bool:
    writeable = backend.require(slot._array).writeable([slot._array])
    return writeable and slot.dtype.name == tensor.dtype and slot.shape == tensor.shape


def _take_slots(optimizer: RMSprop, staged: RMSprop, counter: Counter | None) -> None:
    """The slots of ``staged``, in the list of weights that callers may hold; captured steps keep what they use."""
    slots = staged._slots
    slots.weights = optimizer._slots.weights
    slots.weights.clear()
    optimizer._slots = slots
    if counter is not None:
        optimizer._set_counter(counter)
    optimizer._batches = ([], [])
    optimizer._repeat = None
