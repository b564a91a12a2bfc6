"""Dialects beside the libraries they speak, and their arguments against the libraries' constructors."""

import inspect
from typing import Any

import numpy as np
import pytest

from gpurms import dialects
from gpurms.dialects import KERAS3, OPTAX, TENSORFLOW, TORCH
from tests.test_dialects import without_addresses
from tests.with_peers import peers

pytestmark = pytest.mark.usefixtures("numpy_engine")

N_STEPS = 25

CASES: dict[str, tuple[dialects.Dialect, Any, list[dict[str, Any]]]] = {
    "torch": (
        TORCH,
        peers.Torch,
        [
            {},
            {"lr": 0.1, "alpha": 0.7, "eps": 1e-2},
            {"lr": 0.1, "momentum": 0.9},
            {"lr": 0.1, "centered": True},
            {"lr": 0.1, "momentum": 0.5, "centered": True, "weight_decay": 0.3, "maximize": True, "eps": 1e-3},
            {"lr": 0.1, "weight_decay": 0.3, "foreach": True},
        ],
    ),
    "legacy": (
        TENSORFLOW,
        peers.Legacy,
        [
            {},
            {"learning_rate": 0.1, "rho": 0.7, "epsilon": 1e-2},
            {"learning_rate": 0.1, "momentum": 0.9, "epsilon": 1e-2},
            {"learning_rate": 0.1, "centered": True, "epsilon": 1e-2},
            {"learning_rate": 0.1, "momentum": 0.5, "centered": True, "decay": 0.1, "epsilon": 1e-2},
            {"learning_rate": 0.1, "momentum": lambda: 0.3, "rho": lambda: 0.7, "epsilon": 1e-2},
            {"learning_rate": 0.1, "epsilon": 0},
            {"learning_rate": 0.1, "clipvalue": 0.5, "clipnorm": 1.0},
            {"learning_rate": 0.1, "global_clipnorm": 1.0, "momentum": 0.5},
            {"learning_rate": 0.1, "gradient_aggregator": lambda pairs: [(2 * grad, var) for grad, var in pairs]},
        ],
    ),
    "tf_keras": (
        KERAS3,
        peers.TfKeras,
        [
            {},
            {"learning_rate": 0.1, "rho": 0.7, "epsilon": 1e-2},
            {"learning_rate": 0.1, "momentum": 0.5, "centered": True, "weight_decay": 0.25},
        ],
    ),
    "keras3": (
        KERAS3,
        peers.Keras3,
        [
            {},
            {"learning_rate": 0.1, "rho": 0.7, "epsilon": 1e-2},
            {"learning_rate": 0.1, "momentum": 0.9, "epsilon": 1e-2},
            {"learning_rate": 0.1, "centered": True, "epsilon": 1e-2},
            {"learning_rate": 0.1, "momentum": 0.5, "centered": True, "weight_decay": 0.3},
            {"learning_rate": lambda: 0.1, "clipvalue": 0.5},
        ],
    ),
    "optax": (
        OPTAX,
        peers.Optax,
        [
            {"learning_rate": 0.001},
            {"learning_rate": 0.1, "decay": 0.7, "eps": 1e-2},
            {"learning_rate": 0.1, "eps_in_sqrt": False, "eps": 1e-2, "initial_scale": 1.0},
            {"learning_rate": 0.1, "momentum": 0.9},
            {"learning_rate": 0.1, "momentum": 0.5, "nesterov": True, "centered": True},
            {"learning_rate": 0.1, "centered": True, "eps_in_sqrt": False, "momentum": 0.0},
            {"learning_rate": 0.1, "nesterov": True},
        ],
    ),
}


@pytest.mark.parametrize("dtype", peers.DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, arguments) for name, (*_, some) in CASES.items() for arguments in some],
    ids=without_addresses,
)
def test_steps(name: str, arguments: dict[str, Any], dtype: Any):
    dialect, library, _ = CASES[name]
    problem = peers.Problem(dtype, N_STEPS)
    ours = peers.Comparison(dialect(**arguments), [value.copy() for value in problem.start])
    with peers.floatx(dtype):
        ours.run(library(problem.start, **arguments), problem.grads)


CHANGING = {
    "torch": ({"lr": 0.5, "momentum": 0.9}, lambda peer, rate: peer.optimizer.param_groups[0].update(lr=rate)),
    "legacy": ({"momentum": 0.9}, lambda peer, rate: setattr(peer.optimizer, "learning_rate", rate)),
    "tf_keras": ({"momentum": 0.9}, lambda peer, rate: setattr(peer.optimizer, "learning_rate", rate)),
    "keras3": ({"momentum": 0.9}, lambda peer, rate: setattr(peer.optimizer, "learning_rate", rate)),
}


@pytest.mark.parametrize("name", CHANGING)
def test_learning_rate_that_changes(name: str):
    """Only then it matters whether the momentum includes it."""
    dialect, library, _ = CASES[name]
    arguments, set_rate = CHANGING[name]
    problem = peers.Problem(np.float64, 12)
    ours = peers.Comparison(dialect(**arguments), [value.copy() for value in problem.start])
    theirs = library(problem.start, **arguments)
    for k, grads in enumerate(problem.grads):
        ours.optimizer.learning_rate = 0.5**k
        set_rate(theirs, 0.5**k)
        ours.run(theirs, [grads])


def test_changing_rate_of_optax():
    rates = [0.5**k for k in range(12)]
    problem = peers.Problem(np.float64, 12)
    ours = peers.Comparison(OPTAX(0.5, momentum=0.9), [value.copy() for value in problem.start])
    theirs = peers.Optax(problem.start, learning_rate=lambda k: peers.jax.numpy.asarray(rates)[k], momentum=0.9)
    for rate, grads in zip(rates, problem.grads):
        ours.optimizer.learning_rate = rate
        ours.run(theirs, [grads])


@pytest.mark.parametrize("limit", ["clipnorm", "global_clipnorm"])
def test_norms_of_keras3(limit: str):
    """In float32, in which Keras on torch compares norms with their limit whatever the gradients are."""
    problem = peers.Problem(np.float32, N_STEPS)
    arguments = {"learning_rate": 0.1, limit: 1.0}
    ours = peers.Comparison(KERAS3(**arguments), [value.copy() for value in problem.start])
    ours.run(peers.Keras3(problem.start, **arguments), problem.grads)


@pytest.mark.parametrize("name", ["legacy", "tf_keras", "keras3"])
def test_schedule(name: str):
    """In float32, in which Keras evaluates its schedules whatever the variables are."""
    dialect, library, _ = CASES[name]
    module = peers.keras if name == "keras3" else peers.tf_keras
    schedule = module.optimizers.schedules.InverseTimeDecay(0.1, decay_steps=4, decay_rate=0.5)
    problem = peers.Problem(np.float32, N_STEPS)
    theirs = library(problem.start, learning_rate=schedule, momentum=0.5)
    ours = peers.Comparison(dialect(schedule, momentum=0.5), [value.copy() for value in problem.start])
    ours.run(theirs, problem.grads)


CONSTRUCTORS = [
    (TORCH, peers.torch.optim.RMSprop, {"params"}),
    (KERAS3, peers.keras.optimizers.RMSprop, {"kwargs"}),
    (OPTAX, peers.optax.rmsprop, set()),
]


@pytest.mark.parametrize(("dialect", "constructor", "others"), CONSTRUCTORS, ids=["torch", "keras3", "optax"])
def test_arguments_are_the_constructors(dialect: dialects.Dialect, constructor: Any, others: set[str]):
    theirs = [(p.name, p.default) for p in inspect.signature(constructor).parameters.values() if p.name not in others]
    assert [(p.name, p.default) for p in inspect.signature(dialect).parameters.values()] == theirs


@pytest.mark.filterwarnings("ignore:The `lr` argument is deprecated")
def test_arguments_of_tensorflow():
    constructor = peers.tf_keras.optimizers.legacy.RMSprop
    parameters = inspect.signature(TENSORFLOW).parameters
    theirs = inspect.signature(constructor).parameters
    named = {name: p.default for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY}
    assert named == {name: p.default for name, p in theirs.items() if name != "kwargs"}
    for name in parameters.keys() - named.keys():
        constructor(**{name: parameters[name].default or 0})
        with pytest.raises(TypeError, match=name):
            constructor(**{f"{name}_": 0})


def test_tensor_as_learning_rate_of_torch():
    with pytest.raises(ValueError, match=r"^lr=tensor\(0\.5000\).*set optimizer.learning_rate"):
        TORCH(lr=peers.torch.tensor(0.5))


def test_jax_numbers():
    opt = OPTAX(peers.jax.numpy.float32(0.5), momentum=peers.jax.numpy.float32(0.25))
    assert (opt.learning_rate, opt.momentum) == (0.5, 0.25)


def test_schedule_of_optax_is_refused():
    with pytest.raises(ValueError, match=r"^learning_rate=.*gpurms\.schedules"):
        OPTAX(peers.optax.linear_schedule(0.5, 0.0, 10))
