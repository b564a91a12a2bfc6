"""What a step does to autograd, to gradients, to memory and to other threads."""

import tracemalloc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpurms.kernels import pool
from gpurms.torch import RMSprop
from tests.with_torch.support import FULL, assert_same_run, clones, gradients, parameters, run


def test_step_between_forward_and_backward():
    """Autograd finds out, as after torch's own step."""
    for make in (RMSprop, torch.optim.RMSprop):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = make(model.parameters())
        loss = model(torch.ones(1, 3)).square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("kind", ["dense", "strided", "sparse"])
def test_versions(kind: str):
    """Of parameters that are updated, and of no others; nor of gradients."""
    table = torch.ones(4, 6)[:, ::2] if kind == "strided" else torch.ones(4, 3)
    updated, idle = table.requires_grad_(), torch.ones(3, requires_grad=True)
    optimizer = RMSprop([updated, idle])
    grad = torch.ones(4, 3)
    updated.grad = grad.to_sparse() if kind == "sparse" else grad
    versions = updated._version, idle._version, updated.grad._version
    optimizer.step()
    assert updated._version > versions[0]
    assert (idle._version, updated.grad._version) == versions[1:]


def test_no_graph_grows():
    """Parameters stay leaves, and state takes no part in autograd."""
    params = parameters(torch.float32)
    optimizer = RMSprop(params, **FULL)
    for param, grad in zip(params, gradients(params, 0)):
        param.grad = grad
    with torch.enable_grad():
        optimizer.step()
    assert all(param.is_leaf and param.requires_grad and param.grad_fn is None for param in params)
    assert not any(value.requires_grad for state in optimizer.state.values() for value in state.values())


def test_lr_that_requires_grad():
    """Nothing flows into it; torch refuses it or ignores it, by the implementation."""
    [param] = parameters(torch.float32, [(3,)])
    [twin] = clones([param])
    rate = torch.tensor(0.25, requires_grad=True)
    run(RMSprop([param], lr=rate), 2)
    run(RMSprop([twin], lr=0.25), 2)
    assert rate.grad is None
    assert torch.equal(param, twin)


Assign = Callable[[Tensor, np.ndarray], None]


def dense(param: Tensor, values: np.ndarray) -> None:
    param.grad = torch.from_numpy(values)


def transposed(param: Tensor, values: np.ndarray) -> None:
    param.grad = torch.from_numpy(values.reshape(3, 4)).t()


def sparse(param: Tensor, values: np.ndarray) -> None:
    indices = torch.tensor([[0, 1, 2, 1]])
    param.grad = torch.sparse_coo_tensor(indices, torch.from_numpy(values), (4, 3), check_invariants=True)


@pytest.mark.parametrize("assign", [dense, transposed, sparse])
@pytest.mark.parametrize("with_gaps", [False, True])
def test_gradients_are_not_kept_alive(assign: Assign, with_gaps: bool, cpu_engine: str):
    param = (torch.ones(4, 6)[:, ::2] if with_gaps else torch.ones(4, 3)).requires_grad_()
    optimizer = RMSprop([param])
    for _ in range(3):
        values = np.ones((4, 3), np.float32)
        alive = weakref.ref(values)
        assign(param, values)
        del values
        assert alive() is not None
        optimizer.step()
        param.grad = None
        assert alive() is None


def test_gradients_of_a_refused_step_are_not_kept_alive():
    tables = [torch.ones(4, 3, requires_grad=True) for _ in range(2)]
    optimizer = RMSprop(tables)
    values = np.ones((4, 3), np.float32)
    alive = weakref.ref(values)
    sparse(tables[0], values)
    del values
    outside = torch.sparse_coo_tensor(torch.tensor([[4]]), torch.ones(1, 3), (4, 3), check_invariants=False)
    tables[1].grad = outside
    with pytest.raises(IndexError):
        optimizer.step()
    tables[0].grad = None
    assert alive() is None


def test_optimizer_and_parameters_can_go():
    param = torch.ones(3, requires_grad=True)
    optimizer = RMSprop([param])
    run(optimizer, 2)
    references = [weakref.ref(param), weakref.ref(optimizer), weakref.ref(optimizer.state[param]["square_avg"])]
    del param, optimizer
    assert [reference() for reference in references] == [None] * 3


MILLION = 1 << 20


def allocated(function: Callable[[], Any]) -> int:
    """Bytes of all that torch and NumPy allocate in a call; the peak of the latter."""
    tracemalloc.start()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    of_torch = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    return int(of_torch) + peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, FULL], ids=["default", "all"])
def test_no_temporaries(dtype: torch.dtype, options: dict[str, Any], cpu_engine: str, monkeypatch: pytest.MonkeyPatch):
    """Of the size of parameters: some blocks per thread, and here on one."""
    monkeypatch.setattr(pool, "n_threads", lambda: 1)
    params = [torch.ones(MILLION, dtype=dtype, requires_grad=True) for _ in range(4)]
    for param in params:
        param.grad = torch.ones(MILLION, dtype=dtype)
    optimizer = RMSprop(params, **options)
    optimizer.step()
    assert allocated(optimizer.step) < MILLION
    if options and dtype is torch.float32:
        theirs = torch.optim.RMSprop(params, **options, foreach=True)
        theirs.step()
        assert allocated(theirs.step) > 16 * MILLION  # or this would measure nothing


def test_rows_need_memory_for_rows(cpu_engine: str):
    table = torch.ones(MILLION, 4, requires_grad=True)
    optimizer = RMSprop([table], **FULL)
    table.grad = torch.sparse_coo_tensor(
        torch.tensor([[5, MILLION - 1, 5]]), torch.ones(3, 4), table.shape, check_invariants=True
    )
    optimizer.step()
    assert allocated(optimizer.step) < MILLION // 4


def test_threads(cpu_engine: str):
    """Two optimizers at once, whose parameters are cut into pieces for all cores."""
    shapes = [(70_000,), (3,), (40_000,)]

    def train(seed: int) -> list[Tensor]:
        params = parameters(torch.float32, shapes, seed)
        optimizer = RMSprop(params, **FULL)
        run(optimizer, 5)
        return params

    with ThreadPoolExecutor(4) as executor:
        at_once = list(executor.map(train, range(4)))
    for seed, params in enumerate(at_once):
        assert_same_run(params, train(seed))


def test_grad_mode_of_other_threads_is_their_own():
    params = parameters(torch.float32)
    optimizer = RMSprop(params)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(run, optimizer, 2).result()
        assert executor.submit(torch.is_grad_enabled).result()
    assert torch.is_grad_enabled()
    run(optimizer, 1)


def test_inference_mode():
    """Torch's own state made there could not be used outside either."""
    for make in (RMSprop, torch.optim.RMSprop):
        [param] = parameters(torch.float32, [(3,)])
        optimizer = make([param])
        run(optimizer, 1)
        before = param.detach().clone()
        with torch.inference_mode():
            optimizer.step()
        assert not torch.equal(param, before)
        run(optimizer, 1)
