"""Keras 3: the optimizer in ``.weights.h5`` files and ``.keras`` archives.

Its variables are ``optimizer/vars/0``, ``1``, ...: the counter, the learning rate unless that is a schedule, then all
velocities, all momenta and all average gradients, as far as they exist.

With the policy ``mixed_float16``, Keras wraps the optimizer in a ``LossScaleOptimizer``. Then ``optimizer/vars/0`` to
``3`` are that one's own, and those of the optimizer follow; they are in ``optimizer/inner_optimizer/vars`` too.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gpurms.atomic_file import replacing
from gpurms.convert.common import (
    Array,
    count,
    entries_of,
    require_same_steps,
    required_slots,
    restore,
    slots_of,
    split,
)
from gpurms.convert.tf_keras import arguments_of, config_of, serialised
from gpurms.dialects import KERAS3
from gpurms.rmsprop import RMSprop
from gpurms.schedules import LearningRateSchedule

Path = str | os.PathLike[str]

_CONFIG = "config.json"
_WEIGHTS = "model.weights.h5"
_OPTIMIZER = "optimizer"
_VARIABLES = "optimizer/vars"
_INNER_VARIABLES = "optimizer/inner_optimizer/vars"
_WRAPPER = "LossScaleOptimizer"
_N_WRAPPER = 4  # variables: a counter and a learning rate that mean nothing, steps since the last change, loss scale


def from_keras3(path: Path, variables: Iterable[Any], config: Mapping[str, Any] | None = None) -> RMSprop:
    """The optimizer that goes on where the one in a file of Keras 3 is.

    Args:
        path: a ``.weights.h5`` file that ``save_weights`` of a compiled model has written, or a ``.keras`` archive.
        variables: those that stand for the model's trainable variables, in their order.
        config: the optimizer's ``get_config()``, or what ``keras.optimizers.serialize`` made of it; the default None
            is for archives, which contain it. The learning rate is that in the file, unless it is a schedule.

    Of an optimizer that Keras has wrapped in a ``LossScaleOptimizer``, as it does with the policy ``mixed_float16``,
    this is the inner one; config may be that of either. The gradients it takes are those of the loss itself: to scale
    the loss, divide the gradients and skip steps whose gradients are not finite is the caller's part, and so is the
    scale.

    Raises:
        ImportError: h5py is not installed.
        OSError, zipfile.BadZipFile: the file cannot be read.
        TypeError: an unknown key in config, or an array of a wrong type.
        ValueError: a file without state of an optimizer, or with that of other variables; a setting that
            ``dialects.KERAS3`` refuses.
    """
    where = os.fsdecode(path)
    if where.endswith(".keras"):
        with zipfile.ZipFile(where) as archive:
            if missing := {_CONFIG, _WEIGHTS} - set(archive.namelist()):
                raise ValueError(f"{where}: expected {', '.join(sorted(missing))} in the archive")
            config = _config_in(archive, where) if config is None else config
            with archive.open(_WEIGHTS) as file:
                values = _read(file, where)
    elif where.endswith(".weights.h5"):
        if config is None:
            raise ValueError(f"{where}: a weights file holds no settings: give config, the optimizer's get_config()")
        values = _read(where, where)
    else:
        raise ValueError(f"expected a .weights.h5 file or a .keras archive; got {where}")
    options = KERAS3.options(**config_of(_inner(config)))
    entries = entries_of(variables)
    names = required_slots(options["momentum"], options["centered"])
    n_leading = 1 if isinstance(options["learning_rate"], LearningRateSchedule) else 2
    slots = split(values[n_leading:], entries, names, f"{where}: variables of the optimizer from {n_leading} on")
    iterations = count(values[0], f"{where}: counter of the optimizer")
    if n_leading == 2:
        if values[1].shape != ():
            raise ValueError(f"{where}: expected the learning rate behind the counter; got shape {values[1].shape}")
        options["learning_rate"] = float(values[1])
    return restore(options, entries, slots, iterations)


def to_keras3(optimizer: RMSprop, variables: Iterable[Any], path: Path) -> dict[str, Any]:
    """Write the optimizer's state into a weights file of Keras 3, and return the configuration to go on with.

    ``model.load_weights`` reads state of optimizers only together with the weights of the model. So the file is one
    that ``model.save_weights`` has written; in it, state of an optimizer is replaced or added, and nothing else
    changes. The model that loads it has been compiled with ``keras.optimizers.RMSprop.from_config`` of what this
    returns, and ``model.optimizer`` built with ``model.optimizer.build(model.trainable_variables)``. Whatever fails,
    the file stays as it was.

    Where the file has state of a ``LossScaleOptimizer``, which wraps the optimizer of a compiled model with the policy
    ``mixed_float16``, its loss scale stays, and the inner optimizer is replaced. Such a model finds no state in a file
    without one.

    Args:
        optimizer: one with the steps of Keras 3, see ``dialects.KERAS3``.
        variables: those for the model's trainable variables, in their order; the optimizer has updated them all.
        path: the ``.weights.h5`` file.

    Raises:
        ImportError: h5py is not installed.
        OSError: the file cannot be read or written.
        ValueError: settings that Keras 3 does not have; a slot that does not exist yet; another kind of file.
    """
    import h5py

    where = os.fsdecode(path)
    if not where.endswith(".weights.h5"):
        raise ValueError(f"expected a .weights.h5 file that model.save_weights has written; got {where}")
    arguments = arguments_of(optimizer)
    require_same_steps(optimizer, KERAS3, arguments)
    config = serialised(arguments)
    entries = entries_of(variables)
    names = required_slots(optimizer.momentum, optimizer.centered)
    slots = [slots_of(optimizer, entry, i, names) for i, entry in enumerate(entries)]
    values: list[Any] = [optimizer.iterations.numpy()]
    if isinstance(config["learning_rate"], Mapping):
        config["learning_rate"] = {
            "module": "keras.optimizers.schedules",
            **config["learning_rate"],
            "registered_name": None,
        }
    else:
        values.append(np.asarray(config["learning_rate"]))
    values += [found[name] for name in names for found in slots]
    with h5py.File(where, "r") as file:
        if not set(file) - {_OPTIMIZER}:
            raise ValueError(f"{where}: expected the weights of a model, which model.save_weights writes")
    with open(where, "rb") as source, replacing(where) as target:
        shutil.copyfileobj(source, target)
        with h5py.File(target, "r+") as file:
            if _INNER_VARIABLES in file:
                wrapper = _arrays(file, _VARIABLES, where)[:_N_WRAPPER]
                _write(file, _VARIABLES, [*wrapper, *values], _WRAPPER)
                _write(file, _INNER_VARIABLES, values, optimizer.name)
            else:
                _write(file, _VARIABLES, values, optimizer.name)
    return config


def _inner(config: Any) -> Any:
    """The configuration of the optimizer in one of a ``LossScaleOptimizer``; any other as it is."""
    if isinstance(config, Mapping):
        if config.get("class_name") == _WRAPPER and isinstance(config.get("config"), Mapping):
            config = config["config"]
        if "inner_optimizer" in config:
            return config["inner_optimizer"]
    return config


def _config_in(archive: zipfile.ZipFile, where: str) -> Mapping[str, Any]:
    compiled = json.loads(archive.read(_CONFIG)).get("compile_config") or {}
    config = compiled.get("optimizer")
    if not isinstance(config, Mapping):
        raise ValueError(f"{where}: the model was not compiled with an optimizer when it was saved")
    return config


def _read(file: Any, where: str) -> list[Array]:
    """The variables of the optimizer in their order."""
    import h5py

    with h5py.File(file, "r") as opened:
        return _arrays(opened, _INNER_VARIABLES if _INNER_VARIABLES in opened else _VARIABLES, where)


def _arrays(file: Any, path: str, where: str) -> list[Array]:
    import h5py

    group = file.get(path)
    if not isinstance(group, h5py.Group) or not len(group):
        raise ValueError(f"{where} holds no state of an optimizer: the model was not compiled when it was saved")
    if set(group) != {str(i) for i in range(len(group))}:
        raise ValueError(f"{where}: expected {path} to count from 0; got {sorted(group)}")
    return [_array(group[str(i)]) for i in range(len(group))]


def _array(dataset: Any) -> Array:
    """HDF5 has no bfloat16: Keras writes its two bytes as they are, with a note."""
    values: Array = dataset[()]
    if dataset.attrs.get("dtype") != "bfloat16":
        return np.asarray(values)
    bits = np.asarray(values).view(np.uint16).astype(np.uint32) << np.uint32(16)
    return np.asarray(bits.view(np.float32))


def _write(file: Any, path: str, values: list[Any], name: str) -> None:
    """In place where the file has variables of these shapes, which keeps their types; else anew."""
    group = file.get(path)
    fits = group is not None and {key: dataset.shape for key, dataset in group.items()} == {
        str(i): np.shape(value) for i, value in enumerate(values)
    }
    if not fits or any("dtype" in dataset.attrs for dataset in group.values()):
        if path in file:
            del file[path]
        group = file.create_group(path)
        group.attrs["name"] = name
        for i, value in enumerate(values):
            group.create_dataset(str(i), data=value)
    else:
        for i, value in enumerate(values):
            group[str(i)][()] = value
