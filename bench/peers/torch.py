"""PyTorch: ``RMSprop`` with its multi-tensor operations, and ``SparseAdam``, its adaptive optimizer for embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bench.measure import Ready, Step
from bench.peers import EPSILON, LR, MOMENTUM, RHO
from gpurms.kernels import pool

Array = np.ndarray

torch.set_num_threads(pool.n_threads())


def rmsprop(variables: Sequence[Array], momentum: bool = False, centered: bool = False) -> torch.optim.Optimizer:
    """``torch.optim.RMSprop(foreach=True)`` of variables that it updates in place."""
    return torch.optim.RMSprop(
        [torch.nn.Parameter(torch.from_numpy(var)) for var in variables],
        lr=LR,
        alpha=RHO,
        eps=EPSILON,
        momentum=MOMENTUM if momentum else 0.0,
        centered=centered,
        foreach=True,
    )


def dense(var: Array, grad: Array, momentum: bool = False, centered: bool = False) -> Step:
    """One variable, the same gradient at every step."""
    optimizer = rmsprop([var], momentum, centered)
    set_grads(optimizer, [grad])
    return optimizer.step


def set_grads(optimizer: torch.optim.Optimizer, grads: Sequence[Array]) -> None:
    """What the backward pass would do."""
    for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        param.grad = torch.from_numpy(grad)


def sparse_adam(table: Array, values: Array, ids: Array) -> Ready:
    """A new uncoalesced gradient at every step, as ``nn.Embedding(sparse=True)`` yields it."""
    param = torch.nn.Parameter(torch.from_numpy(table))
    optimizer = torch.optim.SparseAdam([param], lr=LR)
    indices, rows = torch.from_numpy(ids)[None], torch.from_numpy(values)

    def ready() -> Step:
        param.grad = torch.sparse_coo_tensor(indices, rows, table.shape, check_invariants=False)
        return optimizer.step

    return ready
