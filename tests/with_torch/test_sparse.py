"""Sparse gradients: only the rows that they name change, with the bits of `gpurms.RMSprop` on `IndexedSlices`."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpurms
from gpurms.kernels.cpu import use_engine
from gpurms.torch import RMSprop
from tests.with_torch.support import DTYPES, FULL, Core, assert_same_bits, clones, gradients, numpy, parameters, run

N_ROWS, WIDTH = 9, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "maximize": {"maximize": True, "weight_decay": 0.25},
    "momentum": {"momentum": 0.75},
    "centered": {"centered": True},
    "all": FULL,
    "all of ours": {
        **FULL,
        "nesterov": True,
        "eps_in_sqrt": True,
        "lr_in_momentum": True,
        "decoupled_weight_decay": True,
    },
}


def sparse(indices: Any, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(torch.as_tensor(indices), values, shape, check_invariants=True)


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, n: int, n_sparse: int = 1) -> Tensor:
    """Uncoalesced, with rows that occur several times."""
    rng = np.random.default_rng(n)
    indices = np.stack([rng.integers(0, length, 6) for length in shape[:n_sparse]])
    return sparse(indices, torch.tensor(rng.normal(size=(6, *shape[n_sparse:]))).to(dtype), shape)


def slices(grad: Tensor) -> gpurms.IndexedSlices:
    """What `gpurms` calls a gradient sparse in its first dimension."""
    return gpurms.IndexedSlices(numpy(grad._values()), numpy(grad._indices()[0]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype: torch.dtype, options: str, numpy_engine: None):
    check_rows(dtype, OPTIONS[options])


@pytest.mark.parametrize(("dtype", "options"), [(torch.float32, "all"), (torch.bfloat16, "momentum")], ids=str)
def test_rows_compiled(dtype: torch.dtype, options: str):
    with use_engine("numba"):
        check_rows(dtype, OPTIONS[options])


def check_rows(dtype: torch.dtype, options: dict[str, Any]) -> None:
    [table] = parameters(dtype, [(N_ROWS, WIDTH)])
    optimizer, core = RMSprop([table], **options), Core([table], **options)
    for n in range(4):
        grad = random_rows((N_ROWS, WIDTH), dtype, n)
        assert not grad.is_coalesced()
        table.grad = grad
        before = snapshot(optimizer, table)
        optimizer.step()
        core.step([slices(grad)])
        untouched = sorted(set(range(N_ROWS)) - set(grad._indices()[0].tolist()))
        assert untouched
        for name, now in snapshot(optimizer, table).items():
            assert torch.equal(now[untouched], before.get(name, torch.zeros_like(now))[untouched])
            assert not torch.equal(now, before.get(name, torch.zeros_like(now)))
    core.assert_same_bits(optimizer)
    assert optimizer.state[table]["step"] == 4


def snapshot(optimizer: RMSprop, table: Tensor) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in optimizer.state.get(table, {}).items() if name != "step"}
    return {"var": table.detach().clone(), **state}


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 2), (6, 0), (6, 1)])
def test_widths(shape: tuple[int, ...], cpu_engine: str):
    [table] = parameters(torch.float32, [shape])
    optimizer, core = RMSprop([table], **FULL), Core([table], **FULL)
    for n in range(3):
        table.grad = random_rows(shape, torch.float32, n)
        core.step([slices(table.grad)])
        optimizer.step()
    core.assert_same_bits(optimizer)


@pytest.mark.parametrize(("shape", "n_sparse"), [((5, 3), 2), ((3, 4, 2), 2), ((3, 4, 2), 3), ((2, 3, 2, 5), 3)])
def test_several_sparse_dimensions(shape: tuple[int, ...], n_sparse: int, cpu_engine: str):
    """Elements that are not named stay as they are, in rows of which others are named too."""
    [table] = parameters(torch.float32, [shape])
    flat = table.detach().clone().reshape(-1, *shape[n_sparse:])
    optimizer, core = RMSprop([table], **FULL), Core([flat], **FULL)
    for n in range(3):
        grad = table.grad = random_rows(shape, torch.float32, n, n_sparse)
        rows = np.ravel_multi_index(tuple(grad._indices().numpy()), shape[:n_sparse])
        optimizer.step()
        core.step([gpurms.IndexedSlices(numpy(grad._values()), rows)])
    assert_same_bits(table.detach().reshape(flat.shape), core.variables[0].numpy())


def test_coalesced(cpu_engine: str):
    """Torch sums repeated rows in another order: equal to the bit where each row occurs once or twice."""
    [table] = parameters(torch.float32, [(N_ROWS, WIDTH)])
    [twin] = clones([table])
    grad = sparse([[7, 1, 3, 1]], parameters(torch.float32, [(4, WIDTH)], seed=1)[0].detach(), (N_ROWS, WIDTH))
    table.grad, twin.grad = grad, grad.coalesce()
    RMSprop([table, twin], **FULL).step()
    assert_same_bits(table, twin)


def test_no_rows(cpu_engine: str):
    """The step is counted, and weight decay touches nothing."""
    tables = parameters(torch.float32, [(N_ROWS, WIDTH), (0, WIDTH)])
    before = clones(tables)
    for table in tables:
        table.grad = sparse(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, WIDTH), tuple(table.shape))
    optimizer = RMSprop(tables, **FULL)
    optimizer.step()
    for table, start in zip(tables, before):
        assert torch.equal(table, start)
        assert optimizer.state[table]["step"] == 1


def test_no_sparse_dimension(cpu_engine: str):
    """A stack of gradients of the whole parameter, which count as their sum."""
    [scalar], [vector] = parameters(torch.float32, [()]), parameters(torch.float32, [(3,)])
    twins = clones([scalar, vector])
    optimizer, other = RMSprop([scalar, vector], **FULL), RMSprop(twins, **FULL)
    for each in (optimizer, other):
        run(each, 2)
    nowhere = torch.zeros(0, 2, dtype=torch.int64)
    scalar.grad = sparse(nowhere, torch.tensor([1.0, 2.0]), ())
    vector.grad = sparse(nowhere, torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.5, 0.25]]), (3,))
    twins[0].grad, twins[1].grad = torch.tensor(3.0), torch.tensor([2.0, 2.5, 3.25])
    optimizer.step()
    other.step()
    for param, twin in zip([scalar, vector], twins):
        assert_same_bits(param, twin)


LAYOUTS = {
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "gaps": lambda tensor: torch.zeros(2 * tensor.shape[0], 2 * tensor.shape[1])[::2, 1::2].copy_(tensor),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_in_other_layouts(layout: str, cpu_engine: str):
    [start] = parameters(torch.float32, [(N_ROWS, WIDTH)])
    table = LAYOUTS[layout](start.detach()).requires_grad_()
    optimizer, core = RMSprop([table], **FULL), Core([start], **FULL)
    for n in range(3):
        table.grad = random_rows((N_ROWS, WIDTH), torch.float32, n)
        core.step([slices(table.grad)])
        optimizer.step()
    core.assert_same_bits(optimizer)


def test_values_in_other_layouts(cpu_engine: str):
    """Those of `nn.Embedding` are expanded where all are the same, and negated ones are known as such."""
    [table] = parameters(torch.float32, [(N_ROWS, WIDTH)])
    optimizer, core = RMSprop([table], **FULL), Core([table], **FULL)
    base = parameters(torch.float32, [(WIDTH, 3)], seed=1)[0].detach()
    for values in (
        torch.tensor(0.5).expand(3, WIDTH),
        base.t(),
        torch._neg_view(base.t()),
        base.t()[:, :1].expand(3, 4),
    ):
        table.grad = sparse(torch.tensor([[4, 0, 4]]), values, (N_ROWS, WIDTH))
        optimizer.step()
        rows = np.array([4, 0, 4])
        core.step([gpurms.IndexedSlices(values.resolve_neg().contiguous().numpy(), rows)])
    core.assert_same_bits(optimizer)


@pytest.mark.parametrize("rows", [[4, 2, 4], [4, 2, 3]])
def test_values_in_memory_of_the_table(rows: list[int], cpu_engine: str):
    [table] = parameters(torch.float32, [(N_ROWS, WIDTH)])
    core = Core([table], **FULL)
    values = table.detach()[2:5]
    table.grad = sparse([rows], values, (N_ROWS, WIDTH))
    assert table.grad._values().data_ptr() == values.data_ptr()
    core.step([gpurms.IndexedSlices(values.numpy().copy(), np.array(rows))])
    RMSprop([table], **FULL).step()
    assert_same_bits(table, core.variables[0].numpy())


TURNS = ("ddd", "dds", "sdd", "ddd", "sds", "d-s", "sd-", "d-d", "sds", "dds", "ddd", "sdd")
"""Of three gradients, step by step: dense, sparse, or none."""


def test_dense_and_sparse_take_turns(cpu_engine: str):
    """In one group, for tables and other parameters."""
    params = parameters(torch.float32, [(N_ROWS, WIDTH), (3, 2), (N_ROWS, WIDTH)])
    optimizer, core = RMSprop(params, **FULL), Core(params, **FULL)
    for n, turn in enumerate(TURNS):
        some = {"d": gradients(params, n), "s": [random_rows((N_ROWS, WIDTH), torch.float32, n)] * 3, "-": [None] * 3}
        grads = [some[kind][i] for i, kind in enumerate(turn)]
        for param, grad in zip(params, grads):
            param.grad = grad
        optimizer.step()
        core.step([slices(grad) if grad is not None and grad.is_sparse else grad for grad in grads])
    core.assert_same_bits(optimizer)


class Bag(nn.Module):
    """Two tables, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 6, sparse=True)
        self.bags = nn.EmbeddingBag(40, 6, sparse=True, mode="sum")
        self.out = nn.Linear(6, 1)

    def forward(self, words: Tensor, bags: Tensor) -> Tensor:
        return self.out(self.words(words).sum(1) * self.bags(bags))


def test_embeddings():
    """As `gpurms` itself, gradients given; and the loss falls."""
    torch.manual_seed(0)
    model = Bag()
    options = {"lr": 0.05, "momentum": 0.5}
    optimizer, core = RMSprop(model.parameters(), **options), Core(model.parameters(), **options)
    words, bags = torch.randint(0, 50, (16, 3)), torch.randint(0, 40, (16, 5))
    target, losses = torch.randn(16, 1), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(words, bags), target)
        loss.backward()
        grads = [param.grad for param in model.parameters()]
        assert [grad.is_sparse for grad in grads] == [True, True, False, False]
        core.step([slices(grad) if grad.is_sparse else grad for grad in grads])
        optimizer.step()
        losses.append(loss.item())
    core.assert_same_bits(optimizer)
    assert losses[-1] < losses[0] / 10


def test_dense_gradients_of_the_touched_rows_alone(numpy_engine: None):
    """Where each step touches all rows, sparse and dense are the same, and so is torch's dense step."""
    torch.manual_seed(0)
    start = torch.randn(4, 3, dtype=torch.float64)
    tables = [
        nn.Embedding.from_pretrained(start.clone(), freeze=False, sparse=is_sparse) for is_sparse in (True, False)
    ]
    makes: list[Any] = [RMSprop, torch.optim.RMSprop]
    optimizers = [make(table.parameters(), **FULL) for make, table in zip(makes, tables)]
    for _ in range(10):
        order = torch.randperm(4)
        for table, optimizer in zip(tables, optimizers):
            optimizer.zero_grad()
            (table(order) ** 2 * torch.arange(1.0, 5.0)[:, None]).sum().backward()
            optimizer.step()
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=1e-11, atol=1e-12)


def test_sparse_dimensions_that_are_not_one_in_memory():
    w = torch.zeros(3, 4).t().requires_grad_()
    w.grad = torch.sparse_coo_tensor([[0, 3], [1, 2]], [1.0, 2.0], (4, 3), check_invariants=False)
    opt = RMSprop([w])
    with pytest.raises(RuntimeError, match=r"2 sparse dimensions needs .* got shape \(4, 3\), strides \(1, 4\)"):
        opt.step()
    assert not opt.state
    assert not w.any()
