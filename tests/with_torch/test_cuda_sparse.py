"""Sparse gradients on a GPU: the bits of the CPU in the rows that are named, and nothing waited for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gpurms.torch import RMSprop
from tests.with_torch.cuda_tensors import (
    DTYPES,
    RULES,
    Gpu,
    Twins,
    assert_same,
    coo,
    emulated,
    gaps,
    on_cpu,
    on_gpu,
    random,
)

IDS = (3, 3, 0, 9, 3, 0)
MANY = (1,) * 40 + (7,) * 70 + (0, 9)  # rows that more than one block of sums goes to
pytestmark = pytest.mark.usefixtures("numpy_engine")


def rows(ids: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A gradient for rows of a table, one value for each id in the order given."""
    return coo(torch.tensor([ids], dtype=torch.int64), random((len(ids), *shape[1:]), dtype, seed), shape)


@pytest.mark.parametrize("rule", RULES)
def test_the_bits_of_the_cpu(rule: str, gpu: Gpu):
    shape = (10, 6)
    twins = Twins([random(shape, dtype, seed=i) for i, dtype in enumerate(DTYPES)], **{"lr": 0.1, **RULES[rule]})
    for seed in (1, 2):
        twins.step([rows(IDS, shape, dtype, seed) for dtype in DTYPES])
    twins.check()


TABLES: dict[str, tuple[tuple[int, ...], Any]] = {
    "1-d": ((10,), IDS),
    "often": ((10, 3), MANY),
    "3-d": ((10, 2, 4), IDS),
    "no ids": ((10, 3), ()),
    "empty rows": ((10, 0), IDS),
    "one row": ((1, 300), (0, 0)),
}


@pytest.mark.parametrize("table", TABLES)
def test_tables(table: str, gpu: Gpu):
    shape, ids = TABLES[table]
    twins = Twins([random(shape)], lr=0.1, momentum=0.9, weight_decay=0.1)
    for seed in (1, 2):
        twins.step([rows(ids, shape, seed=seed)])
    twins.check()


def test_tables_with_gaps(gpu: Gpu):
    twins = Twins([gaps(random((10, 4))), random((4, 10)).t()], lr=0.1, centered=True)
    for seed in (1, 2):
        twins.step([rows(IDS, (10, 4), seed=seed) for _ in twins.mine])
    twins.check()


def test_values_with_gaps(gpu: Gpu):
    twins = Twins([random((10, 4))], lr=0.1)
    ids, values = torch.tensor([IDS]), gaps(random((len(IDS), 4), seed=1))
    twins.step([coo(ids, values, (10, 4))])
    twins.check()


def test_several_sparse_dimensions(gpu: Gpu):
    twins = Twins([random((4, 5, 3)), random((4, 5))], lr=0.1, momentum=0.9)
    places = torch.tensor([[0, 3, 0, 3], [4, 1, 4, 0]])
    twins.step([coo(places, random((4, 3), seed=1), (4, 5, 3)), coo(places, random((4,), seed=2), (4, 5))])
    twins.check()


def test_dense_and_sparse_in_turns(gpu: Gpu):
    shape = (10, 3)
    twins = Twins([random(shape), random((7,), seed=1)], lr=0.1, momentum=0.9)
    for seed in (1, 2, 3, 4):
        table = rows(IDS, shape, seed=seed) if seed % 2 else random(shape, seed=seed)
        twins.step([table, random((7,), seed=10 + seed)])
    twins.check()


def test_nothing_is_waited_for(gpu: Gpu):
    twins = Twins([random((10, 3)), random((10, 3), torch.float16), random((7,))], lr=0.1)
    twins.set_grads([rows(MANY, (10, 3)), rows(IDS, (10, 3), torch.float16), random((7,))])
    with gpu.nothing_waited_for():
        twins.opt.step()
        with gpu.no_memory_from_cupy():
            twins.opt.step()


def test_rows_that_do_not_exist_are_ignored(gpu: Gpu):
    shape = (10, 3)
    twins = Twins([random(shape)], lr=0.1, momentum=0.9)
    values = random((4, 3), seed=1)
    (mine,), (other,) = twins.mine, twins.others
    mine.grad = coo(on_gpu(torch.tensor([[2, 10, -1, 5]])), on_gpu(values), shape)
    other.grad = coo(torch.tensor([[2, 5]]), torch.stack([values[0], values[3]]), shape)
    with gpu.nothing_waited_for():
        twins.opt.step()
    twins.reference.step()
    twins.check()


@pytest.mark.parametrize("seed", range(6))
def test_on_the_current_stream(seed: int):
    shape = (10, 4)
    with emulated(deferred=True, seed=seed) as gpu:
        twins = Twins([random(shape), gaps(random(shape))], lr=0.1)
        side = torch.cuda.Stream()
        for step in (1, 2):
            ids, values = torch.tensor([IDS]), random((len(IDS), 4), seed=step)
            with torch.cuda.stream(side), gpu.nothing_waited_for():
                for mine, other in zip(twins.mine, twins.others):
                    parts = torch.empty_like(ids, device="cuda:0"), torch.empty_like(values, device="cuda:0")
                    for part, source in zip(parts, (ids, values)):
                        part.copy_(source, non_blocking=True)
                    mine.grad, other.grad = coo(*parts, shape), coo(ids, values, shape)
                    del parts  # freed when the next gradient comes, in the order of the stream
                twins.opt.step()
            twins.reference.step()
        side.synchronize()
        twins.check()


def test_values_in_the_memory_of_the_table(gpu: Gpu):
    """Rows that the step changes are the values of others."""
    twins = Twins([random((10, 3))], lr=0.1)
    for (each,), ids in ((twins.mine, on_gpu(torch.tensor([IDS]))), (twins.others, torch.tensor([IDS]))):
        each.grad = coo(ids, each.detach()[: len(IDS)], each.shape)
    twins.opt.step()
    twins.reference.step()
    twins.check()


def test_rows_on_two_devices():
    start, shape = random((10, 3)), (10, 3)
    with emulated(2) as gpu:
        mine = [on_gpu(start, device).requires_grad_() for device in (0, 1)]
        others = [on_cpu(start).requires_grad_() for _ in mine]
        optimizers = [RMSprop(each, lr=0.1, momentum=0.9) for each in (mine, others)]
        for seed in (1, 2):
            for device, (each, other) in enumerate(zip(mine, others)):
                other.grad = rows(IDS, shape, seed=10 * seed + device)
                each.grad = on_gpu(other.grad, device)
            with gpu.nothing_waited_for():
                optimizers[0].step()
            optimizers[1].step()
        assert_same(*optimizers)
