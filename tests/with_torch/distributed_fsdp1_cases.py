"""FSDP1, ``FullyShardedDataParallel``: flat parameters, or views into them, of which a rank may hold nothing."""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

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

STRATEGIES = (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP)
GATHERED = StateDictOptions(full_state_dict=True)


def sharded(**options: Any) -> nn.Module:
    return FullyShardedDataParallel(Known(), device_id=torch.device("cpu"), **options)


@contextmanager
def torch_warns_of_itself() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(model: nn.Module, optimizer: torch.optim.Optimizer, single: Single, steps: range, rank: int) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(coefficients(step, rank)).backward()
        optimizer.step()
        single.step(step)


def case_dense(ranks: Ranks) -> None:
    for strategy, use_orig_params in itertools.product(STRATEGIES, (False, True)):
        wrapping = {"sharding_strategy": strategy, "use_orig_params": use_orig_params}
        for options in (OPTIONS["plain"], OPTIONS["all"]):
            single, model = Single(ranks.size, **options), sharded(**wrapping)
            optimizer = RMSprop(model.parameters(), **options)
            run(model, optimizer, single, range(4), ranks.rank)
            with torch_warns_of_itself():
                of_model, of_optimizer = get_state_dict(model, optimizer, options=GATHERED)
            for name, want in single.model.named_parameters():
                assert_same_bits(of_model[name], want, name)
                same_state(of_optimizer["state"][name], single.optimizer.state[want], name)


def case_loaded(ranks: Ranks) -> None:
    for use_orig_params in (False, True):
        single, model = Single(ranks.size, momentum=0.5), sharded(use_orig_params=use_orig_params)
        optimizer = RMSprop(model.parameters(), momentum=0.5)
        run(model, optimizer, single, range(2), ranks.rank)
        other = sharded(use_orig_params=use_orig_params)
        other_optimizer = RMSprop(other.parameters(), momentum=0.5)
        with torch_warns_of_itself():
            of_model, of_optimizer = get_state_dict(model, optimizer, options=GATHERED)
            set_state_dict(
                other, other_optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer, options=GATHERED
            )
        run(other, other_optimizer, single, range(2, 4), ranks.rank)
        with FullyShardedDataParallel.summon_full_params(other):
            for got, want in zip(other.parameters(), single.model.parameters(), strict=True):
                assert_same_bits(got.reshape(-1), want.reshape(-1))
