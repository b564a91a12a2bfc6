"""gpurms's drop-in and torch's own optimizers, on the same shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bench.measure import Ready
from bench.peers import EPSILON, LR, MOMENTUM, RHO
from gpurms.kernels import pool
from gpurms.torch import RMSprop

GPURMS, FOREACH, FOR_LOOP = "gpurms.torch", "torch foreach", "torch for-loop"

torch.set_num_threads(pool.n_threads())


def parameters(sizes: Sequence[int], device: str = "cpu") -> list[torch.nn.Parameter]:
    """New ones, with gradients."""
    made = [torch.nn.Parameter(torch.randn(n, device=device)) for n in sizes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def optimizer(name: str, of: Any, momentum: bool = False, **options: Any) -> Any:
    """The contestant of that name, with the numbers that all have; ``of``: parameters, or groups of them."""
    numbers = {"lr": LR, "alpha": RHO, "eps": EPSILON, "momentum": MOMENTUM if momentum else 0.0}
    if name == GPURMS:
        return RMSprop(of, **numbers, **options)
    return torch.optim.RMSprop(of, **numbers, foreach=name == FOREACH, **options)


def fresh(name: str, of: Sequence[torch.nn.Parameter], n_groups: int = 1) -> Ready:
    """A step with new gradients each time, as a backward pass leaves them."""
    groups = [{"params": of[i::n_groups]} for i in range(n_groups)]
    taken = optimizer(name, [group for group in groups if group["params"]])

    def ready() -> Any:
        for parameter in of:
            parameter.grad = parameter.grad.clone()
        return taken.step

    return ready
