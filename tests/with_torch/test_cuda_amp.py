"""Mixed precision on a GPU: the scale of the gradients and the skip of a step are read on the device."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gpurms.torch import RMSprop
from tests.with_torch.cuda_tensors import (
    DTYPES,
    Gpu,
    Twins,
    assert_same,
    coo,
    emulated,
    gaps,
    on_cpu,
    on_gpu,
    random,
    snapshot,
)

IDS = torch.tensor([[3] * 40 + [0, 9]])  # one row more often than one sum takes
pytestmark = pytest.mark.usefixtures("numpy_engine")


def of_all_kinds(dtype: torch.dtype) -> list[Tensor]:
    """For gradients that are dense, dense with gaps, and sparse; in this order in `gradients`."""
    return [random((33, 3), dtype), gaps(random((3, 4), dtype, 1)), random((10, 4), dtype, 2)]


def gradients(dtype: torch.dtype, seed: int) -> list[Tensor]:
    dense, wide = random((33, 3), dtype, 10 * seed), gaps(random((3, 4), dtype, 10 * seed + 1))
    return [dense, wide, coo(IDS, random((42, 4), dtype, 10 * seed + 2), (10, 4))]


def scale(opt: RMSprop, grad_scale: float | None, found_inf: float, device: Any) -> None:
    """What a GradScaler does before a step."""
    opt.grad_scale = None if grad_scale is None else torch.tensor(grad_scale, device=device)
    opt.found_inf = torch.tensor(found_inf, device=device)


def take(gpu: Gpu, twins: Twins, grads: Sequence[Tensor], grad_scale: float | None, found_inf: float) -> None:
    twins.set_grads(grads)
    scale(twins.opt, grad_scale, found_inf, "cuda:0")
    scale(twins.reference, grad_scale, found_inf, "cpu")
    with gpu.nothing_waited_for():
        twins.opt.step()
    twins.reference.step()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_scale", [None, 1024.0, 3.0])
def test_the_bits_of_the_cpu(dtype: torch.dtype, grad_scale: float | None, gpu: Gpu):
    twins = Twins(of_all_kinds(dtype), lr=0.1, momentum=0.9, weight_decay=0.1)
    for seed, found_inf in enumerate((0.0, 1.0, 0.0)):
        take(gpu, twins, gradients(dtype, seed), grad_scale, found_inf)
        twins.check()
    assert [twins.opt.state[mine]["step"].item() for mine in twins.mine] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("rule", [{}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_skipped_step_changes_nothing(rule: dict[str, Any], dtype: torch.dtype, gpu: Gpu):
    twins = Twins(of_all_kinds(dtype), lr=0.1, **rule)
    take(gpu, twins, gradients(dtype, 0), 8.0, 0.0)
    before = snapshot(twins.opt)
    bad = gradients(dtype, 1)
    for grad in bad:
        (grad._values() if grad.layout is torch.sparse_coo else grad).fill_(torch.inf)
    take(gpu, twins, bad, 8.0, 1.0)
    assert snapshot(twins.opt) == before


def test_the_first_step_may_be_skipped(gpu: Gpu):
    twins = Twins(of_all_kinds(torch.float32), lr=0.1, momentum=0.9)
    take(gpu, twins, gradients(torch.float32, 0), 8.0, 1.0)
    for mine, other in zip(twins.mine, twins.others):
        assert torch.equal(mine.cpu(), other)
        assert all(slot.count_nonzero().item() == 0 for slot in twins.opt.state[mine].values())
    take(gpu, twins, gradients(torch.float32, 1), 8.0, 0.0)
    twins.reference.state.clear()
    for other, start in zip(twins.others, of_all_kinds(torch.float32)):
        other.copy_(start)
    twins.reference.step()
    twins.check()


def test_with_lr_on_the_device(gpu: Gpu):
    lr = torch.tensor(0.5, device="cuda:0")
    twins = Twins(of_all_kinds(torch.float32), lr=lr, weight_decay=0.1, decoupled_weight_decay=True)
    for seed, found_inf in enumerate((0.0, 1.0, 0.0)):
        take(gpu, twins, gradients(torch.float32, seed), 4.0, found_inf)
    twins.check()


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool, gpu: Gpu):
    """torch's own, which makes both tensors, halves the scale after a skip and doubles it after two steps."""
    scalers = [torch.amp.GradScaler(kind, init_scale=8.0, growth_interval=2) for kind in ("cuda", "cpu")]
    twins = Twins(of_all_kinds(torch.float32), lr=0.1, momentum=0.9)
    sides = list(zip(scalers, (twins.opt, twins.reference), ("cuda:0", "cpu")))
    for seed in range(5):
        grads = gradients(torch.float32, seed)
        if seed == 1:
            grads[0][2, 1] = torch.inf
        twins.set_grads(grads)
        for scaler, opt, device in sides:
            scaler.scale(torch.ones((), device=device))
            with gpu.nothing_waited_for():
                if unscale:
                    scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
        twins.check()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 8.0


def test_the_scaler_is_on_another_device():
    with emulated(2) as gpu:
        start = of_all_kinds(torch.float32)
        mine = [on_gpu(x, device).requires_grad_() for x, device in zip(start, (0, 1, 1))]
        others = [on_cpu(x).requires_grad_() for x in start]
        optimizers = [RMSprop(each, lr=0.1, momentum=0.9) for each in (mine, others)]
        for seed, found_inf in enumerate((0.0, 1.0, 0.0)):
            for each, other, grad in zip(mine, others, gradients(torch.float32, seed)):
                each.grad, other.grad = on_gpu(grad, each.device.index), grad
            for opt, device in zip(optimizers, ("cuda:0", "cpu")):
                scale(opt, 4.0, found_inf, device)
            with gpu.nothing_waited_for():
                optimizers[0].step()
            optimizers[1].step()
        assert_same(*optimizers)


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_parameters_on_the_host_too(device: str, gpu: Gpu):
    """The host must know, and waits where it has to ask a GPU."""
    start = [random((5, 3)), random((4,), seed=1)]
    mine = [on_gpu(start[0]).requires_grad_(), on_cpu(start[1]).requires_grad_()]
    others = [on_cpu(x).requires_grad_() for x in start]
    optimizers = [RMSprop(each, lr=0.1) for each in (mine, others)]
    for seed, found_inf in enumerate((0.0, 1.0, 0.0)):
        for each, other in zip(mine, others):
            other.grad = random(other.shape, seed=seed + 5)
            each.grad = other.grad.to(each.device)
        scale(optimizers[0], 4.0, found_inf, device)
        scale(optimizers[1], 4.0, found_inf, "cpu")
        for optimizer in optimizers:
            optimizer.step()
        assert_same(*optimizers)


@pytest.mark.parametrize("seed", range(6))
def test_on_the_current_stream(seed: int):
    """Scale and skip are made on it just before, and freed just after."""
    with emulated(deferred=True, seed=seed) as gpu:
        twins = Twins(of_all_kinds(torch.float32), lr=0.1)
        take(gpu, twins, gradients(torch.float32, 0), None, 0.0)
        side = torch.cuda.Stream()
        for number, found_inf in enumerate((0.0, 1.0)):
            twins.set_grads(gradients(torch.float32, number))
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), gpu.nothing_waited_for():
                twins.opt.grad_scale = torch.ones((), device="cuda:0").mul_(4.0)
                twins.opt.found_inf = torch.zeros((), device="cuda:0").add_(found_inf)
                twins.opt.step()
                del twins.opt.grad_scale, twins.opt.found_inf
            torch.cuda.current_stream().wait_stream(side)
            scale(twins.reference, 4.0, found_inf, "cpu")
            twins.reference.step()
        torch.cuda.synchronize()
        twins.check()
