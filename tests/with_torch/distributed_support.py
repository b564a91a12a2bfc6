"""A model whose gradients are known, to the bit, on any number of ranks, and one process that takes the same steps."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gpurms.torch import RMSprop

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.5},
    "centered": {"centered": True},
    "all": {
        "momentum": 0.5,
        "centered": True,
        "weight_decay": 0.125,
        "maximize": True,
        "nesterov": True,
        "eps_in_sqrt": True,
        "lr_in_momentum": True,
        "decoupled_weight_decay": True,
    },
}
SLOTS = ("square_avg", "momentum_buffer", "grad_avg")
SHAPES = ((7, 3), (1, 5), (4,), (2, 3, 2), (8, 4))
"""Of 2 or 4 ranks some get less than others, and some nothing, of most of these."""


class Ranks(NamedTuple):
    """This rank, how many there are, and a folder that outlives them."""

    rank: int
    size: int
    shared: Path


class Linear(nn.Module):
    """The sum of a weight's elements times given coefficients, which are its gradient."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype))

    def forward(self, coefficients: Tensor) -> Tensor:
        return (self.weight * coefficients).sum()


class Known(nn.Module):
    """Weights of several shapes, whose gradients are what is given to ``forward``."""

    def __init__(self, shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.parts = nn.ModuleList([Linear(shape, dtype) for shape in shapes])

    def forward(self, coefficients: list[Tensor]) -> Tensor:
        return torch.stack([part(each.to(part.weight.dtype)) for part, each in zip(self.parts, coefficients)]).sum()


def coefficients(step: int, rank: int, shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    """Few enough bits that the mean over 2 or 4 ranks is exact, in whatever order it is formed, in bfloat16 too."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randint(-8, 9, shape, generator=generator) / 4 for shape in shapes]


def mean_coefficients(step: int, size: int, shapes: Iterable[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    shapes = list(shapes)
    return [sum(some[1:], some[0]) / size for some in zip(*(coefficients(step, rank, shapes) for rank in range(size)))]


class Single:
    """The run of one process on the mean of the ranks' gradients."""

    def __init__(
        self,
        size: int,
        shapes: Iterable[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        optimizer: type[torch.optim.Optimizer] = RMSprop,
        **options: Any,
    ) -> None:
        self.size = size
        self.shapes = list(shapes)
        self.model = Known(self.shapes, dtype)
        self.optimizer = optimizer(self.model.parameters(), **options)

    def step(self, step: int, before: Callable[[], Any] = lambda: None) -> None:
        """``before``: what is done between the gradients and the update."""
        grads = mean_coefficients(step, self.size, self.shapes)
        for parameter, grad in zip(self.model.parameters(), grads, strict=True):
            parameter.grad = grad.to(parameter.dtype) if parameter.requires_grad else None
        before()
        self.optimizer.step()

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """All parameters and all state of the other run agree to the bit."""
        same_run(model, optimizer, self.model, self.optimizer)


def whole(tensor: Tensor) -> Tensor:
    """Of a distributed tensor all of it; every rank must ask."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_bits(got: Tensor, want: Tensor, what: str = "") -> None:
    got, want = whole(got), whole(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape), what
    assert torch.equal(got.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8)), (
        f"{what}: got {got}, want {want}"
    )


def assert_close(got: Tensor, want: Tensor, what: str = "") -> None:
    """To 1e-6 of the largest element, or of 1: some eight units in its last place."""
    got, want = whole(got), whole(want)
    unit = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * unit, msg=lambda text: f"{what}: {text}")


Compare = Callable[[Tensor, Tensor, str], None]


def same_state(got: Mapping[str, Any], want: Mapping[str, Any], what: str, compare: Compare = assert_same_bits) -> None:
    assert got.keys() == want.keys(), f"{what}: got {list(got)}, want {list(want)}"
    for key in want:
        compare(got[key], want[key], f"{key} of {what}")


def same_parameters(model: nn.Module, other: nn.Module, compare: Compare = assert_same_bits) -> None:
    for (name, got), want in zip(model.named_parameters(), other.parameters(), strict=True):
        compare(got, want, name)


def same_run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    other: nn.Module,
    other_optimizer: torch.optim.Optimizer,
    compare: Compare = assert_same_bits,
) -> None:
    """Parameters and state of two models of the same architecture."""
    same_parameters(model, other, compare)
    for (name, got), want in zip(model.named_parameters(), other.parameters(), strict=True):
        same_state(optimizer.state.get(got, {}), other_optimizer.state.get(want, {}), name, compare)


def network(dtype: torch.dtype) -> nn.Sequential:
    """A small one, of layers that no number of ranks divides."""
    torch.manual_seed(2)
    layers = (nn.Linear(6, 15), nn.Tanh(), nn.Linear(15, 5), nn.ReLU(), nn.Linear(5, 3))
    return nn.Sequential(*layers).to(dtype)


def check_network(ranks: Ranks, wrapped: Callable[[nn.Sequential], nn.Module]) -> None:
    """Train it with the engine and alone.

    Two ranks add two numbers, which is exact. The order in which four are added is the engine's; in float32 slots of
    tiny gradients then differ by more than parameters do.
    """
    options = {"lr": 0.001, "momentum": 0.9, "centered": True, "weight_decay": 0.01}
    for dtype in (torch.float32, torch.float64):
        single, model = network(dtype), wrapped(network(dtype))
        single_optimizer, optimizer = RMSprop(single.parameters(), **options), RMSprop(model.parameters(), **options)
        for step in range(10):
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(ranks.size, 8, 6, generator=generator, dtype=dtype)
            classes = torch.randint(0, 3, (ranks.size, 8), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[ranks.rank]), classes[ranks.rank]).backward()
            optimizer.step()
            single_optimizer.zero_grad()
            for x, y in zip(inputs, classes):
                (nn.functional.cross_entropy(single(x), y) / ranks.size).backward()
            single_optimizer.step()
        if ranks.size == 2:
            same_run(model, optimizer, single, single_optimizer)
        elif dtype is torch.float64:
            same_run(model, optimizer, single, single_optimizer, assert_close)
        else:
            same_parameters(model, single, assert_close)
