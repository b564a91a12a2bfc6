"""`gradient_aggregator` and `dense_only`: what happens to gradients before anything else does."""

import copy

import numpy as np
import pytest

from gpurms import IndexedSlices, RMSprop
from tests.engines import Engine


def test_aggregated_gradients_are_applied_and_clipped(library: Engine):
    var, twin = library.put(np.zeros(4, np.float32)), library.put(np.zeros(4, np.float32))
    grad = library.put(np.full(4, 3, np.float32))
    seen = []

    def double(pairs):
        seen.append(pairs)
        return [(2 * g, v) for g, v in pairs]

    opt = RMSprop(0.1, clipnorm=1.0, gradient_aggregator=double)
    for _ in range(3):  # the second and third may take the short cut
        opt.apply_gradients([(grad, var)])
    plain = RMSprop(0.1, clipnorm=1.0)
    for _ in range(3):
        plain.apply_gradients([(2 * grad, twin)])
    assert [len(pairs) for pairs in seen] == [1, 1, 1]
    assert (var == twin).all()
    assert (grad == 3).all()


def test_aggregator_sees_an_empty_call():
    calls = []
    opt = RMSprop(gradient_aggregator=lambda pairs: calls.append(pairs) or pairs)
    assert opt.apply_gradients([]) == 0
    assert calls == [[]]


def test_aggregator_that_raises_changes_nothing():
    var = np.ones(3)

    def fail(pairs):
        raise ValueError("ranks disagree")

    opt = RMSprop(gradient_aggregator=fail)
    with pytest.raises(ValueError, match="ranks disagree"):
        opt.apply_gradients([(np.ones(3), var)])
    assert opt.weights == []
    assert (var == 1).all()


def test_what_it_returns_is_checked_like_what_the_caller_gives():
    opt = RMSprop(gradient_aggregator=lambda pairs: [(g[:1], v) for g, v in pairs])
    with pytest.raises(ValueError, match=r"expected a gradient of its shape \(3,\); got shape \(1,\)"):
        opt.apply_gradients([(np.ones(3), np.ones(3))])
    opt.gradient_aggregator = lambda pairs: None
    with pytest.raises(TypeError, match="must be an iterable of"):
        opt.apply_gradients([(np.ones(3), np.ones(3))])


def test_aggregator_is_no_part_of_configs_and_copies_share_it():
    def same(pairs):
        return pairs

    opt = RMSprop(gradient_aggregator=same)
    assert opt.get_config() == RMSprop().get_config()
    assert copy.deepcopy(opt).gradient_aggregator is same
    opt.gradient_aggregator = None
    with pytest.raises(TypeError, match="gradient_aggregator must be a function or None; got 3"):
        opt.gradient_aggregator = 3


def test_dense_only_refuses_sparse_gradients():
    table = np.zeros((4, 2))
    opt = RMSprop(dense_only=True)
    with pytest.raises(ValueError, match=r"variable 0 .*: dense_only is set; got a sparse gradient"):
        opt.apply_gradients([(IndexedSlices(np.ones((1, 2)), np.array([1])), table)])
    assert opt.weights == []
    assert opt.apply_gradients([(np.ones((4, 2)), table)]) == 1
    assert RMSprop.from_config(opt.get_config()).dense_only
