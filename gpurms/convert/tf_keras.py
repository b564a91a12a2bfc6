"""tf_keras: the weights lists of ``optimizers.legacy.RMSprop`` and of ``optimizers.RMSprop`` since 2.11."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpurms import schedules
from gpurms.convert.common import (
    Array,
    count,
    entries_of,
    narrow,
    require_same_steps,
    required_slots,
    restore,
    slots_of,
    split,
)
from gpurms.dialects import KERAS3, TENSORFLOW
from gpurms.rmsprop import RMSprop

_CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")


def from_tf_keras(weights: Sequence[Any], variables: Iterable[Any], config: Mapping[str, Any]) -> RMSprop:
    """The optimizer that goes on where an RMSprop of tf_keras is.

    Args:
        weights: its ``get_weights()``, or the values of its ``variables``: the counter, then all rms, all momentum, all
            mg, as far as they exist. A list without the counter, as TensorFlow 1 wrote it, starts at 0.
        variables: those that stand for its variables, in their order.
        config: its ``get_config()``, which is of the new optimizer where ``is_legacy_optimizer`` is False; or what
            ``tf_keras.optimizers.serialize`` made of it. Its learning rate is that of this moment.

    Raises:
        TypeError: an unknown key in config, or an array of a wrong type.
        ValueError: another number of weights, or a shape that differs; a setting that ``dialects.TENSORFLOW``, or for
            the new optimizer ``dialects.KERAS3``, refuses.

    >>> variable = np.ones(2)
    >>> opt = from_tf_keras([7, [0.5, 0.25]], [variable], {"learning_rate": 0.5})
    >>> opt.iterations.numpy(), opt.get_slot(variable, "rms").numpy()
    (array(7), array([0.5 , 0.25]))
    """
    arguments = config_of(config)
    is_legacy = arguments.pop("is_legacy_optimizer", True)
    if not is_legacy:
        arguments.pop("jit_compile", None)  # another way to compute the same
        if arguments.get("weight_decay"):
            arguments["weight_decay"] = float(np.float32(arguments["weight_decay"]))  # as TensorFlow casts it
    options = (TENSORFLOW if is_legacy else KERAS3).options(**arguments)
    entries = entries_of(variables)
    names = required_slots(options["momentum"], options["centered"])
    values = list(weights)
    if len(values) == len(entries) * len(names) and values and np.asarray(values[0]).dtype.kind not in "iu":
        values.insert(0, 0)
    iterations = count(values[0], "weights[0]") if values else 0
    return restore(options, entries, split(values[1:], entries, names, "weights behind the counter"), iterations)


def to_tf_keras(
    optimizer: RMSprop, variables: Iterable[Any], legacy: bool = True
) -> tuple[list[Array], dict[str, Any]]:
    """Weights and configuration with which an RMSprop of tf_keras goes on.

    Args:
        optimizer: one with the steps of tf_keras, see ``dialects.TENSORFLOW``, or ``dialects.KERAS3`` for the new one.
        variables: those for its variables, in their order; the optimizer has updated them all.
        legacy: for ``tf_keras.optimizers.legacy.RMSprop``; False is for ``tf_keras.optimizers.RMSprop`` since 2.11.

    Returns:
        What ``set_weights`` takes once the optimizer has its variables, and what ``from_config`` takes.

    Raises:
        ValueError: settings that tf_keras does not have; a slot that does not exist yet.
    """
    arguments = _legacy_arguments(optimizer) if legacy else arguments_of(optimizer)
    require_same_steps(optimizer, TENSORFLOW if legacy else KERAS3, arguments)
    entries = entries_of(variables)
    names = required_slots(optimizer.momentum, optimizer.centered)
    slots = [slots_of(optimizer, entry, i, names) for i, entry in enumerate(entries)]
    arrays = [narrow(found[name], entry.dtype) for name in names for entry, found in zip(entries, slots)]
    return [np.asarray(optimizer.iterations.numpy()), *arrays], serialised(arguments)


def config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in a configuration of Keras, given as it is or within its class name."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a dict; got {config!r:.80}")
    if "class_name" in config and "config" in config:
        if config["class_name"].rpartition(">")[2] != "RMSprop":
            raise ValueError(f"expected the config of an RMSprop; got one of {config['class_name']!s:.80}")
        config = config["config"]
    if "inner_optimizer" in config:
        raise ValueError("expected the config of an RMSprop; got one of LossScaleOptimizer: give its inner_optimizer's")
    return dict(config)


def arguments_of(optimizer: RMSprop) -> dict[str, Any]:
    """The arguments of the new optimizer, which are those of Keras 3, as far as this one has them."""
    arguments = _legacy_arguments(optimizer)
    if not arguments.pop("decay"):
        return arguments | {"weight_decay": optimizer.weight_decay}
    raise ValueError(f"Keras since 2.11 has no decay; it is {optimizer.decay} here: set learning_rate to a schedule")


def _legacy_arguments(optimizer: RMSprop) -> dict[str, Any]:
    names = ("name", "learning_rate", "decay", "rho", "momentum", "epsilon", "centered")
    clips = {name: limit for name in _CLIPS if (limit := getattr(optimizer, name)) is not None}
    return {name: getattr(optimizer, name) for name in names} | clips


def serialised(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as a configuration: a schedule becomes a dict."""
    rate = arguments["learning_rate"]
    if isinstance(rate, schedules.LearningRateSchedule):
        return arguments | {"learning_rate": schedules.serialize(rate)}
    return arguments
