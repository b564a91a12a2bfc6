"""``torch.distributed.checkpoint``: what four ranks save, four, two and one load and go on with.

A launch of four ranks leaves its checkpoints to one of two.
"""

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gpurms.torch import RMSprop
from tests.with_torch.distributed_support import (
    OPTIONS,
    Known,
    Ranks,
    Single,
    assert_close,
    assert_same_bits,
    coefficients,
    same_state,
    whole,
)

BEFORE, AFTER = range(3), range(3, 6)
TORCH = torch.optim.RMSprop
BOTH_HAVE = {"momentum": 0.5, "centered": True, "lr": 0.25}


def sharded(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = Known(dtype=dtype)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for part in model.parts:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """The same coefficients on all ranks: their mean does not depend on how many there are."""
    for step in steps:
        optimizer.zero_grad()
        model(coefficients(step, 0)).backward()
        optimizer.step()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, **options: bool) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer, options=StateDictOptions(**options))
    checkpoint.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, alone: bool = False, **options: bool
) -> None:
    chosen = StateDictOptions(**options)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=chosen)
    found = {"model": of_model, "optimizer": of_optimizer}
    with pytest.warns(UserWarning, match="load in a single process") if alone else nullcontext():
        checkpoint.load(found, checkpoint_id=folder, no_dist=alone)
    set_state_dict(
        model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"], options=chosen
    )


def folder_of(kind: type[torch.optim.Optimizer], dtype: torch.dtype) -> str:
    return f"{kind.__module__} {dtype}"


def same_groups(optimizer: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for got, want in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {**got, "params": None} == {**want, "params": None}


def case_saved(ranks: Ranks) -> None:
    """By four ranks, for cases that follow, here and on two ranks."""
    if ranks.size != 4:
        return
    for name, options in OPTIONS.items():
        model = sharded()
        optimizer = RMSprop(model.parameters(), **options)
        run(model, optimizer, BEFORE)
        save(model, optimizer, ranks.shared / name)
    for dtype in (torch.float32, torch.bfloat16):
        for kind in (RMSprop, TORCH):
            model = sharded(dtype)
            optimizer = kind(model.parameters(), **BOTH_HAVE)
            run(model, optimizer, BEFORE)
            save(model, optimizer, ranks.shared / folder_of(kind, dtype))


def case_loaded(ranks: Ranks) -> None:
    for name, options in OPTIONS.items():
        single = Single(1, **options)
        model = sharded()
        optimizer = RMSprop(model.parameters(), **options | {"lr": 100.0, "alpha": 0.0})
        load(model, optimizer, ranks.shared / name)
        same_groups(optimizer, single.optimizer)
        for step in (*BEFORE, *AFTER):
            single.step(step)
        run(model, optimizer, AFTER)
        single.check(model, optimizer)


def case_loaded_by_one(ranks: Ranks) -> None:
    """A process by itself, without shards."""
    for name, options in OPTIONS.items():
        single, model = Single(1, **options), Known()
        optimizer = RMSprop(model.parameters(), **options | {"lr": 100.0, "alpha": 0.0})
        load(model, optimizer, ranks.shared / name, alone=True)
        same_groups(optimizer, single.optimizer)
        for step in (*BEFORE, *AFTER):
            single.step(step)
        run(model, optimizer, AFTER)
        single.check(model, optimizer)


def case_whole_state_to_and_from_one(ranks: Ranks) -> None:
    """Without files: gathered on rank 0, loaded there by one process, and sent out again."""
    options = OPTIONS["all"]
    single, model = Single(1, **options), sharded()
    optimizer = RMSprop(model.parameters(), **options)
    run(model, optimizer, BEFORE)
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=gathered)
    for step in (*BEFORE, *AFTER):
        single.step(step)
    assert bool(of_optimizer.get("state")) == (ranks.rank == 0)
    if ranks.rank == 0:
        alone = Known()
        alone_optimizer = RMSprop(alone.parameters(), **options)
        of_alone = deepcopy(of_optimizer)  # a loaded state_dict's tensors become the optimizer's own
        set_state_dict(alone, alone_optimizer, model_state_dict=of_model, optim_state_dict=of_alone)
        run(alone, alone_optimizer, AFTER)
        single.check(alone, alone_optimizer)
    other = sharded()
    other_optimizer = RMSprop(other.parameters(), **options)
    sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, of_model, options=sent)
    set_optimizer_state_dict(other, other_optimizer, of_optimizer, options=sent)
    run(other, other_optimizer, AFTER)
    single.check(other, other_optimizer)


def case_flattened(ranks: Ranks) -> None:
    """One entry per option and parameter, so that groups can be cut differently."""
    single, model = Single(1, momentum=0.5), sharded()
    optimizer = RMSprop(model.parameters(), momentum=0.5)
    run(model, optimizer, BEFORE)
    folder = ranks.shared / f"flattened by {ranks.size}"
    save(model, optimizer, folder, flatten_optimizer_state_dict=True)
    other = sharded()
    first, *rest = other.parameters()
    other_optimizer = RMSprop([{"params": [first]}, {"params": rest}], lr=100.0, momentum=0.5)
    load(other, other_optimizer, folder, flatten_optimizer_state_dict=True)
    for step in (*BEFORE, *AFTER):
        single.step(step)
    run(other, other_optimizer, AFTER)
    single.check(other, other_optimizer)


def case_between_torch_and_this(ranks: Ranks) -> None:
    """Each goes on from the other's checkpoint as one process does from the other's ``state_dict``."""
    for dtype in (torch.float32, torch.bfloat16):
        for saver, loader in ((TORCH, RMSprop), (RMSprop, TORCH)):
            before, single = (Single(1, dtype=dtype, optimizer=kind, **BOTH_HAVE) for kind in (saver, loader))
            for step in BEFORE:
                before.step(step)
            single.model.load_state_dict(before.model.state_dict())
            single.optimizer.load_state_dict(before.optimizer.state_dict())
            model = sharded(dtype)
            optimizer = loader(model.parameters(), **BOTH_HAVE | {"lr": 100.0})
            load(model, optimizer, ranks.shared / folder_of(saver, dtype))
            assert optimizer.param_groups[0]["lr"] == BOTH_HAVE["lr"]
            run(model, optimizer, AFTER)
            for step in AFTER:
                single.step(step)
            single.check(model, optimizer)


def case_state_made_before_the_first_step(ranks: Ranks) -> None:
    """Before it loads, torch makes state by a step with lr 0 and gradients of zeros: it moves nothing."""
    for lr in (0.25, torch.tensor(0.25)):
        for options in ({}, BOTH_HAVE, {**BOTH_HAVE, "weight_decay": 0.5}):
            found = {}
            for kind in (RMSprop, TORCH):
                model = sharded()
                optimizer = kind(model.parameters(), **options | {"lr": lr})
                start = [whole(each).clone() for each in model.parameters()]
                get_optimizer_state_dict(model, optimizer)
                assert optimizer.param_groups[0]["lr"] is lr
                for parameter, old in zip(model.parameters(), start):
                    assert_same_bits(parameter, old)
                    assert parameter.grad is None
                found[kind] = [optimizer.state[each] for each in model.parameters()]
            for own, other in zip(found[RMSprop], found[TORCH], strict=True):
                same_state(own, other, str(options), assert_close)
