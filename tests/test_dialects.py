"""Dialects: formulas of libraries that cannot be installed, arguments, and what is refused."""

import copy
import inspect
import pickle
import re
from typing import Any

import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop, dialects
from gpurms.dialects import CHAINER, KERAS3, OPTAX, PADDLE, TENSORFLOW, TIMM, TORCH
from gpurms.schedules import ExponentialDecay, PiecewiseConstantDecay

pytestmark = pytest.mark.usefixtures("numpy_engine")

ALL = (TENSORFLOW, KERAS3, TORCH, OPTAX, CHAINER, PADDLE, TIMM)
N_STEPS = 25
SHAPES = ((3, 2), (5,), ())


def single(x: float) -> float:
    """What is left of a number that an interface takes as a C float."""
    return float(np.float32(x))


# --- formulas, written down from the published sources named in the dialects, in float64 --------------------


class Chainer:
    def __init__(self, var: np.ndarray, lr=0.01, alpha=0.99, eps=1e-8, eps_inside_sqrt=False):
        self.var, self.ms = var.copy(), np.zeros_like(var)
        self.lr, self.alpha, self.eps, self.eps_inside_sqrt = lr, alpha, eps, eps_inside_sqrt

    def step(self, grad: np.ndarray) -> None:
        self.ms = self.alpha * self.ms + (1 - self.alpha) * grad * grad
        denominator = np.sqrt(self.ms + self.eps) if self.eps_inside_sqrt else np.sqrt(self.ms) + self.eps
        self.var = self.var - self.lr * grad / denominator


class Paddle:
    def __init__(
        self, var: np.ndarray, learning_rate, rho=0.95, epsilon=1e-6, momentum=0.0, centered=False, weight_decay=None
    ):
        self.var, self.ms, self.mg, self.mom = var.copy(), *(np.zeros_like(var) for _ in range(3))
        self.lr, self.centered, self.coefficient = learning_rate, centered, weight_decay
        self.rho, self.epsilon, self.momentum = single(rho), single(epsilon), single(momentum)

    def step(self, grad: np.ndarray) -> None:
        if self.coefficient is not None:
            grad = grad + self.coefficient * self.var
        self.ms = self.rho * self.ms + (1 - self.rho) * grad * grad
        variance = self.ms
        if self.centered:
            self.mg = self.rho * self.mg + (1 - self.rho) * grad
            variance = self.ms - self.mg * self.mg
        self.mom = self.momentum * self.mom + self.lr * grad / np.sqrt(variance + self.epsilon)
        self.var = self.var - self.mom


class Timm:
    def __init__(
        self,
        var: np.ndarray,
        lr=1e-2,
        alpha=0.9,
        eps=1e-10,
        weight_decay=0,
        momentum=0.0,
        centered=False,
        decoupled_decay=False,
        lr_in_momentum=True,
    ):
        self.var, self.square_avg = var.copy(), np.ones_like(var)
        self.grad_avg, self.buffer = np.zeros_like(var), np.zeros_like(var)
        self.lr, self.alpha, self.eps, self.weight_decay, self.momentum = lr, alpha, eps, weight_decay, momentum
        self.centered, self.decoupled_decay, self.lr_in_momentum = centered, decoupled_decay, lr_in_momentum

    def step(self, grad: np.ndarray) -> None:
        if self.decoupled_decay:
            self.var = self.var * (1 - self.lr * self.weight_decay)
        else:
            grad = grad + self.weight_decay * self.var
        self.square_avg = self.square_avg + (1 - self.alpha) * (grad**2 - self.square_avg)
        variance = self.square_avg
        if self.centered:
            self.grad_avg = self.grad_avg + (1 - self.alpha) * (grad - self.grad_avg)
            variance = variance - self.grad_avg**2
        normalised = grad / np.sqrt(variance + self.eps)
        if self.momentum > 0 and self.lr_in_momentum:
            self.buffer = self.momentum * self.buffer + self.lr * normalised
            self.var = self.var - self.buffer
        elif self.momentum > 0:
            self.buffer = self.momentum * self.buffer + normalised
            self.var = self.var - self.lr * self.buffer
        else:
            self.var = self.var - self.lr * normalised


FORMULAS: list[tuple[Any, Any, dict[str, Any]]] = [
    (CHAINER, Chainer, {}),
    (CHAINER, Chainer, {"lr": 0.1, "alpha": 0.7, "eps": 1e-2}),
    (CHAINER, Chainer, {"lr": 0.1, "alpha": 0.7, "eps": 1e-2, "eps_inside_sqrt": True}),
    (PADDLE, Paddle, {"learning_rate": 0.1}),
    (PADDLE, Paddle, {"learning_rate": 0.1, "epsilon": 1e-2, "momentum": 0.9}),
    (PADDLE, Paddle, {"learning_rate": 0.1, "rho": 0.7, "centered": True}),
    (PADDLE, Paddle, {"learning_rate": 0.1, "momentum": 0.3, "centered": True, "weight_decay": 0.3}),
    (TIMM, Timm, {}),
    (TIMM, Timm, {"lr": 0.1, "alpha": 0.7, "eps": 1e-2, "weight_decay": 0.3}),
    (TIMM, Timm, {"lr": 0.1, "momentum": 0.9, "centered": True}),
    (TIMM, Timm, {"lr": 0.1, "momentum": 0.9, "lr_in_momentum": False}),
    (TIMM, Timm, {"lr": 0.1, "weight_decay": 0.3, "decoupled_decay": True}),
    (
        TIMM,
        Timm,
        {"lr": 0.1, "momentum": 0.5, "centered": True, "weight_decay": 0.3, "decoupled_decay": True, "eps": 1e-3},
    ),
]


@pytest.mark.parametrize(("dialect", "formula", "arguments"), FORMULAS, ids=str)
def test_formula(dialect: dialects.Dialect, formula: Any, arguments: dict[str, Any]):
    rng = np.random.default_rng(1)
    variables = [rng.normal(size=shape) for shape in SHAPES]
    theirs = [formula(variable, **arguments) for variable in variables]
    optimizer = dialect(**arguments)
    for _ in range(N_STEPS):
        grads = [np.asarray(rng.normal(size=shape)) for shape in SHAPES]
        optimizer.apply_gradients(list(zip(grads, variables)))
        for each, grad, variable in zip(theirs, grads, variables):
            each.step(grad)
            np.testing.assert_allclose(variable, each.var, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("lr_in_momentum", [True, False])
def test_learning_rate_that_changes(lr_in_momentum: bool):
    """Only then it matters whether the momentum includes it."""
    rng = np.random.default_rng(2)
    arguments = {"lr": 0.1, "momentum": 0.9, "lr_in_momentum": lr_in_momentum}
    variable = rng.normal(size=5)
    optimizer, theirs = TIMM(**arguments), Timm(variable, **arguments)
    for k in range(N_STEPS):
        optimizer.learning_rate = theirs.lr = 0.1 / (1 + k)
        grad = rng.normal(size=5)
        optimizer.apply_gradients([(grad, variable)])
        theirs.step(grad)
        np.testing.assert_allclose(variable, theirs.var, rtol=1e-12, atol=1e-13)


# --- arguments ----------------------------------------------------------------------------------------------


REQUIRED = {OPTAX: {"learning_rate": 0.5}, PADDLE: {"learning_rate": 0.5}}
DEFAULTS = {  # learning rate, rho, epsilon, eps_in_sqrt, lr_in_momentum, decoupled_weight_decay, start of rms
    TENSORFLOW: (single(0.001), single(0.9), 1e-7, False, True, True, 0.0),
    KERAS3: (0.001, 0.9, 1e-7, True, True, True, 0.0),
    TORCH: (0.01, 0.99, 1e-8, False, False, False, 0.0),
    OPTAX: (0.5, 0.9, 1e-8, True, True, True, 0.0),
    CHAINER: (0.01, 0.99, 1e-8, False, True, True, 0.0),
    PADDLE: (0.5, single(0.95), single(1e-6), True, True, False, 0.0),
    TIMM: (0.01, 0.9, 1e-10, True, True, False, 1.0),
}


def test_all_are_named():
    assert {repr(dialect) for dialect in ALL} == {
        f"gpurms.dialects.{name}" for name in ("TENSORFLOW", "KERAS3", "TORCH", "OPTAX", "CHAINER", "PADDLE", "TIMM")
    }


@pytest.mark.parametrize("dialect", ALL, ids=repr)
def test_defaults(dialect: dialects.Dialect):
    opt = dialect(**REQUIRED.get(dialect, {}))
    assert type(opt) is RMSprop
    assert opt.dense_only
    assert opt.momentum == 0
    assert (
        opt.learning_rate,
        opt.rho,
        opt.epsilon,
        opt.eps_in_sqrt,
        opt.lr_in_momentum,
        opt.decoupled_weight_decay,
        opt.initial_accumulator_value,
    ) == DEFAULTS[dialect]


@pytest.mark.parametrize("dialect", ALL, ids=repr)
def test_call_makes_what_options_say(dialect: dialects.Dialect):
    required = REQUIRED.get(dialect, {})
    assert dialect(**required).get_config() == RMSprop(**dialect.options(**required)).get_config()


@pytest.mark.parametrize("dialect", ALL, ids=repr)
def test_arguments_by_position(dialect: dialects.Dialect):
    names = list(inspect.signature(dialect).parameters)
    assert dialect.options(0.5, 0.25) == dialect.options(**{names[0]: 0.5, names[1]: 0.25})


@pytest.mark.parametrize("dialect", ALL, ids=repr)
def test_unknown_argument(dialect: dialects.Dialect):
    with pytest.raises(TypeError) as caught:
        dialect(**REQUIRED.get(dialect, {}), beta=0.9)
    message = str(caught.value)
    assert message.startswith(dialect.source)
    assert "'beta'" in message
    for name in inspect.signature(dialect).parameters:
        assert name in message


@pytest.mark.parametrize("dialect", [OPTAX, PADDLE], ids=repr)
def test_missing_argument(dialect: dialects.Dialect):
    with pytest.raises(TypeError, match=f"{dialect.source}.*learning_rate"):
        dialect.options()


@pytest.mark.parametrize("dialect", ALL, ids=repr)
def test_schedules_of_this_library(dialect: dialects.Dialect):
    schedule = PiecewiseConstantDecay([2], [0.5, 0.25])
    opt = dialect(schedule)
    assert opt.learning_rate == schedule


@pytest.mark.parametrize("dialect", ALL, ids=repr)
def test_bad_number_is_refused_by_the_optimizer(dialect: dialects.Dialect):
    with pytest.raises(ValueError, match="learning_rate must be >= 0"):
        dialect(-1.0)


# --- what is refused ----------------------------------------------------------------------------------------


REFUSED: list[tuple[dialects.Dialect, dict[str, Any], str]] = [
    (TENSORFLOW, {"gradient_transformers": [abs]}, "gradient_transformers.*gradient_aggregator"),
    (TENSORFLOW, {"clipnorm": 1.0, "global_clipnorm": 1.0}, "clipnorm.*global_clipnorm|global_clipnorm.*clipnorm"),
    (TENSORFLOW, {"learning_rate": {"class_name": "Mine", "config": {}}}, "Unknown decay: Mine"),
    (KERAS3, {"use_ema": True}, "use_ema=True"),
    (KERAS3, {"loss_scale_factor": 8.0}, "loss_scale_factor=8.0"),
    (KERAS3, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2"),
    (KERAS3, {"clipnorm": 1.0, "clipvalue": 1.0}, "one of clipnorm, clipvalue and global_clipnorm"),
    (TORCH, {"differentiable": True}, "differentiable=True"),
    (TORCH, {"lr": np.array([0.5])}, "^lr=.*set optimizer.learning_rate"),
    (TORCH, {"lr": lambda: 0.5}, "^lr="),
    (OPTAX, {"learning_rate": 0.5, "bias_correction": True}, "bias_correction=True"),
    (OPTAX, {"learning_rate": lambda count: 0.5}, "^learning_rate=.*gpurms.schedules"),
    (CHAINER, {"lr": "0.5"}, "^lr="),
    (PADDLE, {"learning_rate": object()}, "^learning_rate="),
    (PADDLE, {"learning_rate": 0.5, "grad_clip": object()}, "^grad_clip=.*global_clipnorm"),
    (PADDLE, {"learning_rate": 0.5, "weight_decay": object()}, "^weight_decay=.*coefficient"),
    (TIMM, {"caution": True}, "caution=True"),
    (TIMM, {"corrected_weight_decay": True}, "corrected_weight_decay=True"),
    (TIMM, {"lr": [0.5]}, "^lr="),
]


def without_addresses(part: Any) -> str:
    """The same name in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", str(part))


@pytest.mark.parametrize(("dialect", "arguments", "message"), REFUSED, ids=without_addresses)
def test_refused(dialect: dialects.Dialect, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dialect(**arguments)


OFF: list[tuple[dialects.Dialect, dict[str, Any]]] = [
    (KERAS3, {"use_ema": False, "ema_momentum": 0.5, "ema_overwrite_frequency": 3, "loss_scale_factor": 1.0}),
    (KERAS3, {"weight_decay": 0.0, "clipnorm": 0.0}),
    (TORCH, {"foreach": True, "weight_decay": 0.0, "differentiable": False}),
    (TIMM, {"foreach": False, "caution": False}),
    (TENSORFLOW, {"epsilon": 0}),
    (TENSORFLOW, {"epsilon": None}),
]


@pytest.mark.parametrize(("dialect", "arguments"), OFF, ids=str)
def test_arguments_without_effect(dialect: dialects.Dialect, arguments: dict[str, Any]):
    assert dialect(**arguments).get_config() == dialect().get_config()


# --- TensorFlow ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "inside"), [(0, False), (0.0, False), (0.5, True), (lambda: 0.0, True)])
def test_tensorflow_moves_epsilon_with_momentum(momentum: Any, inside: bool):
    opt = TENSORFLOW(momentum=momentum)
    assert opt.eps_in_sqrt is inside
    assert opt.dense_only is not inside


def test_tensorflow_rounds_to_float32():
    opt = TENSORFLOW(0.1, rho=0.7, momentum=lambda: 0.3, epsilon=1e-3, decay=0.1)
    assert (opt.learning_rate, opt.rho, opt.momentum) == (single(0.1), single(0.7), single(0.3))
    assert (opt.epsilon, opt.decay) == (1e-3, single(0.1))


def test_tensorflow_lr_wins():
    assert TENSORFLOW(0.5, lr=0.25).learning_rate == 0.25


def test_tensorflow_aggregator():
    opt, var = TENSORFLOW(gradient_aggregator=lambda pairs: [(-grad, var) for grad, var in pairs]), np.zeros(2)
    opt.apply_gradients([(np.ones(2), var)])
    assert (var > 0).all()


class KerasSchedule:
    """What a schedule object of Keras has to offer."""

    def __call__(self, step: Any) -> float:
        raise AssertionError("evaluated")

    def get_config(self) -> dict[str, Any]:
        return {"initial_learning_rate": 0.5, "decay_steps": 2, "decay_rate": 0.5, "staircase": True, "name": None}


ExponentialDecayOfKeras = type("ExponentialDecay", (KerasSchedule,), {})


@pytest.mark.parametrize("dialect", [TENSORFLOW, KERAS3], ids=repr)
@pytest.mark.parametrize(
    "rate",
    [ExponentialDecayOfKeras(), {"class_name": "ExponentialDecay", "config": KerasSchedule().get_config()}],
    ids=["object", "serialised"],
)
def test_schedules_of_keras(dialect: dialects.Dialect, rate: Any):
    assert dialect(rate).learning_rate == ExponentialDecay(0.5, 2, 0.5, staircase=True)


# --- sparse gradients, copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", ALL, ids=repr)
def test_sparse_gradients_on_request(dialect: dialects.Dialect):
    opt, table = dialect(0.5), np.ones((3, 2))
    sparse = IndexedSlices(np.ones((1, 2)), np.array([1]))
    with pytest.raises(ValueError, match="dense_only"):
        opt.apply_gradients([(sparse, table)])
    assert (table == 1).all()
    opt.dense_only = False
    opt.apply_gradients([(sparse, table)])
    assert (table != 1).any(axis=1).tolist() == [False, True, False]


def test_tensorflow_with_momentum_takes_sparse_gradients():
    opt, table = TENSORFLOW(0.5, momentum=0.5), np.ones((3, 2))
    opt.apply_gradients([(IndexedSlices(np.ones((1, 2)), np.array([1])), table)])
    assert (table != 1).any(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("dialect", ALL, ids=repr)
def test_optimizers_can_be_copied(dialect: dialects.Dialect):
    opt = dialect(0.5)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), RMSprop.from_config(opt.get_config())):
        assert other.get_config() == opt.get_config()


def half() -> float:
    return 0.5


def test_dialects_are_copied_and_pickled_by_name():
    for dialect in (TENSORFLOW, KERAS3, TORCH, OPTAX, CHAINER, PADDLE, TIMM):
        assert pickle.loads(pickle.dumps(dialect)) is dialect
        assert copy.copy(dialect) is dialect
        assert copy.deepcopy([dialect])[0] is dialect


def test_tensorflow_with_callables_can_be_pickled():
    assert pickle.loads(pickle.dumps(TENSORFLOW(half, momentum=half))).learning_rate == 0.5
