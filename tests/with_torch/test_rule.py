"""The rule is that of `gpurms.RMSprop` with torch's options, to the bit, on every engine."""

from itertools import product
from typing import Any

import pytest
import torch

from gpurms.kernels.cpu import use_engine
from gpurms.torch import RMSprop
from tests.with_torch.support import (
    DTYPES,
    SHAPES,
    Core,
    clones,
    gradients,
    parameters,
    step,
)

DECAYS: dict[str, dict[str, Any]] = {
    "no decay": {},
    "l2": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
}
MOMENTA: dict[str, dict[str, Any]] = {
    "no momentum": {},
    "momentum": {"momentum": 0.75},
    "nesterov": {"momentum": 0.75, "nesterov": True},
}
SWITCHES = ("maximize", "centered", "eps_in_sqrt", "lr_in_momentum")
COMPILED: dict[str, dict[str, Any]] = {
    "default": {},
    "all of torch": {"weight_decay": 0.1, "momentum": 0.75, "centered": True, "maximize": True},
    "all of TensorFlow": {**MOMENTA["nesterov"], "centered": True, "eps_in_sqrt": True, "lr_in_momentum": True},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
}
"""For Numba, to which each is some two seconds of work."""


def check(dtype: torch.dtype, options: dict[str, Any], shapes: Any = SHAPES, n_steps: int = 3) -> None:
    params = parameters(dtype, shapes)
    ours, core = RMSprop(params, **options), Core(params, **options)
    for n in range(n_steps):
        grads = gradients(params, n)
        step(ours, grads)
        with use_engine("numpy"):
            core.step(grads)
    core.assert_same_bits(ours)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination(dtype: torch.dtype, momentum: str, decay: str, numpy_engine: None):
    for values in product((False, True), repeat=len(SWITCHES)):
        switches = dict(zip(SWITCHES, values))
        check(dtype, {"lr": 0.05, "alpha": 0.9, "eps": 1e-3, **switches, **DECAYS[decay], **MOMENTA[momentum]})


@pytest.mark.parametrize("options", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled(dtype: torch.dtype, options: str):
    with use_engine("numba"):
        check(dtype, {"lr": 0.05, "alpha": 0.9, "eps": 1e-3, **COMPILED[options]})


def test_terms_changed_between_steps(cpu_engine: str):
    """What is compiled for some terms is not used for others."""
    options = {"weight_decay": 0.0, "decoupled_weight_decay": True, "maximize": False}
    params = parameters(torch.float32, SHAPES)
    ours, core = RMSprop(params, lr=0.05, eps=1e-3, **options), Core(params, lr=0.05, eps=1e-3, **options)
    for n, changed in enumerate((False, True, True, False, True)):
        changes = {"weight_decay": 0.25, "maximize": True} if changed else options
        ours.param_groups[0].update(changes)
        for name, value in changes.items():
            setattr(core.optimizer, name, value)
        grads = gradients(params, n)
        step(ours, grads)
        with use_engine("numpy"):
            core.step(grads)
    core.assert_same_bits(ours)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("eps", [0.0, 1.0])
def test_extreme_numbers(alpha: float, eps: float, cpu_engine: str):
    """Of torch's ranges; `gpurms.RMSprop` has no averages that grow."""
    if alpha <= 1:
        return check(torch.float32, {"alpha": alpha, "eps": eps})
    [ours] = parameters(torch.float64, [(4,)])
    theirs = clones([ours])[0]
    for optimizer in (RMSprop([ours], alpha=alpha, eps=eps), torch.optim.RMSprop([theirs], alpha=alpha, eps=eps)):
        step(optimizer, [torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0, equal_nan=True)
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_parameters_on_all_threads(dtype: torch.dtype, cpu_engine: str):
    check(dtype, {"lr": 0.05}, [((1 << 20) + 3,), (7,), (1 << 15,)], n_steps=2)


@pytest.mark.parametrize("special", [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-30, 1e30])
def test_special_gradients(special: float, cpu_engine: str):
    params = parameters(torch.float32, [(4,)])
    ours, core = RMSprop(params, lr=0.5, eps=0.0), Core(params, lr=0.5, eps=0.0)
    for _ in range(2):
        grad = torch.tensor([special, 1.0, special, -1.0])
        step(ours, [grad])
        core.step([grad])
    assert torch.equal(params[0].isnan(), torch.from_numpy(core.variables[0].numpy()).isnan())
    core.assert_same_bits(ours)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_wide_gradients_of_narrow_parameters(narrow: torch.dtype, wide: torch.dtype, cpu_engine: str):
    """Rounded to the type of computation, not to the parameter's; and of changing types."""
    [param] = parameters(narrow, [(64,)])
    core, optimizer = Core([param], lr=0.05), RMSprop([param], lr=0.05)
    for n, dtype in enumerate((wide, wide, narrow, wide)):
        [grad] = gradients(parameters(dtype, [(64,)]), n)
        assert dtype is narrow or (grad != grad.to(narrow)).any()
        param.grad = None
        param.grad_dtype = dtype
        param.grad = grad
        optimizer.step()
        core.step([grad.to(torch.float32)])
    core.assert_same_bits(optimizer)
