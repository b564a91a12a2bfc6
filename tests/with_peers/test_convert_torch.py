"""State of `torch.optim.RMSprop`, there and back."""

import copy
import json
from typing import Any

import numpy as np
import pytest

from gpurms import RMSprop, schedules
from gpurms.convert import from_torch, to_torch
from gpurms.dialects import TORCH
from tests.with_peers import peers
from tests.with_peers.peers import torch

pytestmark = pytest.mark.usefixtures("numpy_engine")

OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9, "alpha": 0.7, "eps": 1e-2},
    {"lr": 0.1, "centered": True},
    {"lr": 0.1, "momentum": 0.5, "centered": True, "weight_decay": 0.3, "maximize": True},
]


@pytest.mark.parametrize("dtype", peers.DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_import(options: dict[str, Any], dtype: Any):
    problem = peers.Problem(dtype, 30)
    theirs = peers.Torch(problem.start, **options)
    for grads in problem.grads[:10]:
        theirs.step(grads)
    variables = theirs.values()
    opt = from_torch(theirs.optimizer.state_dict(), variables)
    assert opt.iterations.numpy() == 10
    peers.Comparison(opt, variables).run(theirs, problem.grads[10:])


@pytest.mark.parametrize("dtype", peers.DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_export(options: dict[str, Any], dtype: Any):
    problem = peers.Problem(dtype, 30)
    ours = peers.Comparison(TORCH(**options), [value.copy() for value in problem.start])
    for grads in problem.grads[:10]:
        ours.step(grads)
    state_dict = to_torch(ours.optimizer, ours.variables)
    theirs = peers.Torch(ours.variables)
    theirs.optimizer.load_state_dict(state_dict)
    ours.restart().run(theirs, problem.grads[10:])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_there_and_back(options: dict[str, Any]):
    problem = peers.Problem(np.float32, 3)
    theirs = peers.Torch(problem.start, **options)
    for grads in problem.grads:
        theirs.step(grads)
    state_dict = theirs.optimizer.state_dict()
    variables = theirs.values()
    again = to_torch(from_torch(state_dict, variables), variables)
    assert again["param_groups"] == state_dict["param_groups"]
    assert list(again["state"]) == list(state_dict["state"])
    for key, state in state_dict["state"].items():
        assert again["state"][key].keys() == state.keys()
        for name, tensor in state.items():
            other = again["state"][key][name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(other, tensor)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits(dtype: str):
    param = torch.tensor([1.0, -2.0, 0.5], dtype=getattr(torch, dtype), requires_grad=True)
    optimizer = torch.optim.RMSprop([param], lr=0.5, momentum=0.5)
    param.grad = torch.tensor([0.3, -0.2, 0.1], dtype=param.dtype)
    optimizer.step()
    buffers = optimizer.state_dict()["state"][0]
    variable = param.detach().float().numpy().astype(np.dtype(dtype) if dtype == "float16" else peers.BFLOAT16)
    opt = from_torch(optimizer.state_dict(), [variable])
    for slot, name in (("rms", "square_avg"), ("momentum", "momentum_buffer")):
        assert opt.get_slot(variable, slot).dtype == np.float32
        assert opt.get_slot(variable, slot).numpy().tolist() == buffers[name].float().tolist()
    back = to_torch(opt, [variable])["state"][0]
    assert back["square_avg"].dtype == param.dtype
    assert torch.equal(back["square_avg"], buffers["square_avg"])


def state_dict_of(n_steps: int = 2, n: int = 2, **options: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    problem = peers.Problem(np.float64, n_steps, [(2,), (3,), ()][:n])
    theirs = peers.Torch(problem.start, **options)
    for grads in problem.grads:
        theirs.step(grads)
    return theirs.optimizer.state_dict(), theirs.values()


def test_groups_of_equal_options():
    variables = [np.ones(2), np.ones(3)]
    params = [torch.tensor(variable, requires_grad=True) for variable in variables]
    optimizer = torch.optim.RMSprop([{"params": [params[1]]}, {"params": [params[0]]}], lr=0.5)
    for param in params:
        param.grad = torch.ones_like(param) * len(param)
    optimizer.step()
    opt = from_torch(optimizer.state_dict(), [variables[1], variables[0]])
    assert opt.get_slot(variables[1], "rms").numpy().tolist() == [pytest.approx(0.09)] * 3


def test_groups_of_different_options():
    params = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = torch.optim.RMSprop([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.25}], lr=0.5)
    with pytest.raises(ValueError, match=r"groups 0 and 1 differ in learning_rate \(0\.5, 0\.25\)"):
        from_torch(optimizer.state_dict(), [np.ones(2, np.float32), np.ones(3, np.float32)])


def test_parameter_without_gradient_has_no_state():
    params = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = torch.optim.RMSprop(params, lr=0.5)
    params[1].grad = torch.ones(3)
    optimizer.step()
    variables = [np.ones(2, np.float32), np.ones(3, np.float32)]
    opt = from_torch(optimizer.state_dict(), variables)
    with pytest.raises(KeyError):
        opt.get_slot(variables[0], "rms")
    assert list(to_torch(opt, variables)["state"]) == [1]


def test_before_the_first_step():
    params = [torch.ones(2, requires_grad=True)]
    opt = from_torch(torch.optim.RMSprop(params, lr=0.5).state_dict(), [np.ones(2, np.float32)])
    assert opt.iterations.numpy() == 0
    assert opt.learning_rate == 0.5
    assert to_torch(opt, [np.ones(2, np.float32)])["state"] == {}


def test_tensor_as_learning_rate():
    params = [torch.ones(2, requires_grad=True)]
    state_dict = torch.optim.RMSprop(params, lr=torch.tensor(0.5)).state_dict()
    assert from_torch(state_dict, [np.ones(2, np.float32)]).learning_rate == 0.5


def test_learning_rate_of_a_scheduler():
    params = [torch.ones(2, requires_grad=True)]
    optimizer = torch.optim.RMSprop(params, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step()
    scheduler.step()
    assert from_torch(optimizer.state_dict(), [np.ones(2, np.float32)]).learning_rate == 0.25


SCHEDULERS: dict[str, tuple[Any, set[str]]] = {
    "OneCycleLR": (
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.5, total_steps=20),
        {"max_lr", "min_lr", "base_momentum", "max_momentum"},
    ),
    "CyclicLR": (
        lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, base_lr=0.1, max_lr=0.5, step_size_up=4),
        {"base_momentum", "max_momentum"},
    ),
    "SWALR": (lambda opt: torch.optim.swa_utils.SWALR(opt, swa_lr=0.05), {"swa_lr"}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_notes_of_schedulers(name: str):
    """Rate and momentum of the moment are taken over, and what the scheduler keeps in the groups is left alone."""
    make, notes = SCHEDULERS[name]
    problem = peers.Problem(np.float64, 10)
    theirs = peers.Torch(problem.start, lr=0.1, momentum=0.9)
    scheduler = make(theirs.optimizer)
    for grads in problem.grads[:5]:
        theirs.step(grads)
        scheduler.step()
    [group] = theirs.optimizer.state_dict()["param_groups"]
    assert notes | {"initial_lr"} <= group.keys()
    variables = theirs.values()
    opt = from_torch(theirs.optimizer.state_dict(), variables)
    assert (opt.learning_rate, opt.momentum) == (group["lr"], group["momentum"])
    assert opt.learning_rate != 0.1
    peers.Comparison(opt, variables).run(theirs, problem.grads[5:])


def broken(change: Any) -> dict[str, Any]:
    state_dict = copy.deepcopy(state_dict_of(momentum=0.5)[0])
    change(state_dict)
    return state_dict


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no state_dict": (lambda s: s.clear(), ValueError, "state_dict of a torch optimizer"),
    "no groups": (lambda s: s.update(param_groups=[]), ValueError, "param_groups is empty"),
    "missing buffer": (lambda s: s["state"][1].pop("momentum_buffer"), ValueError, "momentum_buffer is missing"),
    "missing step": (lambda s: s["state"][0].pop("step"), ValueError, "step is missing"),
    "unknown buffer": (lambda s: s["state"][0].update(exp_avg=torch.ones(2)), ValueError, "got exp_avg too"),
    "unknown parameter": (lambda s: s["state"].update({7: {}}), ValueError, r"in no group: \[7\]"),
    "wrong shape": (
        lambda s: s["state"][1].update(square_avg=torch.ones(2)),
        ValueError,
        r"variable 1 .*expected its rms in shape \(3,\); got shape \(2,\)",
    ),
    "complex": (
        lambda s: s["state"][0].update(square_avg=torch.ones(2, dtype=torch.complex64)),
        TypeError,
        "real numbers; got complex64",
    ),
    "fractional step": (lambda s: s["state"][0].update(step=torch.tensor(0.5)), ValueError, "number of steps"),
    "another optimizer": (lambda s: s["param_groups"][0].update(betas=(0.9, 0.99)), TypeError, "'betas'"),
    "differentiable": (lambda s: s["param_groups"][0].update(differentiable=True), ValueError, "differentiable=True"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_state(name: str):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        from_torch(broken(change), [np.ones(2), np.ones(3)])


@pytest.mark.parametrize("n", [1, 3])
def test_another_number_of_variables(n: int):
    with pytest.raises(ValueError, match=f"a variable for each of 2 parameters; got {n}"):
        from_torch(state_dict_of()[0], [np.ones(2), np.ones(3), np.ones(())][:n])


FOREIGN: list[tuple[dict[str, Any], str]] = [
    ({}, "eps_in_sqrt is True here, False there"),
    ({"eps_in_sqrt": False, "momentum": 0.5}, "lr_in_momentum is True here, False there"),
    ({"eps_in_sqrt": False, "weight_decay": 0.1}, "decoupled_weight_decay is True here, False there"),
    ({"eps_in_sqrt": False, "clipnorm": 1.0}, "clipnorm is 1.0 here, None there"),
    ({"eps_in_sqrt": False, "decay": 0.5}, "decay is 0.5 here, 0.0 there"),
    ({"eps_in_sqrt": False, "learning_rate": schedules.CosineDecay(0.1, 5)}, "set optimizer.learning_rate to the rate"),
    (
        {"eps_in_sqrt": False, "rho": lambda: 0.5, "learning_rate": lambda: 0.1},
        "function here: learning_rate, rho; set",
    ),
]


@pytest.mark.parametrize(("options", "message"), FOREIGN, ids=[message for _, message in FOREIGN])
def test_settings_that_torch_does_not_have(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        to_torch(RMSprop(**options), [])


def test_settings_without_effect_do_not_matter():
    opt = RMSprop(epsilon=0.0, nesterov=True, dense_only=False, slot_dtype="float64")
    json.dumps(to_torch(opt, [])["param_groups"])


def test_slot_that_does_not_exist_yet():
    opt, var = TORCH(), np.ones(2)
    opt.apply_gradients([(np.ones(2), var)])
    opt.momentum = 0.5
    with pytest.raises(ValueError, match=r"expected slots rms, momentum.*has no slot 'momentum'"):
        to_torch(opt, [var])


@pytest.mark.parametrize("own", [{}, {"nesterov": True, "eps_in_sqrt": True}], ids=str)
def test_from_the_drop_in(own: dict[str, bool]):
    """Its options that torch does not have come along; what follows has its bits."""
    from gpurms.torch import RMSprop as DropIn

    rng = np.random.default_rng(3)
    there = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    source = DropIn([there], lr=0.1, momentum=0.5, centered=True, **own)

    def step_there(grad: np.ndarray) -> None:
        there.grad = torch.from_numpy(grad)
        source.step()

    for _ in range(3):
        step_there(rng.standard_normal((5, 2)))
    here = there.detach().numpy().copy()
    optimizer = from_torch(source.state_dict(), [here])
    assert optimizer.dense_only is not bool(own)  # without them it could be torch's, which refuses sparse gradients
    for _ in range(3):
        grad = rng.standard_normal((5, 2))
        step_there(grad)
        optimizer.apply_gradients([(grad, here)])
    assert (here == there.detach().numpy()).all()
