"""Weights of both RMSprops of tf_keras, there and back."""

from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, schedules
from gpurms.convert import from_tf_keras, to_tf_keras
from gpurms.dialects import KERAS3, TENSORFLOW
from tests.with_peers import peers
from tests.with_peers.peers import tf_keras

pytestmark = pytest.mark.usefixtures("numpy_engine")

LEGACY: list[dict[str, Any]] = [
    {"learning_rate": 0.1},
    {"learning_rate": 0.1, "momentum": 0.9, "rho": 0.7, "epsilon": 1e-2},
    {"learning_rate": 0.1, "centered": True, "decay": 0.1},
    {"learning_rate": 0.1, "momentum": 0.5, "centered": True, "clipnorm": 1.0},
]
NEW: list[dict[str, Any]] = [
    {"learning_rate": 0.1},
    {"learning_rate": 0.1, "momentum": 0.9, "rho": 0.7, "epsilon": 1e-2},
    {"learning_rate": 0.1, "momentum": 0.5, "centered": True, "weight_decay": 0.25},
]
CASES = [(peers.Legacy, options) for options in LEGACY] + [(peers.TfKeras, options) for options in NEW]
ROUNDED = (peers.TfKeras, {"learning_rate": 0.1, "weight_decay": 0.3})
"""Its weight decay is rounded to float32 there."""


def weights_of(theirs: Any) -> list[np.ndarray]:
    if isinstance(theirs, peers.Legacy):
        return theirs.optimizer.get_weights()
    return [variable.numpy() for variable in theirs.optimizer.variables]


@pytest.mark.parametrize("dtype", peers.DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(("library", "options"), [*CASES, ROUNDED], ids=str)
def test_import(library: Any, options: dict[str, Any], dtype: Any):
    problem = peers.Problem(dtype, 30)
    with peers.floatx(dtype):
        theirs = library(problem.start, **options)
        for grads in problem.grads[:10]:
            theirs.step(grads)
        variables = theirs.values()
        opt = from_tf_keras(weights_of(theirs), variables, theirs.optimizer.get_config())
        assert opt.iterations.numpy() == 10
        peers.Comparison(opt, variables).run(theirs, problem.grads[10:])


@pytest.mark.parametrize("dtype", peers.DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(("library", "options"), CASES, ids=str)
def test_export(library: Any, options: dict[str, Any], dtype: Any):
    legacy = library is peers.Legacy
    problem = peers.Problem(dtype, 30)
    opt = (TENSORFLOW if legacy else KERAS3)(**options)
    ours = peers.Comparison(opt, [value.copy() for value in problem.start])
    for grads in problem.grads[:10]:
        ours.step(grads)
    weights, config = to_tf_keras(opt, ours.variables, legacy)
    with peers.floatx(dtype):
        theirs = library(ours.variables)
        theirs.optimizer = theirs.make.from_config(config)
        build(theirs)
        theirs.optimizer.set_weights(weights)
        ours.restart().run(theirs, problem.grads[10:])


def build(theirs: Any) -> None:
    if not isinstance(theirs, peers.Legacy):
        theirs.optimizer.build(theirs.variables)
        return
    theirs.optimizer.iterations  # noqa: B018  its first weight
    theirs.optimizer._create_all_weights(theirs.variables)


@pytest.mark.parametrize("library", [peers.Legacy, peers.TfKeras], ids=["legacy", "new"])
def test_schedule(library: Any):
    schedule = tf_keras.optimizers.schedules.ExponentialDecay(0.1, 4, 0.5)
    problem = peers.Problem(np.float32, 30)
    theirs = library(problem.start, learning_rate=schedule, momentum=0.5)
    for grads in problem.grads[:10]:
        theirs.step(grads)
    variables = theirs.values()
    opt = from_tf_keras(weights_of(theirs), variables, theirs.optimizer.get_config())
    assert opt.learning_rate == schedules.ExponentialDecay(0.1, 4, 0.5)
    ours = peers.Comparison(opt, variables)
    ours.run(theirs, problem.grads[10:20])

    weights, config = to_tf_keras(opt, variables, library is peers.Legacy)
    theirs = library(variables)
    theirs.optimizer = theirs.make.from_config(config)
    build(theirs)
    theirs.optimizer.set_weights(weights)
    ours.restart().run(theirs, problem.grads[20:])


@pytest.mark.parametrize("library", [peers.Legacy, peers.TfKeras], ids=["legacy", "new"])
def test_learning_rate_is_the_one_of_the_moment(library: Any):
    theirs = library([np.ones(2, np.float32)], learning_rate=0.5)
    theirs.step([np.ones(2, np.float32)])
    theirs.optimizer.learning_rate = 0.25
    config = theirs.optimizer.get_config()
    assert from_tf_keras(weights_of(theirs), theirs.values(), config).learning_rate == 0.25


@pytest.mark.parametrize("library", [peers.Legacy, peers.TfKeras], ids=["legacy", "new"])
def test_serialised_optimizer(library: Any):
    theirs = library([np.ones(2, np.float32)], learning_rate=0.5)
    theirs.step([np.ones(2, np.float32)])
    serialised = tf_keras.optimizers.serialize(theirs.optimizer)
    opt = from_tf_keras(weights_of(theirs), theirs.values(), serialised)
    assert opt.learning_rate == 0.5
    with pytest.raises(ValueError, match="config of an RMSprop; got one of Adam"):
        from_tf_keras([], [], tf_keras.optimizers.serialize(tf_keras.optimizers.Adam()))


def test_float16():
    theirs = peers.Legacy([np.ones(2, np.float16)], learning_rate=0.5, momentum=0.5, epsilon=1e-3)
    theirs.step([np.array([0.25, 3.0], np.float16)])
    [variable] = theirs.values()
    weights = theirs.optimizer.get_weights()
    opt = from_tf_keras(weights, [variable], theirs.optimizer.get_config())
    assert opt.get_slot(variable, "rms").dtype == np.float32
    again, _ = to_tf_keras(opt, [variable])
    assert [(w.dtype, w.tolist()) for w in again] == [(w.dtype, w.tolist()) for w in weights]


def test_settings_that_tf_keras_does_not_have():
    with pytest.raises(ValueError, match=r"legacy\.RMSprop cannot go on .*: eps_in_sqrt is True here, False there"):
        to_tf_keras(RMSprop(), [])
    with pytest.raises(ValueError, match=r"decay; it is 0\.5 here"):
        to_tf_keras(RMSprop(decay=0.5), [], legacy=False)
    with pytest.raises(ValueError, match="takes one of clipnorm"):
        to_tf_keras(RMSprop(clipnorm=0.5, clipvalue=1.0), [], legacy=False)
