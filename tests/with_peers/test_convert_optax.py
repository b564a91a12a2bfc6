"""State of `optax.rmsprop`, there and back."""

from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, Variable, schedules
from gpurms.convert import from_optax, to_optax
from gpurms.dialects import OPTAX
from tests.with_peers import peers
from tests.with_peers.peers import jax, optax

pytestmark = pytest.mark.usefixtures("numpy_engine")

OPTIONS: list[dict[str, Any]] = [
    {"learning_rate": 0.1},
    {"learning_rate": 0.1, "momentum": 0.9, "decay": 0.7, "eps": 1e-2, "initial_scale": 1.0},
    {"learning_rate": 0.1, "centered": True, "eps_in_sqrt": False},
    {"learning_rate": 0.1, "momentum": 0.5, "centered": True, "nesterov": True},
    {"learning_rate": 0.1, "momentum": 0.0},
]


@pytest.mark.parametrize("dtype", peers.DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_import(options: dict[str, Any], dtype: Any):
    problem = peers.Problem(dtype, 30)
    theirs = peers.Optax(problem.start, **options)
    for grads in problem.grads[:10]:
        theirs.step(grads)
    variables = theirs.values()
    opt = from_optax(theirs.state, variables, **options)
    peers.Comparison(opt, variables).run(theirs, problem.grads[10:])


@pytest.mark.parametrize("dtype", peers.DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_export(options: dict[str, Any], dtype: Any):
    problem = peers.Problem(dtype, 30)
    ours = peers.Comparison(OPTAX(**options), [value.copy() for value in problem.start])
    for grads in problem.grads[:10]:
        ours.step(grads)
    tree = {f"p{i}": variable for i, variable in enumerate(ours.variables)}
    state, arguments = to_optax(ours.optimizer, tree)
    theirs = peers.Optax(ours.variables, **arguments)
    assert jax.tree.structure(state) == jax.tree.structure(theirs.state)
    theirs.state = state
    ours.restart().run(theirs, problem.grads[10:])


def test_schedule():
    """optax has its rates in float32 and multiplies by them, which is one rounding more."""
    problem = peers.Problem(np.float32, 30)
    schedule = optax.exponential_decay(0.1, 4, 0.5)
    theirs = peers.Optax(problem.start, learning_rate=schedule, momentum=0.5)
    for grads in problem.grads[:10]:
        theirs.step(grads)
    variables = theirs.values()
    opt = from_optax(theirs.state, variables, schedules.ExponentialDecay(0.1, 4, 0.5), momentum=0.5)
    assert opt.iterations.numpy() == 10
    ours = peers.Comparison(opt, variables)
    ours.run(theirs, problem.grads[10:20])

    state, arguments = to_optax(opt, dict(zip(theirs.params, variables)))
    assert "learning_rate" not in arguments
    theirs = peers.Optax(variables, learning_rate=schedule, **arguments)
    assert jax.tree.structure(state) == jax.tree.structure(theirs.state)
    theirs.state = state
    ours.restart().run(theirs, problem.grads[20:])


def test_trees_of_variables():
    tree = {"b": np.ones(2), "a": [np.ones(3), np.ones(())]}
    state = optax.rmsprop(0.5, momentum=0.5).init(tree)
    state = (optax.ScaleByRmsState({"b": np.full(2, 0.5), "a": [np.full(3, 0.25), np.asarray(0.125)]}), *state[1:])
    variables = {"b": Variable(tree["b"]), "a": [Variable(tree["a"][0]), Variable(tree["a"][1])]}
    opt = from_optax(state, variables, 0.5, momentum=0.5)
    assert opt.get_slot(variables["b"], "rms").numpy().tolist() == [0.5, 0.5]
    assert opt.get_slot(variables["a"][1], "rms").numpy() == 0.125
    back, arguments = to_optax(opt, variables)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert back[0].nu["a"][0].tolist() == [0.25] * 3
    assert (arguments["learning_rate"], arguments["momentum"]) == (0.5, 0.5)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), peers.BFLOAT16], ids=str)
def test_16_bits(dtype: Any):
    theirs = peers.Optax([np.ones(3, dtype)], learning_rate=0.5, momentum=0.5, centered=True)
    theirs.step([np.array([0.25, 3.0, -1.0], dtype)])
    [variable] = theirs.values()
    opt = from_optax(theirs.state, [variable], learning_rate=0.5, momentum=0.5, centered=True)
    assert opt.get_slot(variable, "mg").dtype == np.float32
    state, _ = to_optax(opt, {"p0": variable})
    for ours, other in zip(jax.tree.leaves(state), jax.tree.leaves(theirs.state), strict=True):
        assert ours.dtype == other.dtype == dtype
        assert ours.tolist() == other.tolist()


def test_state_of_other_arguments():
    tree = [np.ones(2)]
    plain = optax.rmsprop(0.5).init(tree)
    for state, options in (
        (plain, {"centered": True}),
        (plain, {"momentum": 0.5}),
        (plain, {"learning_rate": schedules.CosineDecay(0.5, 10)}),
        (optax.rmsprop(0.5, bias_correction=True).init(tree), {}),
        (optax.rmsprop(0.5, momentum=0.5).init(tree), {}),
        (optax.adam(0.5).init(tree), {}),
        (optax.inject_hyperparams(optax.rmsprop)(learning_rate=0.5).init(tree), {}),
        (plain[0], {}),
    ):
        with pytest.raises(ValueError, match=r"with these arguments optax\.rmsprop has the state"):
            from_optax(state, tree, **{"learning_rate": 0.5, **options})


def test_bad_input():
    state = optax.rmsprop(0.5).init([np.ones(2)])
    with pytest.raises(ValueError, match="expected rms of 2 variables, 2 arrays; got 1"):
        from_optax(state, [np.ones(2), np.ones(3)], 0.5)
    with pytest.raises(ValueError, match=r"its rms in shape \(3,\); got shape \(2,\)"):
        from_optax(state, [np.ones(3)], 0.5)
    with pytest.raises(TypeError, match="'rho'"):
        from_optax(state, [np.ones(2)], 0.5, rho=0.9)
    with pytest.raises(ValueError, match="bias_correction"):
        from_optax(state, [np.ones(2)], 0.5, bias_correction=True)


def test_settings_that_optax_does_not_have():
    for options, message in (
        ({"weight_decay": 0.5}, "weight_decay is 0.5 here, None there"),
        ({"momentum": 0.5, "lr_in_momentum": False}, "lr_in_momentum is False here, True there"),
        ({"maximize": True}, "maximize is True here, False there"),
        ({"learning_rate": lambda: 0.5, "momentum": lambda: 0.5}, "function here: learning_rate, momentum; set"),
    ):
        with pytest.raises(ValueError, match=message):
            to_optax(RMSprop(**options), [])


def test_float64_without_x64():
    opt, var = OPTAX(0.5), np.ones(2)
    opt.apply_gradients([(np.ones(2), var)])
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(ValueError, match="jax_enable_x64"):
            to_optax(opt, [var])
    finally:
        jax.config.update("jax_enable_x64", True)
