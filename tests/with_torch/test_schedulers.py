"""Torch's schedulers of learning rates drive this optimizer as they drive torch's own."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel

from gpurms.torch import RMSprop
from tests.with_torch.support import clones, gradients, parameters, step

pytestmark = pytest.mark.usefixtures("numpy_engine")  # for nothing here depends on the engine

Make = Callable[[Any], Any]
SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda n: 0.9**n),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda n: 0.9),
    "StepLR": lambda opt: schedulers.StepLR(opt, 3, 0.5),
    "MultiStepLR": lambda opt: schedulers.MultiStepLR(opt, [2, 5], 0.5),
    "ConstantLR": lambda opt: schedulers.ConstantLR(opt, 0.5, 4),
    "LinearLR": lambda opt: schedulers.LinearLR(opt, 0.25, 1.0, 5),
    "ExponentialLR": lambda opt: schedulers.ExponentialLR(opt, 0.8),
    "PolynomialLR": lambda opt: schedulers.PolynomialLR(opt, 8, 2.0),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, 6, 1e-4),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 3, 2),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 1e-3, 0.1, 3, mode="triangular2", cycle_momentum=True),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, 0.1, 12, cycle_momentum=True),
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=1),
    "SequentialLR": lambda opt: schedulers.SequentialLR(
        opt, [schedulers.ConstantLR(opt, 0.1, 3), schedulers.ExponentialLR(opt, 0.9)], [3]
    ),
    "ChainedScheduler": lambda opt: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(opt, 0.1, 3), schedulers.ExponentialLR(opt, 0.9)], opt
    ),
    "SWALR": lambda opt: SWALR(opt, 1e-3, anneal_epochs=4),
}


@pytest.mark.parametrize("rate", [0.05, torch.tensor(0.05)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name: str, rate: Any):
    ours = parameters(torch.float64, [(5,), (3, 2)])
    theirs = clones(ours)
    rates: list[list[Any]] = [[], []]
    for make, params, seen in zip((RMSprop, torch.optim.RMSprop), (ours, theirs), rates):
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": copy.deepcopy(rate)}]
        optimizer = make(groups, lr=0.02, momentum=0.5, eps=1e-3)
        scheduler = SCHEDULERS[name](optimizer)
        for n in range(12):
            step(optimizer, gradients(params, n))
            seen.append([(float(group["lr"]), group["momentum"]) for group in optimizer.param_groups])
            scheduler.step(*[1.0] * (name == "ReduceLROnPlateau"))
    assert rates[0] == rates[1]
    assert len({str(each) for each in rates[0]}) > 1
    for left, right in zip(ours, theirs):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)


def test_no_scheduler_of_torch_is_missing():
    kinds = [kind for _, kind in inspect.getmembers(schedulers, inspect.isclass)]
    found = {kind.__name__ for kind in kinds if issubclass(kind, schedulers.LRScheduler)}
    assert found - {"LRScheduler", "_LRScheduler"} == SCHEDULERS.keys() - {"SWALR"}


def test_scheduler_in_the_wrong_order():
    """Torch finds that out by looking at the optimizer's `step`."""
    optimizer = RMSprop(parameters(torch.float32))
    scheduler = schedulers.ExponentialLR(optimizer, 0.5)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


def test_averaged_model():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    averaged, optimizer = AveragedModel(model), RMSprop(model.parameters(), lr=0.1)
    seen = []
    for n in range(4):
        step(optimizer, gradients(list(model.parameters()), n))
        averaged.update_parameters(model)
        seen.append(model.weight.detach().clone())
    torch.testing.assert_close(averaged.module.weight.detach(), torch.stack(seen).mean(0))
