"""The constructor: arguments, their checks, names, and the options in the configuration."""

import inspect
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, Variable
from tests.support import BFLOAT16, DTYPES, OPTIONS, assert_same_bits

ROOT = Path(__file__).resolve().parents[1]

DEFAULTS = {"learning_rate": 0.001, "rho": 0.9, "momentum": 0.0, "epsilon": 1e-7, "decay": 0.0}

OPTION_DEFAULTS: dict[str, Any] = {
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
}
CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
NOT_NEGATIVE = ("learning_rate", "lr", "epsilon", "decay", "weight_decay", *CLIPS)


pytestmark = pytest.mark.usefixtures("numpy_engine")


def step(opt: RMSprop, value: float = 1.0, grad: float = 2.0, dtype: Any = np.float64) -> Variable:
    var = Variable(np.array([value], dtype))
    opt.apply_gradients([(np.array([grad], dtype), var)])
    return var


def test_signature_is_that_of_the_page():
    parameters = list(inspect.signature(RMSprop).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == ["learning_rate", "rho", "momentum", "epsilon", "centered", "name"]
    assert [p.default for p in positional] == [0.001, 0.9, 0.0, 1e-7, False, "RMSprop"]


def test_positional_arguments():
    config = RMSprop(0.01, 0.8, 0.5, 1e-3, True, "mine").get_config()
    assert config == {
        "name": "mine",
        "learning_rate": 0.01,
        "decay": 0.0,
        "rho": 0.8,
        "momentum": 0.5,
        "epsilon": 1e-3,
        "centered": True,
    }


@pytest.mark.parametrize("name", DEFAULTS)
def test_default(name: str):
    assert getattr(RMSprop(), name) == DEFAULTS[name]


def test_lr_wins_over_learning_rate():
    assert RMSprop(learning_rate=0.5, lr=0.125).learning_rate == 0.125


@pytest.mark.parametrize("kwargs", [{"beta": 0.9}, {"Rho": 0.9}, {"learningrate": 1.0}, {"use_ema": False}])
def test_unknown_keyword(kwargs: dict[str, Any]):
    (name,) = kwargs
    with pytest.raises(TypeError, match=f"Unexpected keyword argument.*{name}"):
        RMSprop(**kwargs)


# --- ranges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1e-9, -1, -np.float32(0.5)], ids=repr)
@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_negative_is_refused(name: str, value: Any):
    with pytest.raises(ValueError, match=">= 0"):
        RMSprop(**{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "lr", "epsilon", "decay"])
def test_negative_array_is_refused(name: str):
    with pytest.raises(ValueError, match=">= 0"):
        RMSprop(**{name: np.array(-1.0)})


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_error_of_a_negative_names_the_option(name: str):
    with pytest.raises(ValueError, match=name.replace("lr", "(lr|learning_rate)")):
        RMSprop(**{name: -1.0})


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_zero_is_accepted(name: str):
    RMSprop(**{name: 0.0})


@pytest.mark.parametrize(
    "value", [-0.1, 1.0001, 2, -1, np.float32(1.5), np.int64(2), np.array(-0.5), Fraction(3, 2)], ids=repr
)
def test_momentum_outside_the_unit_interval(value: Any):
    with pytest.raises(ValueError, match="momentum"):
        RMSprop(momentum=value)


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, 0.5, np.float32(0.25), Fraction(1, 2)], ids=repr)
def test_momentum_inside_the_unit_interval(value: Any):
    assert RMSprop(momentum=value).momentum == float(value)


@pytest.mark.parametrize("value", ["0.1", None, [0.1], np.array([0.1]), 1j, {}], ids=repr)
@pytest.mark.parametrize("name", ["learning_rate", "rho", "momentum", "decay"])
def test_not_a_number(name: str, value: Any):
    with pytest.raises((TypeError, ValueError), match=name):
        RMSprop(**{name: value})


@pytest.mark.parametrize("value", ["1", [1.0], np.array([1.0]), {}], ids=repr)
@pytest.mark.parametrize("name", [*CLIPS, "weight_decay", "initial_accumulator_value", "epsilon"])
def test_option_not_a_number(name: str, value: Any):
    with pytest.raises((TypeError, ValueError), match=name):
        RMSprop(**{name: value})


# --- epsilon and clipping -----------------------------------------------------------------------------------


def test_epsilon_none_means_the_default():
    assert RMSprop(epsilon=None).epsilon == 1e-7


def test_epsilon_zero_is_honoured():
    opt = RMSprop(0.5, rho=0.0, epsilon=0)
    assert opt.epsilon == 0.0
    assert step(opt, 1.0, 1e-6).numpy() == [0.5]


@pytest.mark.parametrize("name", [*CLIPS, "weight_decay", "slot_dtype"])
def test_none_means_off(name: str):
    opt = RMSprop(0.1, **{name: None})
    assert opt.get_config() == RMSprop(0.1).get_config()
    assert_same_bits(step(opt, 1.0, 100.0), step(RMSprop(0.1), 1.0, 100.0))


@pytest.mark.parametrize("norm", [1.0, 0.0])
def test_at_most_one_norm(norm: float):
    with pytest.raises(ValueError, match=r"clipnorm.*global_clipnorm|global_clipnorm.*clipnorm"):
        RMSprop(clipnorm=norm, global_clipnorm=1.0)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"clipnorm": None, "global_clipnorm": 1.0},
        {"clipnorm": 1.0, "global_clipnorm": None},
        {"clipnorm": 1.0, "clipvalue": 1.0},
        {"global_clipnorm": 1.0, "clipvalue": 1.0},
    ],
    ids=str,
)
def test_clips_that_go_together(kwargs: dict[str, Any]):
    RMSprop(**kwargs)


# --- names --------------------------------------------------------------------------------------------------


def test_default_name():
    assert RMSprop().get_config()["name"] == "RMSprop"


def test_name_none_counts_up():
    code = "from gpurms import RMSprop\nfor _ in range(3): print(RMSprop(name=None).get_config()['name'])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["rm_sprop", "rm_sprop_1", "rm_sprop_2"]


@pytest.mark.parametrize("name", [3, b"opt", ["opt"], 1.5, RMSprop], ids=repr)
def test_name_must_be_a_string(name: Any):
    with pytest.raises(TypeError, match="name"):
        RMSprop(name=name)


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_option_in_the_configuration_only_where_it_differs(name: str):
    plain = RMSprop().get_config()
    assert RMSprop(**{name: OPTION_DEFAULTS[name]}).get_config() == plain
    config = RMSprop(**{name: OPTIONS[name]}).get_config()
    assert list(config) == [*plain, name]
    assert config[name] == OPTIONS[name]


@pytest.mark.parametrize("name", ["weight_decay", "nesterov", "maximize", "initial_accumulator_value"])
def test_option_changes_the_step(name: str):
    kwargs = {"learning_rate": 0.1, "momentum": 0.5}
    assert step(RMSprop(**kwargs, **{name: OPTIONS[name]})).numpy() != step(RMSprop(**kwargs)).numpy()


def test_maximize_mirrors_the_step():
    assert_same_bits(
        step(RMSprop(0.1, maximize=True), 1.0, 2.0).numpy() - 1.0,
        1.0 - step(RMSprop(0.1), 1.0, 2.0).numpy(),
    )


def test_initial_accumulator_value_starts_rms():
    opt = RMSprop(0.1, rho=0.75, initial_accumulator_value=2.0)
    var = step(opt, grad=4.0)
    assert opt.get_slot(var, "rms").numpy() == [2.0 + (16.0 - 2.0) * 0.25]


SLOT_DTYPES = [
    *((dtype, None, np.float32 if dtype.itemsize == 2 else dtype) for dtype in DTYPES),
    *((dtype, dtype, dtype) for dtype in DTYPES),
    (np.float32, "float16", np.float16),
    (np.float16, "float64", np.float64),
    (BFLOAT16, np.float16, np.float16),
    (np.float32, "bfloat16", BFLOAT16),
    (np.float64, np.float32, np.float32),
]


@pytest.mark.parametrize(("dtype", "slot_dtype", "expected"), SLOT_DTYPES, ids=str)
def test_slot_dtype(dtype: Any, slot_dtype: Any, expected: Any):
    opt = RMSprop(0.1, momentum=0.5, centered=True, slot_dtype=slot_dtype)
    var = step(opt, dtype=dtype)
    assert {opt.get_slot(var, name).dtype for name in ("rms", "momentum", "mg")} == {np.dtype(expected)}
    assert var.dtype == dtype


def test_slot_dtype_is_a_string_in_the_configuration():
    assert RMSprop(slot_dtype=np.float16).get_config()["slot_dtype"] == "float16"
    assert RMSprop(slot_dtype=BFLOAT16).get_config()["slot_dtype"] == "bfloat16"


@pytest.mark.parametrize("slot_dtype", ["int32", np.bool_, "complex64", "float31", 3, object], ids=repr)
def test_slot_dtype_must_be_one_of_the_four(slot_dtype: Any):
    with pytest.raises((TypeError, ValueError), match="slot_dtype"):
        RMSprop(slot_dtype=slot_dtype)
