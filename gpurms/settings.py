"""Settings to and from configuration dicts: this library's, tf.keras's and Keras 3's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurms import schedules

if TYPE_CHECKING:
    from gpurms.rmsprop import RMSprop

DEFAULTS: dict[str, Any] = {
    "decay": 0.0,
    "clipnorm": None,
    "clipvalue": None,
    "global_clipnorm": None,
    "weight_decay": None,
    "decoupled_weight_decay": True,
    "eps_in_sqrt": True,
    "lr_in_momentum": True,
    "nesterov": False,
    "maximize": False,
    "initial_accumulator_value": 0.0,
    "slot_dtype": None,
    "check_indices": True,
    "capturable": False,
    "dense_only": False,
    "gradient_aggregator": None,
}
"""Keyword arguments of ``RMSprop`` beyond those of its signature."""

_CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
_NEVER = ("gradient_aggregator",)
"""Objects of the running program, which no file can hold."""
_ALWAYS = ("learning_rate", "decay", "rho", "momentum", "epsilon", "centered")

_KERAS_OFF: dict[str, tuple[Any, ...]] = {
    "use_ema": (False, None),
    "loss_scale_factor": (None, 1, 1.0),
    "gradient_accumulation_steps": (None, 1),
    "jit_compile": (False, None),
    "is_legacy_optimizer": (False, None),
}
"""Keys of Keras for what this optimizer does not do, with the values that mean "off"."""
_KERAS_DETAILS = ("ema_momentum", "ema_overwrite_frequency")
"""Keys of Keras that say how something above is done: without meaning while it is off."""


def save(optimizer: RMSprop) -> dict[str, Any]:
    """The JSON-serializable dict of ``RMSprop.get_config``."""
    config: dict[str, Any] = {"name": optimizer.name}
    config |= {key: value for key in _CLIPS if (value := getattr(optimizer, key)) is not None}
    for key in _ALWAYS:
        value = getattr(optimizer, key)
        config[key] = schedules.serialize(value) if isinstance(value, schedules.LearningRateSchedule) else value
    for key, default in DEFAULTS.items():
        value = getattr(optimizer, key)
        if isinstance(value, np.dtype):  # by name, also because NumPy says that float64 == None
            value = value.name
        if key not in config and key not in _NEVER and value != default:
            config[key] = value
    return config


def load(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keyword arguments of ``RMSprop`` in a configuration dict."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a dict; got {config!r:.80}")
    settings = dict(config)
    for key, off in _KERAS_OFF.items():
        if key in settings and (value := settings.pop(key)) not in off:
            raise ValueError(f"{key}={value!r} is something this optimizer does not do; expected {off[0]!r}")
    for key in _KERAS_DETAILS:
        settings.pop(key, None)
    if "lr" in settings:
        settings["learning_rate"] = settings.pop("lr")
    rate = settings.get("learning_rate")
    if isinstance(rate, Mapping):
        settings["learning_rate"] = schedules.deserialize(rate, custom_objects)
    return settings
