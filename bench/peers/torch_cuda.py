"""PyTorch on the GPU: ``RMSprop`` with its multi-tensor operations, the same compiled, and ``SparseAdam``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench.measure import Ready, Step
from bench.peers import EPSILON, LR, RHO

if not torch.cuda.is_available():
    raise RuntimeError(f"torch {torch.__version__} finds no CUDA device")

DEVICE = "cuda"
Tensor = torch.Tensor


def noise(shape: Any) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def optimizer(shapes: Sequence[Any]) -> torch.optim.Optimizer:
    """``torch.optim.RMSprop(foreach=True)`` of new variables."""
    params = [torch.nn.Parameter(noise(shape)) for shape in shapes]
    return torch.optim.RMSprop(params, lr=LR, alpha=RHO, eps=EPSILON, foreach=True)


def compiled(step: Step) -> Step:
    """By ``torch.compile``, as PyTorch's guide compiles an optimizer; nothing of earlier ones is left."""
    torch.compiler.reset()
    return torch.compile(lambda: step(), fullgraph=False)


def rotating(n: int, n_grads: int, compile: bool) -> Step:
    """One variable of n elements, whose gradients take turns."""
    taken = optimizer([n])
    step = compiled(taken.step) if compile else taken.step
    (param,) = taken.param_groups[0]["params"]
    grads, at = [noise(n) for _ in range(n_grads)], 0

    def turn() -> None:
        nonlocal at
        param.grad = grads[at]
        at = (at + 1) % n_grads
        step()

    return turn


def fresh(count: int, n: int, compile: bool) -> Ready:
    """Variables with new gradients at every step."""
    taken = optimizer([n] * count)
    step = compiled(taken.step) if compile else taken.step
    params = taken.param_groups[0]["params"]
    source = [noise(n) for _ in range(count)]

    def ready() -> Step:
        for param, grad in zip(params, source, strict=True):
            param.grad = grad.clone()
        return step

    return ready


def sparse_adam(n_rows: int, row_size: int, ids: Any) -> Ready:
    """A new uncoalesced gradient at every step, as ``nn.Embedding(sparse=True)`` yields it."""
    param = torch.nn.Parameter(noise((n_rows, row_size)))
    taken = torch.optim.SparseAdam([param], lr=LR)
    indices, rows = torch.from_numpy(ids).to(DEVICE)[None], noise((len(ids), row_size))

    def ready() -> Step:
        param.grad = torch.sparse_coo_tensor(indices, rows, param.shape, check_invariants=False)
        return taken.step

    return ready


def kernels(step: Step) -> list[str]:
    """What PyTorch's profiler sees on the device during a step, whichever library sends it; copies and fills too."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
