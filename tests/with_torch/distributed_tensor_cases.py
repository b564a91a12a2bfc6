"""DTensor parameters without an engine: gradients laid out otherwise over the ranks, tensor parallelism."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gpurms.torch import RMSprop
from tests.with_torch.distributed_support import (
    OPTIONS,
    Ranks,
    Single,
    assert_close,
    assert_same_bits,
    coefficients,
    same_run,
    same_state,
    whole,
)

SHAPE = (7, 6)


def gradient(ranks: Ranks, step: int, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """The sum over the ranks of their coefficients, in any layout."""
    of_rank = [coefficients(step, rank, [SHAPE])[0] for rank in range(ranks.size)]
    if placement.is_partial():
        return DTensor.from_local(of_rank[ranks.rank], mesh, [placement])
    return distribute_tensor(sum(of_rank[1:], of_rank[0]), mesh, [placement])


def case_gradients_laid_out_otherwise(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))
    start = torch.randn(SHAPE)
    layouts: Sequence[Placement] = (Shard(0), Shard(1), Replicate())
    for of_parameter, of_gradient in itertools.product(layouts, (*layouts, Partial())):
        for options in (OPTIONS["plain"], OPTIONS["all"]):
            parameter = nn.Parameter(distribute_tensor(start, mesh, [of_parameter]))
            optimizer = RMSprop([parameter], **options)
            single = nn.Parameter(start.clone())
            single_optimizer = RMSprop([single], **options)
            for step in range(3):
                given = parameter.grad = gradient(ranks, step, mesh, of_gradient)
                single.grad = whole(gradient(ranks, step, mesh, of_gradient))
                before = given.to_local().clone()
                optimizer.step()
                single_optimizer.step()
                assert parameter.grad is given
                assert_same_bits(given.to_local(), before)
            what = f"{of_parameter} with a gradient {of_gradient}"
            assert_same_bits(parameter, single, what)
            same_state(optimizer.state[parameter], single_optimizer.state[single], what)


def case_beside_plain_parameters(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))
    shapes = [(7, 3), (4,), (1, 5)]
    single = Single(ranks.size, shapes, momentum=0.5)
    starts = [each.detach().clone() for each in single.model.parameters()]
    distributed, plain, replicated = (
        nn.Parameter(each)
        for each in (
            distribute_tensor(starts[0], mesh, [Shard(0)]),
            starts[1],
            distribute_tensor(starts[2], mesh, [Replicate()]),
        )
    )
    optimizer = RMSprop([distributed, plain, replicated], momentum=0.5)
    for step in range(3):
        single.step(step)
        for mine, other in zip((distributed, plain, replicated), single.model.parameters()):
            grad = other.grad.clone()
            mine.grad = distribute_tensor(grad, mesh, mine.placements) if isinstance(mine, DTensor) else grad
        optimizer.step()
    for mine, other in zip((distributed, plain, replicated), single.model.parameters()):
        assert_same_bits(mine, other)
        same_state(optimizer.state[mine], single.optimizer.state[other], str(other.shape))


def case_state_spread_otherwise_is_refused(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))
    weight = nn.Parameter(distribute_tensor(torch.randn(8, 4), mesh, [Shard(0)]))
    optimizer = RMSprop([weight])
    weight.grad = distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])
    optimizer.step()
    before = whole(weight).clone()
    for unfit in (
        torch.zeros(8, 4),
        *(distribute_tensor(torch.zeros(8, 4), mesh, [to]) for to in (Replicate(), Shard(1))),
    ):
        optimizer.state[weight]["square_avg"] = unfit
        with pytest.raises(
            RuntimeError, match=r"state 'square_avg' .* expected it spread over the ranks like the parameter"
        ):
            optimizer.step()
        assert_same_bits(weight, before)
        assert optimizer.state[weight]["step"] == 1


def case_only_one_of_parameter_and_gradient_distributed(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))
    start = torch.randn(8, 4)
    for to in (Shard(0), Replicate()):
        for weight, grad in itertools.permutations((start.clone(), distribute_tensor(start.clone(), mesh, [to]))):
            parameter = nn.Parameter(weight)
            parameter.grad = grad
            optimizer = RMSprop([parameter])
            with pytest.raises(
                RuntimeError, match=r"both as DTensors, or none; got (Parameter and DTensor|DTensor and Tensor)"
            ):
                optimizer.step()
            assert_same_bits(parameter, start)
            assert not optimizer.state


def case_tensor_parallel(ranks: Ranks) -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5), nn.LayerNorm(5)).double()

    single, model = network(), network()
    mesh = init_device_mesh("cpu", (ranks.size,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    placements = [getattr(each, "placements", None) for each in model.parameters()]
    assert placements == [(Shard(0),), (Shard(0),), (Shard(1),), (Replicate(),), None, None]
    options = {"lr": 0.001, "momentum": 0.9, "centered": True, "weight_decay": 0.01}
    single_optimizer, optimizer = RMSprop(single.parameters(), **options), RMSprop(model.parameters(), **options)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (6, 5))
        for net, opt in ((model, optimizer), (single, single_optimizer)):
            opt.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            opt.step()
    same_run(model, optimizer, single, single_optimizer, assert_close)
