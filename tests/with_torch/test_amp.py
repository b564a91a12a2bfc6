"""Under `torch.amp.GradScaler` on the CPU: the step reads scale and infinities, and gradients stay as they are."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpurms
from gpurms.torch import RMSprop
from tests.with_torch.support import (
    FULL,
    Core,
    Snapshot,
    assert_same_bits,
    assert_same_run,
    clones,
    gradients,
    numpy,
    parameters,
    run,
    step,
)

INFINITE = {1: float("inf"), 4: float("nan"), 5: float("-inf")}
"""What stands in one of the gradients, by step."""


def coefficients(params: list[Tensor], n: int) -> list[Tensor]:
    """Gradients of one step; they are finite or not."""
    found = gradients(params, n)
    found[n % 2].view(-1)[n % 5] = INFINITE.get(n, 1.0)
    return found


def linear_loss(params: list[Tensor], n: int) -> Tensor:
    loss: Any = sum((param * of).sum() for param, of in zip(params, coefficients(params, n)))
    return loss


def scaler(scale: float = 2.0**10) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)


def train(
    optimizer: torch.optim.Optimizer, params: list[Tensor], unscale: bool = False, n_steps: int = 12
) -> list[float]:
    """Scales after each step."""
    scaling, scales = scaler(), []
    for n in range(n_steps):
        optimizer.zero_grad()
        scaling.scale(linear_loss(params, n)).backward()
        if unscale:
            scaling.unscale_(optimizer)
        scaling.step(optimizer)
        scaling.update()
        scales.append(scaling.get_scale())
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    return scales


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loop(dtype: torch.dtype, unscale: bool, cpu_engine: str):
    """As torch's under a scaler of its own, and to the bit as ours that skips the same steps without any."""
    params = parameters(dtype, [(5,), (3, 2)])
    of_torch, alone = clones(params), clones(params)
    options = {"momentum": 0.5, "centered": True, "eps": 1e-3}
    ours, theirs, unscaled = (
        RMSprop(params, **options),
        torch.optim.RMSprop(of_torch, **options),
        RMSprop(alone, **options),
    )
    scales = train(ours, params, unscale)
    assert scales == train(theirs, of_torch, unscale)
    assert len(set(scales)) > 2
    for n in range(12):
        if n not in INFINITE:
            step(unscaled, coefficients(alone, n))
    assert_same_run(params, alone)
    for left, right in zip(params, of_torch):
        torch.testing.assert_close(left, right, rtol=100 * torch.finfo(dtype).eps, atol=100 * torch.finfo(dtype).eps)
        assert ours.state[left]["step"] == theirs.state[right]["step"] == 12 - len(INFINITE)


def test_gradients_stay_scaled(numpy_engine: None):
    params = parameters(torch.float32, [(5,), (3, 2)])
    optimizer, scaling = RMSprop(params), scaler()
    scaling.scale(linear_loss(params, 0)).backward()
    kept = [(param.grad, param.grad.clone()) for param in params]
    scaling.step(optimizer)
    for param, (grad, content), of in zip(params, kept, coefficients(params, 0)):
        assert param.grad is grad
        assert torch.equal(grad, content)
        assert torch.equal(grad, of * 2.0**10)


def test_a_skipped_step_changes_nothing(numpy_engine: None):
    params = parameters(torch.float32, [(5,), (3, 2)])
    optimizer, scaling = RMSprop(params, **FULL), scaler()
    run(optimizer, 1)
    optimizer.zero_grad()
    scaling.scale(linear_loss(params, 1)).backward()
    snapshot = Snapshot(optimizer)
    scaling.unscale_(scaled := RMSprop(clones(params)))  # another optimizer of the same scaler
    scaling.step(optimizer)
    snapshot.assert_unchanged()
    assert dict(scaled.state) == {}


def test_clipping_after_unscaling(numpy_engine: None):
    params = parameters(torch.float32, [(5,), (3, 2)])
    twins = clones(params)
    ours, other, scaling = RMSprop(params), RMSprop(twins), scaler()
    for n in (0, 2, 3):
        for each in (ours, other):
            each.zero_grad()
        scaling.scale(linear_loss(params, n)).backward()
        linear_loss(twins, n).backward()
        scaling.unscale_(ours)
        for side in (params, twins):
            nn.utils.clip_grad_norm_(side, 0.5)
        scaling.step(ours)
        other.step()
        scaling.update()
    assert_same_run(params, twins)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 3, sparse=True)
        self.out = nn.Linear(3, 1)

    def forward(self, rows: Tensor) -> Tensor:
        return self.out(self.table(rows)).sum()


def test_sparse_gradients(numpy_engine: None):
    scaled = Table()
    plain = copy.deepcopy(scaled)
    optimizers, scaling = [RMSprop(each.parameters(), **FULL) for each in (scaled, plain)], scaler()
    for n in range(4):
        rows = torch.tensor([[n, 5, n, 1]])
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaling.scale(scaled(rows)).backward()
        plain(rows).backward()
        if n == 2:
            scaled.table.weight.grad._values()[1, 1] = float("inf")
        scaling.step(optimizers[0])
        if n != 2:
            optimizers[1].step()
        scaling.update()
    assert_same_run(list(scaled.parameters()), list(plain.parameters()))


def test_no_parameter_has_a_gradient():
    """Of one of a scaler's optimizers; a fused one of torch is content with that too."""
    params, idle = parameters(torch.float32, [(5,), (3, 2)]), parameters(torch.float32, [(2,)])
    busy, waiting, scaling = RMSprop(params), RMSprop(idle), scaler()
    scaling.scale(linear_loss(params, 0)).backward()
    scaling.step(busy)
    scaling.step(waiting)
    scaling.update()
    assert dict(waiting.state) == {}


@pytest.mark.parametrize("scale", [3.0, 1000.0, 2.0**16, 2.0**-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_grad_scale(dtype: torch.dtype, scale: float, cpu_engine: str):
    """Gradients times the reciprocal, rounded to the type of computation: one multiplication."""
    params = parameters(dtype, [(5,), (3, 2)])
    optimizer, core = RMSprop(params, **FULL), Core(params, **FULL)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    factor = torch.tensor(scale, dtype=torch.float64).reciprocal().to(compute)
    for n in range(2):
        grads = gradients(params, n)
        optimizer.grad_scale = torch.tensor(scale)
        step(optimizer, grads)
        core.step([grad.to(compute) * factor for grad in grads])
    del optimizer.grad_scale
    step(optimizer, gradients(params, 2))
    core.step(gradients(params, 2))
    core.assert_same_bits(optimizer)


def test_grad_scale_of_all_kinds_of_gradients(cpu_engine: str):
    """Flat, strided and sparse in one group."""
    base = parameters(torch.float32, [(6, 4)])[0].detach()
    gaps = torch.zeros(6, 8)[:, ::2].copy_(base)
    params = [each.requires_grad_() for each in (base.clone(), gaps, base.clone())]
    optimizer, core = RMSprop(params, **FULL), Core([base] * 3, **FULL)
    optimizer.grad_scale = torch.tensor([4.0])
    for n in range(2):
        grad = gradients([base], n)[0]
        indices = torch.tensor([[1, 3, 1]])
        params[0].grad, params[1].grad = grad * 4, grad * 4
        params[2].grad = torch.sparse_coo_tensor(indices, grad[:3] * 4, (6, 4), check_invariants=True)
        optimizer.step()
        core.step([grad, grad, gpurms.IndexedSlices(numpy(grad[:3]), np.array([1, 3, 1]))])
    core.assert_same_bits(optimizer)


@pytest.mark.parametrize(
    ("found", "skipped"),
    [
        (torch.tensor(1.0), True),
        (torch.tensor([1.0]), True),
        (torch.tensor(2.0), True),
        (torch.tensor(0.0), False),
        (0, False),
    ],
)
def test_found_inf(found: Any, skipped: bool):
    params = parameters(torch.float32)
    optimizer = RMSprop(params)
    run(optimizer, 1)
    for param, grad in zip(params, gradients(params, 1)):
        param.grad = grad
    snapshot = Snapshot(optimizer)
    optimizer.found_inf = found
    optimizer.step()
    if skipped:
        snapshot.assert_unchanged()
    else:
        assert [float(optimizer.state[param]["step"]) for param in params] == [2.0] * len(params)
        with pytest.raises(AssertionError):
            snapshot.assert_unchanged()


def test_closure_is_called_though_the_step_is_skipped():
    """As a fused optimizer of torch does."""
    [param] = parameters(torch.float32, [(3,)])
    optimizer = RMSprop([param])
    optimizer.found_inf = torch.tensor(1.0)
    before = param.detach().clone()
    assert optimizer.step(lambda: 7.0) == 7.0
    assert_same_bits(param, before)
