"""``ZeroRedundancyOptimizer``: each rank has the state of some parameters and sends them to the others."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ExponentialLR

from gpurms.torch import RMSprop
from tests.with_torch.distributed_support import (
    OPTIONS,
    Known,
    Ranks,
    Single,
    assert_same_bits,
    coefficients,
    same_state,
)


def wrapped(model: nn.Module, **options: Any) -> tuple[DistributedDataParallel, ZeroRedundancyOptimizer]:
    model = DistributedDataParallel(model)
    return model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class=RMSprop, **options)


def take(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, ranks: Ranks) -> None:
    optimizer.zero_grad()
    model(coefficients(step, ranks.rank)).backward()
    optimizer.step()


def consolidated(optimizer: ZeroRedundancyOptimizer, ranks: Ranks) -> dict[str, Any]:
    """The state of all parameters, on all ranks."""
    optimizer.consolidate_state_dict(to=0)
    found = [optimizer.state_dict() if ranks.rank == 0 else None]
    distributed.broadcast_object_list(found, src=0)
    return found[0]


def check(single: Single, model: nn.Module, saved: dict[str, Any]) -> None:
    own = single.optimizer.state_dict()
    for (name, got), want in zip(model.named_parameters(), single.model.parameters(), strict=True):
        assert_same_bits(got, want, name)
    assert saved["state"].keys() == own["state"].keys()
    for key, state in own["state"].items():
        same_state(saved["state"][key], state, f"parameter {key}")


def case_dense(ranks: Ranks) -> None:
    for as_bucket_view in (False, True):
        for options in OPTIONS.values():
            single = Single(ranks.size, **options)
            model, optimizer = wrapped(Known(), parameters_as_bucket_view=as_bucket_view, **options)
            for step in range(4):
                take(model, optimizer, step, ranks)
                single.step(step)
            check(single, model, consolidated(optimizer, ranks))
            assert isinstance(optimizer.optim, RMSprop)
            assert 0 < len(optimizer.optim.state) < len(single.optimizer.state), "no rank has all of the state"


def case_fewer_parameters_than_ranks(ranks: Ranks) -> None:
    single = Single(ranks.size, [(7, 3)], momentum=0.5)
    model, optimizer = wrapped(Known([(7, 3)]), momentum=0.5)
    for step in range(3):
        optimizer.zero_grad()
        model(coefficients(step, ranks.rank, [(7, 3)])).backward()
        optimizer.step()
        single.step(step)
    assert_same_bits(next(model.parameters()), next(single.model.parameters()))


def case_schedule(ranks: Ranks) -> None:
    single = Single(ranks.size, momentum=0.5, lr=0.5)
    model, optimizer = wrapped(Known(), momentum=0.5, lr=0.5)
    schedule, single_schedule = ExponentialLR(optimizer, 0.5), ExponentialLR(single.optimizer, 0.5)
    for step in range(4):
        take(model, optimizer, step, ranks)
        single.step(step)
        schedule.step()
        single_schedule.step()
    check(single, model, consolidated(optimizer, ranks))


def case_group_added(ranks: Ranks) -> None:
    single = Single(ranks.size, momentum=0.5)
    first, *rest = single.model.parameters()
    single.optimizer = RMSprop([first], momentum=0.5)
    single.optimizer.add_param_group({"params": rest, "lr": 0.25})
    model = DistributedDataParallel(Known())
    first, *rest = model.parameters()
    optimizer = ZeroRedundancyOptimizer([first], optimizer_class=RMSprop, momentum=0.5)
    optimizer.add_param_group({"params": rest, "lr": 0.25})
    for step in range(3):
        take(model, optimizer, step, ranks)
        single.step(step)
    check(single, model, consolidated(optimizer, ranks))


def case_loaded(ranks: Ranks) -> None:
    """The consolidated state goes on here and in one process, with this class and torch's."""
    options = {"momentum": 0.5, "centered": True, "lr": 0.25}
    single = Single(ranks.size, **options)
    model, optimizer = wrapped(Known(), **options)
    for step in range(2):
        take(model, optimizer, step, ranks)
        single.step(step)
    saved = consolidated(optimizer, ranks)

    other, other_optimizer = wrapped(Known(), **options)
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(deepcopy(saved))  # it takes out what this rank does not own
    alone = Single(ranks.size, **options)
    alone.model.load_state_dict(model.module.state_dict())
    alone.optimizer.load_state_dict(saved)
    for step in range(2, 5):
        take(other, other_optimizer, step, ranks)
        single.step(step)
        alone.step(step)
    check(single, other, consolidated(other_optimizer, ranks))
    single.check(alone.model, alone.optimizer)
    torch.optim.RMSprop(single.model.parameters(), **options).load_state_dict(saved)


def case_overlap_is_refused(ranks: Ranks) -> None:
    """torch overlaps only with its own functional optimizers, and has none for other classes."""
    model = DistributedDataParallel(Known())
    with pytest.raises(ValueError, match="no supported functional optimizer equivalent"):
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=RMSprop, overlap_with_ddp=True)
