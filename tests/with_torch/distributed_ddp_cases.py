"""`DistributedDataParallel`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel

from gpurms.torch import RMSprop
from tests.with_torch.distributed_support import (
    OPTIONS,
    SHAPES,
    Known,
    Ranks,
    Single,
    assert_same_bits,
    check_network,
    coefficients,
    mean_coefficients,
    same_run,
    same_state,
)

WRAPPINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "bucket view": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "small buckets": {"bucket_cap_mb": 1e-5, "gradient_as_bucket_view": True},
}


def case_dense(ranks: Ranks) -> None:
    for wrapping in WRAPPINGS.values():
        for options in OPTIONS.values():
            single = Single(ranks.size, **options)
            model = DistributedDataParallel(Known(), **wrapping)
            optimizer = RMSprop(model.parameters(), **options)
            for step in range(4):
                optimizer.zero_grad()
                model(coefficients(step, ranks.rank)).backward()
                optimizer.step()
                single.step(step)
            single.check(model, optimizer)


def case_types(ranks: Ranks) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        single = Single(ranks.size, dtype=dtype, **OPTIONS["all"])
        model = DistributedDataParallel(Known(dtype=dtype), gradient_as_bucket_view=True)
        optimizer = RMSprop(model.parameters(), **OPTIONS["all"])
        for step in range(3):
            optimizer.zero_grad(set_to_none=False)
            model(coefficients(step, ranks.rank)).backward()
            optimizer.step()
            single.step(step)
        single.check(model, optimizer)


def case_accumulated(ranks: Ranks) -> None:
    """Two backward passes a step, the first without communication."""
    for wrapping in WRAPPINGS.values():
        if "static_graph" in wrapping:
            continue
        single = Single(ranks.size, momentum=0.5)
        model = DistributedDataParallel(Known(), **wrapping)
        optimizer = RMSprop(model.parameters(), momentum=0.5)
        for step in range(3):
            optimizer.zero_grad()
            halves = [each / 2 for each in coefficients(step, ranks.rank)]
            with model.no_sync():
                model(halves).backward()
            model(halves).backward()
            optimizer.step()
            single.step(step)
        single.check(model, optimizer)


def case_unused(ranks: Ranks) -> None:
    """A parameter that no rank uses is left alone, one that some use has a gradient everywhere."""
    used = (0, 1, 3)

    class Part(Known):
        def forward(self, coefficients: list[Tensor]) -> Tensor:
            mine = used if ranks.rank == 0 else used[:2]
            return torch.stack([self.parts[i](coefficients[i]) for i in mine]).sum()

    model = DistributedDataParallel(Part(), find_unused_parameters=True)
    optimizer = RMSprop(model.parameters(), momentum=0.5)
    single = Single(ranks.size, momentum=0.5)
    parameters = list(single.model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        model(coefficients(step, ranks.rank)).backward()
        optimizer.step()
        of_rank = [coefficients(step, rank) for rank in range(ranks.size)]
        for i in used:
            who = of_rank if i < 3 else of_rank[:1]
            parameters[i].grad = sum((each[i] for each in who[1:]), who[0][i]) / ranks.size
        single.optimizer.step()
    single.check(model, optimizer)
    assert [parameter in optimizer.state for parameter in model.parameters()] == [i in used for i in range(len(SHAPES))]


class Table(nn.Module):
    """Rows of a table times coefficients: its gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(50, 3, sparse=True)
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, ids: Tensor, factors: Tensor) -> Tensor:
        return ((self.embedding(ids) + self.bias) * factors).sum()


def case_sparse(ranks: Ranks) -> None:
    def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 * step + rank)
        n = 0 if rank == step else 12
        ids = torch.randint(0, 50, (n,), generator=generator)
        return ids, torch.randint(-8, 9, (n, 3), generator=generator) / 4

    for options in OPTIONS.values():
        model = DistributedDataParallel(Table())
        optimizer = RMSprop(model.parameters(), **options)
        single = Table()
        single_optimizer = RMSprop(single.parameters(), **options)
        for step in range(4):
            optimizer.zero_grad()
            model(*batch(step, ranks.rank)).backward()
            assert model.module.embedding.weight.grad.is_sparse
            optimizer.step()
            single_optimizer.zero_grad()
            for rank in range(ranks.size):
                (single(*batch(step, rank)) / ranks.size).backward()
            single_optimizer.step()
        same_run(model, optimizer, single, single_optimizer)


def case_network(ranks: Ranks) -> None:
    check_network(ranks, DistributedDataParallel)


def case_in_the_backward_pass(ranks: Ranks) -> None:
    """Each parameter has an optimizer, for a step as soon as the gradient is there. Under DDP it needs a GPU."""
    single = Single(ranks.size, momentum=0.5)
    model = Known()
    _apply_optimizer_in_backward(RMSprop, model.parameters(), {"momentum": 0.5})
    for step in range(3):
        model(mean_coefficients(step, ranks.size)).backward()
        single.step(step)
    for (name, got), want in zip(model.named_parameters(), single.model.parameters(), strict=True):
        assert_same_bits(got, want, name)
        (optimizer,) = got._in_backward_optimizers
        same_state(optimizer.state[got], single.optimizer.state[want], name)
