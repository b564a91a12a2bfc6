"""FSDP2, ``fully_shard``: parameters are DTensors, of which each rank updates its part."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grad_norm_

from gpurms.torch import RMSprop
from tests.with_torch.distributed_support import (
    OPTIONS,
    SHAPES,
    SLOTS,
    Known,
    Ranks,
    Single,
    assert_close,
    check_network,
    coefficients,
    same_run,
)


def sharded(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for part in model.parts:
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def take(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int, shapes: Any = SHAPES) -> None:
    optimizer.zero_grad()
    model(coefficients(step, rank, shapes)).backward()
    optimizer.step()


def case_dense(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))
    for options in OPTIONS.values():
        single = Single(ranks.size, **options)
        model = sharded(Known(), mesh)
        optimizer = RMSprop(model.parameters(), **options)
        for step in range(4):
            take(model, optimizer, step, ranks.rank)
            single.step(step)
        single.check(model, optimizer)


def case_state_is_sharded_like_its_parameter(ranks: Ranks) -> None:
    model = sharded(Known(), init_device_mesh("cpu", (ranks.size,)))
    optimizer = RMSprop(model.parameters(), momentum=0.5, centered=True)
    take(model, optimizer, 0, ranks.rank)
    sizes = set()
    for parameter in model.parameters():
        sizes.add(parameter.to_local().numel())
        for name in SLOTS:
            slot = optimizer.state[parameter][name]
            assert isinstance(slot, DTensor)
            assert slot.placements == parameter.placements
            assert slot.to_local().shape == parameter.to_local().shape
    assert ranks.rank == 0 or 0 in sizes, "no rank but the first has a part of every parameter"


def case_types(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        single = Single(ranks.size, dtype=dtype, **OPTIONS["all"])
        model = sharded(Known(dtype=dtype), mesh)
        optimizer = RMSprop(model.parameters(), **OPTIONS["all"])
        for step in range(3):
            take(model, optimizer, step, ranks.rank)
            single.step(step)
        single.check(model, optimizer)


def case_mixed_precision(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))
    for reduced in (torch.bfloat16, torch.float32):
        single = Single(ranks.size, momentum=0.5)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduced)
        model = sharded(Known(), mesh, mp_policy=policy)
        optimizer = RMSprop(model.parameters(), momentum=0.5)
        for step in range(3):
            take(model, optimizer, step, ranks.rank)
            single.step(step)
        single.check(model, optimizer)


def case_other_dimensions_sharded(ranks: Ranks) -> None:
    """Parts of other dimensions than the first."""
    shapes = ((7, 4), (3, 8), (2, 3, 4))
    single = Single(ranks.size, shapes, momentum=0.5, centered=True)
    model = sharded(
        Known(shapes), init_device_mesh("cpu", (ranks.size,)), shard_placement_fn=lambda each: Shard(each.ndim - 1)
    )
    optimizer = RMSprop(model.parameters(), momentum=0.5, centered=True)
    for step in range(3):
        take(model, optimizer, step, ranks.rank, shapes)
        single.step(step)
    single.check(model, optimizer)


def case_replicated_and_sharded(ranks: Ranks) -> None:
    """On a mesh of two dimensions: parts, of which several ranks hold the same."""
    mesh = init_device_mesh("cpu", (2, ranks.size // 2), mesh_dim_names=("replicate", "shard"))
    single = Single(ranks.size, momentum=0.5, centered=True)
    model = sharded(Known(), mesh)
    optimizer = RMSprop(model.parameters(), momentum=0.5, centered=True)
    for step in range(3):
        take(model, optimizer, step, ranks.rank)
        single.step(step)
    single.check(model, optimizer)


def case_accumulated(ranks: Ranks) -> None:
    """Two backward passes a step, the first without communication."""
    single = Single(ranks.size, momentum=0.5)
    model = sharded(Known(), init_device_mesh("cpu", (ranks.size,)))
    optimizer = RMSprop(model.parameters(), momentum=0.5)
    for step in range(3):
        optimizer.zero_grad()
        halves = [each / 2 for each in coefficients(step, ranks.rank)]
        for is_last in (False, True):
            model.set_requires_gradient_sync(is_last)
            model(halves).backward()
        optimizer.step()
        single.step(step)
    single.check(model, optimizer)


def case_clipped(ranks: Ranks) -> None:
    single = Single(ranks.size, momentum=0.5)
    model = sharded(Known(), init_device_mesh("cpu", (ranks.size,)))
    optimizer = RMSprop(model.parameters(), momentum=0.5)
    for step in range(4):
        optimizer.zero_grad()
        model(coefficients(step, ranks.rank)).backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        assert norm.full_tensor() > 1
        optimizer.step()
        single.step(step, lambda: clip_grad_norm_(single.model.parameters(), 1.0))
    same_run(model, optimizer, single.model, single.optimizer, assert_close)


def case_groups_schedule_and_frozen(ranks: Ranks) -> None:
    """Groups with options of their own, a learning rate that changes, a parameter without gradient."""

    def make(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        first, *others, last = model.parameters()
        last.requires_grad_(False)
        groups = [{"params": [first], "momentum": 0.5}, {"params": others}, {"params": [last]}]
        optimizer = RMSprop(groups, lr=0.5, centered=True)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    single = Single(ranks.size)
    single.optimizer, single_schedule = make(single.model)
    model = sharded(Known(), init_device_mesh("cpu", (ranks.size,)))
    optimizer, schedule = make(model)
    for step in range(4):
        take(model, optimizer, step, ranks.rank)
        single.step(step)
        schedule.step()
        single_schedule.step()
    single.check(model, optimizer)
    *_, last = model.parameters()
    assert last not in optimizer.state


def case_network(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (ranks.size,))

    def wrapped(model: nn.Sequential) -> nn.Module:
        for part in model:
            fully_shard(part, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    check_network(ranks, wrapped)
