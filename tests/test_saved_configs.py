"""`from_config` on configurations that real tf.keras and Keras 3 optimizers saved."""

from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop

# tf_keras 2.21: tf_keras.optimizers.legacy.RMSprop, the class of tf.keras r2.0
LEGACY = {
    "name": "RMSprop",
    "learning_rate": 0.001,
    "decay": 0.0,
    "rho": 0.9,
    "momentum": 0.0,
    "epsilon": 1e-07,
    "centered": False,
}
LEGACY_FULL = {
    "name": "mine",
    "clipnorm": 1.0,
    "learning_rate": 0.01,
    "decay": 0.1,
    "rho": 0.95,
    "momentum": 0.5,
    "epsilon": 1e-05,
    "centered": True,
}
EXPONENTIAL = {
    "module": "keras.optimizers.schedules",
    "class_name": "ExponentialDecay",
    "config": {
        "initial_learning_rate": 0.1,
        "decay_steps": 100,
        "decay_rate": 0.9,
        "staircase": False,
        "name": None,
    },
    "registered_name": None,
}
PIECEWISE = {
    "module": "keras.optimizers.schedules",
    "class_name": "PiecewiseConstantDecay",
    "config": {"boundaries": [1, 2], "values": [0.1, 0.01, 0.001], "name": None},
    "registered_name": None,
}

# tf_keras 2.21: tf_keras.optimizers.RMSprop; its get_config() gives NumPy scalars
TF_KERAS = {
    "name": "RMSprop",
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": 100,
    "jit_compile": False,
    "is_legacy_optimizer": False,
    "learning_rate": np.float32(0.001),
    "rho": 0.9,
    "momentum": 0.0,
    "epsilon": 1e-07,
    "centered": False,
}
TF_KERAS_FULL = {
    **TF_KERAS,
    "name": "mine",
    "weight_decay": 0.004,
    "clipnorm": 1.0,
    "learning_rate": 0.009999999776482582,
    "rho": 0.95,
    "momentum": 0.5,
    "epsilon": 1e-05,
    "centered": True,
}

# keras 3.15: keras.optimizers.RMSprop
KERAS3 = {
    "name": "rm_sprop",
    "learning_rate": 0.0010000000474974513,
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
    "rho": 0.9,
    "momentum": 0.0,
    "epsilon": 1e-07,
    "centered": False,
}
KERAS3_FULL = {
    **KERAS3,
    "name": "mine",
    "learning_rate": 0.009999999776482582,
    "weight_decay": 0.004,
    "global_clipnorm": 1.0,
    "rho": 0.95,
    "momentum": 0.5,
    "epsilon": 1e-05,
    "centered": True,
}
EXPONENTIAL_KERAS3 = {
    "module": "keras.optimizers.schedules",
    "class_name": "ExponentialDecay",
    "config": {
        "initial_learning_rate": 0.1,
        "decay_steps": 100,
        "decay_rate": 0.9,
        "staircase": True,
        "name": "ExponentialDecay",
    },
    "registered_name": None,
}
COSINE_KERAS3 = {
    "module": "keras.optimizers.schedules",
    "class_name": "CosineDecay",
    "config": {
        "initial_learning_rate": 0.1,
        "decay_steps": 100,
        "alpha": 0.0,
        "name": "CosineDecay",
        "warmup_target": None,
        "warmup_steps": 0,
    },
    "registered_name": None,
}
RESTARTS_KERAS3 = {
    "module": "keras.optimizers.schedules",
    "class_name": "CosineDecayRestarts",
    "config": {
        "initial_learning_rate": 0.1,
        "first_decay_steps": 100,
        "t_mul": 2.0,
        "m_mul": 1.0,
        "alpha": 0.0,
        "name": "SGDRDecay",
    },
    "registered_name": None,
}

SAVED: dict[str, dict[str, Any]] = {
    "legacy": LEGACY,
    "legacy full": LEGACY_FULL,
    "legacy clipvalue": {**LEGACY, "clipvalue": 0.5},
    "legacy global_clipnorm": {**LEGACY, "global_clipnorm": 0.5},
    "tf_keras": TF_KERAS,
    "tf_keras full": TF_KERAS_FULL,
    "keras 3": KERAS3,
    "keras 3 full": KERAS3_FULL,
    "keras 3, overwrite frequency without EMA": {**KERAS3, "ema_overwrite_frequency": 10, "ema_momentum": 0.5},
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_configuration(name: str):
    saved = SAVED[name]
    config = RMSprop.from_config(saved).get_config()
    assert config.items() <= {"decay": 0.0, **saved}.items()
    missing = {key for key, value in saved.items() if key not in config and value not in (None, False)}
    assert missing <= {"ema_momentum", "ema_overwrite_frequency"}


@pytest.mark.parametrize(
    "schedule",
    [EXPONENTIAL, PIECEWISE, EXPONENTIAL_KERAS3, COSINE_KERAS3, RESTARTS_KERAS3],
    ids=["exponential", "piecewise", "keras 3 exponential", "keras 3 cosine", "keras 3 restarts"],
)
def test_saved_schedule(schedule: dict[str, Any]):
    restored = RMSprop.from_config({**KERAS3, "learning_rate": schedule}).learning_rate
    assert type(restored).__name__ == schedule["class_name"]
    assert restored.get_config().items() <= schedule["config"].items()
    assert restored(0) == 0.1


ON: list[tuple[str, str, Any]] = [
    ("tf_keras", "use_ema", True),
    ("tf_keras", "jit_compile", True),
    ("tf_keras", "is_legacy_optimizer", True),
    ("keras 3", "use_ema", True),
    ("keras 3", "loss_scale_factor", 1024.0),
    ("keras 3", "gradient_accumulation_steps", 4),
]


@pytest.mark.parametrize(("base", "key", "value"), ON, ids=str)
def test_saved_feature_that_is_on_is_refused(base: str, key: str, value: Any):
    with pytest.raises(ValueError, match=key):
        RMSprop.from_config({**SAVED[base], key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("warmup_target", 0.5), ("warmup_steps", 10)], ids=["warmup_target", "warmup_steps"]
)
def test_saved_warmup_is_refused(key: str, value: float):
    schedule = {**COSINE_KERAS3, "config": {**COSINE_KERAS3["config"], key: value}}
    with pytest.raises((TypeError, ValueError), match=key):
        RMSprop.from_config({**KERAS3, "learning_rate": schedule})
